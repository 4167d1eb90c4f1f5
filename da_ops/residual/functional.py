"""The residual tail over a norm and a layer that exist."""

from __future__ import annotations

import logging
import sys
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from ..backends.choice import CHOICE
from ..checks import check_arguments
from ..function import transformed
from ..module import DAModule
from ..parameters import Unnamed
from .function import fused, without_gradients

logger = logging.getLogger("da_ops")

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_told: set[str] = set()  # reasons


def residual_attention(
    u: Tensor, shortcut: Tensor | None, norm: nn.Module, attention: DAModule | None
) -> Tensor:
    """``relu(attention(norm(u)) + shortcut)``, the tail of a residual branch, as one operator.

    In training a fused call reads ``u`` twice, once for the statistics, and keeps ``u`` and its
    result for backward; nothing of their size comes between. What cannot be fused calls the modules
    one by one: other norms and layers, hooks on one of them, subclasses of tensors, tensors that
    are traced, transformed (``torch.func``) or exported, a backend without such a kernel. Where
    that can be helped, a warning of the logger ``da_ops`` says so once, with the reason; so does
    :func:`unfused`.

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
    norm: nn.Module,
    attention: DAModule | None,
    activation: nn.Module | None,
    *,
    overwrite: bool = False,
) -> Tensor:
    """:func:`residual_attention` in a block with an activation module of its own, which is called
    where its hooks, or what has become of it, ask for that. To ``overwrite`` lets the result take
    the place of ``u`` where there are no gradients."""
    parameters: Unnamed | None = None
    own = _norm_tensors(norm)
    if _fusible(u, shortcut, norm, own):
        parameters, reason = _fused_parameters(norm, attention, activation)
        if reason is None:
            order, gate, backend = _options(attention)
            reason = CHOICE.without_tails(backend, u.device.type)
        if reason is not None:
            parameters = None
            _tell(reason)
    if parameters is None:
        x = norm(u)
        x = x if attention is None else attention(x)
        x = x if shortcut is None else x + shortcut
        return torch.relu(x) if activation is None else activation(x)
    if attention is not None:
        check_arguments(u, parameters, order, gate)
    weight, bias, running_mean, running_var = own
    batch = _normalises_by_batch(norm, running_mean)
    statistics = (None, None) if batch else (running_mean, running_var)
    tracked = batch and norm.track_running_stats and running_mean is not None
    track = _Tracking(norm, u.numel() // u.shape[1]) if tracked else None
    arguments = u, shortcut, weight, bias, *statistics, norm.eps, *parameters, order, gate, backend
    if not torch.compiler.is_compiling():
        if torch.is_grad_enabled():
            return fused(*arguments, track)[0]
        return without_gradients(*arguments, track, overwrite=overwrite)[0]
    out, mean, var = torch.ops.da_ops.residual.default(*arguments)
    if track is not None:
        track(mean, var)
    return out


def rectified(conv: nn.Module, x: Tensor, norm: nn.Module, activation: nn.Module) -> Tensor:
    """``activation(norm(conv(x)))``, norm and ReLU as one operator."""
    return tail(conv(x), None, norm, None, activation, overwrite=makes_anew(conv))


def makes_anew(conv: nn.Module) -> bool:
    """Whether nobody but who called ``conv`` sees its result."""
    return type(conv) is nn.Conv2d and _own_ways(conv) is None


_NONE: Unnamed = (None,) * 6


def _options(attention: DAModule | None) -> tuple[str, str, str]:
    if attention is None:
        return "none", "sigmoid", "auto"
    return attention.order, attention.gate, attention.backend


def _norm_tensors(norm: Any) -> tuple[Tensor | None, ...]:
    """Weight, bias, running mean and variance; none of a norm that cannot be fused."""
    if type(norm) is not nn.BatchNorm2d and not _is_frozen(norm):
        return (None,) * 4
    parameters, buffers = norm._parameters, norm._buffers
    return (
        _tensor(norm, "weight", parameters, buffers),
        _tensor(norm, "bias", parameters, buffers),
        _tensor(norm, "running_mean", parameters, buffers),
        _tensor(norm, "running_var", parameters, buffers),
    )


def _tensor(module: nn.Module, name: str, parameters: Any, buffers: Any) -> Any:
    """``module.name``, past nn.Module's own look-up, which takes ten times as long."""
    if name in parameters:
        return parameters[name]
    return buffers[name] if name in buffers else getattr(module, name)  # it may be computed


class _Tracking:
    """Running statistics of a norm in training, kept as ``nn.BatchNorm2d`` does."""

    def __init__(self, norm: Any, count: int) -> None:
        own = norm._parameters, norm._buffers
        self.count = count  # elements of a channel
        self.mean: Tensor = _tensor(norm, "running_mean", *own)
        self.var: Tensor = _tensor(norm, "running_var", *own)
        self.batches: Tensor | None = _tensor(norm, "num_batches_tracked", *own)
        self.momentum: float | None = norm.momentum

    def in_kernel(self) -> tuple[Tensor, Tensor, float] | None:
        """The running mean and variance for an operator to update, and the batch's share in them;
        None where :meth:`__call__` is to do that."""
        if self.momentum is None or not (self.mean.is_contiguous() and self.var.is_contiguous()):
            return None
        if self.batches is not None:
            self.batches.add_(1)
        return self.mean, self.var, self.momentum

    def __call__(self, mean: Tensor, var: Tensor) -> None:
        """Update them by the batch's mean and biased variance, which require no gradients."""
        momentum: Tensor | float | None = self.momentum
        if self.batches is not None:
            self.batches.add_(1)
            if momentum is None:  # a cumulative mean; as a tensor, so that nothing waits for a GPU
                momentum = self.batches.to(mean.dtype).reciprocal()
        kept = self.mean.dtype
        if isinstance(momentum, Tensor):
            momentum = momentum.to(kept)
        momentum = 0.0 if momentum is None else momentum
        self.mean.lerp_(mean.to(kept), momentum)
        self.var.lerp_((var * (self.count / (self.count - 1))).to(kept), momentum)


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
) -> tuple[Unnamed | None, str | None]:
    """The kernels' six parameters, or why :func:`unfused_modules` says that there are none."""
    if (reason := unfit(norm, attention, activation)) is not None:
        return None, reason
    for name, module in (("norm", norm), ("attention", attention), ("activation", activation)):
        if module is not None and (ways := _own_ways(module)) is not None:
            return None, f"the {name} has {ways}"
    if _has_any_global_hook():
        return None, "there are hooks on all modules"
    parameters = _NONE if attention is None else attention.fused_parameters()
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
    """:func:`fusible_now` with the norm's tensors."""
    if type(u) is not Tensor or not (shortcut is None or type(shortcut) is Tensor):
        return False
    if torch.jit.is_tracing() or transformed() or torch.compiler.is_exporting() or u.is_meta:
        return False
    if torch.compiler.is_compiling() and torch.onnx.is_in_onnx_export():  # it imports, and is slow
        return False
    if u.dim() != 4 or u.layout is not torch.strided or not _alike(u, shortcut):
        return False
    # A batch of nothing, and one value a channel, are the norm's to refuse or to take.
    dtype, device, channels = u.dtype, u.device, u.shape[1:2]
    if u.numel() <= channels[0] or dtype not in _DTYPES:
        return False
    # A frozen norm of float32 makes half precision float32.
    also = torch.float32 if dtype in _HALF and not _is_frozen(norm) else dtype
    for t in own:
        if t is not None and (
            (t.dtype is not dtype and t.dtype is not also)
            or t.shape != channels
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
