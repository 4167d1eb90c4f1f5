"""What a call will do: who computes it, in which passes, and how near that is to the floor."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from .backends import BACKENDS, NAMES, faster, passed_over, select, unserved
from .backends.base import MODES, STATISTICS, Call, Direction, Pass, Plan, TailKind
from .backends.choice import CHOICE, without_kernel
from .backends.cuda import OLDEST
from .backends.tail import fused_plan, modules_plan, norm_before, plain_plan
from .backends.tuned import PLANS
from .checks import check_options, check_x
from .explanation import Explanation, Tail
from .layout import dense
from .module import DAModule
from .residual.fusible import fusible_now, is_frozen, takes_batch, unfused_modules
from .residual.module import DAResidual


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
    shortcut_norm: nn.Module | str | None = None,
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
        shortcut_norm: the norm that the shortcut goes through, as in a block that downsamples: a
            module beside ``norm`` or a :class:`DAResidual`; of a tail in general, whose statistics
            it takes, ``"batch"`` or its ``"own"``. Where one operator computes the tail but not
            this norm, it says why.

    A backend asked for by name is explained wherever its plan can be made, also where it could not
    run. Nothing is computed. "Bytes moved" are bytes read from and written to memory: a pass over
    data that is still in cache moves none. For the CUDA launches they count every pass in full, and
    what a pass should find in L2 is told beside it: what the launches before it left there, of the
    GPU's L2 seven tenths; nothing for the first of a direction, for what was there before is not
    known.

    Returns:
        an ``Explanation``: ``str()`` is for people, ``to_dict()`` and ``to_json()`` for programs.

    Raises:
        TypeError: ``x``, ``layer`` or a norm is of another type, or ``x`` of another dtype.
        ValueError: ``x`` is no such tensor, ``layer`` is for other channels, an argument has none
            of the values above, or two contradict each other.
        RuntimeError: the plan cannot be made here, for want of the compiled planner.
    """
    channels = check_x(x)
    layer, norm, kind = _parts(layer, norm, tail, shortcut, shortcut_norm)
    if layer is not None:
        order, gate, backend = layer.order, layer.gate, layer.backend
        _check_channels(layer, channels, x)
    elif norm is not None:
        order = "none"
    if kind is None and order == "none":
        raise ValueError(
            "da_attention: order='none' goes with a tail; name it, as by tail='training' or "
            "--tail training, or give a norm"
        )
    backend = str(backend)  # what is no text names none, and is refused as such
    bare = kind is not None and order == "none"
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
        on = x.device.type
        known = backend in BACKENDS
        chosen = backend
        if not known:
            for_tails = kind is not None and CHOICE.for_tails(backend, on).name
            chosen = for_tails or select(backend, on)
        unusable = unserved(chosen, on) if known else None
        better = NAMES[: NAMES.index(chosen)] if backend == "auto" else ()
        passed = {name: _passed_over(name, on, kind) for name in better}
    told = call, device or x.device.type, chosen, unusable, passed
    why = alone = None
    if kind is not None:
        why = _unfused(x, norm, shortcut_norm, layer, chosen)
        alone = None if why else _unfused_alone(x, shortcut_norm, kind, chosen)
    if kind is not None and why is None:
        fused_kind = kind._replace(shortcut_norm=None) if alone else kind
        plan = fused_plan(BACKENDS[chosen], call, fused_kind)
    elif kind is not None and bare:
        plan = modules_plan(None, kind)
    else:
        plan = BACKENDS[chosen].plan(call)
        if backend == "auto" and device is None:
            plan = _with_the_faster(plan, chosen, call, x.device)
        plan = plan if kind is None else modules_plan(plan, kind)
    fused = why is None and (layer is None or layer.unfused() is None)
    if fused and served is not seen:
        plan = _with_the_copy(plan, call)
    if kind is None:
        return Explanation(*told, plan)
    plan = norm_before(plan, kind) if alone else plan
    with_attention, without = (plain_plan(one, gate, kind) for one in (order, "none"))
    return Explanation(*told, plan, Tail(kind, why, alone, with_attention, without))


def _parts(
    layer: DAModule | DAResidual | None,
    norm: nn.Module | None,
    tail: str | None,
    shortcut: bool,
    shortcut_norm: nn.Module | str | None,
) -> tuple[DAModule | None, nn.Module | None, TailKind | None]:
    """Attention and norm of what is explained, and the kind of the tail if it is one."""
    if layer is not None and not isinstance(layer, (DAModule, DAResidual)):
        raise TypeError(
            "da_attention: layer must be a DAModule, a DAResidual or None, got "
            f"{type(layer).__name__}"
        )
    if norm is not None and not isinstance(norm, nn.Module):
        raise TypeError(
            f"da_attention: norm must be an nn.Module or None, got {type(norm).__name__}"
        )
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
        modules = [m for m in (layer, norm, shortcut_norm) if isinstance(m, nn.Module)]
        own = "frozen" if any(m.training for m in modules) else "evaluation"
        tail = "training" if takes_batch(norm) else own
    elif tail not in (None, *MODES):
        raise ValueError(
            f"da_attention: tail must be one of {', '.join(map(repr, MODES))}; got {tail!r}"
        )
    if tail is None and (shortcut_norm is not None or not shortcut):
        which = "shortcut_norm" if shortcut else "shortcut=False"
        raise ValueError(f"da_attention: {which} goes with a tail; name it or give a norm")
    if shortcut_norm is not None and not shortcut:
        raise ValueError(
            "da_attention: with a shortcut_norm, a shortcut is expected that goes through it; got "
            "shortcut=False; leave one of them out"
        )
    if tail is None:
        return attention, norm, None
    return attention, norm, TailKind(tail, shortcut, _statistics(shortcut_norm, norm))


def _statistics(shortcut_norm: nn.Module | str | None, norm: nn.Module | None) -> str | None:
    """Whose statistics the shortcut's norm takes: beside the tail's norm it is a module, too."""
    if shortcut_norm is None:
        return None
    if norm is None:
        if shortcut_norm not in STATISTICS:
            raise ValueError(
                "da_attention: without a norm, shortcut_norm must be one of "
                f"{', '.join(map(repr, STATISTICS))}, or None; got {shortcut_norm!r}"
            )
        return str(shortcut_norm)
    if not isinstance(shortcut_norm, nn.Module):
        raise TypeError(
            "da_attention: beside a norm, shortcut_norm must be an nn.Module or None, got "
            f"{shortcut_norm!r}"
        )
    return "batch" if takes_batch(shortcut_norm) else "own"


def _check_channels(layer: DAModule, channels: int, x: Tensor) -> None:
    """Raise ValueError unless a call of the layer takes so many channels; most gates take any."""
    weight = layer.gate_weight if layer.gate == "affine" else None
    if weight is not None and weight.numel() != channels:
        raise ValueError(
            f"da_attention: x must have the layer's {weight.numel()} channels, got shape "
            f"{list(x.shape)}"
        )


def _passed_over(name: str, device: str, kind: TailKind | None) -> str:
    reason = passed_over(name, device)
    if reason is None and kind is not None and BACKENDS[name].residual_forward is None:
        reason = without_kernel(name)
    return reason or "not asked for"


def _unfused(
    x: Tensor,
    norm: nn.Module | None,
    shortcut_norm: nn.Module | str | None,
    layer: DAModule | None,
    backend: str,
) -> str | None:
    """Why a tail's modules are called one by one, if they are."""
    if norm is not None and norm is shortcut_norm:
        return "the norm is the shortcut's, too"
    reason = _unfit(x, norm, layer)
    if reason is None and BACKENDS[backend].residual_forward is None:
        reason = without_kernel(backend)
    return reason


def _unfused_alone(
    x: Tensor, shortcut_norm: nn.Module | str | None, kind: TailKind, backend: str
) -> str | None:
    """Why a shortcut's norm is called before a tail that is fused, if it is."""
    if kind.shortcut_norm is None:
        return None
    norm = shortcut_norm if isinstance(shortcut_norm, nn.Module) else None
    reason = _unfit(x, norm, None)
    if reason is None and BACKENDS[backend].batch_statistics is None:
        reason = f"backend {backend!r} has no kernel of a shortcut's norm"
    if reason is None and kind.mode != "evaluation" and norm is not None and is_frozen(norm):
        reason = "backward through a FrozenBatchNorm2d does without the shortcut"
    return reason


def _unfit(x: Tensor, norm: nn.Module | None, layer: DAModule | None) -> str | None:
    """What of these keeps any kernel from computing what they do; None if nothing."""
    reason = None if norm is None else unfused_modules(norm, layer)
    if reason is None and not x.is_meta and not fusible_now(x, x, norm):
        reason = (
            f"a norm with tensors of {x.shape[1]} channels on {x.device}, in the dtype of u or "
            "float32 with half precision, and in training more than one value a channel, are "
            "expected"
        )
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
