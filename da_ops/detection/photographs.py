"""Real photographs that scikit-image and scikit-learn ship; nothing is downloaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from .pictures import open_picture

# Where each package keeps its pictures: those in colour, or of one whole texture.
SHIPPED: Mapping[str, tuple[str, Sequence[str]]] = {
    "skimage": ("data", (
        "astronaut.png", "brick.png", "camera.png", "chelsea.png", "coffee.png", "coins.png",
        "grass.png", "gravel.png", "hubble_deep_field.jpg", "ihc.png", "moon.png",
        "motorcycle_left.png", "retina.jpg", "rocket.jpg",
    )),
    "sklearn": ("datasets/images", ("china.jpg", "flower.jpg")),
}  # fmt: skip


def photographs(names: Sequence[str] | None = None) -> dict[str, np.ndarray]:
    """Photographs by name, without their suffix: uint8 [H, W, 3].

    Args:
        names: which, all of them needed; by default every one that is installed.

    Raises:
        RuntimeError: one of ``names`` is not installed, or none at all; says what to install.
    """
    paths = {
        Path(file).stem: folder / file
        for package, (within, files) in SHIPPED.items()
        for folder in _folder(package, within)
        for file in files
        if (folder / file).is_file()
    }
    missing = [name for name in names or () if name not in paths]
    if missing or not paths:
        raise RuntimeError(
            "expected the photographs that scikit-image and scikit-learn ship, got none of "
            f"{', '.join(missing) or 'them'}; pip install scikit-image scikit-learn"
        )
    return {name: np.asarray(open_picture(paths[name])) for name in names or paths}


def _folder(package: str, within: str) -> list[Path]:
    """Where a package keeps its pictures, without importing it; none if it is not installed."""
    spec = find_spec(package)
    return [] if spec is None or spec.origin is None else [Path(spec.origin).parent / within]
