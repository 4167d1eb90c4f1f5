"""All contenders over one shape and type: built alike, checked against float64, timed in turns.

What holds a batch norm is in evaluation for inference, in training for the rest.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from benchmarks import environment, fused, graphs, measure, rivals, summary, tail
from benchmarks.cases import DTYPES, LAYOUTS, Case
from benchmarks.environment import GIB
from benchmarks.measure import Sampler
from benchmarks.summary import FUSED, PLAIN

if TYPE_CHECKING:
    from da_ops.accuracy import Exact

# Cold: as many inputs as fill the last-level cache so many times.
CACHES = {"cpu": 2, "cuda": 4}
# Warm: a call that takes less, seconds, is called just before it is timed. It would otherwise find
# the tensors of whoever came before; a longer one hardly feels that.
WARM_UP = 1e-2
# L2 error over the magnitudes of the terms (da_ops.accuracy) above which a contender is wrong, not
# merely rounded: plain PyTorch in half precision rounds at every step, and sums gradients of small
# size. What is promised of the fused layer is far less: see checks.accuracy_checks.
WRONG = {"float64": 1e-11, "float32": 1e-4, "float16": 5e-2, "bfloat16": 3e-1}
# Results as they are called here, and in da_ops.accuracy.
RESULTS = {"inference": "y", "y": "y", "x": "dx", **tail.ATTENTION}

Key = tuple[str, str]  # rival, layout


class Failed(Exception):
    """A contender that cannot be timed, and why."""


def reference(x: torch.Tensor, dy: torch.Tensor, plain: nn.Module) -> dict[str, Exact]:
    """y and all gradients in float64, on the values that the contenders get."""
    from da_ops import accuracy

    conv, dilated, merge, *gate = (dict(plain.named_parameters())[n] for n in list(RESULTS)[3:])
    exact = accuracy.exact(dy, x, conv, dilated, merge, None, *gate)
    return {name: exact[result] for name, result in RESULTS.items()}


def check(
    layer: nn.Module, x: torch.Tensor, dy: torch.Tensor, exact: dict[str, Exact], dtype: str
) -> tuple[dict[str, dict[str, Any]], dict[str, float]]:
    """The errors of y and each gradient, and the seconds of each first call."""
    from da_ops import accuracy

    layer.eval()
    start = time.perf_counter()
    with torch.no_grad():
        inferred = layer(x).clone()  # a graph's output lasts until its next replay
    layer.train()
    middle = time.perf_counter()
    y = layer(x)
    kept = y.detach().clone()
    into = {"x": x, **tail.leaves(layer)}
    gradients = torch.autograd.grad(y, list(into.values()), dy)
    seconds = {"inference": middle - start, "training": time.perf_counter() - middle}
    found = {
        "inference": inferred,
        "y": kept,
        **dict(zip(into, gradients, strict=True)),
        **tail.statistics(layer),
    }
    errors = {}
    for name, result in found.items():
        error = accuracy.errors({name: result}, exact)[name]
        errors[name] = dataclasses.asdict(error)
        if not error.error <= WRONG[dtype]:  # NaN is wrong too
            raise Failed(
                f"wrong {name}: error {error.error:.1e} of its terms, expected at most"
                f" {WRONG[dtype]:.0e}"
            )
    return errors, seconds


def build(rival: str, plain: nn.Module, channels: int, x: torch.Tensor) -> nn.Module:
    """The contender of this name with the plain module's weights."""
    name = rival.removeprefix(PLAIN)
    if isinstance(plain, tail.Tail):
        made: nn.Module = tail.build(name, plain, x)
    elif name.startswith(FUSED):
        made = fused.build(name, channels, x.device, x.dtype)
        made.load_state_dict(plain.state_dict())
    else:
        made = copy.deepcopy(plain)
    return rivals.compiled(made, name) if name.startswith("compile") else made


def subjects(
    case: Case, plain: nn.Module, x: torch.Tensor, dy: torch.Tensor
) -> dict[str, tuple[nn.Module, dict[str, Exact]]]:
    """What the contenders are made of, the plain layer or its tail, and what it gives in float64:
    under "", and the tail without attention under PLAIN."""
    if case.subject == "layer":
        return {"": (plain, reference(x, dy, plain))}
    tails = tail.plains(plain, x, margin=WRONG[case.dtype])
    return {kind: (made, tail.reference(made, x, dy)) for kind, made in tails.items()}


def buffers(case: Case, regime: str, device: str) -> int:
    """How many inputs to cycle through: enough to fall out of the last-level cache, or one."""
    if regime == "warm":
        return 1
    size = math.prod(case.shape) * DTYPES[case.dtype].itemsize
    wanted = max(2, math.ceil(CACHES[device] * environment.last_level_cache(device) / size))
    return max(2, min(wanted, 1024 if device == "cuda" else 4096, GIB // size))


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
    if case.subject == "tail":
        contenders = tail.contenders(contenders)
    dtype = DTYPES[case.dtype]
    attention = rivals.PlainDA(case.shape[1], device, dtype)
    with torch.no_grad():  # at its initial zero the gate's weight would hide errors in pooled
        attention.gate_weight.normal_(0, 0.5)
    data = torch.randn(case.shape, device=device, dtype=dtype)
    data_dy = torch.randn(case.shape, device=device, dtype=dtype)
    made_of = subjects(case, attention, data, data_dy)

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
            plain, exact = made_of[PLAIN if rival.startswith(PLAIN) else ""]
            try:
                layer = build(rival, plain, case.shape[1], x)
                with fused.under(rival):
                    errors, seconds = check(layer, x, dy, exact, case.dtype)
                    # A contender that is a CUDA graph keeps its memory, whoever asks when.
                    memory = {} if is_own_graph(rival) else {"memory": layer_memory(layer, x, dy)}
            except tail.LeftOut as error:
                result |= {"status": "left out", "reason": str(error)}
                continue
            except Exception as error:  # whatever a compiler or backend may raise
                result |= {"status": "failed", "reason": reason(error)}
                continue
            layers[rival, layout] = layer
            result |= {"accuracy": errors, "first_call": seconds, **memory}
    del made_of, plain, exact, data_dy

    records = []
    for regime in case.regimes:
        count = buffers(case, regime, device)
        xs, dys = {}, {}
        for layout, (x, dy) in inputs.items():
            spare = range(count - 1)
            xs[layout] = [x, *(torch.randn_like(x).requires_grad_() for _ in spare)]
            dys[layout] = [dy, *(torch.randn_like(dy) for _ in spare)]
        for launch in case.launches:
            say(f"{case}: {regime}, {launch}")
            took = dict(results)
            if launch == "graph":  # some contenders are CUDA graphs already
                took = {key: r for key, r in took.items() if not is_own_graph(key[0])}
            times, copied, failed = in_turns(
                {key: layer for key, layer in layers.items() if key in took},
                xs, dys, launch, timing,
            )  # fmt: skip
            took |= {key: took[key] | {"status": "failed", "reason": failed[key]} for key in failed}
            records.append(
                {
                    "shape": list(case.shape),
                    "dtype": case.dtype,
                    "role": case.role,
                    "regime": regime,
                    "launch": launch,
                    "buffers": count,
                    "threads": torch.get_num_threads() if device == "cpu" else None,
                    "bytes": data.nbytes,
                    "copy": copied,
                    "results": [
                        summary.timed(result, times[key], copied["median"], case.subject)
                        if key in times
                        else result
                        for key, result in took.items()
                    ],
                    "speedups": summary.speedups(times),
                }
            )
    return records


def is_own_graph(rival: str) -> bool:
    """Whether torch.compile makes a CUDA graph of it."""
    return rival.removeprefix(PLAIN) == "compile:reduce-overhead"


Inputs = Mapping[str, list[torch.Tensor]]


def in_turns(
    layers: dict[Key, nn.Module], xs: Inputs, dys: Inputs, launch: str, timing: dict[str, Any]
) -> tuple[dict[Key, dict[str, Any]], dict[str, Any], dict[Key, str]]:
    """The times of each contender, those of a copy, and why some could not be recorded."""
    how: Any = measure
    if launch == "graph":
        how = graphs
        xs, dys = many(xs), many(dys)
    some = next(iter(xs.values()))
    timing = {**timing, "warm_up": WARM_UP if len(some) == 1 else 0.0}
    # On a GPU a target for each input: cold, the copy's writes miss the cache too.
    written = list(dict.fromkeys(some)) if some[0].is_cuda else some[:1]
    targets = itertools.cycle([torch.empty_like(x) for x in written])
    copies = ("copy", "contiguous")
    failed: dict[Key, str] = {}
    inference = {
        copies: how.inference_sampler(lambda x: next(targets).copy_(x), [x.detach() for x in some])
    }
    training = {}
    for key, layer in layers.items():
        x, dy, leaves = xs[key[1]], dys[key[1]], list(tail.leaves(layer).values())
        try:
            with fused.under(key[0]):  # a graph is recorded here
                forward = how.inference_sampler(layer.eval(), x)
                both_ways = how.training_sampler(layer.train(), leaves, x, dy)
            inference[key] = fused.sampled(key[0], in_mode(layer, False, forward))
            training[key] = fused.sampled(key[0], in_mode(layer, True, both_ways))
        except Exception as error:  # what cannot be recorded in a graph
            failed[key] = f"CUDA graph: {reason_of_recording(error)}"
    first = measure.interleaved(inference, **timing)
    both = measure.interleaved(training, **timing)
    times = {
        key: {
            "inference": first[key][:, 0],
            **{part: both[key][:, i] for i, part in enumerate(summary.TRAINING)},
        }
        for key in training
    }
    return times, measure.spread(first[copies][:, 0]), failed


def in_mode(layer: nn.Module, training: bool, sample: Sampler) -> Sampler:
    """The sampler of the layer in training or in evaluation, which is set outside what is timed."""

    def run(calls: int) -> Sequence[float]:
        layer.train(training)
        return sample(calls)

    return run


def many(inputs: Inputs) -> Inputs:
    """The same inputs, or the only one as often as a graph is to hold it."""
    (first, *others) = next(iter(inputs.values()))
    total = torch.cuda.get_device_properties(0).total_memory
    times = 1 if others else graphs.repeats(first.nbytes, total)
    return {layout: tensors * times for layout, tensors in inputs.items()}


def reason(error: Exception) -> str:
    """The first line of what a compiler, a backend or CUDA says."""
    return (str(error).strip().split("\n")[0] or type(error).__name__)[:300]


def reason_of_recording(error: Exception) -> str:
    """The same of a CUDA graph's recording, the end of which fails as well where what is recorded
    does, and by itself says nothing."""
    first = error.__context__
    return "; then ".join(reason(e) for e in (first, error) if isinstance(e, Exception))


def layer_memory(layer: nn.Module, x: torch.Tensor, dy: torch.Tensor) -> dict[str, int]:
    """Bytes that a forward and backward takes beyond x, dy, the parameters and the shortcut."""
    leaves = [x, *tail.leaves(layer).values()]
    return measure.memory(
        lambda: layer(x), lambda y: torch.autograd.grad(y, leaves, dy), x.device.type
    )
