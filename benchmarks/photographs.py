"""Real photographs that scikit-image and scikit-learn ship; nothing is downloaded."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch

from benchmarks.environment import BenchmarkError

SHIPPED = {  # where each package keeps its pictures: those in colour, or of one whole texture
    "skimage": ("data", (
        "astronaut.png", "brick.png", "camera.png", "chelsea.png", "coffee.png", "coins.png",
        "grass.png", "gravel.png", "hubble_deep_field.jpg", "ihc.png", "moon.png",
        "motorcycle_left.png", "retina.jpg", "rocket.jpg",
    )),
    "sklearn": ("datasets/images", ("china.jpg", "flower.jpg")),
}  # fmt: skip


def photographs() -> dict[str, torch.Tensor]:
    """Every photograph that is installed, by name: [3, H, W], float32, about zero mean."""
    from PIL import Image

    found = {}
    for package, (folder, names) in SHIPPED.items():
        spec = find_spec(package)
        if spec is None or spec.origin is None:
            continue
        for name in names:
            path = Path(spec.origin).parent / folder / name
            if path.is_file():
                with Image.open(path) as image:
                    pixels = torch.from_numpy(np.array(image.convert("RGB")))
                found[path.stem] = pixels.permute(2, 0, 1).float() / 63.75 - 2
    if len(found) < 2:
        raise BenchmarkError(
            f"expected the photographs that scikit-image and scikit-learn ship, got {len(found)};"
            " pip install scikit-image scikit-learn"
        )
    return found


def batches(
    images: dict[str, torch.Tensor], count: int, batch: int, size: int, seed: int = 0
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Random crops [batch, 3, size, size], half of them mirrored, and which photograph each is."""
    draw = np.random.default_rng(seed)
    pictures = list(images.values())

    def crop(label: int) -> torch.Tensor:
        picture = pictures[label]
        _, height, width = picture.shape
        if min(height, width) < size:
            scale = size / min(height, width)
            picture = torch.nn.functional.interpolate(
                picture[None], size=(max(size, int(height * scale)), max(size, int(width * scale))),
                mode="bilinear", antialias=True,
            )[0]  # fmt: skip
            _, height, width = picture.shape
        top, left = draw.integers(height - size + 1), draw.integers(width - size + 1)
        patch = picture[:, top : top + size, left : left + size]
        return patch.flip(2) if draw.random() < 0.5 else patch

    made = []
    for _ in range(count):
        labels = draw.integers(len(pictures), size=batch)
        made.append((torch.stack([crop(int(k)) for k in labels]), torch.from_numpy(labels)))
    return made
