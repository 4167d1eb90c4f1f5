"""The residual tail in plain PyTorch: ``out = relu(DA(batch_norm(u)) + shortcut)``, the definition
that every kernel is tested against, and its gradients written out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import reference
from ..parameters import Parameters

Gradients = tuple[Tensor | None, ...]


class Norm(NamedTuple):
    """A batch norm over C channels.

    ``weight`` and ``bias``, ``[C]``, are None where it is not affine. ``mean`` and ``var``,
    ``[C]``, are the statistics of a norm that is frozen or evaluated; both are None where those of
    the batch are taken, as in training.
    """

    weight: Tensor | None
    bias: Tensor | None
    mean: Tensor | None
    var: Tensor | None
    eps: float

    def to(self, dtype: torch.dtype) -> Norm:
        weight, bias, mean, var = (
            None if t is None else t.to(dtype)
            for t in (self.weight, self.bias, self.mean, self.var)
        )
        return Norm(weight, bias, mean, var, self.eps)


def forward(
    u: Tensor,
    shortcut: Tensor | None,
    norm: Norm,
    parameters: Parameters | None,
    order: str = "spatial_channel",
    gate: str = "affine",
) -> Tensor:
    """``relu(DA(batch_norm(u)) + shortcut)``, ``[N, C, H, W]`` in ``u``'s dtype.

    Half precision is computed in float32 and rounded once. The shortcut may be None, and nothing is
    added then. ``parameters`` are those of
    :func:`da_ops.da_attention`; None leaves attention out, so that ``order`` and ``gate`` do not
    matter.

    Raises:
        ValueError: one value a channel in training, as batch norm has it.
    """
    acc = reference.accumulation_dtype(u.dtype)
    weight, bias, mean, var, eps = norm.to(acc)
    with reference.autocast_off(u):
        # A norm with statistics of its own does not change them here.
        x = F.batch_norm(u.to(acc), mean, var, weight, bias, mean is None, 0.0, eps)
        if parameters is not None:
            x = reference.rounded_once(x, parameters, order, gate)
        x = x if shortcut is None else x + shortcut.to(acc)
        return torch.relu(x).to(u.dtype)


def statistics(u: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each channel, ``[C]``, in float32 (float64 for float64)."""
    wide = u.to(reference.accumulation_dtype(u.dtype))
    var, mean = torch.var_mean(wide, (0, 2, 3), correction=0)
    return mean, var


def backward(
    dout: Tensor,
    out: Tensor | None,
    u: Tensor,
    norm: Norm,
    parameters: Parameters | None,
    order: str = "spatial_channel",
    gate: str = "affine",
) -> Gradients:
    """The gradients of :func:`forward`, written out in operations that can be differentiated.
    Where there was no shortcut, ``out`` may be None, and is computed anew.

    Returns ``(du, d_shortcut, d_norm_weight, d_norm_bias)`` and one of each of the six parameters,
    each in the dtype of what it is the gradient of; None where that is None.
    """
    acc = reference.accumulation_dtype(u.dtype)
    if out is None:
        out = forward(u, None, norm, parameters, order, gate)
    weight, bias, mean, var, eps = norm.to(acc)
    with reference.autocast_off(u):
        wide = u.to(acc)
        batch = mean is None
        if mean is None or var is None:
            mean, var = statistics(wide)
        inverse = torch.rsqrt(var + eps)
        normalised = (wide - _by_channel(mean)) * _by_channel(inverse)
        x = normalised if weight is None else normalised * _by_channel(weight)
        x = x if bias is None else x + _by_channel(bias)

        # ReLU's own rule: where `out` is no number, the gradient passes.
        dx: Any
        d_shortcut = dx = torch.where(out <= 0, 0, dout.to(acc))
        d_parameters: Sequence[Tensor | None] = (None,) * 6
        if parameters is not None:
            dx, *d_parameters = reference.backward(dx, x, parameters, order, gate)

        over = (0, 2, 3)
        d_weight, d_bias = (dx * normalised).sum(over), dx.sum(over)
        scale = inverse if weight is None else inverse * weight
        if batch:
            count = u.numel() // u.shape[1]
            dx = dx - (_by_channel(d_bias) + normalised * _by_channel(d_weight)) / count
        du = dx * _by_channel(scale)
    given: Any = (u, u, norm.weight, norm.bias, *(parameters or (None,) * 6))
    return tuple(
        None if g is None or t is None else g.to(t.dtype)
        for g, t in zip((du, d_shortcut, d_weight, d_bias, *d_parameters), given, strict=True)
    )


def _by_channel(values: Tensor) -> Tensor:
    return values[:, None, None]
