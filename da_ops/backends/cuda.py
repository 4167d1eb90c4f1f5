"""The CUDA kernels of csrc/cuda."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import torch

from . import driver, native
from .base import Backend, Call, Direction, Launch, Pass, Plan, TailKind, Waves
from .tuned import ENVIRONMENT, PLANS

OLDEST = 75  # compute capability that kernels are built for


def _gpu(call: Call) -> Any:
    """The properties of the GPU that a plan is for; None where it is for a typical one."""
    if call.sm is None and torch.cuda.is_available():
        return torch.cuda.get_device_properties(torch.cuda.current_device())
    return None


def _planned(planner: Callable[..., dict[str, Any]], call: Call, wish: str, **more: bool) -> Any:
    """What `planner` says of the call on that GPU; more: what it asks for besides."""
    gpu = _gpu(call)
    dtype = call.dtype_name
    sm = call.sm or (10 * gpu.major + gpu.minor if gpu else 90)
    cores, l2 = (gpu.multi_processor_count, gpu.L2_cache_size) if gpu else (0, 0)
    kind = call.shape, call.channels_last, dtype, call.order, call.gate
    return planner(*kind, sm=sm, multiprocessors=cores, wish=wish, l2_bytes=l2, **more)


def _direction(steps: list[dict[str, Any]]) -> Direction:
    passes = []
    for step in steps:
        of_pass = {key: step.pop(key) for key in ("name", "reads", "writes")}
        why = _saved(step.pop("once", 0), step.pop("again", 0))
        if step.pop("finishes", False):
            why = "makes the parameters' gradients too"
        launch = Launch(**{**step, "waves": Waves(**step["waves"])})
        passes.append(Pass(**of_pass, launch=launch, why=why))
    return Direction(tuple(passes), sum(p.reads + p.writes for p in passes))


def _plan(call: Call) -> Plan:
    wish = os.environ.get(ENVIRONMENT["cuda"], "")
    here = _gpu(call) is not None

    def direction(name: str) -> tuple[dict[str, Any], Direction]:
        tuned = PLANS.of("cuda", call, name == "backward") if here else None
        details = _planned(native.planner().cuda, call, tuned.launches if tuned else wish)
        return details, _direction(details[name])

    (details, forward), (others, backward) = direction("forward"), direction("backward")
    one_launch = {"forward": details, "backward": others}
    details = {k: v for k, v in details.items() if k.removeprefix("one_launch_") not in one_launch}
    for way, planned in one_launch.items():
        details[f"one launch {way}"] = _one_launch(planned[f"one_launch_{way}"])
    if here:
        details.update(PLANS.words("cuda", call))
    return Plan(forward, backward, details)


def _residual_plan(call: Call, kind: TailKind) -> Plan:
    of_batch = kind.shortcut_norm == "batch"
    details = _tail(
        call,
        batch=kind.mode == "training",
        shortcut=kind.shortcut,
        shortcut_norm=kind.shortcut_norm is not None,
        shortcut_batch=of_batch,
    )
    if of_batch:
        details["forward"][:0] = _statistics_of_shortcut(call)
    forward, backward = (_direction(details.pop(name)) for name in ("forward", "backward"))
    return Plan(forward, backward, details)


def _tail(call: Call, **kind: bool) -> Any:
    wish = os.environ.get(ENVIRONMENT["cuda"], "")
    return _planned(native.planner().cuda_tail, call, wish, **kind)


def _statistics_of_shortcut(call: Call) -> list[dict[str, Any]]:
    """The launches of batch_statistics: the first two of a tail in training, but that the pass over
    the shortcut, as any last one, begins with the last image."""
    bare = _tail(replace(call, order="none"), batch=True, shortcut=False)
    steps: list[dict[str, Any]] = bare["forward"][:2]
    for step in steps:
        step.update(name=f"{step['name']} of the shortcut", backwards=step["reads"] > 0)
    return steps


def _saved(once: int, again: int) -> str | None:
    """By what count a launch makes maps that the blocks of the next pass would make each."""
    return f"{once} instructions instead of {again} in the next launch" if again else None


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


# The first driver for each major version of CUDA, on Linux.
_DRIVERS = {12: "525", 13: "580"}


def driver_version() -> str | None:
    """The newest CUDA that the NVIDIA driver knows, such as "13.0"; None where there is none."""
    version = driver.newest_cuda()
    return None if version is None else f"{version // 1000}.{version % 1000 // 10}"


@cache
def _unfit() -> str | None:
    """Why the library cannot run with this machine's driver or on one of its GPUs."""
    record = native.build_record().get("cuda", {})
    known, needed = driver_version(), record.get("version")
    if known and needed and int(known.split(".")[0]) < (major := int(needed.split(".")[0])):
        return (
            f"built with CUDA {needed}, which needs a driver for CUDA {major} "
            f"({_DRIVERS.get(major, 'a newer one')} or later), and this one is for CUDA {known}: "
            f"update the driver, or reinstall da-ops beside a torch for CUDA {known.split('.')[0]}"
        )
    built = record.get("arch_list", [])
    for device in range(torch.cuda.device_count()):
        capability = torch.cuda.get_device_capability(device)
        if not any(_runs_on(capability, arch) for arch in built):
            major, minor = capability
            return (
                f"built for compute capability {', '.join(built)}, and "
                f"{torch.cuda.get_device_name(device)} has {major}.{minor}: "
                f"reinstall da-ops with TORCH_CUDA_ARCH_LIST={major}.{minor}"
            )
    return None


def _runs_on(capability: tuple[int, int], arch: str) -> bool:
    """Whether a GPU runs what was built for ``arch``, such as "9.0", "9.0a", "10.0f", "12.0+PTX".

    A binary runs on its own major version from its minor one on, and PTX on all that come later,
    but neither beyond its capability where that ends in a, nor beyond its major version where in f.
    """
    number, _, ptx = arch.partition("+")
    least = tuple(int(part) for part in number.rstrip("af").split("."))
    if number.endswith("a"):
        return capability == least
    portable = bool(ptx) and not number.endswith("f")
    return capability >= least and (portable or capability[0] == least[0])


def _load() -> str | None:
    """Load the library; None, or the reason it is not usable."""
    library = "_cuda.abi3.so"
    if torch.version.cuda is None and (native.FOLDER / library).exists():
        return "this torch was built without CUDA: install one with it, da-ops can stay as it is"
    return native.load(library)


BACKEND = Backend(
    "cuda",
    ("cuda",),
    _load(),
    native.forward,
    native.backward,
    _plan,
    missing=_missing,
    unfit=_unfit,
    checks=True,
    residual_forward=native.operator("residual_forward"),
    residual_training=native.operator("residual_training"),
    residual_backward=native.operator("residual_backward"),
    batch_statistics=native.operator("batch_statistics"),
    residual_plan=_residual_plan,
)
