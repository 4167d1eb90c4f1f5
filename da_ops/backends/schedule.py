"""What the operator does, in which order: csrc/schedule.h for Python. explain tells it,
and the Triton backend runs by it.

A backend walks the passes of an order in place of knowing the orders.
"""

from __future__ import annotations

from typing import NamedTuple


class Axes(NamedTuple):
    """The axes of an image that have something: a mask, sums."""

    pixels: bool
    channels: bool


class Pass(NamedTuple):
    """One read of full-size tensors, for sums over them or for the result."""

    name: str
    reads: tuple[str, ...]  # tensors
    writes: tuple[str, ...]
    weights: str  # of its sums: "masks", ones for an axis that has none yet, or "terms" of dx
    sums: Axes  # which it makes; backward's second come on top of its first
    complete: Axes  # whose map is made of its sums before the next pass


class Schedule(NamedTuple):
    forward: tuple[Pass, ...]
    backward: tuple[Pass, ...]

    @property
    def masks(self) -> Axes:
        """Which masks the order has."""
        return self.backward[0].sums

    @property
    def outer(self) -> Axes:
        """The axis whose mask also multiplies the other axis' term in dx."""
        last = self.backward[-2].complete
        return NONE if last == BOTH else last


NONE, PIXELS, CHANNELS, BOTH = (
    Axes(False, False),
    Axes(True, False),
    Axes(False, True),
    Axes(True, True),
)

# The rest is generated: python -m build_tools.schedule
SCHEDULES = {
    "spatial_channel": Schedule(
        forward=(
            Pass("channel mean", ("x",), (), "masks", PIXELS, PIXELS),
            Pass("pooling", ("x",), (), "masks", CHANNELS, CHANNELS),
            Pass("scale", ("x",), ("y",), "masks", NONE, NONE),
        ),
        backward=(
            Pass("mask gradients", ("dy", "x"), (), "masks", BOTH, CHANNELS),
            Pass("through the pooling", ("x",), (), "terms", PIXELS, PIXELS),
            Pass("combine", ("dy",), ("dx",), "masks", NONE, NONE),
        ),
    ),
    "channel_spatial": Schedule(
        forward=(
            Pass("pooling", ("x",), (), "masks", CHANNELS, CHANNELS),
            Pass("channel mean", ("x",), (), "masks", PIXELS, PIXELS),
            Pass("scale", ("x",), ("y",), "masks", NONE, NONE),
        ),
        backward=(
            Pass("mask gradients", ("dy", "x"), (), "masks", BOTH, PIXELS),
            Pass("through the channel mean", ("x",), (), "terms", CHANNELS, CHANNELS),
            Pass("combine", ("dy",), ("dx",), "masks", NONE, NONE),
        ),
    ),
    "parallel": Schedule(
        forward=(
            Pass("channel mean and pooling", ("x",), (), "masks", BOTH, BOTH),
            Pass("scale", ("x",), ("y",), "masks", NONE, NONE),
        ),
        backward=(
            Pass("mask gradients", ("dy", "x"), (), "masks", BOTH, BOTH),
            Pass("combine", ("dy",), ("dx",), "masks", NONE, NONE),
        ),
    ),
    "spatial": Schedule(
        forward=(
            Pass("channel mean", ("x",), (), "masks", PIXELS, PIXELS),
            Pass("scale", ("x",), ("y",), "masks", NONE, NONE),
        ),
        backward=(
            Pass("mask gradients", ("dy", "x"), (), "masks", PIXELS, PIXELS),
            Pass("combine", ("dy",), ("dx",), "masks", NONE, NONE),
        ),
    ),
    "channel": Schedule(
        forward=(
            Pass("pooling", ("x",), (), "masks", CHANNELS, CHANNELS),
            Pass("scale", ("x",), ("y",), "masks", NONE, NONE),
        ),
        backward=(
            Pass("mask gradients", ("dy", "x"), (), "masks", CHANNELS, CHANNELS),
            Pass("combine", ("dy",), ("dx",), "masks", NONE, NONE),
        ),
    ),
}
