"""The CUDA kernels of csrc/cuda."""

from __future__ import annotations

import os
from functools import cache
from typing import Any

import torch

from . import native
from .base import Backend, Call, Direction, Launch, Pass, Plan

OLDEST = 75  # compute capability that kernels are built for


def _plan(call: Call) -> Plan:
    plan = native.planner().cuda
    properties = None
    if call.sm is None and torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    details = plan(
        call.shape,
        call.channels_last,
        str(call.dtype).removeprefix("torch."),
        call.order,
        call.gate,
        call.sm or (10 * properties.major + properties.minor if properties else 90),
        properties.multi_processor_count if properties else 0,
        os.environ.get("DA_OPS_PLAN", ""),
    )

    def direction(name: str) -> Direction:
        passes = []
        for step in details.pop(name):
            launch = Launch(step.pop("grid"), step.pop("threads"), step.pop("shared_bytes"))
            passes.append(Pass(**step, launch=launch))
        return Direction(tuple(passes), sum(p.reads + p.writes for p in passes))

    for way in ("forward", "backward"):
        details[f"one launch {way}"] = _one_launch(details.pop(f"one_launch_{way}"))
    return Plan(direction("forward"), direction("backward"), details)


def _one_launch(chosen: dict[str, Any]) -> str:
    """In words: the launch that keeps an image on the chip, or why there is none."""
    if "refused" in chosen:
        return f"no ({chosen['refused']})"
    return (
        "{blocks_an_image} blocks an image ({barrier}), {images_at_once} images at once, "
        "{waves} waves, {x_kept:.0%} of x and {dy_kept:.0%} of dy kept"
    ).format(**chosen)


def _missing() -> str | None:
    return None if torch.cuda.is_available() else "torch finds no NVIDIA GPU"


@cache
def _unfit() -> str | None:
    """Why the library cannot run on one of this machine's GPUs."""
    built = native.build_record().get("cuda", {}).get("arch_list", [])
    exact = {int(a.split("+")[0].replace(".", "")) for a in built}
    ptx = [int(a.split("+")[0].replace(".", "")) for a in built if a.endswith("+PTX")]
    for device in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(device)
        sm = 10 * major + minor
        # A binary runs on its own major version from its minor one on, PTX on all that come later.
        if not any(a // 10 == major and a <= sm for a in exact) and not any(a <= sm for a in ptx):
            return (
                f"built for compute capability {', '.join(built)}, and "
                f"{torch.cuda.get_device_name(device)} has {major}.{minor}: "
                f"reinstall da-ops with TORCH_CUDA_ARCH_LIST={major}.{minor}"
            )
    return None


BACKEND = Backend(
    "cuda",
    ("cuda",),
    native.load("_cuda.abi3.so"),
    native.forward,
    native.backward,
    _plan,
    missing=_missing,
    unfit=_unfit,
)
