"""What the machine code of the CUDA kernels must be, and what a GPU can issue: one table.

For float16, bfloat16 and float32, and for float64 as far as it has such kernels:

- no local memory, in any kernel
- no access of one byte of global or shared memory; of two in kernels for half types only
- a kernel for vectors has the loops of the table, each as often as its source has it, with just
  these 16-byte accesses on the way over whole vectors; there is no other loop that reads or writes
  vectors in global memory, except those that copy whole vectors into shared memory, or read past
  L1 what other blocks of the launch have written
- on that way every access of global memory is of a vector; anywhere in the loop every load is, and
  narrow stores are no more than the elements of the vectors stored, at edges, and the sums of a row
- on that way narrow accesses of shared memory are at most as many as the table says, each of one
  number of the type that sums are made in: the masks, the terms and the sums of rows
- it has no more instructions a vector than the table says
- one launch on the chip brings its image into shared memory by 16 bytes, or in bulk
- from 9.0 on a kernel of the portable launches waits for the launch before, and until then does no
  more with global memory than load vectors, or elements in a kernel for elements
- a kernel for elements, of tensors that are not aligned, and the small launches, which read no
  full-size tensor: the first two rules, and a limit on all their instructions
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from .machine_code import VECTOR, Function, Instruction, Loop

# Warp instructions that a GPU can issue while it moves 512 bytes, a vector for each lane of a warp:
# multiprocessors, with four schedulers each, clock, and the bandwidth that a copy was measured at.
GPUS = {"H100": (132, 1.98e9, 3.0e12), "H200": (132, 1.98e9, 4.3e12)}
SLOTS = {
    name: multiprocessors * 4 * clock * 32 * VECTOR / bandwidth
    for name, (multiprocessors, clock, bandwidth) in GPUS.items()
}
SIZES = {"half": 2, "bfloat16": 2, "float": 4, "double": 8}


@dataclass(frozen=True)
class HotLoop:
    """A loop over vectors of full-size tensors. Counts are a turn's, over whole vectors."""

    name: str
    vectors: tuple[int, int, int]  # from global memory, from shared, which keeps an image; stored
    loops: int  # so many alike, at most: nvcc may make one of some
    narrow: int  # numbers of small maps and of sums, in shared memory
    in_flight: int  # vectors that must be asked for before one is used
    limit: tuple[int, int, int]  # instructions a loaded vector, of 2-, 4- and 8-byte elements
    times: int = 0  # that it is gone through, in vectors of x, where a launch keeps the image
    sums: int = 1  # of a row, that leave the loop for memory

    def instructions(self, loop: Loop) -> float:
        """For each vector that is loaded."""
        return len(loop.way) / sum(self.vectors[:2])


# The limits are at most a tenth above the most that nvcc 13.0 makes of today's source for any of
# our architectures; the report prints what they are of the slots. Narrow accesses are, of a row,
# its weight, or its sum on the way to other lanes (sums), or the mask and term of the row, or of
# both rows, that a vector lies in (y, dx); sums of the one launch have, of a turn, a sum and what
# it comes on top of. The residual tail's passes (tail_) also read what a row has by channel or
# pixel.
# Vectors in flight are kDepth; the one launch reads them in shared memory. Where rows are whole
# numbers of vectors (whole), nothing is masked or selected; of those that begin inside a vector
# (split) the one launch's dx has whole vectors, across two rows, or those at a row's edges.
HOT_LOOPS: dict[str, tuple[HotLoop, ...]] = {
    "sums, forward, rows, whole": (HotLoop("x", (4, 0, 0), 1, 4, 4, (28, 17, 0)),),
    "sums, forward, rows, split": (HotLoop("x", (4, 0, 0), 1, 4, 4, (34, 22, 0)),),
    "sums, forward, cols, whole": (HotLoop("x", (4, 0, 0), 1, 4, 4, (26, 14, 0)),),
    "sums, forward, cols, split": (HotLoop("x", (4, 0, 0), 1, 4, 4, (30, 18, 0)),),
    "sums, forward, any, split": (HotLoop("x", (4, 0, 0), 1, 8, 4, (59, 52, 34)),),
    "sums, backward, any, whole": (HotLoop("dy x", (4, 0, 0), 1, 4, 4, (43, 23, 0)),),
    "sums, backward, any, split": (HotLoop("dy x", (4, 0, 0), 1, 4, 4, (54, 38, 27)),),
    "sums, through, rows, whole": (HotLoop("x", (4, 0, 0), 1, 4, 4, (30, 17, 0)),),
    "sums, through, rows, split": (HotLoop("x", (4, 0, 0), 1, 4, 4, (34, 22, 0)),),
    "sums, through, cols, whole": (HotLoop("x", (4, 0, 0), 1, 4, 4, (26, 14, 0)),),
    "sums, through, cols, split": (HotLoop("x", (4, 0, 0), 1, 4, 4, (31, 18, 0)),),
    "sums, through, any, split": (HotLoop("x", (4, 0, 0), 1, 8, 4, (0, 0, 32)),),
    "scale, forward, whole": (HotLoop("y", (4, 0, 4), 1, 4, 4, (50, 22, 0)),),
    "scale, forward, split": (HotLoop("y", (4, 0, 4), 1, 8, 4, (80, 38, 34)),),
    "scale, backward, whole": (HotLoop("dx", (4, 0, 4), 3, 8, 4, (61, 26, 0)),),
    "scale, backward, split": (HotLoop("dx", (4, 0, 4), 3, 16, 4, (96, 48, 40)),),
    "tail_sums, moments, rows": (HotLoop("u", (4, 0, 0), 1, 12, 4, (75, 52, 43), sums=2),),
    "tail_sums, moments, cols": (HotLoop("u", (4, 0, 0), 1, 0, 4, (54, 53, 46)),),
    "tail_sums, deviations, rows": (HotLoop("u", (4, 0, 0), 1, 12, 4, (75, 62, 51)),),
    "tail_sums, deviations, cols": (HotLoop("u", (4, 0, 0), 1, 8, 4, (72, 65, 59)),),
    "tail_sums, gradients, rows": (HotLoop("d", (6, 0, 2), 1, 10, 6, (60, 48, 37), sums=2),),
    "tail_sums, gradients, cols": (HotLoop("d", (6, 0, 2), 1, 4, 6, (60, 44, 34)),),
    "tail_sums, rectified, rows": (HotLoop("d", (4, 0, 0), 1, 10, 4, (73, 52, 45), sums=2),),
    "tail_sums, rectified, cols": (HotLoop("d", (4, 0, 0), 1, 4, 4, (72, 51, 37)),),
    "tail_scale, forward, rows": (HotLoop("out", (8, 0, 4), 1, 12, 8, (53, 27, 22)),),
    "tail_scale, forward, cols": (HotLoop("out", (8, 0, 4), 1, 4, 8, (52, 25, 19)),),
    "tail_scale, normed, rows": (HotLoop("out", (8, 0, 4), 1, 24, 8, (65, 35, 28)),),
    "tail_scale, normed, cols": (HotLoop("out", (8, 0, 4), 1, 4, 8, (61, 29, 22)),),
    "tail_scale, backward, rows": (HotLoop("du", (4, 0, 2), 1, 12, 4, (62, 33, 29)),),
    "tail_scale, backward, cols": (HotLoop("du", (4, 0, 2), 1, 4, 4, (57, 30, 22)),),
    "tail_scale, rectified, rows": (HotLoop("du", (4, 0, 2), 1, 14, 4, (74, 39, 31)),),
    "tail_scale, rectified, cols": (HotLoop("du", (4, 0, 2), 1, 4, 4, (69, 35, 26)),),
    "chip_forward": (
        HotLoop("sums of x", (0, 4, 0), 3, 6, 0, (56, 35, 0), times=2),
        HotLoop("y, whole", (0, 4, 4), 1, 4, 0, (49, 19, 0), times=1),
        HotLoop("y, split", (0, 2, 2), 2, 4, 0, (58, 28, 0)),
    ),
    "chip_backward": (
        HotLoop("sums of dy x", (0, 8, 0), 3, 6, 0, (43, 25, 0), times=2),
        HotLoop("sums of x", (0, 4, 0), 2, 4, 0, (45, 28, 0), times=1),
        HotLoop("dx, whole", (0, 2, 2), 3, 4, 0, (60, 27, 0), times=1),
        HotLoop("dx, across", (0, 3, 3), 3, 12, 0, (66, 31, 0)),
        HotLoop("dx, edges", (0, 1, 1), 3, 2, 0, (66, 37, 0)),
    ),
}
# A loop that reads so many numbers in shared memory, and stores no vectors, is the stencil's, over
# pixels; the vectors that it reads there are its coefficients.
TAPS = 18
# Instructions of the loops within those of sums, a turn of each, by the sums that a row has: they
# add its lanes, unrolled.
WITHIN = {1: 100, 2: 128}
# Instructions that round a float to bfloat16 on 7.5, which has none of its own for that.
ROUNDING = 20
# Instructions that widening a vector of bfloat16 takes more than one of float16, on any of ours.
WIDENING = 6
# All instructions of kernels without a loop over vectors; those for elements mostly make masks, and
# scale the parameters' gradients too.
WHOLE = {"sums": 5100, "scale": 8850, "maps": 5000, "finish": 2750}
WHOLE |= {"tail_sums": 2450, "tail_scale": 1500, "tail_maps": 5650}
WHOLE |= {"tail_norm": 1900, "tail_gradients": 3500}
# The mark of a load past L1: ld.global.cg.
PAST_L1 = "STRONG"
# Until the launch before has ended, from sm_90 on: griddepcontrol.wait.
WAIT = "ACQBULK"
# Full-size tensors that go through memory where a launch keeps the image.
MOVED = {"chip_forward": 2, "chip_backward": 3}


def kernel_of(name: str) -> tuple[str, int, bool]:
    """Of scale<half, 8, true, split>: "scale, backward, split"; an element's bytes; for vectors."""
    base, *arguments = re.findall(r"\w+", name)
    size = SIZES.get(arguments[0], 0) if arguments else 0
    if base.removeprefix("tail_") in ("sums", "scale"):
        ways = {"true": "backward", "false": "forward"}
        base = ", ".join([base, *(ways.get(word, word) for word in arguments[2:])])
    vectors = base in HOT_LOOPS and arguments[1:2] != ["1"]
    return base, size, vectors


def number(arch: str) -> int:
    """90 of sm_90."""
    return int(re.sub(r"\D", "", arch))


def column(size: int) -> int:
    """Where a limit for elements of so many bytes stands."""
    return {2: 0, 4: 1, 8: 2}[size]


def limit_of(hot: HotLoop, size: int, bfloat16: bool) -> int:
    """Instructions for each vector that is loaded, where the GPU rounds to bfloat16 by itself."""
    return hot.limit[column(size)] + (WIDENING if bfloat16 else 0)


def found_loops(name: str, function: Function) -> Iterator[tuple[HotLoop, list[Loop]]]:
    """The table's loops over vectors, as they are in the code."""
    base, _, vectors = kernel_of(name)
    loops = [loop for loop in function.loops if not of_stencil(loop)]
    for hot in HOT_LOOPS[base] if vectors else ():
        yield hot, [loop for loop in loops if vectors_of(loop) == hot.vectors]


def of_stencil(loop: Loop) -> bool:
    return len(narrow(loop.way, "shared", True)) >= TAPS and not loop.vectors("global", False)


def vectors_of(loop: Loop) -> tuple[int, int, int]:
    loads, kept = (loop.vectors(space, True) for space in ("global", "shared"))
    return loads, kept, loop.vectors("global", False)


def copies(loop: Loop) -> bool:
    """Whether it brings vectors into shared memory."""
    return loop.vectors("copy", True) > 0 or (
        loop.vectors("global", True) == loop.vectors("shared", False) > 0
    )


def exchanges(loop: Loop) -> bool:
    """Whether it reads vectors that other blocks of the launch have written."""
    accesses = [i for i in loop.way if i.access and i.access.space == "global"]
    return all(i.access.load and PAST_L1 in i.opcode.split(".") for i in accesses if i.access)


def narrow(code: tuple[Instruction, ...], space: str, load: bool | None = None) -> list[int]:
    """Bytes of each access that is less than a vector."""
    accesses = [i.access for i in code if i.access]
    return [
        a.width
        for a in accesses
        if a.space == space and a.width < VECTOR and load in (None, a.load)
    ]


def share(instructions: float, moved: float, gpu: str) -> float:
    """Of the issue slots, while memory is as fast as it gets."""
    return instructions / moved / SLOTS[gpu]


def kept_instructions(name: str, function: Function) -> float | None:
    """For each vector of x, of one launch that keeps the image; None for other kernels."""
    total = 0.0
    for hot, loops in found_loops(name, function):
        if hot.times and loops:
            total += hot.times * max(map(hot.instructions, loops))
    return total or None


def faults(name: str, arch: str, function: Function) -> Iterator[str]:
    """What is against the rules, in words: expected this, got that."""
    base, size, vectors = kernel_of(name)
    code = function.instructions
    if not vectors and base.partition(",")[0] not in WHOLE:
        yield "expected a kernel that the table knows, got one without limits: add it"
        return
    if local := [i.opcode for i in code if i.access and i.access.space == "local"]:
        yield f"expected no local memory, got {len(local)} accesses ({local[0]})"
    least = 2 if size == 2 else 4
    if base.partition(",")[0] in WHOLE and number(arch) >= 90:
        yield from early_faults(code, vectors)
    widths = narrow(code, "global") + narrow(code, "shared")
    if too_narrow := [width for width in widths if width < least]:
        got = f"{len(too_narrow)} of {min(too_narrow)}"
        yield f"expected accesses of {least} bytes and more, got {got}"
    if not vectors:
        limit = WHOLE[base.partition(",")[0]]
        if len(code) > limit:
            yield f"expected at most {limit} instructions, got {len(code)}"
        return

    matched: list[Loop] = []
    for hot, loops in found_loops(name, function):
        loops = [loop for loop in loops if not copies(loop)]
        matched += loops
        if not 1 <= len(loops) <= hot.loops:
            wanted = "1" if hot.loops == 1 else f"1 to {hot.loops}"
            yield f"loops over {shape(hot.vectors)}: expected {wanted}, got {len(loops)}"
        for loop in loops:
            problems = loop_faults(hot, loop, size, number(arch), "bfloat16" in name)
            yield from (f"{hot.name}: {problem}" for problem in problems)
    for loop in function.loops:
        read, _, written = vectors_of(loop)
        if (read or written) and not (loop in matched or copies(loop) or exchanges(loop)):
            yield f"expected the table's loops, got one over {shape(vectors_of(loop))}"
    if base in MOVED and not (
        any(map(copies, function.loops)) or any(i.opcode.startswith("UBLKCP") for i in code)
    ):
        yield "expected copies into shared memory of 16 bytes or in bulk, got none"


def early_faults(code: tuple[Instruction, ...], vectors: bool) -> Iterator[str]:
    """Of a kernel that may begin before the one before it has ended: it must wait for that."""
    waits = [i.address for i in code if i.opcode == WAIT]
    if not waits:
        yield f"expected a wait for the launch before ({WAIT}), got none"
        return
    before = [i for i in code if i.access and i.address < waits[0]]
    for i in before:
        of_x = i.access.load and (i.access.width == VECTOR or not vectors)
        if i.access.space == "global" and not of_x:
            yield f"expected no more than loads of x and dy before {WAIT}, got {i.opcode}"
            return


def shape(vectors: tuple[int, int, int]) -> str:
    return f"{'+'.join(map(str, vectors))} vectors (from global, from shared, stored)"


def loop_faults(
    hot: HotLoop, loop: Loop, size: int, capability: int, bfloat16: bool
) -> Iterator[str]:
    entry = max(size, 4)  # bytes of what sums are made in
    if widths := narrow(loop.way, "global"):
        yield f"expected whole vectors on the way, got {len(widths)} of {min(widths)} bytes"
    small = narrow(loop.way, "shared")
    if len(small) > hot.narrow or any(width != entry for width in small):
        got = f"{len(small)}, the narrowest of {min(small)}"
        yield f"expected at most {hot.narrow} numbers of {entry} bytes a turn, got {got}"
    loads, stores = (narrow(loop.body, "global", load) for load in (True, False))
    if loads:
        yield f"expected loads of whole vectors, got {len(loads)} of {min(loads)} bytes"
    most = hot.sums + hot.vectors[2] * VECTOR // size
    if len(stores) > most or any(width not in (size, entry) for width in stores):
        got = f"{len(stores)}, the narrowest of {min(stores)} bytes"
        yield f"expected at most {most} narrow stores, of edges' elements and sums, got {got}"
    if len(loop.within) > (most := WITHIN[hot.sums]):
        yield f"expected at most {most} instructions of loops within, got {len(loop.within)}"
    # ptxas asks for half of the vectors, then for the others, where registers are short: of
    # float64, and from 10.0 on.
    in_flight = hot.in_flight if size < 8 and capability < 100 else (hot.in_flight + 1) // 2
    if bfloat16 and capability < 80:  # rounding leaves no registers for more
        in_flight = min(in_flight, 1)
    if loop.in_flight() < in_flight:
        yield f"expected {in_flight} vectors in flight, got {loop.in_flight()}"
    limit = limit_of(hot, size, bfloat16)
    if bfloat16 and capability < 80:
        limit += ROUNDING * VECTOR // size * hot.vectors[2] // sum(hot.vectors[:2])
    if hot.instructions(loop) > limit:
        got = f"{hot.instructions(loop):.1f}"
        yield f"expected at most {limit} instructions a vector, got {got}"
