"""Small calls of the kernels under compute-sanitizer's tools.

    python -m benchmarks.gpu.sanitize

memcheck looks at every plan of the CUDA kernels and at Triton's; racecheck and synccheck at the
CUDA kernels alone, for Triton places its own barriers. Each tool and target is a process of its
own, and some run beside each other.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from benchmarks import tally
from benchmarks.environment import ROOT, cpu_cores, terminable
from benchmarks.gpu.smoke import CUDA

# The most telling first.
RUNS = (
    *(("memcheck", target) for target in CUDA),
    *((tool, target) for target in CUDA for tool in ("racecheck", "synccheck")),
    ("memcheck", "triton"),
)
NO_TOOL = "compute-sanitizer is not on the PATH nor in CUDA_HOME: it comes with the CUDA toolkit"
FOUND = 9  # exit status of a tool that found something
MOST = 8  # at once: the tool has ten ports to talk through


def sanitizer() -> str | None:
    """The program, or None."""
    home = os.environ.get("CUDA_HOME") or "/usr/local/cuda"
    return shutil.which("compute-sanitizer") or shutil.which(
        "compute-sanitizer", path=os.pathsep.join([f"{home}/bin", f"{home}/compute-sanitizer"])
    )


def command(program: str, tool: str, target: str) -> list[str]:
    """Of compute-sanitizer, over the process that computes and none that it starts: compilers."""
    options = ["--tool", tool, "--error-exitcode", str(FOUND), "--print-limit", "20"]
    options += ["--target-processes", "application-only", "--require-cuda-init", "no"]
    if tool == "memcheck":  # that a device refuses a launch it is asked about is an answer
        options += ["--report-api-errors", "no"]
    smoke = [sys.executable, "-m", "benchmarks.gpu.smoke", "--few", "--targets", target]
    return [program, *options, *smoke]


@contextlib.contextmanager
def all_ended(started: list[subprocess.Popen[str]]) -> Iterator[None]:
    """None of these processes runs on, whatever happens within."""
    try:
        yield
    finally:
        for process in started:
            if process.poll() is None:
                process.kill()


def run(
    program: str, tool: str, target: str, told: Path, started: list[subprocess.Popen[str]]
) -> str:
    """One tool over one target: "passed", "failed", or "skipped" where there are no such calls."""
    # Every tensor is an allocation of its own, so that no overrun stays unseen.
    # PyTorch then loads only those of its thousands of kernels that are called.
    environment = os.environ | {
        "PYTORCH_NO_CUDA_MEMORY_CACHING": "1",
        "CUDA_MODULE_LOADING": "LAZY",
        "PYTHONUNBUFFERED": "1",
    }
    process = subprocess.Popen(
        command(program, tool, target), cwd=ROOT, text=True,
        env=environment | {tally.VARIABLE: str(told)},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    started.append(process)
    said, _ = process.communicate()
    calls = tally.read(told)
    none = calls is not None and calls.done == calls.skipped
    outcome = "failed" if process.returncode else "skipped" if none else "passed"
    print(f"---- {tool}, {target}: {outcome}, exit status {process.returncode}\n{said[-3000:]}")
    return outcome


def main() -> int:
    program, counted = sanitizer(), tally.Tally(of=len(RUNS))
    if program is None:
        counted.skipped = len(RUNS)
        counted.tell()
        print(f"skipped: {NO_TOOL}")
        return 0
    counted.tell()
    started: list[subprocess.Popen[str]] = []
    pool = ThreadPoolExecutor(max(1, min(MOST, cpu_cores() // 2)))
    with tempfile.TemporaryDirectory() as folder, terminable(), all_ended(started):
        todo = [
            pool.submit(run, program, *each, Path(folder, str(i)), started)
            for i, each in enumerate(RUNS)
        ]
        try:
            for done in as_completed(todo):
                counted.add(done.result())
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
    print(f"{counted.passed} passed, {counted.failed} failed, {counted.skipped} skipped")
    return int(counted.failed > 0)


if __name__ == "__main__":
    sys.exit(main())
