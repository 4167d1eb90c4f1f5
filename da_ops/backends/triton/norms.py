"""The Triton kernels of the residual tail's norm: the batch's statistics, and the gradients that
come of them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .passes import load
from .sums import folded, sum_of, sum_over_images


@triton.jit
def _common(first, end, begin, number):
    """How many of so many places from begin on lie between first and end."""
    return tl.maximum(tl.minimum(end, begin + number) - tl.maximum(first, begin), 0)


@triton.jit
def _own(
    x, begin, block, window, phase, rows, cols,
    PERIOD, VECTOR, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, ACC,
):  # fmt: skip
    """A tile of x, and which of it are its rows' own."""
    first = phase * cols
    super_row = block * HEIGHT + tl.arange(0, HEIGHT)
    place = first // VECTOR * VECTOR + window * WIDTH + tl.arange(0, WIDTH)
    valid = (super_row < rows // PERIOD)[:, None]
    wanted = valid & (place < (first + cols + VECTOR - 1) // VECTOR * VECTOR)[None, :]
    t = load(x, None, begin, super_row * (cols * PERIOD // VECTOR * VECTOR), place, wanted, ACC)
    return t, valid & ((place >= first) & (place < first + cols))[None, :]


@triton.jit
def moments(
    x, counts, means, squares,
    images, rows, cols, others, splits, tiles, CHANNELS: tl.constexpr,
    PERIOD: tl.constexpr, VECTOR: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
    BACKWARDS: tl.constexpr, INDEX: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """How many elements of a channel a share has, their mean, and the sum of their squared
    deviations from it: counts, means and squares[image, share, channel], in float64.

    They are added as deviations from a centre nearby, the mean of the share's first tile. The
    elements of that tile alone deviate so much from the mean of all that the squares lose at most
    as many of their roundings as there are tiles, whatever the numbers.

    A program: one image; HEIGHT super-rows or a window of WIDTH columns, whichever are channels;
    and along the other axis a split of so many tiles. A share is a split's rows of one phase.
    """
    program = tl.program_id(0)
    split = (program % splits).to(INDEX)
    other = (program // splits % others).to(INDEX)
    image = (program // splits // others).to(tl.int64)
    if BACKWARDS:
        image = images - 1 - image
    begin = image * rows * cols // VECTOR * VECTOR
    by_row: tl.constexpr = CHANNELS == "rows"
    axis: tl.constexpr = 1 if by_row else 0
    for phase in range(PERIOD):
        first = phase * cols
        if by_row:
            row = (other * HEIGHT + tl.arange(0, HEIGHT)) * PERIOD + phase
            wanted, share = row < rows, (image * splits + split) * rows + row
            from_, end, each = first, first + cols, WIDTH
            at = first // VECTOR * VECTOR + split * tiles * WIDTH
            block, window = other, split * tiles
        else:
            col = first // VECTOR * VECTOR - first + other * WIDTH + tl.arange(0, WIDTH)
            wanted = (col >= 0) & (col < cols)
            share = ((image * splits + split) * PERIOD + phase) * cols + col
            from_, end, each = 0, rows // PERIOD, HEIGHT
            at = split * tiles * HEIGHT
            block, window = split * tiles, other
        t, own = _own(
            x, begin, block, window, phase, rows, cols, PERIOD, VECTOR, HEIGHT, WIDTH, ACC
        )
        number = tl.maximum(_common(from_, end, at, each), 1)
        centre = tl.sum(tl.where(own, t, 0.0), axis) / number
        sums = tl.full((HEIGHT, WIDTH), 0.0, ACC)
        sums_of_squares = tl.full((HEIGHT, WIDTH), 0.0, ACC)
        for _ in range(tiles):
            t, own = _own(
                x, begin, block, window, phase, rows, cols, PERIOD, VECTOR, HEIGHT, WIDTH, ACC
            )
            t = tl.where(own, t - tl.expand_dims(centre, axis), 0.0)
            sums += t
            sums_of_squares += t * t
            if by_row:
                window += 1
            else:
                block += 1
        count = _common(from_, end, at, tiles * each).to(tl.float64)
        total = tl.sum(sums, axis).to(tl.float64)
        off = total / tl.maximum(count, 1.0)
        tl.store(counts + share, off * 0.0 + count, mask=wanted)
        tl.store(means + share, centre.to(tl.float64) + off, mask=wanted)
        tl.store(squares + share, tl.sum(sums_of_squares, axis) - total * off, mask=wanted)


@triton.jit
def normal(
    counts, means, squares, shares, count, mean, var, weight, bias, to, inverse, channels,
    EPS: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The norm as centre, scale and bias, with one over the deviation, for BLOCK channels.

    Where there are moments, of so many shares and of count elements in all, they are first combined
    (Chan et al., 1979) and stored as mean and var; else these are known.
    """
    channel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    wanted = channel < channels
    if counts is not None:
        sums = tl.full((PARTS, BLOCK), 0.0, tl.float64)
        for first in range(0, shares, PARTS):
            share = first + tl.arange(0, PARTS)
            at = share.to(tl.int64)[:, None] * channels + channel[None, :]
            there = (share < shares)[:, None] & wanted[None, :]
            n = tl.load(counts + at, mask=there, other=0.0)
            sums += n * tl.load(means + at, mask=there, other=0.0)
        each = tl.full((), 1.0, tl.float64) / count  # one division, not two vectors of them
        of_all = tl.sum(sums, 0) * each
        sums = tl.full((PARTS, BLOCK), 0.0, tl.float64)
        for first in range(0, shares, PARTS):
            share = first + tl.arange(0, PARTS)
            at = share.to(tl.int64)[:, None] * channels + channel[None, :]
            there = (share < shares)[:, None] & wanted[None, :]
            n = tl.load(counts + at, mask=there, other=0.0)
            off = tl.load(means + at, mask=there, other=0.0) - of_all[None, :]
            sums += tl.load(squares + at, mask=there, other=0.0) + n * off * off
        m, v = of_all.to(ACC), (tl.sum(sums, 0) * each).to(ACC)
        tl.store(mean + channel, m, mask=wanted)
        tl.store(var + channel, v, mask=wanted)
    else:
        m = tl.load(mean + channel, mask=wanted, other=0.0).to(ACC)
        v = tl.load(var + channel, mask=wanted, other=1.0).to(ACC)
    one_over = (1.0 / tl.sqrt(v.to(tl.float64) + EPS)).to(ACC)
    scale = one_over
    if weight is not None:
        scale *= tl.load(weight + channel, mask=wanted, other=0.0).to(ACC)
    offset = scale * 0.0
    if bias is not None:
        offset = tl.load(bias + channel, mask=wanted, other=0.0).to(ACC)
    tl.store(inverse + channel, one_over, mask=wanted)
    tl.store(to.centre + channel, m, mask=wanted)
    tl.store(to.scale + channel, scale, mask=wanted)
    tl.store(to.bias + channel, offset, mask=wanted)


@triton.jit
def dx_sums(
    first, through_means, spatial_mask, spatial_term, channel_mask, channel_term, pooled,
    sums, products, size,
    OUTER: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The sums by channel of dx, and of dx * (u - centre), over each image's pixels, in float64.

    dx is d * spatial_mask * channel_mask + channel_term + spatial_term, whichever there are, where
    the mask of the axis OUTER also multiplies the other axis' term. Shares: `first` of
    spatial_mask * d and of its product with u - centre, `through_means` of
    spatial_term * (u - centre). A program: BLOCK channels of an image.
    """
    blocks = tl.cdiv(size.channels, BLOCK)
    image = (tl.program_id(0) // blocks).to(tl.int64)
    channel = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    channels = size.channels
    wanted = channel < channels
    at = image * channels + channel
    total = folded(first.of_d, first.number, image, channels, channel, wanted, PARTS, ACC)
    product = folded(first.sums, first.number, image, channels, channel, wanted, PARTS, ACC)
    total, product = total.to(tl.float64), product.to(tl.float64)
    if channel_mask is not None:
        mask = tl.load(channel_mask + at, mask=wanted, other=0.0).to(tl.float64)
        total *= mask
        product *= mask
        term = tl.load(channel_term + at, mask=wanted, other=0.0).to(tl.float64)
        weight = size.pixels
        if OUTER == "pixels":
            weight = sum_of(spatial_mask, image, size.pixels, ACC)
        total += term * weight
        product += term * tl.load(pooled + at, mask=wanted, other=0.0) * size.pixels
    if spatial_term is not None:
        more = sum_of(spatial_term, image, size.pixels, ACC).to(tl.float64)
        number = through_means.number
        of_u = folded(through_means.sums, number, image, channels, channel, wanted, PARTS, ACC)
        more_products = of_u.to(tl.float64)
        if OUTER == "channels":
            total += mask * more
            product += mask * more_products
        else:
            total += more
            product += more_products
    tl.store(sums + at, total, mask=wanted)
    tl.store(products + at, product, mask=wanted)


@triton.jit
def gradients(
    sums, products, images, channels, count, scale, inverse, d_weight, d_bias, slope, offset,
    BLOCK: tl.constexpr, PARTS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The gradients of the norm's weight and bias; and where the statistics are those of a batch of
    count elements, what flows back through them: du = scale dx + (u - centre) slope + offset.
    """
    channel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    wanted = channel < channels
    total = sum_over_images(sums, None, images, channels, channel, PARTS)
    one_over = tl.load(inverse + channel, mask=wanted, other=0.0).to(tl.float64)
    product = sum_over_images(products, None, images, channels, channel, PARTS) * one_over
    if d_weight is not None:
        tl.store(d_weight + channel, product.to(ACC), mask=wanted)
    if d_bias is not None:
        tl.store(d_bias + channel, total.to(ACC), mask=wanted)
    if slope is not None:
        factor = tl.load(scale + channel, mask=wanted, other=0.0).to(tl.float64) / count
        tl.store(slope + channel, (-factor * one_over * product).to(ACC), mask=wanted)
        tl.store(offset + channel, (-factor * total).to(ACC), mask=wanted)
