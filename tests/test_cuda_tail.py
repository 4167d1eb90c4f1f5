"""The residual tail's CUDA kernels, run on the CPU: right, clean under the sanitizers, the same in
any order of threads."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from .cases import DTYPE_PAIRS, DTYPES, FULL, LAYOUTS, assert_equal
from .conftest import ROOT
from .plans import CUDA
from .simt.tails import results
from .tails import FEW_TAILS, TAILS, assert_as_good_as_steps, make_tail
from .test_residual import TOLERANCE

# Whole vectors, rows that begin within one, one pixel, one channel, one element short of a vector.
SHAPES = [(2, 8, 4, 4), (2, 16, 7, 7), (1, 24, 5, 5), (4, 33, 1, 1), (1, 1, 9, 8), (2, 5, 3, 7)]
# Several tiles along an axis; rows longer than a tile's reach; images of one row, one column;
# super-rows longer than a tile; many bands of pixels.
LARGE = [(2, 64, 14, 14), (1, 3, 130, 130), (1, 2, 24000, 1), (1, 20000, 1, 2), (1, 8, 75, 75)]
KINDS = {"batch": True, "frozen": False}


@pytest.fixture
def kernels(executable):
    """kernels(kind): the executable that runs the tail's kernels on the CPU."""
    return lambda kind="plain": executable(ROOT / "tests" / "simt" / "tail.cpp", kind)


def check_statistics(got, u, prefix=""):
    var, mean = torch.var_mean(u.double(), (0, 2, 3), correction=0)
    off = (got.pop(f"{prefix}mean") - mean).abs()
    assert (off <= 1e-6 * (mean.abs() + var.sqrt())).all()
    assert ((got.pop(f"{prefix}var") - var).abs() <= 2e-6 * var).all()
    assert got.pop(f"{prefix}batches") == 42
    count = u.numel() // u.shape[1]
    for name, of_batch in (("mean", mean), ("var", var * (count / (count - 1)))):
        kept = got.pop(f"{prefix}running_{name}")
        torch.testing.assert_close(
            kept, (of_batch / 4).to(kept.dtype), rtol=TOLERANCE[kept.dtype] / 10, atol=1e-5
        )


def check(tails, answers):
    for tail, got in zip(tails, answers, strict=True):
        if tail.norm.mean is None:
            check_statistics(got, tail.u)
        if tail.shortcut_norm is not None and tail.shortcut_norm.mean is None:
            check_statistics(got, tail.shortcut, "shortcut_")
        want = tail.truth()
        assert got.keys() == want.keys()
        for name, exact in want.items():
            off, least = (got[name].double() - exact).norm(), 1e-2 * exact.numel() ** 0.5
            assert off <= TOLERANCE[tail.u.dtype] * (exact.norm() + least), name


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("batch", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize(("order", "gate"), TAILS)
def test_results(kernels, order, gate, batch, layout):
    tails = [
        make_tail(
            shape,
            order,
            gate,
            dtype=dtype,
            parameter_dtype=parameter_dtype,
            layout=layout,
            batch=batch,
            affine=affine,
            shortcut=shape[1] != 16,
        )
        for (shape, affine), (dtype, parameter_dtype) in itertools.product(
            zip(SHAPES, itertools.cycle([True, True, False])), DTYPE_PAIRS
        )
    ]
    check(tails, results(kernels(), tails))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("order", "gate"), FEW_TAILS)
def test_accuracy(kernels, order, gate, dtype, layout):
    tails = [
        make_tail((2, 24, 9, 12), order, gate, dtype=dtype, layout=layout, seed=s) for s in range(4)
    ]
    assert_as_good_as_steps(tails, results(kernels(), tails))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("batch", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize(("order", "gate"), FEW_TAILS)
def test_without_a_shortcut(kernels, order, gate, batch, layout):
    """Of many tiles, too, and of elements instead of vectors."""
    for dtype, parameter_dtype in DTYPE_PAIRS:
        kind = {"dtype": dtype, "parameter_dtype": parameter_dtype, "layout": layout}
        tails = [
            make_tail(shape, order, gate, **kind, batch=batch, shortcut=False, affine=shape[1] != 5)
            for shape in (*SHAPES, (2, 64, 14, 14))
        ]
        for limits in ("", "height=16,lanes=2,share=1"):
            check(tails, results(kernels(), tails, limits=limits))
        check(tails, results(kernels(), tails, aligned=False))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shortcut", [True, False])
def test_a_frozen_norm_passes_gradients_where_its_input_is_infinite(kernels, shortcut, layout):
    tail = make_tail(order="none", layout=layout, batch=False, affine=False, shortcut=shortcut)
    tail.u[0, 0, 0, :2] = torch.tensor([torch.inf, -torch.inf])
    for aligned in (True, False):
        (got,) = results(kernels(), [tail], aligned=aligned)
        want = tail.truth()["d_u"]
        assert want.isfinite().all()
        torch.testing.assert_close(got["d_u"].double(), want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("order", "gate"), FEW_TAILS)
def test_every_pass_sees_the_same_sign(kernels, order, gate, layout):
    """Where ReLU's argument is but rounding, both passes of backward let through what forward did:
    a frozen norm's gradients are sums of du."""
    tail = make_tail((3, 24, 9, 8), order, gate, layout=layout, batch=False, shortcut=False)
    weight, bias, mean, var, eps = tail.norm
    scale = weight * (var + eps).rsqrt()
    nothing = (mean - bias / scale)[:, None, None].expand_as(tail.u[0])
    off = torch.randint(-3, 4, tail.u.shape)
    tail.u[:] = nothing * (1 + off * torch.finfo(torch.float32).eps)
    for aligned in (True, False):
        (got,) = results(kernels(), [tail], aligned=aligned)
        passed, d = got["out"] > 0, got["d_u"].double()
        assert 0.2 < passed.double().mean() < 0.8
        torch.testing.assert_close(
            d.sum((0, 2, 3)) / scale, got["d_norm_bias"].double(), rtol=1e-4, atol=1e-4
        )
        if order == "none":
            assert torch.equal(passed, d != 0)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_result_that_rounds_to_zero_lets_the_gradient_pass(kernels, layout):
    """Without a shortcut the sign is that of x before it is rounded to u's type."""
    tail = make_tail((2, 8, 4, 4), "none", "sigmoid", dtype=torch.half, layout=layout, batch=False)
    tail.shortcut = None
    for one, value in zip(tail.norm[:4], (2.0**-14, 0.0, 0.0, 1.0)):
        one.fill_(value)
    tail.u.fill_(2.0**-14)
    (got,) = results(kernels(), [tail])
    assert (got["out"] == 0).all()
    torch.testing.assert_close(
        got["d_norm_bias"].double(), tail.dout.double().sum((0, 2, 3)), rtol=1e-2, atol=1e-2
    )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("order", "gate"), [("spatial_channel", "affine"), ("none", "sigmoid")])
def test_a_mean_of_a_thousand_deviations(kernels, order, gate, layout):
    """Where every sum of raw numbers would lose what counts."""
    tails = [
        make_tail((4, 32, 12, 13), order, gate, layout=layout, mean=1000.0, seed=seed)
        for seed in range(4)
    ]
    answers = results(kernels(), tails, multiprocessors=8)
    for tail, got in zip(tails, answers, strict=True):
        var = tail.u.double().var((0, 2, 3), correction=0)
        assert ((got["var"] - var).abs() <= 1e-6 * var).all()
    assert_as_good_as_steps(tails, answers)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_number_far_from_the_others(kernels, layout):
    """It is the first that the kernels see, and most of the variance."""
    tails = [make_tail((3, 6, 12, 12), layout=layout, dtype=d) for d in (torch.float32, torch.half)]
    for tail in tails:
        tail.u[0, :, 0, 0] = 1000.0
    check(tails, results(kernels(), tails, multiprocessors=8))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_constant_channel_and_a_weight_of_zero(kernels, layout):
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 1e-3)):
        tail = make_tail((3, 6, 8, 9), dtype=dtype, layout=layout)
        tail.u[:, 1] = 3.0
        tail.norm.weight[2] = 0.0
        (got,) = results(kernels(), [tail])
        assert got["var"][1] == 0 and got["mean"][1] == 3
        for name, want in tail.truth().items():
            assert (got[name].double() - want).norm() <= tolerance * want.norm(), name


@pytest.mark.parametrize("multiprocessors", [1, 132])  # large tiles, small ones
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", LARGE)
def test_many_tiles(kernels, shape, layout, multiprocessors):
    tails = [
        make_tail(shape, order, gate, dtype=dtype, layout=layout)
        for dtype in ((torch.float16, torch.float32) if not FULL else DTYPES)
        for order, gate in FEW_TAILS[:: 1 if FULL else 2]
    ]
    check(tails, results(kernels(), tails, multiprocessors=multiprocessors))


def test_more_tiles_than_threads_that_add_a_channels(kernels):
    """Each thread reads eight tiles' sums at once, of every 64th tile: here in two turns."""
    tails = [make_tail((520, 2, 1, 2), layout=layout) for layout in LAYOUTS]
    check(tails, results(kernels(), tails))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_unaligned_tensors(kernels, layout):
    tails = [
        make_tail((2, 16, 4, 6), order, gate, dtype=dtype, layout=layout)
        for dtype in DTYPES
        for order, gate in FEW_TAILS
    ]
    check(tails, results(kernels(), tails, aligned=False))


def test_a_large_gate_kernel(kernels):
    tails = [make_tail((2, 40, 3, 3), order, "eca") for order in ("spatial_channel", "channel")]
    for tail in tails:
        tail.parameters["gate_weight"] = torch.randn(31) / 4
    check(tails, results(kernels(), tails, limits="height=16,lanes=2"))


@pytest.mark.parametrize("order", ["descending", "random"])
def test_any_order_of_lanes_gives_the_same_bits(kernels, order):
    tails = [make_tail((2, 16, 7, 7), dtype=dtype) for dtype in DTYPES]
    tails += [
        make_tail((3, 20, 7, 9), *kind, layout="channels_last", batch=batch, shortcut=shortcut)
        for kind in FEW_TAILS
        for batch, shortcut in ((True, True), (False, True), (True, False))
    ]
    limits = "height=16,share=1"
    once = results(kernels(), tails, limits=limits)
    for again in (
        results(kernels(), tails, limits=limits, SIMT_ORDER=order, SIMT_LIVE="4"),
        results(kernels(), tails, limits=f"{limits},grid=3"),
    ):
        for one, other in zip(once, again, strict=True):
            assert_equal(one, other)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("order", "gate"), FEW_TAILS)
def test_a_nan_stays_in_its_image_where_the_norm_is_frozen(kernels, order, gate, layout):
    for dtype, shape in ((torch.float16, (4, 16, 7, 7)), (torch.float32, (4, 6, 9, 8))):
        tail = make_tail(shape, order, gate, dtype=dtype, layout=layout, batch=False)
        (want,) = results(kernels(), [tail])
        clean, clean_dout = tail.u.clone(), tail.dout.clone()
        tail.u[1, 2, 3, 4] = tail.dout[2, 2, 3, 4] = float("nan")
        tail.shortcut[2, 2, 3, 4] = 100.0  # ReLU lets the gradient pass
        (got,) = results(kernels(), [tail])
        for image in (0, 3):
            for name in ("out", "d_u", "d_shortcut"):
                assert torch.equal(got[name][image], want[name][image])
        assert got["out"][1, 2, 3, 4].isnan() and got["d_u"][2, 2, 3, 4].isnan()
        bare = replace(tail, shortcut=None)
        (want,) = results(kernels(), [replace(bare, u=clean, dout=clean_dout)])
        (got,) = results(kernels(), [bare])
        for image in (0, 3):
            for name in ("out", "d_u"):
                assert torch.equal(got[name][image], want[name][image])
        assert got["out"][1, 2, 3, 4].isnan()
        training = replace(tail, norm=tail.norm._replace(mean=None, var=None))
        (got,) = results(kernels(), [training])
        assert got["out"][0, 2].isnan().all()  # statistics join the images, as they must
        if order in ("channel", "none") and gate != "eca":
            assert not got["out"][0, 3].isnan().any()


@pytest.mark.parametrize("shortcut", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_nan_of_the_gradient_stays_in_its_channel(kernels, layout, shortcut):
    """Also where the next channel begins within the same vector."""
    kind = {"dtype": torch.half, "layout": layout, "batch": False, "shortcut": shortcut}
    tail = make_tail((2, 16, 7, 7), "none", "sigmoid", **kind)
    ends = ([0, 1], [5, 5], [6, 0], [6, 0])
    tail.norm.weight[5] = 1.0
    tail.u[ends] = 100.0
    (want,) = results(kernels(), [tail])
    tail.dout[ends] = float("nan")
    (got,) = results(kernels(), [tail])
    others = torch.arange(16) != 5
    for name in ("d_norm_weight", "d_norm_bias"):
        assert got[name][5].isnan()
        assert torch.equal(got[name][others], want[name][others])


@pytest.mark.parametrize("kind", ["address", "thread"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_sanitizers_find_nothing(kernels, layout, kind):
    options = {"SIMT_ORDER": "random", "SIMT_LIVE": "4"}
    half = {"dtype": torch.float16, "layout": layout}
    tails = [make_tail((2, 9, 7, 7), *tail, **half) for tail in FEW_TAILS]
    others = itertools.product([(1, 16, 14, 14), (1, 3, 2, 70), (3, 40, 1, 1)], FEW_TAILS)
    for i, (shape, tail) in enumerate(others):
        if FULL or i % 4 == 0:
            with_shortcut = i % 3 > 0
            tails.append(make_tail(shape, *tail, **half, batch=i % 8 > 0, shortcut=with_shortcut))
    tails.append(make_tail((1, 8, 11, 12), layout=layout))
    check(tails, results(kernels(kind), tails, **options))
    tails = [
        make_tail((2, 9, 7, 7), *tail, layout=layout) for tail in FEW_TAILS[:: 1 if FULL else 3]
    ]
    check(tails, results(kernels(kind), tails, limits="height=16,lanes=2,share=1", **options))
    check(tails[:1], results(kernels(kind), tails[:1], aligned=False, **options))


MANY = settings(
    max_examples=200 if FULL else 25,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@MANY
@given(
    shape=st.tuples(st.integers(2, 4), st.integers(1, 40), st.integers(1, 17), st.integers(2, 17)),
    kind=st.sampled_from(TAILS),
    dtypes=st.sampled_from(DTYPE_PAIRS),
    layout=st.sampled_from(list(LAYOUTS)),
    batch=st.booleans(),
    affine=st.booleans(),
    shortcut=st.booleans(),
    multiprocessors=st.sampled_from([1, 16, 132]),
    aligned=st.booleans(),
    limits=CUDA,
    seed=st.integers(0, 2**31),
)
def test_random_shapes(
    kernels,
    shape,
    kind,
    dtypes,
    layout,
    batch,
    affine,
    shortcut,
    multiprocessors,
    aligned,
    limits,
    seed,
):
    dtype, parameter_dtype = dtypes
    tail = make_tail(
        shape,
        *kind,
        dtype=dtype,
        parameter_dtype=parameter_dtype,
        layout=layout,
        batch=batch,
        affine=affine,
        shortcut=shortcut,
        seed=seed,
    )
    options = {"multiprocessors": multiprocessors, "aligned": aligned, "limits": limits}
    check([tail], results(kernels(), [tail], **options))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("image", "order", "gate"),
    [
        ((64, 32, 32), "spatial_channel", "affine"),
        ((1, 256, 256), "none", "sigmoid"),
        ((64, 32, 32), "none", "sigmoid"),
    ],
)
def test_offsets_beyond_32_bits(kernels, image, order, gate, layout):
    """The last image of a tensor whose others are zeros, that take no memory and are not run."""
    far = 2**32 // torch.Size(image).numel() + 1
    dtypes = {"dtype": torch.float16, "parameter_dtype": torch.float32}
    for shortcut in (True, False):
        kind = {"layout": layout, "batch": False, "shortcut": shortcut}
        tail = make_tail((1, *image), order, gate, **dtypes, **kind)
        check([tail], results(kernels(), [tail], far=far, limits=f"grid={2**30}"))
