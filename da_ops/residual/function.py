"""The residual tail as an autograd function."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..backends.base import Backend
from ..backends.choice import CHOICE
from ..checks import name_want_of_memory
from ..function import needs_formula
from ..layout import dense, like
from ..parameters import SCHEMA, Parameters, Unnamed
from . import reference
from .reference import Norm

# Plain tuples, since a call from cold caches pays microseconds for each that has names.

# Running statistics of a norm in training: mean, variance, how many batches there were (or None),
# and the momentum, None for the mean of all batches.
Running = tuple[Tensor, Tensor, Tensor | None, float | None]

# What a call of the residual tail has beside the tensors that may require gradients: the backend,
# the order, of which "none" leaves attention out, the gate, the norm's eps, its own mean and
# variance, which are None where the batch's are taken, and the running statistics that these have
# their share in.
Call = tuple[Backend, str, str, float, Tensor | None, Tensor | None, Running | None]


def kernels_keep(running: Running) -> bool:
    """Whether an operator can update these running statistics."""
    mean, var, batches, momentum = running
    if momentum is None or not (mean.is_contiguous() and var.is_contiguous()):
        return False
    return batches is None or (batches.dtype is torch.int64 and batches.device == mean.device)


def update(running: Running, mean: Tensor, var: Tensor, count: int) -> None:
    """Let a batch's mean and biased variance, of so many elements a channel, have their share in
    running ones, as ``nn.BatchNorm2d`` does; they require no gradients."""
    running_mean, running_var, batches, share = running
    momentum: Tensor | float = 0.0 if share is None else share
    if batches is not None:
        batches.add_(1)
        if share is None:  # as a tensor, so that nothing waits for a GPU
            momentum = batches.to(mean.dtype).reciprocal()
    for kept, new in ((running_mean, mean), (running_var, var * (count / (count - 1)))):
        # In half precision a variance may be infinite that has a finite share.
        wide = kept.to(torch.promote_types(kept.dtype, new.dtype))
        kept.copy_((1 - momentum) * wide + momentum * new)


class ResidualFunction(torch.autograd.Function):
    """``apply(call, statistics, u, shortcut, norm_weight, norm_bias, *parameters) -> out``, the
    residual tail with its hand-written backward; ``(out, mean, var)`` where ``statistics`` is true:
    the batch's, empty where the norm has its own.

    ``u`` is dense; a copy made here would not be part of the graph that double backward follows.
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
        statistics: bool,
        u: Tensor,
        shortcut: Tensor | None,
        norm_weight: Tensor | None,
        norm_bias: Tensor | None,
        *parameters: Tensor | None,
    ) -> Any:
        out, mean, var, *maps = compute(call, u, shortcut, norm_weight, norm_bias, *parameters)
        ctx.call = call
        ctx.set_materialize_grads(False)
        own_mean, own_var = call[4], call[5]
        ctx.save_for_backward(
            u,
            None if shortcut is None else out,
            norm_weight,
            norm_bias,
            mean if own_mean is None else own_mean,
            var if own_var is None else own_var,
            *parameters,
            *maps,
        )
        if not statistics:
            return out
        ctx.mark_non_differentiable(mean, var)
        return out, mean, var

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if dout is None:
            return (None,) * len(ctx.needs_input_grad)
        u, out, weight, bias, mean, var, *parameters, channel_mean, pooled = ctx.saved_tensors
        backend, order, gate, eps, own_mean, *_ = ctx.call
        batch = own_mean is None
        if needs_formula(dout):
            norm = Norm(weight, bias, None if batch else mean, None if batch else var, eps)
            named = Parameters(*parameters) if parameters else None
            du, d_shortcut, *others = reference.backward(dout, out, u, norm, named, order, gate)
            given = (du, None if out is None else d_shortcut, *others)
            found = iter([g for g in given if g is not None])
        else:
            u = dense(u)  # hooks on saved tensors may have laid them out anew
            out = None if out is None else like(out, u)
            maps = channel_mean.contiguous(), pooled.contiguous()
            six = parameters or _NONE
            try:
                found = iter(
                    backend.residual_backward(
                        like(dout, u), out, u, weight, bias, mean, var, batch, eps,
                        *six, *maps, order, gate,
                    )
                )  # fmt: skip
            except RuntimeError as error:
                name_want_of_memory(error, u)
                raise
        return (
            None,
            None,
            next(found),
            None if out is None else next(found),
            *[None if t is None else next(found) for t in (weight, bias, *parameters)],
        )


# As autograd.Function has it, but for what torch.func's transforms need, which come not here.
apply = super(torch.autograd.Function, ResidualFunction).apply

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
    backend, order, gate, eps, mean, var, running = call
    assert backend.residual_forward is not None  # Choice.for_tails
    if shortcut is not None:
        shortcut = like(shortcut, u)
    six = parameters or _NONE
    results: Sequence[Tensor]
    if overwrite and backend.residual_forward_ is not None:
        results = (
            u,
            *backend.residual_forward_(
                u, shortcut, norm_weight, norm_bias, mean, var, eps, *six, order, gate
            ),
        )
    else:
        if running is not None and backend.residual_training is not None and running[3] is not None:
            try:
                return backend.residual_training(
                    u, shortcut, norm_weight, norm_bias, *running, eps, *six, order, gate
                )
            except RuntimeError:
                if kernels_keep(running):
                    raise
        results = backend.residual_forward(
            u, shortcut, norm_weight, norm_bias, mean, var, eps, *six, order, gate
        )
    if running is not None:
        update(running, results[1], results[2], u.numel() // u.shape[1])
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
    call: Call = (served, order, gate, eps, norm_mean, norm_var, None)
    given = () if order == "none" else parameters
    return ResidualFunction.apply(call, True, dense(u), shortcut, norm_weight, norm_bias, *given)


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
