"""Pooling by the two-dimensional discrete cosine transform, and at which frequencies."""

# Annotations are no strings here: TorchScript reads them.

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..reference import accumulation_dtype

COUNTS = (1, 2, 4, 8, 16, 32)
# Frequencies along the height and along the width of a map of 7 x 7, as model/layer.py of
# github.com/cfzd/FcaNet lists them (Qin et al., ICCV 2021): those that served best, each alone, on
# ImageNet; the lowest; those that served worst. A smaller set is the beginning of the list.
_SETS = {
    "top": (
        (0, 0, 6, 0, 0, 1, 1, 4, 5, 1, 3, 0, 0, 0, 3, 2)
        + (4, 6, 3, 5, 5, 2, 6, 5, 5, 3, 3, 4, 2, 2, 6, 1),
        (0, 1, 0, 5, 2, 0, 2, 0, 0, 6, 0, 4, 6, 3, 5, 2)
        + (6, 3, 3, 3, 5, 1, 1, 2, 4, 2, 1, 1, 3, 0, 5, 3),
    ),
    "low": (
        (0, 0, 1, 1, 0, 2, 2, 1, 2, 0, 3, 4, 0, 1, 3, 0)
        + (1, 2, 3, 4, 5, 0, 1, 2, 3, 4, 5, 6, 1, 2, 3, 4),
        (0, 1, 0, 1, 2, 0, 1, 2, 2, 3, 0, 0, 4, 3, 1, 5)
        + (4, 3, 2, 1, 0, 6, 5, 4, 3, 2, 1, 0, 6, 5, 4, 3),
    ),
    "bot": (
        (6, 1, 3, 3, 2, 4, 1, 2, 4, 4, 5, 1, 4, 6, 2, 5)
        + (6, 1, 6, 2, 2, 4, 3, 3, 5, 5, 6, 2, 5, 5, 3, 6),
        (6, 4, 4, 6, 6, 3, 1, 4, 4, 5, 6, 5, 2, 2, 5, 1)
        + (4, 3, 5, 0, 3, 1, 1, 2, 4, 2, 1, 1, 5, 3, 3, 3),
    ),
}
NAMES = tuple(f"{kind}{count}" for kind in _SETS for count in COUNTS)


def frequencies(name: str) -> tuple[list[int], list[int]]:
    """Those along the height and along the width of the set called ``name``."""
    kind, count = name[:3], int(name[3:])
    rows, columns = _SETS[kind]
    return list(rows[:count]), list(columns[:count])


def pooled(x: Tensor, rows: list[int], columns: list[int], size: list[int] | None) -> Tensor:
    """``[N, C]``: each group of consecutive channels times its function of the basis, summed over
    the map, which is first pooled adaptively to ``size`` if it is given and another.

    Frequencies are multiplied by the whole number of times that 7 goes into a side: the same waves
    in pixels. The basis is orthonormal.

    Raises:
        ValueError: the map is smaller than the basis.
    """
    height, width = x.shape[2], x.shape[3]
    least_height, least_width = max(rows) + 1, max(columns) + 1
    if size is not None:
        least_height, least_width = size[0], size[1]
    if height < least_height or width < least_width:
        raise ValueError(
            f"FCAModule: x must have maps of at least {least_height} x {least_width}, got "
            f"{height} x {width}; use larger images, or lower frequencies, such as "
            "frequencies='low1'"
        )
    if size is not None and (height != size[0] or width != size[1]):
        x = F.adaptive_avg_pool2d(x, (size[0], size[1]))
    of_rows = _cosines(max(rows), x.shape[2], x)
    of_columns = _cosines(max(columns), x.shape[3], x)
    basis = (
        torch.stack([of_rows[k] for k in rows])[:, :, None]
        * torch.stack([of_columns[k] for k in columns])[:, None, :]
    )
    grouped = x.unflatten(1, (len(rows), -1))  # [N, groups, C / groups, H, W], a view
    return (grouped * basis[:, None]).sum((3, 4)).flatten(1)


def _cosines(highest: int, side: int, x: Tensor) -> Tensor:
    """``[highest + 1, side]``: the orthonormal functions of the frequencies from 0 on."""
    times = side // 7 if side > 7 else 1  # not by max, which ONNX does not take of sizes
    frequency = torch.arange(highest + 1, device=x.device) * times
    position = 2 * torch.arange(side, device=x.device) + 1
    # Whole periods are left out in integers: a large angle would lose digits. The period is a
    # tensor for ONNX, which takes no remainder by a size.
    period = 2 * (position[-1] + 1)
    angle = (frequency[:, None] * position) % period
    dtype = accumulation_dtype(x.dtype)
    power = (1 + (frequency > 0).to(dtype)) / side
    return torch.cos(angle.to(dtype) * (math.pi / (2 * side))) * power.sqrt()[:, None]
