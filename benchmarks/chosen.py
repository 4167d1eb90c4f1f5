"""pytest plugin: `-p benchmarks.chosen --backend cuda --at-most 800` runs the tests of one backend,
and of those no more than so many, spread over all and the same ones each time."""

from __future__ import annotations

import random
from typing import Any


def pytest_addoption(parser: Any) -> None:
    group = parser.getgroup("chosen")
    group.addoption("--backend", required=True)
    group.addoption("--at-most", type=int, required=True)


def choose(items: list[Any], backend: str, most: int) -> list[Any]:
    """Those whose fixture `_target` is (backend, device)."""
    mine = [
        item
        for item in items
        if getattr(item, "callspec", None)
        and item.callspec.params.get("_target", ("",))[0] == backend
    ]
    kept = set(random.Random(0).sample(range(len(mine)), min(most, len(mine))))
    return [item for i, item in enumerate(mine) if i in kept]


def pytest_collection_modifyitems(config: Any, items: list[Any]) -> None:
    kept = choose(items, config.getoption("--backend"), config.getoption("--at-most"))
    left = set(kept)
    config.hook.pytest_deselected(items=[item for item in items if item not in left])
    items[:] = kept
