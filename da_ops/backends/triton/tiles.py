"""How the kernels of passes.py and maps.py cut up a call. Plain arithmetic: no device, no Triton.

Whatever decides in which order numbers are added is a function of the call alone, never of a
measurement: results are the same from run to run.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """What suits the machine. Tests take others, so that small tensors are cut up as large ones."""

    tile_bytes: int  # of x that a program has in flight at once
    narrowest: int  # bytes of a tile's row, where a row has as many
    widest: int  # bytes of a tile's row
    programs: int  # that fill the device
    pixel_block: int  # pixels of a program over small maps
    channel_block: int  # channels of a program over small maps
    stencil_block: int  # pixels whose stencil is computed at once
    norm_block: int  # channels of a program over the norm's vectors
    shares: int = 64  # of a sum, at the most: the program that adds them up is small
    parts: int = 4096  # elements of shares that are added at once
    large: int = 2**30  # elements of an image from which on 32 bits are too few for its offsets


# 8 KiB are four 16-byte loads for each of 128 threads. 512 bytes are one load for each thread of a
# warp, so that a row's sum stays in the warp. Eight such programs on each of 132 multiprocessors
# are what the largest GPUs hold.
DEVICE = Limits(
    tile_bytes=8192,
    narrowest=128,
    widest=512,
    programs=8 * 132,
    pixel_block=512,
    channel_block=64,
    stencil_block=64,
    norm_block=16,
)
# In the interpreter an operation costs the same however much it does.
INTERPRETER = Limits(
    tile_bytes=2**20,
    narrowest=2**14,
    widest=2**14,
    programs=1,
    pixel_block=4096,
    channel_block=4096,
    stencil_block=4096,
    norm_block=4096,
)


@dataclass(frozen=True)
class Matrix:
    """An image as rows x cols, and its vectors; passes.py explains super-rows."""

    rows: int
    cols: int
    vector: int  # elements of a load
    period: int  # rows of a super-row, which is a whole number of vectors
    itemsize: int  # bytes of an element
    by_pixel: bool  # rows are pixels

    @property
    def super_rows(self) -> int:
        return self.rows // self.period

    @property
    def reach(self) -> int:
        """Columns that are read for one row of a super-row, with those of its neighbours."""
        more = 2 * (self.vector - 1) if self.period > 1 else 0
        return (self.cols + more) // self.vector * self.vector


def matrix(
    shape: tuple[int, ...], itemsize: int, *, channels_last: bool, limits: Limits = DEVICE
) -> Matrix:
    _, channels, height, width = shape
    pixels = height * width
    by_pixel = channels_last or pixels == 1  # one pixel is a row of channels either way
    rows, cols = (pixels, channels) if by_pixel else (channels, pixels)
    vector = 16 // itemsize
    period = vector // math.gcd(cols, vector)
    # An image that is no whole number of vectors leaves the next image unaligned. A tile crosses
    # the end of one row at the most, so a row has no fewer columns than a vector.
    if rows * cols % vector or (period > 1 and (cols < vector or rows * cols >= limits.large)):
        vector = period = 1
    return Matrix(rows, cols, vector, period, itemsize, by_pixel)


@dataclass(frozen=True)
class Tiles:
    """Tiles of height x width, and how many of them cover an image in each direction."""

    height: int  # super-rows
    width: int  # columns
    blocks: int  # tiles over the height of an image
    windows: int  # tiles over the columns


@dataclass(frozen=True)
class Split:
    """The shares of a sum that would take one program too long."""

    splits: int
    each: int  # tiles of a split


def sum_tiles(m: Matrix, images: int, limits: Limits) -> Tiles:
    """The tiles of the kernels that sum: super-rows x the columns that are read for one phase."""
    elements = limits.tile_bytes // m.itemsize
    width = width_of(m.reach, limits.narrowest // m.itemsize, limits.widest // m.itemsize)
    windows = -(-m.reach // width)
    height = min(power_of_two(m.super_rows), max(1, elements // width))
    if images * windows * -(-m.super_rows // height) < limits.programs and height > 1:
        height //= 2
    return Tiles(height, width, -(-m.super_rows // height), windows)


def scale_tiles(m: Matrix, limits: Limits) -> Tiles:
    """The tiles of the kernel that scales: super-rows x their columns, one row after the other.

    A tile crosses the end of one row at the most.
    """
    elements, widest = limits.tile_bytes // m.itemsize, limits.widest // m.itemsize
    if m.period > 1:
        widest = min(widest, power_of_two(m.cols + 1) // 2)
    cols = m.cols * m.period
    width = width_of(cols, limits.narrowest // m.itemsize, widest)
    height = min(power_of_two(m.super_rows), max(1, elements // width))
    return Tiles(height, width, -(-m.super_rows // height), -(-cols // width))


def split(tiles: int, programs: int, limits: Limits) -> Split:
    """How to share out a loop over so many tiles, which each of so many programs has."""
    splits = min(tiles, limits.shares, max(1, limits.programs // max(programs, 1)))
    each = -(-tiles // splits)
    return Split(-(-tiles // each), each)


def width_of(extent: int, narrowest: int, widest: int) -> int:
    """The widest power of two that leaves little of its last tile unused, else the thriftiest."""
    if extent <= narrowest:
        return min(widest, max(16, power_of_two(extent)))
    widths = [w for i in range(31) if min(narrowest, widest) <= (w := 2**i) <= widest]
    covered = {w: -(-extent // w) * w for w in widths}
    fitting = [w for w in widths if covered[w] <= 1.15 * extent]
    return max(fitting) if fitting else max(widths, key=lambda w: (-covered[w], w))


def power_of_two(n: int) -> int:
    """The least power of two that is no less than n."""
    return 1 << max(n - 1, 0).bit_length()
