"""The fused contenders, "da_ops:BACKEND" and "da_ops:BACKEND:PLAN", and the plan they run under."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence

import torch
from torch import nn

from benchmarks.measure import Sampler
from benchmarks.summary import FUSED

BACKENDS = {"cpu": ("cpu",), "cuda": ("cuda", "triton")}  # worth timing on a device
PLANS = {"cuda": ("onchip",)}  # and those of their plans that may not be the default
VARIABLE = "DA_OPS_PLAN"


def names(backend: str) -> list[str]:
    """The contenders of a backend: as it comes, and under each plan."""
    return [f"{FUSED}{name}" for name in (backend, *(f"{backend}:{p}" for p in plans(backend)))]


def plans(backend: str) -> tuple[str, ...]:
    """None where the environment already names one for all."""
    return () if os.environ.get(VARIABLE) else PLANS.get(backend, ())


def parts(name: str) -> tuple[str, str]:
    """Backend and plan of a contender, alone or within a whole network; empty where it has none."""
    backend, _, plan = name.partition(FUSED)[2].partition(":")
    return backend, plan


def build(
    name: str,
    channels: int,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> nn.Module:
    """The layer of a fused contender, which has yet to be run :func:`under` its plan."""
    import da_ops

    backend, _ = parts(name)
    return da_ops.DAModule(channels, backend=backend, device=device, dtype=dtype)


@contextlib.contextmanager
def under(name: str) -> Iterator[None]:
    """Within, calls run under the plan that a contender's name ends with, if it names one."""
    _, plan = parts(name)
    before = os.environ.get(VARIABLE)
    if plan:
        os.environ[VARIABLE] = plan
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(VARIABLE, None)
        else:
            os.environ[VARIABLE] = before


def sampled(name: str, sample: Sampler) -> Sampler:
    """The sampler under the contender's plan, which is set outside what is timed."""

    def run(calls: int) -> Sequence[float]:
        with under(name):
            return sample(calls)

    return run
