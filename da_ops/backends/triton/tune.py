"""The choice among tiles by measurement, where it cannot show in a result.

Only the kernel that scales is tuned: it computes each element by itself. The tiles of a sum decide
in which order it is added, so they follow from the call alone (tiles.py).
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any

import torch

from . import passes
from .run import INTERPRETED, run
from .tiles import Limits, Matrix, scale_tiles

# Bytes of a tile, bytes of its longest row, warps; the first is taken where none is measured.
CANDIDATES = (
    (8192, 512, 4),
    (4096, 512, 4),
    (8192, 2048, 4),
    (16384, 512, 4),
    (16384, 1024, 8),
)
_ROUNDS = 7

_chosen: dict[Any, tuple[int, int, int]] = {}


def scale(
    m: Matrix, images: int, arguments: tuple[Any, ...], options: dict[str, Any], limits: Limits
) -> None:
    """Start ``passes.scale`` with the tiles that are quickest for calls like this one."""
    start = partial(_scale, m, images, arguments, options, limits)
    if INTERPRETED:
        start((limits.tile_bytes, limits.widest, 4))
        return
    x, _, *factors, ends = arguments[:7]
    present = tuple(t is not None for t in (*factors, *ends))
    key = (x.device, x.dtype, m, images, options["OUTER"], present)
    if key not in _chosen and _may_measure():
        _chosen[key] = _quickest(start)
    start(_chosen.get(key, CANDIDATES[0]))


def _may_measure() -> bool:
    """Whether to measure: not while a graph is captured, which would record the measurement."""
    wanted = os.environ.get("DA_OPS_TRITON_AUTOTUNE", "1") != "0"
    return wanted and not torch.cuda.is_current_stream_capturing()


def _quickest(start: Callable[[tuple[int, int, int]], None]) -> tuple[int, int, int]:
    def seconds(candidate: tuple[int, int, int]) -> float:
        start(candidate)  # compiles
        events = [torch.cuda.Event(enable_timing=True) for _ in range(_ROUNDS + 1)]
        for event in events:
            event.record()
            start(candidate)
        events[-1].synchronize()
        return statistics.median(a.elapsed_time(b) for a, b in pairwise(events))

    return min(CANDIDATES, key=seconds)


def _scale(
    m: Matrix,
    images: int,
    arguments: tuple[Any, ...],
    options: dict[str, Any],
    limits: Limits,
    candidate: tuple[int, int, int],
) -> None:
    tile_bytes, widest, warps = candidate
    t = scale_tiles(m, replace(limits, tile_bytes=tile_bytes, widest=widest))
    run(
        passes.scale, images * t.blocks * t.windows, *arguments, t.blocks, t.windows,
        HEIGHT=t.height, WIDTH=t.width, num_warps=warps, **options,
    )  # fmt: skip
