"""The fused C++ kernels of csrc/cpu."""

from __future__ import annotations

import os
from typing import Any

import torch

from . import native
from .base import Backend, Call, Direction, Pass, Plan
from .tuned import ENVIRONMENT, PLANS


def _plan(call: Call) -> Plan:
    wish = os.environ.get(ENVIRONMENT["cpu"], "")
    default = _planned(call, wish)
    directions, details = [], []
    for name, tensors in (("forward", 1), ("backward", 2)):
        tuned = PLANS.of("cpu", call, name == "backward")
        passes = tuple(Pass(**p) for p in default[name])
        # A cached image is read from memory once for all passes.
        again = 0 if default[f"{name}_cached"] else sum(p.reads for p in passes) - tensors
        directions.append(Direction(passes, tensors + again + sum(p.writes for p in passes)))
        details.append(_planned(call, tuned.launches) if tuned else default)
    other = details[1]
    told = {
        key: value if value == other[key] else f"{value} forward, {other[key]} backward"
        for key, value in details[0].items()
        if key.removesuffix("_cached") not in ("forward", "backward")
    }
    forward, backward = directions
    return Plan(forward, backward, {**told, **PLANS.words("cpu", call)})


def _planned(call: Call, limits: str) -> dict[str, Any]:
    dtype = str(call.dtype).removeprefix("torch.")
    shape = call.shape, call.channels_last, dtype, call.order
    return dict(native.planner().cpu(*shape, torch.get_num_threads(), limits))


BACKEND = Backend(
    "cpu",
    ("cpu",),
    native.load("_cpu.abi3.so"),
    native.forward,
    native.backward,
    _plan,
    residual_forward=native.residual_forward,
    residual_backward=native.residual_backward,
)
