"""pytest plugin: `-p benchmarks.gpu.chosen --backend cuda --at-most 800` runs the tests of one
backend, and of those no more than so many: some of everything, in mixed order, so that also a run
that is cut has met all, and the same each time.

How far they came is told (benchmarks/tally.py) after each, so that a run that is cut counts. A test
that leaves the GPU's context unusable, as an access to memory that is not there does, ends its
process: pytest-xdist starts another, so that the tests after it do not fail with it.
"""

from __future__ import annotations

import os
import random
from typing import Any

import pytest

from benchmarks.tally import Tally


def pytest_addoption(parser: Any) -> None:
    group = parser.getgroup("chosen")
    group.addoption("--backend", required=True)
    group.addoption("--at-most", type=int, required=True)


def choose(items: list[Any], backend: str, most: int) -> list[Any]:
    """Those whose fixture `_target` is (backend, ...)."""
    mine = [
        item
        for item in items
        if getattr(item, "callspec", None)
        and item.callspec.params.get("_target", ("",))[0] == backend
    ]
    return random.Random(0).sample(mine, min(most, len(mine)))


def pytest_collection_modifyitems(config: Any, items: list[Any]) -> None:
    kept = choose(items, config.getoption("--backend"), config.getoption("--at-most"))
    left = set(kept)
    config.hook.pytest_deselected(items=[item for item in items if item not in left])
    items[:] = kept


def pytest_configure(config: Any) -> None:
    if hasattr(config, "workerinput"):  # one of pytest-xdist's processes
        config.pluginmanager.register(Lost(), "lost")
    else:
        config.pluginmanager.register(Told(), "told")


class Told:
    """The tally, kept where all reports come together."""

    def __init__(self) -> None:
        self.tally = Tally()

    def pytest_collection_finish(self, session: Any) -> None:
        self.tally.of = len(session.items)
        self.tally.tell()

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" or report.outcome != "passed":
            self.tally.add(report.outcome)

    @pytest.hookimpl(optionalhook=True)  # pytest-xdist's
    def pytest_xdist_node_collection_finished(self, ids: list[str]) -> None:
        self.tally.of = len(ids)
        self.tally.tell()


class Lost:
    """Ends a process of pytest-xdist whose GPU context is lost."""

    def __init__(self) -> None:
        self.failed = False

    def pytest_runtest_logreport(self, report: Any) -> None:
        self.failed = report.outcome == "failed" or self.failed

    def pytest_runtest_logfinish(self) -> None:
        from benchmarks.gpu.smoke import lost  # torch waits for what conftest.py sets

        if self.failed and lost():
            os._exit(1)
        self.failed = False
