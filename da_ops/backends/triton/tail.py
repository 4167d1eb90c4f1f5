"""The residual tail, ``relu(DA(batch_norm(u)) + shortcut)``, by the kernels of the layer: a norm
where u is read, the shortcut and a ReLU where the result is written.

Imported when first used, as launch.py is.
"""

from __future__ import annotations

from itertools import cycle
from typing import Any

import torch
from torch import Tensor

from ...layout import empty_gradient
from ...parameters import Gradients, Parameters
from ...residual.reference import Norm
from ..schedule import BOTH, CHANNELS, NONE, PIXELS, SCHEDULES, Axes, Pass
from . import launch, maps, norms
from .launch import NO_NORM, NO_SHARES, NOTHING, Batch, ByAxis
from .maps import Normed, Shares
from .passes import Affine, Ends
from .run import run
from .tiles import power_of_two, split, sum_tiles

_NAMES = {PIXELS: "pixels", CHANNELS: "channels", NONE: "neither"}


class Tail(Batch):
    """The images of one call, and the norm that makes x of u."""

    norm: Affine

    def __init__(
        self, u: Tensor, norm: Norm, parameters: Parameters, order: str, gate: str
    ) -> None:
        super().__init__(u, parameters, order, gate)
        self.u = u
        steps = None if order == "none" else SCHEDULES[order]
        self.steps: dict[str, tuple[Pass, ...]] = {
            "forward": steps.forward[:-1] if steps else (),
            "backward": steps.backward[:-1] if steps else (),
        }
        self.outer = steps.outer if steps else NONE
        self.turns = cycle((False, True))  # caches still hold what the pass before read last
        self.count = self.images * self.size.pixels  # elements of a channel
        self.weight, self.bias, mean, var = (
            None if t is None else t.contiguous() for t in norm[:4]
        )
        moments: Any = (None, None, None)
        shares = 0
        if mean is None or var is None:
            moments, shares = self.moments()
            mean, var = self.vectors(2)
        self.mean, self.var = mean, var
        self.norm = Affine(*self.vectors(3))
        self.inverse, *_ = self.vectors(1)  # one over the deviation
        self.over_channels(
            norms.normal,
            *moments, shares, self.count, mean, var, self.weight, self.bias, self.norm,
            self.inverse, self.size.channels, terms=shares, EPS=norm.eps,
        )  # fmt: skip

    def over_channels(
        self, kernel: Any, *arguments: Any, terms: int, images: int | None = None, **options: Any
    ) -> None:
        """Start a kernel over blocks of channels, of each image or of all at once, where a channel
        is a sum of so many terms."""
        limits = launch.LIMITS
        most = limits.norm_block if images is None else limits.channel_block
        block = min(max(16, power_of_two(self.size.channels)), most)
        parts = min(power_of_two(max(terms, 1)), max(1, limits.parts // 2 // block))
        programs = (images or 1) * -(-self.size.channels // block)
        options = {"BLOCK": block, "PARTS": parts, "ACC": self.types["ACC"], **options}
        run(kernel, programs, *arguments, **options)

    def vectors(self, number: int) -> tuple[Tensor, ...]:
        return tuple(self.empty(self.size.channels) for _ in range(number))

    def wide(self, number: int, length: int) -> tuple[Tensor, ...]:
        """So many ``[length, C]`` in float64."""
        shape = length, self.size.channels
        return tuple(
            torch.empty(shape, dtype=torch.float64, device=self.device) for _ in range(number)
        )

    def moments(self) -> tuple[tuple[Tensor, ...], int]:
        """Each channel's in shares, and the number of these."""
        m, n = self.matrix, self.images
        t = sum_tiles(m, n, launch.LIMITS)
        others, along = (t.windows, t.blocks) if m.by_pixel else (t.blocks, t.windows)
        s = split(along, n * others, launch.LIMITS)
        shares = n * s.splits * (m.period if m.by_pixel else 1)
        found = self.wide(3, shares)
        options = {**self.options(), "CHANNELS": "columns" if m.by_pixel else "rows"}
        run(
            norms.moments, n * others * s.splits,
            self.u, *found, n, m.rows, m.cols, others, s.splits, s.each,
            HEIGHT=t.height, WIDTH=t.width, BACKWARDS=next(self.turns), **options,
        )  # fmt: skip
        return found, shares

    def normed(self, pooled: Tensor | None, weights: Tensor | None) -> Normed:
        if pooled is None:
            return NO_NORM
        return Normed(pooled, self.norm.scale, self.norm.bias, weights)

    def given_masks(self, means: ByAxis, pooled: Tensor | None) -> ByAxis:
        """The masks of the way back, from the channel mean and the pooled u that are kept."""
        if self.axes == NONE:
            return NOTHING
        if self.axes != BOTH or self.outer != PIXELS:
            return self.masks(self.axes, means, normed=self.normed(pooled, None))
        spatial = self.masks(PIXELS, means)
        channel = self.masks(CHANNELS, means, normed=self.normed(pooled, spatial.pixels))
        return ByAxis(spatial.pixels, channel.channels)

    def norm_gradients(
        self,
        first: Shares,
        through_means: Shares,
        masks: ByAxis,
        terms: ByAxis,
        pooled: Tensor | None,
        *,
        batch: bool,
    ) -> tuple[list[Tensor | None], Affine | None]:
        """Those of the norm's weight and bias, and what of u du has added if statistics are the
        batch's."""
        n, channels = self.images, self.size.channels
        sums = self.wide(2, n)
        self.over_channels(
            norms.dx_sums,
            first, through_means, masks.pixels, terms.pixels, masks.channels, terms.channels,
            pooled, *sums, self.size,
            images=n, terms=max(first.number, through_means.number), OUTER=_NAMES[self.outer],
        )  # fmt: skip
        found = [None if p is None else empty_gradient(p) for p in (self.weight, self.bias)]
        after = Affine(self.norm.centre, *self.vectors(2)) if batch else None
        slope, offset = after[1:] if after else (None, None)
        self.over_channels(
            norms.gradients,
            *sums, n, channels, self.count, self.norm.scale, self.inverse, *found, slope, offset,
            terms=n,
        )  # fmt: skip
        return found, after


def residual_forward(
    u: Tensor,
    shortcut: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    norm_mean: Tensor | None,
    norm_var: Tensor | None,
    eps: float,
    *arguments: Any,
) -> tuple[Tensor, ...]:
    """``residual_forward(u, shortcut or None, the norm's weight, bias, mean and var, eps, the six
    parameters, order, gate) -> (out, mean, var, channel_mean, pooled)``

    ``pooled`` is the mean of u less its channel's.
    """
    *parameters, order, gate = arguments
    norm = Norm(norm_weight, norm_bias, norm_mean, norm_var, eps)
    tail = Tail(u, norm, Parameters(*parameters), order, gate)
    statistics = [tail.mean, tail.var] if norm_mean is None else [tail.empty(0) for _ in range(2)]
    means, masks = tail.new_maps(tail.axes), NOTHING
    pooled = None if means.channels is None else torch.empty_like(means.channels)
    for step in tail.steps["forward"]:
        shares = tail.sums(u, step.sums, masks, backwards=next(tail.turns))
        normed = tail.normed(pooled, masks.pixels)
        made = tail.masks(step.complete, means, shares, normed)
        masks = ByAxis(*(new if old is None else old for old, new in zip(masks, made)))
    out = torch.empty_like(u)
    ends = Ends(before=tail.norm, more=shortcut)
    tail.scale(u, out, masks, ends=ends, relu=True, backwards=next(tail.turns))
    kept = (tail.empty(0) if t is None else t for t in (means.pixels, pooled))
    return out, *statistics, *kept


def residual_backward(
    dout: Tensor,
    out: Tensor | None,
    u: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    batch: bool,
    eps: float,
    *arguments: Any,
) -> Gradients:
    """``residual_backward(dout, out or None, u, the norm's weight, bias, mean and var, whether
    these are the batch's, eps, the six parameters, channel_mean, pooled, order, gate) -> (du,
    d_shortcut, and the parameters' gradients)``; None for what is absent. Without a shortcut
    ``out`` is None."""
    *given, channel_mean, raw, order, gate = arguments
    norm = Norm(norm_weight, norm_bias, mean, var, eps)
    tail = Tail(u, norm, Parameters(*given), order, gate)
    pooled = raw.contiguous() if tail.axes.channels else None
    means = ByAxis(
        channel_mean.contiguous() if tail.axes.pixels else None,
        None if pooled is None else torch.empty_like(pooled),
    )
    masks = tail.given_masks(means, pooled)
    back = tail.gradient_maps(means, masks)
    terms = ByAxis(back.pixels.d_mean, back.channels.d_mean)

    du, d_shortcut = torch.empty_like(u), None if out is None else torch.empty_like(u)
    wanted = Axes(tail.axes.pixels, True)
    turn = next(tail.turns)
    first = tail.sums(u, wanted, masks, dout, backwards=turn, relu=(out, d_shortcut))
    through_means, shares = Shares(), [first, NO_SHARES]
    for i, step in enumerate(tail.steps["backward"]):
        if i and step.sums.pixels:
            shares[1] = tail.sums(u, PIXELS, terms, backwards=next(tail.turns))
        elif i:
            shares[1] = ByAxis(Shares(), through_means)
        normed = tail.normed(pooled, terms.pixels)
        tail.over_blocks(maps.mask_gradients, step.complete, back, *shares, normed=normed)
        if step.complete.pixels:
            through_means = tail.sums(u, CHANNELS, terms, backwards=next(tail.turns)).channels
    d_norm, after = tail.norm_gradients(
        first.channels, through_means, masks, terms, pooled, batch=batch
    )
    # Without a shortcut, u says once more what passed the ReLU: masks leave the sign of x.
    d, rectified = (dout, tail.norm) if d_shortcut is None else (d_shortcut, None)
    more = u if batch or rectified else None
    ends = Ends(factor=tail.norm.scale, more=more, after=after, rectified=rectified)
    tail.scale(d, du, masks, terms, tail.outer, ends=ends, backwards=next(tail.turns))
    return du, d_shortcut, *d_norm, *tail.parameter_gradients(back)
