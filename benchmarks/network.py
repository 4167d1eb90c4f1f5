"""Training a ResNet on photographs with the layer in every residual block: what does it cost?

    python -m benchmarks.network [--preset quick|full] [--network resnet50] [--batch N] ...

Networks with the same initial weights take turns, one training step (forward, loss, backward, SGD)
each per round, on the same random crops of photographs: without attention, and with the layer
after the last batch norm of each residual branch, as eager PyTorch, as torch.compile of the layer
alone, and fused. What a layer costs is its step less the step without attention, in the same round.
Losses of all variants must agree: they compute the same function. On a GPU the steps use autocast,
cuDNN's TF32 is off, and some networks are compiled as a whole, too. The allocator keeps what is
freed for the next step, as jemalloc and tcmalloc do.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import math
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from benchmarks import cases, environment, fused, measure, op, photographs, rivals, tables
from benchmarks.cases import LAYOUTS
from benchmarks.environment import BenchmarkError
from benchmarks.summary import FUSED, WHOLE, a_check, quiet

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
AMP = {"none": None, "float16": torch.float16, "bfloat16": torch.bfloat16}
COMPILING = 75.0  # seconds that compiling a whole network is expected to take at most
WARM_UP = 4  # steps before the rounds: the first, one for memory, two in measure.interleaved
# Variants round differently, and training amplifies that some tenfold per step. So losses must
# agree to this relative difference over the first steps, in which a wrong gradient would show; how
# far they part later is told beside it.
AGREE, FIRST = 1e-3, 3
AGREE_IN_HALF = 3e-2
# A small start of each residual branch, as is common, and a modest rate keep that drift slow.
BRANCH_GAIN, RATE = 0.2, 2e-3

Batches = list[tuple[torch.Tensor, torch.Tensor]]


def blocks(network: nn.Module) -> list[tuple[nn.Module, str]]:
    """Each residual block and the name of its branch's last batch norm."""
    found = []
    for module in network.modules():
        names = [name for name in ("bn3", "bn2") if hasattr(module, name)]
        if names and hasattr(module, "downsample"):
            found.append((module, names[0]))
    return found


def with_attention(
    plain: nn.Module, make: Callable[[int], nn.Module]
) -> tuple[nn.Module, list[nn.Module]]:
    """A copy of the network with `make(channels)` after each branch's last batch norm."""
    network = copy.deepcopy(plain)
    layers = []
    for block, name in blocks(network):
        norm = getattr(block, name)
        layer = make(norm.num_features)
        setattr(block, name, nn.Sequential(norm, layer))
        layers.append(layer)
    return network, layers


def build(variants: list[str], name: str, classes: int) -> dict[str, nn.Module]:
    """The networks by variant, all with the same weights."""
    import torchvision

    torch.manual_seed(0)
    plain = getattr(torchvision.models, name)(weights=None, num_classes=classes)
    for block, norm in blocks(plain):
        nn.init.constant_(getattr(block, norm).weight, BRANCH_GAIN)
    networks = {}
    weights = None
    for variant in variants:
        inner = variant.removeprefix(WHOLE)
        if inner == "plain":
            networks[variant] = copy.deepcopy(plain)
            continue
        if inner.startswith(FUSED):
            networks[variant], _ = with_attention(plain, partial(fused.build, inner))
        else:
            networks[variant], layers = with_attention(plain, rivals.PlainDA)
            for layer in layers if variant.startswith("compile") else ():
                rivals.compiled(layer, variant)
        if weights is None:
            weights = copy.deepcopy(networks[variant].state_dict())
        networks[variant].load_state_dict(weights)
    for variant, network in networks.items():
        if variant.startswith(WHOLE):
            network.compile(dynamic=False)
    return networks


class Trainer:
    """One network in training; each call of `sample` is a number of timed steps."""

    def __init__(
        self, network: nn.Module, batches: Batches, layout: str, device: str, amp: str = "none"
    ) -> None:
        self.network = network.to(device).to(memory_format=LAYOUTS[layout]).train()
        self.optimizer = torch.optim.SGD(network.parameters(), lr=RATE, momentum=0.9)
        moved = [
            (x.to(device).contiguous(memory_format=LAYOUTS[layout]), k.to(device))
            for x, k in batches
        ]
        self.batches = itertools.cycle(moved)
        self.watch = measure.Stopwatch(device)
        self.device = device
        self.amp = AMP[amp]
        # Gradients of float16 would underflow.
        self.scaler = torch.amp.GradScaler(device, enabled=self.amp == torch.float16)
        self.losses: list[torch.Tensor] = []

    def forward(self) -> torch.Tensor:
        x, labels = next(self.batches)
        with torch.autocast(self.device, self.amp, enabled=self.amp is not None):
            loss = nn.functional.cross_entropy(self.network(x), labels)
        self.losses.append(loss.detach())
        return loss

    def update(self, loss: torch.Tensor) -> None:
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def sample(self, steps: int) -> Sequence[float]:
        marks = [self.watch.mark()]
        for _ in range(steps):
            self.optimizer.zero_grad()
            self.update(self.forward())
            marks.append(self.watch.mark())
        return [sum(self.watch.seconds(marks))]

    def memory(self) -> dict[str, int]:
        """Bytes of a step beyond weights and optimizer state; see measure.memory."""
        self.optimizer.zero_grad()
        return measure.memory(self.forward, self.update, self.device)


def activations(network: nn.Module, x: torch.Tensor) -> tuple[int, int]:
    """Over the places of the attention layers: how many, and the bytes of their inputs."""
    sizes: list[int] = []
    hooks = [
        getattr(block, name).register_forward_hook(lambda *args: sizes.append(args[2].nbytes))
        for block, name in blocks(network)
    ]
    with torch.no_grad():
        network(x)
    for hook in hooks:
        hook.remove()
    return len(sizes), sum(sizes)


def measure_layout(
    layout: str,
    variants: list[str],
    options: argparse.Namespace,
    data: Batches,
    classes: int,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """All variants in one layout, interleaved."""
    torch._dynamo.reset()
    begun = time.perf_counter()
    results: dict[str, dict[str, Any]] = {}
    trainers: dict[str, Trainer] = {}
    for variant, network in build(variants, options.network, classes).items():
        results[variant] = {"variant": variant, "status": "ok"}
        left = options.seconds - (time.perf_counter() - begun)
        if variant.startswith(WHOLE) and left < COMPILING + options.budget:
            results[variant] |= {"status": "left out", "reason": "--seconds are too few"}
            continue
        trainer = Trainer(network, data, layout, options.device, options.amp)
        say(f"{layout}: first steps, {variant}")
        try:
            with fused.under(variant):
                start = time.perf_counter()
                trainer.sample(1)
                results[variant]["first_step"] = time.perf_counter() - start
                results[variant]["memory"] = trainer.memory()
        except Exception as error:  # whatever a compiler or backend may raise
            reason = str(error).strip().split("\n")[0] or type(error).__name__
            results[variant] |= {"status": "failed", "reason": reason[:300]}
            continue
        trainers[variant] = trainer
    say(f"{layout}: {', '.join(trainers)} in turn")
    timed = measure.interleaved(
        {variant: fused.sampled(variant, t.sample) for variant, t in trainers.items()},
        rounds=options.rounds, least=3, budget=options.budget,
    )  # fmt: skip
    steps = {variant: rounds[:, 0] for variant, rounds in timed.items()}
    for variant, seconds in steps.items():
        results[variant]["seconds"] = measure.spread(seconds)
        results[variant]["losses"] = [loss.item() for loss in trainers[variant].losses]
        if variant != "plain" and "plain" in steps:
            cost = measure.spread(seconds - steps["plain"])
            results[variant]["cost"] = cost
            base = float(np.median(steps["plain"]))
            results[variant]["cost_percent"] = 100 * cost["median"] / base
    return {
        "layout": layout,
        "results": list(results.values()),
        "cost_ratios": cost_ratios(results),
    }


def cost_ratios(results: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """How many times more each rival costs than each fused variant, by the median costs."""
    costs = {v: r["cost"]["median"] for v, r in results.items() if "cost" in r}
    return [
        {"fused": fused, "rival": rival, "ratio": costs[rival] / costs[fused]}
        for fused, rival in itertools.product(costs, costs)
        if fused.startswith(FUSED) and not rival.startswith(FUSED) and costs[fused] > 0
    ]


def checks(
    layouts: list[dict[str, Any]], stored: int, agree: float = AGREE
) -> list[dict[str, Any]]:
    """Losses agree with eager's; memory is at least the layers' activations below eager's."""
    found = []
    for part in layouts:
        results = {r["variant"]: r for r in part["results"]}
        for name, r in results.items():
            if r["status"] == "left out":
                continue
            if r["status"] != "ok":
                why = f"failed: {r['reason']}"
                found.append(a_check(f"{name}, {part['layout']}", False, "it runs", why,
                                     must=name.startswith(FUSED)))  # fmt: skip
                continue
            if name in ("plain", "eager", WHOLE + "plain") or results["eager"]["status"] != "ok":
                continue
            truth, losses = (np.array(results[v]["losses"]) for v in ("eager", name))
            apart = np.abs(losses - truth) / np.abs(truth)
            early, later = float(apart[:FIRST].max()), float(apart.max())
            found.append(
                a_check(
                    f"losses, {name} as eager, {part['layout']}",
                    early <= agree,  # false for NaN
                    f"within {agree:.0e} of it over {FIRST} steps",
                    f"within {early:.0e}; within {later:.0e} over {len(losses)} steps"
                    f" ({truth[0]:.2f} to {truth[-1]:.2f})",
                    must=name.startswith(FUSED),
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
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--amp", choices=tuple(AMP), help="autocast to it (bfloat16 on a GPU, none on a CPU)")
    add("--threads", type=int, help="CPU threads (as torch has them)")
    add("--allocator", choices=("keep", "system"), default="keep", help=op.ALLOCATOR_HELP)
    add("--seconds", type=float, default=math.inf, help=op.SECONDS_HELP)
    add("--output", metavar="FILE", help="results, JSON; the chart lies beside it")
    return result


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure all layouts; the results as they are written."""
    for name, least in (("batch", 2), ("size", 32), ("rounds", 1)):
        if getattr(options, name) < least:
            raise BenchmarkError(
                f"--{name}: expected at least {least}, got {getattr(options, name)}"
            )
    start, others = time.perf_counter(), environment.Others()
    layouts = cases.choose("--layouts", options.layouts, list(LAYOUTS))
    contenders, reasons = op.contenders_for(options)
    if "eager" not in contenders:
        raise BenchmarkError("--rivals: eager is needed, the losses are compared with its own")
    variants = ["plain", *contenders]
    if options.device == "cuda":
        whole = ["eager", "plain", *(c for c in contenders if c.startswith(FUSED))]
        variants += [WHOLE + name for name in whole[: 1 if options.preset == "quick" else None]]
        if options.preset == "quick":
            variants = [v for v in variants if not v.startswith("compile:")]
    images = photographs.photographs()
    data = photographs.batches(images, options.rounds + WARM_UP, options.batch, options.size)
    with tqdm(layouts, unit="layout", leave=False, disable=None) as bar:
        say = environment.announcer(bar)
        parts = [
            measure_layout(layout, variants, options, data, len(images), say) for layout in bar
        ]
    plain = build(["plain"], options.network, len(images))["plain"]
    count, stored = activations(plain, data[0][0][:2])  # of two images, and so in proportion
    stored = stored * options.batch // 2 // (1 if options.amp == "none" else 2)
    agree = AGREE if options.amp == "none" else AGREE_IN_HALF
    return {
        **environment.head("network", options.device, options.preset),
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
            "checks": [*checks(parts, stored, agree), quiet(others.percent(), others.LIMIT)],
        },
    }


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    on_gpu = options.device == "cuda"
    options.amp = options.amp or ("bfloat16" if on_gpu else "none")
    for name, value in (GPU_PRESETS if on_gpu else PRESETS)[options.preset].items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    return op.command("network", options, run)


if __name__ == "__main__":
    sys.exit(main())
