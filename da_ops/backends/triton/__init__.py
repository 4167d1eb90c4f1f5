"""Triton kernels: the fused layer on every GPU that Triton knows, with no compiler at build time.

The kernels are imported, and compiled, when a call first needs them, so it may turn out as late as
then that they do not work. They have operators of their own, `da_ops::triton_forward` and so
on, since `da_ops::forward` is there only where a compiled library is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ...layout import empty_gradient, like
from ...parameters import SCHEMA, Gradients, Parameters, Unnamed
from ...residual import reference as residual
from .. import eager, native, schedule
from ..base import Backend, Call, Direction, Pass, Plan
from ..choice import CHOICE
from ..tuned import find_triton
from . import tiles
from .run import INTERPRETED, TritonFailed


def _reason() -> str | None:
    if find_triton() is None:
        return "Triton is not installed: pip install triton"
    return None


def _missing() -> str | None:
    if not INTERPRETED and not torch.cuda.is_available():
        return "torch finds no GPU (with TRITON_INTERPRET=1 Python runs the kernels, for tests)"
    return None


@cache
def _check_capability(device: torch.device) -> None:
    if device.type == "cuda" and torch.version.cuda and not INTERPRETED:
        major, minor = torch.cuda.get_device_capability(device)
        if (major, minor) < (7, 5):
            raise TritonFailed(
                f"Triton needs compute capability 7.5, {torch.cuda.get_device_name(device)} has "
                f"{major}.{minor}"
            )


def _run(direction: str, x: Tensor, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    _check_capability(x.device)
    try:
        from . import launch, tail
    except Exception as error:  # whatever a broken installation may raise
        raise TritonFailed(f"{type(error).__name__}: {error}") from error
    with torch.cuda.device(x.device if x.is_cuda else -1):
        where = tail if direction.startswith("residual") else launch
        return tuple(getattr(where, direction)(*arguments))


def _refuse_or_tell(error: TritonFailed, *, forgiving: bool) -> None:
    """Raise RuntimeError, or say once why plain PyTorch takes over."""
    if not forgiving:
        raise RuntimeError(
            f"da_attention: backend 'triton' cannot serve: {error}; "
            "use backend='auto' for the best that can"
        ) from error
    CHOICE.give_up("triton", str(error))


def _forward(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    *arguments_of_all, forgiving = arguments
    if not (forgiving and CHOICE.gave_up("triton")):
        try:
            y, channel_mean, pooled = _run("forward", x, (x, *arguments_of_all))
            return y, channel_mean, pooled
        except TritonFailed as error:
            _refuse_or_tell(error, forgiving=forgiving)
    *parameters, order, gate = arguments_of_all
    y, _, _ = eager.BACKEND.forward(x, tuple(parameters), order, gate)
    _, channel_mean, pooled = native.fake_forward(x, *arguments_of_all)
    return like(y, x), channel_mean.zero_(), pooled.zero_()


def _backward(dy: Tensor, x: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    *arguments_of_all, forgiving = arguments
    gradients: Gradients | None = None
    if not (forgiving and CHOICE.gave_up("triton")):
        try:
            gradients = _run("backward", x, (dy, x, *arguments_of_all))
        except TritonFailed as error:
            _refuse_or_tell(error, forgiving=forgiving)
    if gradients is None:  # plain PyTorch does not look at the maps that forward may have left
        parameters, rest = tuple(arguments_of_all[:6]), arguments_of_all[6:]
        dx, *gradients_of_parameters = eager.BACKEND.backward(dy, x, parameters, *rest)
        gradients = (None if dx is None else like(dx, x), *gradients_of_parameters)
    return tuple(x.new_empty(0) if g is None else g for g in gradients)


def _residual_forward(u: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    *of_all, forgiving = arguments
    if not (forgiving and CHOICE.gave_up("triton")):
        try:
            return _run("residual_forward", u, (u, *of_all))
        except TritonFailed as error:
            _refuse_or_tell(error, forgiving=forgiving)
    shortcut, *norm_arguments = of_all[:6]
    norm = residual.Norm(*norm_arguments)
    out = residual.forward(u, shortcut, norm, *_attention(of_all[6:12], *of_all[12:]))
    _, *small = native.fake_residual_forward(u, *of_all)
    if norm.mean is None:
        small[:2] = residual.statistics(u)
    return like(out, u), *small[:2], *(kept.zero_() for kept in small[2:])


def _residual_backward(
    dout: Tensor, out: Tensor | None, u: Tensor, *arguments: Any
) -> list[Tensor]:
    *of_all, forgiving = arguments
    if not (forgiving and CHOICE.gave_up("triton")):
        try:
            found = _run("residual_backward", u, (dout, out, u, *of_all))
            return [g for g in found if g is not None]
        except TritonFailed as error:
            _refuse_or_tell(error, forgiving=forgiving)
    # Plain PyTorch does not look at the maps that forward may have left.
    weight, bias, mean, var, batch, eps = of_all[:6]
    norm = residual.Norm(weight, bias, None if batch else mean, None if batch else var, eps)
    attention = _attention(of_all[6:12], *of_all[14:])
    du, d_shortcut, *rest = residual.backward(dout, out, u, norm, *attention)
    found = (du, None if out is None else d_shortcut, *rest)
    given = (u, u, weight, bias, *of_all[6:12])
    return [
        like(g, u) if p is u else empty_gradient(p).copy_(g)
        for g, p in zip(found, given)
        if g is not None
    ]


def _attention(
    parameters: Sequence[Tensor | None], order: str, gate: str
) -> tuple[Parameters | None, str, str]:
    """The attention of a residual tail, as the definition takes it."""
    return None if order == "none" else Parameters(*parameters), order, gate


def _without_last(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function of arguments without the last, whether to forgive."""
    return lambda *arguments: function(*arguments[:-1])


def _calls(*, forgiving: bool) -> dict[str, Any]:
    """The functions of the Backend; the dispatcher makes each one node of a compiled graph."""

    def forward(x: Tensor, parameters: Unnamed, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        return torch.ops.da_ops.triton_forward.default(x, *parameters, *arguments, forgiving)

    def backward(dy: Tensor, x: Tensor, parameters: Unnamed, *arguments: Any) -> Gradients:
        out = torch.ops.da_ops.triton_backward.default(dy, x, *parameters, *arguments, forgiving)
        given = (x, *parameters)
        return tuple([None if p is None else g for g, p in zip(out, given, strict=True)])

    def residual_forward(*arguments: Any) -> tuple[Tensor, ...]:
        return torch.ops.da_ops.triton_residual_forward.default(*arguments, forgiving)

    def residual_backward(*arguments: Any) -> list[Tensor]:
        return torch.ops.da_ops.triton_residual_backward.default(*arguments, forgiving)

    return {
        "forward": forward,
        "backward": backward,
        "residual_forward": residual_forward,
        "residual_backward": residual_backward,
    }


_library = torch.library.Library("da_ops", "FRAGMENT")


def _register() -> None:
    _library.define(
        f"triton_forward(Tensor x, {SCHEMA}, str order, str gate, bool forgiving) "
        "-> (Tensor y, Tensor channel_mean, Tensor pooled)"
    )
    _library.define(
        f"triton_backward(Tensor dy, Tensor x, {SCHEMA}, Tensor channel_mean, "
        "Tensor pooled, str order, str gate, bool forgiving) -> (Tensor dx, Tensor d_conv_weight, "
        "Tensor d_dilated_weight, Tensor d_merge_weight, Tensor d_spatial_bias, "
        "Tensor d_gate_weight, Tensor d_gate_bias)"
    )
    _library.define(
        "triton_residual_forward(Tensor u, Tensor? shortcut, Tensor? norm_weight, "
        "Tensor? norm_bias, Tensor? norm_mean, Tensor? norm_var, float eps, "
        f"{SCHEMA}, str order, str gate, bool forgiving) "
        "-> (Tensor out, Tensor mean, Tensor var, Tensor channel_mean, Tensor pooled)"
    )
    _library.define(
        "triton_residual_backward(Tensor dout, Tensor? out, Tensor u, Tensor? norm_weight, "
        "Tensor? norm_bias, Tensor mean, Tensor var, bool batch, float eps, "
        f"{SCHEMA}, Tensor channel_mean, Tensor pooled, str order, str gate, bool forgiving) "
        "-> Tensor[]"
    )
    for name, function, fake, flops in (
        ("triton_forward", _forward, native.fake_forward, native.flops_forward),
        ("triton_backward", _backward, native.fake_backward, native.flops_backward),
        (
            "triton_residual_forward",
            _residual_forward,
            native.fake_residual_forward,
            native.flops_residual_forward,
        ),
        (
            "triton_residual_backward",
            _residual_backward,
            native.fake_residual_backward,
            native.flops_residual_backward,
        ),
    ):
        for key in ("CUDA", "CPU") if INTERPRETED else ("CUDA",):
            _library.impl(name, function, key)
        torch.library.register_fake(f"da_ops::{name}", _without_last(fake), lib=_library)
        register_flop_formula(getattr(torch.ops.da_ops, name))(flops)


def _plan(call: Call) -> Plan:
    def direction(steps: tuple[schedule.Pass, ...]) -> Direction:
        passes = tuple(Pass(p.name, len(p.reads), len(p.writes)) for p in steps)
        return Direction(passes, sum(p.reads + p.writes for p in passes))

    m = tiles.matrix(call.shape, call.dtype.itemsize, channels_last=call.channels_last)
    t = tiles.sum_tiles(m, call.shape[0], tiles.DEVICE)
    details = {
        "vector_bytes": m.vector * m.itemsize,
        "rows_a_super_row": m.period,
        "tile": f"{t.height}x{t.width}",
        "tiles_an_image": t.blocks * t.windows * m.period,
    }
    passes = schedule.SCHEDULES[call.order]
    return Plan(direction(passes.forward), direction(passes.backward), details)


_register()
BACKEND = Backend(
    "triton",
    ("cuda", "cpu") if INTERPRETED else ("cuda",),
    _reason(),
    plan=_plan,
    missing=_missing,
    explicit_only="interpreted by Python (TRITON_INTERPRET)" if INTERPRETED else None,
    **_calls(forgiving=False),
)
BACKEND = replace(BACKEND, for_auto=replace(BACKEND, **_calls(forgiving=True)))
