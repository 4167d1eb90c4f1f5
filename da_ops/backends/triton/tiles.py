"""How the kernels of passes.py and maps.py cut up a call. Plain arithmetic: no device, no Triton.

Everything that decides in which order numbers are added is a function of the call alone, and never
of a measurement: results are the same from run to run.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """What suits the machine. Tests take others, so that small tensors are cut up as large ones."""

    tile_bytes: int  # of x in flight at once in a program
    narrowest: int  # bytes of a tile's row, where there are as many
    widest: int
    programs: int  # that fill the device
    pixel_block: int  # pixels of a program over small maps
    channel_block: int
    stencil_block: int  # pixels of its stencil at once
    shares: int = 64  # of a sum, at the most: what sums them is small
    parts: int = 4096  # elements of shares that are added at once
    large: int = 2**30  # elements of an image from which on 32 bits are too few for its offsets


# 8 KiB are four 16-byte loads for each of 128 threads, 512 bytes one for each thread of a warp, so
# that a row's sum stays in it; eight such programs on each of 132 multiprocessors are what the
# largest parts hold.
DEVICE = Limits(
    tile_bytes=8192,
    narrowest=128,
    widest=512,
    programs=8 * 132,
    pixel_block=512,
    channel_block=64,
    stencil_block=64,
)
# An operation costs the same there however much it does.
INTERPRETER = Limits(
    tile_bytes=2**20,
    narrowest=2**14,
    widest=2**14,
    programs=1,
    pixel_block=4096,
    channel_block=4096,
    stencil_block=4096,
)


@dataclass(frozen=True)
class Matrix:
    """An image as rows x cols, and its vectors; see passes.py for what a group is."""

    rows: int
    cols: int
    vector: int  # elements of a load
    group: int  # rows that are a whole number of vectors
    itemsize: int
    by_pixel: bool  # rows are pixels

    @property
    def groups(self) -> int:
        return self.rows // self.group

    @property
    def reach(self) -> int:
        """Columns read for one row of a group: with what belongs to its neighbours."""
        more = 2 * (self.vector - 1) if self.group > 1 else 0
        return (self.cols + more) // self.vector * self.vector


def matrix(
    shape: tuple[int, ...], itemsize: int, channels_last: bool, limits: Limits = DEVICE
) -> Matrix:
    _, channels, height, width = shape
    pixels = height * width
    by_pixel = channels_last or pixels == 1  # one pixel is a row of channels either way
    rows, cols = (pixels, channels) if by_pixel else (channels, pixels)
    vector = 16 // itemsize
    group = vector // math.gcd(cols, vector)
    # An image that is no whole number of vectors leaves the next one unaligned; a tile crosses one
    # row's end at the most, so a row has no fewer columns than a vector.
    if rows * cols % vector or (group > 1 and (cols < vector or rows * cols >= limits.large)):
        vector = group = 1
    return Matrix(rows, cols, vector, group, itemsize, by_pixel)


@dataclass(frozen=True)
class Tiles:
    """BR x BQ tiles, and how many of them in each direction."""

    br: int
    bq: int
    blocks: int
    windows: int


@dataclass(frozen=True)
class Split:
    """What one program cannot sum in time, `splits` do; each takes `each` tiles."""

    splits: int
    each: int


def sum_tiles(m: Matrix, images: int, limits: Limits) -> Tiles:
    """Of the kernels that sum: over the groups of rows, and the columns read for one phase."""
    elements = limits.tile_bytes // m.itemsize
    bq = width_of(m.reach, limits.narrowest // m.itemsize, limits.widest // m.itemsize)
    windows = -(-m.reach // bq)
    br = min(power_of_two(m.groups), max(1, elements // bq))
    if images * windows * -(-m.groups // br) < limits.programs and br > 1:
        br //= 2
    return Tiles(br, bq, -(-m.groups // br), windows)


def scale_tiles(m: Matrix, limits: Limits) -> Tiles:
    """Of the kernel that scales: over the groups, end to end. One crosses one row's end at most."""
    elements, widest = limits.tile_bytes // m.itemsize, limits.widest // m.itemsize
    if m.group > 1:
        widest = min(widest, power_of_two(m.cols + 1) // 2)
    cols = m.cols * m.group
    bq = width_of(cols, limits.narrowest // m.itemsize, widest)
    br = min(power_of_two(m.groups), max(1, elements // bq))
    return Tiles(br, bq, -(-m.groups // br), -(-cols // bq))


def split(tiles: int, programs: int, limits: Limits) -> Split:
    """Of a loop over so many tiles, in each of so many programs."""
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
    """The least that is no less."""
    return 1 << max(n - 1, 0).bit_length()
