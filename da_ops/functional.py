"""The operator as a function: the one way in."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_unary

from .checks import check_arguments
from .function import compute, fused, plain, transformed
from .layout import dense
from .parameters import SCHEMA, Parameters
from .reference import rounded_once
from .shards import is_distributed, on_each_shard


def da_attention(
    x: Tensor,
    conv_weight: Tensor | None,
    dilated_weight: Tensor | None,
    merge_weight: Tensor | None,
    gate_weight: Tensor | None = None,
    gate_bias: Tensor | None = None,
    *,
    spatial_bias: Tensor | None = None,
    order: str = "spatial_channel",
    gate: str = "affine",
    backend: str = "auto",
) -> Tensor:
    """Spatial and channel attention over a feature map, fused where a fused backend serves.

    Equivalent to :func:`da_ops.reference.da_attention`.

    Args:
        x: ``[N, C, H, W]``, float16, bfloat16, float32 or float64. Contiguous and channels_last
            tensors are used as they are, any other strides cost one copy. ``N`` may be 0.
        conv_weight: ``[1, 1, 3, 3]``, the 3x3 convolution over the channel mean.
        dilated_weight: ``[1, 1, 3, 3]``, the same with dilation 3.
        merge_weight: ``[1, 2, 1, 1]``, the 1x1 convolution that merges the two. These three must be
            None for ``order="channel"``.
        gate_weight: ``[C]`` for ``gate="affine"``, ``[1]`` for ``"scalar"``, ``[k]`` with odd ``k``
            for ``"eca"``, None for ``"sigmoid"`` and for ``order="spatial"``.
        gate_bias: as ``gate_weight`` for ``"affine"`` and ``"scalar"``, else None.
        spatial_bias: ``[1]``, added before the spatial mask's sigmoid; optional.
        order: ``"spatial_channel"`` (the paper's), ``"channel_spatial"``, ``"parallel"``,
            ``"spatial"`` or ``"channel"``.
        gate: ``"affine"``, ``"scalar"``, ``"eca"`` or ``"sigmoid"``.
        backend: ``"auto"`` for the best that serves ``x``'s device, or ``"cuda"``, ``"triton"``,
            ``"cpu"``, ``"eager"``; see :func:`da_ops.backends`.

    Parameters are in ``x``'s dtype, or float32 with half-precision ``x``. Reductions accumulate in
    float32 (float64 for float64).

    Returns:
        ``[N, C, H, W]`` in the dtype and memory layout of ``x``.

    Raises:
        TypeError: an argument is not a tensor, or of a dtype that does not go with ``x``.
        ValueError: a shape, device, option, or an argument that the order or gate does not take.
        RuntimeError: ``backend`` names one that cannot serve here; the message says why.
    """
    parameters = conv_weight, dilated_weight, merge_weight, spatial_bias, gate_weight, gate_bias
    return attention(x, *parameters, order, gate, backend)


def attention(
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
    """:func:`da_attention` with every argument positional: one node of an FX graph, and, compiled
    by TorchScript, plain operations."""
    # A plain tuple, since autograd takes it apart again: naming it costs a small call a percent.
    parameters = (conv_weight, dilated_weight, merge_weight, spatial_bias, gate_weight, gate_bias)
    if torch.jit.is_scripting():
        return rounded_once(x, Parameters(*parameters), order, gate)
    else:  # TorchScript compiles code after a return, but not this branch
        if has_torch_function_unary(x):  # a Proxy of FX, among others
            return handle_torch_function(attention, (x,), x, *parameters, order, gate, backend)
        under = transformed()  # where a tensor's layout may not be asked for
        if not under and isinstance(x, Tensor) and x.dim() == 4 and x.layout is torch.strided:
            x = dense(x)  # here, so that backward finds the copy and makes none
        if type(x) is not Tensor and is_distributed(x):
            return on_each_shard(attention, x, Parameters(*parameters), order, gate, backend)
        if torch.compiler.is_compiling():
            return _compiled(x, Parameters(*parameters), order, gate, backend)
        if under or torch.jit.is_tracing():
            return plain(x, Parameters(*parameters), order, gate, backend)
        if torch.is_grad_enabled():
            return fused(x, *parameters, order, gate, backend)
        return compute(x, parameters, order, gate, backend)[1]


def _compiled(x: Tensor, parameters: Parameters, order: str, gate: str, backend: str) -> Tensor:
    if torch.onnx.is_in_onnx_export() or transformed():
        return plain(x, parameters, order, gate, backend)
    check_arguments(x, parameters, order, gate)
    return torch.ops.da_ops.attention.default(x, *parameters, order, gate, backend)


# One node to Dynamo, and the function to what comes after it. Dynamo would make a contiguous copy
# of dy if it traced the function; torch.compiler.allow_in_graph would import all of Dynamo.
_library = torch.library.Library("da_ops", "FRAGMENT")
_library.define(f"attention(Tensor x, {SCHEMA}, str order, str gate, str backend) -> Tensor")
_library.impl("attention", fused, "CompositeImplicitAutograd")
