"""Triton beside the compiled plans: it is measured as they are, and "auto" uses it where it won.

Without a GPU the plans are the CPU's, and Python runs Triton's kernels.
"""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest
import torch

import da_ops
from da_ops import tuning
from da_ops.backends import BACKENDS, tuned
from da_ops.backends.triton.run import TritonFailed
from da_ops.backends.tuned import PLANS
from da_ops.tuning import candidates, supervise, trial

from .cases import LAYOUTS, assert_equal, assert_promised, make
from .conftest import GPU, need
from .plans import cpu_plan
from .tuned import call, job, noisy, put, rounds

pytestmark = [
    pytest.mark.usefixtures("store"),
    pytest.mark.skipif(GPU, reason="here Triton's kernels do not run on the CPU"),
]

SHAPE = (2, 8, 4, 4)


@pytest.fixture(autouse=True)
def beside(monkeypatch, choice):
    """Triton serves the CPU beside the compiled kernels, which are the better choice."""
    need("triton")
    monkeypatch.setitem(BACKENDS, "triton", replace(BACKENDS["triton"], explicit_only=None))
    monkeypatch.setitem(choice._chosen, "cpu", "cpu")
    monkeypatch.delenv("DA_OPS_BACKEND", raising=False)


@pytest.fixture
def served(monkeypatch):
    """Which directions Triton served, in turn."""
    from da_ops.backends.triton import launch

    names = []

    def spy(name, function):
        return lambda *arguments: (names.append(name), function(*arguments))[1]

    for name in ("forward", "backward"):
        monkeypatch.setattr(launch, name, spy(name, getattr(launch, name)))
    return names


def auto(function=da_ops.da_attention, **options):
    return make(SHAPE, **options).results(function)


WON = [(), ("forward",), ("backward",), ("forward", "backward")]


def win(*directions, **changes):
    for direction in directions:
        put("triton", direction == "backward", **{"shape": SHAPE, **changes})


# It is measured


def test_it_is_a_candidate(monkeypatch):
    assert candidates.possible_plans("cpu", call(), False)[-1] == "triton"
    monkeypatch.setenv("DA_OPS_BACKEND", "cpu")  # then "auto" would not take it
    assert "triton" not in candidates.possible_plans("cpu", call(), False)
    monkeypatch.delenv("DA_OPS_BACKEND")
    unusable = replace(BACKENDS["triton"], reason="no compiler")
    monkeypatch.setitem(BACKENDS, "triton", unusable)
    assert "triton" not in candidates.possible_plans("cpu", call(), False)


def test_it_is_a_candidate_on_a_gpu(gpu):
    texts = candidates.possible_plans("cuda", call((64, 256, 28, 28), torch.float16), True)
    assert texts[-1] == "triton" and {"", "block", "cluster:4"} <= set(texts)


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_it_is_checked_and_timed(monkeypatch, served, layout, backward):
    monkeypatch.setattr(trial, "_INPUTS", 2)  # for Python takes its time
    given = job("", "triton", channels_last=layout == "channels_last", backward=backward)
    kernels = trial.Kernels(replace(given, shape=SHAPE))
    assert [kernels.check(plan, lambda: None) for plan in given.unchecked] == [None, None]
    way = "backward" if backward else "forward"
    assert served == [way]
    assert kernels.sample("") > 0 and served == [way]
    assert kernels.sample("triton") > 0 and set(served[1:]) == {way}
    function = getattr(BACKENDS["triton"], way)

    def spoilt(*arguments):
        first, *rest = function(*arguments)
        return first + 1, *rest

    monkeypatch.setitem(BACKENDS, "triton", replace(BACKENDS["triton"], **{way: spoilt}))
    result = "dx" if backward else "y"
    assert kernels.check("triton", lambda: None).startswith(f"{result}: error")


def test_where_it_fails_it_is_left_out(monkeypatch):
    from da_ops.backends.triton import launch

    def broken(*_):
        raise TritonFailed("no assembler")

    monkeypatch.setattr(launch, "forward", broken)
    given = replace(job("", "triton"), shape=SHAPE)
    outcome = supervise.in_this_process(given, trial.Kernels(given))
    assert list(outcome.left_out) == ["triton"] and "no assembler" in outcome.left_out["triton"]
    assert set(outcome.final[0]) == {""}
    assert da_ops.backends()["triton"] is None  # it may work for another call


def test_the_winner_is_used_and_kept(monkeypatch, store, served):
    monkeypatch.setattr(
        supervise, "supervise", lambda job: supervise.Outcome(final=rounds(triton=noisy(0.7)))
    )
    layer = da_ops.DAModule(SHAPE[1])
    x = torch.randn(SHAPE)
    for _ in range(2):  # the second time calls go to Triton
        found = tuning.tune(layer, x)
        assert [d.key.shape for d in found.directions] == [SHAPE, SHAPE]
    assert "from now on: triton" in str(found)
    served.clear()
    auto()
    assert served == ["forward", "backward"]
    PLANS._plans.clear()
    PLANS.recall("cpu")
    auto()
    assert served == ["forward", "backward"] * 2
    PLANS.forget()
    auto()
    assert len(served) == 4


def test_what_it_is_made_of_is_in_the_key(monkeypatch, tmp_path):
    digest = tuned._digest.__wrapped__
    (tmp_path / "_cuda.abi3.so").write_bytes(b"a library")
    kernels = tmp_path / "backends" / "triton" / "passes.py"
    kernels.parent.mkdir(parents=True)
    kernels.write_text("")
    monkeypatch.setattr(tuned, "_FOLDER", tmp_path)
    found = [digest("cuda")]
    kernels.write_text("another")
    found.append(digest("cuda"))
    monkeypatch.setattr(tuned, "find_spec", lambda name: None)
    found.append(digest("cuda"))
    assert len(set(found)) == 3


# It is used


@pytest.mark.parametrize("won", WON)
def test_it_serves_what_it_won(served, won):
    win(*won)
    got = auto()
    assert served == list(won)
    assert_promised(make(SHAPE), got)
    assert (BACKENDS["cpu"].for_auto is None) == (not won)  # else no call pays anything


@pytest.mark.parametrize(
    "changes",
    [{"shape": (3, *SHAPE[1:])}, {"dtype": "float64"}, {"channels_last": True}, {"threads": 2}],
)
def test_it_serves_no_other_calls(served, changes):
    want = auto()
    win("forward", "backward", **changes)
    assert_equal(auto(), want)
    assert not served


def test_who_chose_another_gets_that(served, monkeypatch):
    win("forward", "backward")
    make(SHAPE).results(backend="cpu")
    monkeypatch.setenv("DA_OPS_CPU_PLAN", "slabs=16")
    with cpu_plan("slabs=16"):
        PLANS.changed()
        auto()
    monkeypatch.delenv("DA_OPS_CPU_PLAN")
    monkeypatch.setenv("DA_OPS_BACKEND", "cpu")
    PLANS.changed()
    auto()
    assert not served


@pytest.mark.parametrize("won", WON)
@pytest.mark.parametrize("dynamic", [False, True])
def test_in_a_graph(served, won, dynamic):
    """Where it won both directions, so that one that it gives up later is right all the same, or
    the way back; and not where sizes are not known."""
    win(*won)
    torch._dynamo.reset()
    compiled = torch.compile(
        da_ops.da_attention, fullgraph=True, backend="aot_eager", dynamic=dynamic
    )
    got = auto(compiled)
    assert_promised(make(SHAPE), got)
    assert served == ([] if dynamic or won == ("forward",) else list(won))
    torch._dynamo.reset()


@pytest.mark.parametrize("broken", WON[1:])
@pytest.mark.parametrize("won", WON[1:])
@pytest.mark.parametrize("compile", [False, True])
def test_where_it_breaks_another_goes_on(monkeypatch, caplog, won, broken, compile):
    """Also in a graph that was compiled before."""
    from da_ops.backends.triton import launch

    def breaks(*_):
        raise TritonFailed("no assembler")

    win(*won)
    function = da_ops.da_attention
    if compile:
        torch._dynamo.reset()
        function = torch.compile(function, fullgraph=True, backend="aot_eager")
        auto(function)
    for name in broken:
        monkeypatch.setattr(launch, name, breaks)
    for _ in range(2):
        assert_promised(make(SHAPE), auto(function))
    met = set(won) & set(broken) if not compile or won != ("forward",) else set()
    warned = [r for r in caplog.records if r.levelno == logging.WARNING]
    assert len(warned) == bool(met)
    if met:
        assert "no assembler" in da_ops.backends()["triton"]
        assert candidates.possible_plans("cpu", call(SHAPE), False)[-1] != "triton"
    torch._dynamo.reset()


def test_explain_says_so(monkeypatch):
    x = torch.empty(SHAPE)
    default = da_ops.explain(x).to_dict()
    win("forward")
    told = da_ops.explain(x).to_dict()
    assert told["backend"] == "cpu"
    assert told["details"]["tuned forward"].startswith("triton (0.80 of")
    assert "tuned backward" not in told["details"]
    by_triton = da_ops.explain(x, backend="triton").to_dict()
    assert told["forward"] == by_triton["forward"] != default["forward"]
    assert told["backward"] == default["backward"]
    assert "tuned forward" not in da_ops.explain(x, backend="cpu").to_dict()["details"]
    win("backward")
    told = da_ops.explain(x).to_dict()
    assert told["backward"] == by_triton["backward"]
    assert told["details"]["tuned backward"].startswith("triton (")
    assert by_triton["details"].items() <= told["details"].items()
    monkeypatch.setenv("DA_OPS_BACKEND", "cpu")
    told = da_ops.explain(x).to_dict()
    assert (told["forward"], told["details"]) == (default["forward"], default["details"])
