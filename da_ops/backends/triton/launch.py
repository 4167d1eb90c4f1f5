"""The kernels put together: the operator forward and backward, for dense x and dy alike.

Imported when first used, so that `import da_ops` is quick and does not want Triton.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from ...layout import empty_gradient
from ...parameters import Gradients, Parameters
from ..schedule import NONE, SCHEDULES, Axes
from . import interpreter, maps, passes, tune
from .maps import AxisMaps, Blocks, Normed, Shares, Size
from .passes import Affine, Ends
from .run import INTERPRETED, run
from .tiles import DEVICE, INTERPRETER, matrix, power_of_two, split, sum_tiles

if INTERPRETED:
    interpreter.mend()
LIMITS = INTERPRETER if INTERPRETED else DEVICE


class ByAxis(NamedTuple):
    """Something for each axis, None where an axis has none."""

    pixels: Any = None
    channels: Any = None


NOTHING = ByAxis()
NO_SHARES = ByAxis(Shares(), Shares())
NO_ENDS = Ends()
NO_NORM = Normed()


class Batch:
    """The images of one call, the parameters, and the kernels over them.

    Maps are by pixel, ``[N, H, W]``, or by channel, ``[N, C]``, whichever of the two is rows.
    """

    norm: Affine | None = None  # what gives x from the tensor that is read, in the residual tail

    def __init__(self, x: Tensor, parameters: Parameters, order: str, gate: str) -> None:
        self.images, channels, height, width = x.shape
        self.size = Size(channels, height * width, height, width)
        channels_last = not x.is_contiguous()
        shape = tuple(x.shape)
        self.matrix = matrix(shape, x.element_size(), channels_last=channels_last, limits=LIMITS)
        double = x.dtype == torch.float64
        self.device = x.device
        self.dtype = torch.float64 if double else torch.float32
        large = self.matrix.rows * self.matrix.cols >= LIMITS.large
        self.types = {
            "INDEX": tl.int64 if large else tl.int32,
            "ACC": tl.float64 if double else tl.float32,
        }
        self.axes = NONE if order == "none" else SCHEDULES[order].masks
        self.gate = gate if self.axes.channels else "sigmoid"
        self.parameters = parameters.each(lambda p: p.contiguous())
        weight = parameters.gate_weight
        # The numbers of a block's share of the gate's gradients; of "eca" the reach of its stencil.
        self.taps = {"eca": 0 if weight is None else weight.numel(), "scalar": 2}.get(self.gate, 0)
        self.blocks = self._blocks()

    def _blocks(self) -> ByAxis:
        """How programs share out the small maps; no blocks for an axis that has none."""

        def blocks(length: int, reach: int, most: int, chunk: int) -> Blocks:
            size = min(max(16, power_of_two(length)), most)
            steps = -(-min(size + 2 * reach, length) // size)
            chunk = min(size, chunk)
            return Blocks(-(-length // size), steps, tl.constexpr(size), tl.constexpr(chunk))

        s, most = self.size, LIMITS.channel_block
        reach = self.taps // 2 if self.gate == "eca" else 0
        return ByAxis(
            blocks(s.pixels, 3 * s.width + 3, LIMITS.pixel_block, LIMITS.stencil_block)
            if self.axes.pixels else Blocks(),
            blocks(s.channels, reach, most, most) if self.axes.channels else Blocks(),
        )  # fmt: skip

    def empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=self.dtype, device=self.device)

    def new_maps(self, axes: Axes) -> ByAxis:
        n, size = self.images, self.size
        return ByAxis(
            self.empty(n, size.height, size.width) if axes.pixels else None,
            self.empty(n, size.channels) if axes.channels else None,
        )

    def rows_and_columns(self, by_axis: Any) -> Any:
        """A pair by pixel and by channel as one by row and by column, and back."""
        return by_axis if self.matrix.by_pixel else by_axis[::-1]

    def sums(
        self,
        x: Tensor,
        wanted: Axes,
        weights: ByAxis,
        dy: Tensor | None = None,
        *,
        backwards: bool,
        relu: tuple[Tensor | None, Tensor | None] | None = None,
    ) -> ByAxis:
        """The shares of sums that one read of x gives, or of x and dy for their product t:

            pixels      sum_c weights.channels[c] t, for each pixel
            channels    sum_p weights.pixels[p] t, for each channel

        ``wanted`` says which. ``backwards`` takes the last image first, the one that caches still
        hold of a large batch. With a norm, t is as passes.py says; then ``relu``, the result of a
        ReLU and where what of dy passes it is stored, may come in before, and channels are wanted.
        Both are None of a ReLU of x.
        """
        m, n = self.matrix, self.images
        want_rows, want_cols = self.rows_and_columns(wanted)
        row_scale, col_scale = self.rows_and_columns(weights)
        t = sum_tiles(m, n, replace(LIMITS, tile_bytes=LIMITS.tile_bytes // 2) if relu else LIMITS)
        options = {"HEIGHT": t.height, "WIDTH": t.width, "BACKWARDS": backwards, **self.options()}
        row_shares = col_shares = Shares()
        if want_cols or relu is not None:
            s = split(t.blocks, n * t.windows, LIMITS)

            def shares(number: int, length: int, of_d: bool) -> Shares:
                sums = [self.empty(n, number, length) for _ in range(1 + of_d)]
                return Shares(sums[0], number, *sums[1:])

            by_pixel = m.by_pixel
            if want_cols:
                number = s.splits * m.period
                col_shares = shares(number, m.cols, relu is not None and by_pixel)
            if want_rows:
                row_shares = shares(t.windows, m.rows, relu is not None and not by_pixel)
            run(
                passes.column_sums, n * s.splits * t.windows,
                x, dy, row_scale, col_scale if want_rows else None,
                col_shares.sums, row_shares.sums,
                self.norm, *(relu or (None, None)), (col_shares if by_pixel else row_shares).of_d,
                n, m.rows, m.cols, t.windows, s.splits, s.each, **options,
            )  # fmt: skip
        else:
            s = split(t.windows, n * t.blocks, LIMITS)
            row_shares = Shares(self.empty(n, s.splits, m.rows), s.splits)
            run(
                passes.row_sums, n * t.blocks * s.splits,
                x, dy, col_scale, row_shares.sums, self.norm,
                n, m.rows, m.cols, t.blocks, s.splits, s.each, **options,
            )  # fmt: skip
        return ByAxis(*self.rows_and_columns((row_shares, col_shares)))

    def options(self) -> dict[str, Any]:
        """Those of every kernel over full-size tensors."""
        m = self.matrix
        channels = "columns" if self.norm is not None and m.by_pixel else "rows"
        return {"CHANNELS": channels, "PERIOD": m.period, "VECTOR": m.vector, **self.types}

    def scale(
        self,
        x: Tensor,
        y: Tensor,
        masks: ByAxis,
        terms: ByAxis = NOTHING,
        outer: Axes = NONE,
        *,
        ends: Ends = NO_ENDS,
        relu: bool = False,
        backwards: bool = False,
    ) -> None:
        """y = x masks.channels masks.pixels + terms.channels + terms.pixels.

        An outer axis' mask also multiplies the other axis' term: where it is the pixels,
        y = (x masks.channels + terms.channels) masks.pixels + terms.pixels. ``ends`` say what comes
        before and after, ``relu`` whether a ReLU is last.
        """
        m = self.matrix
        outer_rows, outer_cols = self.rows_and_columns(outer)
        factors = (*self.rows_and_columns(masks), *self.rows_and_columns(terms))
        options = {
            "OUTER": "rows" if outer_rows else "columns" if outer_cols else "neither",
            "RELU": relu,
            "BACKWARDS": backwards,
            **self.options(),
        }
        arguments = (x, y, *factors, ends, self.images, m.rows, m.cols)
        tune.scale(m, self.images, arguments, options, LIMITS)

    def masks(
        self,
        axes: Axes,
        means: ByAxis,
        shares: ByAxis = NO_SHARES,
        normed: Normed = NO_NORM,
    ) -> ByAxis:
        """The masks of these axes from the means, which where shares are given are stored first."""
        made = self.new_maps(axes)
        self.over_blocks(maps.masks, axes, self.small_maps(means, made), shares, normed=normed)
        return made

    def gradient_maps(self, means: ByAxis, masks: ByAxis) -> ByAxis:
        """The small maps of the way back, of which the means and the masks are known."""
        d_logits, d_means = self.new_maps(self.axes), self.new_maps(self.axes)
        numbers = maps.TAP_SUMS, max(self.taps, 1)
        sums = [self.empty(self.images, b.number, each) for b, each in zip(self.blocks, numbers)]
        return self.small_maps(means, masks, d_logits, d_means, sums)

    def small_maps(self, *by_axis: Any) -> ByAxis:
        """The maps of each axis, given in the order of AxisMaps."""
        return ByAxis(*map(AxisMaps, self.blocks, *by_axis))

    def over_blocks(
        self,
        kernel: Any,
        axes: Axes,
        by_axis: ByAxis,
        shares: ByAxis,
        more: ByAxis = NO_SHARES,
        *,
        normed: Normed = NO_NORM,
    ) -> None:
        """Start a kernel over the small maps of these axes, with the shares of one pass or two."""
        by_axis = by_axis._replace(channels=by_axis.channels._replace(normed=normed))
        spatial, channel = [
            m._replace(shares=s, more_shares=t, PARTS=_parts(m.blocks, s, t)) if wanted
            else AxisMaps()
            for wanted, m, s, t in zip(axes, by_axis, shares, more)
        ]  # fmt: skip
        programs = self.images * (spatial.blocks.number + channel.blocks.number)
        arguments = spatial, channel, self.parameters, self.size, self.taps
        run(kernel, programs, *arguments, GATE=self.gate, **self.types)

    def parameter_gradients(self, back: ByAxis) -> Parameters:
        gradients = self.parameters.each(empty_gradient)
        length = self.size.channels if self.gate == "affine" else self.taps
        block = min(power_of_two(max(length, 2)), LIMITS.channel_block)
        programs = int(self.axes.pixels)
        if gradients.gate_weight is not None:
            programs += -(-length // block)
        if programs:
            shares = [Shares(m.parameter_sums, self.images * m.blocks.number) for m in back]
            run(
                maps.parameter_gradients, programs,
                *shares, back.channels.d_logit, back.channels.mean, self.images, length,
                self.parameters, gradients, GATE=self.gate, BLOCK=block,
                PARTS=max(1, LIMITS.parts // max(block, maps.TAP_SUMS)), ACC=self.types["ACC"],
            )  # fmt: skip
        return gradients


def _parts(blocks: Blocks, *shares: Shares) -> tl.constexpr:
    """How many shares a block adds at once."""
    number = max(1, *(s.number for s in shares))
    return tl.constexpr(min(power_of_two(number), max(1, LIMITS.parts // blocks.SIZE.value)))


def forward(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """``forward(x, the six parameters, order, gate) -> (y, channel_mean, pooled)``"""
    *parameters, order, gate = arguments
    batch = Batch(x, Parameters(*parameters), order, gate)
    y = torch.empty_like(x)
    means, masks = batch.new_maps(batch.axes), NOTHING
    for i, step in enumerate(SCHEDULES[order].forward if x.numel() else ()):
        if step.writes:
            batch.scale(x, y, masks)
        else:
            shares = batch.sums(x, step.sums, masks, backwards=i > 0)
            made = batch.masks(step.complete, means, shares)
            masks = ByAxis(*(new if old is None else old for old, new in zip(masks, made)))
    channel_mean, pooled = (batch.empty(0) if mean is None else mean for mean in means)
    return y, channel_mean, pooled


def backward(dy: Tensor, x: Tensor, *arguments: Any) -> Gradients:
    """``backward(dy, x, the six parameters, channel_mean, pooled, order, gate) -> (dx, and the
    parameters' gradients)``; None for what is absent."""
    *given, channel_mean, pooled, order, gate = arguments
    parameters = Parameters(*given)
    if x.numel() == 0:
        return torch.empty_like(x), *parameters.each(lambda p: empty_gradient(p).zero_())
    batch = Batch(x, parameters, order, gate)
    means = ByAxis(
        channel_mean.contiguous() if batch.axes.pixels else None,
        pooled.contiguous() if batch.axes.channels else None,
    )
    masks = batch.masks(batch.axes, means)
    back = batch.gradient_maps(means, masks)
    terms = ByAxis(back.pixels.d_mean, back.channels.d_mean)
    dx = torch.empty_like(x)
    shares = [NO_SHARES, NO_SHARES]  # of the gradients of the masks, by pass
    for i, step in enumerate(SCHEDULES[order].backward):
        if step.writes:
            batch.scale(dy, dx, masks, terms, SCHEDULES[order].outer)
        else:
            weights = masks if step.weights == "masks" else terms
            times = dy if "dy" in step.reads else None
            shares[i] = batch.sums(x, step.sums, weights, times, backwards=i > 0)
            batch.over_blocks(maps.mask_gradients, step.complete, back, *shares)
    return dx, *batch.parameter_gradients(back)
