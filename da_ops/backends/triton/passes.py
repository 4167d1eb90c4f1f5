"""The Triton kernels over full-size tensors: weighted sums in both directions, and scaling.

An image is a dense matrix, rows x cols: channels x pixels in NCHW, pixels x channels in NHWC, so
that one set of kernels serves both layouts and all orders.

A load is a vector of VECTOR elements even where a row is not a whole number of vectors (7x7 in
half: 49 elements, vectors of 8). PERIOD rows always are (8 x 49 = 49 vectors): they are a
super-row, and a row's place in it is its phase. Rows of one phase begin equally far into a vector,
so the rows of a tile are those of one phase in successive super-rows. Each is read from the vector
in which it begins to the vector in which it ends, and its neighbours' elements are left out of the
sums:

    memory      | vector | vector | vector | vector |
    rows         ..0 | 1 1 1 1 1 1 1 1 1 1 | 2 ...          a tile of phase 1 reads all four vectors

A place is a column of a super-row, counted from where its first row begins. The compiler knows
`e // VECTOR * VECTOR` to be a whole number of vectors.

Sums have a fixed order: the tiles of a program follow one another, and the programs' shares are
added by index.

In the residual tail u is read, and x is its batch norm, `(u - centre) scale + bias` by channel.
Sums by pixel are then of x; those by channel of u - centre, of which the norm's gradients come too.
CHANNELS says what channels are there, "rows" or "columns".
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor


class Affine(NamedTuple):
    """``(u - centre) scale + bias``, each ``[C]``."""

    centre: Tensor
    scale: Tensor
    bias: Tensor


class Ends(NamedTuple):
    """What comes before and after the masks of a scaling: x is ``before(x)``, or what of x passes a
    ReLU of ``rectified(more)``; and the result is multiplied by ``factor``, by channel, and gets
    ``after(more)`` added, or ``more`` where neither is there. Each may be absent.

    A tuple is compared to None by a field: Triton 3.6 cannot compare one with an absent field.
    """

    before: Affine | None = None
    factor: Tensor | None = None
    more: Tensor | None = None
    after: Affine | None = None
    rectified: Affine | None = None


@triton.jit
def load(x, dy, begin, rows_at, place, wanted, ACC: tl.constexpr):
    """A tile of x, or of x * dy where dy is given, in accumulation precision."""
    at = begin + rows_at[:, None] + place[None, :]
    t = tl.load(x + at, mask=wanted, other=0.0).to(ACC)
    if dy is not None:
        t *= tl.load(dy + at, mask=wanted, other=0.0).to(ACC)
    return t


@triton.jit
def _affine(of, at, wanted, AXIS: tl.constexpr):
    """Centre, scale and bias of channels that lie along an axis of a tile, zeros where unwanted."""
    centre = tl.load(of.centre + at, mask=wanted, other=0.0)
    scale = tl.load(of.scale + at, mask=wanted, other=0.0)
    bias = tl.load(of.bias + at, mask=wanted, other=0.0)
    other: tl.constexpr = 1 - AXIS
    return (
        tl.expand_dims(centre, other),
        tl.expand_dims(scale, other),
        tl.expand_dims(bias, other),
    )


@triton.jit
def row_sums(
    x, dy, col_scale, out, norm,
    images, rows, cols, blocks, splits, tiles, CHANNELS: tl.constexpr,
    PERIOD: tl.constexpr, VECTOR: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
    BACKWARDS: tl.constexpr, INDEX: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """out[image, split, row] = sum_col t[row, col] col_scale[col], with t = x or x * dy.

    With a norm, t is u - centre where rows are channels, else x. An absent col_scale is ones. A
    program: one image, HEIGHT super-rows, a split of so many tiles of WIDTH columns.
    """
    program = tl.program_id(0)
    split = program % splits
    block = program // splits % blocks
    image = (program // splits // blocks).to(tl.int64)
    if BACKWARDS:
        image = images - 1 - image
    stride = cols * PERIOD // VECTOR * VECTOR  # of a super-row
    super_rows = rows // PERIOD
    super_row = block.to(INDEX) * HEIGHT + tl.arange(0, HEIGHT)
    begin = image * rows * cols // VECTOR * VECTOR
    for phase in range(PERIOD):
        first = phase * cols
        first_vector = first // VECTOR * VECTOR
        end = (first + cols + VECTOR - 1) // VECTOR * VECTOR
        sums = tl.full((HEIGHT, WIDTH), 0.0, ACC)
        row = super_row * PERIOD + phase
        if norm is not None and CHANNELS == "rows":
            centre, _, _ = _affine(norm, row, super_row < super_rows, 0)
        for tile in range(tiles):
            window = split.to(INDEX) * tiles + tile
            place = first_vector + window * WIDTH + tl.arange(0, WIDTH)
            col = place - first
            inside = (col >= 0) & (col < cols)
            wanted = (super_row < super_rows)[:, None] & (place < end)[None, :]
            t = load(x, dy, begin, super_row * stride, place, wanted, ACC)
            if norm is not None:
                if CHANNELS == "rows":
                    t -= centre
                else:
                    centre, factor, bias = _affine(norm, col, inside, 1)
                    t = (t - centre) * factor + bias
            if PERIOD > 1 or norm is not None:
                t = tl.where(inside[None, :], t, 0.0)
            if col_scale is not None:
                t *= tl.load(col_scale + image * cols + col, mask=inside, other=0.0)[None, :]
            sums += t
        to = out + (image * splits + split) * rows + row
        tl.store(to, tl.sum(sums, 1), mask=super_row < super_rows)


@triton.jit
def column_sums(
    x, dy, row_scale, col_scale, out, row_out, norm, relu_out, d_out, d_sums,
    images, rows, cols, windows, splits, tiles, CHANNELS: tl.constexpr,
    PERIOD: tl.constexpr, VECTOR: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
    BACKWARDS: tl.constexpr, INDEX: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Sums over the rows and, where row_out is given, of the same read over the columns:

        out[image, share, col]       = sum_row row_scale[row] t[row, col]
        row_out[image, window, row]  = sum_col t[row, col] col_scale[col]

    with t = x or x * dy; with a norm, u - centre by channel, x by pixel, or either times dy. Where
    d_sums is given, dy first becomes d, what of it passes a ReLU: one whose result is relu_out,
    where d is stored in d_out, or else one of x, the norm's. d_sums are shares by channel of the
    sums of d, weighted as those of u - centre; out may then be absent. An absent scale is ones.

    A program: one image, a window of WIDTH columns, a split of so many tiles of HEIGHT super-rows.
    A share is a split's rows of one phase.
    """
    program = tl.program_id(0)
    window = program % windows
    split = program // windows % splits
    image = (program // windows // splits).to(tl.int64)
    if BACKWARDS:
        image = images - 1 - image
    stride = cols * PERIOD // VECTOR * VECTOR
    super_rows = rows // PERIOD
    begin = image * rows * cols // VECTOR * VECTOR
    for phase in range(PERIOD):
        first = phase * cols
        place = first // VECTOR * VECTOR + window.to(INDEX) * WIDTH + tl.arange(0, WIDTH)
        end = (first + cols + VECTOR - 1) // VECTOR * VECTOR
        col = place - first
        inside = (col >= 0) & (col < cols)
        if col_scale is not None:
            by_col = tl.load(col_scale + image * cols + col, mask=inside, other=0.0)[None, :]
        if norm is not None and CHANNELS == "columns":
            centre, factor, bias = _affine(norm, col, inside, 1)
        sums = tl.full((HEIGHT, WIDTH), 0.0, ACC)
        if d_sums is not None and CHANNELS == "columns":
            sums_of_d = tl.full((HEIGHT, WIDTH), 0.0, ACC)
        for tile in range(tiles):
            block = split.to(INDEX) * tiles + tile
            super_row = block * HEIGHT + tl.arange(0, HEIGHT)
            row = super_row * PERIOD + phase
            valid = super_row < super_rows
            wanted = valid[:, None] & (place < end)[None, :]
            if norm is None:
                t = load(x, dy, begin, super_row * stride, place, wanted, ACC)
                if PERIOD > 1:
                    t = tl.where(inside[None, :], t, 0.0)
                of_row, of_col = t, t
            else:
                if CHANNELS == "rows":
                    centre, factor, bias = _affine(norm, row, valid, 0)
                t = load(x, None, begin, super_row * stride, place, wanted, ACC)
                own = valid[:, None] & inside[None, :]
                t = tl.where(own, t - centre, 0.0)
                of_row, of_col = t, t
                normed = tl.fma(t, factor, bias)
                if CHANNELS == "rows":
                    of_col = normed
                else:
                    of_row = normed
            if d_sums is not None:
                at = begin + (super_row * stride)[:, None] + place[None, :]
                d = tl.load(dy + at, mask=wanted, other=0.0)
                if relu_out is not None:
                    d = tl.where(tl.load(relu_out + at, mask=wanted, other=0.0) <= 0, 0.0, d)
                    # The row that ends within a vector leaves that to the next one to store.
                    stored = valid[:, None] & (place < (first + cols) // VECTOR * VECTOR)[None, :]
                    tl.store(d_out + at, d, mask=stored)
                else:
                    d = tl.where(normed <= 0, 0.0, d)
                d = tl.where(own, d.to(ACC), 0.0)
                of_row *= d
                of_col *= d
                if CHANNELS == "rows":
                    of_d = d
                    if col_scale is not None:
                        of_d = d * by_col
                    to = d_sums + (image * windows + window) * rows + row
                    tl.store(to, tl.sum(of_d, 1), mask=valid)
            if row_out is not None:
                if col_scale is not None:
                    of_row *= by_col
                to = row_out + (image * windows + window) * rows + row
                tl.store(to, tl.sum(of_row, 1), mask=valid)
            if row_scale is not None:
                by_row = tl.load(row_scale + image * rows + row, mask=valid, other=0.0)[:, None]
                of_col *= by_row
            sums += of_col
            if d_sums is not None and CHANNELS == "columns":
                if row_scale is not None:
                    d *= by_row
                sums_of_d += d
        share = ((image * splits + split) * PERIOD + phase) * cols + col
        if out is not None:
            tl.store(out + share, tl.sum(sums, 0), mask=inside)
        if d_sums is not None and CHANNELS == "columns":
            tl.store(d_sums + share, tl.sum(sums_of_d, 0), mask=inside)


@triton.jit
def _by_row(values, super_row, super_rows, phase, crossed, PERIOD: tl.constexpr):
    """The value of its row for each element of a tile; crossed says which are of the next row."""
    row = super_row * PERIOD + phase
    value = tl.load(values + row, mask=super_row < super_rows, other=0.0)[:, None]
    if PERIOD > 1:
        after = tl.load(values + row + 1, mask=row + 1 < super_rows * PERIOD, other=0.0)[:, None]
        value = tl.where(crossed[None, :], after, value)
    return value


@triton.jit
def _by_channel(
    values, col, valid, super_row, super_rows, phase, crossed,
    CHANNELS: tl.constexpr, PERIOD: tl.constexpr,
):  # fmt: skip
    """The value of its channel for each element of a tile."""
    if CHANNELS == "rows":
        return _by_row(values, super_row, super_rows, phase, crossed, PERIOD)
    else:
        return tl.load(values + col, mask=valid, other=0.0)[None, :]


@triton.jit
def _applied(
    of, t, col, valid, super_row, super_rows, phase, crossed,
    CHANNELS: tl.constexpr, PERIOD: tl.constexpr,
):  # fmt: skip
    """(t - centre) scale + bias, rounded as in the sums: a ReLU must see the same sign."""
    centre = _by_channel(
        of.centre, col, valid, super_row, super_rows, phase, crossed, CHANNELS, PERIOD
    )
    scale = _by_channel(
        of.scale, col, valid, super_row, super_rows, phase, crossed, CHANNELS, PERIOD
    )
    bias = _by_channel(of.bias, col, valid, super_row, super_rows, phase, crossed, CHANNELS, PERIOD)
    return tl.fma(t - centre, scale, bias)


@triton.jit
def scale(
    x, y, row_scale, col_scale, row_bias, col_bias, ends,
    images, rows, cols, blocks, windows,
    OUTER: tl.constexpr, RELU: tl.constexpr, CHANNELS: tl.constexpr,
    PERIOD: tl.constexpr, VECTOR: tl.constexpr,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
    BACKWARDS: tl.constexpr, INDEX: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """y from x, element by element:

        OUTER "columns"   (x row_scale + row_bias) col_scale + col_bias
              "rows"      (x col_scale + col_bias) row_scale + row_bias
              "neither"   x row_scale col_scale + row_bias + col_bias

    Each of the four may be absent. Of the ends, where there are any, `before` and `rectified` come
    first, the rest last; then the ReLU, if there is one, in which a NaN stays.

    A program: one tile, over the columns of whole super-rows. It has at most cols columns, so that
    it crosses the end of one row at the most.
    """
    program = tl.program_id(0)
    window = program % windows
    block = program // windows % blocks
    image = (program // windows // blocks).to(tl.int64)
    if BACKWARDS:
        image = images - 1 - image
    stride = cols * PERIOD // VECTOR * VECTOR
    super_rows = rows // PERIOD
    super_row = block.to(INDEX) * HEIGHT + tl.arange(0, HEIGHT)
    first = window.to(INDEX) * WIDTH
    place = first + tl.arange(0, WIDTH)
    col, phase, crossed = place, 0, place < 0
    if PERIOD > 1:
        phase = first // cols
        col = place - phase * cols
        crossed = col >= cols
        col = tl.where(crossed, col - cols, col)
    begin = image * rows * cols // VECTOR * VECTOR
    valid = place < stride
    wanted = (super_row < super_rows)[:, None] & valid[None, :]
    t = load(x, None, begin, super_row * stride, place, wanted, ACC)
    if ends.before is not None:
        t = _applied(
            ends.before, t, col, valid, super_row, super_rows, phase, crossed, CHANNELS, PERIOD
        )
    if ends.more is not None:
        more = load(ends.more, None, begin, super_row * stride, place, wanted, ACC)
        if ends.rectified is not None:
            given = _applied(
                ends.rectified, more, col, valid, super_row, super_rows, phase, crossed,
                CHANNELS, PERIOD,
            )  # fmt: skip
            t = tl.where(given <= 0, 0.0, t)

    row_at, col_at = image * rows, image * cols + col
    if OUTER == "rows":
        if col_scale is not None:
            t *= tl.load(col_scale + col_at, mask=valid, other=0.0)[None, :]
        if col_bias is not None:
            t += tl.load(col_bias + col_at, mask=valid, other=0.0)[None, :]
    if row_scale is not None:
        t *= _by_row(row_scale + row_at, super_row, super_rows, phase, crossed, PERIOD)
    if OUTER == "neither":
        if col_scale is not None:
            t *= tl.load(col_scale + col_at, mask=valid, other=0.0)[None, :]
    if row_bias is not None:
        t += _by_row(row_bias + row_at, super_row, super_rows, phase, crossed, PERIOD)
    if OUTER == "columns":
        if col_scale is not None:
            t *= tl.load(col_scale + col_at, mask=valid, other=0.0)[None, :]
    if OUTER != "rows":
        if col_bias is not None:
            t += tl.load(col_bias + col_at, mask=valid, other=0.0)[None, :]
    if ends.factor is not None:
        t *= _by_channel(
            ends.factor, col, valid, super_row, super_rows, phase, crossed, CHANNELS, PERIOD
        )
    if ends.more is not None:
        if ends.after is not None:
            t += _applied(
                ends.after, more, col, valid, super_row, super_rows, phase, crossed,
                CHANNELS, PERIOD,
            )  # fmt: skip
        elif ends.rectified is None:
            t += more
    if RELU:
        t = tl.where(t < 0, 0.0, t)
    to = y + begin + (super_row * stride)[:, None] + place[None, :]
    tl.store(to, t.to(y.dtype.element_ty), mask=wanted)
