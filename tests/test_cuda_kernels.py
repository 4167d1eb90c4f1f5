"""Portable CUDA kernels, run on the CPU: right, clean under sanitizers, the same in any order."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from .cases import (
    CASES,
    DTYPE_PAIRS,
    DTYPES,
    FEW_CASES,
    FULL,
    LAYOUTS,
    assert_equal,
    assert_promised,
    make,
)
from .plans import CUDA
from .simt.calls import results

# Whole vectors, rows that begin within one, one pixel, one channel, one element short of a vector.
SHAPES = [(2, 8, 4, 4), (2, 16, 7, 7), (1, 24, 5, 5), (2, 33, 1, 1), (1, 1, 9, 8), (2, 5, 3, 7)]
# Several tiles along an axis; more partial sums than a block adds; rows longer than a tile's reach;
# images of one row, one column; super-rows longer than a tile.
LARGE = [
    (2, 64, 14, 14),
    (1, 3, 130, 130),
    (1, 3, 2, 12000),
    (1, 2, 24000, 1),
    (1, 40000, 1, 1),
    (1, 300, 2, 2),
    (1, 8, 75, 75),
]


def check(calls, answers):
    for call, got in zip(calls, answers, strict=True):
        assert_promised(call, got)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("order", "gate"), CASES)
def test_results(kernels, order, gate, layout):
    calls = [
        make(shape, order, gate, dtype=dtype, parameter_dtype=parameter_dtype, layout=layout)
        for shape, (dtype, parameter_dtype) in itertools.product(SHAPES, DTYPE_PAIRS)
    ]
    check(calls, results(kernels(), calls))


@pytest.mark.parametrize("multiprocessors", [1, 132])  # large tiles, small ones
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", LARGE)
def test_many_tiles(kernels, shape, layout, multiprocessors):
    dtypes = (torch.float16, torch.float32) if not FULL else DTYPES
    calls = [
        make(shape, order, gate, dtype=dtype, layout=layout)
        for dtype in dtypes
        for order, gate in FEW_CASES[:: 1 if FULL else 3]
    ]
    check(calls, results(kernels(), calls, multiprocessors=multiprocessors))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_unaligned_tensors(kernels, layout):
    calls = [make((2, 16, 4, 6), dtype=dtype, layout=layout) for dtype in DTYPES]
    check(calls, results(kernels(), calls, aligned=False))


# Maps made by launches of their own, of sums from many tiles; a gate's gradients in many shares.
MANY_LAUNCHES = "partials=1,lanes=2,height=64,share=1"


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("order", "gate"), CASES)
def test_maps_made_between_passes(kernels, order, gate, layout):
    grid = 5 if layout == "contiguous" else 2**20  # several launches of a step, or one
    calls = [
        make(shape, order, gate, dtype=dtype, layout=layout)
        for shape in [(3, 20, 7, 9), (2, 5, 30, 17), (1, 70, 1, 33)]
        for dtype in (torch.float16, torch.float64)
    ]
    check(calls, results(kernels(), calls, limits=f"{MANY_LAUNCHES},grid={grid}"))


@pytest.mark.parametrize("order", ["spatial_channel", "channel_spatial", "parallel"])
def test_no_images(kernels, order):
    call = make((0, 8, 4, 4), order)
    (got,) = results(kernels(), [call])
    assert got["y"].shape == call.x.shape
    assert all((t == 0).all() for t in got.values())


def test_a_large_gate_kernel(kernels):
    calls = [
        make((2, 16, 3, 3), order, "eca", kernel_size=k)
        for order in ("spatial_channel", "channel_spatial", "parallel", "channel")
        for k in (1, 5, 31)
    ]
    check(calls, results(kernels(), calls))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_nan_stays_in_its_image_and_its_channel(kernels, layout):
    call = make((3, 8, 7, 7), "channel", layout=layout, dtype=torch.float16)
    call.x[1, 3, 2, 2] = torch.nan
    (got,) = results(kernels(), [call])
    for name in ("y", "dx"):
        hit = got[name].isnan().flatten(2).any(2)
        assert hit.nonzero().tolist() == [[1, 3]]


@pytest.mark.parametrize("order", ["descending", "random"])
def test_any_order_of_lanes_gives_the_same_bits(kernels, order):
    calls = [make((2, 16, 7, 7), dtype=dtype) for dtype in DTYPES]
    calls.append(make((1, 3, 60, 60), "channel_spatial", layout="channels_last"))
    calls += [make((3, 20, 7, 9), "parallel", gate) for gate in ("scalar", "eca")]
    for limits in ("", MANY_LAUNCHES):
        once = results(kernels(), calls, limits=limits)
        again = results(kernels(), calls, limits=limits, SIMT_ORDER=order)
        for one, other in zip(once, again, strict=True):
            assert_equal(one, other)


@pytest.mark.parametrize("kind", ["address", "thread"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_sanitizers_find_nothing(kernels, layout, kind):
    calls = [
        make(shape, order, gate, dtype=dtype, layout=layout)
        for shape in [(2, 9, 7, 7), (1, 16, 14, 14), (1, 3, 2, 70), (3, 40, 1, 1)]
        for order, gate in FEW_CASES
        for dtype in (torch.float16, torch.float32)[: 2 if FULL else 1]
    ]
    calls.append(make((1, 8, 25, 25), dtype=torch.bfloat16, layout=layout))
    calls.append(make((1, 4, 5, 5), "channel_spatial", dtype=torch.float64, layout=layout))
    calls.append(make((1, 2, 6000, 1), "parallel", "scalar", layout=layout))
    check(calls, results(kernels(kind), calls, SIMT_ORDER="random", SIMT_LIVE="4"))
    calls = [make((2, 9, 7, 7), order, gate, layout=layout) for order, gate in FEW_CASES]
    options = {"limits": MANY_LAUNCHES, "SIMT_ORDER": "random", "SIMT_LIVE": "4"}
    check(calls, results(kernels(kind), calls, **options))


MANY = settings(
    max_examples=200 if FULL else 25,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
RANDOM_SHAPES = st.tuples(
    st.integers(1, 3), st.integers(1, 40), st.integers(1, 17), st.integers(1, 17)
)


@MANY
@given(
    shape=RANDOM_SHAPES,
    case=st.sampled_from(CASES),
    dtypes=st.sampled_from(DTYPE_PAIRS),
    layout=st.sampled_from(list(LAYOUTS)),
    multiprocessors=st.sampled_from([1, 16, 132]),
    aligned=st.booleans(),
    limits=CUDA,
)
def test_random_shapes(kernels, shape, case, dtypes, layout, multiprocessors, aligned, limits):
    dtype, parameter_dtype = dtypes
    call = make(shape, *case, dtype=dtype, parameter_dtype=parameter_dtype, layout=layout)
    options = {"multiprocessors": multiprocessors, "aligned": aligned, "limits": limits}
    check([call], results(kernels(), [call], **options))
