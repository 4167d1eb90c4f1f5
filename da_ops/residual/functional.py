"""The residual tail over a norm and a layer that exist."""

from __future__ import annotations

import logging
import sys
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from ..backends.choice import CHOICE
from ..checks import check_arguments, name_want_of_memory
from ..function import name_what_is_wrong, transformed
from ..layout import dense, device_type
from ..module import DAModule
from .function import Call, Running, apply, compute, update

logger = logging.getLogger("da_ops")

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
    if torch.compiler.is_compiling():
        out = _in_graph(u, shortcut, norm, attention, activation)
    else:
        out = _fused(u, shortcut, norm, attention, activation, made_by)
    if out is not None:
        return out
    x = norm(u)
    x = x if attention is None else attention(x)
    x = x if shortcut is None else x + shortcut
    return torch.relu(x) if activation is None else activation(x)


def _fused(
    u: Tensor,
    shortcut: Tensor | None,
    norm: Any,
    attention: DAModule | None,
    activation: nn.Module | None,
    made_by: nn.Module | None,
) -> Tensor | None:
    """The tail by a kernel; None where the modules are to be called one by one.

    Most calls come from cold caches, where each look at a module or a tensor costs more than a
    kernel's pass over a thousand numbers. So the kernels that refuse what does not fit are asked to
    do so, and only what they have refused is looked at here.
    """
    if not _free(u, shortcut):
        return None
    parameters, reason = _fused_parameters(norm, attention, activation)
    if parameters is None:
        _tell(reason)
        return None
    order, gate, backend = _options(attention)
    served = CHOICE.for_tails(backend, device_type(u))
    own = _norm_tensors(norm)
    exact = type(norm) is nn.BatchNorm2d
    refuses = served.checks and exact  # a frozen norm may have its own ideas of a result's dtype
    if not refuses and not _fits(u, shortcut, norm, own):
        return None
    if served.residual_forward is None:
        _tell(CHOICE.without_tails(backend, device_type(u)))
        return None
    weight, bias, mean, var = own
    if _requires_grad(mean) or _requires_grad(var):
        return None
    running: Running | None = None
    if _normalises_by_batch(norm, mean):
        running = _running(norm, mean, var)
        mean = var = None
    if attention is not None and not served.checks:
        check_arguments(u, parameters, order, gate)
    call: Call = (served, order, gate, norm.eps, mean, var, running)
    try:
        if torch.is_grad_enabled():
            return apply(call, False, dense(u), shortcut, weight, bias, *parameters)
        # Where caches are cold, autograd's own part takes a small call longer than the kernel.
        new = running is None and made_by is not None and makes_anew(made_by)
        return compute(call, dense(u), shortcut, weight, bias, *parameters, overwrite=new)[0]
    except Exception as error:
        if refuses and not _fits(u, shortcut, norm, own):
            return None
        name_want_of_memory(error, u)
        if attention is not None:
            name_what_is_wrong(u, parameters, order, gate)
        raise


def _in_graph(
    u: Tensor,
    shortcut: Tensor | None,
    norm: Any,
    attention: DAModule | None,
    activation: nn.Module | None,
) -> Tensor | None:
    """The tail as one operator of a graph that is compiled, which takes it apart later; None as
    :func:`_fused` has it."""
    if not fusible_now(u, shortcut, norm):
        return None
    parameters, _ = _fused_parameters(norm, attention, activation)
    if parameters is None:
        return None
    order, gate, backend = _options(attention)
    if CHOICE.for_tails(backend, u.device.type).residual_forward is None:
        return None
    weight, bias, mean, var = _norm_tensors(norm)
    if _requires_grad(mean) or _requires_grad(var):
        return None
    running: Running | None = None
    if _normalises_by_batch(norm, mean):
        running = _running(norm, mean, var)
        mean = var = None
    if attention is not None:
        check_arguments(u, parameters, order, gate)
    six = parameters or (None,) * 6
    out, mean, var = torch.ops.da_ops.residual_attention.default(
        u, shortcut, weight, bias, mean, var, norm.eps, *six, order, gate, backend
    )
    if running is not None:
        update(running, mean, var, u.numel() // u.shape[1])
    return out


def rectified(conv: nn.Module, x: Tensor, norm: nn.Module, activation: nn.Module) -> Tensor:
    """``activation(norm(conv(x)))``, norm and ReLU as one operator."""
    return tail(conv(x), None, norm, None, activation, made_by=conv)


def makes_anew(conv: nn.Module) -> bool:
    """Whether nobody but who called ``conv`` sees its result."""
    if type(conv) is not nn.Conv2d or _own_ways(conv) is not None:
        return False
    own = conv.__dict__
    if "_conv_forward" in own or own.get("_compiled_call_impl") is not None:
        return False
    # A mode sees what every call gives.
    return not (torch._C._len_torch_function_stack() or torch._C._len_torch_dispatch_stack())


def _options(attention: DAModule | None) -> tuple[str, str, str]:
    if attention is None:
        return "none", "sigmoid", "auto"
    return attention.order, attention.gate, attention.backend


def _norm_tensors(norm: Any) -> tuple[Tensor | None, ...]:
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
    elif not _is_frozen(norm):
        return (None,) * 4
    return norm.weight, norm.bias, norm.running_mean, norm.running_var


def _requires_grad(statistics: Tensor | None) -> bool:
    """Whether these are to be learned, which no kernel does."""
    return statistics is not None and statistics.requires_grad


def _running(norm: nn.BatchNorm2d, mean: Tensor | None, var: Tensor | None) -> Running | None:
    """The statistics that the norm keeps of its batches; None where it keeps none."""
    if not norm.track_running_stats or mean is None or var is None:
        return None
    try:  # as in _norm_tensors
        batches = norm._buffers["num_batches_tracked"]
    except KeyError:
        batches = norm.num_batches_tracked
    return mean, var, batches, norm.momentum


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
    if (ways := _own_ways(norm)) is not None:
        return None, f"the norm has {ways}"
    if type(norm) is nn.BatchNorm2d and norm.eps <= 0:
        return None, f"the norm's eps is {norm.eps}, expected more than 0"
    if activation is not None and (ways := _own_ways(activation)) is not None:
        return None, f"the activation has {ways}"
    if _has_any_global_hook():
        return None, "there are hooks on all modules"
    if attention is None:
        return (), None
    if (ways := _own_ways(attention)) is not None:
        return None, f"the attention has {ways}"
    parameters = attention.fused_parameters()
    return parameters, attention.unfused() if parameters is None else None


def _own_ways(module: nn.Module) -> str | None:
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
    if type(norm) is not nn.BatchNorm2d and not _is_frozen(norm):
        return f"the norm is a {type(norm).__name__}, expected nn.BatchNorm2d"
    if attention is not None and type(attention) is not DAModule:
        return f"the attention is a {type(attention).__name__}, expected DAModule"
    if activation is not None and type(activation) is not nn.ReLU:
        return f"the activation is a {type(activation).__name__}, expected nn.ReLU"
    return None


def _is_frozen(norm: nn.Module) -> bool:
    if type(norm) is nn.BatchNorm2d:  # most are
        return False
    known = sys.modules.get("torchvision.ops.misc")  # never imported, none of its norms
    return known is not None and type(norm) is known.FrozenBatchNorm2d


def takes_batch(norm: Any) -> bool:
    """Whether the norm normalises by the statistics of the batch, not by its own."""
    # A norm of another kind has none, and needs none.
    return _normalises_by_batch(norm, getattr(norm, "running_mean", norm))


def _normalises_by_batch(norm: nn.Module, running_mean: Any) -> bool:
    return (norm.training or running_mean is None) and not _is_frozen(norm)


def fusible_now(u: Any, shortcut: Any, norm: Any) -> bool:
    """Whether the tensors, and the way in which the call is made, let a kernel serve."""
    return _free(u, shortcut) and _fits(u, shortcut, norm, _norm_tensors(norm))


def _free(u: Any, shortcut: Any) -> bool:
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


def _fits(u: Tensor, shortcut: Tensor | None, norm: Any, own: tuple[Tensor | None, ...]) -> bool:
    """Whether kernels take these tensors, and the norm's as :func:`_norm_tensors` has them."""
    if u.is_meta or u.dim() != 4 or u.layout is not torch.strided or not _alike(u, shortcut):
        return False
    # A batch of nothing, and one value a channel, are the norm's to refuse or to take.
    dtype, device, channels = u.dtype, u.device, u.shape[1]
    few = channels if norm is None or _normalises_by_batch(norm, own[2]) else 0
    if u.numel() <= few or dtype not in _DTYPES:
        return False
    # A frozen norm of float32 makes half precision float32.
    also = torch.float32 if dtype in _HALF and not _is_frozen(norm) else dtype
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


_HALF = (torch.float16, torch.bfloat16)
_DTYPES = (*_HALF, torch.float32, torch.float64)


def _tell(reason: str | None) -> None:
    if reason is None or reason in _told:
        return
    _told.add(reason)
    logger.warning(
        "da_ops: the residual tail calls its modules one by one, not a fused kernel: %s", reason
    )
