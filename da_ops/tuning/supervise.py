"""The process that tries plans out, watched: one that hangs or crashes costs its plan alone."""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import IO, Any

from .candidates import DEFAULT
from .trial import Job
from .verdict import Round

PROGRAM = (sys.executable, "-c", "from da_ops.tuning.trial import main; main()")
LIMIT = 60.0  # seconds without a word


@dataclass
class Outcome:
    """What was found: the rounds of all plans, those of the finalists, and why plans are left
    out."""

    first: list[Round] = field(default_factory=list)
    final: list[Round] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)


def supervise(job: Job, program: Sequence[str] = PROGRAM, limit: float = LIMIT) -> Outcome:
    """Have a job's plans tried, in as many processes as it takes.

    Raises:
        RuntimeError: the default plan failed, or the process before it tried any.
    """
    left_out: dict[str, str] = {}
    while True:
        outcome = Outcome(left_out=left_out)
        right: list[str] = []
        trying = failed = why = None
        with _Process(program, job.to_json(), limit) as process:
            for fact in process:
                trying = fact.get("trying", trying)
                if "right" in fact:
                    right.append(fact["right"])
                for stage, rounds in (("first", outcome.first), ("final", outcome.final)):
                    if fact.get(stage):
                        rounds.append(fact[stage])
                if "left_out" in fact:
                    failed, why = fact["left_out"], fact["why"]
                if "done" in fact:
                    return outcome
        if failed is None:
            failed, why = trying, process.why
        if failed is None or failed == DEFAULT:
            what = "the process that tries plans" if failed is None else "the default plan"
            raise RuntimeError(f"da_ops.tune: {what} {why}")
        left_out[failed] = str(why)
        job = replace(
            job,
            right=[plan for plan in [*job.right, *right] if plan != failed],
            unchecked=[plan for plan in job.unchecked if plan not in (*right, failed)],
        )


class _Process:
    """What a program says line by line. Once it has ended, or said nothing for too long, ``why``
    says so."""

    def __init__(self, program: Sequence[str], job: str, limit: float) -> None:
        self.program, self.job, self.limit = program, job, limit
        self.why = "ended early"

    def __enter__(self) -> _Process:
        # It imports what this process does, from wherever it does.
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        self.complaints = tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen(
            self.program,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.complaints,
            text=True,
            env=environment,
        )
        self.lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._read, args=(self.process.stdout,), daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.process.kill()
        self.process.wait()
        self.complaints.close()
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):
            self.process.stdin.close()

    def __iter__(self) -> Iterator[dict[str, Any]]:
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):  # if it has ended, the loop says how
            self.process.stdin.write(self.job + "\n")
            self.process.stdin.flush()
        limit = max(self.limit, LIMIT)  # for the first word: it has to start
        while True:
            try:
                line = self.lines.get(timeout=limit)
            except queue.Empty:
                self.why = f"hangs: nothing for {limit:.0f} s"
                return
            if line is None:
                self.why = self._end()
                return
            if line.startswith("{"):  # and no library's own words
                limit = self.limit
                yield json.loads(line)

    def _read(self, stream: IO[str]) -> None:
        with stream:
            for line in stream:
                self.lines.put(line)
        self.lines.put(None)

    def _end(self) -> str:
        status = self.process.wait()
        self.complaints.seek(0)
        last = (self.complaints.read().strip().splitlines() or [""])[-1]
        how = f"by signal {-status}" if status < 0 else f"with status {status}"
        return f"failed: its process ended {how}" + (f" ({last})" if last else "")
