"""A ResNet on photographs with the layer in every residual block: what does it cost?

    python -m benchmarks.network [--preset quick|full] [--network resnet50] [--batch N] ...

Networks with the same initial weights take turns, one training step (forward, loss, backward, SGD)
each per round, on the same random crops of photographs: without attention, and with the layer
after the last batch norm of each residual branch, as eager PyTorch, as torch.compile of the layer
alone, fused, and with fused tails as ``fuse`` makes them: of each block the whole tail, and each
other norm with a ReLU, as one operator. The network without attention takes part with fused tails,
too, and in the full run compiled as a whole. What a layer costs is its step less
the step without attention, in the same round. Losses of variants that compute the same function
must agree. Then all take turns in inference: evaluation, without gradients. On a GPU the steps use
autocast, cuDNN's TF32 is off, and some networks are compiled as a whole, too.

Kernels are launched from Python one by one, and a fast GPU may wait for the next one. So on a GPU
all but the networks that are compiled as a whole take turns once more, each as two CUDA graphs, of
its whole training step and of its inference, that are replayed on batch after batch: copying the
batch is not timed. What each costs is told by both launches. Where --seconds are too few, graphs
are left out before what is launched one by one; with float16 there are none, for its loss scaling
waits for the GPU.

Results are written every few seconds: a run that is interrupted leaves the rounds before it. The
allocator keeps what is freed for the next step, as jemalloc and tcmalloc do.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from benchmarks import (
    cases,
    environment,
    fused,
    layer,
    measure,
    op,
    photographs,
    steps,
    tables,
    tally,
)
from benchmarks.cases import LAYOUTS
from benchmarks.checks import a_check, quiet
from benchmarks.environment import BenchmarkError
from benchmarks.networks import AMP, Batches, Trainer, activations, build, unfused
from benchmarks.summary import FUSED, TAIL, WHOLE, beside_plain, cost_ratios, is_ours

PRESETS: dict[str, dict[str, Any]] = {
    "quick": {"batch": 8, "size": 96, "layouts": "channels_last", "rounds": 12, "budget": 8.0},
    "full": {
        "batch": 8, "size": 224, "layouts": "contiguous,channels_last", "rounds": 15,
        "budget": 600.0,
    },
}  # fmt: skip
GPU_PRESETS: dict[str, dict[str, Any]] = {
    "quick": {"batch": 128, "size": 224, "layouts": "channels_last", "rounds": 20, "budget": 12.0},
    "full": {
        "batch": 128, "size": 224, "layouts": "contiguous,channels_last", "rounds": 100,
        "budget": 120.0,
    },
}  # fmt: skip
# Seconds that the first steps on a GPU are expected to take at most: of a network that is compiled
# as a whole, of one whose layers are, of others.
WHOLLY, LAYERS, PLAINLY = 75.0, 35.0, 5.0
WARM_UP = 4  # steps before the rounds: the first, one for memory, two in measure.interleaved
# Variants round differently, and training amplifies that ten- to a hundredfold per step: by the
# third, plain PyTorch in float32 is up to 7e-4 off float64 in a ResNet-50 without attention. So
# losses must agree to this relative difference over two steps, in the second of which a wrong
# gradient would show; how far they part later is told beside it.
AGREE, FIRST = 1e-3, 2
AGREE_IN_HALF = 3e-2
INFERENCE = 0.25  # of the time that training has


def measure_layout(
    layout: str,
    variants: list[str],
    options: argparse.Namespace,
    data: Batches,
    classes: int,
    say: Callable[[str], None],
    told: Callable[[dict[str, Any]], None],
) -> dict[str, Any]:
    """All variants in one layout, interleaved. `told` is given the rounds until now, at times."""
    torch._dynamo.reset()
    results: dict[str, dict[str, Any]] = {}
    trainers: dict[str, Trainer] = {}
    data = [  # once for all
        (x.to(options.device).contiguous(memory_format=LAYOUTS[layout]), k.to(options.device))
        for x, k in data
    ]
    for variant, network in build(variants, options.network, classes).items():
        results[variant] = {"variant": variant, "status": "ok"}
        if options.end - time.perf_counter() < needed(variant, options, len(trainers)):
            results[variant] |= {"status": "left out", "reason": "--seconds are too few"}
            continue
        trainer = Trainer(network, data, layout, options.device, options.amp)
        if variant.startswith(TAIL) and (why := unfused(network)):
            results[variant] |= {"status": "left out", "reason": why}
            continue
        say(f"{layout}: first steps, {variant}")
        try:
            with fused.under(variant):
                start = time.perf_counter()
                trainer.sample(1)
                results[variant]["first_step"] = time.perf_counter() - start
                results[variant]["memory"] = trainer.memory()
                trainer.infer(1)
        except Exception as error:  # whatever a compiler or backend may raise
            results[variant] |= {"status": "failed", "reason": layer.reason(error)}
            continue
        trainers[variant] = trainer

    def record(timed: dict[str, measure.Rounds]) -> dict[str, Any]:
        for variant, found in beside_plain(timed).items():
            results[variant] |= found
            results[variant]["losses"] = [loss.item() for loss in trainers[variant].losses]
        return {
            "layout": layout,
            "results": list(results.values()),
            "cost_ratios": cost_ratios(results),
        }

    def replayed(timed: dict[str, measure.Rounds]) -> dict[str, Any]:
        for variant, found in beside_plain(timed).items():
            results[variant]["graph"] = found
        return part

    def in_turn(
        those: Mapping[str, Trainer | steps.Graphs], what: str, budget: float, **more: Any
    ) -> dict[str, measure.Rounds]:
        graph = ", CUDA graphs" if those is not trainers else ""
        say(f"{layout}: {', '.join(those)} in turn, {what}{graph}")
        samplers = {v: fused.sampled(v, getattr(one, what)) for v, one in those.items()}
        return measure.interleaved(samplers, rounds=options.rounds, least=3, budget=budget, **more)

    begun, inferring = time.perf_counter(), INFERENCE * options.budget
    timed = in_turn(trainers, "sample", options.budget, told=lambda timed: told(record(timed)))
    part = record(timed)
    for variant, found in beside_plain(in_turn(trainers, "infer", inferring)).items():
        results[variant]["inference"] = found
    if "graph" in options.launches:
        told(part)
        now = time.perf_counter()
        # Replayed, all rounds take as long again at most.
        made, without = steps.recorded(trainers, options.end - now - (now - begun), say)
        for variant, why_not in without.items():
            results[variant]["graph"] = why_not
        if made:
            more = {"told": lambda timed: told(replayed(timed))}
            replayed(in_turn(made, "sample", options.budget, **more))
            for variant, found in beside_plain(in_turn(made, "infer", inferring)).items():
                results[variant]["graph"]["inference"] = found
    return part


def needed(variant: str, options: argparse.Namespace, before: int) -> float:
    """Seconds from a variant's first step until all have taken their turns, at most, with so many
    variants before it. What is compiled leaves time for CUDA graphs; others come before these."""
    first, turns = first_steps(variant, options.device), (1 + INFERENCE) * options.budget
    if "graph" in options.launches and first > PLAINLY:
        turns = 2 * turns + (before + 1) * steps.CAPTURE
    return first + turns


def first_steps(variant: str, device: str) -> float:
    """Seconds that a variant takes at most, before it can be timed: of a GPU, a guess."""
    if device == "cpu":
        return WHOLLY if variant.startswith(WHOLE) else 0.0
    return WHOLLY if variant.startswith(WHOLE) else LAYERS if op.compiles(variant) else PLAINLY


def checks(
    layouts: list[dict[str, Any]], stored: int, agree: float = AGREE, maps: int = 0
) -> list[dict[str, Any]]:
    """Losses agree with those of the same network in eager; memory is at least the layers'
    activations below eager's, with fused tails at most the small maps above the network without
    attention, and those tails are faster than it."""
    found = []
    for part in layouts:
        results = {r["variant"]: r for r in part["results"]}
        for name, r in results.items():
            if name.startswith(TAIL + FUSED):
                found += tail_checks(name, r, results["plain"], part["layout"], maps)
            if r["status"] == "left out":
                continue
            if r["status"] != "ok":
                why = f"failed: {r['reason']}"
                found.append(a_check(f"{name}, {part['layout']}", False, "it runs", why,
                                     must=is_ours(name)))  # fmt: skip
                continue
            same = "plain" if name.removeprefix(TAIL) == "plain" else "eager"
            if name in ("plain", "eager", WHOLE + "plain") or results[same]["status"] != "ok":
                continue
            truth, losses = (np.array(results[v]["losses"]) for v in (same, name))
            apart = np.abs(losses - truth) / np.abs(truth)
            early, later = float(apart[:FIRST].max()), float(apart.max())
            found.append(
                a_check(
                    f"losses, {name} as {same}, {part['layout']}",
                    early <= agree,  # false for NaN
                    f"within {agree:.0e} of it over {FIRST} steps",
                    f"within {early:.0e}; within {later:.0e} over {len(losses)} steps"
                    f" ({truth[0]:.2f} to {truth[-1]:.2f})",
                    must=is_ours(name),
                )
            )
            if not name.startswith(FUSED):
                continue
            eager, ours = results["eager"]["memory"], r["memory"]
            saved = {kind: eager[kind] - ours[kind] for kind in ("held", "peak")}
            found.append(
                a_check(
                    f"memory, {name}, {part['layout']}",
                    saved["held"] >= stored,
                    f"holds at least the layers' inputs, {tables.mib(stored)} MiB, less than eager",
                    f"{tables.mib(saved['held'])} MiB less; peak {tables.mib(saved['peak'])} less",
                )
            )
    return found


def tail_checks(
    name: str, ours: dict[str, Any], plain: dict[str, Any], layout: str, maps: int
) -> list[dict[str, Any]]:
    """With fused tails the network takes no longer than without attention, and little more memory;
    unknown where it was not measured. Replayed as a CUDA graph it takes no longer, either."""
    expected = {
        f"{what}, {name} against plain, {layout}": "at least as fast as without attention"
        for what in ("training", "inference")
    }
    memory = f"memory, {name}, {layout}"
    expected[memory] = f"peak at most that without attention and small maps, {tables.mib(maps)} MiB"
    if ours["status"] != "ok" or plain["status"] != "ok":
        why = f"not measured: {ours.get('reason') or plain.get('reason')}"
        return [a_check(check, None, wanted, why) for check, wanted in expected.items()]
    phases = (ours, ours.get("inference", {}))
    speeds = [phase["speedup"]["median"] if "speedup" in phase else None for phase in phases]
    more = ours["memory"]["peak"] - plain["memory"]["peak"]
    kept = [None if speed is None else speed >= 1 for speed in speeds] + [more <= maps]
    got = [*map(tables.times, speeds), f"{tables.mib(more)} MiB more"]
    found = [
        a_check(check, passed, wanted, word)
        for (check, wanted), passed, word in zip(expected.items(), kept, got, strict=True)
    ]
    graph = ours.get("graph", {})
    for (check, wanted), phase in zip(expected.items(), (graph, graph.get("inference", {}))):
        if "speedup" in phase:
            speed = phase["speedup"]["median"]
            found.append(a_check(f"{check}, graph", speed >= 1, wanted, tables.times(speed)))
    return found


def parser() -> argparse.ArgumentParser:
    kind = argparse.RawDescriptionHelpFormatter
    result = argparse.ArgumentParser(
        "python -m benchmarks.network", description=__doc__, formatter_class=kind
    )
    add = result.add_argument
    add("--preset", choices=tuple(PRESETS), default="quick")
    add("--network", default="resnet50", choices=("resnet18", "resnet34", "resnet50", "resnet101"))
    add("--batch", type=int, help="images per step")
    add("--size", type=int, help="pixels of a crop's side")
    add("--layouts", help=",".join(LAYOUTS))
    add("--rounds", type=int, help="steps of each network that are timed, at most")
    add("--budget", type=float, help="seconds at most per layout, beyond a few rounds")
    add("--rivals", help="eager,compile,... (all)")
    add("--backends", help="backends of da_ops (all usable on the device)")
    add("--device", choices=("cpu", "cuda"), help=op.DEVICE_HELP)
    add("--amp", choices=tuple(AMP), help="autocast to it (bfloat16 on a GPU, none on a CPU)")
    add("--threads", type=int, help="CPU threads (as torch has them)")
    add("--allocator", choices=("keep", "system"), default="keep", help=op.ALLOCATOR_HELP)
    add("--seconds", type=float, default=math.inf, help=op.SECONDS_HELP)
    add("--output", metavar="FILE", help="results, JSON; the chart lies beside it")
    return result


def complete(options: argparse.Namespace) -> None:
    """What the preset has for this device, where it was not given, and the device's launches."""
    on_gpu = options.device == "cuda"
    options.amp = options.amp or ("bfloat16" if on_gpu else "none")
    options.launches = cases.LAUNCHES if on_gpu else cases.LAUNCHES[:1]
    for name, value in (GPU_PRESETS if on_gpu else PRESETS)[options.preset].items():
        if getattr(options, name) is None:
            setattr(options, name, value)


def run(options: argparse.Namespace, save: op.Save) -> dict[str, Any]:
    """Measure all layouts; the results as they are written. `save` gets them at times."""
    complete(options)
    for name, least in (("batch", 2), ("size", 32), ("rounds", 1)):
        if getattr(options, name) < least:
            raise BenchmarkError(
                f"--{name}: expected at least {least}, got {getattr(options, name)}"
            )
    start, others = time.perf_counter(), environment.Others()
    options.end = start + options.seconds
    layouts = cases.choose("--layouts", options.layouts, list(LAYOUTS))
    contenders, reasons = op.contenders_for(options)
    if "eager" not in contenders:
        raise BenchmarkError("--rivals: eager is needed, the losses are compared with its own")
    ours = [c for c in contenders if c.startswith(FUSED) and not fused.parts(c)[1]]
    variants = ["plain", *contenders, *(TAIL + name for name in (["plain", *ours] if ours else ()))]
    if options.preset == "full" and options.device == "cpu" and "compile" in contenders:
        variants.append(WHOLE + "plain")
    if options.device == "cuda":
        whole = ["eager", "plain", *(c for c in contenders if c.startswith(FUSED))]
        variants += [WHOLE + name for name in whole[: 1 if options.preset == "quick" else None]]
        if options.preset == "quick":
            variants = [v for v in variants if not v.startswith("compile:")]
        # Variants that start quickly come first, in case time runs out.
        variants.sort(key=lambda variant: first_steps(variant, options.device))
    images = photographs.photographs()
    data = photographs.batches(images, options.rounds + WARM_UP, options.batch, options.size)
    plain = build(["plain"], options.network, len(images))["plain"]
    count, stored, maps = activations(plain, data[0][0][:2])  # of two images, and so in proportion
    stored = stored * options.batch // 2 // (1 if options.amp == "none" else 2)
    maps = maps * options.batch // 2
    agree = AGREE if options.amp == "none" else AGREE_IN_HALF
    head = environment.head("network", options.device, options.preset)
    parts: list[dict[str, Any]] = []
    counted = tally.Tally(of=len(layouts) * len(variants))

    def results(parts: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            **head,
            "seconds": time.perf_counter() - start,
            "network": {
                "name": options.network,
                "layers": count,
                "batch": options.batch,
                "size": options.size,
                "amp": None if options.amp == "none" else options.amp,
                "activations": stored,
                "photographs": list(images),
            },
            "backends": reasons,
            "layouts": parts,
            "summary": {
                "checks": [
                    *checks(parts, stored, agree, maps),
                    quiet(others.percent(), others.LIMIT),
                ],
            },
        }

    def told(part: dict[str, Any]) -> None:
        measured = [r for p in [*parts, part] for r in p["results"]]
        failed = [r for r in measured if r["status"] == "failed"]
        counted.passed = sum(r["status"] == "ok" for r in measured)
        counted.failed = sum(FUSED in r["variant"] or TAIL in r["variant"] for r in failed)
        counted.skipped = len(failed) - counted.failed  # rivals
        counted.tell()
        save(results([*parts, part]))

    with tqdm(layouts, unit="layout", leave=False, disable=None) as bar:
        say = environment.announcer(bar)
        for layout in bar:
            part = measure_layout(layout, variants, options, data, len(images), say, told)
            told(part)
            parts.append(part)
    return results(parts)


def main(arguments: list[str] | None = None) -> int:
    return op.command("network", parser().parse_args(arguments), run)


if __name__ == "__main__":
    sys.exit(main())
