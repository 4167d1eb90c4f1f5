"""What a call will do: who computes it, in which passes, and how near that is to the floor."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from .backends import BACKENDS, NAMES, faster, passed_over, select, unserved
from .backends.base import Call, Direction, Pass, Plan
from .backends.choice import CHOICE, without_kernel
from .backends.cuda import OLDEST
from .backends.tail import MODES, floor, fused_plan, modules_plan, plain_plan
from .backends.tuned import PLANS
from .checks import check_options, check_x
from .layout import dense
from .module import DAModule
from .residual.fusible import fusible_now, takes_batch, unfused_modules
from .residual.module import DAResidual

_IN = {"training": "in training", "frozen": "with a frozen norm", "evaluation": "in evaluation"}


@dataclass(frozen=True)
class Tail:
    """What there is to a residual tail beside its plan."""

    mode: str
    shortcut: bool  # there is one
    unfused: str | None  # why its modules are called one by one, if they are
    plain: Plan  # the same in plain PyTorch
    bare: Plan  # that without attention


@dataclass(frozen=True)
class Explanation:
    """The answer of :func:`explain`; ``str()`` for people, ``to_dict()`` for programs."""

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
            "dtype": str(self.call.dtype).removeprefix("torch."),
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
        if self.tail is None:
            return floor(None)
        return floor(self.tail.mode, shortcut=self.tail.shortcut)

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
            "mode": self.tail.mode,
            "shortcut": self.tail.shortcut,
            "unfused": self.tail.unfused,
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
        name, tail = ("x", "") if self.tail is None else ("u", f"; the tail {_IN[self.tail.mode]}")
        masks = "no attention" if d["gate"] is None else f"order {d['order']}, gate {d['gate']}"
        lines = [
            f"{name} {shape} {d['dtype']} {d['layout']} on {d['device']}, "
            f"{_mib(self.call.bytes)}; {masks}{tail}",
            f"backend {d['backend']}" + (f", not usable: {self.unusable}" if self.unusable else ""),
            *(f"  not {name}: {reason}" for name, reason in d["passed_over"].items()),
        ]
        if self.tail is not None:
            why = self.tail.unfused
            lines.append(
                ("norm, " if d["gate"] is None else "norm, attention, ")
                + ("addition and ReLU " if self.tail.shortcut else "ReLU ")
                + ("fused in one operator" if why is None else f"one by one, not fused: {why}")
            )
        for name in self._floor():
            way = d[name]
            lines.append(
                f"{name}: {_mib(way['bytes_moved'])} moved, floor {_mib(way['floor_bytes'])} "
                f"({way['percent_of_floor']:.0f}% of the floor's speed if memory-bound)"
            )
            lines += (_line(p, self.call.bytes) for p in way["passes"])
        if self.tail is not None:
            plain, bare = (
                _mib(sum(d["tail"][f"{key}_bytes"].values()))
                for key in ("plain", "plain_without_attention")
            )
            lines.append(f"in plain PyTorch: {plain} moved, {bare} without attention")
        if d["details"]:
            lines.append("plan: " + ", ".join(f"{k} {v}" for k, v in d["details"].items()))
        return "\n".join(lines)


def _line(p: dict[str, Any], size: int) -> str:
    line = f"  {p['name']:24s} reads {p['reads']}, writes {p['writes']}"
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


def explain(
    x: Tensor,
    *,
    order: str = "spatial_channel",
    gate: str = "affine",
    backend: str = "auto",
    device: str | None = None,
    layer: DAModule | DAResidual | None = None,
    norm: nn.Module | None = None,
    tail: str | None = None,
    shortcut: bool = True,
) -> Explanation:
    """Which backend serves ``x`` and why no better one, its passes over memory, and the floor.

    Of the layer, or of the residual tail, ``relu(attention(norm(u)) + shortcut)``: then ``x`` is
    ``u``, and it says whether one operator computes all, or else why not, and what the same moves
    in plain PyTorch, with attention and without.

    Args:
        x: ``[N, C, H, W]``; only its shape, dtype, layout and device are looked at.
        order, gate, backend: as for :func:`da_ops.da_attention`; those of ``layer`` where there is
            one. The order ``"none"`` is a tail without attention.
        device: an NVIDIA architecture such as ``"sm_90"``: what the ``cuda`` backend does on a
            typical GPU of it, whatever device ``x`` is on; also where there is none.
        layer: whose call is explained; it may be one that no kernel serves, for what its
            convolutions have become. Of a :class:`DAResidual` the tail is explained.
        norm: the tail of this norm and ``layer``, None for no attention, is explained, as
            :func:`da_ops.residual_attention` would compute it.
        tail: a tail in general: ``"training"``, in which the norm takes the batch's statistics;
            ``"frozen"``, its own ones; ``"evaluation"``, these and no gradients. Modules say so
            themselves, by ``training``.
        shortcut: whether the tail has one to add.

    A backend asked for by name is explained wherever its plan can be made, also where it could not
    run. Nothing is computed. "Bytes moved" are bytes read from and written to memory: a pass over
    data that is still in cache moves none. For the CUDA launches they count every pass in full, and
    what a pass should find in L2 is told beside it: what the launches before it left there, of the
    GPU's L2 seven tenths; nothing for the first of a direction, for what was there before is not
    known.

    Raises:
        TypeError: ``x``, ``layer`` or ``norm`` is of another type, or ``x`` of another dtype.
        ValueError: ``x`` is no such tensor, ``layer`` is for other channels, or an argument has
            none of the values above.
        RuntimeError: the plan cannot be made here, for want of the compiled planner.
    """
    channels = check_x(x)
    layer, norm, tail = _parts(layer, norm, tail)
    if layer is not None:
        order, gate, backend = layer.order, layer.gate, layer.backend
        _check_channels(layer, channels, x)
    elif norm is not None:
        order = "none"
    if tail is None and not shortcut:
        raise ValueError("da_attention: shortcut=False goes with a tail; name it or give a norm")
    if tail is None and order == "none":
        raise ValueError(
            "da_attention: order='none' goes with a tail; name it, as by tail='training' or "
            "--tail training, or give a norm"
        )
    backend = str(backend)  # what is no text names none, and is refused as such
    bare = tail is not None and order == "none"
    check_options("channel" if bare else order, gate)
    seen = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")
    served = dense(seen)  # what the kernels get: x itself, or a copy
    channels_last = not served.is_contiguous()
    call = Call(tuple(x.shape), x.dtype, channels_last, order, "sigmoid" if bare else gate)
    unusable, passed = None, {}
    if device is not None:
        call, chosen = replace(call, sm=_capability(device)), "cuda"
        if backend not in ("auto", chosen):
            raise ValueError(
                f"da_attention: device {device!r} goes with backend 'cuda'; got {backend!r}"
            )
    elif layer is not None and (reason := layer.unfused()) is not None:
        chosen, passed = "eager", {name: reason for name in NAMES if name != "eager"}
    else:
        kind = x.device.type
        known = backend in BACKENDS
        chosen = backend
        if not known:
            for_tails = tail is not None and CHOICE.for_tails(backend, kind).name
            chosen = for_tails or select(backend, kind)
        unusable = unserved(chosen, kind) if known else None
        better = NAMES[: NAMES.index(chosen)] if backend == "auto" else ()
        passed = {name: _passed_over(name, kind, tail) for name in better}
    told = call, device or x.device.type, chosen, unusable, passed
    why = None if tail is None else _unfused(x, norm, layer, chosen)
    if tail is not None and why is None:
        plan = fused_plan(BACKENDS[chosen], call, tail, shortcut=shortcut)
    elif bare:
        plan = modules_plan(None, str(tail), shortcut=shortcut)
    else:
        plan = BACKENDS[chosen].plan(call)
        if backend == "auto" and device is None:
            plan = _with_the_faster(plan, chosen, call, x.device)
        plan = plan if tail is None else modules_plan(plan, tail, shortcut=shortcut)
    fused = why is None and (layer is None or layer.unfused() is None)
    if fused and served is not seen:
        plan = _with_the_copy(plan, call)
    if tail is None:
        return Explanation(*told, plan)
    with_attention, without = (
        plain_plan(one, gate, tail, shortcut=shortcut) for one in (order, "none")
    )
    return Explanation(*told, plan, Tail(tail, shortcut, why, with_attention, without))


def _parts(
    layer: DAModule | DAResidual | None, norm: nn.Module | None, tail: str | None
) -> tuple[DAModule | None, nn.Module | None, str | None]:
    """Attention and norm of what is explained, and the mode of the tail if it is one."""
    if layer is not None and not isinstance(layer, (DAModule, DAResidual)):
        raise TypeError(
            "da_attention: layer must be a DAModule, a DAResidual or None, got "
            f"{type(layer).__name__}"
        )
    if norm is not None and not isinstance(norm, nn.Module):
        raise TypeError(
            f"da_attention: norm must be an nn.Module or None, got {type(norm).__name__}"
        )
    modules = [module for module in (layer, norm) if module is not None]
    attention = layer.attention if isinstance(layer, DAResidual) else layer
    if isinstance(layer, DAResidual):
        if norm is not None:
            raise ValueError(
                "da_attention: norm goes with a DAModule or None, got a DAResidual, which has one; "
                "leave it out"
            )
        norm = layer.norm
    if norm is not None:
        if tail is not None:
            raise ValueError(
                "da_attention: tail goes without a norm, whose mode is explained; got "
                f"tail={tail!r}; leave one of them out"
            )
        if takes_batch(norm):
            return attention, norm, "training"
        return attention, norm, "frozen" if any(m.training for m in modules) else "evaluation"
    if tail not in (None, *MODES):
        raise ValueError(
            f"da_attention: tail must be one of {', '.join(map(repr, MODES))}; got {tail!r}"
        )
    return attention, norm, tail


def _check_channels(layer: DAModule, channels: int, x: Tensor) -> None:
    """Raise ValueError unless a call of the layer takes so many channels; most gates take any."""
    weight = layer.gate_weight if layer.gate == "affine" else None
    if weight is not None and weight.numel() != channels:
        raise ValueError(
            f"da_attention: x must have the layer's {weight.numel()} channels, got shape "
            f"{list(x.shape)}"
        )


def _passed_over(name: str, device: str, tail: str | None) -> str:
    reason = passed_over(name, device)
    if reason is None and tail is not None and BACKENDS[name].residual_forward is None:
        reason = without_kernel(name)
    return reason or "not asked for"


def _unfused(x: Tensor, norm: nn.Module | None, layer: DAModule | None, backend: str) -> str | None:
    """Why a tail's modules are called one by one, if they are."""
    reason = None if norm is None else unfused_modules(norm, layer)
    if reason is None and not x.is_meta and not fusible_now(x, x, norm):
        reason = (
            f"a norm with tensors of {x.shape[1]} channels on {x.device}, in the dtype of u or "
            "float32 with half precision, and in training more than one value a channel, are "
            "expected"
        )
    if reason is None and BACKENDS[backend].residual_forward is None:
        reason = without_kernel(backend)
    return reason


def _with_the_faster(plan: Plan, chosen: str, call: Call, device: torch.device) -> Plan:
    """The plan, with what another backend computes since tuning found that faster."""
    forward, backward = (faster(chosen, call, way, device) for way in (False, True))
    if forward == backward == chosen:
        return plan
    first, second = BACKENDS[forward].plan(call), BACKENDS[backward].plan(call)
    details = first.details if forward == backward else plan.details
    tuned = PLANS.words(chosen, call, by_others=True)
    return Plan(first.forward, second.backward, {**details, **tuned})


def _with_the_copy(plan: Plan, call: Call) -> Plan:
    """The plan, with the copy that is made first where x is in neither layout of the kernels."""
    layout = "channels_last" if call.channels_last else "contiguous"
    copy, own = Pass(f"copy to {layout}", 1, 1), plan.forward
    return replace(plan, forward=Direction((copy, *own.passes), 2 + own.moved))


def _capability(device: object) -> int:
    digits = device.removeprefix("sm_") if isinstance(device, str) else ""
    # No architecture has more than three, and the planner takes no number of any size.
    known = digits != device and digits.isdecimal() and len(digits) <= 3
    if not known or int(digits) < OLDEST:
        raise ValueError(
            "da_attention: device must be an NVIDIA architecture from 'sm_75' on, such as 'sm_90'; "
            f"got {device!r}"
        )
    return int(digits)


def _mib(n: int) -> str:
    return f"{n / 2**20:.1f} MiB"
