"""The residual tail: its definition, and the kernels against it."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import da_ops
from da_ops.accuracy import PARAMETERS
from da_ops.backends import BACKENDS as KNOWN
from da_ops.residual import reference

from .cases import DTYPE_PAIRS, LAYOUTS, assert_close, assert_equal, distance
from .conftest import BACKENDS, interpreted
from .plans import cpu_plan
from .tails import (
    FEW_TAILS,
    TAILS,
    assert_as_good_as_steps,
    by,
    by_kernels,
    defined,
    in_steps,
    kept,
    make_tail,
)
from .test_isolation import supported, under
from .test_shapes import CHANNELS, EDGES

KINDS = {"batch": True, "frozen": False}
over_backends = pytest.mark.parametrize(
    "_target",
    [pair for pair in BACKENDS if KNOWN[pair[0]].residual_forward is not None],
    ids=lambda pair: pair[0],
    indirect=True,
)


@pytest.mark.parametrize("batch", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize(("order", "gate"), TAILS)
def test_the_definition_is_the_modules(order, gate, batch):
    tail = make_tail(order=order, gate=gate, dtype=torch.float64, batch=batch)
    assert_close(tail.results(defined), tail.results(in_steps), 1e-12)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("batch", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize(("order", "gate"), TAILS)
def test_backward_is_the_derivative(order, gate, batch, affine):
    tail = make_tail((3, 5, 8, 7), order, gate, dtype=torch.float64, batch=batch, affine=affine)
    out = defined(tail)
    du, d_shortcut, d_weight, d_bias, *rest = reference.backward(
        tail.dout, out, tail.u, tail.norm, tail.named, order, gate
    )
    got = {"out": out, "d_u": du, "d_shortcut": d_shortcut}
    if affine:
        got |= {"d_norm_weight": d_weight, "d_norm_bias": d_bias}
    assert affine or d_weight is d_bias is None
    named = dict(zip(PARAMETERS, rest))
    assert {name for name, g in named.items() if g is not None} == set(tail.parameters)
    got |= {f"d_{name}": named[name] for name in tail.parameters}
    assert_close(got, tail.truth(), 1e-12)


@over_backends
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("dtype", "parameter_dtype"),
    DTYPE_PAIRS,
    ids=lambda dtype: str(dtype).removeprefix("torch."),
)
@pytest.mark.parametrize("batch", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize(("order", "gate"), TAILS)
def test_accuracy(backend, device, order, gate, batch, dtype, parameter_dtype, layout):
    tails = [
        make_tail(
            (2, 24, 9, 11),
            order,
            gate,
            dtype=dtype,
            parameter_dtype=parameter_dtype,
            layout=layout,
            batch=batch,
            device=device,
            seed=seed,
        )
        for seed in range(1 if interpreted(backend) else 4)
    ]
    answers = [tail.results(by(backend)) for tail in tails]
    assert_as_good_as_steps(tails, answers)
    for name, result in answers[0].items():
        assert result.dtype == (
            dtype if name in ("out", "d_u", "d_shortcut") else parameter_dtype
        ), name


@over_backends
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("batch", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize(("order", "gate"), FEW_TAILS)
def test_without_a_shortcut(backend, device, order, gate, batch, dtype, layout):
    kind = {"dtype": dtype, "layout": layout, "batch": batch, "shortcut": False, "device": device}
    seeds = range(1 if interpreted(backend) else 4)
    tails = [make_tail((2, 24, 9, 11), order, gate, **kind, seed=seed) for seed in seeds]
    answers = [tail.results(by(backend)) for tail in tails]
    assert "d_shortcut" not in answers[0]
    assert_as_good_as_steps(tails, answers)


@over_backends
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(4, 64, 28, 28), (3, 1024, 14, 14), (5, 512, 7, 7)])
def test_accuracy_at_real_sizes(backend, device, shape, layout):
    seeds = range(1 if interpreted(backend) else 2)
    tails = [make_tail(shape, layout=layout, device=device, seed=seed) for seed in seeds]
    assert_as_good_as_steps(tails, [tail.results(by(backend)) for tail in tails])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("order", "gate"), [("spatial_channel", "affine"), ("none", "sigmoid")])
def test_accuracy_of_many_numbers_to_add(fused_cpu, order, gate, layout):
    """Gradients of one sign, whose sums grow and grow; no ReLU is at its edge."""
    tail = make_tail((1, 16, 512, 512), order, gate, layout=layout)
    tail.dout.abs_()
    tail.shortcut.add_(50)
    found, want = tail.results(by_kernels), tail.truth()
    for name in want.keys() & {"d_u", "d_norm_bias", "d_gate_weight", "d_gate_bias"}:
        assert distance(found[name].double(), want[name]) < 3e-7, name


@over_backends
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("order", "gate"), [("spatial_channel", "affine"), ("none", "sigmoid")])
def test_a_mean_of_a_thousand_deviations(backend, device, order, gate, layout):
    """Where every sum of raw numbers would lose what counts."""
    options = {"layout": layout, "mean": 1000.0, "device": device}
    seeds = range(2 if interpreted(backend) else 4)
    tails = [make_tail((4, 32, 12, 13), order, gate, seed=seed, **options) for seed in seeds]
    assert_as_good_as_steps(tails, [tail.results(by(backend)) for tail in tails])


@pytest.mark.parametrize("shape", [(2, 1555, 3, 4), (1, 4096, 2, 3)], ids=str)
@pytest.mark.parametrize("shortcut", [True, False])
@pytest.mark.parametrize(("order", "gate"), [("spatial_channel", "scalar"), ("none", "sigmoid")])
def test_channels_that_are_taken_in_parts(fused_cpu, order, gate, shortcut, shape):
    options = {"layout": "channels_last", "shortcut": shortcut}
    tails = [make_tail(shape, order, gate, seed=seed, **options) for seed in range(2)]
    assert_as_good_as_steps(tails, [tail.results(by_kernels) for tail in tails])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(3, 5, 30, 31), (2, 2065, 3, 4)], ids=str)
def test_statistics_of_images_that_begin_otherwise(fused_cpu, shape, layout):
    """Far from their means, and so far from what sums are taken about."""
    tail = make_tail(shape, "none", "sigmoid", layout=layout, mean=1000.0)
    tail.u[:, :, 0] = 0
    none = (None,) * len(PARAMETERS)
    _, mean, var, *_ = torch.ops.da_ops.residual_forward(
        tail.u, tail.shortcut, *tail.norm, *none, "none", "sigmoid"
    )
    var_of, mean_of = torch.var_mean(tail.u.double(), (0, 2, 3), correction=0)
    torch.testing.assert_close(mean.double(), mean_of, rtol=1e-6, atol=0)
    torch.testing.assert_close(var.double(), var_of, rtol=1e-6, atol=0)


@over_backends
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_constant_channel_and_a_weight_of_zero(backend, device, layout):
    """Branches that start at zero do: nothing divides by a weight, or by a variance."""
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 1e-3)):
        tail = make_tail((3, 6, 8, 9), dtype=dtype, layout=layout, device=device)
        tail.u[:, 1] = 3.0
        tail.norm.weight[2] = 0.0
        got, want = tail.results(by(backend)), tail.truth()
        assert all(result.isfinite().all() for result in got.values())
        # The constant channel's gradient is multiplied by 1 / sqrt(eps).
        assert_close(got, want, tolerance)


@st.composite
def tails(draw, shortcut_batches=(None,)):
    dtype, parameter_dtype = draw(st.sampled_from(DTYPE_PAIRS))
    order, gate = draw(st.sampled_from(TAILS))
    shape = (draw(st.integers(1, 5)), draw(CHANNELS), draw(EDGES), draw(EDGES))
    if shape[0] * shape[2] * shape[3] < 4:
        shape = (4, *shape[1:])  # a variance needs some values to be told from none
    shortcut_batch = draw(st.sampled_from(shortcut_batches))
    return make_tail(
        shape,
        order,
        gate,
        dtype=dtype,
        parameter_dtype=parameter_dtype,
        layout=draw(st.sampled_from(list(LAYOUTS))),
        batch=draw(st.booleans()),
        affine=draw(st.booleans()),
        shortcut=shortcut_batch is not None or draw(st.booleans()),
        shortcut_batch=shortcut_batch,
        seed=draw(st.integers(0, 2**31)),
    )


PLANS = st.sampled_from(
    ["", "shared=0", "shared=0,slab_rows=8", "cache=1,slabs=3", "slab_rows=16", "joint=0,slabs=3"]
)


@given(tails(), PLANS, st.integers(1, 3))
def test_any_size(fused_cpu_of_hypothesis, tail, limits, threads):
    """Against the definition in float64, under any plan; what is not written is seen. Over u it is
    the same."""
    with cpu_plan(limits, threads):
        got = tail.results(by_kernels)
        in_place = tail.u.clone()
        parameters = [tail.parameters.get(name) for name in PARAMETERS]
        torch.ops.da_ops.residual_forward_(
            in_place, tail.shortcut, *tail.norm, *parameters, tail.order, tail.gate
        )
    assert_equal({"out": in_place}, {"out": got["out"]})
    for name, want in tail.truth().items():
        off, least = (got[name].double() - want).norm(), 1e-2 * want.numel() ** 0.5
        assert off <= TOLERANCE[tail.u.dtype] * (want.norm() + least), name


# Sums of few numbers may cancel: this is to see mistakes, test_accuracy sees errors.
TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-2, torch.float16: 0.1, torch.bfloat16: 0.3}


@pytest.fixture(scope="module")
def fused_cpu_of_hypothesis():
    """`fused_cpu`, for tests whose examples share their fixtures."""
    if da_ops.backends()["cpu"] is not None:
        pytest.skip("the CPU kernels are not built")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "shape", [(1, 8, 5, 7), (3, 40, 6, 7), (3, 33, 20, 19), (1, 70, 33, 37), (2, 5, 96, 97)]
)
@pytest.mark.parametrize(
    ("order", "gate"),
    [
        ("spatial_channel", "affine"),
        ("channel_spatial", "eca"),
        ("parallel", "scalar"),
        ("none", "sigmoid"),
    ],
)
def test_threads_runs_and_streaming_do_not_show(fused_cpu, order, gate, shape, layout):
    tail = make_tail(shape, order, gate, layout=layout)
    want = tail.results(by_kernels)
    for threads in (1, 2, 3):
        between = f"shared=0,joint=0,cache={tail.u.nbytes}"  # streams what is read again alone
        for limits in ("shared=0", "shared=0,cache=1", between):
            with cpu_plan(limits, threads):
                assert_equal(tail.results(by_kernels), want)


@over_backends
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("order", "gate"), TAILS)
def test_every_run_gives_the_same_bits(backend, device, order, gate, layout):
    tail = make_tail((2, 20, 5, 7), order, gate, layout=layout, device=device)
    assert_equal(tail.results(by(backend)), tail.results(by(backend)))


@over_backends
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("order", "gate"), TAILS)
def test_a_nan_stays_in_its_image_where_the_norm_is_frozen(backend, device, order, gate, layout):
    tail = make_tail((4, 6, 9, 8), order, gate, layout=layout, batch=False, device=device)
    want = tail.results(by(backend))
    tail.u[1, 2, 3, 4] = tail.dout[2, 2, 3, 4] = float("nan")
    tail.shortcut[2, 2, 3, 4] = 100.0  # ReLU lets the gradient pass
    got = tail.results(by(backend))
    for image in (0, 3):
        for name in ("out", "d_u", "d_shortcut"):
            assert torch.equal(got[name][image], want[name][image])
    assert got["out"][1].isnan().any()
    assert got["d_u"][2].isnan().any()
    in_training = replace(tail, norm=tail.norm._replace(mean=None, var=None)).results(by(backend))
    assert in_training["out"][0].isnan().any()  # statistics join the images, as they must


@over_backends
def test_strides_of_any_kind(backend, device):
    tail = make_tail((2, 6, 8, 9), device=device)
    other = replace(
        tail,
        u=tail.u.transpose(2, 3).contiguous().transpose(2, 3),
        shortcut=tail.shortcut.contiguous(memory_format=torch.channels_last),
        dout=tail.dout.sum((2, 3), keepdim=True).expand_as(tail.dout),
    )
    tail.dout = other.dout.contiguous()
    assert_equal(other.results(by(backend)), tail.results(by(backend)))


@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("shortcut", [True, False])
@pytest.mark.parametrize("batch", KINDS.values(), ids=KINDS)
def test_gradcheck(fused_cpu, batch, shortcut, strided):
    tail = make_tail((2, 3, 4, 5), dtype=torch.float64, batch=batch)
    if strided:  # so that the kernels get a copy of u
        tail.u = tail.u.transpose(2, 3).contiguous().transpose(2, 3)
    inputs = [
        t.requires_grad_() for t in (tail.u, tail.shortcut, tail.norm.weight, tail.norm.bias)
    ] + [p.requires_grad_() for p in tail.parameters.values()]

    def function(u, added, weight, bias, *parameters):
        call = replace(
            tail,
            u=u if shortcut else u + added,
            shortcut=added if shortcut else None,
            norm=tail.norm._replace(weight=weight, bias=bias),
            parameters=dict(zip(tail.parameters, parameters)),
        )
        return by_kernels(call)

    assert torch.autograd.gradcheck(function, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


@over_backends
@pytest.mark.parametrize("shortcut", [True, False])
def test_only_the_input_and_the_result_are_kept(backend, device, shortcut):
    """And without a shortcut not the result."""
    tail = make_tail((2, 16, 12, 12), shortcut=shortcut, device=device)
    out, large = kept(by(backend), tail)
    assert large == sorted((tail.u.data_ptr(), out.data_ptr())[: 1 + shortcut])


BITS = """
import hashlib
from tests.tails import by_kernels, make_tail
for layout in ("contiguous", "channels_last"):
    results = make_tail((2, 64, 20, 21), layout=layout).results(by_kernels)
    print(hashlib.sha256(b"".join(t.numpy().tobytes() for t in results.values())).hexdigest())
"""


@pytest.mark.slow
@pytest.mark.parametrize("instruction_set", ["generic", "avx2"])
def test_every_instruction_set_is_accurate(fused_cpu, instruction_set):
    if not supported(instruction_set):
        pytest.skip(f"this machine has no {instruction_set}")
    kinds = "any_size or thousand or real_sizes or (test_accuracy and batch and contiguous)"
    tests = ["-k", kinds, "-p", "no:cacheprovider"]
    done = under(instruction_set, "-m", "pytest", "-q", "tests/test_residual.py", *tests)
    assert done.returncode == 0, done.stdout + done.stderr
    bits = under(instruction_set, "-c", BITS)
    assert bits.returncode == 0, bits.stderr
    here = hashlib.sha256(
        b"".join(
            t.numpy().tobytes() for t in make_tail((2, 64, 20, 21)).results(by_kernels).values()
        )
    ).hexdigest()
    assert bits.stdout.split()[0] != here, "the instruction set was not the one asked for"
