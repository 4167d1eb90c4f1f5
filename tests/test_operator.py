"""What the operator computes: y and every gradient against the definition in float64."""

from __future__ import annotations

import pytest
import torch

import da_ops
from da_ops import accuracy
from da_ops.parameters import Parameters
from da_ops.reference import GATES, formula

from .cases import (
    CASES,
    DTYPE_PAIRS,
    FULL,
    LAYOUTS,
    assert_equal,
    assert_promised,
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
    """As promised, beside plain PyTorch in the dtype of x."""
    draws = (16 if dtype == torch.float32 else 6) * (4 if FULL else 1)
    if interpreted(backend):
        draws = 8 if FULL else accuracy.SEVERAL
    # Triton's interpreter cuts bfloat16 off where a GPU rounds.
    truncated = interpreted(backend) and dtype == torch.bfloat16
    ours, plain, found = [], [], []
    for seeds in range(draws), range(draws, 4 * draws):  # many tell chance from what is broken
        for seed in seeds:
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
            got = call.results(backend=backend)
            assert got["y"].dtype == got["dx"].dtype == dtype
            assert all(got[f"d_{name}"].dtype == parameter_dtype for name in call.parameters)
            ours.append(call.errors(got, truncated=truncated))
            plain.append(call.errors(call.to(dtype).results(formula)))
        if not (found := accuracy.broken(ours, plain)):
            break
    assert not found


def test_parameters_are_in_the_order_of_the_schemas():
    operators = torch.ops.da_ops.attention, torch.ops.da_ops.triton_forward
    if da_ops.backends()["cpu"] is None:
        operators += torch.ops.da_ops.forward, torch.ops.da_ops.backward
    for operator in operators:
        names = [a.name for a in operator.default._schema.arguments if a.name != "dy"]
        assert names[1:7] == list(Parameters._fields)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_accuracy_at_real_sizes(backend, device, layout):
    ours, plain = [], []
    for shape in [(16, 64, 56, 56), (3, 512, 28, 28), (4, 1024, 14, 14), (2, 2048, 7, 7)]:
        call = make(shape, layout=layout, device=device)
        ours.append(call.errors(call.results(backend=backend)))
        plain.append(call.errors(call.results(formula)))
        assert not accuracy.broken(ours[-1:])
    if not interpreted(backend):  # its tiles have thousands of rows, which numpy adds one by one
        assert not accuracy.broken(ours, plain)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "shape", [(1, 4, 512, 512), (2, 64, 112, 112), (1, 20000, 4, 4), (1, 1, 1, 200_000)]
)
def test_accuracy_of_many_numbers_to_add(fused_cpu, shape, layout):
    """As a ReLU gives them: a sum that grows and grows."""
    ours, plain = [], []
    for seed in range(accuracy.SEVERAL):
        call = make(shape, layout=layout, seed=seed)
        call.x.relu_()
        ours.append(call.errors(call.results(backend="cpu")))
        plain.append(call.errors(call.results(formula)))
    assert not accuracy.broken(ours, plain)


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
    assert_promised(call, call.results(backend=backend))


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
    assert distance(got, truth) <= accuracy.PROMISED[dtype]
