"""The residual tail's CUDA kernels where the shortcut goes through a norm of its own, run on the
CPU as in test_cuda_tail.py."""

from __future__ import annotations

import pytest
import torch

from .cases import DTYPE_PAIRS, DTYPES, FULL, LAYOUTS, assert_equal
from .conftest import ROOT
from .simt.tails import results
from .tails import FEW_TAILS, assert_as_good_as_steps, make_tail
from .test_cuda_tail import KINDS, SHAPES, check

FEW_TILES = "height=16,lanes=2,share=1"


@pytest.fixture
def kernels(executable):
    """kernels(kind): the executable that runs the tail's kernels on the CPU."""
    return lambda kind="plain": executable(ROOT / "tests" / "simt" / "tail.cpp", kind)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shortcut_batch", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize(("order", "gate"), FEW_TAILS)
def test_results(kernels, order, gate, shortcut_batch, layout):
    """In vectors and in elements, with a norm of either kind on the other side."""
    tails = [
        make_tail(
            shape,
            order,
            gate,
            dtype=dtype,
            parameter_dtype=parameter_dtype,
            layout=layout,
            batch=(i + j) % 2 == 0,
            affine=shape[1] != 5,
            shortcut_batch=shortcut_batch,
        )
        for i, (dtype, parameter_dtype) in enumerate(DTYPE_PAIRS)
        for j, shape in enumerate(SHAPES)
    ]
    check(tails, results(kernels(), tails))
    check(tails[::2], results(kernels(), tails[::2], aligned=False))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("multiprocessors", [1, 132])  # large tiles, small ones
@pytest.mark.parametrize("shape", [(2, 64, 14, 14), (1, 3, 130, 130), (1, 8, 75, 75)])
def test_many_tiles(kernels, shape, layout, multiprocessors):
    tails = [
        make_tail(shape, *tail, dtype=dtype, layout=layout, shortcut_batch=batch)
        for dtype in ((torch.float16, torch.float32) if not FULL else DTYPES)
        for tail, batch in zip(FEW_TAILS[::2], (True, False, True), strict=True)
    ]
    check(tails, results(kernels(), tails, multiprocessors=multiprocessors))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_accuracy_also_beside_a_mean_of_a_thousand_deviations(kernels, dtype, layout):
    for mean in (0.0, 1000.0) if dtype == torch.float32 else (0.0,):
        kind = {"dtype": dtype, "layout": layout, "mean": mean, "shortcut_batch": True}
        tails = [make_tail((4, 24, 9, 12), **kind, seed=seed) for seed in range(4)]
        assert_as_good_as_steps(tails, without_statistics(results(kernels(), tails)))


def without_statistics(answers):
    return [{k: v for k, v in got.items() if k == "out" or k[:2] == "d_"} for got in answers]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_frozen_norm_passes_gradients_where_its_input_is_infinite(kernels, layout):
    tail = make_tail((2, 8, 4, 4), layout=layout, batch=False, shortcut_batch=False)
    tail.shortcut[0, 0, 0, :2] = torch.tensor([torch.inf, -torch.inf])
    weight, _, _, var, eps = tail.shortcut_norm
    scale = (weight * (var + eps).rsqrt())[:, None, None]
    for aligned in (True, False):
        (got,) = results(kernels(), [tail], aligned=aligned)
        d = torch.where(got["out"] > 0, tail.dout, 0)
        assert got["out"][0, 0, 0].isinf().sum() == 1
        torch.testing.assert_close(got["d_shortcut"], d * scale, rtol=1e-6, atol=0)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_nan_stays_in_its_image_and_its_channel(kernels, dtype, layout):
    kind = {"dtype": dtype, "layout": layout, "batch": False}
    tail = make_tail((3, 16, 7, 7), "none", "sigmoid", **kind, shortcut_batch=False)
    (want,) = results(kernels(), [tail])
    at = 1, 2, 3, 4
    clean = tail.shortcut.clone()
    tail.shortcut[at] = torch.nan
    (got,) = results(kernels(), [tail])
    assert got["out"][at].isnan()
    assert torch.equal(got["d_shortcut"][[0, 2]], want["d_shortcut"][[0, 2]])
    assert got["d_shortcut"].isfinite().all()  # ReLU's own rule lets dout pass
    others = torch.arange(16) != 2
    assert torch.equal(got["d_shortcut_weight"][others], want["d_shortcut_weight"][others])
    assert got["d_shortcut_weight"][2].isnan() and got["d_shortcut_bias"].isfinite().all()

    tail.shortcut[:] = clean
    tail.dout[at] = torch.nan
    tail.shortcut[at] = 100.0 * tail.shortcut_norm.weight[2].sign()  # ReLU lets the gradient pass
    (got,) = results(kernels(), [tail])
    assert got["d_shortcut"][at].isnan() and got["d_shortcut"].isnan().sum() == 1
    assert got["d_shortcut_bias"].isnan().nonzero().tolist() == [[2]]


@pytest.mark.parametrize("order", ["descending", "random"])
def test_any_order_of_lanes_gives_the_same_bits(kernels, order):
    tails = [
        make_tail((3, 16, *size), *kind, dtype=dtype, layout=layout, shortcut_batch=batch)
        for layout in LAYOUTS
        for size, batch in (((7, 7), True), ((4, 6), False))
        for dtype in DTYPES
        for kind in FEW_TAILS[::5]
    ]
    limits = "height=16,share=1"
    once = results(kernels(), tails, limits=limits)
    for again in (
        results(kernels(), tails, limits=limits, SIMT_ORDER=order, SIMT_LIVE="4"),
        results(kernels(), tails, limits=f"{limits},grid=3"),
    ):
        for one, other in zip(once, again, strict=True):
            assert_equal(one, other)


@pytest.mark.parametrize("kind", ["address", "thread"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_sanitizers_find_nothing(kernels, layout, kind):
    """Also where the gradient is written over what it is made of, and where it must not be."""
    tails = [
        make_tail((2, channels, *size), *tail, dtype=dtype, layout=layout, shortcut_batch=batch)
        for tail, batch in ((FEW_TAILS[0], True), (FEW_TAILS[-1], False), (FEW_TAILS[-1], True))
        for channels, size, dtype in (
            (16, (7, 7), torch.float16),
            (16, (4, 6), torch.float16),
            (8, (5, 5), torch.float32),
        )
    ]
    options = {"SIMT_ORDER": "random", "SIMT_LIVE": "4"}
    check(tails, results(kernels(kind), tails, limits=FEW_TILES, **options))
    check(tails[1:2], results(kernels(kind), tails[1:2], aligned=False, **options))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_offsets_beyond_32_bits(kernels, layout):
    """The last image of a tensor whose others are zeros, that take no memory and are not run."""
    image = (64, 32, 32)
    far = 2**32 // torch.Size(image).numel() + 1
    kind = {"dtype": torch.float16, "parameter_dtype": torch.float32, "layout": layout}
    tail = make_tail((1, *image), **kind, batch=False, shortcut_batch=False)
    check([tail], results(kernels(), [tail], far=far, limits=f"grid={2**30}"))
