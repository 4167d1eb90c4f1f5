"""Which modules and tensors the residual tail's kernels take."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from ..backends.choice import CHOICE
from ..checks import DTYPES, HALF
from ..function import transformed
from ..layout import device_type
from ..module import DAModule
from .function import Statistics


def makes_anew(conv: nn.Module) -> bool:
    """Whether nobody but who called ``conv`` sees its result."""
    if type(conv) is not nn.Conv2d or own_ways(conv) is not None:
        return False
    own = conv.__dict__
    if "_conv_forward" in own or own.get("_compiled_call_impl") is not None:
        return False
    # A mode sees what every call gives.
    return not (torch._C._len_torch_function_stack() or torch._C._len_torch_dispatch_stack())


def options(attention: DAModule | None) -> tuple[str, str, str]:
    if attention is None:
        return "none", "sigmoid", "auto"
    return attention.order, attention.gate, attention.backend


def norm_tensors(norm: Any) -> tuple[Tensor | None, ...]:
    """Weight, bias, running mean and variance; none of a norm that cannot be fused."""
    if type(norm) is nn.BatchNorm2d:
        parameters, buffers = norm._parameters, norm._buffers
        try:  # past nn.Module's own look-up, which takes ten times as long
            return (
                parameters["weight"],
                parameters["bias"],
                buffers["running_mean"],
                buffers["running_var"],
            )
        except KeyError:
            pass  # some are what their owner has made of them
    elif not is_frozen(norm):
        return (None,) * 4
    return norm.weight, norm.bias, norm.running_mean, norm.running_var


def learns(statistics: Tensor | None) -> bool:
    """Whether these are to be learned, which no kernel does."""
    return statistics is not None and statistics.requires_grad


def statistics_of(norm: Any, mean: Tensor | None, var: Tensor | None) -> Statistics:
    """The statistics that the norm uses; ``mean`` and ``var`` are its running ones."""
    if not _normalises_by_batch(norm, mean):
        return norm.eps, mean, var, None
    if not norm.track_running_stats or mean is None or var is None:
        return norm.eps, None, None, None
    try:  # as in norm_tensors
        batches = norm._buffers["num_batches_tracked"]
    except KeyError:
        batches = norm.num_batches_tracked
    return norm.eps, None, None, (mean, var, batches, norm.momentum)


def affine_and_statistics(norm: Any) -> tuple[tuple[Tensor | None, ...], Statistics]:
    """The norm's weight and bias, and its statistics."""
    weight, bias, mean, var = norm_tensors(norm)
    return (weight, bias), statistics_of(norm, mean, var)


def unfused(
    norm: nn.Module,
    attention: Any,
    device_type: str = "cpu",
    activation: nn.Module | None = None,
) -> str | None:
    """Why :func:`da_ops.residual_attention` calls these modules one by one; None where it fuses
    them.

    >>> unfused(nn.GroupNorm(1, 8), None)
    'the norm is a GroupNorm, expected nn.BatchNorm2d'
    """
    if (reason := unfused_modules(norm, attention, activation)) is not None:
        return reason
    return CHOICE.without_tails(options(attention)[2], device_type)


def unfused_modules(
    norm: nn.Module, attention: Any, activation: nn.Module | None = None
) -> str | None:
    """What of these modules keeps any kernel from taking their place; None if nothing."""
    return fused_parameters(norm, attention, activation)[1]


def fused_parameters(
    norm: nn.Module, attention: Any, activation: nn.Module | None
) -> tuple[tuple[Any, ...] | None, str | None]:
    """The attention's six parameters, of which there are none without it; None, and why, where
    :func:`unfused_modules` has a reason."""
    if (reason := unfit(norm, attention, activation)) is not None:
        return None, reason
    if (ways := own_ways(norm)) is not None:
        return None, f"the norm has {ways}"
    if type(norm) is nn.BatchNorm2d and norm.eps <= 0:
        return None, f"the norm's eps is {norm.eps}, expected more than 0"
    if activation is not None and (ways := own_ways(activation)) is not None:
        return None, f"the activation has {ways}"
    if _has_any_global_hook():
        return None, "there are hooks on all modules"
    if attention is None:
        return (), None
    if (ways := own_ways(attention)) is not None:
        return None, f"the attention has {ways}"
    parameters = attention.fused_parameters()
    return parameters, attention.unfused() if parameters is None else None


def own_ways(module: nn.Module) -> str | None:
    """What makes a call of this module more than what its class says."""
    own = module.__dict__
    if (
        own["_forward_hooks"]
        or own["_forward_pre_hooks"]
        or own["_backward_hooks"]
        or own["_backward_pre_hooks"]
    ):
        return "hooks"
    return "a forward of its own" if "forward" in own else None


def unfit(norm: nn.Module, attention: nn.Module | None, activation: nn.Module | None) -> str | None:
    """Which of a tail's modules is of another kind than those that can be fused; None if none."""
    if type(norm) is not nn.BatchNorm2d and not is_frozen(norm):
        return f"the norm is a {type(norm).__name__}, expected nn.BatchNorm2d"
    if attention is not None and type(attention) is not DAModule:
        return f"the attention is a {type(attention).__name__}, expected DAModule"
    if activation is not None and type(activation) is not nn.ReLU:
        return f"the activation is a {type(activation).__name__}, expected nn.ReLU"
    return None


def is_frozen(norm: nn.Module) -> bool:
    if type(norm) is nn.BatchNorm2d:  # most are
        return False
    known = sys.modules.get("torchvision.ops.misc")  # never imported, none of its norms
    return known is not None and type(norm) is known.FrozenBatchNorm2d


def takes_batch(norm: Any) -> bool:
    """Whether the norm normalises by the statistics of the batch, not by its own."""
    # A norm of another kind has none, and needs none.
    return _normalises_by_batch(norm, getattr(norm, "running_mean", norm))


def _normalises_by_batch(norm: nn.Module, running_mean: Any) -> bool:
    return (norm.training or running_mean is None) and not is_frozen(norm)


def takes_norm(
    u: Any,
    shortcut: Any,
    norm: Any,
    attention: DAModule | None,
    activation: nn.Module | None,
    shortcut_norm: Any,
) -> bool:
    """Whether a kernel takes the shortcut's norm, too. All is looked at that could yet ask for the
    modules, for by then this norm would have learnt from the batch."""
    if not is_free(u, shortcut):
        return False
    if torch.is_grad_enabled() and not _keeps_input(shortcut_norm, shortcut):
        return False
    if fused_parameters(norm, attention, activation)[0] is None:
        return False
    served = CHOICE.for_tails(options(attention)[2], device_type(u))
    return (
        served.batch_statistics is not None
        and fused_parameters(shortcut_norm, None, None)[0] is not None
        and fits(u, shortcut, norm, norm_tensors(norm))
        and fits(shortcut, None, shortcut_norm, norm_tensors(shortcut_norm))
        and not any(learns(t) for n in (norm, shortcut_norm) for t in norm_tensors(n)[2:])
    )


def _keeps_input(norm: Any, u: Tensor) -> bool:
    """Whether PyTorch's norm keeps ``u`` for backward, as a kernel does of the shortcut."""
    if type(norm) is not nn.BatchNorm2d:  # a frozen one multiplies by constants
        return False
    return any(t is not None and t.requires_grad for t in (u, norm.weight, norm.bias))


def fusible_now(u: Any, shortcut: Any, norm: Any) -> bool:
    """Whether the tensors, and the way in which the call is made, let a kernel serve."""
    return is_free(u, shortcut) and fits(u, shortcut, norm, norm_tensors(norm))


def is_free(u: Any, shortcut: Any) -> bool:
    """Whether the call is one of plain tensors that nobody watches.

    Whether a graph is exported is asked only while compiling, whether the call is traced only
    otherwise.
    """
    if type(u) is not Tensor or not (shortcut is None or type(shortcut) is Tensor):
        return False
    if torch.compiler.is_compiling():
        if torch.compiler.is_exporting() or torch.onnx.is_in_onnx_export():
            return False
    elif torch._C._is_tracing():  # torch.jit.is_tracing()
        return False
    return not transformed()


def fits(u: Tensor, shortcut: Tensor | None, norm: Any, own: tuple[Tensor | None, ...]) -> bool:
    """Whether kernels take these tensors, and the norm's as :func:`norm_tensors` has them."""
    if u.is_meta or u.dim() != 4 or u.layout is not torch.strided or not _alike(u, shortcut):
        return False
    # A batch of nothing, and one value a channel, are the norm's to refuse or to take.
    dtype, device, channels = u.dtype, u.device, u.shape[1]
    few = channels if norm is None or _normalises_by_batch(norm, own[2]) else 0
    if u.numel() <= few or dtype not in DTYPES:
        return False
    # A frozen norm of float32 makes half precision float32.
    also = torch.float32 if dtype in HALF and not is_frozen(norm) else dtype
    return all(
        t is None
        or ((t.dtype is dtype or t.dtype is also) and t.numel() == channels and t.device == device)
        for t in own
    )


def _alike(u: Tensor, shortcut: Tensor | None) -> bool:
    return shortcut is None or (
        u.shape == shortcut.shape
        and u.dtype is shortcut.dtype
        and u.device == shortcut.device
        and u.layout is shortcut.layout
    )
