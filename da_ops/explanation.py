"""What explain answers, for people and for programs."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

from .backends.base import Call, Direction, Plan, TailKind
from .backends.tail import floor

_IN = {"training": "in training", "frozen": "with a frozen norm", "evaluation": "in evaluation"}
_BY = {"batch": "the batch's", "own": "its own"}


@dataclass(frozen=True)
class Tail:
    """What there is to a residual tail beside its plan."""

    kind: TailKind
    unfused: str | None  # why its modules are called one by one, if they are
    norm_unfused: str | None  # why the norm of its shortcut alone is called before, if it is
    plain: Plan  # the same in plain PyTorch
    bare: Plan  # that without attention


@dataclass(frozen=True)
class Explanation:
    """The answer of :func:`da_ops.explain`; ``str()`` for people, ``to_dict()`` for programs."""

    call: Call
    device: str
    backend: str
    unusable: str | None  # why the backend asked for cannot serve x here
    passed_over: dict[str, str]
    plan: Plan
    tail: Tail | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain data, sizes in bytes."""
        return {
            "shape": list(self.call.shape),
            "dtype": self.call.dtype_name,
            "layout": "channels_last" if self.call.channels_last else "contiguous",
            "order": self.call.order,
            "gate": None if self.call.order == "none" else self.call.gate,
            "tail": self._tail(),
            "device": self.device,
            "backend": self.backend,
            "unusable": self.unusable,
            "passed_over": self.passed_over,
            "forward": self._direction("forward"),
            "backward": self._direction("backward"),
            "details": self.plan.details,
        }

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2)

    def _floor(self) -> dict[str, int]:
        return floor(None if self.tail is None else self.tail.kind)

    def _direction(self, name: str) -> dict[str, Any] | None:
        units = self._floor().get(name)
        if units is None:
            return None
        direction: Direction = getattr(self.plan, name)
        return {
            "passes": [asdict(p) for p in direction.passes],
            "bytes_moved": direction.moved * self.call.bytes,
            "floor_bytes": units * self.call.bytes,
            "percent_of_floor": 100 * units / max(direction.moved, units),
        }

    def _tail(self) -> dict[str, Any] | None:
        if self.tail is None:
            return None
        beside = {"plain": self.tail.plain, "plain_without_attention": self.tail.bare}
        return {
            **self.tail.kind._asdict(),
            "unfused": self.tail.unfused,
            "shortcut_norm_unfused": self.tail.norm_unfused,
            **{
                f"{name}_bytes": {
                    way: getattr(plan, way).moved * self.call.bytes for way in self._floor()
                }
                for name, plan in beside.items()
            },
        }

    def __str__(self) -> str:
        d = self.to_dict()
        shape = "x".join(map(str, d["shape"]))
        name, tail = ("x", "") if self.tail is None else ("u", _words(self.tail.kind))
        masks = "no attention" if d["gate"] is None else f"order {d['order']}, gate {d['gate']}"
        lines = [
            f"{name} {shape} {d['dtype']} {d['layout']} on {d['device']}, "
            f"{_mib(self.call.bytes)}; {masks}{tail}",
            f"backend {d['backend']}" + (f", not usable: {self.unusable}" if self.unusable else ""),
            *(f"  not {name}: {reason}" for name, reason in d["passed_over"].items()),
        ]
        if self.tail is not None:
            lines.append(self._parts(self.tail))
        for name in self._floor():
            way = d[name]
            lines.append(
                f"{name}: {_mib(way['bytes_moved'])} moved, floor {_mib(way['floor_bytes'])} "
                f"({way['percent_of_floor']:.0f}% of the floor's speed if memory-bound)"
            )
            width = max(24, *(len(p["name"]) for p in way["passes"]))
            lines += (_line(p, self.call.bytes, width) for p in way["passes"])
        if self.tail is not None:
            plain, bare = (
                _mib(sum(d["tail"][f"{key}_bytes"].values()))
                for key in ("plain", "plain_without_attention")
            )
            lines.append(f"in plain PyTorch: {plain} moved, {bare} without attention")
        if d["details"]:
            lines.append("plan: " + ", ".join(f"{k} {v}" for k, v in d["details"].items()))
        return "\n".join(lines)

    def _parts(self, tail: Tail) -> str:
        """What of the tail is fused, in words."""
        parts = ["norm"] if self.call.order == "none" else ["norm", "attention"]
        if tail.kind.shortcut_norm is not None and tail.norm_unfused is None:
            parts.append("shortcut's norm")
        told = ", ".join([*parts, "addition and ReLU" if tail.kind.shortcut else "ReLU"])
        if tail.unfused is not None:
            return f"{told} one by one, not fused: {tail.unfused}"
        told += " fused in one operator"
        if tail.norm_unfused is not None:
            told += f"; the shortcut's norm is called before, not fused: {tail.norm_unfused}"
        return told


def _words(kind: TailKind) -> str:
    words = f"; the tail {_IN[kind.mode]}"
    if kind.shortcut_norm is not None:
        words += f", the shortcut's norm by {_BY[kind.shortcut_norm]} statistics"
    return words


def _line(p: dict[str, Any], size: int, width: int) -> str:
    line = f"  {p['name']:{width}s} reads {p['reads']}, writes {p['writes']}"
    if launch := p["launch"]:
        line += f", {_blocks(launch)} blocks of {launch['threads']} threads"
        line += f" with {launch['shared_bytes'] / 1024:.1f} KiB shared memory"
        line += f", {_waves(launch['waves'])}"
        if p["reads"]:
            line += "; from the last image on" * launch["backwards"]
            share = launch["in_l2"] / max(p["reads"] * size, 1)
            line += f"; {_mib(launch['in_l2'])} ({share:.0%}) of what it reads expected in L2"
    if p["why"]:
        line += f"; {p['why']}"
    return line


def _blocks(launch: dict[str, Any]) -> str:
    """Those of the waves, and any that do something else besides, which fill no wave."""
    alike, more = launch["waves"]["blocks"], launch["grid"] - launch["waves"]["blocks"]
    return f"{alike} + {more}" if more > 0 and alike > 0 else str(launch["grid"])


def _waves(w: dict[str, Any]) -> str:
    """Work is what the slots do until the last block is done; in less than a wave, some idle."""
    slots, share = f"{w['slots']} at once", f"{w['efficiency']:.0%}"
    if w["blocks"] < w["slots"]:
        return f"{slots}: less than a wave, {share} of it in use"
    return f"{slots}: {w['waves']} wave{'s' * (w['waves'] != 1)}, {share} full"


def _mib(n: int) -> str:
    return f"{n / 2**20:.1f} MiB"
