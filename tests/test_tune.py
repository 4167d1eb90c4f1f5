"""Plans that measure themselves. No test here depends on how long anything takes."""

from __future__ import annotations

import json
import math
import os
import random
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import da_ops
from da_ops import cli, tuning
from da_ops.backends import BACKENDS, native, tuned
from da_ops.backends.base import Call
from da_ops.backends.tuned import PLANS, Plans, Tuned
from da_ops.reference import ORDERS
from da_ops.tuning import candidates, supervise, trial, verdict

from .cases import LAYOUTS, assert_equal, assert_promised, make
from .plans import cpu_plan

ROOT = Path(__file__).resolve().parents[1]
SHAPE = (2, 70, 9, 11)
PLAN = "slabs=1,slab_rows=64"  # which adds in another order than the default at that shape
DEVICE = (sys.executable, "-m", "tests.tuned_device")


@pytest.fixture(autouse=True)
def store(fused_cpu, tmp_path, monkeypatch):
    """The file of a test's own, and no plan in force before and after."""
    monkeypatch.setenv("DA_OPS_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("DA_OPS_CPU_PLAN", raising=False)
    PLANS.forget()
    PLANS._told.clear()
    yield tuned.file()
    monkeypatch.setenv("DA_OPS_CACHE", os.devnull)
    PLANS.forget()
    PLANS._told.clear()


def call(shape=SHAPE, dtype=torch.float32, channels_last=False, order="spatial_channel", sm=None):
    return Call(shape, dtype, channels_last, order, "affine", sm)


def put(plan=PLAN, backward=False, **changes):
    """Put a plan in force as if it had been measured."""
    key = replace(tuned.key("cpu", call(), backward), **changes)
    PLANS.put(key, Tuned(plan, 0.8, 0.7, 0.9))
    return key


def job(*plans, **changes):
    return trial.Job(
        **{
            "backend": "cpu",
            "shape": SHAPE,
            "dtype": "float32",
            "channels_last": False,
            "order": "spatial_channel",
            "gate": "affine",
            "backward": False,
            "device": "cpu",
            "threads": 1,
            "seconds": 0.0,
            "unchecked": list(plans),
            "right": [],
            **changes,
        }
    )


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


# The rule


def rounds(**ratios):
    """Rounds in which the default takes from 1 to 2 s, and each plan its ratio of that."""
    mixer = random.Random(0)
    found = []
    for each in zip(*ratios.values(), strict=True):
        default = 1 + mixer.random()
        found.append({"": default, **{k: r * default for k, r in zip(ratios, each, strict=True)}})
    return found


def noisy(middle, n=40, seed=0, spread=0.1):
    mixer = random.Random(seed)
    return [middle * math.exp(mixer.gauss(0, spread)) for _ in range(n)]


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


# What is kept


def bits(function=da_ops.da_attention, **options):
    return make(SHAPE, **options).results(function, backend="cpu")


@pytest.mark.parametrize("backward", [False, True])
def test_a_plan_in_force_is_what_runs(backward):
    default = bits()
    with cpu_plan(PLAN):
        all_by_plan = bits()
    put(backward=backward)
    got = bits()
    by_plan = {name for name in got if (name != "y") == backward}
    if not backward:  # what backward reads is forward's
        assert_equal({"y": got["y"]}, {"y": all_by_plan["y"]})
    assert not torch.equal(default["y"], all_by_plan["y"])
    assert torch.equal(got["y"], default["y"]) == backward
    assert any(not torch.equal(got[name], default[name]) for name in by_plan)
    assert_promised(make(SHAPE), got)
    PLANS.forget()
    assert_equal(bits(), default)


@pytest.mark.parametrize(
    "changes",
    [
        {"shape": (3, *SHAPE[1:])},
        {"dtype": "float64"},
        {"channels_last": True},
        {"order": "parallel"},
        {"gate": "sigmoid"},
        {"backward": True},
        {"threads": 2},
    ],
)
def test_a_plan_serves_calls_of_its_kind_alone(changes):
    want = bits()["y"]
    put(**changes)
    assert torch.equal(bits()["y"], want)
    put()
    assert not torch.equal(bits()["y"], want)


def test_the_environment_wins():
    want = bits()["y"]
    put()
    with cpu_plan("slabs=16"):  # the default's
        assert torch.equal(bits()["y"], want)
    assert not torch.equal(bits()["y"], want)


def test_the_environment_wins_in_what_is_told(monkeypatch):
    put()
    assert "tuned" in str(da_ops.explain(torch.empty(SHAPE)))
    monkeypatch.setenv("DA_OPS_CPU_PLAN", "slabs=16")
    assert "tuned" not in str(da_ops.explain(torch.empty(SHAPE)))
    with pytest.raises(RuntimeError, match=r"DA_OPS_CPU_PLAN=slabs=16 has chosen .*; unset it"):
        da_ops.tune(SHAPE)


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_a_graph_uses_what_was_tuned_after_it_was_compiled(compiler):
    torch._dynamo.reset()
    compiled = torch.compile(da_ops.da_attention, fullgraph=True, backend=compiler)
    default = bits(compiled)
    assert_equal(default, bits())
    put()
    put(backward=True)
    got = bits(compiled)
    assert_equal(got, bits())
    assert not torch.equal(got["y"], default["y"]) and not torch.equal(got["dx"], default["dx"])
    torch._dynamo.reset()


def test_threads_see_the_one_plan_or_the_other():
    """While plans come and go, under as many threads as there are."""
    default = bits()["y"]
    key = put()
    by_plan = bits()["y"]
    stop = threading.Event()

    def come_and_go():
        while not stop.is_set():
            PLANS.try_out(key, "")
            PLANS.try_out(key, PLAN)

    def calls(_):
        results = [bits()["y"] for _ in range(30)]
        return all(torch.equal(y, default) or torch.equal(y, by_plan) for y in results)

    with ThreadPoolExecutor(3) as pool:
        coming = pool.submit(come_and_go)
        try:
            assert all(pool.map(calls, range(4)))
        finally:
            stop.set()
        coming.result()


def another_process(store, program):
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}, check=True,
    )  # fmt: skip
    return done.stdout.strip(), done.stderr.strip()


IN_FORCE = (
    "import torch, da_ops; from da_ops.backends.tuned import PLANS;"
    f"torch.set_num_threads(1); d = da_ops.explain(torch.empty({SHAPE})).plan.details;"
    "print([d.get('tuned forward'), d.get('tuned backward')])"
)


def test_later_processes_use_what_was_kept(store):
    torch.set_num_threads(1)
    put()
    put("", backward=True)
    assert PLANS.save()
    assert os.listdir(store.parent) == [store.name]
    told, warned = another_process(store, IN_FORCE)
    assert told == str([str(Tuned(PLAN, 0.8, 0.7, 0.9)), "the default, nothing was faster"])
    assert "slabs=1 slab_rows=64 (0.80 of the default's time, 0.70 to 0.90)" in told
    assert not warned


@pytest.mark.parametrize(
    "changes", [{"library": "0" * 32}, {"device": "another"}, {"backend": "cuda", "threads": 0}]
)
def test_plans_of_other_machines_and_libraries_are_kept_and_not_used(store, changes):
    key = replace(tuned.key("cpu", call(), False), **changes)
    PLANS._plans[key] = Tuned(PLAN)
    assert PLANS.save()
    PLANS._plans.clear()
    PLANS.recall("cpu")
    assert not PLANS.in_force()
    put()
    assert PLANS.save()
    PLANS.recall("cpu")
    assert list(PLANS.in_force()) == [tuned.key("cpu", call(), False)]
    assert len(json.loads(store.read_text())["plans"]) == 2


def test_the_key_names_what_speed_depends_on(monkeypatch):
    keys = {tuned.key("cpu", call(), False), tuned.key("cpu", call(), True)}
    torch.set_num_threads(2)
    keys.add(tuned.key("cpu", call(), False))
    monkeypatch.setattr(tuned, "_digest", lambda backend: "another")
    keys.add(tuned.key("cpu", call(), False))
    monkeypatch.setattr(tuned, "_device_name", lambda backend, device: "another")
    keys.add(tuned.key("cpu", call(), False))
    for other in (
        call((1, *SHAPE[1:])),
        call(dtype=torch.float16),
        call(channels_last=True),
        call(order="channel"),
    ):
        keys.add(tuned.key("cpu", other, False))
    assert len(keys) == 9


def damaged():
    """The text of a file, and what is wrong with it."""
    put()
    assert PLANS.save()
    good = json.loads(tuned.file().read_text())
    tuned.file().unlink()
    record = good["plans"][0]
    without = {name: value for name, value in record.items() if name != "gate"}

    def of(*plans, version=tuned.VERSION):
        return json.dumps({"version": version, "plans": list(plans)})

    return {
        "empty": "",
        "cut short": json.dumps(good)[:-9],
        "not text": b"\xff\xfe\x00\xd8",
        "a list": "[]",
        "a number": "3",
        "another version": of(record, version=99),
        "plans are no list": json.dumps({"version": tuned.VERSION, "plans": 3}),
        "a field is missing": of(without),
        "a shape of three": of({**record, "shape": [1, 2, 3]}),
        "a shape of texts": of({**record, "shape": ["1", "2", "3", "4"]}),
        "a plan that is a number": of({**record, "plan": 3}),
        "a plan that is none": of({**record, "plan": "slabs=many"}),
        "another order": of({**record, "order": "both"}),
        "times that are none": of({**record, "median": "fast"}),
        "a time beyond all": of({**record, "median": 10**400}),
        "too large a shape": of({**record, "shape": [2**70, 1, 1, 1]}),
    }


DAMAGED = [
    "empty",
    "cut short",
    "not text",
    "a list",
    "a number",
    "another version",
    "plans are no list",
    "a field is missing",
    "a shape of three",
    "a shape of texts",
    "a plan that is a number",
    "a plan that is none",
    "another order",
    "times that are none",
    "a time beyond all",
    "too large a shape",
]


@pytest.mark.parametrize("what", DAMAGED)
def test_a_damaged_file_is_told_of_once_and_never_an_error(store, caplog, what):
    everything = damaged()
    assert list(everything) == DAMAGED
    text = everything[what]
    PLANS.forget()
    want = bits()
    store.write_bytes(text if isinstance(text, bytes) else text.encode())
    for _ in range(3):
        PLANS.recall("cpu")
    assert len(caplog.records) == 1 and str(store) in caplog.text
    assert not PLANS.in_force()
    put()
    assert PLANS.save()  # over it
    PLANS._plans.clear()
    PLANS.recall("cpu")
    assert PLANS.in_force() and len(caplog.records) == 1
    PLANS.forget()
    assert_equal(bits(), want)


def test_a_damaged_file_stops_no_import(store):
    store.parent.mkdir()
    store.write_text("[")
    told, warned = another_process(store, IN_FORCE)
    assert told == "[None, None]"
    assert "is not what this version writes" in warned


def test_a_home_that_cannot_be_written_to(store, monkeypatch, caplog):
    store.parent.write_text("a file in the folder's place")
    put()
    for _ in range(2):
        assert not PLANS.save()
    assert len(caplog.records) == 1
    assert "set DA_OPS_CACHE to a folder" in caplog.text
    assert PLANS.in_force()


@pytest.mark.parametrize(
    ("variables", "folder"),
    [
        ({"DA_OPS_CACHE": "/a", "XDG_CACHE_HOME": "/b", "HOME": "/c"}, "/a"),
        ({"DA_OPS_CACHE": "", "XDG_CACHE_HOME": "/b", "HOME": "/c"}, "/b/da_ops"),
        ({"DA_OPS_CACHE": "", "XDG_CACHE_HOME": "", "HOME": "/c"}, "/c/.cache/da_ops"),
    ],
)
def test_where_the_file_is(monkeypatch, variables, folder):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert tuned.file() == Path(folder, "tuned.json")
    monkeypatch.undo()


def test_forgetting(store):
    put()
    PLANS.save()
    tuning.forget()
    assert not store.exists() and not PLANS.in_force()
    tuning.forget()


# A GPU, without one


@pytest.fixture
def gpu(monkeypatch):
    """What torch tells of a GPU, where there is none."""
    told = SimpleNamespace(major=9, minor=0, multi_processor_count=132, L2_cache_size=50 * 2**20)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: told)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Planted")
    monkeypatch.setattr(torch._C, "_cuda_getDriverVersion", lambda: 13000, raising=False)
    monkeypatch.setattr(tuned, "_digest", lambda backend: "planted")
    monkeypatch.setattr(tuning, "backends", lambda: {"cuda": None})
    tuned._device_name.cache_clear()
    set_in_library = []
    monkeypatch.setattr(Plans, "try_out", lambda self, *a: set_in_library.append(a))
    yield set_in_library
    PLANS._plans.clear()
    tuned._device_name.cache_clear()


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
    assert told["details"]["slab_rows"] == f"64 forward, {default['details']['slab_rows']} backward"
    assert told["details"]["tuned forward"].startswith("slabs=1 slab_rows=64 (0.80 of")
    assert "tuned backward" not in told["details"]
    assert told["forward"] == default["forward"] and told["backward"] == default["backward"]
    put(backward=True)
    told = da_ops.explain(of).to_dict()
    assert told["details"]["slab_rows"] == 64
    other = da_ops.explain(of, order="parallel")
    assert "tuned" not in str(other)


def test_info_says_how_many(capsys, store):
    put()
    assert cli.main(["info"]) == 0
    assert f"tuned plans: 1 known, from {store}" in capsys.readouterr().out
    assert cli.main(["info", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)["tuned"]
    assert told == {"file": str(store), "plans": 1}


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
        (("4x8x5x5", "--threads", "0"), "--threads must be at least 1, got 0"),
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
        (torch.nn.Identity(), "a module needs its inputs"),
        ((torch.nn.Identity(), torch.ones(1, 2, 3, 4)), "made no call of the compiled kernels"),
    ],
)
def test_tune_refuses(planted, what, message):
    several = isinstance(what, tuple) and isinstance(what[0], torch.nn.Module)
    with pytest.raises(ValueError, match=message):
        tuning.tune(*(what if several else (what,)))


def test_for_real(store):
    """All of it, on a call so small that it says nothing: the plans are right, and none is left
    out."""
    torch.set_num_threads(1)
    found = da_ops.tune((2, 8, 4, 4), dtype=torch.float16, seconds=0)
    for direction in found.directions:
        assert not direction.left_out and direction.seconds > 0
        known = candidates.possible_plans(
            "cpu", call((2, 8, 4, 4), torch.float16), direction.key.backward
        )
        assert {t.plan for t in direction.tried} == set(known) - {""}
    assert store.exists()
    assert native.build_record()["cpu"]["built"]
