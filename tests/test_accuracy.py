"""The promise of accuracy tells what keeps it from what breaks it."""

from __future__ import annotations

import pytest
import torch

from da_ops import accuracy
from da_ops.accuracy import PROMISED
from da_ops.reference import formula

from .cases import CASES, DTYPES, HALF, Call, make


def centred(call, seed=0):
    """The call with x and dy around zero: most sums cancel."""
    torch.manual_seed(seed)
    x, dy = torch.randn_like(call.x), torch.randn_like(call.dy)
    return Call(x, call.parameters, dy, call.order, call.gate)


def rounded(call):
    """The exact results in the dtypes that they should have."""
    dtypes = {f"d_{name}": p.dtype for name, p in call.parameters.items()}
    return {name: e.value.to(dtypes.get(name, call.x.dtype)) for name, e in call.exact().items()}


@pytest.mark.parametrize(("order", "gate"), CASES)
def test_exact_is_the_derivative(order, gate):
    call = centred(make((2, 5, 6, 7), order, gate, dtype=torch.float64))
    exact, truth = call.exact(), call.truth()
    assert exact.keys() == truth.keys()
    for name, e in exact.items():
        assert e.value.shape == e.terms.shape == truth[name].shape
        assert (e.value - truth[name]).abs().le(1e-13 * e.terms).all(), name


@pytest.mark.parametrize(("order", "gate"), CASES)
def test_what_does_not_cancel_is_its_terms(order, gate):
    """Where all is positive there is nothing to add but what rounds the masks."""
    call = make((2, 5, 6, 7), order, gate)
    call.x.abs_(), call.dy.abs_()
    for p in call.parameters.values():
        p.abs_().mul_(0.2)
    for name, e in call.exact().items():
        assert e.terms.ge(e.value).all(), name
        # In float64 four roundings are next to nothing of 1e-12.
        wide = call.to(torch.float64).exact()[name]
        assert wide.terms.le(1.01 * wide.value).all(), name
        assert e.terms.le(4 * e.value).all(), name


def test_terms_of_the_spatial_bias():
    """Written out: the sum of |dy x| s (1 - s), which is sum |dz| where a pixel has one channel."""
    call = centred(make((2, 1, 6, 7), "spatial", dtype=torch.float64))
    s = call(formula) / call.x
    written_out = (call.dy * call.x).abs() * s * (1 - s)
    exact = call.exact()["d_spatial_bias"]
    assert float(exact.terms) == pytest.approx(
        float(written_out.sum()), rel=1e-2
    )  # what rounds the masks
    assert float(exact.value.abs()) < 0.5 * float(exact.terms)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("order", "gate"), CASES)
def test_a_rounding_is_no_error(order, gate, dtype):
    call = centred(make((2, 24, 5, 5), order, gate, dtype=dtype))
    draws = [call.errors(rounded(call))] * accuracy.SEVERAL
    assert not accuracy.broken(draws, draws)


NAMES = ["y", "dx", "d_gate_weight", "d_conv_weight", "d_merge_weight"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", NAMES)
def test_one_number_far_from_its_terms_is_found(name, dtype):
    call = make((2, 24, 5, 5), dtype=dtype)
    terms, got = call.exact()[name].terms, rounded(call)
    for size, kept in [(0.8, True), (1.2, False)]:
        got[name] = rounded(call)[name]
        got[name].view(-1)[0] += size * PROMISED[dtype] * terms.view(-1)[0]
        broken = accuracy.broken([call.errors(got)])
        assert kept == (not [text for text in broken if accuracy.OF_TERMS in text]), broken
        assert all(text.startswith(f"{name}: ") for text in broken)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES[:3])
def test_a_relative_error_is_found(name, dtype):
    call = make((2, 24, 5, 5), dtype=dtype)
    exact = call.exact()[name].value
    got = rounded(call)
    got[name] = (exact * (1 + 1.2 * PROMISED[dtype])).to(dtype)
    broken = accuracy.broken([call.errors(got)])
    assert [text for text in broken if text.startswith(f"{name}: ") and accuracy.RELATIVE in text]


def test_a_sum_that_cancels_is_measured_by_its_terms():
    """Relative to what is left of it, the error may be anything."""
    call = make((1, 2, 1, 2), "channel", "scalar")
    call.dy[..., 1] = -call.dy[..., 0] * call.x[..., 0] / call.x[..., 1] * (1 + 1e-5)
    exact, got = call.exact(), call.results(backend="eager")
    e = exact["d_gate_bias"]
    assert float(e.value.abs()) < 1e-4 * float(e.terms)
    got["d_gate_bias"] += 1e-7 * e.terms.float()
    assert (got["d_gate_bias"] - e.value).abs() > 1e-4 * e.value.abs()
    assert not accuracy.broken([accuracy.errors(got, exact)])


def test_more_than_twice_the_plain_formula_is_found():
    """Though it is within all bounds, and only over several draws."""
    calls = [centred(make((2, 24, 5, 5)), seed) for seed in range(accuracy.SEVERAL)]
    exact = [call.exact() for call in calls]

    def draws(size):
        return [
            accuracy.errors({n: (v.value * (1 + size)).float() for n, v in e.items()}, e)
            for e in exact
        ]

    plain = draws(2e-7)
    assert not accuracy.broken(draws(3.5e-7), plain)
    assert len(accuracy.broken(draws(6e-7), plain)) == len(exact[0])
    assert not accuracy.broken(draws(6e-7)[1:], plain[1:])
    assert not accuracy.broken(draws(6e-7))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_is_found(value):
    call = make((2, 3, 4, 4))
    for name in call.exact():
        got = rounded(call)
        got[name].view(-1)[-1] = value
        assert any(text.startswith(f"{name}: ") for text in accuracy.broken([call.errors(got)]))


def test_a_missing_term_is_found():
    """A gradient that is zero, though it should not be, in whatever dtype."""
    for dtype in DTYPES:
        call = make((2, 3, 4, 4), dtype=dtype)
        for name in call.exact():
            got = rounded(call)
            got[name] = torch.zeros_like(got[name])
            assert accuracy.broken([call.errors(got)])


def next_to(t, towards_zero):
    """The neighbours of numbers in half precision."""
    return (t.view(torch.int16) + (-1 if towards_zero else 1)).view(t.dtype)


@pytest.mark.parametrize("dtype", HALF)
def test_half_precision_is_rounded_not_cut_off(dtype):
    call = centred(make((2, 24, 5, 5), dtype=dtype))
    nearest, exact = rounded(call), call.exact()
    cut_off, further = {}, {}
    for name, r in nearest.items():
        above = r.double().abs() > exact[name].value.abs()
        cut_off[name] = torch.where(above, next_to(r, True), r)
        further[name] = torch.where(above, next_to(r, False), next_to(r, True))
    assert not accuracy.broken([call.errors(nearest)])
    assert not accuracy.broken([call.errors(cut_off, truncated=True)])
    assert accuracy.broken([call.errors(cut_off)])
    assert accuracy.broken([call.errors(further, truncated=True)])


@pytest.mark.parametrize("factor", [1e6, 1e-7])
def test_beyond_the_range_of_half_precision(factor):
    call = make((2, 24, 5, 5), dtype=torch.float16)
    call.x.mul_(0.1), call.dy.mul_(0.1)
    exact = {
        n: type(e)(e.value * factor, e.terms * factor, e.is_sum) for n, e in call.exact().items()
    }
    got = {n: e.value.half() for n, e in exact.items()}
    assert got["dx"].isinf().any() or (got["dx"] == 0).any()
    assert not accuracy.broken([accuracy.errors(got, exact)])
    got["dx"][0, 0, 0, 0] = -got["dx"][0, 0, 0, 0] if factor > 1 else 1e-6
    assert accuracy.broken([accuracy.errors(got, exact)])
