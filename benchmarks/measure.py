"""Interleaved timing and exact memory: how every figure comes about.

All contenders take part in every round, in an order shuffled anew, one sample each; a sample holds
as many calls as fill about a millisecond. So drift of the machine meets all alike, and a ratio is
taken within a round: what is reported is the median over the rounds, with the 10th and 90th
percentile. All times are seconds per call, all sizes bytes.
"""

from __future__ import annotations

import ctypes
import gc
import itertools
import math
import os
import random
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # the profiler otherwise writes to stderr

# One sample: takes the number of calls, returns the seconds of each phase over all of them.
Sampler = Callable[[int], Sequence[float]]
Rounds = NDArray[np.float64]  # [rounds, phases], seconds per call
Name = TypeVar("Name", bound=Hashable)
MARK = "benchmarks: forward done"
TELLING = 5.0  # seconds from one time that rounds are told to the next


class Stopwatch:
    """Time marks: the clock on the CPU, events in the current stream on a GPU."""

    def __init__(self, device: str) -> None:
        self.cuda = device == "cuda"

    def mark(self) -> Any:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, marks: Sequence[Any]) -> list[float]:
        """The time from each mark to the next."""
        if self.cuda:
            torch.cuda.synchronize()
            return [a.elapsed_time(b) / 1e3 for a, b in itertools.pairwise(marks)]
        return [b - a for a, b in itertools.pairwise(marks)]


def inference_sampler(call: Callable[[torch.Tensor], Any], xs: list[torch.Tensor]) -> Sampler:
    """One phase: the forward pass without gradients, over the inputs in turn."""
    inputs = itertools.cycle(xs)
    watch = Stopwatch(xs[0].device.type)

    def sample(calls: int) -> Sequence[float]:
        with torch.no_grad():
            marks = [watch.mark()]
            for x in itertools.islice(inputs, calls):
                call(x)
            marks.append(watch.mark())
        return watch.seconds(marks)

    return sample


def training_sampler(
    call: Callable[[torch.Tensor], torch.Tensor],
    leaves: list[torch.Tensor],
    xs: list[torch.Tensor],
    dys: list[torch.Tensor],
) -> Sampler:
    """Three phases: forward and backward together, forward, backward (all gradients)."""
    pairs = itertools.cycle(list(zip(xs, dys, strict=True)))
    watch = Stopwatch(xs[0].device.type)

    def sample(calls: int) -> Sequence[float]:
        marks = [watch.mark()]
        for x, dy in itertools.islice(pairs, calls):
            y = call(x)
            marks.append(watch.mark())
            torch.autograd.grad(y, [x, *leaves], dy)
            del y
            marks.append(watch.mark())
        spans = watch.seconds(marks)
        return sum(spans), sum(spans[::2]), sum(spans[1::2])

    return sample


def interleaved(
    contenders: Mapping[Name, Sampler],
    *,
    rounds: int = 100,
    least: int = 5,
    budget: float = 10.0,
    sample_seconds: float = 1e-3,
    warm_up: float = 0.0,
    seed: int = 0,
    told: Callable[[dict[Name, Rounds]], object] | None = None,
) -> dict[Name, Rounds]:
    """Time all contenders round by round: `rounds` of them, fewer (but `least`) after `budget` s.
    `told` is given those until now, every few seconds.

    The longest inner loop is 10,000 calls. Garbage is collected before, not while, timing. Samples
    of calls that take less than `warm_up` seconds follow a call that is not timed: those before it
    were others', which left their own tensors in the caches.
    """
    calls, warmed = {}, set()
    for name, sample in contenders.items():
        single = min(sample(1)[0] for _ in range(2))
        calls[name] = min(10_000, math.ceil(sample_seconds / max(single, 1e-9)))
        if calls[name] > 1:
            sample(calls[name])
        if single < warm_up:
            warmed.add(name)
    order = random.Random(seed)
    names = list(contenders)
    times: dict[Name, list[list[float]]] = {name: [] for name in names}
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        start = last = time.perf_counter()
        for done in range(rounds):
            now = time.perf_counter()
            if done >= least and now - start > budget:
                break
            if told is not None and done > 0 and (done == 1 or now - last > TELLING):
                told({name: np.array(times[name]) for name in contenders})
                last = time.perf_counter()
            order.shuffle(names)
            for name in names:
                if name in warmed:
                    contenders[name](1)
                spans = contenders[name](calls[name])
                times[name].append([span / calls[name] for span in spans])
    finally:
        if collecting:
            gc.enable()
    return {name: np.array(times[name]) for name in contenders}


def keep_freed_memory() -> None:
    """Have glibc keep what is freed for the next allocation; with another library do nothing.

    By default it keeps some, depending on what was freed before: on who else is measured.
    """
    library = ctypes.CDLL(None)
    if not hasattr(library, "mallopt"):
        return
    trim_threshold, mmap_max = -1, -4  # as <malloc.h> names them
    library.mallopt(trim_threshold, 2**31 - 1)
    library.mallopt(mmap_max, 0)


def spread(values: NDArray[np.float64]) -> dict[str, float | int]:
    """Median, 10th and 90th percentile, in the unit of the values, and how many there are."""
    low, middle, high = np.percentile(values, (10, 50, 90))
    return {
        "median": float(middle),
        "p10": float(low),
        "p90": float(high),
        "samples": len(values),
    }


def memory(
    forward: Callable[[], torch.Tensor], backward: Callable[[torch.Tensor], Any], device: str
) -> dict[str, int]:
    """Bytes beyond what is alive at the start: `peak` over forward and backward, and `held`
    between the two, less the output itself.

    On the CPU from the allocator's own record of each allocation (scratch that a kernel takes
    past torch's allocator is not seen), on a GPU from its statistics.
    """
    forward_output: list[torch.Tensor] = []
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        start = torch.cuda.memory_allocated()
        forward_output.append(forward())
        held = torch.cuda.memory_allocated() - start - forward_output[0].nbytes
        kept = backward(forward_output[0])
        peak = torch.cuda.max_memory_allocated() - start
        del kept
        return {"peak": peak, "held": held}

    activity = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activity, profile_memory=True) as profile:
        forward_output.append(forward())
        with torch.profiler.record_function(MARK):
            pass
        kept = backward(forward_output[0])
    del kept
    live = peak = held = 0
    assert profile.profiler is not None
    assert profile.profiler.kineto_results is not None
    for event in sorted(profile.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == MARK:
            held = live - forward_output[0].nbytes
        elif event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return {"peak": peak, "held": held}
