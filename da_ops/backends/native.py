"""The compiled libraries: loads them, and tells PyTorch of their operators.

Each library registers kernels for ``da_ops::forward`` and ``da_ops::backward``, and for those of
the residual tail; the dispatcher chooses among them by device. Shapes and FLOPs are the same for
all, and are registered here.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..checks import check_arguments, name_want_of_memory
from ..layout import empty_gradient
from ..parameters import Gradients, Unnamed
from .tuned import PLANS

FOLDER = Path(__file__).resolve().parent.parent


def build_record() -> dict[str, Any]:
    """The record of setup.py: what it built, and why not the rest; empty if it never ran."""
    try:
        return dict(json.loads((FOLDER / "_build.json").read_text()))
    except (OSError, ValueError):
        return {}


def load(library: str) -> str | None:
    """Load a library beside this package; None, or the reason it is not usable."""
    path = FOLDER / library
    if not path.exists():
        part = build_record().get(library.strip("_").partition(".")[0])
        if part is None:
            return f"{library} was never built: install da-ops from source with a C++ compiler"
        return f"{library} is missing: {part['reason'] or 'reinstall da-ops'}"
    try:
        torch.ops.load_library(str(path))
    except (OSError, RuntimeError) as error:
        why = error.__cause__ or error  # torch puts a line of its own before the loader's
        first_line = str(why).strip().partition("\n")[0]
        return f"{library} does not load, reinstall da-ops to rebuild it: {first_line}"
    _describe()
    PLANS.recall(library.strip("_").partition(".")[0])
    return None


def planner() -> Any:
    """The module da_ops._plan.

    Raises:
        RuntimeError: it is not there, or does not load.
    """
    try:
        from .. import _plan
    except ImportError as error:
        reason = build_record().get("plan", {}).get("reason") or error
        raise RuntimeError(
            f"da_ops: expected the compiled planner da_ops._plan, which does not load: {reason}; "
            "reinstall da-ops with a C++ compiler and Python's headers"
        ) from None
    return _plan


def forward(x: Tensor, parameters: Unnamed, order: str, gate: str) -> tuple[Tensor, Tensor, Tensor]:
    try:
        return torch.ops.da_ops.forward.default(x, *parameters, order, gate)
    except RuntimeError as error:
        name_want_of_memory(error, x)
        raise


def backward(
    dy: Tensor,
    x: Tensor,
    parameters: Unnamed,
    channel_mean: Tensor,
    pooled: Tensor,
    order: str,
    gate: str,
) -> Gradients:
    conv, dilated, merge, bias, gate_weight, gate_bias = parameters
    maps = channel_mean, pooled
    try:
        out = torch.ops.da_ops.backward.default(dy, x, *parameters, *maps, order, gate)
    except RuntimeError as error:
        name_want_of_memory(error, x)
        raise
    return (  # written out: a loop takes a microsecond longer
        out[0],
        None if conv is None else out[1],
        None if dilated is None else out[2],
        None if merge is None else out[3],
        None if bias is None else out[4],
        None if gate_weight is None else out[5],
        None if gate_bias is None else out[6],
    )


def operator(name: str) -> Any:
    """The operator of this name; None where no library has been loaded that defines it."""
    return getattr(torch.ops.da_ops, name).default if hasattr(torch.ops.da_ops, name) else None


def fake_forward(
    x: Tensor,
    conv_weight: Tensor | None,
    dilated_weight: Tensor | None,
    merge_weight: Tensor | None,
    spatial_bias: Tensor | None,
    gate_weight: Tensor | None,
    gate_bias: Tensor | None,
    order: str,
    gate: str,
) -> tuple[Tensor, Tensor, Tensor]:
    parameters = conv_weight, dilated_weight, merge_weight, spatial_bias, gate_weight, gate_bias
    check_arguments(x, parameters, order, gate)
    n, c, h, w = x.shape
    acc = reference.accumulation_dtype(x.dtype)
    channel_mean = x.new_empty((0,) if order == "channel" else (n, h, w), dtype=acc)
    pooled = x.new_empty((0,) if order == "spatial" else (n, c), dtype=acc)
    return torch.empty_like(x), channel_mean, pooled


def fake_backward(dy: Tensor, x: Tensor, *args: Any) -> tuple[Tensor, ...]:
    parameters = args[:6]
    return (
        torch.empty_like(x),
        *(x.new_empty(0) if p is None else empty_gradient(p) for p in parameters),
    )


def _check_devices(u: Tensor, *others: Tensor | None) -> None:
    """RuntimeError where one is elsewhere than ``u``, as the kernels have it: a call with one on
    "meta" comes here."""
    for t in others:
        if t is not None and t.device != u.device:
            raise RuntimeError(
                f"da_ops: the shortcut and the norm's tensors must be on u's device, {u.device}; "
                f"got one on {t.device}"
            )


def fake_residual_forward(
    u: Tensor,
    shortcut: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    norm_mean: Tensor | None,
    norm_var: Tensor | None,
    eps: float,
    *args: Any,
) -> tuple[Tensor, ...]:
    *parameters, order, gate = args[:8]
    _check_devices(u, shortcut, norm_weight, norm_bias, norm_mean, norm_var, *args[8:12])
    if order != "none":
        check_arguments(u, tuple(parameters), order, gate)
    n, c, h, w = u.shape
    acc = reference.accumulation_dtype(u.dtype)
    size = c if norm_mean is None else 0
    mean, var = (u.new_empty(size, dtype=acc) for _ in range(2))
    channel_mean = u.new_empty((0,) if order in ("channel", "none") else (n, h, w), dtype=acc)
    pooled = u.new_empty((0,) if order in ("spatial", "none") else (n, c), dtype=acc)
    return torch.empty_like(u), mean, var, channel_mean, pooled


def fake_residual_forward_(u: Tensor, *args: Any) -> tuple[Tensor, ...]:
    return fake_residual_forward(u, *args)[1:3]


def fake_residual_training(
    u: Tensor,
    shortcut: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    batches: Tensor | None,
    momentum: float,
    *args: Any,
) -> tuple[Tensor, ...]:
    _check_devices(u, running_mean, running_var, batches)
    return fake_residual_forward(u, shortcut, norm_weight, norm_bias, None, None, *args)


def fake_batch_statistics(
    u: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    batches: Tensor | None,
    momentum: float,
) -> tuple[Tensor, Tensor]:
    _check_devices(u, running_mean, running_var, batches)
    acc = reference.accumulation_dtype(u.dtype)
    return u.new_empty(u.shape[1], dtype=acc), u.new_empty(u.shape[1], dtype=acc)


def fake_residual_backward(
    dout: Tensor,
    out: Tensor | None,
    u: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    batch: bool,
    eps: float,
    *args: Any,
) -> list[Tensor]:
    like_u = [torch.empty_like(u) for _ in range(1 if out is None else 2)]  # du, d_shortcut
    of_shortcut = args[11:13]  # the weight and bias of its norm
    parameters = norm_weight, norm_bias, *args[:6], *of_shortcut
    return like_u + [empty_gradient(p) for p in parameters if p is not None]


def _flops(
    x: torch.Size, conv: torch.Size | None, gate_weight: torch.Size | None, gate: str
) -> int:
    """Forward FLOPs of the convolutions, as PyTorch counts them for the plain formula."""
    n, c, h, w = x
    spatial = 2 * (9 + 9 + 2) * n * h * w if conv is not None else 0
    channel = 2 * gate_weight[0] * n * c if gate == "eca" and gate_weight is not None else 0
    return spatial + channel


def _flops_at(times: int, *, x: int, conv: int, gate_weight: int, gate: int) -> Callable[..., int]:
    """The formula of an operator that takes ``x`` and the others at these places."""
    return lambda *args, **_: times * _flops(args[x], args[conv], args[gate_weight], args[gate])


flops_forward = _flops_at(1, x=0, conv=1, gate_weight=5, gate=8)
flops_residual_forward = _flops_at(1, x=0, conv=7, gate_weight=11, gate=14)
flops_residual_training = _flops_at(1, x=0, conv=9, gate_weight=13, gate=16)
# Backward's go to the input and to the weight.
flops_backward = _flops_at(2, x=1, conv=2, gate_weight=6, gate=11)
flops_residual_backward = _flops_at(2, x=2, conv=9, gate_weight=13, gate=18)

_described = False


def _describe() -> None:
    global _described
    if _described:
        return
    _described = True
    from torch.utils.flop_counter import register_flop_formula

    torch.library.register_fake("da_ops::forward", fake_forward)
    torch.library.register_fake("da_ops::backward", fake_backward)
    torch.library.register_fake("da_ops::residual_forward", fake_residual_forward)
    torch.library.register_fake("da_ops::residual_forward_", fake_residual_forward_)
    torch.library.register_fake("da_ops::residual_training", fake_residual_training)
    torch.library.register_fake("da_ops::batch_statistics", fake_batch_statistics)
    torch.library.register_fake("da_ops::residual_backward", fake_residual_backward)
    ops = torch.ops.da_ops
    register_flop_formula(ops.forward)(flops_forward)
    register_flop_formula(ops.backward)(flops_backward)
    register_flop_formula(ops.residual_forward)(flops_residual_forward)
    register_flop_formula(ops.residual_forward_)(flops_residual_forward)
    register_flop_formula(ops.residual_training)(flops_residual_training)
    register_flop_formula(ops.residual_backward)(flops_residual_backward)
