"""Plain PyTorch operations: serves every device, and every machine without a compiler."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from .. import reference
from ..layout import empty_gradient
from ..parameters import Parameters, Unnamed
from .base import Backend, Call, Direction, Gradients, Pass, Plan


def _forward(
    x: Tensor, parameters: Unnamed, order: str, gate: str
) -> tuple[Tensor, Tensor, Tensor]:
    y = reference.forward(x, Parameters(*parameters), order, gate)
    nothing = torch.empty(0, dtype=x.dtype, device=x.device)
    return y, nothing, nothing.clone()  # backward computes the small maps again


def _backward(
    dy: Tensor,
    x: Tensor,
    parameters: Unnamed,
    channel_mean: Tensor,
    pooled: Tensor,
    order: str,
    gate: str,
) -> Gradients:
    dx, *gradients = reference.backward(dy, x, Parameters(*parameters), order, gate)
    return dx, *(
        g if g is None or p is None or g.stride() == p.stride() else empty_gradient(p).copy_(g)
        for g, p in zip(gradients, parameters)
    )


class _Passes(TorchDispatchMode):
    """Notes every operation that reads or writes a tensor of x's size."""

    def __init__(self, numel: int) -> None:
        super().__init__()
        self.numel = numel
        self.passes: list[Pass] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.is_view:
            return out
        reads, writes = (
            sum(isinstance(t, Tensor) and t.numel() == self.numel for t in ts)
            for ts in (args, (out,))
        )
        if reads or writes:
            self.passes.append(Pass(func._schema.name.removeprefix("aten::"), reads, writes))
        return out

    def direction(self) -> Direction:
        return Direction(tuple(self.passes), sum(p.reads + p.writes for p in self.passes))


def _plan(call: Call) -> Plan:
    n, c, h, w = call.shape
    x = torch.empty(n, c, h, w, dtype=call.dtype, device="meta")

    def parameter(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=call.dtype, device="meta")

    spatial = call.order != "channel"
    size = {"affine": c, "scalar": 1, "eca": 3}.get(call.gate) if call.order != "spatial" else None
    parameters = Parameters(
        parameter(1, 1, 3, 3) if spatial else None,
        parameter(1, 1, 3, 3) if spatial else None,
        parameter(1, 2, 1, 1) if spatial else None,
        None,
        parameter(size) if size else None,
        parameter(size) if size and call.gate != "eca" else None,
    )
    with _Passes(x.numel()) as forward:
        y, channel_mean, pooled = _forward(x, parameters, call.order, call.gate)
    with _Passes(x.numel()) as backward:
        _backward(y, x, parameters, channel_mean, pooled, call.order, call.gate)
    return Plan(forward.direction(), backward.direction(), {})


BACKEND = Backend("eager", None, None, _forward, _backward, _plan)
