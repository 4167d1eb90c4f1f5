"""The operator as a layer."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from .checks import check_options
from .functional import da_attention


class DAModule(nn.Module):
    """Attention over space and channels, ``[N, C, H, W] -> [N, C, H, W]``.

    Args:
        channels: C of the feature maps.
        order: how the two halves are combined; see :func:`da_ops.da_attention`.
        gate: the form of the channel mask; see :func:`da_ops.da_attention`.
        bias: give each of the three convolutions a bias, as ``nn.Conv2d`` does.
        kernel_size: of ``gate="eca"``, odd; None adapts it to ``channels`` as ECA-Net does
            (gamma 2, b 1).
        backend: see :func:`da_ops.da_attention`.
        device, dtype: of the parameters.

    Parameters, the same whichever backend runs: ``conv.weight [1, 1, 3, 3]``,
    ``dilated_conv.weight [1, 1, 3, 3]``, ``merge.weight [1, 2, 1, 1]`` (each with ``.bias [1]``
    if ``bias``), ``gate_weight`` and ``gate_bias`` (``[C]`` for "affine", ``[1]`` for "scalar",
    weight ``[k]`` alone for "eca"). The "affine" and "scalar" gates start at weight 0 and bias 1;
    the convolutions as ``nn.Conv2d`` and ``nn.Conv1d`` do.

    The layer keeps ``x``'s dtype and memory layout. It takes ``(channels, device=, dtype=)`` and so
    serves as an ``attn_layer`` of timm.

    Source: the DA block, an extremely lightweight attention mechanism for detection backbones. What
    its paper leaves open (the gate's form, the convolutions' biases) is decided in README.md.
    """

    gate_weight: nn.Parameter | None
    gate_bias: nn.Parameter | None

    def __init__(
        self,
        channels: int,
        *,
        order: str = "spatial_channel",
        gate: str = "affine",
        bias: bool = False,
        kernel_size: int | None = None,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(channels, int) or channels < 1:
            raise ValueError(f"DAModule: channels must be a positive int, got {channels!r}")
        check_options(order, gate)
        if kernel_size is not None:
            if gate != "eca":
                raise ValueError(f"DAModule: kernel_size goes with gate='eca', got gate={gate!r}")
            if kernel_size < 1 or kernel_size % 2 == 0:
                raise ValueError(f"DAModule: kernel_size must be odd, got {kernel_size}")
        self.channels, self.order, self.gate, self.backend = channels, order, gate, backend
        factory: dict[str, Any] = {"device": device, "dtype": dtype}

        self.conv = self.dilated_conv = self.merge = None
        if order != "channel":
            self.conv = nn.Conv2d(1, 1, 3, padding=1, bias=bias, **factory)
            self.dilated_conv = nn.Conv2d(1, 1, 3, padding=3, dilation=3, bias=bias, **factory)
            self.merge = nn.Conv2d(2, 1, 1, bias=bias, **factory)

        size = 0
        if order != "spatial" and gate != "sigmoid":
            size = {"affine": channels, "scalar": 1}.get(
                gate, kernel_size or _adaptive_kernel_size(channels)
            )
        with_bias = size > 0 and gate != "eca"
        self.gate_weight = nn.Parameter(torch.empty(size, **factory)) if size else None
        self.gate_bias = nn.Parameter(torch.empty(size, **factory)) if with_bias else None
        self._reset_gate()

    def reset_parameters(self) -> None:
        """Initialise every parameter anew."""
        for conv in (self.conv, self.dilated_conv, self.merge):
            if conv is not None:
                conv.reset_parameters()
        self._reset_gate()

    def _reset_gate(self) -> None:
        if self.gate_weight is None:
            return
        if self.gate_bias is None:  # eca: as nn.Conv1d(1, 1, k) does
            bound = 1 / math.sqrt(self.gate_weight.numel())
            nn.init.uniform_(self.gate_weight, -bound, bound)
        else:
            nn.init.zeros_(self.gate_weight)
            nn.init.ones_(self.gate_bias)

    def forward(self, x: Tensor) -> Tensor:
        conv, dilated, merge = map(self._modules.get, ("conv", "dilated_conv", "merge"))
        merge_weight, spatial_bias = _parameter(merge, "weight"), _parameter(merge, "bias")
        if spatial_bias is not None:
            # A constant on either side of the merge is a constant after it.
            biases = torch.cat([_parameter(conv, "bias"), _parameter(dilated, "bias")])
            spatial_bias = (merge_weight.flatten() * biases).sum(0, keepdim=True) + spatial_bias
        return da_attention(
            x,
            _parameter(conv, "weight"),
            _parameter(dilated, "weight"),
            merge_weight,
            _parameter(self, "gate_weight"),
            _parameter(self, "gate_bias"),
            spatial_bias=spatial_bias,
            order=self.order,
            gate=self.gate,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        parts = [str(self.channels), f"order={self.order!r}", f"gate={self.gate!r}"]
        if self.gate == "eca" and self.gate_weight is not None:
            parts.append(f"kernel_size={self.gate_weight.numel()}")
        if self.backend != "auto":
            parts.append(f"backend={self.backend!r}")
        return ", ".join(parts)


def _parameter(module: nn.Module | None, name: str) -> Any:
    """``module.name``, past nn.Module's own look-up, which takes ten times as long."""
    if module is None:
        return None
    own = module._parameters
    return own[name] if name in own else getattr(module, name)  # it may be parametrised


def _adaptive_kernel_size(channels: int, gamma: int = 2, b: int = 1) -> int:
    """ECA-Net's rule: the odd number at or above (log2(channels) + b) / gamma, rounded down."""
    k = int(abs((math.log2(channels) + b) / gamma))
    return k if k % 2 else k + 1
