"""What is done on a machine with a GPU, in which order, with which share of the time."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

BUDGET = 460.0
MARGIN = 12.0  # seconds that a benchmark needs beyond its own limit, to start and to write
WORKERS = 8
LONGEST = 60  # seconds of a test
ALL = 10**6

Command = list[str]
PYTHON = [sys.executable, "-m"]


@dataclass(frozen=True)
class Part:
    """`share` of the time; `firm`: at least so many seconds, for what all else depends on."""

    name: str
    share: float
    commands: Callable[[float], list[Command]]  # of the seconds it gets
    firm: float = 0.0


def installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def pytest(backend: str, most: int, *paths: str) -> Command:
    """The tests of one backend, no more than so many; a tenth of them in a single process."""
    parallel = []
    if installed("xdist"):  # whose loadgroup does not outlive a process that crashes; this does
        parallel = ["-n", str(WORKERS), "--dist", "worksteal"]
        if installed("pytest_timeout"):  # one that waits for ever is ended, and replaced
            parallel += [f"--timeout={LONGEST}", "--timeout-method=thread"]
    else:
        most //= 10
    chosen = ["-p", "benchmarks.gpu.chosen", "--backend", backend, "--at-most", str(most)]
    # A file that lacks what it imports stops no other.
    how = ["-q", "--tb=short", "--continue-on-collection-errors"]
    return [*PYTHON, "pytest", *how, *parallel, *chosen, *paths]


def parts(preset: str, scratch: Path) -> list[Part]:
    """In order. Triton compiles 12 and more kernels for nearly every test: few of them."""
    full = preset == "full"
    under = ["env", "DA_OPS_TEST_FULL=1"] if full else []
    make = ["make", "VENV=", f"PYTHON={sys.executable}", "build"]
    gpu_tests = "tests/test_gpu.py"

    def tests(
        backend: str, most: int, path: str = "tests", *variables: str
    ) -> Callable[[float], list[Command]]:
        env = [*(under or (["env"] if variables else [])), *variables]
        apart = [] if path == gpu_tests or backend == "triton" else [f"--ignore={gpu_tests}"]
        return lambda _: [[*env, *pytest(backend, ALL if full else most, *apart, path)]]

    def bench(kind: str) -> Callable[[float], list[Command]]:
        output = ["--output", str(scratch / f"x-{kind}.json")]
        what = [*PYTHON, f"benchmarks.{kind}", "--device", "cuda", "--preset", preset, *output]
        return lambda seconds: [[*what, "--seconds", f"{max(seconds - MARGIN, 1.0):.0f}"]]

    return [
        Part("build", 50, lambda _: [make, [*PYTHON, "benchmarks.gpu.smoke", "--few"]], firm=150),
        Part("cuda", 40, tests("cuda", 1600), firm=45),
        Part("onchip", 30, tests("cuda", 800, "tests", "DA_OPS_PLAN=onchip"), firm=30),
        Part("gpu", 30, tests("cuda", 400, gpu_tests)),
        Part("sanitize", 40, lambda _: [[*PYTHON, "benchmarks.gpu.sanitize"]]),
        Part("op", 130, bench("op")),
        Part("triton", 30, tests("triton", 60)),
        Part("network", 60, bench("network")),
    ]


def limit(todo: Sequence[Part], left: float) -> float:
    """Seconds for the first of these parts: its share of what is left, and what is firm."""
    part = todo[0]
    return min(left, max(part.firm, left * part.share / sum(p.share for p in todo)))
