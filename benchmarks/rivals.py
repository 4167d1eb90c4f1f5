"""The layer as one writes it in plain PyTorch, and torch.compile of it. Nothing here knows da_ops.

The parameters have the fused layer's names, so that one state_dict serves all.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn

COMPILE_MODES = {
    "cpu": ("default",),
    "cuda": ("default", "reduce-overhead", "max-autotune-no-cudagraphs"),
}
# On a GPU compiling takes far longer than measuring; this one tries some dozen kernels for each.
SLOW = "compile:max-autotune-no-cudagraphs"


class PlainDA(nn.Module):
    """Spatial mask, then channel mask, in the input's dtype throughout. x, y: [N, C, H, W]."""

    def __init__(
        self,
        channels: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        kind: dict[str, Any] = {"device": device, "dtype": dtype}
        self.conv = nn.Conv2d(1, 1, 3, padding=1, bias=False, **kind)
        self.dilated_conv = nn.Conv2d(1, 1, 3, padding=3, dilation=3, bias=False, **kind)
        self.merge = nn.Conv2d(2, 1, 1, bias=False, **kind)
        self.gate_weight = nn.Parameter(torch.zeros(channels, **kind))
        self.gate_bias = nn.Parameter(torch.ones(channels, **kind))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mean = x.mean(1, keepdim=True)
        fields = torch.cat([self.conv(mean), self.dilated_conv(mean)], 1)
        x = x * torch.sigmoid(self.merge(fields))
        pooled = x.mean((2, 3))
        mask = torch.sigmoid(self.gate_weight * pooled + self.gate_bias)
        return x * mask[:, :, None, None]


def compile_names(device: str) -> list[str]:
    """The torch.compile rivals on this kind of device: "compile", "compile:reduce-overhead", ..."""
    modes = COMPILE_MODES[device]
    return ["compile" if mode == "default" else f"compile:{mode}" for mode in modes]


def compiled(layer: nn.Module, name: str = "compile") -> nn.Module:
    """torch.compile of the layer, in place, for one static shape; `name` as in compile_names."""
    # torch tells that it finds no CUDA runtime; on a machine without one that is no news.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    options: dict[str, Any] = {}
    if next(layer.parameters()).device.type == "cpu":
        # Compiled code is cached on disk: name the thread count that it was generated for.
        options["options"] = {"cpp.threads": torch.get_num_threads()}
    elif ":" in name:
        options["mode"] = name.split(":")[1]
    layer.compile(fullgraph=True, dynamic=False, **options)
    return layer
