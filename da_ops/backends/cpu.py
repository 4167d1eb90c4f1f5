"""The fused C++ kernels of csrc/cpu."""

from __future__ import annotations

import os

import torch

from . import native
from .base import Backend, Call, Direction, Pass, Plan


def _plan(call: Call) -> Plan:
    dtype = str(call.dtype).removeprefix("torch.")
    details = native.planner().cpu(
        call.shape,
        call.channels_last,
        dtype,
        call.order,
        torch.get_num_threads(),
        os.environ.get("DA_OPS_CPU_PLAN", ""),
    )

    def direction(name: str, tensors: int) -> Direction:
        passes = tuple(Pass(**p) for p in details.pop(name))
        # A cached image is read from memory once for all passes.
        again = 0 if details.pop(f"{name}_cached") else sum(p.reads for p in passes) - tensors
        return Direction(passes, tensors + again + sum(p.writes for p in passes))

    forward, backward = direction("forward", 1), direction("backward", 2)
    return Plan(forward, backward, details)


BACKEND = Backend(
    "cpu", ("cpu",), native.load("_cpu.abi3.so"), native.forward, native.backward, _plan
)
