"""The definition of a backend, and of the plan that it can tell."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..parameters import Gradients


@dataclass(frozen=True)
class Call:
    """The facts about a call that a plan depends on."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    channels_last: bool
    order: str
    gate: str
    sm: int | None = None  # plan for this NVIDIA compute capability, not for what is here

    @property
    def bytes(self) -> int:
        """The size of x."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def dtype_name(self) -> str:
        """Such as "float32"."""
        return str(self.dtype).removeprefix("torch.")


# Whose statistics a tail's norm takes: the batch's; its own, with gradients; its own, without.
MODES = ("training", "frozen", "evaluation")
# Whose statistics the norm of its shortcut takes.
STATISTICS = ("batch", "own")


class TailKind(NamedTuple):
    """The facts about a residual tail that its plan depends on, besides the call."""

    mode: str  # one of MODES
    shortcut: bool = True  # there is one
    shortcut_norm: str | None = None  # one of STATISTICS; None where it goes through no norm


@dataclass(frozen=True)
class Waves:
    """How the blocks of a launch fill a GPU: as many at a time as there are slots."""

    blocks: int
    slots: int
    waves: int
    efficiency: float  # of what the slots could do in these waves, the share that is work


@dataclass(frozen=True)
class Launch:
    """The launch of a GPU kernel."""

    grid: int
    threads: int  # of a block
    shared_bytes: int  # of a block
    waves: Waves
    backwards: bool  # over the batch, from the last image to the first
    in_l2: int  # bytes of what it reads that the launches before it should have left in L2


@dataclass(frozen=True)
class Pass:
    """One sweep over full-size tensors; ``reads`` and ``writes`` are in units of x's size."""

    name: str
    reads: int
    writes: int
    launch: Launch | None = None
    why: str | None = None  # the pass is there, if it touches no tensor of full size


@dataclass(frozen=True)
class Direction:
    """Forward or backward, pass by pass."""

    passes: tuple[Pass, ...]
    moved: int  # read from and written to memory, in units of x's size


@dataclass(frozen=True)
class Plan:
    """How a backend will run a call; ``details`` are its own facts."""

    forward: Direction
    backward: Direction
    details: dict[str, Any]


@dataclass(frozen=True)
class Backend:
    """One way to compute the operator.

    ``forward(x, parameters, order, gate)`` returns ``(y, channel_mean, pooled)``, and
    ``backward(dy, x, parameters, channel_mean, pooled, order, gate)`` the gradients of ``x`` and of
    the six parameters, which come in the order of ``Parameters``. ``x`` is contiguous or
    channels_last, ``dy`` in the same layout. What ``da_ops.checks.check_arguments`` refuses does
    not come to them, unless ``checks`` says that they refuse it, too. ``plan(call)`` says what they
    will do. ``residual_forward`` and ``residual_backward`` are those of the residual tail, the
    operators of these names; None where the backend has none, and "auto" takes the next one that
    has them. ``residual_forward_`` writes ``out`` over ``u``, so that less memory is touched; None
    where that gains nothing. ``residual_training`` is ``residual_forward`` by the batch's
    statistics, which updates running ones and adds one to the norm's ``num_batches_tracked``, if it
    has that; None where the backend leaves both to the caller. ``batch_statistics`` makes and keeps
    them alone, for a shortcut that is to go through a norm of its own; None where the operators
    above take no such shortcut.
    ``residual_plan(call, kind)`` is their plan; None where they make the passes of
    ``tail.tail_walks``, and each moves all that it reads and writes.

    ``missing()`` names a thing that it needs and this machine lacks. ``unfit()`` says why it cannot
    run on the devices that are there; it is asked once there is a tensor on one. ``for_auto`` is
    what "auto" takes in its place: of a backend that may fail as late as at run time a forgiving
    variant, which then says so and computes with plain PyTorch operations; of one that tuning found
    slower than another for some calls a variant that leaves those to the other.
    """

    name: str
    device_types: tuple[str, ...] | None  # None: all
    reason: str | None  # why it is not usable here; None if it is
    forward: Callable[..., tuple[Tensor, Tensor, Tensor]]
    backward: Callable[..., Gradients]
    plan: Callable[[Call], Plan]
    checks: bool = False
    missing: Callable[[], str | None] = lambda: None
    unfit: Callable[[], str | None] = lambda: None
    explicit_only: str | None = None  # why "auto" does not take it
    for_auto: Backend | None = None
    residual_forward: Callable[..., tuple[Tensor, ...]] | None = None
    residual_forward_: Callable[..., tuple[Tensor, Tensor]] | None = None
    residual_training: Callable[..., tuple[Tensor, ...]] | None = None
    residual_backward: Callable[..., list[Tensor]] | None = None
    batch_statistics: Callable[..., tuple[Tensor, Tensor]] | None = None
    residual_plan: Callable[[Call, TailKind], Plan] | None = None

    def serves(self, device_type: str) -> bool:
        return self.device_types is None or device_type in self.device_types
