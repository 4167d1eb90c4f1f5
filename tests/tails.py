"""Calls of the residual tail to test with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from da_ops.accuracy import PARAMETERS, PROMISED, TIMES_PLAIN
from da_ops.backends.choice import CHOICE
from da_ops.parameters import Parameters
from da_ops.reference import da_attention, formula
from da_ops.residual import reference
from da_ops.residual.function import ResidualFunction, fused
from da_ops.residual.reference import Norm

from .cases import CASES, LAYOUTS, distance, make

# Every order and gate, and no attention; and some, with every order.
TAILS = [*CASES, ("none", "sigmoid")]
FEW_TAILS = [
    ("spatial_channel", "affine"),
    ("channel_spatial", "eca"),
    ("parallel", "scalar"),
    ("spatial", "affine"),
    ("channel", "sigmoid"),
    ("none", "sigmoid"),
]


@dataclass
class Tail:
    """The arguments of one call, and the gradient that comes back to it."""

    u: Tensor
    shortcut: Tensor | None
    norm: Norm  # without statistics of its own where the batch's are taken
    parameters: dict[str, Tensor]  # those that the order and gate take
    dout: Tensor
    order: str
    gate: str
    shortcut_norm: Norm | None = None  # as `norm`; None where the shortcut is added as it is

    @property
    def named(self) -> Parameters | None:
        """The attention's parameters; None where there is no attention."""
        return None if self.order == "none" else Parameters(*map(self.parameters.get, PARAMETERS))

    def to(self, dtype: torch.dtype) -> Tail:
        u, dout = self.u.to(dtype), self.dout.to(dtype)
        shortcut = None if self.shortcut is None else self.shortcut.to(dtype)
        parameters = {name: p.to(dtype) for name, p in self.parameters.items()}
        norm, added = self.norm.to(dtype), self.shortcut_norm
        call = replace(self, u=u, shortcut=shortcut, dout=dout, norm=norm, parameters=parameters)
        return call if added is None else replace(call, shortcut_norm=added.to(dtype))

    def tensors(self) -> list[Tensor]:
        given = (self.u, self.shortcut, *self.norm[:4], *self.parameters.values(), self.dout)
        of_shortcut = () if self.shortcut_norm is None else self.shortcut_norm[:4]
        return [t for t in (*given, *of_shortcut) if t is not None]

    def results(self, function: Callable[[Tail], Tensor]) -> dict[str, Tensor]:
        """`out` and every gradient, by name."""
        leaf: Any = {
            "u": self.u,
            "shortcut": self.shortcut,
            "norm_weight": self.norm.weight,
            "norm_bias": self.norm.bias,
            **self.parameters,
        }
        if self.shortcut_norm is not None:
            leaf |= {
                "shortcut_weight": self.shortcut_norm.weight,
                "shortcut_bias": self.shortcut_norm.bias,
            }
        leaf = {k: t.detach().requires_grad_() for k, t in leaf.items() if t is not None}
        call = replace(
            self,
            u=leaf["u"],
            shortcut=leaf.get("shortcut"),
            norm=self.norm._replace(weight=leaf.get("norm_weight"), bias=leaf.get("norm_bias")),
            parameters={name: leaf[name] for name in self.parameters},
        )
        if self.shortcut_norm is not None:
            call.shortcut_norm = self.shortcut_norm._replace(
                weight=leaf.get("shortcut_weight"), bias=leaf.get("shortcut_bias")
            )
        out = function(call)
        gradients = torch.autograd.grad(out, list(leaf.values()), self.dout)
        return {"out": out.detach(), **{f"d_{k}": g for k, g in zip(leaf, gradients)}}

    def truth(self) -> dict[str, Tensor]:
        return self.to(torch.float64).results(defined)


def defined(tail: Tail) -> Tensor:
    """The definition."""
    how = tail.order, tail.gate, tail.shortcut_norm
    return reference.forward(tail.u, tail.shortcut, tail.norm, tail.named, *how)


def in_steps(tail: Tail) -> Tensor:
    """The norm, the layer, the addition and the ReLU one after the other, in the dtype of `u`."""

    def normalised(u: Tensor, norm: Norm) -> Tensor:
        weight, bias, mean, var, eps = norm
        return F.batch_norm(u, mean, var, weight, bias, mean is None, 0.0, eps)

    x = normalised(tail.u, tail.norm)
    if tail.named is not None:
        same = all(p.dtype == x.dtype for p in tail.parameters.values())
        x = (formula if same else da_attention)(
            x, **dict.fromkeys(PARAMETERS[:3]) | tail.parameters, order=tail.order, gate=tail.gate
        )
    if tail.shortcut is None:
        return torch.relu(x)
    added = tail.shortcut_norm
    return torch.relu(x + (tail.shortcut if added is None else normalised(tail.shortcut, added)))


def by(backend: str) -> Callable[[Tail], Tensor]:
    """The fused operator of a backend."""

    def function(tail: Tail) -> Tensor:
        if tail.shortcut_norm is not None:
            return with_shortcut_norm(tail, backend)
        parameters = map(tail.parameters.get, PARAMETERS)
        options = tail.order, tail.gate, backend
        out, *_ = fused(tail.u, tail.shortcut, *tail.norm, *parameters, *options)
        return out

    return function


def with_shortcut_norm(tail: Tail, backend: str) -> Tensor:
    weight, bias, mean, var, eps = tail.norm
    added = tail.shortcut_norm
    assert added is not None
    of_shortcut = added.eps, added.mean, added.var, None
    served = CHOICE.for_tails(backend, tail.u.device.type)
    call = served, tail.order, tail.gate, eps, mean, var, None, of_shortcut
    parameters = (*(tail.named or ()), added.weight, added.bias)
    return ResidualFunction.apply(call, False, tail.u, tail.shortcut, weight, bias, *parameters)


by_kernels = by("cpu")


def kept(function: Callable[[Tail], Tensor], tail: Tail) -> tuple[Tensor, list[int]]:
    """`out`, and where the full-size tensors lie that the call keeps for backward."""
    tail.u.requires_grad_()
    large: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: large.append(t.data_ptr()) if t.numel() >= tail.u.numel() else None,
        lambda _: None,
    ):
        out = function(tail)
    return out, sorted(large)


def make_tail(
    shape: tuple[int, int, int, int] = (2, 5, 6, 7),
    order: str = "spatial_channel",
    gate: str = "affine",
    *,
    dtype: torch.dtype = torch.float32,
    parameter_dtype: torch.dtype | None = None,
    layout: str = "contiguous",
    batch: bool = True,
    affine: bool = True,
    shortcut: bool = True,
    shortcut_batch: bool | None = None,
    mean: float = 0.0,
    device: str = "cpu",
    seed: int = 0,
) -> Tail:
    """A call with random numbers; `mean` is put on top of every channel's own. `shortcut_batch`:
    whether the shortcut's norm takes the batch's statistics; None where it goes through none."""
    kind = parameter_dtype or dtype
    with_attention = order != "none"
    call = make(
        shape,
        order if with_attention else "channel",
        gate,
        dtype=dtype,
        parameter_dtype=kind,
        layout=layout,
        device=device,
        seed=seed,
    )
    generator = torch.Generator().manual_seed(seed + 1)

    def random(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64).to(device)

    channels = shape[1]
    # A shortcut that is now larger and now smaller, so that ReLU does both.
    added = random(*shape).to(dtype).contiguous(memory_format=LAYOUTS[layout])
    u = (call.x + random(1, channels, 1, 1).to(dtype) + mean).contiguous(
        memory_format=LAYOUTS[layout]
    )
    weight, bias = (0.5 + random(channels)).to(kind), random(channels).to(kind)

    def norm_with(weight: Tensor, bias: Tensor, batch: bool, eps: float) -> Norm:
        return Norm(
            weight if affine else None,
            bias if affine else None,
            None if batch else (random(channels) + mean).to(kind),
            None if batch else (0.1 + random(channels).abs()).to(kind),
            eps,
        )

    norm = norm_with(weight, bias, batch, 1e-5)
    parameters = call.parameters if with_attention else {}
    tail = Tail(u, added if shortcut else None, norm, parameters, call.dy, order, gate)
    if shortcut_batch is not None:
        added += (random(1, channels, 1, 1) + mean).to(dtype)
        affine_of = (0.5 + random(channels)).to(kind), random(channels).to(kind)
        tail.shortcut_norm = norm_with(*affine_of, shortcut_batch, 1e-3)
    return tail


def assert_as_good_as_steps(tails: Sequence[Tail], answers: Sequence[dict[str, Tensor]]) -> None:
    """The errors of answers to several calls are at most twice those of the modules one after the
    other in the same dtype, or as small as the layer's promise. All calls' numbers are taken
    together: a gradient that cancels in one of them decides nothing."""

    def error(got: Sequence[dict[str, Tensor]], name: str) -> float:
        return distance(*(torch.stack([draw[name].double() for draw in of]) for of in (got, want)))

    assert len(answers) == len(tails)
    want = [tail.truth() for tail in tails]
    steps = [tail.results(in_steps) for tail in tails]
    for name in want[0]:
        found, beside = error(answers, name), error(steps, name)
        allowed = max(TIMES_PLAIN * beside, PROMISED[answers[0][name].dtype])
        assert found <= allowed, (name, found, beside)
