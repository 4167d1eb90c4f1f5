"""Plain PyTorch operations: serves every device, and every machine without a compiler."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from .. import reference
from ..layout import empty_gradient
from ..parameters import Gradients, Parameters, Unnamed
from .base import Backend, Call, Direction, Pass, Plan


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
        name = func._schema.name.removeprefix("aten::")
        if func.is_view or name.startswith(("empty", "new_empty")):
            return out
        reads, writes = (sum(map(self._is_full, ts)) for ts in (args, (out,)))
        if reads or writes:
            self.passes.append(Pass(name, reads, writes))
        return out

    def _is_full(self, t: Any) -> bool:
        if not isinstance(t, Tensor) or t.numel() != self.numel:
            return False
        expanded = (size > 1 and not stride for size, stride in zip(t.shape, t.stride()))
        return not any(expanded)  # or else it is a small tensor, read over and over

    def direction(self) -> Direction:
        return Direction(tuple(self.passes), sum(p.reads + p.writes for p in self.passes))


def _on_meta(
    shape: tuple[int, ...], dtype: torch.dtype, order: str, gate: str
) -> tuple[Tensor, Parameters]:
    """x and the parameters of a call, without memory."""

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    spatial = order != "channel"
    size = {"affine": shape[1], "scalar": 1, "eca": 3}.get(gate) if order != "spatial" else None
    return empty(*shape), Parameters(
        empty(1, 1, 3, 3) if spatial else None,
        empty(1, 1, 3, 3) if spatial else None,
        empty(1, 2, 1, 1) if spatial else None,
        None,
        empty(size) if size else None,
        empty(size) if size and gate != "eca" else None,
    )


def _plan(call: Call) -> Plan:
    x, parameters = _on_meta(call.shape, call.dtype, call.order, call.gate)
    with _Passes(x.numel()) as forward:
        y, channel_mean, pooled = _forward(x, parameters, call.order, call.gate)
    with _Passes(x.numel()) as backward:
        _backward(y, x, parameters, channel_mean, pooled, call.order, call.gate)
    return Plan(forward.direction(), backward.direction(), {})


@cache
def count_formula(order: str, gate: str) -> Plan:
    """The passes of the formula in plain PyTorch, with gradients by autograd, in float32."""
    with torch.inference_mode(False), torch.enable_grad():
        x, parameters = _on_meta((2, 4, 8, 8), torch.float32, order, gate)
        leaves = [t.requires_grad_() for t in (x, *parameters) if t is not None]
        with _Passes(x.numel()) as forward:
            y = reference.forward(x, parameters, order, gate)
        with _Passes(x.numel()) as backward:
            torch.autograd.grad(y, leaves, torch.empty_like(y))
    return Plan(forward.direction(), backward.direction(), {})


BACKEND = Backend("eager", None, None, _forward, _backward, _plan)
