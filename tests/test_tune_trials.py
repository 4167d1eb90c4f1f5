"""Which plan wins, and what becomes of plans that are wrong, hang or crash: by planted times."""

from __future__ import annotations

import math
import sys
from dataclasses import replace

import pytest

from da_ops.backends.tuned import PLANS
from da_ops.tuning import candidates, supervise, trial, verdict

from .cases import LAYOUTS
from .tuned import job, noisy, rounds

pytestmark = pytest.mark.usefixtures("store")

DEVICE = (sys.executable, "-m", "tests.tuned_device")


# The rule


@pytest.mark.parametrize(
    ("ratios", "winner"),
    [
        ({"a": noisy(0.8)}, "a"),
        ({"a": noisy(0.8, seed=1), "b": noisy(0.6, seed=2)}, "b"),
        ({"a": noisy(1.2), "b": noisy(0.8)}, "b"),
        ({"a": noisy(1.0)}, ""),
        ({"a": noisy(0.97)}, ""),  # which may be noise
        ({"a": [0.99] * 40}, ""),  # which is none, and too little
        ({"a": [0.95] * 40}, "a"),
        ({"a": [0.1, 1.05] * 20}, ""),  # sometimes much faster, mostly not
        ({"a": [0.5] * 35 + [9.0] * 5}, "a"),  # five rounds were disturbed
        ({"a": [0.5] * 6}, ""),  # too few to tell
        ({"ab": [0.5] * 40, "a": [0.505] * 40}, "a"),  # which asks for less
        ({"ab": [0.5] * 40, "a": [0.52] * 40}, "ab"),
        ({}, ""),
    ],
)
def test_winner(ratios, winner):
    assert verdict.winner(rounds(**ratios)) == winner


def test_chance_wins_seldom():
    """Plans that are as fast as the default, four finalists a time."""
    wins = 0
    for seed in range(300):
        ratios = {str(i): noisy(1.0, seed=10 * seed + i, spread=0.3) for i in range(4)}
        wins += verdict.winner(rounds(**ratios)) != ""
    assert wins / 300 <= 2 * verdict.RISK


@pytest.mark.parametrize("n", [5, 12, 31])
def test_the_interval_is_exact(n):
    """Against all ways in which so many throws of a coin can fall."""
    values = list(range(n))
    found = verdict.most(values, 0.02)

    def chance(k):  # that so many of n or more are below the median
        return sum(math.comb(n, i) for i in range(k, n + 1)) / 2**n

    if found == math.inf:
        assert chance(n) > 0.02
    else:
        assert chance(found + 1) <= 0.02 < chance(found)


def test_finalists_are_the_fastest():
    ratios = {str(i): noisy(0.5 + 0.2 * i, seed=i) for i in reversed(range(7))}
    assert verdict.finalists(rounds(**ratios)) == ["0", "1", "2", "3"]


# Plans that fail


def test_a_process_that_finds_nothing_wrong():
    outcome = supervise.supervise(job("", "fast", "slow", "as fast"), DEVICE)
    assert not outcome.left_out
    assert verdict.winner(outcome.final) == "fast"
    assert all(set(each) == {"", "fast", "slow", "as fast"} for each in outcome.first)


@pytest.mark.parametrize(
    ("plan", "why"),
    [
        ("wrong", "wrong: y is off"),
        ("does not launch", "failed: no such launch"),
        ("hangs", "hangs: nothing for"),
        ("crashes", "failed: its process ended by signal 9"),
        ("complains", "failed: its process ended with status 1 (the device is gone)"),
        ("hangs when timed", "hangs: nothing for"),
        ("crashes when timed", "failed: its process ended by signal 9"),
    ],
)
def test_a_plan_that_fails_is_left_out(plan, why):
    outcome = supervise.supervise(job("", "slow", plan, "fast"), DEVICE, limit=5)
    assert list(outcome.left_out) == [plan] and outcome.left_out[plan].startswith(why)
    assert verdict.winner(outcome.final) == "fast"
    assert set(outcome.first[0]) == {"", "slow", "fast"}


def test_many_plans_that_fail():
    failing = ["wrong", "crashes", "crashes when timed", "does not launch"]
    outcome = supervise.supervise(job("", *failing, "slow"), DEVICE)
    assert set(outcome.left_out) == set(failing)
    assert verdict.winner(outcome.final) == ""


def test_a_default_that_fails_is_an_error():
    with pytest.raises(RuntimeError, match=r"^da_ops.tune: the default plan wrong: "):
        supervise.supervise(job(""), (*DEVICE[:1], "-c", TELLS_THAT_THE_DEFAULT_IS_WRONG))


TELLS_THAT_THE_DEFAULT_IS_WRONG = (
    "import json; print(json.dumps({'left_out': '', 'why': 'wrong: all'}), flush=True)"
)


def test_a_program_that_does_not_start_is_an_error():
    with pytest.raises(RuntimeError, match=r"process that tries plans failed: .*no_such_module"):
        supervise.supervise(job(""), (sys.executable, "-c", "import no_such_module"))


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("order", "dtype"),
    [("spatial_channel", "float32"), ("parallel", "bfloat16"), ("channel", "float64")],
)
def test_kernels_are_checked(order, dtype, layout, backward, monkeypatch, request):
    """Every plan is right, until its last image is not."""
    given = job(order=order, dtype=dtype, channels_last=layout == "channels_last")
    given = replace(given, backward=backward)
    monkeypatch.setattr(trial, "_CHUNK", 1)  # an image at a time
    kernels = trial.Kernels(given)
    request.addfinalizer(lambda: PLANS.try_out(kernels.key, ""))
    plans = candidates.possible_plans("cpu", given.call, backward)
    beats = []
    assert [kernels.check(plan, lambda: beats.append(1)) for plan in plans] == [None] * len(plans)
    assert beats
    run = kernels._run

    def spoilt(i):
        first, *rest = run(i)
        first[-1, -1, -1, -1] += 1
        return first, *rest

    monkeypatch.setattr(kernels, "_run", spoilt)
    result = "dx" if backward else "y"
    assert kernels.check(plans[-1], lambda: None).startswith(f"{result}: error")
