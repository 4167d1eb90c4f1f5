"""The Triton kernels over full-size tensors: weighted sums in both directions, and scaling.

An image is a dense matrix, rows x cols: channels x pixels in NCHW, pixels x channels in NHWC, so
that one set of kernels serves both layouts and all orders. `u` is a weight by row, `v` by column.

A load is a vector of VECTOR elements even where a row is not a whole number of vectors (7x7 in
half: 49 elements, vectors of 8). GROUP rows always are (8 x 49 = 49 vectors), so rows r, r + GROUP,
r + 2 GROUP ... begin equally far into a vector: a tile takes its rows in such steps. Row `phase` of
each group is read from the vector in which it begins to that in which it ends, and what belongs to
its neighbours is left out of the sums:

    memory      | vector | vector | vector | vector |
    rows         ..0 | 1 1 1 1 1 1 1 1 1 1 | 2 ...          a tile of phase 1 reads all four vectors

`e // VECTOR * VECTOR` of a whole number of vectors is what tells the compiler that it is one.

Sums have a fixed order: in the program by tile, between programs by the index of their share.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _load(x, dy, at, rows_at, q, wanted, ACC: tl.constexpr):
    """A tile of x, or of x * dy where dy is given, in accumulation precision."""
    at = at + rows_at[:, None] + q[None, :]
    t = tl.load(x + at, mask=wanted, other=0.0).to(ACC)
    if dy is not None:
        t *= tl.load(dy + at, mask=wanted, other=0.0).to(ACC)
    return t


@triton.jit
def row_sums(
    x, dy, v, out,
    images, rows, cols, blocks, splits, per_split,
    GROUP: tl.constexpr, VECTOR: tl.constexpr, BR: tl.constexpr, BQ: tl.constexpr,
    BACKWARDS: tl.constexpr, INDEX: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """out[n, split, r] = sum_q t[r, q] v[q] with t = x or x * dy; v absent: ones.

    A program: one image, BR groups of rows, a share of the windows of BQ columns.
    """
    program = tl.program_id(0)
    split = program % splits
    block = program // splits % blocks
    n = (program // splits // blocks).to(tl.int64)
    if BACKWARDS:
        n = images - 1 - n
    stride = cols * GROUP // VECTOR * VECTOR  # of a group
    groups = rows // GROUP
    group = block.to(INDEX) * BR + tl.arange(0, BR)
    at = n * rows * cols // VECTOR * VECTOR
    for phase in range(GROUP):
        first = phase * cols
        begin = first // VECTOR * VECTOR
        end = (first + cols + VECTOR - 1) // VECTOR * VECTOR
        sums = tl.full((BR, BQ), 0.0, ACC)
        for k in range(per_split):
            window = split.to(INDEX) * per_split + k
            q = begin + window * BQ + tl.arange(0, BQ)
            p = q - first
            inside = (p >= 0) & (p < cols)
            wanted = (group < groups)[:, None] & (q < end)[None, :]
            t = _load(x, dy, at, group * stride, q, wanted, ACC)
            if GROUP > 1:
                t = tl.where(inside[None, :], t, 0.0)
            if v is not None:
                t *= tl.load(v + n * cols + p, mask=inside, other=0.0)[None, :]
            sums += t
        r = group * GROUP + phase
        tl.store(out + (n * splits + split) * rows + r, tl.sum(sums, 1), mask=group < groups)


@triton.jit
def column_sums(
    x, dy, u, v, out, row_out,
    images, rows, cols, windows, splits, per_split,
    GROUP: tl.constexpr, VECTOR: tl.constexpr, BR: tl.constexpr, BQ: tl.constexpr,
    BACKWARDS: tl.constexpr, INDEX: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """out[n, share, q] = sum_r u[r] t[r, q] and, where row_out is given, of the same read
    row_out[n, window, r] = sum_q t[r, q] v[q], with t = x or x * dy; u or v absent: ones.

    A program: one image, a window of BQ columns, a split of the rows. A share is a split's rows of
    one phase.
    """
    program = tl.program_id(0)
    window = program % windows
    split = program // windows % splits
    n = (program // windows // splits).to(tl.int64)
    if BACKWARDS:
        n = images - 1 - n
    stride = cols * GROUP // VECTOR * VECTOR
    groups = rows // GROUP
    at = n * rows * cols // VECTOR * VECTOR
    for phase in range(GROUP):
        first = phase * cols
        q = first // VECTOR * VECTOR + window.to(INDEX) * BQ + tl.arange(0, BQ)
        end = (first + cols + VECTOR - 1) // VECTOR * VECTOR
        p = q - first
        inside = (p >= 0) & (p < cols)
        if v is not None:
            by_column = tl.load(v + n * cols + p, mask=inside, other=0.0)[None, :]
        sums = tl.full((BR, BQ), 0.0, ACC)
        for k in range(per_split):
            block = split.to(INDEX) * per_split + k
            group = block * BR + tl.arange(0, BR)
            r = group * GROUP + phase
            wanted = (group < groups)[:, None] & (q < end)[None, :]
            t = _load(x, dy, at, group * stride, q, wanted, ACC)
            if GROUP > 1:
                t = tl.where(inside[None, :], t, 0.0)
            if row_out is not None:
                weighted = t
                if v is not None:
                    weighted = t * by_column
                to = row_out + (n * windows + window) * rows + r
                tl.store(to, tl.sum(weighted, 1), mask=group < groups)
            if u is not None:
                t *= tl.load(u + n * rows + r, mask=group < groups, other=0.0)[:, None]
            sums += t
        to = out + ((n * splits + split) * GROUP + phase) * cols + p
        tl.store(to, tl.sum(sums, 0), mask=inside)


@triton.jit
def _by_row(u, at, second, group, groups, phase, GROUP: tl.constexpr):
    """A weight by row for each element of a tile whose columns cross at most one row's end."""
    r = group * GROUP + phase
    weights = tl.load(u + at + r, mask=group < groups, other=0.0)[:, None]
    if GROUP > 1:
        after = tl.load(u + at + r + 1, mask=r + 1 < groups * GROUP, other=0.0)[:, None]
        weights = tl.where(second[None, :], after, weights)
    return weights


@triton.jit
def scale(
    x, y, u, v, a, b,
    images, rows, cols, blocks, windows,
    ORDER: tl.constexpr, GROUP: tl.constexpr, VECTOR: tl.constexpr,
    BR: tl.constexpr, BQ: tl.constexpr,
    BACKWARDS: tl.constexpr, INDEX: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """y from x, element by element, with weights u and terms a by row, v and b by column:

        ORDER "rows"       (x u + a) v + b
              "columns"    (x v + b) u + a
              "together"   x u v + a + b

    Each of the four may be absent. A program: one tile, of groups of rows end to end; it has at
    most cols columns, so that it crosses one row's end at the most.
    """
    program = tl.program_id(0)
    window = program % windows
    block = program // windows % blocks
    n = (program // windows // blocks).to(tl.int64)
    if BACKWARDS:
        n = images - 1 - n
    stride = cols * GROUP // VECTOR * VECTOR
    groups = rows // GROUP
    group = block.to(INDEX) * BR + tl.arange(0, BR)
    begin = window.to(INDEX) * BQ
    q = begin + tl.arange(0, BQ)
    p, phase, second = q, 0, q < 0
    if GROUP > 1:
        phase = begin // cols
        p = q - phase * cols
        second = p >= cols
        p = tl.where(second, p - cols, p)
    at = n * rows * cols // VECTOR * VECTOR
    wanted = (group < groups)[:, None] & (q < stride)[None, :]
    t = _load(x, None, at, group * stride, q, wanted, ACC)

    row_at, col_at, valid = n * rows, n * cols, q < stride
    if ORDER == "columns":
        if v is not None:
            t *= tl.load(v + col_at + p, mask=valid, other=0.0)[None, :]
        if b is not None:
            t += tl.load(b + col_at + p, mask=valid, other=0.0)[None, :]
    if u is not None:
        t *= _by_row(u, row_at, second, group, groups, phase, GROUP)
    if ORDER == "together":
        if v is not None:
            t *= tl.load(v + col_at + p, mask=valid, other=0.0)[None, :]
    if a is not None:
        t += _by_row(a, row_at, second, group, groups, phase, GROUP)
    if ORDER == "rows":
        if v is not None:
            t *= tl.load(v + col_at + p, mask=valid, other=0.0)[None, :]
    if ORDER != "columns":
        if b is not None:
            t += tl.load(b + col_at + p, mask=valid, other=0.0)[None, :]
    to = y + at + (group * stride)[:, None] + q[None, :]
    tl.store(to, t.to(y.dtype.element_ty), mask=wanted)
