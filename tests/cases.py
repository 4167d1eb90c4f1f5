"""Calls of the operator to test with, their true results, and how far off a result is."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

import da_ops
from da_ops import accuracy
from da_ops.accuracy import PARAMETERS, Error, Exact
from da_ops.reference import GATES, ORDERS, formula

FULL = os.environ.get("DA_OPS_TEST_FULL") == "1"  # `make test-full`

# Every order with every gate; one gate for "spatial", which uses none.
CASES = [(order, gate) for order in ORDERS if order != "spatial" for gate in GATES]
CASES += [("spatial", "affine")]
# Every order and every gate, for what costs time.
FEW_CASES = (
    CASES
    if FULL
    else [(order, "affine") for order in ORDERS]
    + [("spatial_channel", "scalar"), ("channel_spatial", "eca"), ("parallel", "sigmoid")]
)

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
HALF = (torch.float16, torch.bfloat16)
# x's and the parameters'
DTYPE_PAIRS = [(dtype, dtype) for dtype in DTYPES] + [(dtype, torch.float32) for dtype in HALF]
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}

CONVOLUTIONS = PARAMETERS[:3]


@dataclass
class Call:
    """The arguments of one call, and the gradient that comes back to it."""

    x: Tensor
    parameters: dict[str, Tensor]  # those that the order and gate take
    dy: Tensor
    order: str
    gate: str

    def __call__(self, function: Callable[..., Tensor] = da_ops.da_attention, **options: Any):
        parameters = dict.fromkeys(CONVOLUTIONS) | self.parameters
        return function(self.x, **parameters, order=self.order, gate=self.gate, **options)

    def positional(self) -> tuple[Any, ...]:
        """The arguments in the order of DAFunction, less the backend."""
        return (self.x, *map(self.parameters.get, PARAMETERS), self.order, self.gate)

    def to(self, dtype: torch.dtype) -> Call:
        parameters = {name: p.to(dtype) for name, p in self.parameters.items()}
        return replace(self, x=self.x.to(dtype), dy=self.dy.to(dtype), parameters=parameters)

    def leaves(self) -> Call:
        """The same values as new leaves that require a gradient; strides stay."""
        x = self.x.detach().requires_grad_()
        parameters = {k: p.detach().requires_grad_() for k, p in self.parameters.items()}
        return replace(self, x=x, parameters=parameters)

    def results(
        self, function: Callable[..., Tensor] = da_ops.da_attention, **options: Any
    ) -> dict[str, Tensor]:
        """y and every gradient, by name."""
        call = self.leaves()
        y = call(function, **options)
        # Not y.backward(), which would store dx with x's strides whatever strides it came with.
        inputs = (call.x, *call.parameters.values())
        names = ("dx", *(f"d_{name}" for name in call.parameters))
        return {"y": y.detach(), **dict(zip(names, torch.autograd.grad(y, inputs, call.dy)))}

    def truth(self) -> dict[str, Tensor]:
        return self.to(torch.float64).results(formula)

    def exact(self) -> dict[str, Exact]:
        """What the results are measured by."""
        parameters = map(self.parameters.get, PARAMETERS)
        return accuracy.exact(self.dy, self.x, *parameters, order=self.order, gate=self.gate)

    def errors(self, got: dict[str, Tensor], *, truncated: bool = False) -> dict[str, Error]:
        """How far off all its results are."""
        exact = self.exact()
        assert got.keys() == exact.keys()
        return accuracy.errors(got, exact, truncated=truncated)


def make(
    shape: tuple[int, int, int, int] = (2, 5, 6, 7),
    order: str = "spatial_channel",
    gate: str = "affine",
    *,
    dtype: torch.dtype = torch.float32,
    parameter_dtype: torch.dtype | None = None,
    layout: str = "contiguous",
    device: str = "cpu",
    kernel_size: int = 3,
    seed: int = 0,
) -> Call:
    """A call with random numbers.

    Nothing is centred on zero, so that no sum cancels and a relative error means something.
    """
    generator = torch.Generator().manual_seed(seed)

    def random(*size: int, mean: float = 0.5, spread: float = 1.0) -> Tensor:
        return mean + spread * torch.randn(*size, generator=generator, dtype=torch.float64)

    channels = shape[1]
    x, dy = random(*shape), random(*shape)
    parameters = {}
    if order != "channel":
        parameters["conv_weight"] = random(1, 1, 3, 3, mean=0.2, spread=0.1)
        parameters["dilated_weight"] = random(1, 1, 3, 3, mean=-0.1, spread=0.05)
        parameters["merge_weight"] = random(1, 2, 1, 1, mean=0.7, spread=0.1)
        parameters["spatial_bias"] = random(1, mean=0.3, spread=0.1)
    if order != "spatial":
        if gate == "eca":
            parameters["gate_weight"] = random(kernel_size, mean=0.3, spread=0.3)
        elif gate != "sigmoid":
            size = channels if gate == "affine" else 1
            parameters["gate_weight"] = random(size, mean=0.7, spread=0.2)
            parameters["gate_bias"] = random(size, mean=0.5, spread=0.2)

    def place(t: Tensor) -> Tensor:
        return t.to(device, dtype).contiguous(memory_format=LAYOUTS[layout])

    parameters = {k: p.to(device, parameter_dtype or dtype) for k, p in parameters.items()}
    return Call(place(x), parameters, place(dy), order, gate)


def distance(got: Tensor, want: Tensor) -> float:
    """Relative L2 error."""
    got, want = got.detach().double(), want.detach().double()
    return float((got - want).norm() / want.norm())


def assert_close(got: dict[str, Tensor], want: dict[str, Tensor], tolerance: float) -> None:
    """Every result is within a relative L2 error of the one of the same name."""
    assert got.keys() == want.keys()
    errors = {name: distance(got[name], want[name]) for name in got}
    assert all(error <= tolerance for error in errors.values()), errors


def assert_promised(call: Call, got: dict[str, Tensor], *, truncated: bool = False) -> None:
    """The results of a call are as accurate as the library promises."""
    broken = accuracy.broken([call.errors(got, truncated=truncated)])
    assert not broken, (call.x.shape, call.order, call.gate, broken)


def assert_equal(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    """Every result is, bit for bit, the one of the same name."""
    assert got.keys() == want.keys()
    different = [name for name in got if not torch.equal(got[name], want[name])]
    assert not different, different
