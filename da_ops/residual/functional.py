"""The residual tail over a norm and a layer that exist."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from ..backends.choice import CHOICE
from ..checks import check_arguments, check_tail, name_want_of_memory
from ..function import name_what_is_wrong
from ..layout import dense, device_type
from ..module import DAModule
from .function import Call, Statistics, apply, compute, update
from .fusible import (
    affine_and_statistics,
    fits,
    fused_parameters,
    fusible_now,
    is_free,
    learns,
    makes_anew,
    norm_tensors,
    options,
    own_ways,
    statistics_of,
    takes_norm,
    unfit,
)

logger = logging.getLogger("da_ops")

_told: set[str] = set()  # reasons


def residual_attention(
    u: Tensor,
    shortcut: Tensor | None,
    norm: nn.Module,
    attention: DAModule | None,
    shortcut_norm: nn.Module | None = None,
) -> Tensor:
    """``relu(attention(norm(u)) + shortcut)``, the tail of a residual branch, as one operator.

    For backward a fused call in training keeps ``u``, small maps and, with a shortcut, its result,
    and a shortcut that goes through a norm; nothing of their size comes between.
    :func:`da_ops.explain` tells its passes. What cannot be fused calls the modules one by one:
    other norms and layers, hooks on one of them, subclasses of tensors, tensors that are traced,
    transformed (``torch.func``) or exported, a backend without such a kernel. Where that can be
    helped, a warning of the logger ``da_ops`` says so once, with the reason.

    Args:
        u: ``[N, C, H, W]``, what the branch's last convolution gives, in float16, bfloat16,
            float32 or float64.
        shortcut: as ``u``, or None where nothing is added.
        norm: an ``nn.BatchNorm2d`` or torchvision's ``FrozenBatchNorm2d`` over C channels, in
            training or in evaluation. Its running statistics are updated as it would do itself.
        attention: the layer, or None for norm, addition and ReLU alone; with a shortcut of None,
            too, norm and ReLU.
        shortcut_norm: the norm that the shortcut goes through, as in a block that downsamples:
            ``relu(attention(norm(u)) + shortcut_norm(shortcut))``. One that is as above is part of
            the operator of the backends "cpu" and "cuda", so that its result is not written. Else,
            and where backward could do without the shortcut, it is called before.

    Returns:
        ``[N, C, H, W]`` in the dtype and memory layout of ``u``.

    Raises:
        TypeError: ``u`` or the shortcut is no tensor.
        ValueError: a ``shortcut_norm`` without a shortcut, a shortcut that cannot be added to
            ``u``, a norm of another number of channels.
        what the modules raise, such as ValueError for one value a channel in training.
    """
    if shortcut is None and shortcut_norm is not None:
        raise ValueError(
            "residual_attention: with a shortcut_norm, shortcut must be what goes through it, a "
            "tensor; got None; give both or neither"
        )
    return tail(u, shortcut, norm, attention, None, shortcut_norm=shortcut_norm)


def tail(
    u: Tensor,
    shortcut: Tensor | None,
    norm: Any,
    attention: DAModule | None,
    activation: nn.Module | None,
    *,
    made_by: nn.Module | None = None,
    shortcut_norm: Any = None,
) -> Tensor:
    """:func:`residual_attention` in a block with an activation module of its own, which is called
    where its hooks, or what has become of it, ask for that. Without gradients the result may take
    the place of a ``u`` that is ``made_by`` a convolution for this call alone."""
    shared = shortcut_norm is norm  # which learns from u first
    if not (
        shortcut_norm is None
        or shared
        or takes_norm(u, shortcut, norm, attention, activation, shortcut_norm)
    ):
        shortcut, shortcut_norm = shortcut_norm(shortcut), None
    out = None
    if not shared and torch.compiler.is_compiling():
        out = _in_graph(u, shortcut, norm, attention, activation, shortcut_norm)
    elif not shared:
        out = _fused(u, shortcut, norm, attention, activation, made_by, shortcut_norm)
    if out is not None:
        return out
    if activation is None:  # a block does with its tensors what its library does
        check_tail(u, shortcut, norm)
    x = norm(u)
    x = x if attention is None else attention(x)
    if shortcut is not None:
        x = x + (shortcut if shortcut_norm is None else shortcut_norm(shortcut))
    return torch.relu(x) if activation is None else activation(x)


def _fused(
    u: Tensor,
    shortcut: Tensor | None,
    norm: Any,
    attention: DAModule | None,
    activation: nn.Module | None,
    made_by: nn.Module | None,
    shortcut_norm: Any,
) -> Tensor | None:
    """The tail by a kernel; None where the modules are to be called one by one.

    Most calls come from cold caches, where each look at a module or a tensor costs more than a
    kernel's pass over a thousand numbers. So the kernels that refuse what does not fit are asked to
    do so, and only what they have refused is looked at here. What goes with a shortcut's norm has
    been looked at by :func:`takes_norm`.
    """
    if not is_free(u, shortcut):
        return None
    parameters, reason = fused_parameters(norm, attention, activation)
    if parameters is None:
        _tell(reason)
        return None
    order, gate, backend = options(attention)
    served = CHOICE.for_tails(backend, device_type(u))
    own = norm_tensors(norm)
    exact = type(norm) is nn.BatchNorm2d
    refuses = served.checks and exact  # a frozen norm may have its own ideas of a result's dtype
    if not refuses and not fits(u, shortcut, norm, own):
        return None
    if served.residual_forward is None:
        _tell(CHOICE.without_tails(backend, device_type(u)))
        return None
    weight, bias, mean, var = own
    if learns(mean) or learns(var):
        return None
    eps, mean, var, running = statistics_of(norm, mean, var)
    if attention is not None and not served.checks:
        check_arguments(u, parameters, order, gate)
    of_shortcut: Statistics | None = None
    if shortcut_norm is not None:
        affine, of_shortcut = affine_and_statistics(shortcut_norm)
        parameters = (*parameters, *affine)
    call: Call = (served, order, gate, eps, mean, var, running, of_shortcut)
    try:
        if torch.is_grad_enabled():
            return apply(call, False, dense(u), shortcut, weight, bias, *parameters)
        # Where caches are cold, autograd's own part takes a small call longer than the kernel.
        new = running is None and made_by is not None and makes_anew(made_by)
        return compute(call, dense(u), shortcut, weight, bias, *parameters, overwrite=new)[0]
    except Exception as error:
        if refuses and shortcut_norm is None and not fits(u, shortcut, norm, own):
            return None
        name_want_of_memory(error, u)
        if attention is not None:
            name_what_is_wrong(u, parameters[:6], order, gate)
        raise


def _in_graph(
    u: Tensor,
    shortcut: Tensor | None,
    norm: Any,
    attention: DAModule | None,
    activation: nn.Module | None,
    shortcut_norm: Any,
) -> Tensor | None:
    """The tail as one operator of a graph that is compiled, which takes it apart later; None as
    :func:`_fused` has it."""
    if not fusible_now(u, shortcut, norm):
        return None
    parameters, _ = fused_parameters(norm, attention, activation)
    if parameters is None:
        return None
    order, gate, backend = options(attention)
    if CHOICE.for_tails(backend, u.device.type).residual_forward is None:
        return None
    weight, bias, mean, var = norm_tensors(norm)
    if learns(mean) or learns(var):
        return None
    eps, mean, var, running = statistics_of(norm, mean, var)
    if attention is not None:
        check_arguments(u, parameters, order, gate)
    six = parameters or (None,) * 6
    added: tuple[Any, ...] = ()
    its_running = None
    if shortcut_norm is not None:
        affine, (its_eps, *own, its_running) = affine_and_statistics(shortcut_norm)
        added = (*affine, *own, its_eps)
    out, mean, var, its_mean, its_var = torch.ops.da_ops.residual_attention.default(
        u, shortcut, weight, bias, mean, var, eps, *six, order, gate, backend, *added
    )
    count = u.numel() // u.shape[1]
    if running is not None:
        update(running, mean, var, count)
    if its_running is not None:
        update(its_running, its_mean, its_var, count)
    return out


def shortcut_of(downsample: nn.Module | None, x: Tensor) -> tuple[Tensor, nn.Module | None]:
    """What a block adds, and the norm that it is to go through, which is the last module of the
    block's ``downsample``; None where there is none, or somebody sees this call as a whole."""
    if downsample is None:
        return x, None
    own = downsample.__dict__
    plain = (
        type(downsample) is nn.Sequential
        and is_free(x, None)
        and own_ways(downsample) is None
        and own.get("_compiled_call_impl") is None
        and not _has_any_global_hook()
    )
    modules = list(downsample._modules.values()) if plain else []
    last = modules[-1] if len(modules) > 1 else None
    if last is None or unfit(last, None, None) is not None:
        return downsample(x), None
    for module in modules[:-1]:
        x = module(x)  # type: ignore[misc]
    return x, last


def rectified(conv: nn.Module, x: Tensor, norm: nn.Module, activation: nn.Module) -> Tensor:
    """``activation(norm(conv(x)))``, norm and ReLU as one operator."""
    return tail(conv(x), None, norm, None, activation, made_by=conv)


def _tell(reason: str | None) -> None:
    if reason is None or reason in _told:
        return
    _told.add(reason)
    logger.warning(
        "da_ops: the residual tail calls its modules one by one, not a fused kernel: %s", reason
    )
