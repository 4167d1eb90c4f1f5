"""The residual tail as an autograd function."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backends.base import Backend
from ..backends.choice import CHOICE
from ..layout import dense, like
from ..parameters import SCHEMA, Parameters, Unnamed
from . import reference
from .reference import Norm


class Running(NamedTuple):
    """Running statistics of a norm in training, kept as ``nn.BatchNorm2d`` does."""

    mean: Tensor
    var: Tensor
    batches: Tensor | None  # how many there were, of int64
    momentum: float | None  # None: the mean of all batches

    def fits_kernels(self) -> bool:
        """Whether an operator can update them."""
        mean, var, batches, momentum = self
        if momentum is None or not (mean.is_contiguous() and var.is_contiguous()):
            return False
        return batches is None or (batches.dtype is torch.int64 and batches.device == mean.device)

    def update(self, mean: Tensor, var: Tensor, count: int) -> None:
        """Let a batch's mean and biased variance, of so many elements a channel, have their share;
        they require no gradients."""
        momentum: Tensor | float | None = self.momentum
        if self.batches is not None:
            self.batches.add_(1)
            if momentum is None:  # as a tensor, so that nothing waits for a GPU
                momentum = self.batches.to(mean.dtype).reciprocal()
        kept = self.mean.dtype
        if isinstance(momentum, Tensor):
            momentum = momentum.to(kept)
        momentum = 0.0 if momentum is None else momentum
        self.mean.lerp_(mean.to(kept), momentum)
        self.var.lerp_((var * (count / (count - 1))).to(kept), momentum)


class Call(NamedTuple):
    """What a call of the residual tail has beside the tensors that may require gradients."""

    backend: Backend
    order: str  # "none" leaves attention out
    gate: str
    eps: float
    mean: Tensor | None = None  # the norm's own statistics; None where the batch's are taken
    var: Tensor | None = None
    running: Running | None = None  # those that the batch's have their share in
    statistics: bool = False  # whether the batch's mean and biased variance are results, too


class ResidualFunction(torch.autograd.Function):
    """``apply(call, u, shortcut, norm_weight, norm_bias, *parameters) -> out``, the residual tail
    with its hand-written backward; ``(out, mean, var)`` where ``call.statistics`` asks for those,
    which are empty where the norm has its own.

    The shortcut may be None. The six parameters are those of :class:`da_ops.DAFunction`; there are
    none with the order "none". Running statistics are updated within forward: checkpointing stops
    to compute again as soon as what is kept is there, and they come before that, as with
    ``nn.BatchNorm2d``. Between forward and backward it keeps ``u``, with a shortcut ``out``, the
    parameters and small maps.
    """

    @staticmethod
    def forward(
        ctx: Any,
        call: Call,
        u: Tensor,
        shortcut: Tensor | None,
        norm_weight: Tensor | None,
        norm_bias: Tensor | None,
        *parameters: Tensor | None,
    ) -> Any:
        u = dense(u)
        out, mean, var, *maps = compute(call, u, shortcut, norm_weight, norm_bias, *parameters)
        ctx.call = call
        ctx.set_materialize_grads(False)
        statistics = (mean, var) if call.mean is None else (call.mean, call.var)
        to_rectify = None if shortcut is None else out
        ctx.save_for_backward(
            u, to_rectify, norm_weight, norm_bias, *statistics, *parameters, *maps
        )
        if not call.statistics:
            return out
        ctx.mark_non_differentiable(mean, var)
        return out, mean, var

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if dout is None:
            return (None,) * len(ctx.needs_input_grad)
        u, out, weight, bias, mean, var, *parameters, channel_mean, pooled = ctx.saved_tensors
        call: Call = ctx.call
        batch = call.mean is None
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            norm = Norm(weight, bias, None if batch else mean, None if batch else var, call.eps)
            named = Parameters(*parameters) if parameters else None
            du, d_shortcut, *others = reference.backward(
                dout, out, u, norm, named, call.order, call.gate
            )
            given = (du, None if out is None else d_shortcut, *others)
            found = iter([g for g in given if g is not None])
        else:
            assert call.backend.residual_backward is not None
            found = iter(
                call.backend.residual_backward(
                    like(dout, u), out, u, weight, bias, mean, var, batch, call.eps,
                    *(parameters or _NONE), channel_mean, pooled, call.order, call.gate,
                )
            )  # fmt: skip
        return (
            None,
            next(found),
            None if out is None else next(found),
            *[None if t is None else next(found) for t in (weight, bias, *parameters)],
        )


_NONE: Unnamed = (None,) * 6


def compute(
    call: Call,
    u: Tensor,
    shortcut: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    *parameters: Tensor | None,
    overwrite: bool = False,
) -> Sequence[Tensor]:
    """``out``, the batch's mean and biased variance (empty where the norm has its own), and what
    else backward needs: the channel mean and the pooled ``u``. ``u`` is dense. To ``overwrite``
    lets ``out`` take its place, and then there are only the first three."""
    backend, running = call.backend, call.running
    assert backend.residual_forward is not None  # Choice.for_tails
    shortcut = None if shortcut is None else like(shortcut, u)
    norm = norm_weight, norm_bias
    attention = *(parameters or _NONE), call.order, call.gate
    results: Sequence[Tensor]
    if overwrite and backend.residual_forward_ is not None:
        own = call.mean, call.var, call.eps
        results = (u, *backend.residual_forward_(u, shortcut, *norm, *own, *attention))
    elif running is not None and backend.residual_training is not None and running.fits_kernels():
        return backend.residual_training(u, shortcut, *norm, *running, call.eps, *attention)
    else:
        own = call.mean, call.var, call.eps
        results = backend.residual_forward(u, shortcut, *norm, *own, *attention)
    if running is not None:
        running.update(results[1], results[2], u.numel() // u.shape[1])
    return results


def fused(
    u: Tensor,
    shortcut: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    norm_mean: Tensor | None,
    norm_var: Tensor | None,
    eps: float,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """``fused(u, shortcut, norm_weight, norm_bias, norm_mean, norm_var, eps, *parameters, order,
    gate, backend) -> (out, mean, var)``, the operator ``da_ops::residual_attention``. The six
    parameters are None with the order "none"."""
    *parameters, order, gate, backend = rest
    served = CHOICE.for_tails(backend, u.device.type)
    call = Call(served, order, gate, eps, norm_mean, norm_var, statistics=True)
    given = () if order == "none" else parameters
    return ResidualFunction.apply(call, u, shortcut, norm_weight, norm_bias, *given)


# One node to Dynamo, as da_ops::attention is. A graph that torch.compile keeps on disk is found by
# this node, not by the operators that it decomposes into: where their schemas change, so must its
# name. It was da_ops::residual in 0.2.0.
_library = torch.library.Library("da_ops", "FRAGMENT")
_library.define(
    "residual_attention(Tensor u, Tensor? shortcut, Tensor? norm_weight, Tensor? norm_bias, "
    f"Tensor? norm_mean, Tensor? norm_var, float eps, {SCHEMA}, str order, str gate, "
    "str backend) -> (Tensor out, Tensor mean, Tensor var)"
)
_library.impl("residual_attention", fused, "CompositeImplicitAutograd")
