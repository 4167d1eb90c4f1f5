"""The plans that are possible for a call, in the words of the backends' environment variables."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable
from typing import Any

import torch

from ..backends import native, stand_ins
from ..backends.base import Call

DEFAULT = ""  # what the planner chooses
_ALWAYS, _NEVER = 0, 10**15 - 1  # limits that every size is above, and none
_SLAB_ROWS = (8, 16, 32, 64, 128, 256, 512)
_BLOCKS = (2, 4, 8, 16, 32, 64)  # that may share an image on a GPU
_TEAMS = ("cluster", "counter")  # of blocks
UNCONNECTED = (DEFAULT, "portable", "block")  # a GPU's, in which no block waits for another


def possible_plans(
    backend: str, call: Call, backward: bool, device: torch.device | None = None
) -> list[str]:
    """The default plan, then all that are possible on ``device``, or the current one, and differ
    from those before them; last the backends that may compute in this one's place.

    Raises:
        RuntimeError: there is no compiled planner to ask.
    """
    if backend == "cpu":
        return [*_of_cpu(call, backward), *stand_ins(backend)]
    gpu = torch.cuda.get_device_properties(device or torch.cuda.current_device())
    sm = 10 * gpu.major + gpu.minor
    way = "backward" if backward else "forward"
    return [*on_gpu(call, way, sm, gpu.multi_processor_count), *stand_ins(backend)]


def _different(texts: Iterable[str], effect: Callable[[str], dict[str, Any] | None]) -> list[str]:
    """The texts of which each has an effect that none before it had."""
    found: dict[str, str] = {}
    for text in texts:
        done = effect(text)
        if done is not None:
            found.setdefault(json.dumps(done), text)
    return list(found.values())


def _of_cpu(call: Call, backward: bool) -> list[str]:
    """Slabs, streaming stores, and whether rows are taken together."""
    decided = ["slab_rows", "stream", "sum_together"] + ["scale_together"] * backward
    dtype = call.dtype_name

    def effect(text: str) -> dict[str, Any]:
        plan = native.planner().cpu(
            call.shape,
            call.channels_last,
            dtype,
            call.order,
            torch.get_num_threads(),
            text,
        )
        return {name: plan[name] for name in decided}

    slabs = ("", *(f"slabs=1,slab_rows={rows}" for rows in _SLAB_ROWS))
    stores = ("", "cache=0", "cache=1")
    sums = ("", f"long_row={_ALWAYS}", f"long_row={_NEVER}")
    scales = ("", f"near={_ALWAYS}", f"near={_NEVER}") if backward else ("",)
    choices = itertools.product(slabs, stores, sums, scales)
    texts = (",".join(filter(None, choice)) for choice in choices)
    return _different(sorted(texts, key=lambda text: text.count("=")), effect)  # the shortest first


def on_gpu(call: Call, way: str, sm: int, multiprocessors: int) -> list[str]:
    """The portable passes, and one launch by its barrier and blocks an image."""
    dtype = call.dtype_name

    def effect(text: str) -> dict[str, Any] | None:
        plan = native.planner().cuda(
            call.shape, call.channels_last, dtype, call.order, call.gate, sm, multiprocessors, text
        )
        one_launch = plan[f"one_launch_{way}"]
        if "refused" not in one_launch:
            return {"one launch": one_launch, "steps": plan[way]}
        return {"steps": plan[way]} if text in (DEFAULT, "portable") else None

    shared = (f"{team}:{blocks}" for team in _TEAMS for blocks in _BLOCKS)
    return _different((*UNCONNECTED, *shared), effect)
