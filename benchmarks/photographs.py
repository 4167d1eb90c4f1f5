"""Batches of crops of the photographs that scikit-image and scikit-learn ship."""

from __future__ import annotations

import numpy as np
import torch

from benchmarks.environment import BenchmarkError
from da_ops.detection import photographs as shipped


def photographs() -> dict[str, torch.Tensor]:
    """Every photograph that is installed, by name: [3, H, W], float32, about zero mean."""
    try:
        found = shipped.photographs()
    except RuntimeError as error:
        raise BenchmarkError(str(error)) from error
    return {
        name: torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / 63.75 - 2
        for name, pixels in found.items()
    }


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
