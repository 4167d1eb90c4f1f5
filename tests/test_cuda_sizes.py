"""What the CUDA backend decides by size, with its kernels run on the CPU: several launches a step,
folds, offsets beyond 32 bits, kernels for rows of whole vectors."""

from __future__ import annotations

import re

import pytest
import torch

from da_ops.backends.schedule import SCHEDULES
from da_ops.reference import ORDERS

from .cases import FEW_CASES, FULL, LAYOUTS, make
from .plans import text
from .simt.calls import OnChip, results
from .test_cuda_kernels import check

# What only large tensors get by themselves: several launches a step, the last of them smaller; sums
# folded along either axis; a halo of five pieces of rows.
LIMITS = [
    text(grid=1),
    text(grid=7),
    text(partials=2, lanes=2, height=32),
    text(lanes=3, max_reads=1),
]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("limits", LIMITS)
def test_small_limits(kernels, limits, layout):
    calls = [
        make((3, 40, 5, 16), order, gate, dtype=dtype, layout=layout)
        for order, gate in FEW_CASES
        for dtype in (torch.float16, torch.float32)
    ]
    check(calls, results(kernels(), calls, limits=limits))
    check(calls, results(kernels(), calls, limits=text(grid=5, scalar_lanes=3), aligned=False))


# Images of which 32 bits do not count the elements of so many; nor those of a map by pixel, by
# channel. Those of one row are one block's.
FAR = [((64, 32, 32), "affine", team) for team in (OnChip("counter", 2), OnChip("cluster", 2))]
FAR += [
    (image, gate, team)
    for image, gate in (
        ((64, 32, 32), "affine"),
        ((1, 256, 256), "eca"),
        ((65536, 1, 1), "sigmoid"),
    )
    for team in (None, OnChip())
]
TWO_ORDERS = ("spatial_channel", "channel_spatial")
FAR_CALLS = [(order, *far) for far in FAR for order in TWO_ORDERS]
# To add up a gate's gradient over so many numbers takes a minute and more: once is enough.
GATE_FAR = [
    (order, (65536, 1, 1), "scalar", team) for team in (None, OnChip()) for order in TWO_ORDERS
]
FAR_CALLS += GATE_FAR if FULL else GATE_FAR[:1]


@pytest.mark.parametrize(("order", "image", "gate", "on_chip"), FAR_CALLS)
def test_offsets_beyond_32_bits(kernels, order, image, gate, on_chip):
    """The last image of a tensor whose others are zeros, that take no memory and are not run."""
    far = 2**32 // torch.Size(image).numel() + 1
    options = {"far": far, "limits": text(grid=2**30)}
    if on_chip:
        options["on_chip"] = on_chip._replace(images_at_once=far + 1)
    dtypes = {"dtype": torch.float16, "parameter_dtype": torch.float32}
    for layout in LAYOUTS:
        call = make((1, *image), order, gate, **dtypes, layout=layout)
        check([call], results(kernels(), [call], **options))


@pytest.mark.parametrize("kind", ["address", "thread"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_sanitizers_find_nothing(kernels, layout, kind):
    """Several blocks at a time: none folds what is another's, or beyond the last entry."""
    calls = [
        make((2, 40, 5, 8), order, gate, dtype=torch.float16, layout=layout)
        for order, gate in [("parallel", "affine"), ("spatial_channel", "eca")]
    ]
    limits = text(grid=7, partials=2, lanes=2, height=32)
    options = {"SIMT_ORDER": "random", "SIMT_LIVE": "4"}
    check(calls, results(kernels(kind), calls, limits=limits, **options))


@pytest.mark.parametrize("kind", ["address", "thread"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kept", [0, 1, 3, 6])
def test_on_chip_sanitizers_find_nothing(kernels, kept, layout, kind):
    """Rows of several tiles, slabs of three chunks, one image after another: the next one's chunk
    takes the place of one that no tile needs any more."""
    calls = [make((3, 80, 8, 10), dtype=torch.float16, layout=layout)]
    limits = text(chip_lanes=4, chip_rows=8, chunks=3)
    options = {"on_chip": OnChip(kept=kept), "SIMT_ORDER": "random"}
    check(calls, results(kernels(kind), calls, limits=limits, **options))


# Kernels' template arguments, by their numbers: what is summed, whether rows begin within vectors.
ADDS, FIT = ("rows", "cols", "any"), ("whole", "split")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    ("shape", "dtype", "fit"),
    [
        ((2, 16, 4, 4), torch.float16, "whole"),
        ((2, 12, 6, 6), torch.float16, "split"),
        ((2, 4, 2, 6), torch.float32, "whole"),
        ((2, 6, 3, 6), torch.float32, "split"),
    ],
)
def test_which_kernels_run(kernels, tmp_path, shape, dtype, fit, order, layout):
    """No bit shows it: those for rows of whole vectors run where rows are that, and those that are
    made for what a pass sums. A first pass for both sums has one kernel, for any rows."""
    results(
        kernels(),
        [make(shape, order, dtype=dtype, layout=layout)],
        SIMT_KERNELS=str(tmp_path / "k"),
    )
    passes = re.findall(r"::((?:sums|scale)<.*?>)\(", (tmp_path / "k").read_text())
    assert len(passes) == sum(map(len, SCHEDULES[order]))
    for kernel in passes:
        of = {name: int(i) for name, i in re.findall(r"::(Sums|Adds|Fit)\)(\d)", kernel)}
        both = order == "parallel" and of.get("Sums") == 0
        assert FIT[of["Fit"]] == ("split" if both else fit), kernel
        assert re.search(rf", {16 // dtype.itemsize}, ", kernel)  # elements at once
        if "Sums" in of:
            product = of["Sums"] == 1
            assert (ADDS[of["Adds"]] == "any") == (both or product), kernel
