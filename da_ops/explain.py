"""What a call will do: who computes it, in which passes, and how near that is to the floor."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .backends import BACKENDS, NAMES, passed_over, select, unserved
from .backends.base import Call, Direction, Plan
from .backends.cuda import OLDEST
from .checks import check_options
from .module import DAModule

# Nothing can do with less: read x and write y; read dy and x and write dx.
FLOOR = {"forward": 2, "backward": 3}


@dataclass(frozen=True)
class Explanation:
    """The answer of :func:`explain`; ``str()`` for people, ``to_dict()`` for programs."""

    call: Call
    device: str
    backend: str
    unusable: str | None  # why the backend asked for cannot serve x here
    passed_over: dict[str, str]
    plan: Plan

    def to_dict(self) -> dict[str, Any]:
        """Plain data, sizes in bytes."""
        return {
            "shape": list(self.call.shape),
            "dtype": str(self.call.dtype).removeprefix("torch."),
            "layout": "channels_last" if self.call.channels_last else "contiguous",
            "order": self.call.order,
            "gate": self.call.gate,
            "device": self.device,
            "backend": self.backend,
            "unusable": self.unusable,
            "passed_over": self.passed_over,
            "forward": self._direction("forward", self.plan.forward),
            "backward": self._direction("backward", self.plan.backward),
            "details": self.plan.details,
        }

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2)

    def _direction(self, name: str, direction: Direction) -> dict[str, Any]:
        floor = FLOOR[name] * self.call.bytes
        moved = direction.moved * self.call.bytes
        return {
            "passes": [asdict(p) for p in direction.passes],
            "bytes_moved": moved,
            "floor_bytes": floor,
            "percent_of_floor": 100 * FLOOR[name] / max(direction.moved, FLOOR[name]),
        }

    def __str__(self) -> str:
        d = self.to_dict()
        shape = "x".join(map(str, d["shape"]))
        lines = [
            f"x {shape} {d['dtype']} {d['layout']} on {d['device']}, {_mib(self.call.bytes)}; "
            f"order {d['order']}, gate {d['gate']}",
            f"backend {d['backend']}" + (f", not usable: {self.unusable}" if self.unusable else ""),
            *(f"  not {name}: {reason}" for name, reason in d["passed_over"].items()),
        ]
        for name in FLOOR:
            way = d[name]
            lines.append(
                f"{name}: {_mib(way['bytes_moved'])} moved, floor {_mib(way['floor_bytes'])} "
                f"({way['percent_of_floor']:.0f}% of the floor's speed if memory-bound)"
            )
            lines += map(_line, way["passes"])
        if d["details"]:
            lines.append("plan: " + ", ".join(f"{k} {v}" for k, v in d["details"].items()))
        return "\n".join(lines)


def _line(p: dict[str, Any]) -> str:
    line = f"  {p['name']:24s} reads {p['reads']}, writes {p['writes']}"
    if launch := p["launch"]:
        line += f", {launch['grid']} blocks of {launch['threads']} threads"
        line += f" with {launch['shared_bytes'] / 1024:.1f} KiB shared memory"
        line += f", {_waves(launch['waves'])}"
    if p["why"]:
        line += f"; {p['why']}"
    return line


def _waves(w: dict[str, Any]) -> str:
    """Work is what the slots do until the last block is done; in less than a wave, some idle."""
    slots, share = f"{w['slots']} at once", f"{w['efficiency']:.0%}"
    if w["blocks"] < w["slots"]:
        return f"{slots}: less than a wave, {share} of it in use"
    return f"{slots}: {w['waves']} wave{'s' * (w['waves'] != 1)}, {share} full"


def explain(
    x: Tensor,
    *,
    order: str = "spatial_channel",
    gate: str = "affine",
    backend: str = "auto",
    device: str | None = None,
    layer: DAModule | None = None,
) -> Explanation:
    """Which backend serves ``x`` and why no better one, its passes over memory, and the floor.

    Args:
        x: ``[N, C, H, W]``; only its shape, dtype, layout and device are looked at.
        order, gate, backend: as for :func:`da_ops.da_attention`; those of ``layer`` where there is
            one.
        device: an NVIDIA architecture such as ``"sm_90"``: what the ``cuda`` backend does on a
            typical GPU of it, whatever device ``x`` is on; also where there is none.
        layer: whose call is explained; it may be one that no kernel serves, for what its
            convolutions have become.

    A backend asked for by name is explained wherever its plan can be made, also where it could not
    run. Nothing is computed. "Bytes moved" are bytes read from and written to memory: a pass over
    data that is still in cache moves none.
    """
    if not isinstance(x, Tensor) or x.dim() != 4:
        got = list(x.shape) if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"da_attention: x must be a tensor [N, C, H, W], got {got}")
    if layer is not None:
        order, gate, backend = layer.order, layer.gate, layer.backend
    check_options(order, gate)
    channels_last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    call = Call(tuple(x.shape), x.dtype, channels_last, order, gate)
    if device is not None:
        call = replace(call, sm=_capability(device))
        if backend not in ("auto", "cuda"):
            raise ValueError(
                f"da_attention: device {device!r} goes with backend 'cuda'; got {backend!r}"
            )
        return Explanation(call, device, "cuda", None, {}, BACKENDS["cuda"].plan(call))
    device = x.device.type
    if layer is not None and (reason := layer.unfused()) is not None:
        others = {name: reason for name in NAMES if name != "eager"}
        return Explanation(call, device, "eager", None, others, BACKENDS["eager"].plan(call))
    known = backend in BACKENDS
    chosen = backend if known else select(backend, device)
    better = NAMES[: NAMES.index(chosen)] if backend == "auto" else ()
    return Explanation(
        call,
        device,
        chosen,
        unserved(chosen, device) if known else None,
        {name: passed_over(name, device) or "not asked for" for name in better},
        BACKENDS[chosen].plan(call),
    )


def _capability(device: str) -> int:
    digits = device.removeprefix("sm_")
    if digits == device or not digits.isdecimal() or int(digits) < OLDEST:
        raise ValueError(
            "da_attention: device must be an NVIDIA architecture from 'sm_75' on, such as 'sm_90'; "
            f"got {device!r}"
        )
    return int(digits)


def _mib(n: int) -> str:
    return f"{n / 2**20:.1f} MiB"
