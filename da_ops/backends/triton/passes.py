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
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _load(x, dy, begin, rows_at, place, wanted, ACC: tl.constexpr):
    """A tile of x, or of x * dy where dy is given, in accumulation precision."""
    at = begin + rows_at[:, None] + place[None, :]
    t = tl.load(x + at, mask=wanted, other=0.0).to(ACC)
    if dy is not None:
        t *= tl.load(dy + at, mask=wanted, other=0.0).to(ACC)
    return t


@triton.jit
def row_sums(
    x, dy, col_scale, out,
    images, rows, cols, blocks, splits, tiles,
    PERIOD: tl.constexpr, VECTOR: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
    BACKWARDS: tl.constexpr, INDEX: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """out[image, split, row] = sum_col t[row, col] col_scale[col], with t = x or x * dy.

    An absent col_scale is ones. A program: one image, HEIGHT super-rows, a split of so many tiles
    of WIDTH columns.
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
        for tile in range(tiles):
            window = split.to(INDEX) * tiles + tile
            place = first_vector + window * WIDTH + tl.arange(0, WIDTH)
            col = place - first
            inside = (col >= 0) & (col < cols)
            wanted = (super_row < super_rows)[:, None] & (place < end)[None, :]
            t = _load(x, dy, begin, super_row * stride, place, wanted, ACC)
            if PERIOD > 1:
                t = tl.where(inside[None, :], t, 0.0)
            if col_scale is not None:
                t *= tl.load(col_scale + image * cols + col, mask=inside, other=0.0)[None, :]
            sums += t
        row = super_row * PERIOD + phase
        to = out + (image * splits + split) * rows + row
        tl.store(to, tl.sum(sums, 1), mask=super_row < super_rows)


@triton.jit
def column_sums(
    x, dy, row_scale, col_scale, out, row_out,
    images, rows, cols, windows, splits, tiles,
    PERIOD: tl.constexpr, VECTOR: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
    BACKWARDS: tl.constexpr, INDEX: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Sums over the rows and, where row_out is given, of the same read over the columns:

        out[image, share, col]       = sum_row row_scale[row] t[row, col]
        row_out[image, window, row]  = sum_col t[row, col] col_scale[col]

    with t = x or x * dy. An absent scale is ones. A program: one image, a window of WIDTH columns,
    a split of so many tiles of HEIGHT super-rows. A share is a split's rows of one phase.
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
        sums = tl.full((HEIGHT, WIDTH), 0.0, ACC)
        for tile in range(tiles):
            block = split.to(INDEX) * tiles + tile
            super_row = block * HEIGHT + tl.arange(0, HEIGHT)
            row = super_row * PERIOD + phase
            valid = super_row < super_rows
            wanted = valid[:, None] & (place < end)[None, :]
            t = _load(x, dy, begin, super_row * stride, place, wanted, ACC)
            if PERIOD > 1:
                t = tl.where(inside[None, :], t, 0.0)
            if row_out is not None:
                weighted = t
                if col_scale is not None:
                    weighted = t * by_col
                to = row_out + (image * windows + window) * rows + row
                tl.store(to, tl.sum(weighted, 1), mask=valid)
            if row_scale is not None:
                t *= tl.load(row_scale + image * rows + row, mask=valid, other=0.0)[:, None]
            sums += t
        to = out + ((image * splits + split) * PERIOD + phase) * cols + col
        tl.store(to, tl.sum(sums, 0), mask=inside)


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
def scale(
    x, y, row_scale, col_scale, row_bias, col_bias,
    images, rows, cols, blocks, windows,
    OUTER: tl.constexpr, PERIOD: tl.constexpr, VECTOR: tl.constexpr,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
    BACKWARDS: tl.constexpr, INDEX: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """y from x, element by element:

        OUTER "columns"   (x row_scale + row_bias) col_scale + col_bias
              "rows"      (x col_scale + col_bias) row_scale + row_bias
              "neither"   x row_scale col_scale + row_bias + col_bias

    Each of the four may be absent. A program: one tile, over the columns of whole super-rows. It
    has at most cols columns, so that it crosses the end of one row at the most.
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
    t = _load(x, None, begin, super_row * stride, place, wanted, ACC)

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
    to = y + begin + (super_row * stride)[:, None] + place[None, :]
    tl.store(to, t.to(y.dtype.element_ty), mask=wanted)
