"""The spatial transformer that the DA block is compared with, in plain PyTorch."""

# Annotations are no strings here: FX copies those of `forward`, and TorchScript reads them.

from collections import OrderedDict
from typing import Any

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn

from ..checks import positive_int
from ..reference import accumulation_dtype
from .blocks import residual_blocks

_WIDTH = 32  # of the localisation network
_PARTS = 4  # of either side of the map that it ends in


class STNModule(nn.Module):
    """Spatial transformer: feature maps resampled by an affine map of their positions, which a
    small network reads from them; identity at first, to rounding.

    The localisation network is two 3x3 convolutions to 32 channels with stride 2, a ReLU after
    each, means over 4 x 4 equal parts of the map, and two fully connected layers with a ReLU
    between, of which the last gives what is added to the identity's 2 x 3 matrix. Sampling is
    bilinear, with zeros outside; half precision is sampled in float32.

    Args:
        channels: C of the feature maps, ``[N, C, H, W] -> [N, C, H, W]``.
        device, dtype: of the parameters, which may be float32 with half-precision ``x``.

    Parameters: ``conv1``, ``conv2``, ``fc1``, ``fc2``, each with weight and bias; those of ``fc2``
    start at 0. On a GPU the gradient of the sampling, as PyTorch has it, is not deterministic.

    Source: Jaderberg et al., Spatial Transformer Networks, NIPS 2015, which leaves the localisation
    network open.
    """

    def __init__(
        self,
        channels: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        channels = positive_int("STNModule: channels", channels)
        self.conv1 = nn.Conv2d(channels, _WIDTH, 3, 2, 1, device=device, dtype=dtype)
        self.conv2 = nn.Conv2d(_WIDTH, _WIDTH, 3, 2, 1, device=device, dtype=dtype)
        self.relu = nn.ReLU()
        self.fc1 = nn.Linear(_WIDTH * _PARTS**2, _WIDTH, device=device, dtype=dtype)
        self.fc2 = nn.Linear(_WIDTH, 6, device=device, dtype=dtype)
        nn.init.zeros_(self.fc2.weight)
        nn.init.zeros_(self.fc2.bias)

    def forward(self, x: Tensor) -> Tensor:
        seen = x
        if isinstance(x, Tensor):  # a graph of FX takes x in the parameters' dtype alone
            seen = x.to(self.conv1.weight.dtype)
        seen = self.relu(self.conv2(self.relu(self.conv1(seen))))
        change = self.fc2(self.relu(self.fc1(_part_means(seen).flatten(1))))
        return _resampled(x, change)


@torch.fx.wrap  # a node of its own, for what it does with the sizes of x cannot be traced
def _part_means(x: Tensor) -> Tensor:
    """``[N, C, 4, 4]``: means over equal parts of the map; a pixel between two counts in both by
    its share. Adaptive pooling would take whole pixels, and ONNX would keep those of one size."""
    return _shares(x.shape[2], x) @ x @ _shares(x.shape[3], x).T


def _shares(side: int, x: Tensor) -> Tensor:
    """``[4, side]``: the share of each pixel in the mean of each part."""
    part = torch.arange(4, device=x.device)[:, None]
    edge = torch.arange(side, dtype=accumulation_dtype(x.dtype), device=x.device) * (4 / side)
    share = torch.minimum(edge + 4 / side, part + 1) - torch.maximum(edge, part)
    return share.clamp(min=0).to(x.dtype)


@torch.fx.wrap  # a node of its own, for its choice of a dtype cannot be traced
def _resampled(x: Tensor, change: Tensor) -> Tensor:
    """``x`` at the positions that the identity and ``change``, ``[N, 6]``, send its own to."""
    dtype = accumulation_dtype(x.dtype)
    identity = torch.eye(2, 3, dtype=dtype, device=x.device)
    matrix = (identity + change.to(dtype).unflatten(1, (2, 3)))[:, None, None]
    rows, columns = _positions(x.shape[2], x)[:, None, None], _positions(x.shape[3], x)[:, None]
    # Not F.affine_grid, whose backward cannot be compiled for dynamic sizes.
    grid = matrix[..., 0] * columns + matrix[..., 1] * rows + matrix[..., 2]  # [N, H, W, 2]
    y = F.grid_sample(x.to(dtype), grid, align_corners=False).to(x.dtype)
    if x.is_contiguous():
        return y
    return y.contiguous(memory_format=torch.channels_last)


def _positions(side: int, x: Tensor) -> Tensor:
    """Of pixels' centres, from -1 to 1 at the edges of the map."""
    numbers = torch.arange(side, dtype=accumulation_dtype(x.dtype), device=x.device)
    return (2 * numbers + 1) / side - 1


def insert_transformer(model: nn.Module, before: str) -> nn.Module:
    """Put a spatial transformer in front of a stage of ``model``, in place.

    Its device and dtype are those of the stage. The result of ``model`` stays what it was, to
    rounding. State-dict keys stay as they are, and new ones are ``layer2.transformer.*``; an
    optimizer made before does not know the new parameters. The transformer is then the first module
    of the stage, ``layer2[0]``, and the blocks keep their names, ``layer2.0`` and so on.

    Args:
        model: a network with torchvision's or timm's residual blocks in stages, or a detector over
            one.
        before: the name of a stage, such as ``"layer2"`` or ``"backbone.body.layer2"``.

    Returns:
        ``model``.

    Raises:
        ValueError: ``model`` has no such stage, or one with a transformer. It is unchanged.
    """
    stages = {
        name: found
        for name, module in model.named_modules()
        if name and isinstance(module, nn.Sequential) and (found := _first_block(module))
    }
    if before not in stages:
        known = f"one of {', '.join(map(repr, stages))}" if stages else "of which there is none"
        raise ValueError(
            "insert_transformer: before must name a stage of residual blocks of torchvision or "
            f"timm in {type(model).__name__}, {known}; got {before!r}"
        )
    stage = model.get_submodule(before)
    if hasattr(stage, "transformer"):
        raise ValueError(f"insert_transformer: {before} has a transformer already")
    conv = stages[before].conv1
    transformer = STNModule(
        conv.in_channels, device=conv.weight.device, dtype=conv.weight.dtype
    ).train(stage.training)
    blocks = OrderedDict(stage._modules)
    stage._modules.clear()
    stage.add_module("transformer", transformer)
    stage._modules.update(blocks)
    return model


def _first_block(stage: nn.Sequential) -> Any:
    """Its first residual block, None where it has none; not those of a stage in it."""
    return next((block for name, block in residual_blocks(stage) if "." not in name), None)
