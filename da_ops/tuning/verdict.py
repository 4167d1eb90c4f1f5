"""Which of several timed plans is to serve, from rounds in which all of them took part.

A ratio is a plan's time over the default plan's in the same round, so that what disturbs a round
disturbs both. The first rounds choose the finalists; only later rounds, which did not choose them,
decide. A finalist takes the default plan's place where the interval for its median ratio, at 99%
over all finalists, lies wholly below 0.98: it is faster by two percent at least, and not by chance.
Of several within a hundredth of the fastest the one of the shortest text is taken, which asks for
least.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence

from .candidates import DEFAULT

LEAST_GAIN = 0.02
RISK = 0.01  # that some finalist passes by chance
ALIKE = 0.01  # median ratios
FINALISTS = 4

Round = Mapping[str, float]  # seconds by plan


def ratios(rounds: Sequence[Round]) -> dict[str, list[float]]:
    """Of each plan of the rounds but the default."""
    names = [name for name in (rounds[0] if rounds else ()) if name != DEFAULT]
    return {name: [each[name] / each[DEFAULT] for each in rounds] for name in names}


def finalists(rounds: Sequence[Round]) -> list[str]:
    """The few plans with the least median ratio."""
    medians = {name: statistics.median(values) for name, values in ratios(rounds).items()}
    return sorted(medians, key=medians.__getitem__)[:FINALISTS]


def winner(rounds: Sequence[Round]) -> str:
    """The finalist that takes the default plan's place, or the default."""
    found = ratios(rounds)
    medians = {
        name: statistics.median(values)
        for name, values in found.items()
        if most(values, RISK / len(found)) < 1 - LEAST_GAIN
    }
    best = min(medians.values(), default=1.0)
    alike = [name for name, median in medians.items() if median <= best + ALIKE]
    return min(alike, key=lambda name: (len(name), medians[name]), default=DEFAULT)


def most(values: Sequence[float], risk: float) -> float:
    """The upper end of the interval for the values' median; infinite where they are too few.

    The k-th largest of n values is below the median with the chance that n throws of a coin show
    fewer than k heads, whatever the values' distribution is.
    """
    n, chance = len(values), 0.0
    largest = math.inf
    for k, value in enumerate(sorted(values, reverse=True)):
        chance += math.comb(n, k) / 2**n
        if chance > risk:
            break
        largest = value
    return largest


def percentiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Median, 10th and 90th percentile."""
    if len(values) < 2:
        return values[0], values[0], values[0]
    tenths = statistics.quantiles(values, n=10, method="inclusive")
    return statistics.median(values), tenths[0], tenths[-1]
