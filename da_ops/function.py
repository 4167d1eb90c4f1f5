"""The operator as an autograd function."""

from __future__ import annotations

from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

from . import reference
from .backends.base import Backend
from .backends.choice import CHOICE
from .checks import check_arguments
from .layout import dense, device_type, like
from .parameters import Parameters, Unnamed


class DAFunction(torch.autograd.Function):
    """``DAFunction.apply(x, conv_weight, dilated_weight, merge_weight, spatial_bias, gate_weight,
    gate_bias, order, gate, backend) -> y``, the operator with its hand-written backward.

    Every argument is positional; shapes, dtypes and errors are those of
    :func:`da_ops.da_attention`, which most callers want. Between forward and backward it keeps
    ``x``, the parameters and two small maps (``[N, H, W]`` and ``[N, C]``).

    With ``create_graph=True`` the gradient is computed by plain PyTorch operations
    (:func:`da_ops.reference.da_attention_backward`), so that it can be differentiated again; under
    ``torch.func`` transforms and forward-mode differentiation the whole operator is.
    """

    @classmethod
    def apply(cls, *args: Any) -> Tensor:
        if not transformed():
            return fused(*args)
        x, *parameters, order, gate, backend = args
        return plain(x, Parameters(*parameters), order, gate, backend)

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        conv_weight: Tensor | None,
        dilated_weight: Tensor | None,
        merge_weight: Tensor | None,
        spatial_bias: Tensor | None,
        gate_weight: Tensor | None,
        gate_bias: Tensor | None,
        order: str,
        gate: str,
        backend: str,
    ) -> Tensor:
        parameters = conv_weight, dilated_weight, merge_weight, spatial_bias, gate_weight, gate_bias
        served, y, channel_mean, pooled = compute(x, parameters, order, gate, backend)
        ctx.options = order, gate, served
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, *parameters, channel_mean, pooled)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
        if dy is None:
            return (None,) * 10
        x, *parameters, channel_mean, pooled = ctx.saved_tensors
        order, gate, served = ctx.options
        if needs_formula(dy):
            gradients = reference.backward(dy, x, Parameters(*parameters), order, gate)
        else:
            x = dense(x)  # hooks on saved tensors may have laid them out anew
            maps = channel_mean.contiguous(), pooled.contiguous()
            gradients = served.backward(like(dy, x), x, parameters, *maps, order, gate)
        return (*gradients, None, None, None)


# As autograd.Function has it, but for what torch.func's transforms need, which come not here.
fused = super(torch.autograd.Function, DAFunction).apply


def compute(
    x: Tensor, parameters: Unnamed, order: str, gate: str, backend: str
) -> tuple[Backend, Tensor, Tensor, Tensor]:
    """The backend that served, ``y``, and what else its backward needs."""
    try:
        served = CHOICE.implementation(backend, device_type(x))
        if not served.checks:
            check_arguments(x, parameters, order, gate)
        return served, *served.forward(dense(x), parameters, order, gate)
    except Exception:
        name_what_is_wrong(x, parameters, order, gate)
        raise


def name_what_is_wrong(x: Any, parameters: Unnamed, order: Any, gate: Any) -> None:
    """Raise in the words of check_arguments, if it is the arguments that a kernel refused: to look
    at them costs a small call a twentieth of its time, and so it comes last."""
    try:
        check_arguments(x, parameters, order, gate)
    except (TypeError, ValueError) as error:
        raise error from None


def transformed() -> bool:
    """Whether a torch.func transform or forward-mode differentiation is under way."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def needs_formula(dy: Tensor) -> bool:
    """Whether a backward pass is to be made of plain operations: it is differentiated in its turn,
    or ``dy`` is a batch of gradients (``is_grads_batched``)."""
    if torch.compiler.is_compiling():
        return False
    return (
        torch.is_grad_enabled() or transformed() or torch._C._functorch.is_legacy_batchedtensor(dy)
    )


def plain(x: Tensor, parameters: Parameters, order: str, gate: str, backend: str) -> Tensor:
    """The operator as differentiable PyTorch operations, for calls that no kernel can serve."""
    check_arguments(x, parameters, order, gate)
    CHOICE.select(backend, x.device.type)
    return reference.forward(x, parameters, order, gate)
