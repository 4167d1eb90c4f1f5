"""The kernels put together: the operator forward and backward, for dense x and dy alike.

Imported when first used: `import da_ops` is quick, and does not want Triton.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from ...layout import empty_gradient
from ..base import Gradients
from ..schedule import NONE, SCHEDULES, Axes
from . import interpreter, maps, passes, tune
from .run import INTERPRETED, run
from .tiles import DEVICE, INTERPRETER, matrix, power_of_two, split, sum_tiles

if INTERPRETED:
    interpreter.mend()
LIMITS = INTERPRETER if INTERPRETED else DEVICE
TAP_SUMS = 32  # 19 numbers, up to a power of two

Parameters = tuple[Tensor | None, ...]


@dataclass(frozen=True)
class Shares:
    """A map's sums in parts, ``[N, count, length]``: what different programs summed."""

    sums: Tensor | None = None
    count: int = 0


NO_SHARES = Shares()


class Image:
    """The images of one call, the parameters, and the kernels over them.

    Maps are by pixel, ``[N, H, W]``, or by channel, ``[N, C]``, whichever of the two is rows.
    """

    def __init__(self, x: Tensor, parameters: Parameters, order: str, gate: str) -> None:
        self.n, self.channels, self.height, self.width = x.shape
        self.pixels = self.height * self.width
        channels_last = not x.is_contiguous()
        self.matrix = matrix(tuple(x.shape), x.element_size(), channels_last, LIMITS)
        double = x.dtype == torch.float64
        self.x = x
        self.dtype = torch.float64 if double else torch.float32
        large = self.matrix.rows * self.matrix.cols >= LIMITS.large
        self.types = {
            "INDEX": tl.int64 if large else tl.int32,
            "ACC": tl.float64 if double else tl.float32,
        }
        self.spatial, self.channel = SCHEDULES[order].masks
        self.gate = gate if self.channel else "sigmoid"
        given = [None if p is None else p.contiguous() for p in parameters]
        self.conv, self.dilated, self.merge, self.bias, self.gate_weight, self.gate_bias = given
        # Of a program's share of the gate's gradients, and of what its stencil reaches.
        self.taps = {"eca": 0 if given[4] is None else given[4].numel(), "scalar": 2}.get(gate, 0)

    def empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=self.dtype, device=self.x.device)

    def pixel_map(self) -> Tensor:
        return self.empty(self.n, self.height, self.width)

    def channel_map(self) -> Tensor:
        return self.empty(self.n, self.channels)

    def sums(
        self,
        x: Tensor,
        wanted: Axes,
        dy: Tensor | None = None,
        *,
        by_channel: Tensor | None = None,
        by_pixel: Tensor | None = None,
        backwards: bool = False,
    ) -> tuple[Shares, Shares]:
        """From one read of x, or of x and dy for their product t:

            pixels      sum_c by_channel[c] t, for each pixel
            channels    sum_p by_pixel[p] t, for each channel

        ``wanted`` says which. ``backwards``: the last image first, which of a large batch is what
        caches still hold.
        """
        m = self.matrix
        want_rows, want_cols = wanted.channels, wanted.pixels
        u, v = by_channel, by_pixel
        if m.by_pixel:
            want_rows, want_cols, u, v = want_cols, want_rows, v, u
        t = sum_tiles(m, self.n, LIMITS)
        options = {
            "GROUP": m.group,
            "VECTOR": m.vector,
            "BR": t.br,
            "BQ": t.bq,
            "BACKWARDS": backwards,
            **self.types,
        }
        row_shares = col_shares = NO_SHARES
        if want_cols:
            s = split(t.blocks, self.n * t.windows, LIMITS)
            col_shares = Shares(self.empty(self.n, s.splits * m.group, m.cols), s.splits * m.group)
            if want_rows:
                row_shares = Shares(self.empty(self.n, t.windows, m.rows), t.windows)
            run(
                passes.column_sums, self.n * s.splits * t.windows,
                x, dy, u, v if want_rows else None, col_shares.sums, row_shares.sums,
                self.n, m.rows, m.cols, t.windows, s.splits, s.each, **options,
            )  # fmt: skip
        else:
            s = split(t.windows, self.n * t.blocks, LIMITS)
            row_shares = Shares(self.empty(self.n, s.splits, m.rows), s.splits)
            run(
                passes.row_sums, self.n * t.blocks * s.splits,
                x, dy, v, row_shares.sums,
                self.n, m.rows, m.cols, t.blocks, s.splits, s.each, **options,
            )  # fmt: skip
        return (row_shares, col_shares) if m.by_pixel else (col_shares, row_shares)

    def scale(
        self,
        x: Tensor,
        y: Tensor,
        by_channel: Tensor | None,
        by_pixel: Tensor | None,
        add_by_channel: Tensor | None = None,
        add_by_pixel: Tensor | None = None,
        outer: Axes = NONE,
    ) -> None:
        """y = x by_channel by_pixel + add_by_channel + add_by_pixel; with ``outer`` pixels
        (x by_channel + add_by_channel) by_pixel + add_by_pixel, with channels the other way round.
        """
        m = self.matrix
        u, v, a, b = by_channel, by_pixel, add_by_channel, add_by_pixel
        if m.by_pixel:
            u, v, a, b = v, u, b, a
        order = "together"
        if any(outer):
            order = "rows" if outer.pixels != m.by_pixel else "columns"
        options = {"ORDER": order, "GROUP": m.group, "VECTOR": m.vector, "BACKWARDS": False}
        arguments = (x, y, u, v, a, b, self.n, m.rows, m.cols)
        tune.scale(m, self.n, arguments, {**options, **self.types}, LIMITS)

    def _blocks(self, spatial: bool, channel: bool) -> dict[str, int]:
        """How maps.py's kernels share out the pixels and the channels of an image."""
        reach = self.taps // 2 if self.gate == "eca" else 0
        bp = min(max(16, power_of_two(self.pixels)), LIMITS.pixel_block)
        bc = min(max(16, power_of_two(self.channels)), LIMITS.channel_block)
        return {
            "BP": bp,
            "CHUNK": min(bp, LIMITS.stencil_block),
            "BC": bc,
            "bands": -(-self.pixels // bp) if spatial else 0,
            "blocks": -(-self.channels // bc) if channel else 0,
            "steps": -(-min(bp + 2 * (3 * self.width + 3), self.pixels) // bp),
            "gate_steps": -(-min(bc + 2 * reach, self.channels) // bc),
        }

    def masks(
        self,
        m: Tensor | None = None,
        g: Tensor | None = None,
        m_shares: Shares = NO_SHARES,
        g_shares: Shares = NO_SHARES,
    ) -> tuple[Tensor | None, Tensor | None]:
        """The masks of the maps given, which where shares are given are computed from these."""
        s = None if m is None else self.pixel_map()
        c = None if g is None else self.channel_map()
        b = self._blocks(m is not None, g is not None)
        run(
            maps.masks, self.n * (b["bands"] + b["blocks"]),
            m_shares.sums, m_shares.count, m, s,
            self.conv, self.dilated, self.merge, self.bias,
            self.pixels, self.height, self.width, b["bands"], b["steps"],
            g_shares.sums, g_shares.count, g, c, self.gate_weight, self.gate_bias,
            self.taps, self.channels, b["blocks"], b["gate_steps"],
            GATE=self.gate, SPATIAL=m is not None, CHANNEL=g is not None,
            BP=b["BP"], CHUNK=b["CHUNK"], BC=b["BC"],
            MP=_parts(m_shares.count, b["BP"]), GP=_parts(g_shares.count, b["BC"]), **self.types,
        )  # fmt: skip
        return s, c

    def mask_gradients(
        self,
        back: Back,
        s: Tensor | None = None,
        ds: tuple[Shares, Shares] = (NO_SHARES, NO_SHARES),
        c: Tensor | None = None,
        dc: tuple[Shares, Shares] = (NO_SHARES, NO_SHARES),
    ) -> None:
        """Back through the masks given, into ``back``; ds and dc are the sums of two shares."""
        spatial, channel = s is not None, c is not None
        b = self._blocks(spatial, channel)
        run(
            maps.mask_gradients, self.n * (b["bands"] + b["blocks"]),
            ds[0].sums, ds[0].count, ds[1].sums, ds[1].count, s, back.dz, back.m, back.dm,
            back.tap_sums, self.conv, self.dilated, self.merge,
            self.pixels, self.height, self.width, b["bands"], b["steps"],
            dc[0].sums, dc[0].count, dc[1].sums, dc[1].count, c, back.dt, back.g, back.dg,
            back.gate_sums, self.gate_weight,
            self.taps, self.channels, b["blocks"], b["gate_steps"],
            GATE=self.gate, SPATIAL=spatial, CHANNEL=channel,
            BP=b["BP"], CHUNK=b["CHUNK"], BC=b["BC"],
            SP=_parts(max(ds[0].count, ds[1].count), b["BP"]),
            CP=_parts(max(dc[0].count, dc[1].count), b["BC"]), **self.types,
        )  # fmt: skip

    def parameter_gradients(self, back: Back) -> Parameters:
        given = (self.conv, self.dilated, self.merge, self.bias, self.gate_weight, self.gate_bias)
        results = [None if p is None else empty_gradient(p) for p in given]
        b = self._blocks(self.spatial, self.channel)
        length = self.channels if self.gate == "affine" else self.taps
        block = min(power_of_two(max(length, 2)), LIMITS.channel_block)
        programs = int(self.spatial) + (-(-length // block) if self.gate_weight is not None else 0)
        if programs:
            run(
                maps.parameter_gradients, programs,
                back.tap_sums, self.n * b["bands"], *given[:3], *results[:4],
                back.dt, back.g, back.gate_sums, self.n * b["blocks"], self.n, length, *results[4:],
                GATE=self.gate, SPATIAL=self.spatial, BC=block,
                PARTS=max(1, LIMITS.parts // max(block, TAP_SUMS)), ACC=self.types["ACC"],
            )  # fmt: skip
        return tuple(results)


class Back:
    """The small maps of the way back."""

    def __init__(self, image: Image, m: Tensor, g: Tensor) -> None:
        self.m = self.dz = self.dm = self.tap_sums = None
        self.g = self.dt = self.dg = self.gate_sums = None
        blocks = image._blocks(image.spatial, image.channel)
        if image.spatial:
            self.m, self.dz, self.dm = m, image.pixel_map(), image.pixel_map()
            self.tap_sums = image.empty(image.n, blocks["bands"], TAP_SUMS)
        if image.channel:
            self.g, self.dt, self.dg = g, image.channel_map(), image.channel_map()
            self.gate_sums = image.empty(image.n, blocks["blocks"], max(image.taps, 1))


def _parts(count: int, block: int) -> int:
    """Shares that are added at once."""
    return min(power_of_two(max(count, 1)), max(1, LIMITS.parts // block))


def forward(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """``forward(x, the six parameters, order, gate) -> (y, channel_mean, pooled)``"""
    *parameters, order, gate = arguments
    image = Image(x, tuple(parameters), order, gate)
    y = torch.empty_like(x)
    m = image.pixel_map() if image.spatial else None
    g = image.channel_map() if image.channel else None
    s = c = None
    for i, step in enumerate(SCHEDULES[order].forward if x.numel() else ()):
        if step.writes:
            image.scale(x, y, c, s)
            continue
        m_shares, g_shares = image.sums(x, step.sums, by_channel=c, by_pixel=s, backwards=i > 0)
        new_s, new_c = image.masks(
            m if step.complete.pixels else None,
            g if step.complete.channels else None,
            m_shares,
            g_shares,
        )
        s, c = new_s if s is None else s, new_c if c is None else c
    nothing = image.empty(0)
    return y, nothing if m is None else m, nothing.clone() if g is None else g


def backward(dy: Tensor, x: Tensor, *arguments: Any) -> Gradients:
    """``backward(dy, x, the six parameters, channel_mean, pooled, order, gate) -> (dx, and the
    parameters' gradients)``; None for what is absent."""
    *parameters, channel_mean, pooled, order, gate = arguments
    if x.numel() == 0:
        return (
            torch.empty_like(x),
            *(None if p is None else torch.zeros(p.shape, dtype=p.dtype, device=p.device)
              for p in parameters),
        )  # fmt: skip
    image = Image(x, tuple(parameters), order, gate)
    m = channel_mean.contiguous() if image.spatial else None
    g = pooled.contiguous() if image.channel else None
    s, c = image.masks(m, g)
    back = Back(image, channel_mean, pooled)
    dx = torch.empty_like(x)
    ds = dc = (NO_SHARES, NO_SHARES)
    for i, step in enumerate(SCHEDULES[order].backward):
        if step.writes:
            image.scale(dy, dx, c, s, back.dg, back.dm, SCHEDULES[order].outer)
        elif step.weights == "masks":
            by_pixel, by_channel = image.sums(x, step.sums, dy, by_channel=c, by_pixel=s)
            ds, dc = (by_pixel, NO_SHARES), (by_channel, NO_SHARES)
        else:
            by_pixel, by_channel = image.sums(
                x, step.sums, by_channel=back.dg, by_pixel=back.dm, backwards=i > 0
            )
            ds, dc = (ds[0], by_pixel), (dc[0], by_channel)
        if any(step.complete):
            image.mask_gradients(
                back, s if step.complete.pixels else None, ds,
                c if step.complete.channels else None, dc,
            )  # fmt: skip
    return dx, *image.parameter_gradients(back)
