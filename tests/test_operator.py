"""What the operator computes: y and every gradient against the definition in float64."""

from __future__ import annotations

import statistics

import pytest
import torch

from da_ops.reference import GATES, formula

from .cases import (
    CASES,
    DTYPE_PAIRS,
    FULL,
    LAYOUTS,
    PROMISED,
    assert_equal,
    distance,
    make,
)
from .conftest import interpreted


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("dtype", "parameter_dtype"),
    DTYPE_PAIRS,
    ids=lambda dtype: str(dtype).removeprefix("torch."),
)
@pytest.mark.parametrize(("order", "gate"), CASES)
def test_accuracy(backend, device, order, gate, dtype, parameter_dtype, layout):
    """Within the promised error, and at most twice as far off as plain PyTorch in that dtype.

    The second is a promise about rounding, which is luck in any one number, and some gradients are
    one number: so it is held against the root mean square over several draws, and may always be
    what rounding the exact result costs. In float64 plain PyTorch is the truth itself.
    """
    draws = (16 if dtype == torch.float32 else 6) * (4 if FULL else 1)
    if interpreted(backend):
        draws = 8 if FULL else 2
    ours, plain = [], []
    for seed in range(draws):
        call = make(
            (2, 24, 9, 11),
            order,
            gate,
            dtype=dtype,
            parameter_dtype=parameter_dtype,
            layout=layout,
            device=device,
            seed=seed,
        )
        truth = call.truth()
        got = call.results(backend=backend)
        assert got["y"].dtype == got["dx"].dtype == dtype
        assert all(got[f"d_{name}"].dtype == parameter_dtype for name in call.parameters)
        ours.append({name: distance(got[name], truth[name]) for name in truth})
        eager = call.to(dtype).results(formula)
        plain.append({name: distance(eager[name], truth[name]) for name in truth})

    # Triton's interpreter cuts bfloat16 off where a GPU rounds: twice the error of one rounding.
    slack = 2 if interpreted(backend) and dtype == torch.bfloat16 else 1
    rounding = torch.finfo(dtype).eps / 2
    for name in ours[0]:
        errors = [draw[name] for draw in ours]
        assert max(errors) <= slack * PROMISED[dtype], name
        if dtype != torch.float64:
            bound = max(2 * rms([draw[name] for draw in plain]), rounding)
            assert rms(errors) <= slack * bound, name


def rms(values):
    return statistics.fmean(v * v for v in values) ** 0.5


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(16, 64, 56, 56), (3, 512, 28, 28), (2, 2048, 7, 7)])
def test_accuracy_at_real_sizes(backend, device, shape, layout):
    call = make(shape, layout=layout, device=device)
    truth, got, plain = call.truth(), call.results(backend=backend), call.results(formula)
    for name in truth:
        error = distance(got[name], truth[name])
        assert error <= PROMISED[torch.float32], name
        if name in ("y", "dx"):  # of many numbers, so that luck evens out
            assert error <= 2 * distance(plain[name], truth[name]), name


@pytest.mark.parametrize("gate", GATES)
def test_spatial_order_has_no_gate(backend, device, gate):
    call = make(order="spatial", device=device)
    want = call.results(backend=backend)
    call.gate = gate
    assert_equal(call.results(backend=backend), want)


def test_without_spatial_bias_it_is_zero(backend, device):
    call = make(device=device)
    call.parameters["spatial_bias"].zero_()
    want = call.results(backend=backend)
    del call.parameters["spatial_bias"], want["d_spatial_bias"]
    assert_equal(call.results(backend=backend), want)


@pytest.mark.parametrize("kernel_size", [1, 3, 9, 33])
def test_eca_kernel_may_be_wider_than_the_channels(backend, device, kernel_size):
    call = make((2, 8, 5, 5), gate="eca", kernel_size=kernel_size, device=device)
    truth, got = call.truth(), call.results(backend=backend)
    for name in truth:
        error = (got[name].double() - truth[name]).abs().max()
        assert error <= 1e-6 * truth[name].abs().max(), name


def test_large_numbers_saturate_the_masks(backend, device):
    """A mask of 1 is exact, one of 0 is at most the least normal number; nothing overflows."""
    call = make(device=device)
    call.parameters["spatial_bias"].fill_(1e4)
    call.parameters["gate_bias"].fill_(1e4)
    assert torch.equal(call(backend=backend), call.x)
    call.parameters["gate_bias"].fill_(-1e4)
    got = call.results(backend=backend)
    assert all(result.isfinite().all() for result in got.values())
    assert (got["y"].abs() <= torch.finfo(torch.float32).tiny * call.x.abs()).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sums_do_not_overflow_half_precision(backend, device, dtype):
    """The sum over an image is beyond float16, its mean is not."""
    call = make((1, 4, 64, 64), gate="scalar", dtype=dtype, device=device)
    call.x.fill_(100.0)
    for name in ("gate_weight", "gate_bias"):
        call.parameters[name].fill_(0.01)
    got, truth = call(backend=backend), call.truth()["y"]
    assert distance(got, truth) <= PROMISED[dtype]
