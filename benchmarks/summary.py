"""From times to findings: speed-ups, geometric means, losses."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.cases import STAGES
from benchmarks.measure import spread

FUSED = "da_ops:"  # what the names of the fused contenders begin with
PLAIN = "plain:"  # those without attention
WHOLE = "whole:"  # those of networks compiled as a whole
TAIL = "tail:"  # and those of networks whose residual blocks have fused tails
TRAINING = ("training", "forward", "backward")  # phases of a training sample
# Roles that means are taken over.
AVERAGED = ("stage", "tail")

Times = Mapping[tuple[str, str], Mapping[str, NDArray[np.float64]]]


def is_fused(name: str) -> bool:
    """Whether it is a fused contender, with attention or without."""
    return name.removeprefix(PLAIN).startswith(FUSED)


def least_passes(subject: str) -> dict[str, int]:
    """The least traffic in each phase, in units of x, of the "layer" or "tail" of explain."""
    from da_ops.backends.base import TailKind
    from da_ops.backends.tail import floor

    tail = subject == "tail"
    ways = floor(TailKind("training") if tail else None)
    inference = floor(TailKind("evaluation") if tail else None)["forward"]
    return {"inference": inference, "training": sum(ways.values()), **ways}


def timed(
    result: dict[str, Any],
    times: Mapping[str, NDArray[np.float64]],
    copy_seconds: float,
    subject: str = "layer",
) -> dict[str, Any]:
    """The contender's record with its times and, in percent, how near it comes to the floor."""
    least = least_passes(subject)
    floors = {
        part: 100 * least[part] / 2 * copy_seconds / float(np.median(rounds))
        for part, rounds in times.items()
    }
    return {
        **result,
        "seconds": {part: spread(rounds) for part, rounds in times.items()},
        "floor_percent": floors,
    }


def speedups(times: Times) -> list[dict[str, Any]]:
    """How many times faster each fused contender is than each rival, in each layout and phase; a
    plan's rivals include the backend as it comes. What is without attention has no rivals with it.

    `same` against the rival in the same layout, `better` against the rival in the layout that
    suits it better; both are medians of the ratio within a round.
    """
    found = []
    names = {rival for rival, _ in times}
    fused = [key for key in times if is_fused(key[0])]
    for (name, layout), rival in itertools.product(fused, sorted(names)):
        if is_fused(rival) and not name.startswith(rival + ":"):
            continue
        if name.startswith(PLAIN) and not rival.startswith(PLAIN):
            continue
        for part, ours in times[name, layout].items():
            theirs = {lay: rounds[part] for (r, lay), rounds in times.items() if r == rival}
            better = min(theirs, key=lambda lay: float(np.median(theirs[lay])))
            record = {
                "fused": name,
                "layout": layout,
                "rival": rival,
                "part": part,
                "better_layout": better,
                "better": spread(theirs[better] / ours),
            }
            if layout in theirs:
                record["same"] = spread(theirs[layout] / ours)
            found.append(record)
    return found


def geomean(values: Iterable[float]) -> float | None:
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs)) if logs else None


def select(records: list[dict[str, Any]], **wanted: Any) -> list[dict[str, Any]]:
    """Those records whose fields have these values."""
    return [r for r in records if all(r[key] == value for key, value in wanted.items())]


def means(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Geometric means over the stages, and over their tails, per number of threads, regime, launch,
    fused contender, rival and phase."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for record in records:
        for ratio in record["speedups"] if record["role"] in AVERAGED else ():
            run = (record["role"], record["threads"], record["regime"])
            launch = record.get("launch", "stream")
            key = (*run, launch, ratio["fused"], ratio["rival"], ratio["part"])
            groups.setdefault(key, []).append(ratio)
    return [
        {
            "role": role,
            "threads": threads,
            "regime": regime,
            "launch": launch,
            "fused": fused,
            "rival": rival,
            "part": part,
            "cases": len(ratios),
            "of": 2 * len(STAGES),
            "same": geomean(r["same"]["median"] for r in ratios if "same" in r),
            "better": geomean(r["better"]["median"] for r in ratios),
        }
        for (role, threads, regime, launch, fused, rival, part), ratios in groups.items()
    ]


def losses(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Where a fused contender is slower than a rival, in the same layout or its better one."""
    lost = []
    for record in records:
        for ratio in record["speedups"]:
            if ratio["part"] not in ("inference", "training"):
                continue
            for basis in ("same", "better"):
                if basis in ratio and ratio[basis]["median"] < 1:
                    case = {k: record[k] for k in ("shape", "dtype", "regime", "threads")}
                    case["launch"] = record.get("launch", "stream")
                    case["role"] = record.get("role", "stage")
                    who = {k: ratio[k] for k in ("fused", "layout", "rival", "part")}
                    lost.append({**case, **who, "basis": basis, "ratio": ratio[basis]["median"]})
    return lost


# Whole networks: their variants are named as above, and "plain" is the one without attention.


def is_ours(name: str) -> bool:
    return name.startswith((FUSED, TAIL))


def beside_plain(timed: dict[str, NDArray[np.float64]]) -> dict[str, dict[str, Any]]:
    """The seconds of each variant, how many more they are than those of the network without
    attention in the same round, and how many times as fast it is."""
    seconds = {variant: rounds[:, 0] for variant, rounds in timed.items()}
    found: dict[str, dict[str, Any]] = {v: {"seconds": spread(s)} for v, s in seconds.items()}
    if "plain" in seconds:
        plain = seconds.pop("plain")
        for variant, own in seconds.items():
            cost = spread(own - plain)
            found[variant]["cost"] = cost
            found[variant]["cost_percent"] = 100 * cost["median"] / float(np.median(plain))
            found[variant]["speedup"] = spread(plain / own)
    return found


def cost_ratios(results: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """How many times more each rival costs than each fused variant, by the median costs."""
    costs = {v: r["cost"]["median"] for v, r in results.items() if "cost" in r}
    return [
        {"fused": fused, "rival": rival, "ratio": costs[rival] / costs[fused]}
        for fused, rival in itertools.product(costs, costs)
        if fused.startswith(FUSED) and not is_ours(rival) and costs[fused] > 0
    ]
