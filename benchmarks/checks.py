"""From findings to checks: what a run must keep, and what it aims at."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.cases import TAILS
from benchmarks.summary import FUSED, PLAIN, is_fused, losses, means, select

# By role: geometric mean over the stages in both layouts, against the same layout.
TARGETS = {
    "stage": {
        ("inference", "eager"): 2.5,
        ("inference", "compile"): 1.5,
        ("training", "eager"): 4.0,
        ("training", "compile"): 2.0,
    },
    "tail": {
        ("inference", "eager"): 2.5,
        ("inference", "compile"): 1.3,
        ("inference", PLAIN + "eager"): 1.1,
        ("training", "eager"): 3.2,
        ("training", "compile"): 3.0,
        ("training", PLAIN + "eager"): 1.1,
    },
}
OVERHEAD_TARGET = 3.0
QUIET = "machine left alone"


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


def few(texts: list[str], most: int = 2) -> str:
    """The first of them, and how many more there are."""
    return "; ".join([*texts[:most], *([f"{len(texts) - most} more"] if texts[most:] else [])])


def summarise(records: list[dict[str, Any]], device: str = "cpu") -> dict[str, Any]:
    """Means, losses and checks of a whole run; the speed-ups aimed at are those of a CPU."""
    average = means(records)
    results = [(record, result) for record in records for result in record["results"]]
    failed = [
        f"{result['rival']} at {'x'.join(map(str, record['shape']))} {record['dtype']}"
        f" {result['layout']}: {result['reason']}"
        for record, result in results
        if result["status"] == "failed"
    ]
    wrong = [text for text in failed if is_fused(text)]
    checks = [
        a_check(
            "correct",
            not wrong if results else None,
            "y and every gradient of the fused layer agree with float64",
            few(wrong) or f"all of {len(results)} contenders, {len(failed)} failed"
            if results
            else "not measured",
            must=bool(results),
        )
    ]
    if device == "cpu":
        checks += speed_checks(average)
    checks += plan_checks(average) + accuracy_checks(records) + overhead_checks(records)
    checks += memory_checks(records) + tail_memory_checks(records)
    return {"means": average, "losses": losses(records), "checks": checks}


def speed_checks(average: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each target of what was measured warm; unknown where there is no such rival."""
    checks = []
    warm = [m for m in select(average, regime="warm") if not m["fused"].startswith(PLAIN)]
    kinds = dict.fromkeys((m["role"], m["threads"], m["fused"]) for m in warm)
    for (role, threads, fused), role_targets in ((kind, TARGETS[kind[0]]) for kind in kinds):
        mine = select(warm, role=role, threads=threads, fused=fused)
        what = f"tail {fused}" if role == "tail" else fused
        run = f", {threads} thread(s)" if role == "tail" else ""
        for (part, rival), target in role_targets.items():
            name = f"{part}, {what} against {rival}{run}"
            expected = f"at least {target:g}x, geometric mean over the stages"
            found = [m for m in select(mine, part=part, rival=rival) if m["same"] is not None]
            if not found:
                checks.append(a_check(name, None, expected, "not measured"))
            for m in found:
                covered = "" if m["cases"] == m["of"] else f" ({m['cases']} of {m['of']} cases)"
                got = f"{m['same']:.2f}x{covered}"
                checks.append(a_check(name, m["same"] >= target, expected, got))
    return checks


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
    for record in (r for r in records if r["role"] not in TAILS):
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
    return checks + tail_accuracy_checks(records)


def tail_accuracy_checks(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Whether each result of the tail, over all cases in root mean square, is as near to float64 as
    da_ops.accuracy promises of a result, or has at most twice the error of the modules in eager."""
    from da_ops.accuracy import PROMISED, TIMES_PLAIN, rms

    # By contender and dtype, and by result: our errors and those beside.
    found: dict[tuple[str, str], dict[str, tuple[list[float], list[float]]]] = {}
    for record, ours, rivals in tails(records):
        beside = rivals.get(beside_plain(ours["rival"]), {})
        for name, error in ours["accuracy"].items() if "accuracy" in beside else ():
            of_contender = found.setdefault((ours["rival"], record["dtype"]), {})
            both = of_contender.setdefault(name, ([], []))
            both[0].append(error["error"])
            both[1].append(beside["accuracy"][name]["error"])
    checks = []
    for (fused, dtype), results in found.items():
        promised = PROMISED[getattr(torch, dtype)]
        used = []
        for name, (errors, others) in results.items():
            allowed = max(promised, TIMES_PLAIN * rms(others))
            used.append((rms(errors) / allowed, rms(errors), allowed, name))
        kept = all(share <= 1 for share, *_ in used)
        _, error, allowed, name = max(used)
        checks.append(
            a_check(
                f"accuracy, tail {fused}, {dtype}",
                kept,
                f"at most {promised:.0e} relative, or twice eager's, in root mean square",
                f"{error:.1e} of {allowed:.1e} ({name})",
            )
        )
    return checks


def tails(
    records: list[dict[str, Any]],
) -> list[tuple[dict[str, Any], dict[str, Any], dict[str, dict[str, Any]]]]:
    """Each fused tail that was measured, with its record before it and its rivals in the same
    layout after it, by name."""
    found = []
    for record in (r for r in records if r["role"] in TAILS):
        for ours in select(record["results"], status="ok"):
            if is_fused(ours["rival"]):
                beside = select(record["results"], status="ok", layout=ours["layout"])
                found.append((record, ours, {r["rival"]: r for r in beside}))
    return found


def beside_plain(fused: str) -> str:
    """The contender in eager PyTorch that computes the same as a fused one."""
    return f"{PLAIN}eager" if fused.startswith(PLAIN) else "eager"


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
    for record in (r for r in records if r["role"] not in TAILS):
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


def tail_memory_checks(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Peak of a training step at most that of the modules without attention in eager, plus the
    small maps: a value for each pixel and each channel of an image; the tightest case of each."""
    margins: dict[str, list[tuple[float, str]]] = {}
    for record, ours, rivals in tails(records):
        beside = rivals.get(PLAIN + "eager", {})
        if "memory" in ours and "memory" in beside:
            _, channels, height, width = record["shape"]
            maps = 1 / channels + 1 / (height * width)
            saved = (beside["memory"]["peak"] - ours["memory"]["peak"]) / record["bytes"] + maps
            name = f"{'x'.join(map(str, record['shape']))} {record['dtype']} {ours['layout']}"
            margins.setdefault(ours["rival"], []).append((saved, name))
    return [
        a_check(
            f"training memory, tail {fused}",
            min(found)[0] >= 0,
            "peak at most eager's without attention plus the small maps",
            f"{min(found)[0]:.2f} activations below that at the least ({min(found)[1]})",
        )
        for fused, found in margins.items()
    ]
