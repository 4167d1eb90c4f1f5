"""How near every backend comes to the exact result: the promise, said once by :func:`findings`.

Tests, benchmarks and the checks on a GPU all ask it. Exact is :mod:`da_ops.reference` in float64.

1. Every number is within 1e-6 (float64: 1e-12) of the magnitudes of its terms, added up. In half
   precision that holds before the one rounding at the end.
2. ``y``, ``dx`` and the gradients over the channels (affine gate), each as a whole: the relative L2
   error is at most 1e-6 in float32, 1e-3 in float16, 8e-3 in bfloat16, 1e-12 in float64.
3. In root mean square over several draws of the input, the error is at most twice that of the plain
   formula computed in the dtype of ``x``, or what rounding the exact result costs.

The second is not said of gradients that are sums over the whole batch (convolutions, merge, spatial
bias, scalar and eca gates): where their terms happen to cancel, no sum of rounded numbers is near
what is left. Neither the second nor the third is said of logits whose terms add up to more than 16,
the number of float32's roundings in 1e-6: there a mask is mostly the rounding of its logit, then it
underflows. And all of it is said of numbers that round independently: where all are equal, their
roundings add up, in plain PyTorch too.

The terms of a result are those of its formula, multiplied out in ``dy``, ``x``, the weights and the
masks: the same formula over absolute values adds their magnitudes up. A mask itself is known to
four roundings (of the exponential, the sum, the quotient, the result), and to four of each term of
its logit (of a mean, a product, a sum, the result). These count among its terms, as the share of
what is promised that they take, and among those of 1 - mask, which can be smaller than they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from . import reference
from .parameters import Parameters
from .reference import accumulation_dtype

PROMISED = {
    torch.float32: 1e-6,
    torch.float16: 1e-3,
    torch.bfloat16: 8e-3,
    torch.float64: 1e-12,
}
TIMES_PLAIN = 2.0
OF_TERMS, RELATIVE, BESIDE_PLAIN = "of the terms", "relative", "in root mean square"  # the rules
SEVERAL = 4  # draws, from which on a root mean square means something
MANY = 16  # numbers that do not all happen to be small
_ROUNDINGS = 4

PARAMETERS = Parameters._fields


@dataclass(frozen=True)
class Exact:
    """A result and the magnitudes of its terms, both float64 and of the result's shape."""

    value: Tensor
    terms: Tensor
    is_sum: bool  # over the whole batch


@dataclass(frozen=True)
class Error:
    """How far off one result is. `error` and `value` are L2 norms over that of the terms."""

    dtype: str
    is_sum: bool
    numbers: int
    error: float
    value: float  # of the exact result: its relative error is error / value
    share: float  # largest error of a number over its terms, less one rounding in half precision
    rounding: float  # largest relative error of one rounding


@dataclass(frozen=True)
class Finding:
    """One rule of the promise, looked up for one result."""

    result: str
    rule: str
    found: float
    allowed: float

    @property
    def used(self) -> float:
        """The share of what is allowed that is used up; more than 1 is too much."""
        if not self.found:
            return 0.0
        return self.found / self.allowed if self.allowed and self.found > 0 else math.inf

    @property
    def kept(self) -> bool:
        return self.used <= 1

    def __str__(self) -> str:
        return f"{self.result}: error {self.found:.1e} {self.rule} of {self.allowed:.1e} allowed"


def exact(
    dy: Tensor,
    x: Tensor,
    *parameters: Tensor | None,
    order: str = "spatial_channel",
    gate: str = "affine",
) -> dict[str, Exact]:
    """What a call and its backward should give: "y", "dx", and "d_conv_weight" and so on.

    `parameters` are those of :data:`PARAMETERS`, None where order or gate have none; there, nothing
    is returned. Shapes and dtypes are those of :func:`da_ops.da_attention`.
    """
    given = (x, *parameters)
    dy, wide = dy.detach().double(), x.detach().double()
    values = Parameters(*parameters).each(lambda p: p.detach().double())
    size, sizes = wide.abs(), values.each(torch.abs)
    masks = s, c = reference.masks(wide, values, order, gate)
    slopes = [mask * (1 - mask) for mask in masks]
    true = reference.gradients(dy, wide, values, order, gate, masks=masks, slopes=slopes)
    precision = torch.finfo(accumulation_dtype(x.dtype))
    promised = PROMISED[accumulation_dtype(x.dtype)]
    rounded = _ROUNDINGS * precision.eps / 2 / promised  # as a share of the promise

    def known(mask: Tensor) -> Callable[[Tensor], Tensor]:
        """The terms of a mask from those of its logit; it may stop at the least normal number."""
        least = precision.tiny / promised
        return lambda logit: mask + rounded * mask * (1 + (1 - mask) * logit) + least

    terms = reference.masks(size, sizes, order, gate, sigmoids=(known(s), known(c)))
    slopes = [own * (1 - mask + (own - mask)) for own, mask in zip(terms, masks, strict=True)]
    added = reference.gradients(dy.abs(), size, sizes, order, gate, masks=terms, slopes=slopes)
    found = {"y": Exact(wide * s * c, size * terms[0] * terms[1], False)}
    names = ("dx", *(f"d_{name}" for name in PARAMETERS))
    for name, t, value, magnitude in zip(names, given, true, added, strict=True):
        if t is not None and value is not None and magnitude is not None:
            is_sum = name != "dx" and not (name.startswith("d_gate") and gate == "affine")
            found[name] = Exact(value.reshape(t.shape), magnitude.reshape(t.shape), is_sum)
    return found


def errors(
    got: Mapping[str, Tensor], want: Mapping[str, Exact], *, truncated: bool = False
) -> dict[str, Error]:
    """How far off each result is. `truncated`: half precision was cut off, not rounded."""
    return {name: _error(result.detach(), want[name], truncated) for name, result in got.items()}


def _error(got: Tensor, want: Exact, truncated: bool) -> Error:
    dtype = torch.finfo(got.dtype)
    rounding = dtype.eps / (1 if truncated else 2)
    difference = got.double() - want.value
    # Beyond the range of the dtype only the rounded result itself is right.
    size, right = want.value.abs(), got == want.value.to(got.dtype)
    difference = difference.masked_fill(right & ((size > dtype.max) | (size < dtype.tiny)), 0)
    beyond = difference.abs() - torch.finfo(accumulation_dtype(got.dtype)).tiny
    if accumulation_dtype(got.dtype) != got.dtype:
        beyond -= rounding * size.clamp_min(dtype.tiny)
    beyond = beyond.clamp_min(0)  # and NaN stays
    share = torch.where(beyond == 0, 0.0, beyond / want.terms)
    norm = float(want.terms.norm())
    off, value = float(difference.norm()), float(want.value.norm())
    return Error(
        dtype=str(got.dtype).removeprefix("torch."),
        is_sum=want.is_sum,
        numbers=got.numel(),
        error=off / norm if norm else math.inf if off else 0.0,
        value=value / norm if norm else 0.0,
        share=float(share.max()) if share.numel() else 0.0,
        rounding=rounding,
    )


def findings(
    ours: Sequence[Mapping[str, Error]], plain: Sequence[Mapping[str, Error]] = ()
) -> list[Finding]:
    """The promise, rule by rule and result by result, over one or more draws of the same kind.

    `ours` and `plain` have the :func:`errors` of each draw, `plain` those of the plain formula.
    Where luck may decide, a rule is left out: the second below 16 numbers, the third below 4 draws,
    for the numbers of one draw share their masks' errors. In float64 the third is left out too:
    there plain PyTorch is itself what is held for exact.
    """
    found = []
    for name in ours[0] if ours else ():
        draws, theirs = [draw[name] for draw in ours], [draw[name] for draw in plain]
        dtype = getattr(torch, draws[0].dtype)
        promised, accumulated = PROMISED[dtype], PROMISED[accumulation_dtype(dtype)]
        shares = [draw.share for draw in draws]
        worst = math.nan if any(map(math.isnan, shares)) else max(shares)
        found.append(Finding(name, OF_TERMS, worst, accumulated))
        error, value = rms(draw.error for draw in draws), rms(draw.value for draw in draws)
        many = sum(draw.numbers for draw in draws) >= MANY
        if many and value and not draws[0].is_sum:
            found.append(Finding(name, RELATIVE, error / value, promised))
        if theirs and dtype != torch.float64 and len(draws) >= SEVERAL:
            rounded = value * draws[0].rounding
            allowed = max(TIMES_PLAIN * rms(draw.error for draw in theirs), rounded)
            found.append(Finding(name, BESIDE_PLAIN, error, allowed))
    return found


def broken(*draws: Sequence[Mapping[str, Error]]) -> list[str]:
    """What :func:`findings` finds not kept, in words."""
    return [str(finding) for finding in findings(*draws) if not finding.kept]


def rms(values: Iterable[float]) -> float:
    """Root mean square."""
    squares = [value * value for value in values]
    return math.sqrt(sum(squares) / len(squares))
