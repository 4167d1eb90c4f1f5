"""Pictures of what networks find and of where they look."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor, nn

from .vision import F, get_model_weights

# isort: split
from .. import models
from ..models.weights import read
from .cam import grad_cam, strongest
from .checkpoint import load_detector
from .pictures import open_picture, to_rgb
from .settings import BACKBONES

_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's
_SIDE, _CROP = 256, 224  # of the images that ImageNet's classifiers see, pixels


@dataclass(frozen=True)
class Network:
    """A classifier or a detector, as pictures need it."""

    model: nn.Module
    title: str
    classes: tuple[str, ...]  # by output; a detector's first is the background
    detector: bool

    def see(self, image: Image.Image) -> Tensor:
        """The part of an image that the network takes, float [3, H, W] in 0 to 1."""
        picture: Tensor = F.to_dtype(F.pil_to_tensor(to_rgb(image)), scale=True)
        if self.detector:
            return picture
        picture = F.center_crop(F.resize(picture, [_SIDE], antialias=True), [_CROP])
        return picture

    def inputs(self, picture: Tensor) -> Tensor:
        """A picture from ``see`` as the network takes it, a batch of one."""
        if not self.detector:
            picture = F.normalize(picture, list(_MEAN), list(_STD))
        return picture[None]

    def number(self, label: str) -> int:
        """The output of a class, given by name or number; ValueError if it has none."""
        if label in self.classes:
            return self.classes.index(label)
        if label.isdecimal() and int(label) < len(self.classes):
            return int(label)
        some = ", ".join(self.classes[self.detector :][:20])
        raise ValueError(
            f"label: expected a class of {self.title}, a number up to {len(self.classes) - 1} or a"
            f" name such as {some}; got {label!r}"
        )


def load_network(source: str, backbone: str = "resnet50", attention: str | None = None) -> Network:
    """The detector of a run folder or of one of its checkpoints, or else an ImageNet classifier.

    Args:
        source: the folder, the file, or a name of torchvision's weights such as "IMAGENET1K_V1".
        backbone, attention: of a classifier; a detector's checkpoint knows its own.

    Raises:
        ValueError, FileNotFoundError: there is no such network.
    """
    path = Path(source)
    if path.is_dir() or (path.is_file() and _of_detector(path)):
        detector = load_detector(path)
        s = detector.settings
        title = _title(s.backbone, None if s.attention == "none" else s.attention)
        if s.transformer != "none":
            title = f"STN-{title}"
        classes = ("background", *detector.classes)
        return Network(detector.model, f"{title}, SSD{s.size}", classes, True)
    if backbone not in BACKBONES:
        raise ValueError(f"backbone: expected one of {', '.join(BACKBONES)}, got {backbone!r}")
    model = getattr(models, backbone)(attention, weights=source)
    classes = tuple(get_model_weights(backbone).DEFAULT.meta["categories"])
    return Network(model.eval(), _title(backbone, attention), classes, False)


def _of_detector(path: Path) -> bool:
    try:
        stored = read(path, mmap=True)
    except (ValueError, OSError):  # whoever loads it in earnest says what is wrong
        return False
    return isinstance(stored, dict) and {"settings", "classes"} <= set(stored)


def _title(backbone: str, attention: str | None) -> str:
    name = backbone.replace("resnet", "ResNet-")
    return f"{attention.upper()}-{name}" if attention else name


def draw_comparison(
    paths: Sequence[Path], networks: Sequence[Network], out: Path, *, label: str | None = None
) -> None:
    """A row per image: the image, and for each network what speaks for a class.

    Args:
        label: the class, by name or number; None takes for each image the one that the first
            network is surest of.

    Raises:
        FileNotFoundError: there is no such image.
        ValueError: an image that cannot be read, or an unknown class.
    """
    rows, columns = len(paths), 1 + len(networks)
    figure = Figure(figsize=(2.8 * columns, 2.95 * rows), dpi=150, layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    for row, path in zip(grid, paths):
        image, name = open_picture(path), label
        row[0].imshow(image)
        row[0].set_title(path.name, fontsize=9, parse_math=False)
        for axes, network in zip(row[1:], networks):
            picture = network.see(image)
            inputs = network.inputs(picture)
            if name is None:
                name = network.classes[strongest(network.model, inputs)[0]]
            heat = grad_cam(network.model, inputs, [network.number(name)])[0]
            show_map(axes, picture, heat)
            axes.set_title(f"{network.title}: {name}", fontsize=9, parse_math=False)
        for axes in row:
            axes.set_axis_off()
    figure.savefig(out, format="png", facecolor="white", metadata={"Software": None})


def show_map(axes: Axes, picture: Tensor, heat: Tensor) -> None:
    """A picture, float [3, H, W] in 0 to 1, under a map [H, W] from 0 to 1."""
    colours = matplotlib.colormaps["jet"](heat.numpy())[..., :3]
    axes.imshow(np.clip(0.5 * picture.permute(1, 2, 0).numpy() + 0.5 * colours, 0, 1))
