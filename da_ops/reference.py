"""The operator in plain PyTorch: the definition that every kernel is tested against.

``formula`` is the operator itself, in whatever dtype its tensors have. ``da_attention`` is the same
with the library's precision rule: half precision is computed in float32 and rounded once.
``da_attention_backward`` writes the gradients out; being plain operations, they can be
differentiated again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .parameters import Gradients, Parameters

ORDERS = ("spatial_channel", "channel_spatial", "parallel", "spatial", "channel")
GATES = ("affine", "scalar", "eca", "sigmoid")

Weight = Any  # a Tensor, or None where the order or the gate has no such parameter


def channel_mean(x: Tensor) -> Tensor:
    """Mean over the channels, ``[N, C, H, W] -> [N, 1, H, W]``."""
    return x.mean(1, keepdim=True)


def pooled(x: Tensor) -> Tensor:
    """Global average pooling, ``[N, C, H, W] -> [N, C]``."""
    return x.mean((2, 3))


def spatial_logit(mean: Tensor, parameters: Parameters) -> Tensor:
    """Two receptive fields over the channel mean, merged: ``[N, 1, H, W] -> [N, 1, H, W]``."""
    conv_weight, dilated_weight, merge_weight, spatial_bias, _, _ = parameters
    assert conv_weight is not None
    assert dilated_weight is not None
    assert merge_weight is not None
    near = F.conv2d(mean, conv_weight, padding=1)
    far = F.conv2d(mean, dilated_weight, padding=3, dilation=3)
    return F.conv2d(torch.cat([near, far], 1), merge_weight, spatial_bias)


def channel_logit(
    pooled: Tensor, gate: str, gate_weight: Tensor | None = None, gate_bias: Tensor | None = None
) -> Tensor:
    """The gate over the pooled channels, ``[N, C] -> [N, C]``."""
    if gate == "sigmoid":
        return pooled
    assert gate_weight is not None
    if gate == "eca":
        kernel, half = gate_weight.view(1, 1, -1), gate_weight.numel() // 2
        return F.conv1d(pooled[:, None], kernel, padding=half)[:, 0]
    # "affine" has a weight and a bias per channel, "scalar" one for all.
    assert gate_bias is not None
    return gate_weight * pooled + gate_bias


def formula(
    x: Tensor,
    conv_weight: Weight,
    dilated_weight: Weight,
    merge_weight: Weight,
    gate_weight: Weight = None,
    gate_bias: Weight = None,
    *,
    spatial_bias: Weight = None,
    order: str = "spatial_channel",
    gate: str = "affine",
) -> Tensor:
    """The operator, computed in the dtype of its tensors, which must agree."""
    parameters = Parameters(
        conv_weight, dilated_weight, merge_weight, spatial_bias, gate_weight, gate_bias
    )
    return _formula(x, parameters, order, gate)


def _formula(x: Tensor, parameters: Parameters, order: str, gate: str) -> Tensor:
    y = x
    for half in order.replace("parallel", "spatial_channel").split("_"):
        seen = x if order == "parallel" else y  # by the mask
        if half == "channel":
            weight, bias = parameters.gate_weight, parameters.gate_bias
            logit = channel_logit(pooled(seen), gate, weight, bias)[:, :, None, None]
        else:
            logit = spatial_logit(channel_mean(seen), parameters)
        y = y * torch.sigmoid(logit)
    return y


def da_attention(
    x: Tensor,
    conv_weight: Weight,
    dilated_weight: Weight,
    merge_weight: Weight,
    gate_weight: Weight = None,
    gate_bias: Weight = None,
    *,
    spatial_bias: Weight = None,
    order: str = "spatial_channel",
    gate: str = "affine",
) -> Tensor:
    """The operator with reductions in float32 (float64 for float64) and one rounding at the end.

    Arguments and shapes are those of :func:`da_ops.da_attention`, less ``backend``; nothing checks
    them here.
    """
    parameters = Parameters(
        conv_weight, dilated_weight, merge_weight, spatial_bias, gate_weight, gate_bias
    )
    return forward(x, parameters, order, gate)


def forward(x: Tensor, parameters: Parameters, order: str, gate: str) -> Tensor:
    """:func:`da_attention` of the parameters as one value."""
    with autocast_off(x):
        return rounded_once(x, parameters, order, gate)


def rounded_once(x: Tensor, parameters: Parameters, order: str, gate: str) -> Tensor:
    """:func:`forward` for TorchScript, which cannot switch autocast off."""
    acc = accumulation_dtype(x.dtype)
    converted = Parameters(
        _to(parameters.conv_weight, acc),
        _to(parameters.dilated_weight, acc),
        _to(parameters.merge_weight, acc),
        _to(parameters.spatial_bias, acc),
        _to(parameters.gate_weight, acc),
        _to(parameters.gate_bias, acc),
    )
    return _formula(x.to(acc), converted, order, gate).to(x.dtype)


def _to(p: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if p is None else p.to(dtype)


def da_attention_backward(
    dy: Tensor,
    x: Tensor,
    conv_weight: Weight,
    dilated_weight: Weight,
    merge_weight: Weight,
    gate_weight: Weight = None,
    gate_bias: Weight = None,
    *,
    spatial_bias: Weight = None,
    order: str = "spatial_channel",
    gate: str = "affine",
) -> Gradients:
    """The gradients, written out: ``dx`` and one per parameter, None where the parameter is None.

    Returns ``(dx, d_conv_weight, d_dilated_weight, d_merge_weight, d_spatial_bias, d_gate_weight,
    d_gate_bias)``, each in the dtype of what it is the gradient of.
    """
    parameters = Parameters(
        conv_weight, dilated_weight, merge_weight, spatial_bias, gate_weight, gate_bias
    )
    return backward(dy, x, parameters, order, gate)


def backward(dy: Tensor, x: Tensor, parameters: Parameters, order: str, gate: str) -> Gradients:
    """:func:`da_attention_backward` of the parameters as one value."""
    acc = accumulation_dtype(x.dtype)
    with autocast_off(x):
        wide, converted = x.to(acc), parameters.each(lambda p: p.to(acc))
        both = masks(wide, converted, order, gate)
        slopes = [mask * (1 - mask) for mask in both]
        found = gradients(dy.to(acc), wide, converted, order, gate, masks=both, slopes=slopes)
    return tuple(
        None if g is None or t is None else g.reshape(t.shape).to(t.dtype)
        for g, t in zip(found, (x, *parameters), strict=True)
    )


def masks(
    x: Tensor,
    parameters: Parameters,
    order: str,
    gate: str,
    sigmoids: Sequence[Callable[[Tensor], Tensor]] = (torch.sigmoid, torch.sigmoid),
) -> tuple[Tensor, Tensor]:
    """``s [N, 1, H, W]`` and ``c [N, C, 1, 1]`` with ``y = x * s * c``; 1 where there is none.

    ``sigmoids`` make a mask of its logit: the spatial one, the channel one.
    """
    s = c = torch.ones((), dtype=x.dtype, device=x.device)
    of_x = order == "parallel"  # both, not one of the other's result
    for half in ("spatial", "channel") if of_x else order.split("_"):
        if half == "spatial":
            m = channel_mean(x if of_x else x * c)
            s = sigmoids[0](spatial_logit(m, parameters))
        else:
            g = pooled(x if of_x else x * s)
            logit = channel_logit(g, gate, parameters.gate_weight, parameters.gate_bias)
            c = sigmoids[1](logit[:, :, None, None])
    return s, c


def gradients(
    dy: Tensor,
    x: Tensor,
    parameters: Parameters,
    order: str,
    gate: str,
    *,
    masks: Sequence[Tensor],
    slopes: Sequence[Tensor],
) -> Gradients:
    """The gradients at the masks of :func:`masks` and the slopes of their sigmoids.

    All tensors have one dtype. Here nothing is subtracted: absolute values give the gradients with
    the magnitudes of their terms added up.
    """
    p: Any = parameters  # those that the order and the gate use are tensors
    channels, height, width = x.shape[1:]
    pixels = height * width
    has_spatial, has_channel = order != "channel", order != "spatial"

    s, c = masks
    m = channel_mean(x * c if order == "channel_spatial" else x)
    g = pooled(x * s if order == "spatial_channel" else x)

    d_conv = d_dilated = d_merge = d_spatial_bias = d_gate_weight = d_gate_bias = None
    dg = dm = torch.zeros((), dtype=x.dtype, device=x.device)

    def through_spatial_mask(ds: Tensor) -> None:
        nonlocal d_conv, d_dilated, d_merge, d_spatial_bias, dm
        dz = ds * slopes[0]
        near, far = _tap_sums(dz, m, 1), _tap_sums(dz, m, 3)
        v = p.merge_weight.reshape(2)
        d_conv, d_dilated = v[0] * near, v[1] * far
        d_merge = torch.stack([(p.conv_weight * near).sum(), (p.dilated_weight * far).sum()])
        d_spatial_bias = dz.sum()
        dm = v[0] * F.conv_transpose2d(dz, p.conv_weight, padding=1)
        dm = dm + v[1] * F.conv_transpose2d(dz, p.dilated_weight, padding=3, dilation=3)

    def through_channel_mask(dc: Tensor) -> None:
        nonlocal d_gate_weight, d_gate_bias, dg
        dt = dc * slopes[1][:, :, 0, 0]
        if gate == "sigmoid":
            dg = dt
        elif gate == "eca":
            k = p.gate_weight.numel()
            windows = F.pad(g, (k // 2, k // 2)).unfold(1, k, 1)
            d_gate_weight = (dt[:, :, None] * windows).sum((0, 1))
            dg = F.conv_transpose1d(dt[:, None], p.gate_weight.view(1, 1, -1), padding=k // 2)[:, 0]
        else:
            over = (0,) if gate == "affine" else (0, 1)
            d_gate_weight, d_gate_bias = (dt * g).sum(over), dt.sum(over)
            dg = p.gate_weight * dt
        dg = dg[:, :, None, None]

    if order == "channel_spatial":
        through_spatial_mask((dy * x * c).sum(1, keepdim=True))
        dy1 = dy * s + dm / channels  # the gradient of y1 = x * c
        through_channel_mask((dy1 * x).sum((2, 3)))
        dx = dy1 * c + dg / pixels
    elif order == "spatial_channel":
        through_channel_mask((dy * x * s).sum((2, 3)))
        dy1 = dy * c + dg / pixels  # the gradient of y1 = x * s
        through_spatial_mask((dy1 * x).sum(1, keepdim=True))
        dx = dy1 * s + dm / channels
    else:
        if has_channel:
            through_channel_mask((dy * x * s).sum((2, 3)))
        if has_spatial:
            through_spatial_mask((dy * x * c).sum(1, keepdim=True))
        dx = dy * s * c + dg / pixels + dm / channels
    return dx, d_conv, d_dilated, d_merge, d_spatial_bias, d_gate_weight, d_gate_bias


def _tap_sums(dz: Tensor, m: Tensor, dilation: int) -> Tensor:
    """``sum_p dz[p] m[p + t]`` for the nine taps of a 3x3 kernel, as ``[1, 1, 3, 3]``."""
    height, width = m.shape[2:]
    bordered = F.pad(m, (dilation,) * 4)
    sums = [
        (dz * bordered[:, :, i : i + height, j : j + width]).sum()
        for i in range(0, 3 * dilation, dilation)
        for j in range(0, 3 * dilation, dilation)
    ]
    return torch.stack(sums).view(1, 1, 3, 3)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which reductions over tensors of ``dtype`` are kept."""
    return torch.float64 if dtype == torch.float64 else torch.float32


# Asked here, for PyTorch 2.10 cannot compile the question.
_AUTOCAST = frozenset(
    kind for kind in ("cpu", "cuda", "xpu", "mps") if torch.amp.is_autocast_available(kind)
)


def autocast_off(x: Tensor) -> AbstractContextManager[Any]:
    kind = x.device.type
    has_it = kind in _AUTOCAST
    if not has_it and not torch.compiler.is_compiling():
        has_it = torch.amp.is_autocast_available(kind)
    if has_it:
        return torch.autocast(kind, enabled=False)
    return nullcontext()
