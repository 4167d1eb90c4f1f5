"""The residual tail as an autograd function."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..backends.base import Backend
from ..backends.choice import CHOICE
from ..layout import dense, like
from ..parameters import SCHEMA, Parameters
from . import reference
from .reference import Norm


class ResidualFunction(torch.autograd.Function):
    """``apply(u, shortcut, norm_weight, norm_bias, norm_mean, norm_var, eps, *parameters, order,
    gate, backend, track=None) -> (out, mean, var)``, the residual tail with its hand-written
    backward.

    The shortcut may be None. ``mean`` and ``var`` (biased) are the batch's where ``norm_mean`` and
    ``norm_var`` are None, and else empty. The six parameters are those of
    :class:`da_ops.DAFunction`, all None with the order "none", which leaves attention out.
    ``track``, what keeps the norm's running statistics, is called within forward: checkpointing
    stops to compute again as soon as what is kept is there, and they come before that, as with
    ``nn.BatchNorm2d``.
    Between forward and backward it keeps ``u``, ``out``, the
    parameters and small maps.
    """

    @staticmethod
    def forward(
        ctx: Any,
        u: Tensor,
        shortcut: Tensor | None,
        norm_weight: Tensor | None,
        norm_bias: Tensor | None,
        norm_mean: Tensor | None,
        norm_var: Tensor | None,
        eps: float,
        *rest: Any,
    ) -> tuple[Tensor, Tensor, Tensor]:
        norm = (norm_weight, norm_bias, norm_mean, norm_var)
        u = dense(u)
        served, results = _compute(u, shortcut, *norm, eps, *rest)
        out, mean, var, channel_mean, pooled = results
        parameters, (order, gate) = rest[:6], rest[6:8]
        batch = norm_mean is None
        ctx.options = order, gate, served, eps, batch, shortcut is not None
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(mean, var)
        statistics = (mean, var) if batch else (norm_mean, norm_var)
        ctx.save_for_backward(
            u, out, norm_weight, norm_bias, *statistics, *parameters, channel_mean, pooled
        )
        return out, mean, var

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        nothing = (None,) * 4  # the order, the gate, the backend, track
        if dout is None:
            return (None,) * 13 + nothing
        order, gate, served, eps, batch, with_shortcut = ctx.options
        u, out, weight, bias, mean, var, *parameters, channel_mean, pooled = ctx.saved_tensors
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            norm = Norm(weight, bias, None if batch else mean, None if batch else var, eps)
            named = None if order == "none" else Parameters(*parameters)
            found = reference.backward(dout, out, u, norm, named, order, gate)
        else:
            found = served.residual_backward(
                like(dout, u), out, u, weight, bias, mean, var, batch, eps, *parameters,
                channel_mean, pooled, with_shortcut, order, gate,
            )  # fmt: skip
            given = (u, u, weight, bias, *parameters)
            found = tuple(None if t is None else g for g, t in zip(found, given))
        du, d_shortcut, d_weight, d_bias, *d_parameters = found
        if not with_shortcut:
            d_shortcut = None
        return (du, d_shortcut, d_weight, d_bias, None, None, None, *d_parameters, *nothing)


def _compute(
    u: Tensor, shortcut: Tensor | None, *rest: Any, overwrite: bool = False
) -> tuple[Backend, tuple[Tensor, ...]]:
    """The backend that serves :class:`ResidualFunction`'s arguments, ``u`` being dense, and its
    results. To ``overwrite`` lets ``out`` take the place of ``u``, and then there are no maps."""
    arguments, (backend, *tracks) = rest[:13], rest[13:]
    track = tracks[0] if tracks else None
    served = CHOICE.for_tails(backend, u.device.type)
    assert served.residual_forward is not None  # residual_attention asked
    shortcut = None if shortcut is None else like(shortcut, u)
    results: tuple[Tensor, ...]
    if overwrite and served.residual_forward_ is not None:
        results = (u, *served.residual_forward_(u, shortcut, *arguments))
    elif track and served.residual_training is not None and (running := track.in_kernel()):
        weight, bias, _, _, *options = arguments
        return served, served.residual_training(u, shortcut, weight, bias, *running, *options)
    else:
        results = served.residual_forward(u, shortcut, *arguments)
    if track:
        track(*results[1:3])
    return served, results


def without_gradients(u: Tensor, *rest: Any, overwrite: bool) -> tuple[Tensor, ...]:
    """The same results as ``ResidualFunction.apply``, in a call that autograd does not record:
    where caches are cold, its own part takes a small call longer than the kernel."""
    return _compute(dense(u), *rest, overwrite=overwrite)[1]


fused = ResidualFunction.apply

# One node to Dynamo, as da_ops::attention is.
_library = torch.library.Library("da_ops", "FRAGMENT")
_library.define(
    "residual(Tensor u, Tensor? shortcut, Tensor? norm_weight, Tensor? norm_bias, "
    f"Tensor? norm_mean, Tensor? norm_var, float eps, {SCHEMA}, str order, str gate, "
    "str backend) -> (Tensor out, Tensor mean, Tensor var)"
)
_library.impl("residual", fused, "CompositeImplicitAutograd")
