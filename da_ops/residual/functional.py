"""The residual tail over a norm and a layer that exist."""

from __future__ import annotations

import logging
import sys
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from ..backends.base import Backend
from ..backends.choice import CHOICE
from ..checks import check_arguments
from ..function import name_what_is_wrong, transformed
from ..layout import dense
from ..module import DAModule
from .function import Call, ResidualFunction, Running, compute

logger = logging.getLogger("da_ops")

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_told: set[str] = set()  # reasons


def residual_attention(
    u: Tensor, shortcut: Tensor | None, norm: nn.Module, attention: DAModule | None
) -> Tensor:
    """``relu(attention(norm(u)) + shortcut)``, the tail of a residual branch, as one operator.

    For backward a fused call in training keeps ``u``, small maps and, with a shortcut, its result;
    nothing of their size comes between. :func:`da_ops.explain` tells its passes. What cannot be
    fused calls the modules one by one: other norms and layers, hooks on one of them, subclasses of
    tensors, tensors that are traced, transformed (``torch.func``) or exported, a backend without
    such a kernel. Where that can be helped, a warning of the logger ``da_ops`` says so once, with
    the reason; so does :func:`unfused`.

    Args:
        u: ``[N, C, H, W]``, what the branch's last convolution gives.
        shortcut: as ``u``, or None where nothing is added.
        norm: an ``nn.BatchNorm2d`` or torchvision's ``FrozenBatchNorm2d`` over C channels, in
            training or in evaluation. Its running statistics are updated as it would do itself.
        attention: the layer, or None for norm, addition and ReLU alone; with a shortcut of None,
            too, norm and ReLU.

    Returns:
        ``[N, C, H, W]`` in the dtype and memory layout of ``u``.

    Raises:
        what the modules raise, such as ValueError for one value a channel in training.
    """
    return tail(u, shortcut, norm, attention, None)


def tail(
    u: Tensor,
    shortcut: Tensor | None,
    norm: Any,
    attention: DAModule | None,
    activation: nn.Module | None,
    *,
    made_by: nn.Module | None = None,
) -> Tensor:
    """:func:`residual_attention` in a block with an activation module of its own, which is called
    where its hooks, or what has become of it, ask for that. Without gradients the result may take
    the place of a ``u`` that is ``made_by`` a convolution for this call alone."""
    served: Backend | None = None
    own = _norm_tensors(norm)
    if _fusible(u, shortcut, norm, own):
        parameters, reason = _fused_parameters(norm, attention, activation)
        if parameters is not None:
            order, gate, backend = _options(attention)
            served = CHOICE.for_tails(backend, u.device.type)
            if served.residual_forward is None:
                served, reason = None, CHOICE.without_tails(backend, u.device.type)
        if reason is not None:
            _tell(reason)
    if served is None or parameters is None:
        x = norm(u)
        x = x if attention is None else attention(x)
        x = x if shortcut is None else x + shortcut
        return torch.relu(x) if activation is None else activation(x)
    weight, bias, mean, var = own
    running = None
    if _normalises_by_batch(norm, mean):
        if norm.track_running_stats and mean is not None and var is not None:
            running = Running(mean, var, _tensor(norm, "num_batches_tracked"), norm.momentum)
        mean = var = None
    if attention is not None and (not served.checks or torch.compiler.is_compiling()):
        check_arguments(u, parameters, order, gate)
    if torch.compiler.is_compiling():
        six = parameters or (None,) * 6
        out, mean, var = torch.ops.da_ops.residual_attention.default(
            u, shortcut, weight, bias, mean, var, norm.eps, *six, order, gate, backend
        )
        if running is not None:
            running.update(mean, var, u.numel() // u.shape[1])
        return out
    call = Call(served, order, gate, norm.eps, mean, var, running)
    try:
        if torch.is_grad_enabled():
            return ResidualFunction.apply(call, u, shortcut, weight, bias, *parameters)
        # Where caches are cold, autograd's own part takes a small call longer than the kernel.
        new = made_by is not None and makes_anew(made_by)
        return compute(call, dense(u), shortcut, weight, bias, *parameters, overwrite=new)[0]
    except Exception:
        if attention is not None:
            name_what_is_wrong(u, parameters, order, gate)
        raise


def rectified(conv: nn.Module, x: Tensor, norm: nn.Module, activation: nn.Module) -> Tensor:
    """``activation(norm(conv(x)))``, norm and ReLU as one operator."""
    return tail(conv(x), None, norm, None, activation, made_by=conv)


def makes_anew(conv: nn.Module) -> bool:
    """Whether nobody but who called ``conv`` sees its result."""
    return type(conv) is nn.Conv2d and _own_ways(conv) is None


def _options(attention: DAModule | None) -> tuple[str, str, str]:
    if attention is None:
        return "none", "sigmoid", "auto"
    return attention.order, attention.gate, attention.backend


def _norm_tensors(norm: Any) -> tuple[Tensor | None, ...]:
    """Weight, bias, running mean and variance; none of a norm that cannot be fused."""
    if type(norm) is not nn.BatchNorm2d and not _is_frozen(norm):
        return (None,) * 4
    return (
        _tensor(norm, "weight"),
        _tensor(norm, "bias"),
        _tensor(norm, "running_mean"),
        _tensor(norm, "running_var"),
    )


def _tensor(module: Any, name: str) -> Any:
    """``module.name``, past nn.Module's own look-up, which takes ten times as long."""
    if name in module._parameters:
        return module._parameters[name]
    return module._buffers[name] if name in module._buffers else getattr(module, name)


def unfused(
    norm: nn.Module,
    attention: Any,
    device_type: str = "cpu",
    activation: nn.Module | None = None,
) -> str | None:
    """Why :func:`residual_attention` calls these modules one by one; None where it fuses them.

    >>> unfused(nn.GroupNorm(1, 8), None)
    'the norm is a GroupNorm, expected nn.BatchNorm2d'
    """
    if (reason := unfused_modules(norm, attention, activation)) is not None:
        return reason
    return CHOICE.without_tails(_options(attention)[2], device_type)


def unfused_modules(
    norm: nn.Module, attention: Any, activation: nn.Module | None = None
) -> str | None:
    """What of these modules keeps any kernel from taking their place; None if nothing."""
    return _fused_parameters(norm, attention, activation)[1]


def _fused_parameters(
    norm: nn.Module, attention: Any, activation: nn.Module | None
) -> tuple[tuple[Any, ...] | None, str | None]:
    """The attention's six parameters, of which there are none without it; None, and why, where
    :func:`unfused_modules` has a reason."""
    if (reason := unfit(norm, attention, activation)) is not None:
        return None, reason
    for name, module in (("norm", norm), ("attention", attention), ("activation", activation)):
        if module is not None and (ways := _own_ways(module)) is not None:
            return None, f"the {name} has {ways}"
    if _has_any_global_hook():
        return None, "there are hooks on all modules"
    parameters = () if attention is None else attention.fused_parameters()
    return parameters, attention.unfused() if parameters is None else None


def _own_ways(module: nn.Module) -> str | None:
    """What makes a call of this module more than what its class says."""
    own = module.__dict__
    for kind in _HOOKS:
        if own[kind]:
            return "hooks"
    return "a forward of its own" if "forward" in own else None


def unfit(norm: nn.Module, attention: nn.Module | None, activation: nn.Module | None) -> str | None:
    """Which of a tail's modules is of another kind than those that can be fused; None if none."""
    if type(norm) is not nn.BatchNorm2d and not _is_frozen(norm):
        return f"the norm is a {type(norm).__name__}, expected nn.BatchNorm2d"
    if attention is not None and type(attention) is not DAModule:
        return f"the attention is a {type(attention).__name__}, expected DAModule"
    if activation is not None and type(activation) is not nn.ReLU:
        return f"the activation is a {type(activation).__name__}, expected nn.ReLU"
    return None


def _is_frozen(norm: nn.Module) -> bool:
    known = sys.modules.get("torchvision.ops.misc")  # never imported, none of its norms
    return known is not None and type(norm) is known.FrozenBatchNorm2d


def takes_batch(norm: Any) -> bool:
    """Whether the norm normalises by the statistics of the batch, not by its own."""
    # A norm of another kind has none, and needs none.
    return _normalises_by_batch(norm, getattr(norm, "running_mean", norm))


def _normalises_by_batch(norm: nn.Module, running_mean: Any) -> bool:
    return not _is_frozen(norm) and (norm.training or running_mean is None)


def fusible_now(u: Any, shortcut: Any, norm: Any) -> bool:
    """Whether the tensors, and the way in which the call is made, let a kernel serve."""
    return _fusible(u, shortcut, norm, _norm_tensors(norm))


def _fusible(u: Any, shortcut: Any, norm: Any, own: tuple[Tensor | None, ...]) -> bool:
    """:func:`fusible_now`, given the norm's tensors as :func:`_norm_tensors` has them.

    Every call of the tail runs it, most of them from cold caches, and so it makes as few look-ups
    as it can: whether a graph is exported is asked only while compiling, whether the call is traced
    only otherwise.
    """
    if type(u) is not Tensor or not (shortcut is None or type(shortcut) is Tensor):
        return False
    if torch.compiler.is_compiling():
        if torch.compiler.is_exporting() or torch.onnx.is_in_onnx_export():
            return False
    elif torch._C._is_tracing():  # torch.jit.is_tracing()
        return False
    if transformed() or u.is_meta:
        return False
    if u.dim() != 4 or u.layout is not torch.strided or not _alike(u, shortcut):
        return False
    # A batch of nothing, and one value a channel, are the norm's to refuse or to take.
    dtype, device, channels = u.dtype, u.device, u.shape[1]
    if u.numel() <= channels or dtype not in _DTYPES:
        return False
    # A frozen norm of float32 makes half precision float32.
    also = torch.float32 if dtype in _HALF and not _is_frozen(norm) else dtype
    for t in own:
        if t is not None and (
            (t.dtype is not dtype and t.dtype is not also)
            or t.numel() != channels
            or t.device != device
        ):
            return False
    return True


def _alike(u: Tensor, shortcut: Tensor | None) -> bool:
    return shortcut is None or (
        u.shape == shortcut.shape
        and u.dtype is shortcut.dtype
        and u.device == shortcut.device
        and u.layout is shortcut.layout
    )


_HALF = (torch.float16, torch.bfloat16)
_DTYPES = (*_HALF, torch.float32, torch.float64)


def _tell(reason: str) -> None:
    if torch.compiler.is_compiling() or reason in _told:  # nothing is said in a graph
        return
    _told.add(reason)
    logger.warning(
        "da_ops: the residual tail calls its modules one by one, not a fused kernel: %s", reason
    )
