"""Plans under which small tensors meet what is otherwise chosen by size alone."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import strategies as st

from da_ops.backends.triton import tiles

from .cases import Call
from .conftest import interpreted


def text(**limits: int) -> str:
    """As DA_OPS_CPU_PLAN and DA_OPS_PLAN have it."""
    return ",".join(f"{name}={value}" for name, value in limits.items())


def _texts(**choices: list[int]) -> st.SearchStrategy[str]:
    each = {name: st.sampled_from(values) for name, values in choices.items()}
    return st.fixed_dictionaries(each).map(lambda limits: text(**limits))


# The first of each is what a small tensor gets by itself. Those of the first line do not show in
# the bits of a result, those of the second do: numbers are added in another order.
_CPU_WAYS = _texts(cache=[0, 1], shared=[2**15, 0], joint=[2**16, 0], hot=[2**19, 0])
_CPU_SUMS = _texts(
    slabs=[16, 1, 3, 64], slab_rows=[64, 1, 3, 8], long_row=[1000, 0], near=[8192, 0]
)
CUDA = _texts(
    grid=[2**20, 1, 3, 7],
    partials=[32, 1, 2, 5],
    launch=[3500, 0],
    share=[8192, 1],
    lanes=[64, 2, 3, 5],
    scalar_lanes=[128, 1, 3, 20],
    height=[4096, 16, 100],
    min_reads=[2, 1],
    max_reads=[72, 1],
)
CUDA_ON_CHIP = _texts(chip_lanes=[2**10, 4, 8, 40], chip_rows=[2**10, 8, 16], chunks=[2, 1, 8])


@dataclass(frozen=True)
class Plan:
    """How a backend is to run a call; ``with plan():`` it does."""

    backend: str
    threads: int = 1
    ways: str = ""
    limits: Any = ""

    @property
    def text(self) -> str:
        return ",".join(filter(None, (self.ways, self.limits)))

    def plain(self) -> Plan:
        """Another that gives the same bits, on the CPU."""
        return replace(self, threads=1, ways="cache=0")

    @contextmanager
    def __call__(self) -> Iterator[None]:
        if self.backend == "cpu":
            with cpu_plan(self.text, self.threads):
                yield
        elif self.backend == "cuda":
            with _environment("DA_OPS_PLAN", self.text):
                yield
        elif self.backend == "triton":
            with _triton_limits(self.limits):
                yield
        else:
            yield


@contextmanager
def or_skipped() -> Iterator[None]:
    """Skip the test where the plan that was asked for cannot serve a call on this device."""
    try:
        yield
    except RuntimeError as error:
        if "DA_OPS_PLAN=" not in str(error):
            raise
        pytest.skip(str(error).splitlines()[0])


@contextmanager
def cpu_plan(limits: str, threads: int = 1) -> Iterator[None]:
    """The CPU kernels under these limits, as of DA_OPS_CPU_PLAN, on so many threads."""
    before = torch.get_num_threads()
    torch.ops.da_ops._cpu_plan(limits)
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
        torch.ops.da_ops._cpu_plan(os.environ.get("DA_OPS_CPU_PLAN", ""))


@contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before


@contextmanager
def _triton_limits(limits: tiles.Limits | None) -> Iterator[None]:
    from da_ops.backends.triton import launch

    before = launch.LIMITS
    launch.LIMITS = limits or before
    try:
        yield
    finally:
        launch.LIMITS = before


@st.composite
def plans(draw: st.DrawFn, backend: str, call: Call) -> Plan:
    """Any plan of the backend for the call."""
    if backend == "cpu":
        return Plan(backend, draw(st.integers(1, 4)), draw(_CPU_WAYS), draw(_CPU_SUMS))
    if backend == "cuda":
        wish = draw(st.sampled_from(["portable", "onchip"]))
        limits = draw(CUDA), draw(CUDA_ON_CHIP), text(kept=draw(st.sampled_from([2**20, 0, 1, 5])))
        return Plan(backend, 1, wish, ",".join(limits))
    if backend == "triton":
        return Plan(backend, limits=draw(triton_limits(call, interpreted(backend))))
    return Plan(backend)


@st.composite
def triton_limits(draw: st.DrawFn, call: Call, interpreted: bool) -> tiles.Limits | None:
    """Tiles of few elements; interpreted, of no fewer than make some dozen programs of a call."""
    if draw(st.integers(0, 3)) == 0:
        return None
    programs = 16 if interpreted else 4096
    least = call.x.numel() * call.x.element_size() // programs
    row = draw(st.sampled_from([64, 128, 512]))
    block = tiles.power_of_two(
        max(16, call.x.shape[0] * max(call.x[0, 0].numel(), call.x.shape[1]) // programs)
    )
    return tiles.Limits(
        tile_bytes=tiles.power_of_two(max(least, draw(st.sampled_from([64, 256, 4096])))),
        narrowest=row,
        widest=row * draw(st.sampled_from([1, 4])),
        programs=draw(st.sampled_from([1, 16, 64])),
        pixel_block=block * draw(st.sampled_from([1, 4])),
        channel_block=block * draw(st.sampled_from([1, 4])),
        stencil_block=draw(st.sampled_from([8, 16])),
        norm_block=block * draw(st.sampled_from([1, 4])),
        shares=draw(st.sampled_from([1, 3, 64])),
        parts=draw(st.sampled_from([16, 64, 4096])),
        large=draw(st.sampled_from([2**30, 1])),
    )
