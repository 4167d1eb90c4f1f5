"""Augmentation of training data as SSD's (Liu et al., 2016), from ``torchvision.transforms.v2``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .settings import AUGMENTATIONS
from .vision import tv_tensors, v2

_MEAN = (124, 116, 104)  # ImageNet's mean colour, of the border around an image zoomed out


def train_transforms(size: int, augmentation: str = "ssd") -> v2.Compose:
    """Random colours, zoom out, crop and mirroring of an image and its target; "mirror" mirrors
    only, which a short run learns more from.

    Maps an image uint8 [3, H, W] and a target of :class:`~da_ops.detection.voc.VOCDetection` to a
    float32 image [3, size, size] in 0 to 1 and a target without the boxes that fell out: labels
    and ``difficult`` go with their boxes. Draws from torch's global generator only.

    Raises:
        ValueError: there is no such augmentation.
    """
    if augmentation not in AUGMENTATIONS:
        raise ValueError(
            f"augmentation must be one of {', '.join(map(repr, AUGMENTATIONS))}; got"
            f" {augmentation!r}"
        )
    more = []
    if augmentation == "ssd":
        more = [
            v2.RandomPhotometricDistort(),
            v2.RandomZoomOut(fill={tv_tensors.Image: _MEAN, "others": 0}),
            v2.RandomIoUCrop(),
        ]
    return v2.Compose(
        [
            *more,
            v2.RandomHorizontalFlip(),
            v2.Resize((size, size), antialias=True),
            v2.SanitizeBoundingBoxes(labels_getter=_with_boxes),
            v2.ToDtype(torch.float32, scale=True),
        ]
    )


def eval_transforms() -> v2.Compose:
    """A float32 image in 0 to 1, and all boxes as they are: the detector resizes."""
    return v2.Compose([v2.ToDtype(torch.float32, scale=True)])


def _with_boxes(sample: tuple[Any, dict[str, Any]]) -> tuple[Tensor, Tensor]:
    """The tensors with one entry per box, which transforms then keep in step with the boxes."""
    _, target = sample
    return target["labels"], target["difficult"]
