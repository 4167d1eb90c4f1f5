"""One layer: the fused one against eager PyTorch and torch.compile, measured in one run.

    python -m benchmarks.op [--preset quick|full] [--shapes 16x64x56x56,...] [--layouts ...] ...

Leave the machine alone meanwhile: how much other programs took is measured and shown, for ratios
from a busy machine flatter the fused layer.

For each shape and type, contenders in every layout take turns (see measure.py):
- inference: the forward pass without gradients
- training: forward, then all gradients (x and every parameter) from a random dy; both parts are
  also given alone
The input is random. Warm, the default, gives each call the same input, as a layer meets the
output of the one before it; but all contenders take turns, so what is larger than the last cache
comes from memory. Cold cycles through copies of the input, twice the last-level cache in all.
Outputs are allocated in every call, as in use, from memory that the allocator has kept, as
jemalloc and tcmalloc do. glibc's default, --allocator system, returns some to the operating system,
and whoever allocates next pays for new pages: with large tensors more than the layer costs, and by
chance. The copy that the floor is taken from writes to memory it has written before.

Before it is timed, each contender's y and gradients are compared with the formula in float64; one
that is wrong is shown as failed and not timed. Floor: the time to move 2 (inference), 5 (training)
or 3 (backward) times the bytes of x at the speed of a copy measured in the same rounds.
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from benchmarks import cases, environment, measure, report, rivals, summary, tables
from benchmarks.cases import DTYPES, LAYOUTS, Case
from benchmarks.environment import GIB, BenchmarkError

FUSED = {"cpu": ("cpu",), "cuda": ("cuda", "triton")}  # backends worth timing on a device
TIMING: dict[str, dict[str, Any]] = {
    "quick": {"rounds": 60, "least": 5, "budget": 2.5},
    "full": {"rounds": 100, "least": 20, "budget": 40.0},
}
# Relative L2 error against float64 above which a contender is wrong, not merely rounded: plain
# PyTorch in half precision rounds at every step, and sums gradients of small size.
WRONG = {"float64": 1e-11, "float32": 1e-4, "float16": 5e-2, "bfloat16": 3e-1}

ALLOCATOR_HELP = "keep what is freed for the next allocation (keep), or glibc's default (system)"

Key = tuple[str, str]  # rival, layout


class Failed(Exception):
    """A contender that cannot be timed, and why."""


def reference(x: torch.Tensor, dy: torch.Tensor, plain: nn.Module) -> dict[str, torch.Tensor]:
    """y and all gradients by the formula in float64, on the values that the contenders get."""
    import da_ops

    parameters = dict(plain.named_parameters())
    names = ("conv.weight", "dilated_conv.weight", "merge.weight", "gate_weight", "gate_bias")
    leaves = [
        t.detach().double().requires_grad_() for t in (x, *(parameters[name] for name in names))
    ]
    y = da_ops.reference.da_attention(*leaves)
    gradients = torch.autograd.grad(y, leaves, dy.double())
    return {"y": y.detach(), **dict(zip(("x", *names), gradients, strict=True))}


def check(
    layer: nn.Module, x: torch.Tensor, dy: torch.Tensor, truth: dict[str, torch.Tensor], dtype: str
) -> tuple[dict[str, float], dict[str, float]]:
    """Relative L2 errors of y and each gradient, and the seconds of each first call."""
    start = time.perf_counter()
    with torch.no_grad():
        inferred = layer(x)
    middle = time.perf_counter()
    y = layer(x)
    names, parameters = zip(*layer.named_parameters(), strict=True)
    gradients = torch.autograd.grad(y, [x, *parameters], dy)
    seconds = {"inference": middle - start, "training": time.perf_counter() - middle}
    found = {
        "inference": inferred,
        "y": y.detach(),
        **dict(zip(("x", *names), gradients, strict=True)),
    }
    errors = {}
    for name, value in found.items():
        true = truth["y" if name == "inference" else name]
        error = (value.double() - true).norm() / true.norm().clamp_min(1e-300)
        errors[name] = error.item()
        if not errors[name] <= WRONG[dtype]:  # NaN is wrong too
            raise Failed(
                f"wrong {name}: relative L2 error {errors[name]:.1e}, expected at most"
                f" {WRONG[dtype]:.0e}"
            )
    return errors, seconds


def build(rival: str, plain: nn.Module, channels: int, x: torch.Tensor) -> nn.Module:
    """The contender of this name with the plain layer's weights."""
    if rival == "eager":
        return plain
    if rival.startswith("compile"):
        return rivals.compiled(copy.deepcopy(plain), rival)
    import da_ops

    backend = rival.removeprefix(summary.FUSED)
    layer = da_ops.DAModule(channels, backend=backend, device=x.device, dtype=x.dtype)
    layer.load_state_dict(plain.state_dict())
    return layer


def buffers(case: Case, regime: str, device: str) -> int:
    """How many inputs to cycle through: enough to fall out of the last-level cache, or one."""
    if regime == "warm":
        return 1
    size = math.prod(case.shape) * DTYPES[case.dtype].itemsize
    wanted = max(2, math.ceil(2 * environment.last_level_cache(device) / size))
    return max(2, min(wanted, 4096, GIB // size))


def measure_case(
    case: Case,
    device: str,
    contenders: list[str],
    timing: dict[str, Any],
    say: Callable[[str], None],
) -> list[dict[str, Any]]:
    """All contenders over one shape and type; one record per regime."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    channels = case.shape[1]
    dtype = DTYPES[case.dtype]
    plain = rivals.PlainDA(channels, device, dtype)
    with torch.no_grad():  # at its initial zero the gate's weight would hide errors in pooled
        plain.gate_weight.normal_(0, 0.5)
    data = torch.randn(case.shape, device=device, dtype=dtype)
    data_dy = torch.randn(case.shape, device=device, dtype=dtype)
    truth = reference(data, data_dy, plain)

    layers: dict[Key, nn.Module] = {}
    results: dict[Key, dict[str, Any]] = {}
    inputs = {
        layout: (
            data.clone(memory_format=LAYOUTS[layout]).requires_grad_(),
            data_dy.clone(memory_format=LAYOUTS[layout]),
        )
        for layout in case.layouts
    }
    for layout in case.layouts:
        x, dy = inputs[layout]
        for rival in contenders:
            result: dict[str, Any] = {"rival": rival, "layout": layout, "status": "ok"}
            results[rival, layout] = result
            say(f"{case}: checking {rival}, {layout}")
            try:
                layer = build(rival, plain, channels, x)
                result["errors"], result["first_call"] = check(layer, x, dy, truth, case.dtype)
            except Exception as error:  # whatever a compiler or backend may raise
                reason = str(error).strip().split("\n")[0] or type(error).__name__
                result |= {"status": "failed", "reason": reason[:300]}
                continue
            layers[rival, layout] = layer
            result["memory"] = layer_memory(layer, x, dy)
    del truth, data_dy

    records = []
    for regime in case.regimes:
        count = buffers(case, regime, device)
        xs, dys = {}, {}
        for layout, (x, dy) in inputs.items():
            spare = range(count - 1)
            xs[layout] = [x, *(torch.randn_like(x).requires_grad_() for _ in spare)]
            dys[layout] = [dy, *(torch.randn_like(dy) for _ in spare)]
        say(f"{case}: inference, {regime}")
        target = torch.empty_like(data)
        copies = ("copy", "contiguous")
        inference = measure.interleaved(
            {
                copies: measure.inference_sampler(
                    target.copy_, [x.detach() for x in next(iter(xs.values()))]
                ),
                **{
                    key: measure.inference_sampler(layer, xs[key[1]])
                    for key, layer in layers.items()
                },
            },
            **timing,
        )
        say(f"{case}: training, {regime}")
        training = measure.interleaved(
            {
                key: measure.training_sampler(
                    layer, list(layer.parameters()), xs[key[1]], dys[key[1]]
                )
                for key, layer in layers.items()
            },
            **timing,
        )
        copied = inference.pop(copies)[:, 0]
        times = {
            key: {
                "inference": inference[key][:, 0],
                **{part: training[key][:, i] for i, part in enumerate(summary.TRAINING)},
            }
            for key in layers
        }
        records.append(
            {
                "shape": list(case.shape),
                "dtype": case.dtype,
                "role": case.role,
                "regime": regime,
                "buffers": count,
                "threads": torch.get_num_threads() if device == "cpu" else None,
                "bytes": data.nbytes,
                "copy": measure.spread(copied),
                "results": [
                    summary.timed(result, times[key], measure.spread(copied)["median"])
                    if key in times
                    else result
                    for key, result in results.items()
                ],
                "speedups": summary.speedups(times),
            }
        )
    return records


def layer_memory(layer: nn.Module, x: torch.Tensor, dy: torch.Tensor) -> dict[str, int]:
    """Bytes that a forward and backward takes beyond x, dy and the parameters."""
    leaves = [x, *layer.parameters()]
    return measure.memory(
        lambda: layer(x), lambda y: torch.autograd.grad(y, leaves, dy), x.device.type
    )


def contenders_for(options: argparse.Namespace) -> tuple[list[str], dict[str, str | None]]:
    """Names of all contenders on this device, and why the backends left out are not usable."""
    known = ["eager", *rivals.compile_names(options.device)]
    chosen = cases.choose("--rivals", options.rivals, known) if options.rivals else tuple(known)
    import da_ops

    reasons = da_ops.backends()
    if options.backends:
        wanted = cases.choose("--backends", options.backends, list(reasons))
    else:
        wanted = tuple(b for b in FUSED[options.device] if reasons.get(b, "unknown") is None)
    return [*chosen, *(summary.FUSED + backend for backend in wanted)], reasons


def prepare(options: argparse.Namespace) -> None:
    """Set the number of threads and the allocator, and see that the device is there."""
    if options.allocator == "keep":
        measure.keep_freed_memory()
    if options.threads is not None:
        if options.threads < 1:
            raise BenchmarkError(f"--threads: expected at least 1, got {options.threads}")
        torch.set_num_threads(options.threads)
    if options.device == "cuda" and not torch.cuda.is_available():
        raise BenchmarkError("--device cuda: torch finds no GPU here; use --device cpu")


def parser() -> argparse.ArgumentParser:
    kind = argparse.RawDescriptionHelpFormatter
    result = argparse.ArgumentParser(
        "python -m benchmarks.op", description=__doc__, formatter_class=kind
    )
    add = result.add_argument
    add("--preset", choices=("quick", "full"), default="quick")
    add("--shapes", help="NxCxHxW,... in place of the preset's")
    add("--dtypes", help=",".join(DTYPES))
    add("--layouts", help=",".join(LAYOUTS))
    add("--regimes", help=",".join(cases.REGIMES))
    add("--rivals", help="eager,compile,... (all)")
    add("--backends", help="backends of da_ops (all usable on the device)")
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--threads", type=int, help="CPU threads (as torch has them)")
    add("--allocator", choices=("keep", "system"), default="keep", help=ALLOCATOR_HELP)
    add("--budget", type=float, help="seconds at most per measurement, beyond a few rounds")
    add("--output", metavar="FILE", help="results, JSON; the chart lies beside it")
    return result


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure all cases; the results as they are written."""
    start, others = time.perf_counter(), environment.Others()
    todo = cases.from_options(options)
    contenders, reasons = contenders_for(options)
    timing = dict(TIMING[options.preset])
    if options.budget is not None:
        timing["budget"] = options.budget
    records: list[dict[str, Any]] = []
    threads = torch.get_num_threads()
    with tqdm(todo, unit="case", leave=False, disable=None) as bar:
        say = environment.announcer(bar)
        for case in bar:
            names = [c for c in contenders if case.compile or not c.startswith("compile")]
            torch.set_num_threads(case.threads or threads)
            try:
                new = measure_case(case, options.device, names, timing, say)
            finally:
                torch.set_num_threads(threads)
            records += new
            for record in new:
                bar.write(tables.case_line(record))
    summarised = summary.summarise(records)
    summarised["checks"].append(summary.quiet(others.percent(), others.LIMIT))
    return {
        **environment.head("op", options.device, options.preset),
        "seconds": time.perf_counter() - start,
        "timing": timing,
        "backends": reasons,
        "cases": records,
        "summary": summarised,
    }


def command(
    kind: str, options: argparse.Namespace, run: Callable[[argparse.Namespace], dict[str, Any]]
) -> int:
    """Measure, write, show; the exit status: 1 where a check failed that must pass, 2 on misuse."""
    try:
        prepare(options)
        path = environment.results_file(kind, options.device, options.preset, options.output)
        results = run(options)
    except BenchmarkError as error:
        print(f"benchmarks.{kind}: {error}", file=sys.stderr)
        return 2
    environment.write_results(path, results)
    report.show(path)
    return 0 if all(c["passed"] for c in results["summary"]["checks"] if c["must"]) else 1


def main(arguments: list[str] | None = None) -> int:
    return command("op", parser().parse_args(arguments), run)


if __name__ == "__main__":
    sys.exit(main())
