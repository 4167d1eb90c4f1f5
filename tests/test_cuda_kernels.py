"""The CUDA kernels, run on the CPU: right, clean under the sanitizers, the same in any order."""

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
from .plans import CUDA, CUDA_ON_CHIP, text
from .simt.calls import OnChip, Refused, results

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
MANY_LAUNCHES = "terms=1,lanes=2,height=64,share=1"


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


# The kernels that keep an image on the chip: one block, or several that wait for each other at a
# cluster's barrier or at a counter; a team has several images, one after another.
TEAMS = [
    OnChip(),
    OnChip("counter", blocks=2, images_at_once=2),
    OnChip("counter", blocks=3),
    OnChip("cluster", blocks=2, images_at_once=2),
    OnChip("cluster", blocks=3),
]
ON_CHIP_DTYPES = [pair for pair in DTYPE_PAIRS if pair[0] != torch.float64]
# Where not all are kept, eight chunks of x, eight of dy.
CHUNKS = (2, 256, 16, 16)


def name(team):
    return f"{team.barrier}-{team.blocks}"


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("team", TEAMS, ids=name)
def test_on_chip(kernels, team, layout):
    calls = [
        make(shape, order, gate, dtype=torch.float16, layout=layout)
        for order, gate in (CASES if FULL else FEW_CASES)
        for shape in [(3, 24, 6, 8), (2, 40, 7, 7)]
    ]
    calls += [
        make((2, 32, 4, 6), order, dtype=dtype, parameter_dtype=parameter_dtype, layout=layout)
        for dtype, parameter_dtype in ON_CHIP_DTYPES
        for order in ("spatial_channel", "channel_spatial")
    ]
    check(calls, results(kernels(), calls, on_chip=team))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kept", [0, 3, 7, 8, 11])  # none, some of x, x, x and some of dy
def test_on_chip_what_is_not_kept_is_read_again(kernels, kept, layout):
    for team in (OnChip(), OnChip("counter", 2)):
        calls = [
            make(CHUNKS, order, dtype=torch.bfloat16, layout=layout)
            for order in ("spatial_channel", "channel_spatial", "parallel")
        ]
        check(calls, results(kernels(), calls, on_chip=team._replace(kept=kept)))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kept", [0, 1, 2, 3, 4, 7])
@pytest.mark.parametrize("team", TEAMS, ids=name)
def test_on_chip_many_chunks_of_many_images(kernels, team, kept, layout):
    """A ring goes on from visit to visit and from image to image; a team's last block has fewer
    chunks than the others, or none that do not fit."""
    calls = [
        make((5, 136, 8, 17), order, dtype=torch.float16, layout=layout)
        for order in ("spatial_channel", "channel_spatial", "parallel", "channel")
    ]
    for limits in (text(chip_rows=8), text(chip_rows=8, chip_lanes=8, chunks=8)):
        check(calls, results(kernels(), calls, on_chip=team._replace(kept=kept), limits=limits))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_on_chip_a_ring_holds_whole_chunks_in_each_place(kernels, layout):
    """Slabs of a whole chunk and a short one, but the last block's of the whole one alone, which
    comes to either place."""
    calls = [make((2, 100, 10, 10), dtype=torch.float16, layout=layout)]
    team = OnChip("counter", 3, kept=0)
    check(calls, results(kernels(), calls, on_chip=team, limits=text(chip_rows=8)))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("team", TEAMS[:2], ids=name)
def test_on_chip_odd_sizes(kernels, team, layout):
    """Rows shorter than a vector, one pixel, one channel, no whole number of vectors, primes."""
    shapes = [(1, 37, 3, 13), (1, 31, 41, 1), (2, 41, 5, 5)]
    if team.blocks == 1:
        shapes += [(2, 5, 5, 3), (2, 11, 2, 2), (2, 33, 1, 1), (2, 1, 9, 8)]
    calls = [
        make(shape, order, "eca", dtype=dtype, layout=layout)
        for shape in shapes
        for order in ("spatial_channel", "channel_spatial")
        for dtype in (torch.float16, torch.float32)
    ]
    check(calls, results(kernels(), calls, on_chip=team))
    calls = [make((2, 40, 7, 7), dtype=dtype, layout=layout) for dtype, _ in ON_CHIP_DTYPES]
    check(calls, results(kernels(), calls, on_chip=team, aligned=False))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("team", [OnChip(), OnChip("counter", 2)], ids=name)
def test_on_chip_one_mask_of_what_is_not_aligned(kernels, team, layout):
    """Nothing is written past a slab of whole vectors: the ones of the mask that is not there."""
    calls = [
        make(shape, order, dtype=dtype, layout=layout)
        for shape in ((2, 6, 4, 12), (1, 3, 40, 41))
        for order in ("spatial", "channel")
        for dtype, _ in ON_CHIP_DTYPES
    ]
    check(calls, results(kernels(), calls, on_chip=team, aligned=False))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_on_chip_rows_wider_than_a_block(kernels, layout):
    shape = (1, 16, 75, 75) if layout == "contiguous" else (1, 4104, 2, 3)
    for team in (OnChip(kept=1), OnChip("counter", 2)):
        calls = [
            make(shape, order, dtype=torch.float16, layout=layout)
            for order in ("spatial_channel", "channel_spatial", "parallel")
        ]
        check(calls, results(kernels(), calls, on_chip=team))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("team", [OnChip("counter", 4), OnChip("cluster", 4)], ids=name)
def test_on_chip_a_mask_looks_beyond_the_next_block(kernels, team, layout):
    calls = [
        make((1, 16, 8, 2), order, "eca", kernel_size=31, layout=layout)
        for order in ("spatial_channel", "channel_spatial", "parallel", "channel")
    ]
    check(calls, results(kernels(), calls, on_chip=team))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("aligned", [True, False])
def test_on_chip_nan_stays_in_its_image(kernels, layout, aligned):
    """All three images pass through the same shared memory."""
    for team in (OnChip(), OnChip("cluster", 2), OnChip("counter", 2)):
        call = make((3, 40, 7, 7), layout=layout, dtype=torch.float16)
        (clean,) = results(kernels(), [call], on_chip=team, aligned=aligned)
        call.x[1] = torch.nan
        call.dy[1, 3] = torch.inf
        (got,) = results(kernels(), [call], on_chip=team, aligned=aligned)
        for result in ("y", "dx"):
            assert got[result][1].isnan().any()
            assert torch.equal(got[result][::2], clean[result][::2])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_on_chip_nan_stays_in_its_channel(kernels, layout):
    call = make((3, 16, 7, 7), "channel", layout=layout, dtype=torch.float16)
    call.x[1, 3, 2, 2] = torch.nan
    for team in (OnChip(), OnChip("counter", 2)):
        (got,) = results(kernels(), [call], on_chip=team)
        for result in ("y", "dx"):
            hit = got[result].isnan().flatten(2).any(2)
            assert hit.nonzero().tolist() == [[1, 3]]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_on_chip_bits_depend_on_nothing_but_the_team(kernels, layout):
    """Not on the order of lanes, how teams share out the images, what they wait at or keep."""
    calls = [make((3, 64, 8, 8), dtype=dtype, layout=layout) for dtype, _ in ON_CHIP_DTYPES]
    once = results(kernels(), calls, on_chip=OnChip("counter", 2))
    for order, team in [
        ("descending", OnChip("counter", 2)),
        ("random", OnChip("counter", 2, images_at_once=3)),
        ("ascending", OnChip("cluster", 2, images_at_once=2)),
        ("ascending", OnChip("counter", 2, kept=0)),
    ]:
        again = results(kernels(), calls, on_chip=team, SIMT_ORDER=order)
        for one, other in zip(once, again, strict=True):
            assert_equal(one, other)


@pytest.mark.parametrize("kind", ["address", "thread"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("team", TEAMS if FULL else TEAMS[::2], ids=name)
def test_on_chip_sanitizers_find_nothing(kernels, team, layout, kind):
    cases = [("spatial_channel", "affine"), ("channel_spatial", "eca"), ("parallel", "scalar")]
    calls = [
        make((3, 24, 7, 7), order, gate, dtype=torch.float16, layout=layout)
        for order, gate in (CASES if FULL else cases)
    ]
    check(calls, results(kernels(kind), calls, on_chip=team, SIMT_ORDER="random", SIMT_LIVE="2"))


@pytest.mark.parametrize("kind", ["address", "thread"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kept", [1, 3, 5])  # of four: one of x, three, all of x and one of dy
def test_on_chip_sanitizers_find_nothing_in_what_is_read_again(kernels, kept, layout, kind):
    calls = [make((2, 128, 8, 16), dtype=torch.float16, layout=layout)]
    options = {"on_chip": OnChip(kept=kept), "limits": text(chip_rows=8)}
    check(calls, results(kernels(kind), calls, **options, SIMT_ORDER="random"))


@pytest.mark.parametrize("order", ["spatial_channel", "channel_spatial", "parallel"])
def test_on_chip_vectors_end_with_the_last_row_of_whole_rounds(kernels, order):
    """There is no row after it, and none is read beyond the arrays by row."""
    calls = [make((2, 32, 7, 7), order, dtype=torch.float16)]
    options = {"on_chip": OnChip(), "limits": text(chip_rows=8)}
    check(calls, results(kernels("address"), calls, **options))


@pytest.mark.parametrize(
    ("call", "team", "aligned", "why"),
    [
        (make(dtype=torch.float64), OnChip(), True, "float64 is for the portable passes"),
        (make((1, 3, 4, 4)), OnChip("counter", 4), True, "more blocks than rows"),
        (make(), OnChip("block", 2), True, "a block's barrier is for one block"),
        (make((1, 64, 8, 8)), OnChip("cluster", 17), True, "no cluster is so large"),
        (make(CHUNKS), OnChip(kept=3), False, "what is not aligned must fit in shared memory"),
    ],
)
def test_on_chip_says_what_it_cannot_do(kernels, call, team, aligned, why):
    with pytest.raises(Refused, match=why):
        results(kernels(), [call], on_chip=team, aligned=aligned)


def test_on_chip_no_images(kernels):
    call = make((0, 8, 4, 4))
    (got,) = results(kernels(), [call], on_chip=OnChip())
    assert got["y"].shape == call.x.shape
    assert all((t == 0).all() for t in got.values())


@MANY
@given(
    shape=RANDOM_SHAPES,
    case=st.sampled_from(CASES),
    dtypes=st.sampled_from(ON_CHIP_DTYPES),
    layout=st.sampled_from(list(LAYOUTS)),
    team=st.sampled_from(TEAMS),
    kept=st.sampled_from([2**20, 2**20, 0, 1, 2, 3]),
    aligned=st.booleans(),
    limits=CUDA_ON_CHIP,
)
def test_on_chip_random_shapes(kernels, shape, case, dtypes, layout, team, kept, aligned, limits):
    dtype, parameter_dtype = dtypes
    call = make(shape, *case, dtype=dtype, parameter_dtype=parameter_dtype, layout=layout)
    by_channel = call.x.is_contiguous() and shape[2:] != (1, 1)  # one channel is so in any layout
    rows = shape[1] if by_channel else shape[2] * shape[3]
    options = {"on_chip": team._replace(kept=kept), "aligned": aligned, "limits": limits}
    try:
        check([call], results(kernels(), [call], **options))
    except Refused as refused:
        again = "cannot be read again" in str(refused)
        if rows >= team.blocks * 8 and not again:  # rows of a super-row stay together
            raise
