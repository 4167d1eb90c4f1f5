"""A shortcut that goes through a norm of its own, as part of the residual tail's operator."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from da_ops.accuracy import PARAMETERS
from da_ops.backends import BACKENDS as KNOWN
from da_ops.residual import reference

from .cases import DTYPE_PAIRS, LAYOUTS, assert_close, assert_equal
from .conftest import BACKENDS
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
)
from .tails import make_tail as make_any
from .test_residual import PLANS, TOLERANCE, tails

KINDS = ["batch", "frozen"]
over_backends = pytest.mark.parametrize(
    "_target",
    [pair for pair in BACKENDS if KNOWN[pair[0]].batch_statistics is not None],
    ids=lambda pair: pair[0],
    indirect=True,
)


def make_tail(*args, kind="batch", **options):
    return make_any(*args, **options, shortcut_batch=kind == "batch")


# ------------------------------------------------------------------------------ what it computes


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("order", "gate"), FEW_TAILS)
def test_definition_and_backward(order, gate, kind, affine):
    options = {"dtype": torch.float64, "kind": kind, "affine": affine}
    tail = make_tail((3, 5, 8, 7), order, gate, **options)
    truth = tail.results(in_steps)
    assert_close(tail.results(defined), truth, 1e-12)
    out = defined(tail)
    du, d_shortcut, d_weight, d_bias, *six, its_weight, its_bias = reference.backward(
        tail.dout, out, tail.u, tail.norm, tail.named, order, gate, tail.shortcut,
        tail.shortcut_norm,
    )  # fmt: skip
    got = {"out": out, "d_u": du, "d_shortcut": d_shortcut}
    named = {"norm_weight": d_weight, "norm_bias": d_bias, **dict(zip(PARAMETERS, six))}
    named |= {"shortcut_weight": its_weight, "shortcut_bias": its_bias}
    got |= {f"d_{name}": g for name, g in named.items() if g is not None}
    assert_close(got, truth, 1e-12)


@over_backends
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("dtype", "parameter_dtype"),
    DTYPE_PAIRS,
    ids=lambda dtype: str(dtype).removeprefix("torch."),
)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch", [True, False], ids=KINDS)
@pytest.mark.parametrize(("order", "gate"), TAILS)
def test_accuracy(backend, device, order, gate, batch, kind, dtype, parameter_dtype, layout):
    options = {"dtype": dtype, "parameter_dtype": parameter_dtype, "layout": layout}
    options |= {"batch": batch, "kind": kind, "device": device}
    some = [make_tail((2, 24, 9, 11), order, gate, **options, seed=seed) for seed in range(4)]
    answers = [tail.results(by(backend)) for tail in some]
    assert_as_good_as_steps(some, answers)
    for name, result in answers[0].items():
        of_u = name in ("out", "d_u", "d_shortcut")
        assert result.dtype == (dtype if of_u else parameter_dtype), name


@over_backends
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(4, 256, 28, 28), (3, 1024, 14, 14), (5, 2048, 7, 7)])
def test_accuracy_at_real_sizes(backend, device, shape, layout):
    some = [make_tail(shape, layout=layout, device=device, seed=seed) for seed in range(2)]
    assert_as_good_as_steps(some, [tail.results(by(backend)) for tail in some])


@over_backends
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("order", "gate"), [("spatial_channel", "affine"), ("none", "sigmoid")])
def test_a_mean_of_a_thousand_deviations(backend, device, order, gate, layout):
    options = {"layout": layout, "mean": 1000.0, "device": device}
    some = [make_tail((4, 32, 12, 13), order, gate, seed=seed, **options) for seed in range(4)]
    assert_as_good_as_steps(some, [tail.results(by(backend)) for tail in some])


@given(tails([True, False]), PLANS, st.integers(1, 3))
def test_any_size(fused_cpu_of_hypothesis, tail, limits, threads):
    with cpu_plan(limits, threads):
        got = tail.results(by_kernels)
        in_place = over_u(tail)
    assert_equal({"out": in_place}, {"out": got["out"]})
    for name, want in tail.truth().items():
        off, least = (got[name].double() - want).norm(), 1e-2 * want.numel() ** 0.5
        assert off <= TOLERANCE[tail.u.dtype] * (want.norm() + least), name


def over_u(tail):
    weight, bias, mean, var, eps = tail.shortcut_norm
    if mean is None:
        mean, var = torch.ops.da_ops.batch_statistics(tail.shortcut, None, None, None, 0.0)
    out = tail.u.clone()
    parameters = [tail.parameters.get(name) for name in PARAMETERS]
    how = tail.order, tail.gate, weight, bias, mean, var, eps
    torch.ops.da_ops.residual_forward_(out, tail.shortcut, *tail.norm, *parameters, *how)
    return out


@pytest.fixture(scope="module")
def fused_cpu_of_hypothesis():
    if KNOWN["cpu"].reason is not None:
        pytest.skip("the CPU kernels are not built")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(1, 8, 5, 7), (3, 33, 20, 19), (1, 70, 33, 37), (2, 5, 96, 97)])
@pytest.mark.parametrize(("order", "gate"), FEW_TAILS)
def test_threads_runs_and_streaming_do_not_show(fused_cpu, order, gate, shape, layout):
    tail = make_tail(shape, order, gate, layout=layout)
    want = tail.results(by_kernels)
    for threads in (1, 2, 3):
        for limits in ("shared=0", "shared=0,cache=1", "shared=0,joint=0"):
            with cpu_plan(limits, threads):
                assert_equal(tail.results(by_kernels), want)


@over_backends
def test_strides_of_any_kind(backend, device):
    tail = make_tail((2, 6, 8, 9), device=device)
    other = replace(
        tail,
        shortcut=tail.shortcut.contiguous(memory_format=torch.channels_last),
        dout=tail.dout.sum((2, 3), keepdim=True).expand_as(tail.dout),
    )
    tail.dout = other.dout.contiguous()
    assert_equal(other.results(by(backend)), tail.results(by(backend)))


@over_backends
@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_infinite_stays_where_it_is(backend, device, layout):
    """Where the norms are frozen: in its image, and out of the gradient of the shortcut."""
    options = {"batch": False, "kind": "frozen", "layout": layout, "device": device}
    tail = make_tail((4, 6, 9, 8), **options)
    want = tail.results(by(backend))
    tail.shortcut[1, 2, 3, 4] = float("inf")
    got = tail.results(by(backend))
    for name in ("out", "d_u", "d_shortcut"):
        others = [0, 2, 3]
        assert torch.equal(got[name][others], want[name][others])
    assert got["d_shortcut"].isfinite().all()
    tail.shortcut[1, 2, 3, 4] = float("nan")
    assert tail.results(by(backend))["out"][1].isnan().sum() == 1


# ------------------------------------------------------------------------------ what PyTorch asks


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch", [True, False], ids=KINDS)
def test_gradcheck(fused_cpu, batch, kind):
    tail = make_tail((2, 3, 4, 5), dtype=torch.float64, batch=batch, kind=kind)
    added = tail.shortcut_norm
    given = (tail.u, tail.shortcut, *tail.norm[:2], *added[:2], *tail.parameters.values())

    def function(u, shortcut, weight, bias, its_weight, its_bias, *parameters):
        call = replace(
            tail,
            u=u,
            shortcut=shortcut,
            norm=tail.norm._replace(weight=weight, bias=bias),
            shortcut_norm=added._replace(weight=its_weight, bias=its_bias),
            parameters=dict(zip(tail.parameters, parameters)),
        )
        return by_kernels(call)

    inputs = [t.requires_grad_() for t in given]
    assert torch.autograd.gradcheck(function, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize(("order", "gate"), [("spatial_channel", "affine"), ("none", "sigmoid")])
def test_opcheck(fused_cpu, order, gate, affine, layout):
    tail = make_tail((2, 3, 4, 5), order, gate, layout=layout, affine=affine)
    ops = torch.ops.da_ops
    learnt = torch.randn(3), torch.rand(3), torch.tensor(41), 0.1
    for running in ((None, None, None, 0.0), learnt):
        torch.library.opcheck(ops.batch_statistics.default, (tail.shortcut, *running))
    weight, bias, *_, eps = tail.shortcut_norm
    its = (weight, bias, *ops.batch_statistics(tail.shortcut, None, None, None, 0.0), eps)
    parameters = [tail.parameters.get(name) for name in PARAMETERS]
    forward = (tail.u, tail.shortcut, *tail.norm, *parameters, order, gate, *its)
    torch.library.opcheck(ops.residual_forward.default, forward)
    torch.library.opcheck(ops.residual_forward_.default, (tail.u.clone(), *forward[1:]))
    torch.library.opcheck(ops.residual_training.default, (*forward[:4], *learnt, *forward[6:]))
    out, mean, var, *maps = ops.residual_forward(*forward)
    norm = (*tail.norm[:2], mean, var, True, tail.norm.eps)
    backward = (tail.dout, out, tail.u, *norm, *parameters, *maps, order, gate)
    backward = (*backward, tail.shortcut, *its, True)
    torch.library.opcheck(ops.residual_backward.default, backward)


def test_the_operators_name_what_does_not_fit(fused_cpu):
    tail = make_tail()
    ops, u, v = torch.ops.da_ops, tail.u, tail.shortcut
    parameters = [tail.parameters.get(name) for name in PARAMETERS]
    how = *parameters, "spatial_channel", "affine"
    weight, bias, *_ = tail.shortcut_norm
    mean, var = ops.batch_statistics(v, None, None, None, 0.0)
    together = "shortcut_mean and shortcut_var go together"
    of_channels = "the norm's tensors must be one number a channel"
    for shortcut, its, message in (
        (v, (weight, bias, mean, None), together),
        (v, (weight, bias, None, None), "a shortcut's norm needs statistics"),
        (None, (weight, bias, mean, var), "a shortcut's norm needs one"),
        (v, (weight[:2], bias, mean, var), of_channels),
        (v, (weight, bias, mean[:2], var), of_channels),
        (v, (weight, bias.double(), mean, var), "the norm's tensors must have u's dtype"),
    ):
        with pytest.raises(RuntimeError, match=message):
            ops.residual_forward(u, shortcut, *tail.norm, *how, *its, 1e-5)
    out, *statistics, channel_mean, pooled = ops.residual_forward(
        u, v, *tail.norm, *how, weight, bias, mean, var, 1e-5
    )
    norm = (*tail.norm[:2], *statistics, True, 1e-5)
    maps = channel_mean, pooled, "spatial_channel", "affine"
    for shortcut, out_given, message in (
        (v[:1], out, "shortcut must be like u"),
        (None, out, "a shortcut's norm needs one"),
        (v, None, "a shortcut's norm needs forward's out"),
    ):
        with pytest.raises(RuntimeError, match=message):
            ops.residual_backward(
                tail.dout, out_given, u, *norm, *parameters, *maps, shortcut, weight, bias, mean,
                var, 1e-5, True,
            )  # fmt: skip
    for given_u, running, message in (
        (v[:1, :, :1, :1].contiguous(), (None, None, None), "more than one value a channel"),
        (v, (mean, None, None), "running_mean and running_var go together"),
        (v, (torch.zeros(10)[::2], var, None), "running statistics must be contiguous"),
        (v, (mean[:2], var, None), of_channels),
        (v, (mean, var, torch.tensor(0.0)), "batches must be one number of int64"),
    ):
        with pytest.raises(RuntimeError, match=message):
            ops.batch_statistics(given_u, *running, 0.1)


@over_backends
def test_the_shortcut_is_kept_not_its_norms_result(backend, device):
    tail = make_tail((2, 16, 12, 12), device=device)
    out, large = kept(by(backend), tail)
    assert large == sorted(t.data_ptr() for t in (tail.u, tail.shortcut, out))
