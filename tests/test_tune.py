"""Tuning: which plans there are, what is measured of a call or a network, what users are told.

No test here depends on how long anything takes.
"""

from __future__ import annotations

import itertools
import json

import pytest
import torch

import da_ops
from da_ops import cli, tuning
from da_ops.backends import BACKENDS
from da_ops.backends.tuned import PLANS
from da_ops.reference import ORDERS
from da_ops.tuning import candidates, supervise

from .cases import LAYOUTS
from .conftest import need
from .tuned import PLAN, SHAPE, bits, call, noisy, put, rounds

pytestmark = pytest.mark.usefixtures("store")


# Candidates


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("order", ORDERS)
def test_candidates_are_all_different(order, layout, threads):
    torch.set_num_threads(threads)
    of = call((4, 300, 20, 20), order=order, channels_last=layout == "channels_last")
    plan = pytest.importorskip("da_ops._plan").cpu
    counts = []
    for backward in (False, True):
        texts = candidates.possible_plans("cpu", of, backward)
        assert texts[0] == candidates.DEFAULT
        names = ("slab_rows", "stream", "sum_together") + ("scale_together",) * backward
        planned = [
            plan(of.shape, of.channels_last, "float32", order, threads, text) for text in texts
        ]
        effects = [tuple(p[name] for name in names) for p in planned]
        assert len(set(effects)) == len(effects)
        for column in zip(*effects, strict=True):
            assert len(set(column)) >= 2
        counts.append(len(effects))
    assert counts[1] == 2 * counts[0]


def test_a_small_call_has_few_candidates():
    assert len(candidates.possible_plans("cpu", call((1, 8, 4, 4)), False)) == 4


@pytest.mark.parametrize("way", ["forward", "backward"])
@pytest.mark.parametrize("sm", [75, 90])
def test_candidates_of_a_gpu_are_possible(sm, way):
    plan = pytest.importorskip("da_ops._plan").cuda
    of = call((64, 256, 28, 28), torch.float16)
    texts = candidates.on_gpu(of, way, sm, 0)
    assert texts[0] == candidates.DEFAULT
    one_launch = [t for t in texts if t not in ("", "portable")]
    for text in one_launch:
        p = plan(of.shape, False, "float16", of.order, of.gate, sm, 0, text)
        assert "refused" not in p[f"one_launch_{way}"]
    barriers = {text.partition(":")[0] for text in one_launch}
    assert ("cluster" in barriers) == (sm >= 90)
    assert "counter" in barriers
    assert len(one_launch) >= 3


# A GPU, without one


def test_a_gpu_is_tuned(gpu, monkeypatch):
    jobs = []

    def measured(job):
        jobs.append(job)
        winner = "cluster:4"
        return supervise.Outcome(final=rounds(**{winner: noisy(0.7, spread=0.02)}))

    monkeypatch.setattr(supervise, "supervise", measured)
    monkeypatch.delenv("DA_OPS_PLAN", raising=False)
    shape = (64, 256, 28, 28)
    found = tuning.tune(shape, device="cuda", dtype=torch.float16)
    assert {"portable", "cluster:4", "counter:4"} & set(jobs[0].unchecked) == {
        "cluster:4",
        "counter:4",
    }  # for portable is the default
    [first, second] = [direction.key for direction in found.directions]
    assert {job.device for job in jobs} == {"cuda:0"}
    assert first.place == first.device == "Planted, driver 13000" and first.threads == 0
    assert [(key, plan) for key, plan in gpu] == [(first, "cluster:4"), (second, "cluster:4")]
    told = BACKENDS["cuda"].plan(call(shape, torch.float16))
    assert len(told.forward.passes) == 1
    assert told.details["tuned backward"].startswith("cluster:4 (0.7")
    assert told.details["one launch forward"].startswith("4 blocks an image (cluster)")
    monkeypatch.setenv("DA_OPS_PLAN", "portable")
    assert "tuned backward" not in BACKENDS["cuda"].plan(call(shape, torch.float16)).details
    monkeypatch.delenv("DA_OPS_PLAN")
    elsewhere = BACKENDS["cuda"].plan(call(shape, torch.float16, sm=80)).details
    assert "tuned backward" not in elsewhere


def test_the_library_of_a_gpu_takes_plans():
    """Of any device by name, so that no GPU is woken for it."""
    if not hasattr(torch.ops.da_ops, "_cuda_tune"):
        pytest.skip("the CUDA library is not loaded")
    of_call = (*SHAPE, False, "float16", "parallel", "affine", False, "Planted, driver 13000")
    torch.ops.da_ops._cuda_tune(*of_call, "cluster:8")
    torch.ops.da_ops._cuda_tune(*of_call, "")
    with pytest.raises(RuntimeError, match="expected portable, onchip, block"):
        torch.ops.da_ops._cuda_tune(*of_call, "cluster:many")


# What users see


def test_explain_says_which_plan_runs():
    of = torch.empty(SHAPE)
    default = da_ops.explain(of).to_dict()
    put()
    told = da_ops.explain(of).to_dict()
    assert told["details"]["slab_rows"] == f"3 forward, {default['details']['slab_rows']} backward"
    assert told["details"]["tuned forward"].startswith("slabs=1 slab_rows=3 (0.80 of")
    assert "tuned backward" not in told["details"]
    assert told["forward"] == default["forward"] and told["backward"] == default["backward"]
    put(backward=True)
    told = da_ops.explain(of).to_dict()
    assert told["details"]["slab_rows"] == 3
    other = da_ops.explain(of, order="parallel")
    assert "tuned" not in str(other)


def test_info_says_how_many(capsys, store):
    put()
    assert cli.main(["info"]) == 0
    assert f"tuned plans: 1 known, from {store}" in capsys.readouterr().out
    assert cli.main(["info", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)["tuned"]
    assert told == {"file": str(store), "plans": 1, "at_first_calls": 0}


@pytest.fixture
def planted(monkeypatch):
    """Measured times: `PLAN` takes half the default's time forward, as much backward."""
    jobs = []

    def measured(job):
        jobs.append(job)
        ratio = 1.0 if job.backward else 0.5
        return supervise.Outcome(
            first=rounds(**{PLAN: [ratio] * 3, "slow": [2.0] * 3}),
            final=rounds(**{PLAN: noisy(ratio, 20, spread=0.02)}),
            left_out={"cache=1": "wrong: y is off"},
        )

    monkeypatch.setattr(supervise, "supervise", measured)
    return jobs


def test_the_winner_is_used_and_kept(store, planted):
    want = bits()["y"]
    found = tuning.tune(SHAPE)
    assert [d.winner.plan for d in found.directions] == [PLAN, ""]
    assert not torch.equal(bits()["y"], want)
    assert found.saved == str(store) and len(json.loads(store.read_text())["plans"]) == 2
    json.dumps(found.to_dict())


def test_trying_keeps_nothing_on_disk(store, planted):
    assert tuning.tune(SHAPE, save=False).saved is None
    assert not store.exists() and PLANS.in_force()


def test_forward_alone(planted):
    tuning.tune(SHAPE, backward=False)
    assert [job.backward for job in planted] == [False]


def test_a_network_is_tuned_at_its_own_calls(planted):
    net = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3),
        torch.nn.BatchNorm2d(8),
        da_ops.DAModule(8),
        da_ops.DAModule(8),  # the same call again
        torch.nn.MaxPool2d(2).eval(),
        da_ops.DAModule(8, order="parallel", gate="eca").double(),
    )
    net[4].register_forward_hook(lambda module, args, out: out.double())
    before = {name: value.clone() for name, value in net.state_dict().items()}
    modes = [module.training for module in net.modules()]
    x = torch.randn(2, 3, 8, 8).contiguous(memory_format=torch.channels_last)
    tuning.tune(net, x, backward=False)
    told = [(job.shape, job.dtype, job.channels_last, job.order, job.gate) for job in planted]
    assert told == [
        ((2, 8, 6, 6), "float32", True, "spatial_channel", "affine"),
        ((2, 8, 3, 3), "float64", True, "parallel", "eca"),
    ]
    assert [module.training for module in net.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_a_fused_tail_is_tuned_as_the_layer_that_it_runs_like(planted, fused_cpu):
    tail, norm = da_ops.DAResidual(8), torch.nn.BatchNorm2d(8)

    class Tails(torch.nn.Module):
        def forward(self, x):
            return da_ops.residual_attention(tail(x, x), None, norm, None)

    x = torch.randn(2, 8, 6, 6)
    tuning.tune(Tails(), x, backward=False)
    assert [(job.shape, job.order) for job in planted] == [((2, 8, 6, 6), "spatial_channel")]
    put(shape=(2, 8, 6, 6))
    assert "tuned forward" in str(da_ops.explain(x, layer=tail))


def test_tensors_of_any_size_are_tried_with_streaming_stores():
    """Both directions are planned by forward's count of tensors, as the operator does."""
    plan = pytest.importorskip("da_ops._plan").cpu
    for images, backward in itertools.product(range(4, 128, 4), (False, True)):  # up to 100 MB
        of = call((images, 64, 56, 56))
        texts = candidates.possible_plans("cpu", of, backward)
        plans = [plan(of.shape, False, "float32", of.order, 1, text) for text in texts]
        assert {p["stream"] for p in plans} == {False, True}


def test_command_line(capsys, store, planted):
    torch.set_num_threads(1)
    shape = "x".join(map(str, SHAPE))
    assert cli.main(["tune", shape, "4x8x5x5", "--threads", "1", "--seconds", "1"]) == 0
    text = capsys.readouterr().out
    assert f"forward of {shape} float32 contiguous, spatial_channel, affine; cpu, 1 th" in text
    assert "0.50  (0.4" in text and f"{PLAN}\n" in text
    assert "2.00  (2.00 to 2.00)  slow, by the first rounds" in text
    assert "left out: cache=1: wrong: y is off" in text
    assert f"from now on: {PLAN}" in text
    assert "from now on: the default, nothing is faster beyond the noise" in text
    assert f"kept in {store}" in text
    assert [job.shape for job in planted] == [SHAPE, SHAPE, (4, 8, 5, 5), (4, 8, 5, 5)]
    assert {job.seconds for job in planted} == {1.0}

    assert cli.main(["tune", "--forget"]) == 0
    assert not store.exists()
    options = ["--json", "--dry", "--forward-only", "--layout", "channels_last"]
    assert cli.main(["tune", shape, "--dtype", "float16", *options]) == 0
    [answer] = json.loads(capsys.readouterr().out)
    assert answer["saved"] is None and len(answer["directions"]) == 1
    assert answer["directions"][0]["key"]["channels_last"]
    assert answer["directions"][0]["winner"]["plan"] == PLAN


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ((), "expected shapes such as"),
        (("4x8x5",), "expected NxCxHxW"),
        (("4x8x5x5", "--threads", "0"), "--threads must be at least 1, and at most 2147483647"),
        (("4x8x5x5", "--threads", "3000000000"), "2147483647; got 3000000000"),
        (("4x8x5x5", "--seconds", "-1"), "seconds must be at least 0, got -1.0"),
        (("4x8x5x5", "--seconds", "nan", "--dry"), "seconds must be at least 0, got nan"),
        (("4x8x5x5", "--device", "sm_90"), "device must be 'cpu' or 'cuda', got 'sm_90'"),
        (("4x8x5x5", "--device", "meta"), "device must be 'cpu' or 'cuda', got 'meta'"),
    ],
)
def test_command_line_refuses(capsys, planted, arguments, complaint):
    try:
        status = cli.main(["tune", *arguments])
    except SystemExit as stopped:  # argparse
        status = stopped.code
    assert status in (1, 2) and complaint in capsys.readouterr().err


def test_tune_refuses_what_it_cannot_run(planted, monkeypatch):
    with pytest.raises(ValueError, match=r"dtype must be one of float32, .*; got torch.int32"):
        tuning.tune(SHAPE, dtype=torch.int32)
    with pytest.raises(ValueError, match="order must be"):
        tuning.tune(SHAPE, order="both")
    monkeypatch.setattr(tuning, "backends", lambda: {"cuda": "no GPU"})
    with pytest.raises(RuntimeError, match="backend 'cuda' cannot serve: no GPU"):
        tuning.tune(SHAPE, device="cuda")
    assert not planted


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ((3,), r"expected a module, or a shape \[N, C, H, W\]"),
        ((0, 8, 5, 5), "each of N, C, H and W must be a positive int, got 0"),
        ("4x8x5x5", "expected a module"),
        (torch.ones(1, 2, 3, 4), r"; got a tensor of \[1, 2, 3, 4\]$"),
        (torch.nn.Identity(), "a module needs its inputs"),
        ((torch.nn.Identity(), torch.ones(1, 2, 3, 4)), "made no call that is tuned"),
    ],
)
def test_tune_refuses(planted, what, message):
    several = isinstance(what, tuple) and isinstance(what[0], torch.nn.Module)
    with pytest.raises(ValueError, match=message):
        tuning.tune(*(what if several else (what,)))


@pytest.mark.parametrize("on", ["cpu", "cuda"])
def test_for_real(store, on):
    """All of it, on a call so small that it says nothing: the plans are right, and none is left
    out."""
    need(on)
    torch.set_num_threads(1)
    of = call((2, 8, 4, 4), torch.float16)
    found = da_ops.tune(of.shape, dtype=of.dtype, device=on, seconds=0)
    for direction in found.directions:
        assert not direction.left_out and direction.seconds > 0
        known = candidates.possible_plans(on, of, direction.key.backward)
        assert {t.plan for t in direction.tried} == set(known) - {candidates.DEFAULT}
    assert store.exists()
