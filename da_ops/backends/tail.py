"""The passes of the residual tail, fused and module by module, and the least that they can move."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from .base import Backend, Call, Direction, Pass, Plan, TailKind
from .eager import count_formula
from .schedule import SCHEDULES


class Step(NamedTuple):
    """A pass, with the names of the full-size tensors that it reads and writes."""

    name: str
    reads: tuple[str, ...]
    writes: tuple[str, ...]


class Walks(NamedTuple):
    """The passes of both directions. An image can go through all passes of a walk before the next
    image begins; between two walks come sums over the batch."""

    forward: tuple[tuple[Step, ...], ...]
    backward: tuple[tuple[Step, ...], ...]


def layer_walks(order: str) -> Walks:
    """Those of the layer."""
    return Walks(*((tuple(Step(*p[:3]) for p in passes),) for passes in SCHEDULES[order]))


def tail_walks(order: str, kind: TailKind, *, by_slab: bool = False) -> Walks:
    """Those of the residual tail, by the layer's schedule: statistics first where they are the
    batch's; sums of ``u`` in place of ``x``; the shortcut's gradient, written by the pass that
    reads ``dout`` and ``out``; what flows back through the spatial mask summed by channel as well,
    for the norm; ``out`` from ``u`` and the shortcut, ``du`` from that gradient, and from ``u``
    where the statistics depend on it. Without a shortcut nothing is written in between: ``u`` says
    what the ReLU let pass, to both passes that read ``dout``.

    What goes back through a shortcut's norm is written over the gradient that comes to it, after
    sums of both tensors. ``by_slab``: each of these two passes follows one of ``u`` slab by slab,
    and finds that gradient in cache.

    The order "none" is without attention.
    """
    sums: list[str] = []
    through: list[str] = []
    if order != "none":
        forward, backward = SCHEDULES[order]
        sums = [p.name for p in forward[:-1]]
        through = [p.name for p in backward[1:-1]]
        if SCHEDULES[order].masks.pixels and not any(p.sums.channels for p in backward[1:-1]):
            through.append("through the norm")
    of_u = [Step(name, ("u",), ()) for name in (*sums, *through)]
    batch, of_batch = kind.mode == "training", kind.shortcut_norm == "batch"
    relu = "ReLU and mask gradients"
    if kind.shortcut:
        scale = Step("scale, add, rectify", ("u", "shortcut"), ("out",))
        gradients = Step(relu, ("dout", "out", "u"), ("d_shortcut",))
        combine = Step("combine", ("d_shortcut", "u") if batch else ("d_shortcut",), ("du",))
    else:
        scale = Step("scale, rectify", ("u",), ("out",))
        gradients = Step(relu, ("dout", "u"), ())
        combine = Step("combine", ("dout", "u"), ("du",))
    normed = ((Step("statistics of the shortcut", ("shortcut",), ()),),) if of_batch else ()
    statistics = ((Step("statistics", ("u",), ()),),) if batch else ()
    to_out = (*normed, *statistics, (*of_u[: len(sums)], scale))
    more = of_u[len(sums) :]
    if kind.shortcut_norm is None:
        return Walks(to_out, ((gradients, *more), (combine,)))
    d = () if by_slab else ("d_shortcut",)
    both = (*d, "shortcut")
    its_sums = Step("sums for the shortcut's norm", both, ())
    its_combine = Step("combine for the shortcut", both if of_batch else d, ("d_shortcut",))
    if by_slab:
        return Walks(to_out, ((gradients, its_sums, *more), (combine, its_combine)))
    return Walks(to_out, ((gradients, *more), (combine,), (its_sums,), (its_combine,)))


def least(walks: Iterable[Iterable[Step]]) -> int:
    """What memory must move, in units of a tensor: each one once in a walk, and not read that the
    walk has written."""
    moved = 0
    for walk in walks:
        reads: set[str] = set()
        writes: set[str] = set()
        for step in walk:
            reads.update(set(step.reads) - writes)
            writes.update(step.writes)
        moved += len(reads) + len(writes)
    return moved


def floor(kind: TailKind | None) -> dict[str, int]:
    """The least that either direction can move, in units of x's size: of the layer where ``kind``
    is None, else of the tail, which needs sums over the batch where a norm takes its statistics."""
    if kind is None:
        walks = layer_walks("spatial_channel")
    else:
        walks = tail_walks("spatial_channel", kind, by_slab=True)
    batch = kind is not None and (kind.mode == "training" or kind.shortcut_norm == "batch")
    found = {}
    for name, passes in walks._asdict().items():
        found[name] = least(passes if batch else [[step for walk in passes for step in walk]])
    if kind is not None and kind.mode == "evaluation":
        del found["backward"]
    return found


def fused_plan(backend: Backend, call: Call, kind: TailKind) -> Plan:
    """How ``backend`` runs a residual tail in one operator a direction, and the statistics of a
    shortcut in one more."""
    if backend.residual_plan is not None:
        return backend.residual_plan(call, kind)
    forward, backward = (direction(walks, cached=0) for walks in tail_walks(call.order, kind))
    return Plan(forward, backward, {})


def held(walk: Sequence[Step]) -> int:
    """Of how many tensors a cache must hold an image so that no pass of this walk fetches it again:
    of all that are touched since a pass that touched what is read again; 0 where nothing is."""
    most = 0
    for at, step in enumerate(walk):
        for name in step.reads:
            touched: set[str] = set()
            for before in reversed(walk[:at]):
                touched.update(before.reads, before.writes)
                if name in touched:
                    most = max(most, len(touched))
                    break
    return most


def direction(walks: Iterable[Iterable[Step]], cached: int) -> Direction:
    """The passes of these walks, where a cache holds an image of so many tensors: what a walk reads
    again moves no more, if it is among them."""
    passes, moved = [], 0
    for walk in map(list, walks):
        passes += [Pass(s.name, len(s.reads), len(s.writes)) for s in walk]
        in_cache = 0 < held(walk) <= cached
        moved += least([walk]) if in_cache else sum(len(s.reads) + len(s.writes) for s in walk)
    return Direction(tuple(passes), moved)


def modules_plan(attention: Plan | None, kind: TailKind) -> Plan:
    """A tail whose modules PyTorch calls one by one, with this plan of the attention between its
    own batch norm, addition and ReLU."""
    nothing = Direction((), 0)
    between = Plan(nothing, nothing, {}) if attention is None else attention
    norm, norm_back = _batch_norm("batch norm", kind.mode == "training")
    relu, relu_back = Pass("ReLU", 1, 1), Pass("ReLU", 2, 1)
    addition = (Pass("addition", 2, 1),) if kind.shortcut else ()
    plan = Plan(
        _around((norm,), between.forward, (*addition, relu)),
        _around((relu_back,), between.backward, (norm_back,)),
        between.details,
    )
    return norm_before(plan, kind)


def norm_before(tail: Plan, kind: TailKind) -> Plan:
    """The tail, with the norm of its shortcut, if that has one, called before by PyTorch."""
    if kind.shortcut_norm is None:
        return tail
    norm, back = _batch_norm("batch norm of the shortcut", kind.shortcut_norm == "batch")
    forward, backward = _around((norm,), tail.forward, ()), _around((), tail.backward, (back,))
    return Plan(forward, backward, tail.details)


def _batch_norm(name: str, batch: bool) -> tuple[Pass, Pass]:
    """PyTorch's, forward and backward: it reads once for the batch's statistics or the gradients of
    its weights, and once more for its result."""
    return Pass(name, 1 + batch, 1), Pass(name, 3 + batch, 1)


def _around(first: tuple[Pass, ...], middle: Direction, last: tuple[Pass, ...]) -> Direction:
    own = sum(p.reads + p.writes for p in (*first, *last))
    return Direction((*first, *middle.passes, *last), own + middle.moved)


def plain_plan(order: str, gate: str, kind: TailKind) -> Plan:
    """The tail in plain PyTorch, with gradients by autograd."""
    attention = None if order == "none" else count_formula(order, gate)
    return modules_plan(attention, kind)
