"""What was found out about one direction of a call, for people and for programs."""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass
from typing import Any

from ..backends.tuned import Key, Tuned
from . import verdict
from .candidates import DEFAULT
from .supervise import Outcome


@dataclass(frozen=True)
class Tried:
    """A plan and its time over the default plan's: median, 10th and 90th percentile."""

    plan: str
    median: float
    p10: float
    p90: float
    final: bool  # from the rounds that decide, not from the first few


@dataclass(frozen=True)
class Direction:
    """What was found for one direction of a call. The call then runs by ``winner``."""

    key: Key
    seconds: float  # the default plan's median
    winner: Tuned
    tried: tuple[Tried, ...]  # the fastest first
    left_out: dict[str, str]  # why, by plan

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        k, best = self.key, self.winner.plan
        layout = "channels_last" if k.channels_last else "contiguous"
        threads = f", {k.threads} thread(s)" if k.threads else ""
        shape = "x".join(map(str, k.shape))
        lines = [
            f"{k.direction} of {shape} {k.dtype} {layout}, {k.order}, {k.gate}; {k.backend}"
            f"{threads}",
            f"  1.00  the default, {1e3 * self.seconds:.3g} ms; below, each plan's time divided "
            "by the default's of the same round: median, 10th to 90th percentile",
        ]
        for t in self.tried:
            note = ", by the first rounds" if not t.final else ""
            lines.append(f"  {t.median:.2f}  ({t.p10:.2f} to {t.p90:.2f})  {t.plan}{note}")
        lines += [f"  left out: {plan}: {why}" for plan, why in self.left_out.items()]
        lines.append(f"  from now on: {best or 'the default, nothing is faster beyond the noise'}")
        return "\n".join(lines)


def decided(key: Key, outcome: Outcome) -> Direction:
    """The verdict over what was measured."""
    final = verdict.ratios(outcome.final)
    measured = {**verdict.ratios(outcome.first), **final}
    tried = [
        Tried(plan, *verdict.percentiles(values), plan in final)
        for plan, values in measured.items()
    ]
    tried.sort(key=lambda t: (not t.final, t.median))
    best = verdict.winner(outcome.final)
    times = {t.plan: (t.median, t.p10, t.p90) for t in tried}
    seconds = statistics.median(each[DEFAULT] for each in outcome.final)
    winner = Tuned(best, *times.get(best, (1.0, 1.0, 1.0)))
    return Direction(key, seconds, winner, tuple(tried), outcome.left_out)
