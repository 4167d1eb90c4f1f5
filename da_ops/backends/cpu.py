"""The fused C++ kernels of csrc/cpu."""

from __future__ import annotations

import os
from typing import Any

import torch

from . import native
from .base import Backend, Call, Plan, TailKind
from .tail import Walks, direction, layer_walks, tail_walks
from .tuned import ENVIRONMENT, PLANS


def _plan(call: Call) -> Plan:
    return _plan_of(call, layer_walks(call.order))


def _residual_plan(call: Call, kind: TailKind) -> Plan:
    return _plan_of(call, tail_walks(call.order, kind, by_slab=True), tail=True)


def _plan_of(call: Call, walks: Walks, *, tail: bool = False) -> Plan:
    tensors = {
        one for walk in walks.forward for step in walk for one in (*step.reads, *step.writes)
    }
    default = _planned(call, os.environ.get(ENVIRONMENT["cpu"], ""), len(tensors))
    directions, details = [], []
    for name, passes in walks._asdict().items():
        tuned = PLANS.of("cpu", call, name == "backward")
        directions.append(direction(passes, cached=default["cached_tensors"]))
        details.append(_planned(call, tuned.launches, len(tensors)) if tuned else default)
    other = details[1]
    if tail:  # its result has a way of its own
        other["stream"] = other["stream_du"]
    told = {
        key: value if value == other[key] else f"{value} forward, {other[key]} backward"
        for key, value in details[0].items()
        if key not in ("joint", "hot", "forward", "backward", "cached_tensors", "stream_du")
    }
    forward, backward = directions
    return Plan(forward, backward, {**told, **PLANS.words("cpu", call)})


def _planned(call: Call, limits: str, tensors: int) -> dict[str, Any]:
    """The plan of a call whose forward reads and writes so many tensors of the size of x."""
    dtype = call.dtype_name
    kind = call.shape, call.channels_last, dtype, call.order
    return dict(native.planner().cpu(*kind, torch.get_num_threads(), limits, tensors))


BACKEND = Backend(
    "cpu",
    ("cpu",),
    native.load("_cpu.abi3.so"),
    native.forward,
    native.backward,
    _plan,
    checks=True,
    residual_forward=native.operator("residual_forward"),
    residual_forward_=native.operator("residual_forward_"),
    residual_training=native.operator("residual_training"),
    residual_backward=native.operator("residual_backward"),
    batch_statistics=native.operator("batch_statistics"),
    residual_plan=_residual_plan,
)
