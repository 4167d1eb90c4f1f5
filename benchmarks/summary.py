"""From times to findings: speed-ups, geometric means, targets, losses."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.cases import STAGES
from benchmarks.measure import spread

FUSED = "da_ops:"  # what the names of the fused contenders begin with
WHOLE = "whole:"  # and those of networks compiled as a whole
TRAINING = ("training", "forward", "backward")  # phases of a training sample
PASSES = {"inference": 2, "training": 5, "forward": 2, "backward": 3}  # least traffic, in x
TARGETS = {  # geometric mean over the stages in both layouts, against the same layout
    ("inference", "eager"): 2.5,
    ("inference", "compile"): 1.5,
    ("training", "eager"): 4.0,
    ("training", "compile"): 2.0,
}
OVERHEAD_TARGET = 3.0
QUIET = "machine left alone"

Times = Mapping[tuple[str, str], Mapping[str, NDArray[np.float64]]]


def timed(
    result: dict[str, Any], times: Mapping[str, NDArray[np.float64]], copy_seconds: float
) -> dict[str, Any]:
    """The contender's record with its times and, in percent, how near it comes to the floor."""
    floors = {
        part: 100 * PASSES[part] / 2 * copy_seconds / float(np.median(rounds))
        for part, rounds in times.items()
    }
    return {
        **result,
        "seconds": {part: spread(rounds) for part, rounds in times.items()},
        "floor_percent": floors,
    }


def speedups(times: Times) -> list[dict[str, Any]]:
    """How many times faster each fused contender is than each rival, in each layout and phase; a
    plan's rivals include the backend as it comes.

    `same` against the rival in the same layout, `better` against the rival in the layout that
    suits it better; both are medians of the ratio within a round.
    """
    found = []
    names = {rival for rival, _ in times}
    fused = [key for key in times if key[0].startswith(FUSED)]
    for (name, layout), rival in itertools.product(fused, sorted(names)):
        if rival.startswith(FUSED) and not name.startswith(rival + ":"):
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
    """Geometric means over the stages, per regime, launch, fused contender, rival and phase."""
    stages = select(records, role="stage")
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for record in stages:
        for ratio in record["speedups"]:
            launch = record.get("launch", "stream")
            key = (record["regime"], launch, ratio["fused"], ratio["rival"], ratio["part"])
            groups.setdefault(key, []).append(ratio)
    return [
        {
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
        for (regime, launch, fused, rival, part), ratios in groups.items()
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
                    who = {k: ratio[k] for k in ("fused", "layout", "rival", "part")}
                    lost.append({**case, **who, "basis": basis, "ratio": ratio[basis]["median"]})
    return lost


def a_check(
    name: str, passed: bool | None, expected: str, got: str, must: bool = False
) -> dict[str, Any]:
    """`must`: the run itself fails with it; else it is a target, met, missed or unknown (None)."""
    return {"name": name, "passed": passed, "expected": expected, "got": got, "must": must}


def quiet(percent: float, limit: float) -> dict[str, Any]:
    """Whether the machine was left alone; on a busy one the ratios are not to be believed."""
    return a_check(
        QUIET,
        percent <= limit,
        f"other programs take at most {limit:g}% of the cores",
        f"{percent:.1f}%",
    )


def summarise(records: list[dict[str, Any]], device: str = "cpu") -> dict[str, Any]:
    """Means, losses and checks of a whole run; the speed-ups aimed at are those of a CPU."""
    average = means(records)
    results = [(record, result) for record in records for result in record["results"]]
    failed = [
        f"{result['rival']} at {'x'.join(map(str, record['shape']))} {record['dtype']}"
        f" {result['layout']}: {result['reason']}"
        for record, result in results
        if result["status"] != "ok"
    ]
    wrong = [text for text in failed if text.startswith(FUSED)]
    checks = [
        a_check(
            "correct",
            not wrong,
            "y and every gradient of the fused layer agree with float64",
            "; ".join(wrong) or f"all of {len(results)} contenders, {len(failed)} failed",
            must=True,
        )
    ]
    for mean in average:
        target = TARGETS.get((mean["part"], mean["rival"])) if device == "cpu" else None
        if target is None or mean["regime"] != "warm" or mean["same"] is None:
            continue
        covered = "" if mean["cases"] == mean["of"] else f" ({mean['cases']} of {mean['of']} cases)"
        checks.append(
            a_check(
                f"{mean['part']}, {mean['fused']} against {mean['rival']}",
                mean["same"] >= target,
                f"at least {target:g}x, geometric mean over the stages",
                f"{mean['same']:.2f}x{covered}",
            )
        )
    checks += plan_checks(average) + accuracy_checks(records)
    checks += overhead_checks(records) + memory_checks(records)
    return {"means": average, "losses": losses(records), "checks": checks}


def plan_checks(average: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Whether a plan that may not be the default beats the backend as it comes."""
    return [
        a_check(
            f"{mean['part']}, {mean['fused']} against {mean['rival']}, {mean['regime']},"
            f" {mean['launch']}",
            mean["same"] >= 1,
            "at least as fast, geometric mean over the stages",
            f"{mean['same']:.2f}x",
        )
        for mean in average
        if mean["rival"].startswith(FUSED) and mean["part"] in ("inference", "training")
    ]


def accuracy_checks(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Whether what da_ops.accuracy promises is kept: in each case, and beside eager over them all.

    Told are those findings of each rule that come nearest to what is allowed.
    """
    from da_ops import accuracy
    from da_ops.reference import accumulation_dtype

    def errors(result: dict[str, Any]) -> dict[str, accuracy.Error]:
        return {name: accuracy.Error(**e) for name, e in result["accuracy"].items()}

    # Each draw once: what was timed in several ways was checked once.
    draws: dict[tuple[str, str], dict[str, Any]] = {}
    for record in records:
        eager = {r["layout"]: r for r in record["results"] if r["rival"] == "eager"}
        for result in select(record["results"], status="ok"):
            if result["rival"].startswith(FUSED):
                layout = result["layout"]
                where = f"at {'x'.join(map(str, record['shape']))} {layout}"
                both = result, eager.get(layout, {})
                of_these = draws.setdefault((result["rival"], record["dtype"]), {})
                of_these.setdefault(where, both)
    checks = []
    for (fused, dtype), cases in draws.items():
        name, kind = f"accuracy, {fused}, {dtype}", getattr(torch, dtype)
        accumulated = accumulation_dtype(kind)
        expected = (
            f"at most {accuracy.PROMISED[accumulated]:.0e} of the terms,"
            f" {accuracy.PROMISED[kind]:.0e} relative, twice eager's in root mean square"
        )
        if any("accuracy" not in ours for ours, _ in cases.values()):
            checks.append(a_check(name, None, expected, "measured by another rule: measure again"))
            continue
        found = [
            (finding, where)
            for where, (ours, _) in cases.items()
            for finding in accuracy.findings([errors(ours)])
        ]
        beside = [(errors(o), errors(e)) for o, e in cases.values() if "accuracy" in e]
        if beside:
            together = accuracy.findings(*zip(*beside, strict=True))
            where = f"over {len(beside)} draws"
            found += [(f, where) for f in together if f.rule == accuracy.BESIDE_PLAIN]
        nearest: dict[str, tuple[accuracy.Finding, str]] = {}
        for finding, where in found:
            so_far, _ = nearest.get(finding.rule, (finding, where))
            if finding.used >= so_far.used:
                nearest[finding.rule] = finding, where
        checks.append(
            a_check(
                name,
                all(finding.kept for finding, _ in found),
                expected,
                "; ".join(
                    f"{f.found:.1e} of {f.allowed:.1e} {f.rule} ({f.result} {where})"
                    for f, where in nearest.values()
                ),
            )
        )
    return checks


def overhead_checks(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        a_check(
            f"call overhead, {ratio['fused']} against eager",
            ratio["same"]["median"] >= OVERHEAD_TARGET,
            f"at least {OVERHEAD_TARGET:g}x, forward and backward at"
            f" {'x'.join(map(str, record['shape']))}",
            f"{ratio['same']['median']:.2f}x",
        )
        for record in select(records, role="overhead")
        for ratio in select(record["speedups"], part="training", rival="eager")
    ]


def memory_checks(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Peak of a training step at most eager's less one activation; the tightest case of each.

    Cases in which x is small beside the maps of one channel are left out.
    """
    margins: dict[str, list[tuple[float, str]]] = {}
    for record in records:
        eager = {
            r["layout"]: r["memory"]
            for r in record["results"]
            if r["rival"] == "eager" and "memory" in r
        }
        for result in record["results"]:
            layout = result["layout"]
            if not result["rival"].startswith(FUSED) or "memory" not in result:
                continue
            if layout not in eager or record["role"] == "overhead":
                continue
            saved = (eager[layout]["peak"] - result["memory"]["peak"]) / record["bytes"]
            name = f"{'x'.join(map(str, record['shape']))} {record['dtype']} {layout}"
            margins.setdefault(result["rival"], []).append((saved, name))
    return [
        a_check(
            f"training memory, {fused}",
            min(found)[0] >= 1,
            "peak at least one activation below eager's",
            f"{min(found)[0]:.2f} activations below at the least ({min(found)[1]})",
        )
        for fused, found in margins.items()
    ]
