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

# What a norm has beside its weight and bias: eps, its own mean and variance, which are None where
# the batch's are taken, and the running statistics that these have their share in.
Statistics = tuple[float, Tensor | None, Tensor | None, Running | None]

# What a call of the residual tail has beside the tensors that may require gradients: the backend,
# the order, of which "none" leaves attention out, the gate, the four of the norm's Statistics, and
# those of the norm that the shortcut goes through, None where it is added as it is.
Call = tuple[
    Backend, str, str, float, Tensor | None, Tensor | None, Running | None, Statistics | None
]


def kernels_keep(running: Running) -> bool:
    """Whether an operator can update these running statistics."""
    mean, var, batches, momentum = running
    if momentum is None or not (mean.is_contiguous() and var.is_contiguous()):
        return False
    return batches is None or (batches.dtype is torch.int64 and batches.device == mean.device)


def update(running: Running, mean: Tensor, var: Tensor, count: int) -> None:
    """Update running statistics with a batch's mean and biased variance over ``count`` elements a
    channel, as ``nn.BatchNorm2d`` does; they require no gradients."""
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
    the batch's, empty where the norm has its own; and those of a shortcut's norm that takes the
    batch's.

    ``u`` is dense; a copy made here would not be part of the graph that double backward follows.
    The shortcut may be None. The six parameters are those of :class:`da_ops.DAFunction`; there are
    none with the order "none". Where the shortcut goes through a norm, its weight and bias follow
    them. Running statistics are updated within forward: checkpointing stops to compute again as
    soon as what is kept is there, and they come before that, as with ``nn.BatchNorm2d``. Between
    forward and backward it keeps ``u``, with a shortcut ``out``, one that goes through a norm, the
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
        out, mean, var, channel_mean, pooled, *of_batch = compute(
            call, u, shortcut, norm_weight, norm_bias, *parameters
        )
        ctx.call = call
        ctx.set_materialize_grads(False)
        own_mean, own_var, _, of_shortcut = call[4:]
        added: tuple[Tensor | None, ...] = ()
        if of_shortcut is not None:
            *parameters, weight, bias = parameters  # type: ignore[assignment]
            added = shortcut, weight, bias, *(of_batch or of_shortcut[1:3])
        ctx.save_for_backward(
            u,
            None if shortcut is None else out,
            norm_weight,
            norm_bias,
            mean if own_mean is None else own_mean,
            var if own_var is None else own_var,
            *parameters,
            channel_mean,
            pooled,
            *added,
        )
        if not statistics:
            return out
        ctx.mark_non_differentiable(mean, var, *of_batch)
        return out, mean, var, *of_batch

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if dout is None:
            return (None,) * len(ctx.needs_input_grad)
        backend, order, gate, eps, own_mean, _, _, of_shortcut = ctx.call
        saved = ctx.saved_tensors
        added: Any = ()
        affine: Any = ()
        if of_shortcut is not None:
            saved, added, affine = saved[:-5], saved[-5:], saved[-4:-2]
        u, out, weight, bias, mean, var, *parameters, channel_mean, pooled = saved
        batch = own_mean is None
        if needs_formula(dout):
            norm = Norm(weight, bias, None if batch else mean, None if batch else var, eps)
            named = Parameters(*parameters) if parameters else None
            if of_shortcut is not None:
                shortcut, its_weight, its_bias, *own = added
                its_mean, its_var = (None, None) if of_shortcut[1] is None else own
                added = shortcut, Norm(its_weight, its_bias, its_mean, its_var, of_shortcut[0])
            du, d_shortcut, *others = reference.backward(
                dout, out, u, norm, named, order, gate, *added
            )
            given = (du, None if out is None else d_shortcut, *others)
            found = iter([g for g in given if g is not None])
        else:
            u = dense(u)  # hooks on saved tensors may have laid them out anew
            out = None if out is None else like(out, u)
            maps = channel_mean.contiguous(), pooled.contiguous()
            six = parameters or _NONE
            if of_shortcut is not None:
                added = like(added[0], u), *added[1:], of_shortcut[0], of_shortcut[1] is None
            try:
                found = iter(
                    backend.residual_backward(
                        like(dout, u), out, u, weight, bias, mean, var, batch, eps,
                        *six, *maps, order, gate, *added,
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
            *[None if t is None else next(found) for t in (weight, bias, *parameters, *affine)],
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
    else backward needs: the channel mean and the pooled ``u``, and where the shortcut is normalised
    by the batch's statistics, these. ``u`` is dense. To ``overwrite`` lets ``out`` take its place,
    and then there are no maps."""
    backend, order, gate, eps, mean, var, running, of_shortcut = call
    assert backend.residual_forward is not None  # Choice.for_tails
    if shortcut is not None:
        shortcut = like(shortcut, u)
    added: tuple[Any, ...] = ()
    of_batch: tuple[Tensor, ...] = ()
    if of_shortcut is not None:
        assert shortcut is not None
        *parameters, weight, bias = parameters  # type: ignore[assignment]
        added_eps, *own, learnt = of_shortcut
        if own[0] is None:
            of_batch = _batch_statistics(backend, shortcut, learnt)
        added = weight, bias, *(of_batch or own), added_eps
    six = parameters or _NONE
    results: Sequence[Tensor] = ()
    if overwrite and backend.residual_forward_ is not None:
        results = (
            u,
            *backend.residual_forward_(
                u, shortcut, norm_weight, norm_bias, mean, var, eps, *six, order, gate, *added
            ),
        )
    elif running is not None and backend.residual_training is not None and running[3] is not None:
        try:
            results = backend.residual_training(
                u, shortcut, norm_weight, norm_bias, *running, eps, *six, order, gate, *added
            )
        except RuntimeError:
            if kernels_keep(running):
                raise
        else:
            running = None  # has learnt
    if not results:
        results = backend.residual_forward(
            u, shortcut, norm_weight, norm_bias, mean, var, eps, *six, order, gate, *added
        )
    if running is not None:
        update(running, results[1], results[2], u.numel() // u.shape[1])
    return (*results, *of_batch) if of_batch else results


def _batch_statistics(
    backend: Backend, u: Tensor, running: Running | None
) -> tuple[Tensor, Tensor]:
    assert backend.batch_statistics is not None
    if running is not None and running[3] is not None and kernels_keep(running):
        return backend.batch_statistics(u, *running)
    mean, var = backend.batch_statistics(u, None, None, None, 0.0)
    if running is not None:
        update(running, mean, var, u.numel() // u.shape[1])
    return mean, var


def fused(
    u: Tensor,
    shortcut: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    norm_mean: Tensor | None,
    norm_var: Tensor | None,
    eps: float,
    *rest: Any,
) -> Sequence[Tensor]:
    """``fused(u, shortcut, norm_weight, norm_bias, norm_mean, norm_var, eps, *parameters, order,
    gate, backend, shortcut_weight, shortcut_bias, shortcut_mean, shortcut_var, shortcut_eps) ->
    (out, mean, var, shortcut_mean, shortcut_var)``, the operator ``da_ops::residual_attention``.
    The six parameters are None with the order "none", the last five without a norm of the shortcut.
    """
    *parameters, order, gate, backend = rest[:9]
    *affine, its_mean, its_var, its_eps = rest[9:] or (None,) * 5
    served = CHOICE.for_tails(backend, u.device.type)
    of_shortcut = None if its_eps is None else (its_eps, its_mean, its_var, None)
    call: Call = (served, order, gate, eps, norm_mean, norm_var, None, of_shortcut)
    given = () if order == "none" else parameters
    added = () if of_shortcut is None else affine
    out, mean, var, *of_batch = ResidualFunction.apply(
        call, True, dense(u), shortcut, norm_weight, norm_bias, *given, *added
    )
    return out, mean, var, *(of_batch or (mean.new_empty(0), mean.new_empty(0)))


# One node to Dynamo, as da_ops::attention is. A graph that torch.compile keeps on disk is found by
# this node, not by the operators that it decomposes into: where their schemas change, so must its
# name. It was da_ops::residual in 0.2.0.
_library = torch.library.Library("da_ops", "FRAGMENT")
_library.define(
    "residual_attention(Tensor u, Tensor? shortcut, Tensor? norm_weight, Tensor? norm_bias, "
    f"Tensor? norm_mean, Tensor? norm_var, float eps, {SCHEMA}, str order, str gate, "
    "str backend, Tensor? shortcut_weight=None, Tensor? shortcut_bias=None, "
    "Tensor? shortcut_mean=None, Tensor? shortcut_var=None, float? shortcut_eps=None) -> "
    "(Tensor out, Tensor mean, Tensor var, Tensor batch_mean, Tensor batch_var)"
)
_library.impl("residual_attention", fused, "CompositeImplicitAutograd")
