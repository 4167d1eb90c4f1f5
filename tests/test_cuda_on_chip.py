"""The CUDA kernels that keep an image on the chip, run on the CPU: right, clean under sanitizers,
the same for any order of lanes and blocks."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from .cases import CASES, DTYPE_PAIRS, FEW_CASES, FULL, LAYOUTS, assert_equal, make
from .plans import CUDA_ON_CHIP, text
from .simt.calls import OnChip, Refused, results
from .test_cuda_kernels import MANY, RANDOM_SHAPES, check

# One block, or several that wait for each other at a cluster's barrier or at a counter; a team has
# several images, one after another.
TEAMS = [
    OnChip(),
    OnChip("counter", blocks=2, images_at_once=2),
    OnChip("counter", blocks=3),
    OnChip("cluster", blocks=2, images_at_once=2),
    OnChip("cluster", blocks=3),
]
HALF_AND_SINGLE = [pair for pair in DTYPE_PAIRS if pair[0] != torch.float64]
# A call of eight chunks of x and eight of dy, for teams that do not keep all of them.
CHUNKS = (2, 256, 16, 16)


def name(team):
    return f"{team.barrier}-{team.blocks}"


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("team", TEAMS, ids=name)
def test_results(kernels, team, layout):
    calls = [
        make(shape, order, gate, dtype=torch.float16, layout=layout)
        for order, gate in (CASES if FULL else FEW_CASES)
        for shape in [(3, 24, 6, 8), (2, 40, 7, 7)]
    ]
    calls += [
        make((2, 32, 4, 6), order, dtype=dtype, parameter_dtype=parameter_dtype, layout=layout)
        for dtype, parameter_dtype in HALF_AND_SINGLE
        for order in ("spatial_channel", "channel_spatial")
    ]
    check(calls, results(kernels(), calls, on_chip=team))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kept", [0, 3, 7, 8, 11])  # none, some of x, x, x and some of dy
def test_what_is_not_kept_is_read_again(kernels, kept, layout):
    for team in (OnChip(), OnChip("counter", 2)):
        calls = [
            make(CHUNKS, order, dtype=torch.bfloat16, layout=layout)
            for order in ("spatial_channel", "channel_spatial", "parallel")
        ]
        check(calls, results(kernels(), calls, on_chip=team._replace(kept=kept)))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kept", [0, 1, 2, 3, 4, 7])
@pytest.mark.parametrize("team", TEAMS, ids=name)
def test_many_chunks_of_many_images(kernels, team, kept, layout):
    """A ring goes on from visit to visit and from image to image; a team's last block has fewer
    chunks than the others, or none that do not fit."""
    calls = [
        make((5, 136, 8, 17), order, dtype=torch.float16, layout=layout)
        for order in ("spatial_channel", "channel_spatial", "parallel", "channel")
    ]
    for limits in (text(chip_rows=8), text(chip_rows=8, chip_lanes=8, chunks=8)):
        check(calls, results(kernels(), calls, on_chip=team._replace(kept=kept), limits=limits))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_ring_holds_whole_chunks_in_each_place(kernels, layout):
    """Slabs of a whole chunk and a short one, but the last block's of the whole one alone, which
    comes to either place."""
    calls = [make((2, 100, 10, 10), dtype=torch.float16, layout=layout)]
    team = OnChip("counter", 3, kept=0)
    check(calls, results(kernels(), calls, on_chip=team, limits=text(chip_rows=8)))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("team", TEAMS[:2], ids=name)
def test_odd_sizes(kernels, team, layout):
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
    calls = [make((2, 40, 7, 7), dtype=dtype, layout=layout) for dtype, _ in HALF_AND_SINGLE]
    check(calls, results(kernels(), calls, on_chip=team, aligned=False))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("team", [OnChip(), OnChip("counter", 2)], ids=name)
def test_one_mask_of_what_is_not_aligned(kernels, team, layout):
    """Nothing is written past a slab of whole vectors: the ones of the mask that is not there."""
    calls = [
        make(shape, order, dtype=dtype, layout=layout)
        for shape in ((2, 6, 4, 12), (1, 3, 40, 41))
        for order in ("spatial", "channel")
        for dtype, _ in HALF_AND_SINGLE
    ]
    check(calls, results(kernels(), calls, on_chip=team, aligned=False))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rows_wider_than_a_block(kernels, layout):
    shape = (1, 16, 75, 75) if layout == "contiguous" else (1, 4104, 2, 3)
    for team in (OnChip(kept=1), OnChip("counter", 2)):
        calls = [
            make(shape, order, dtype=torch.float16, layout=layout)
            for order in ("spatial_channel", "channel_spatial", "parallel")
        ]
        check(calls, results(kernels(), calls, on_chip=team))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("team", [OnChip("counter", 4), OnChip("cluster", 4)], ids=name)
def test_a_mask_looks_beyond_the_next_block(kernels, team, layout):
    calls = [
        make((1, 16, 8, 2), order, "eca", kernel_size=31, layout=layout)
        for order in ("spatial_channel", "channel_spatial", "parallel", "channel")
    ]
    check(calls, results(kernels(), calls, on_chip=team))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("aligned", [True, False])
def test_nan_stays_in_its_image(kernels, layout, aligned):
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
def test_nan_stays_in_its_channel(kernels, layout):
    call = make((3, 16, 7, 7), "channel", layout=layout, dtype=torch.float16)
    call.x[1, 3, 2, 2] = torch.nan
    for team in (OnChip(), OnChip("counter", 2)):
        (got,) = results(kernels(), [call], on_chip=team)
        for result in ("y", "dx"):
            hit = got[result].isnan().flatten(2).any(2)
            assert hit.nonzero().tolist() == [[1, 3]]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_bits_depend_on_nothing_but_the_team(kernels, layout):
    """Not on the order of lanes, how teams share out the images, what they wait at or keep."""
    calls = [make((3, 64, 8, 8), dtype=dtype, layout=layout) for dtype, _ in HALF_AND_SINGLE]
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
def test_sanitizers_find_nothing(kernels, team, layout, kind):
    cases = [("spatial_channel", "affine"), ("channel_spatial", "eca"), ("parallel", "scalar")]
    calls = [
        make((3, 24, 7, 7), order, gate, dtype=torch.float16, layout=layout)
        for order, gate in (CASES if FULL else cases)
    ]
    check(calls, results(kernels(kind), calls, on_chip=team, SIMT_ORDER="random", SIMT_LIVE="2"))


@pytest.mark.parametrize("kind", ["address", "thread"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kept", [1, 3, 5])  # of four: one of x, three, all of x and one of dy
def test_sanitizers_find_nothing_in_what_is_read_again(kernels, kept, layout, kind):
    calls = [make((2, 128, 8, 16), dtype=torch.float16, layout=layout)]
    options = {"on_chip": OnChip(kept=kept), "limits": text(chip_rows=8)}
    check(calls, results(kernels(kind), calls, **options, SIMT_ORDER="random"))


@pytest.mark.parametrize("order", ["spatial_channel", "channel_spatial", "parallel"])
def test_vectors_end_with_the_last_row_of_whole_rounds(kernels, order):
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
def test_says_what_it_cannot_do(kernels, call, team, aligned, why):
    with pytest.raises(Refused, match=why):
        results(kernels(), [call], on_chip=team, aligned=aligned)


def test_no_images(kernels):
    call = make((0, 8, 4, 4))
    (got,) = results(kernels(), [call], on_chip=OnChip())
    assert got["y"].shape == call.x.shape
    assert all((t == 0).all() for t in got.values())


@MANY
@given(
    shape=RANDOM_SHAPES,
    case=st.sampled_from(CASES),
    dtypes=st.sampled_from(HALF_AND_SINGLE),
    layout=st.sampled_from(list(LAYOUTS)),
    team=st.sampled_from(TEAMS),
    kept=st.sampled_from([2**20, 2**20, 0, 1, 2, 3]),
    aligned=st.booleans(),
    limits=CUDA_ON_CHIP,
)
def test_random_shapes(kernels, shape, case, dtypes, layout, team, kept, aligned, limits):
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
