"""Sums over small maps, and over the shares of a sum, in a fixed order."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def folded(shares, number, image, length, i, wanted, PARTS, ACC):
    """sum_part shares[image, part, i] in the order of the parts, for a block of i."""
    sums = tl.full((PARTS, i.shape[0]), 0.0, ACC)
    for first in range(0, number, PARTS):
        part = first + tl.arange(0, PARTS)
        at = shares + (image * number + part)[:, None] * length + i[None, :]
        valid = (part < number)[:, None] & wanted[None, :]
        sums += tl.load(at, mask=valid, other=0.0)
    return tl.sum(sums, 0)


@triton.jit
def sum_of(values, image, length, ACC):
    """sum_i values[image, i]."""
    sums = tl.full((512,), 0.0, ACC)
    for first in range(0, length, 512):
        i = first + tl.arange(0, 512)
        sums += tl.load(values + image * length + i, mask=i < length, other=0.0)
    return tl.sum(sums, 0)


@triton.jit
def sum_over_images(terms, factors, number, length, i, PARTS):
    """sum_k terms[k, i] factors[k, i] for a block of i, in float64, since the terms may cancel.

    Absent factors are ones.
    """
    sums = tl.full((PARTS, i.shape[0]), 0.0, tl.float64)
    for first in range(0, number, PARTS):
        k = first + tl.arange(0, PARTS)
        at = k.to(tl.int64)[:, None] * length + i[None, :]
        wanted = (k < number)[:, None] & (i < length)[None, :]
        t = tl.load(terms + at, mask=wanted, other=0.0).to(tl.float64)
        if factors is not None:
            t *= tl.load(factors + at, mask=wanted, other=0.0).to(tl.float64)
        sums += t
    return tl.sum(sums, 0)
