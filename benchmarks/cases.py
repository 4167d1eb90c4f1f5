"""Which layers are measured: shapes, types, layouts, regimes, and the two presets."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch

from benchmarks.environment import BenchmarkError

DTYPES = {name: getattr(torch, name) for name in ("float32", "float64", "float16", "bfloat16")}
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
REGIMES = ("warm", "cold")
LAUNCHES = ("stream", "graph")  # how kernels are started on a GPU

Shape = tuple[int, int, int, int]
STAGES: tuple[Shape, ...] = (  # ResNet-50: the stem's map, then the four stages
    (16, 64, 56, 56),
    (16, 256, 56, 56),
    (16, 512, 28, 28),
    (16, 1024, 14, 14),
    (16, 2048, 7, 7),
)
QUICK: tuple[Shape, ...] = (STAGES[0], STAGES[3])
QUICK_TAIL = STAGES[3]
SSD: tuple[Shape, ...] = (  # SSD300 on a ResNet cut after layer3, and its first stage
    (8, 256, 75, 75),
    (8, 1024, 38, 38),
    (8, 512, 19, 19),
    (8, 512, 10, 10),
    (8, 256, 5, 5),
    (8, 256, 3, 3),
    (8, 256, 1, 1),
)
SINGLE: tuple[Shape, ...] = ((1, 256, 56, 56), (1, 1024, 14, 14))
OVERHEAD: Shape = (1, 8, 4, 4)
GPU_BATCH, GPU_BATCHES = 64, (1, 8, 32, 256)  # the main batch size, and the others
ASKED = {"layer": "asked", "tail": "asked tail"}  # what can be measured, and in which role
TAILS = ("tail", "asked tail")  # roles in which it is the tail of a residual block


@dataclass(frozen=True)
class Case:
    """One shape and type, in every layout named; `role` says what it is measured for.

    Roles: "stage" (those that means are taken over), "ssd", "single" (one image), "half",
    "batch" and "dtype" (a stage at another batch size or in another type), "overhead" (so small
    that only Python and dispatch are left), "asked" (by --shapes). In the roles "tail" (of the
    stages, means of their own) and "asked tail" it is not the layer alone, but the tail of a
    residual block.
    """

    shape: Shape
    role: str
    dtype: str = "float32"
    layouts: tuple[str, ...] = tuple(LAYOUTS)
    regimes: tuple[str, ...] = ("warm",)
    threads: int | None = None  # None: as the process has it
    compiled: bool = True  # whether what is compiled for each case takes part
    launches: tuple[str, ...] = ("stream",)

    @property
    def subject(self) -> str:
        """ "layer" or "tail"."""
        return "tail" if self.role in TAILS else "layer"

    def __str__(self) -> str:
        suffix = f" {self.threads} thread(s)" if self.threads else ""
        suffix += ", tail" if self.subject == "tail" else ""
        return f"{'x'.join(map(str, self.shape))} {self.dtype}{suffix}"


def preset(name: str) -> list[Case]:
    """The cases of "quick" (about two minutes) or "full" (everything)."""
    if name == "quick":
        return [
            *(Case(shape, "stage") for shape in QUICK),
            Case(OVERHEAD, "overhead", layouts=("contiguous",), compiled=False),
            Case(QUICK_TAIL, "tail"),
        ]
    threads = sorted({1, torch.get_num_threads()})
    return [
        *(Case(shape, "stage", regimes=REGIMES) for shape in STAGES),
        *(Case(shape, "ssd") for shape in SSD),
        *(Case(shape, "single", threads=n) for shape, n in product(SINGLE, threads)),
        *(
            Case(shape, "half", dtype=dtype)
            for shape, dtype in product((STAGES[1], STAGES[3]), ("float16", "bfloat16"))
        ),
        Case(OVERHEAD, "overhead", layouts=("contiguous",)),
        *(Case(shape, "tail", threads=n) for n, shape in product(reversed(threads), STAGES)),
    ]


def gpu_preset(name: str) -> list[Case]:
    """The same for a GPU, what matters most first: a run out of time leaves out the last ones.

    In "quick" torch.compile and Triton take part at two stages only, which are measured without
    them before: to compile takes longer than to measure.
    """
    both: dict[str, Any] = {"regimes": REGIMES, "launches": LAUNCHES}
    full = name == "full"
    stages = [(GPU_BATCH, *shape[1:]) for shape in STAGES]
    few = stages if full else [stages[1], stages[3]]
    kinds = ("float16", "bfloat16", "float32")
    batches = [(n, *shape[1:]) for n, shape in product(GPU_BATCHES, few)]
    return [
        *(Case(shape, "stage", "float16", compiled=full, **both) for shape in stages),
        *(Case(s, "tail", "float16", compiled=full, launches=LAUNCHES) for s in few),
        Case(OVERHEAD, "overhead", layouts=("contiguous",), compiled=full),
        *(Case(shape, "stage", "float16", **both) for shape in (() if full else few)),
        *(Case(shape, "dtype", k, compiled=full, **both) for k, shape in product(kinds[1:], few)),
        *(Case(shape, "batch", "float16", compiled=full, **both) for shape in batches),
        *(Case(shape, "ssd", "float16", compiled=full, launches=LAUNCHES) for shape in SSD),
        *(Case(s, "batch", k, **both) for k, s in product(kinds[1:] if full else (), batches)),
    ]


def parse_shapes(text: str) -> list[Shape]:
    """ "16x64x56x56,1x8x4x4" as tuples (N, C, H, W)."""
    shapes = []
    for part in text.split(","):
        if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*){3}", part.strip()):
            raise BenchmarkError(
                f"--shapes: expected NxCxHxW with numbers from 1 on, such as 16x64x56x56,"
                f" got {part!r}"
            )
        n, c, h, w = map(int, part.split("x"))
        shapes.append((n, c, h, w))
    return shapes


def choose(option: str, text: str, known: list[str]) -> tuple[str, ...]:
    """A comma-separated option as a tuple of known names."""
    names = tuple(part.strip() for part in text.split(","))
    for name in names:
        if name not in known:
            raise BenchmarkError(f"{option}: expected some of {','.join(known)}, got {name!r}")
    return names


def from_options(options: argparse.Namespace) -> list[Case]:
    """The preset's cases, cut down to, or replaced by, what the options ask for."""

    def chosen(option: str, known: Iterable[str]) -> tuple[str, ...] | None:
        text = getattr(options, option)
        return None if text is None else choose(f"--{option}", text, list(known))

    layouts = chosen("layouts", LAYOUTS) or tuple(LAYOUTS)
    dtypes, regimes = chosen("dtypes", DTYPES), chosen("regimes", REGIMES)
    subjects = chosen("subjects", ASKED) or tuple(ASKED)
    launches = LAUNCHES if options.device == "cuda" else LAUNCHES[:1]
    if options.shapes is not None:
        shapes, kinds = parse_shapes(options.shapes), dtypes or ("float32",)
        for n, c, h, w in shapes if "tail" in subjects else ():
            if n * h * w == 1:
                raise BenchmarkError(
                    "--shapes: expected more than one value a channel, for the tail's norm to have"
                    f" statistics of, got 1x{c}x1x1; --subjects layer measures the layer alone"
                )
        return [
            Case(shape, ASKED[subject], dtype, layouts, regimes or ("warm",), launches=launches)
            for subject, shape, dtype in product(subjects, shapes, kinds)
        ]
    cases = []
    found = gpu_preset(options.preset) if options.device == "cuda" else preset(options.preset)
    for case in found:
        kept = tuple(layout for layout in case.layouts if layout in layouts)
        held = tuple(regime for regime in case.regimes if regime in (regimes or REGIMES))
        if case.subject in subjects and kept and held and case.dtype in (dtypes or DTYPES):
            cases.append(replace(case, layouts=kept, regimes=held))
    if not cases:
        raise BenchmarkError(
            "nothing to measure: the options leave no case of this preset; name shapes with"
            " --shapes NxCxHxW,..."
        )
    return cases
