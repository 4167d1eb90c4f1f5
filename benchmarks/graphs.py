"""CUDA graphs: calls recorded once and replayed, so that launching them costs next to nothing.

One graph holds a call on each input, or many calls on the only one. In training all forward passes
are one graph and all backward passes another: each is then timed alone, and the training step is
their sum.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from typing import Any

import torch

from benchmarks.measure import Sampler, Stopwatch

Work = Callable[[], object]
Record = Callable[[Sequence[Work]], list[Work]]
MOST = 20  # calls of one input in a graph
# Graphs whose recording failed. PyTorch's allocator may still ask them what they record.
FAILED: list[torch.cuda.CUDAGraph] = []


def record(works: Sequence[Work], pool: Any = None) -> list[Work]:
    """What replays each of these, which may use the tensors of those before it.

    Recordings that are given the same memory `pool` share what they have freed, so that what one
    wrote there lasts until another is replayed. After a failure a pool takes no further recording.
    """
    # Autograd's graphs in reference cycles belong to the stream that made them: a recording that
    # differentiates by the same leaves would have to wait for it.
    gc.collect()
    before, stream = torch.cuda.current_stream(), torch.cuda.Stream()
    stream.wait_stream(before)
    with torch.cuda.stream(stream):  # graphs need what a first call sets up
        for work in works:
            work()
    before.wait_stream(stream)
    pool = pool or torch.cuda.graph_pool_handle()
    replays: list[Work] = []
    for work in works:
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=pool):
                work()
        except Exception:
            torch.cuda.set_stream(before)  # which a capture that failed does not restore
            FAILED.append(graph)
            end_capture()
            graph.reset()
            raise
        replays.append(graph.replay)
    return replays


def end_capture() -> None:
    """Give PyTorch a new generator: the one of a capture that failed takes every later random
    number for one of the capture, and refuses it."""
    generator = torch.cuda.default_generators[torch.cuda.current_device()]
    generator.graphsafe_set_state(torch.Generator(device="cuda").graphsafe_get_state())


def repeats(size: int, total: int) -> int:
    """Calls of one input of so many bytes in a graph, on a GPU of so much memory: training keeps
    the outputs of all, and every contender has graphs of its own."""
    return max(1, min(MOST, total // 128 // size))


def sampler(replays: Sequence[Work], calls_each: int, watch: Stopwatch) -> Sampler:
    """A sample is whole graphs, so that it may hold more or fewer calls than asked for."""

    def sample(calls: int) -> Sequence[float]:
        times = max(1, round(calls / calls_each))
        marks = [watch.mark()]
        for _ in range(times):
            for replay in replays:
                replay()
                marks.append(watch.mark())
        scale = calls / (times * calls_each)
        spans = [scale * span for span in watch.seconds(marks)]
        phases = [sum(spans[i :: len(replays)]) for i in range(len(replays))]
        return phases if len(phases) == 1 else [sum(phases), *phases]

    return sample


def inference_sampler(
    call: Callable[[torch.Tensor], object], xs: list[torch.Tensor], record: Record = record
) -> Sampler:
    """As measure.inference_sampler."""

    def forward() -> None:
        with torch.no_grad():
            for x in xs:
                call(x)

    return sampler(record([forward]), len(xs), Stopwatch(xs[0].device.type))


def training_sampler(
    call: Callable[[torch.Tensor], torch.Tensor],
    leaves: list[torch.Tensor],
    xs: list[torch.Tensor],
    dys: list[torch.Tensor],
    record: Record = record,
) -> Sampler:
    """As measure.training_sampler."""
    ys: list[torch.Tensor] = []

    def forward() -> None:
        ys[:] = [call(x) for x in xs]

    def backward() -> None:
        for y, x, dy in zip(ys, xs, dys, strict=True):
            torch.autograd.grad(y, [x, *leaves], dy)
        # The recording must find no autograd graph of another stream, and that graph's memory free.
        ys.clear()

    return sampler(record([forward, backward]), len(xs), Stopwatch(xs[0].device.type))
