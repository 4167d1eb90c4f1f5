"""SSD (Liu et al., 2016) on ResNets with attention, over torchvision's ``SSD``."""

from __future__ import annotations

import inspect
from collections import OrderedDict
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.detection.anchor_utils import DefaultBoxGenerator
from torchvision.models.detection.ssd import SSD, SSDHead
from torchvision.models.detection.transform import GeneralizedRCNNTransform, resize_boxes
from torchvision.transforms.v2.functional import resize

from ..checks import positive_int
from . import resnet
from .blocks import residual_blocks
from .fuse import FUSIBLE
from .weights import Weights, load_weights

# By backbone: how many times wider its blocks' outputs are than those of a basic block.
_EXPANSION = {"resnet18": 1, "resnet34": 1, "resnet50": 4, "resnet101": 4}
_WIDTH = {"layer2": 128, "layer3": 256, "layer4": 512}
MAPPINGS = {"c4": ("layer3",), "c3c4c5": ("layer2", "layer3", "layer4")}
_EXTRA_WIDTHS = (512, 512)  # of the second and third feature map
_DEEP_WIDTH = 256  # of all that follow
_SMALL_BOX = 14  # pixels; the least side of a square box if there are too few maps for the paper's
_GIVEN = ("backbone", "anchor_generator", "size", "num_classes", "head", "kwargs")  # by ssd
_OPTIONS = [name for name in inspect.signature(SSD).parameters if name not in _GIVEN]


def ssd(
    backbone: str = "resnet50",
    attention: str | None = "da",
    *,
    transformer: str | None = None,
    num_classes: int = 21,
    size: int = 300,
    mapping: str = "c4",
    order: str = "spatial_channel",
    gate: str = "affine",
    backend: str = "auto",
    fused: bool = True,
    weights: Weights = None,
    **kwargs: Any,
) -> SSD:
    """A single-shot detector on a ResNet, for square images of ``size`` pixels.

    The first feature map has a cell every 8 pixels; each further one has half as many a side,
    rounded up, until 3 or fewer are left, which become 1: 38, 19, 10, 5, 3, 1 at 300. Only with
    ``mapping="c3c4c5"`` from 33 to 48 pixels they become 2, in layer4: 6, 3, 2 at 48. With four
    default boxes a cell on the first map and the last two, six on the others, that is 8,732 at 300
    and 24,564 at 512. Scales are those of VOC: .1 of the image side, then from .2 in equal steps
    to 1.05; from 512 pixels on .07, then from .15. Where there are fewer than six maps, up to 192
    pixels, they go in equal steps from 14 pixels to 1.05 of the side.

    From one seed, all that networks have in common starts the same whichever attention they have.

    Args:
        backbone: ``"resnet18"``, ``"resnet34"``, ``"resnet50"`` or ``"resnet101"``.
        attention: ``"da"``, ``"se"``, ``"sge"``, ``"eca"``, ``"fca"`` or None, in every residual
            block.
        transformer: the stage, of those that are not cut off, that a spatial transformer comes in
            front of; see :func:`da_ops.models.insert_transformer`.
        num_classes: with the background, which is class 0.
        size: at least 32. Images of any other size are resized to it, boxes scaled back.
        mapping: ``"c4"``: the network is cut after layer3, whose stride becomes 1, and all other
            maps come from extra stages. ``"c3c4c5"``: the first three maps are those of layer2,
            layer3 and layer4 as they are.
        order, gate, backend: of the DA layer; see :class:`da_ops.DAModule`.
        fused: compute the tail of each residual block as one operator, with DA or None; see
            :func:`da_ops.models.fuse`.
        weights: of the backbone; see :func:`da_ops.models.resnet50`. Its classifier is not used.
        kwargs: of :class:`torchvision.models.detection.SSD`, for instance ``score_thresh``.

    Returns:
        torchvision's detector. It takes a list of float images [3, H, W] in 0 to 1, normalises
        them as ImageNet's, and returns losses in training, given targets with ``boxes`` float
        [K, 4] (x1, y1, x2, y2) and ``labels`` int64 [K] from 1, and otherwise for each image
        ``boxes``, ``labels`` and ``scores``, the best 200 by default. Its losses and boxes are
        float32 under autocast too.

    Raises:
        ValueError: an unknown option, or weights that do not fit.
    """
    if backbone not in _EXPANSION:
        raise ValueError(f"backbone must be one of {', '.join(_EXPANSION)}, got {backbone!r}")
    if mapping not in MAPPINGS:
        raise ValueError(f"mapping must be one of {', '.join(MAPPINGS)}, got {mapping!r}")
    if unknown := [name for name in kwargs if name not in _OPTIONS]:
        raise ValueError(
            f"ssd: expected options of torchvision's SSD, {', '.join(_OPTIONS)}, got"
            f" {', '.join(unknown)}; leave these out"
        )
    num_classes, size = positive_int("num_classes", num_classes), positive_int("size", size)
    if num_classes < 2:
        raise ValueError(
            f"num_classes counts the background and must be at least 2, got {num_classes}"
        )
    sides = feature_sides(size, mapping)
    taken = MAPPINGS[mapping]
    stages = [f"layer{number}" for number in range(1, int(taken[-1][-1]) + 1)]
    if transformer not in (None, *stages):
        raise ValueError(
            f"transformer must be one of {', '.join(stages)} with mapping={mapping!r}, or None, "
            f"got {transformer!r}"
        )
    widths = [_WIDTH[layer] * _EXPANSION[backbone] for layer in taken]
    widths += [*_EXTRA_WIDTHS, *[_DEEP_WIDTH] * len(sides)][len(taken) - 1 : len(sides) - 1]
    # They draw their weights before the backbone, whose attention would shift the random numbers.
    extras = _extra_stages(widths, sides, len(taken))
    boxes = _default_boxes(size, len(sides))
    head = _Head(widths, boxes.num_anchors_per_location(), num_classes)

    net = getattr(resnet, backbone)(
        attention,
        transformer=transformer,
        order=order,
        gate=gate,
        backend=backend,
        fused=fused and attention in FUSIBLE,
    )
    if weights is not None:
        load_weights(net, weights, backbone, head=False)
    if mapping == "c4":
        for _, block in residual_blocks(net.layer3):
            for module in block.modules():
                if isinstance(module, nn.Conv2d):
                    module.stride = (1, 1)
    pyramid = _Pyramid(net, taken, extras, widths)
    model = SSD(pyramid, boxes, (size, size), num_classes, head=head, **kwargs)
    model.transform = _Transform(model.transform)
    return model


ssd300 = partial(ssd, size=300)
ssd300.__doc__ = """:func:`ssd` for images of 300 pixels."""


def feature_sides(size: int, mapping: str = "c4") -> list[int]:
    """Cells a side of each feature map for images of ``size`` pixels: 38, 19, 10, 5, 3, 1 at 300.

    See :func:`ssd` for the rule, and for what ``mapping`` changes in it.

    Raises:
        ValueError: ``size`` is less than 32.
    """
    if size < 32:
        raise ValueError(f"size must be at least 32 pixels, got {size}")
    sides = [-(-size // 8)]
    while sides[-1] > 1:
        sides.append(-(-sides[-1] // 2) if sides[-1] > 3 else 1)
    if mapping == "c3c4c5" and sides[1] == 3:
        sides[2] = 2  # layer4 halves 3 cells to 2, and no stage follows
    return sides


class _Pyramid(nn.Module):
    """Feature maps of a backbone, and of extra stages on the last of them."""

    def __init__(
        self, net: nn.Module, layers: tuple[str, ...], extras: nn.ModuleList, widths: list[int]
    ) -> None:
        super().__init__()
        self.body = IntermediateLayerGetter(net, {layer: layer for layer in layers})
        self.extras = extras
        self.out_channels = widths

    def forward(self, x: Tensor) -> OrderedDict[str, Tensor]:
        maps: OrderedDict[str, Tensor] = self.body(x)
        x = next(reversed(maps.values()))
        for number, stage in enumerate(self.extras):
            x = stage(x)
            maps[f"extra{number}"] = x
        return maps


def _extra_stages(widths: list[int], sides: list[int], given: int) -> nn.ModuleList:
    stages = [
        _stage(widths[k - 1], widths[k], sides[k - 1], sides[k]) for k in range(given, len(sides))
    ]
    return nn.ModuleList(stages)


def _stage(in_channels: int, channels: int, in_side: int, side: int) -> nn.Sequential:
    """Halves the side; 3 cells become 1 without padding."""
    padding = 0 if in_side == 3 else 1
    reduce = nn.Conv2d(in_channels, channels // 2, 1, bias=False)
    # A map of one cell has one value a channel, which a batch of one image could not normalise.
    last = side == 1
    shrink = nn.Conv2d(channels // 2, channels, 3, 2, padding, bias=last)
    for conv in (reduce, shrink):
        nn.init.xavier_uniform_(conv.weight)
    if shrink.bias is not None:
        nn.init.zeros_(shrink.bias)
    return nn.Sequential(
        OrderedDict(
            reduce=reduce,
            reduce_bn=nn.BatchNorm2d(channels // 2),
            reduce_relu=nn.ReLU(),
            shrink=shrink,
            shrink_bn=nn.Identity() if last else nn.BatchNorm2d(channels),
            shrink_relu=nn.ReLU(),
        )
    )


def _default_boxes(size: int, levels: int) -> DefaultBoxGenerator:
    if levels < 6:
        # The paper's scales would leave most objects without a box that overlaps them by half: so
        # few maps leave wide gaps, and .2 of the side is less than a cell of the second map.
        scales = torch.linspace(_SMALL_BOX / size, 1.05, levels + 1, dtype=torch.float64).tolist()
    else:
        first, second = (0.1, 0.2) if size < 512 else (0.07, 0.15)
        scales = [first, *torch.linspace(second, 1.05, levels, dtype=torch.float64).tolist()]
    ratios = [[2], *[[2, 3]] * (levels - 3), [2], [2]]
    return _DefaultBoxes(ratios, scales=scales)


class _DefaultBoxes(DefaultBoxGenerator):
    """Boxes in float32 also under autocast: in half precision they would be pixels off."""

    def _grid_default_boxes(
        self, grid_sizes: list[list[int]], image_size: list[int], dtype: torch.dtype = torch.float32
    ) -> Tensor:
        dtype = torch.promote_types(dtype, torch.float32)
        return super()._grid_default_boxes(grid_sizes, image_size, dtype)


class _Head(SSDHead):
    """SSD's head with outputs in float32 also under autocast: losses and boxes come of them."""

    def forward(self, x: list[Tensor]) -> dict[str, Tensor]:
        return {
            name: out.to(torch.promote_types(out.dtype, torch.float32))
            for name, out in super().forward(x).items()
        }


class _Transform(GeneralizedRCNNTransform):
    """Resizes with antialiasing, as training data are, where torchvision's takes single pixels."""

    def __init__(self, plain: GeneralizedRCNNTransform) -> None:
        super().__init__(
            plain.min_size,
            plain.max_size,
            plain.image_mean,
            plain.image_std,
            plain.size_divisible,
            plain.fixed_size,
        )

    def resize(
        self, image: Tensor, target: dict[str, Tensor] | None = None
    ) -> tuple[Tensor, dict[str, Tensor] | None]:
        size = list(self.fixed_size)
        if target is not None:
            target["boxes"] = resize_boxes(target["boxes"], image.shape[-2:], size)
        if list(image.shape[-2:]) != size:
            image = resize(image, size, antialias=True)
        return image, target
