"""The residual tail in plain PyTorch: ``out = relu(DA(batch_norm(u)) + shortcut)``, the definition
that every kernel is tested against, and its gradients written out. The shortcut may go through a
batch norm of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import reference
from ..parameters import Gradients, Parameters


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
    shortcut_norm: Norm | None = None,
) -> Tensor:
    """``relu(DA(batch_norm(u)) + shortcut)``, ``[N, C, H, W]`` in ``u``'s dtype; with a
    ``shortcut_norm``, ``relu(DA(batch_norm(u)) + batch_norm(shortcut))``.

    Half precision is computed in float32 and rounded once. The shortcut may be None, and nothing is
    added then. ``parameters`` are those of
    :func:`da_ops.da_attention`; None leaves attention out, so that ``order`` and ``gate`` do not
    matter.

    Raises:
        ValueError: one value a channel in training, as batch norm has it.
    """
    acc = reference.accumulation_dtype(u.dtype)
    with reference.autocast_off(u):
        x = _normalise(u.to(acc), norm.to(acc))
        if parameters is not None:
            x = reference.rounded_once(x, parameters, order, gate)
        if shortcut is not None:
            r = shortcut.to(acc)
            x = x + (r if shortcut_norm is None else _normalise(r, shortcut_norm.to(acc)))
        return torch.relu(x).to(u.dtype)


def _normalise(u: Tensor, norm: Norm) -> Tensor:
    weight, bias, mean, var, eps = norm
    # A norm with statistics of its own does not change them here.
    return F.batch_norm(u, mean, var, weight, bias, mean is None, 0.0, eps)


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
    shortcut: Tensor | None = None,
    shortcut_norm: Norm | None = None,
) -> Gradients:
    """The gradients of :func:`forward`, written out in operations that can be differentiated.
    Where there was no shortcut, ``out`` may be None, and is computed anew. The shortcut itself is
    looked at where it has a norm.

    Returns ``(du, d_shortcut, d_norm_weight, d_norm_bias)``, one of each of the six parameters, and
    with a ``shortcut_norm`` those of its weight and bias, each in the dtype of what it is the
    gradient of; None where that is None.
    """
    acc = reference.accumulation_dtype(u.dtype)
    if out is None:
        out = forward(u, None, norm, parameters, order, gate)
    with reference.autocast_off(u):
        through = _ThroughNorm(u.to(acc), norm.to(acc))
        # ReLU's own rule: where `out` is no number, the gradient passes.
        dx: Any
        d_shortcut = dx = torch.where(out <= 0, 0, dout.to(acc))
        d_parameters: Sequence[Tensor | None] = (None,) * 6
        if parameters is not None:
            dx, *d_parameters = reference.backward(dx, through.x, parameters, order, gate)
        du, *of_norm = through.gradients(dx)
        of_shortcut_norm: Sequence[Tensor] = ()
        if shortcut is not None and shortcut_norm is not None:
            through = _ThroughNorm(shortcut.to(acc), shortcut_norm.to(acc))
            d_shortcut, *of_shortcut_norm = through.gradients(d_shortcut)
    found: Any = (du, d_shortcut, *of_norm, *d_parameters, *of_shortcut_norm)
    given: Any = (u, u, norm.weight, norm.bias, *(parameters or (None,) * 6))
    if shortcut_norm is not None:
        given = (*given, shortcut_norm.weight, shortcut_norm.bias)
    return tuple(
        None if g is None or t is None else g.to(t.dtype) for g, t in zip(found, given, strict=True)
    )


class _ThroughNorm:
    """A batch norm's result, ``x``, and the way back through it."""

    def __init__(self, u: Tensor, norm: Norm) -> None:
        weight, bias, mean, var, eps = norm
        self.batch = mean is None
        if mean is None or var is None:
            mean, var = statistics(u)
        inverse = torch.rsqrt(var + eps)
        self.normalised = (u - _by_channel(mean)) * _by_channel(inverse)
        x = self.normalised if weight is None else self.normalised * _by_channel(weight)
        self.x = x if bias is None else x + _by_channel(bias)
        self.scale = inverse if weight is None else inverse * weight

    def gradients(self, dx: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The gradients of ``u``, the weight and the bias."""
        over = (0, 2, 3)
        d_weight, d_bias = (dx * self.normalised).sum(over), dx.sum(over)
        if self.batch:
            count = dx.numel() // dx.shape[1]
            dx = dx - (_by_channel(d_bias) + self.normalised * _by_channel(d_weight)) / count
        return dx * _by_channel(self.scale), d_weight, d_bias


def _by_channel(values: Tensor) -> Tensor:
    return values[:, None, None]
