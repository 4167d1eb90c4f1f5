"""Trying plans out until all are tried or left out: in a process of its own, which is watched, so
that a plan that hangs or crashes costs itself alone; or in this process, plans that are trusted."""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import IO, Any

from .candidates import DEFAULT
from .trial import Job, Subject, serve
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

    def attempt(job: Job, note: Callable[[dict[str, Any]], None]) -> str:
        with _Process(program, job.to_json(), limit) as process:
            for fact in process:
                note(fact)
                if "done" in fact:
                    break
        return process.why

    return _tried(job, attempt)


def in_this_process(job: Job, subject: Subject) -> Outcome:
    """Have a job's plans tried here and now, where one that hangs or crashes is the end.

    Raises:
        RuntimeError: the default plan failed.
    """

    def attempt(job: Job, note: Callable[[dict[str, Any]], None]) -> str:
        serve(subject, job, lambda **fact: note(fact))
        return "ended early"

    return _tried(job, attempt)


def _tried(job: Job, attempt: Callable[[Job, Callable[[dict[str, Any]], None]], str]) -> Outcome:
    """What comes of attempts, of which each ends with the first plan that fails: the next does
    without. An attempt notes what it does and finds, and says why it ended."""
    left_out: dict[str, str] = {}
    while True:
        notes = _Notes(Outcome(left_out=left_out))
        why = attempt(job, notes.take)
        if notes.done:
            return notes.outcome
        failed = notes.trying if notes.failed is None else notes.failed
        why = notes.why or why
        if failed is None or failed == DEFAULT:
            what = "the process that tries plans" if failed is None else "the default plan"
            raise RuntimeError(f"da_ops.tune: {what} {why}")
        left_out[failed] = why
        job = replace(
            job,
            right=[plan for plan in [*job.right, *notes.right] if plan != failed],
            unchecked=[plan for plan in job.unchecked if plan not in (*notes.right, failed)],
        )


@dataclass
class _Notes:
    """What an attempt says, fact by fact."""

    outcome: Outcome
    right: list[str] = field(default_factory=list)
    trying: str | None = None
    failed: str | None = None
    why: str | None = None
    done: bool = False

    def take(self, fact: dict[str, Any]) -> None:
        self.trying = fact.get("trying", self.trying)
        if "right" in fact:
            self.right.append(fact["right"])
        for stage, rounds in (("first", self.outcome.first), ("final", self.outcome.final)):
            if fact.get(stage):
                rounds.append(fact[stage])
        if "left_out" in fact:
            self.failed, self.why = fact["left_out"], fact["why"]
        self.done = self.done or "done" in fact


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
