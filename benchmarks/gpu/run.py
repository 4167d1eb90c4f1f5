"""Runs the parts one after the other and says what became of each, also of one that was cut."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks import tally
from benchmarks.environment import ROOT
from benchmarks.gpu.parts import Command, Part, limit
from benchmarks.tally import Tally

GRACE = 6.0  # seconds from being interrupted to being killed
TICK = 10.0  # seconds from one look at what a part has done to the next
UNFINISHED = "unfinished"
SKIPPED = re.compile(r"SKIPPED|skipped:")


@dataclass
class Outcome:
    """What became of a part, and of how many tests, calls or measurements in it."""

    name: str
    status: str = "cut"  # until it has ended: "passed", "failed", "skipped", or still "cut"
    passed: int = 0
    failed: int = 0
    skipped: int = 0
    of: int = 0  # 0: not known
    seconds: float = 0.0
    note: str = UNFINISHED


@dataclass
class Progress:
    """The commands of a part until now."""

    folder: Path
    outcome: Outcome
    begun: float = field(default_factory=time.perf_counter)
    tallies: list[Path] = field(default_factory=list)
    untold: list[bool] = field(default_factory=list)  # whether those that tell nothing succeeded

    def next_tally(self) -> Path:
        path = self.folder / f"{self.outcome.name}-{len(self.tallies)}.tally"
        self.tallies.append(path)
        return path

    def update(self) -> Tally:
        """Bring the outcome's counts up to date."""
        told = [t for path in self.tallies if (t := tally.read(path)) is not None]
        told += [Tally(int(ok), int(not ok), 0, 1) for ok in self.untold]
        together = Tally(*(sum(getattr(t, name) for t in told) for name in vars(Tally())))
        vars(self.outcome).update(vars(together))
        self.outcome.seconds = time.perf_counter() - self.begun
        return together


def run_command(
    command: Command, seconds: float, log: Path, told: Path, look: Callable[[], object]
) -> int | None:
    """The exit status, or None where it took too long: it is interrupted, then killed."""
    variables = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    variables |= {tally.VARIABLE: str(told)}
    if "benchmarks.network" in command:  # decodes and crops photographs
        del variables["OMP_NUM_THREADS"]
    variables.pop("MAKEFLAGS", None)
    end = time.perf_counter() + seconds
    with log.open("a") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, cwd=ROOT, env=variables,
            start_new_session=True,
        )  # fmt: skip
        try:
            while (left := end - time.perf_counter()) > 0:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    return process.wait(min(left, TICK))
                look()
            return None
        finally:
            for sent in (signal.SIGINT, signal.SIGKILL):
                with contextlib.suppress(ProcessLookupError):
                    if process.poll() is None or sent == signal.SIGKILL:
                        os.killpg(process.pid, sent)  # the session that was started above
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(GRACE)


def run_part(
    outcome: Outcome, part: Part, seconds: float, folder: Path, look: Callable[[], object]
) -> None:
    """Run its commands in turn, the outcome being brought up to date on the way."""
    progress = Progress(folder, outcome)
    log = folder / f"{part.name}.log"
    log.touch()

    def watch() -> None:
        progress.update()
        look()

    code: int | None = 0
    note = ""
    try:
        for command in part.commands(seconds):
            told = progress.next_tally()
            left = seconds - (time.perf_counter() - progress.begun)
            try:
                code = run_command(command, max(left, 0.1), log, told, watch)
                note = f"stopped after {seconds:.0f} s" if code is None else f"exit {code}"
            except OSError as error:
                code, note = 1, str(error)
            if code is not None and tally.read(told) is None:
                progress.untold.append(code == 0)
            if code != 0:
                break
        outcome.note = "" if code == 0 else note
    finally:
        counted = progress.update()
    if code is None:
        outcome.status = "failed" if counted.failed else "cut"
    elif code != 0:
        outcome.status = "failed"
        outcome.failed = max(outcome.failed, 1)
    elif counted.done == counted.skipped:
        outcome.status = "skipped"
    else:
        outcome.status = "cut" if counted.done < counted.of else "passed"
    lines = log.read_text(errors="replace").splitlines()
    if outcome.status == "skipped":
        outcome.note = next((line for line in reversed(lines) if SKIPPED.match(line)), "")[:200]
    if outcome.status == "failed":
        print(f"---- {part.name} failed ({outcome.note}); its last lines:")
        print("\n".join(lines[-30:]), flush=True)


def run_all(
    todo: Sequence[Part], budget: float, folder: Path, save: Callable[[Sequence[Outcome]], object]
) -> list[Outcome]:
    """Every part in turn, whatever became of those before it. `save` is called every few seconds,
    and once a part has ended."""
    start = time.perf_counter()
    outcomes: list[Outcome] = []
    for i, part in enumerate(todo):
        seconds = limit(todo[i:], max(budget - (time.perf_counter() - start), 1.0))
        print(f"{part.name}: at most {seconds:.0f} s", flush=True)
        outcomes.append(Outcome(part.name))
        try:
            run_part(outcomes[-1], part, seconds, folder, lambda: save(outcomes))
        finally:
            save(outcomes)
    return outcomes
