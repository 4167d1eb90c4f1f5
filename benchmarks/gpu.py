"""All that is to be done on a machine with a GPU, in one go and in minutes: build, test, measure.

    python -m benchmarks.gpu [--budget SECONDS] [--preset quick|full] [--out FOLDER] [--only PART]

Parts: build (with a first call of every kernel), cuda, onchip and triton (the suite on cuda, on it
with DA_OPS_PLAN=onchip, and on triton), gpu (tests/test_gpu.py), sanitize (compute-sanitizer), op
and network (the benchmarks). Each part gets
its share of the time that is left; one that fails or takes too long stops no other. The results,
benchmarks/results/DEVICE.json with a chart, or only FOLDER with --only or --out, say which parts
passed. They are also copied to the folder that the variable OUT names, if it is set.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import environment, report, tables
from benchmarks.environment import ROOT

BUDGET = 460.0
MARGIN = 12.0  # seconds that a benchmark needs beyond its own limit, to start and to write
GRACE = 6.0  # seconds from being interrupted to being killed
WORKERS = 8
COUNTED = re.compile(r"(\d+) (passed|failed|skipped|errors?)\b")
BEGINS = re.compile(r"[= ]*\d+ (passed|failed|skipped|errors?)\b")

Command = list[str]


@dataclass(frozen=True)
class Part:
    """`share` of the time; `firm`: at least so many seconds, for what all else depends on."""

    name: str
    share: float
    commands: Callable[[float], list[Command]]  # of the seconds it gets
    firm: float = 0.0


@dataclass
class Outcome:
    name: str
    status: str  # "passed", "failed", "skipped"
    passed: int = 0
    failed: int = 0
    skipped: int = 0
    seconds: float = 0.0
    note: str = ""

    def check(self) -> bool | None:
        return {"passed": True, "failed": False}.get(self.status)


def pytest(*arguments: str) -> Command:
    """The suite over several processes, or one where pytest-xdist is not installed."""
    several = ["-n", str(WORKERS), "--dist", "loadgroup"]
    parallel = several if importlib.util.find_spec("xdist") else []
    return [sys.executable, "-m", "pytest", "-q", "--tb=short", *parallel, *arguments]


def suite(backend: str, most: int, *variables: str) -> Callable[[float], list[Command]]:
    """The tests of one backend, under these `NAME=VALUE`; a tenth of them where there is one
    process."""
    most = most if importlib.util.find_spec("xdist") else most // 10
    chosen = ["-p", "benchmarks.chosen", "--backend", backend, "--at-most", str(most)]
    under = ["env", *variables] if variables else []
    return lambda seconds: [[*under, *pytest(*chosen, "tests")]]


def parts(preset: str, scratch: Path) -> list[Part]:
    """In the order of the table. Triton compiles a kernel for nearly every test: few of them."""
    python = [sys.executable, "-m"]
    make = ["make", "VENV=", f"PYTHON={sys.executable}", "build"]

    def bench(kind: str, seconds: float) -> list[Command]:
        limit = f"{max(seconds - MARGIN, 1.0):.0f}"
        output = ["--seconds", limit, "--output", str(scratch / f"x-{kind}.json")]
        return [[*python, f"benchmarks.{kind}", "--device", "cuda", "--preset", preset, *output]]

    full = preset == "full"
    return [
        Part("build", 50, lambda _: [make, [*python, "benchmarks.smoke"]], firm=170),
        Part("cuda", 60, suite("cuda", 10**6 if full else 1600)),
        Part("onchip", 40, suite("cuda", 10**6 if full else 800, "DA_OPS_PLAN=onchip")),
        Part("triton", 60, suite("triton", 10**6 if full else 240)),
        Part("gpu", 45, lambda _: [pytest("tests/test_gpu.py")]),
        Part("sanitize", 40, lambda _: [[*python, "benchmarks.smoke", "--sanitize"]]),
        Part("op", 100, lambda seconds: bench("op", seconds)),
        Part("network", 105, lambda seconds: bench("network", seconds)),
    ]


def limit(todo: Sequence[Part], left: float) -> float:
    """Seconds for the first of these parts: its share of what is left, and what is firm."""
    part = todo[0]
    return min(left, max(part.firm, left * part.share / sum(p.share for p in todo)))


def counts(text: str) -> dict[str, int]:
    """ "3 failed, 10 passed, 2 skipped" of the last line that begins so."""
    for line in reversed(text.splitlines()[-40:]):
        if BEGINS.match(line):
            numbers = dict.fromkeys(("passed", "failed", "skipped"), 0)
            for number, what in COUNTED.findall(line):
                numbers["failed" if what.startswith("error") else what] += int(number)
            return numbers
    return {}


def run_command(command: Command, seconds: float, log: Path) -> int | None:
    """The exit status, or None where it took too long. Interrupted first, to tell what it has."""
    variables = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    if "benchmarks.network" in command:  # decodes and crops photographs
        del variables["OMP_NUM_THREADS"]
    variables.pop("MAKEFLAGS", None)
    with log.open("a") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, cwd=ROOT, env=variables,
            start_new_session=True,
        )  # fmt: skip
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None
        finally:
            for sent in (signal.SIGINT, signal.SIGKILL):
                with contextlib.suppress(ProcessLookupError):
                    if process.poll() is None or sent == signal.SIGKILL:
                        os.killpg(process.pid, sent)  # the session that was started above
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(GRACE)


def run_part(part: Part, seconds: float, folder: Path) -> Outcome:
    start, status = time.perf_counter(), 0
    log = folder / f"{part.name}.log"
    log.touch()
    note = ""
    for command in part.commands(seconds):
        left = seconds - (time.perf_counter() - start)
        try:
            code = run_command(command, max(left, 0.1), log)
        except OSError as error:
            code, note = 1, str(error)
        if code != 0:
            status = 1
            note = note or (f"stopped after {seconds:.0f} s" if code is None else f"exit {code}")
            break
    text = log.read_text(errors="replace")
    found = counts(text)
    only_skipped = bool(found) and not found["passed"] and not found["failed"]
    word = "failed" if status else "skipped" if only_skipped else "passed"
    if not found:
        found = {"passed": int(not status), "failed": int(bool(status)), "skipped": 0}
    if word == "failed":
        print(f"---- {part.name} failed ({note}); its last lines:")
        print("\n".join(text.splitlines()[-30:]), flush=True)
    return Outcome(part.name, word, **found, seconds=time.perf_counter() - start, note=note)


def run_all(todo: Sequence[Part], budget: float, folder: Path) -> list[Outcome]:
    """Every part in turn, whatever became of those before it."""
    start = time.perf_counter()
    outcomes = []
    for i, part in enumerate(todo):
        seconds = limit(todo[i:], max(budget - (time.perf_counter() - start), 1.0))
        print(f"{part.name}: at most {seconds:.0f} s", flush=True)
        outcomes.append(run_part(part, seconds, folder))
    return outcomes


def table(outcomes: Sequence[Outcome]) -> str:
    return tables.plain_table(
        ["part", "status", "passed", "failed", "skipped", "seconds", "note"],
        [
            [o.name, o.status, *(str(n) for n in (o.passed, o.failed, o.skipped)),
             f"{o.seconds:.0f}", o.note]
            for o in outcomes
        ],
    )  # fmt: skip


def results(outcomes: Sequence[Outcome], head: dict[str, Any], scratch: Path) -> dict[str, Any]:
    """What is written: the parts, and the benchmarks' own results."""
    found = {
        kind: json.loads(path.read_text())
        for kind in report.KINDS
        if (path := scratch / f"x-{kind}.json").exists()
    }
    return {
        **head,
        "seconds": sum(o.seconds for o in outcomes),
        "parts": [vars(o) for o in outcomes],
        "checks": {o.name: o.check() for o in outcomes},
        **found,
    }


def write(written: dict[str, Any], folders: Sequence[Path], scratch: Path) -> None:
    """The JSON and the chart to every folder, the log to OUT."""
    name = environment.slug(written["device"]["name"])
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
        environment.write_results(folder / f"{name}.json", written)
        together = {kind: written[kind] for kind in report.KINDS if kind in written}
        try:
            report.draw(together, folder / f"{name}.png")
        except Exception as error:  # the results are written, and the table is still to come
            print(f"no chart: {error}")
        print(f"results: {report.shown(folder / f'{name}.json')}")
    if os.environ.get("OUT"):
        logs = [f"==== {path.name}\n{path.read_text()}" for path in sorted(scratch.glob("*.log"))]
        (Path(os.environ["OUT"]) / f"{name}.log").write_text("\n".join(logs)[-8_000_000:])


def main(arguments: list[str] | None = None) -> int:
    kind = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        "python -m benchmarks.gpu", description=__doc__, formatter_class=kind
    )
    add = parser.add_argument
    add("--budget", type=float, default=BUDGET, help="seconds in all")
    add("--preset", choices=("quick", "full"), default="quick", help="of the benchmarks")
    add("--out", metavar="FOLDER", help="results")
    add("--only", choices=environment.GPU_PARTS, metavar="PART", action="append")
    options = parser.parse_args(arguments)
    import torch

    if not torch.cuda.is_available():
        print("benchmarks.gpu: torch finds no GPU here; nothing was run", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        todo = parts(options.preset, scratch)
        if options.only:
            todo = [part for part in todo if part.name in options.only]
        head = environment.head("gpu", "cuda", options.preset)
        outcomes = run_all(todo, options.budget, scratch)
        folder = environment.LOCAL if options.only else environment.COMMITTED
        folders = [Path(options.out) if options.out else folder]
        folders += [Path(os.environ["OUT"])] if os.environ.get("OUT") else []
        write(results(outcomes, head, scratch), folders, scratch)
    print(f"\n{table(outcomes)}", flush=True)
    return int(any(o.status == "failed" for o in outcomes))


if __name__ == "__main__":
    sys.exit(main())
