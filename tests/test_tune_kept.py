"""Plans in force: what runs by them, and the file that keeps them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import da_ops
from da_ops import tuning
from da_ops.backends import tuned
from da_ops.backends.tuned import PLANS, Tuned

from .cases import assert_equal, assert_promised, make
from .plans import cpu_plan
from .tuned import PLAN, SHAPE, bits, call, put

pytestmark = pytest.mark.usefixtures("store")

ROOT = Path(__file__).resolve().parents[1]


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


def test_a_plan_may_come_while_others_are_gone_through():
    """As from another thread's first call."""
    key = put()

    class Followed(Tuned):
        @property
        def other(self):
            PLANS._plans[replace(key, threads=99)] = Tuned("")

    PLANS._plans[key] = Followed(PLAN)
    assert not PLANS.by_others("cpu") and len(PLANS.in_force()) == 2


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
    assert sorted(os.listdir(store.parent)) == [".tuned.json.lock", store.name]
    told, warned = another_process(store, IN_FORCE)
    assert told == str([str(Tuned(PLAN, 0.8, 0.7, 0.9)), "the default, nothing was faster"])
    assert "slabs=1 slab_rows=3 (0.80 of the default's time, 0.70 to 0.90)" in told
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


def test_two_that_save_at_once_lose_nothing(store, monkeypatch):
    """The second one reads the file when the first has written it."""
    both, read = threading.Barrier(2), tuned.Plans._read

    def slow_read(plans):
        found = read(plans)
        with suppress(threading.BrokenBarrierError):
            both.wait(timeout=1)  # until the other one has read, too, which must not come about
        return found

    monkeypatch.setattr(tuned.Plans, "_read", slow_read)
    saving = [tuned.Plans(), tuned.Plans()]
    for plans, backward in zip(saving, (False, True)):
        plans._plans[tuned.key("cpu", call(), backward)] = Tuned(PLAN)
    with ThreadPoolExecutor() as pool:
        assert list(pool.map(tuned.Plans.save, saving)) == [True, True]
    assert len(read(PLANS)) == 2


def test_a_save_that_fails_leaves_nothing_behind(store, monkeypatch, caplog):
    def full(*paths):
        raise OSError(28, "No space left on device")

    put()
    assert PLANS.save()
    before = store.read_text()
    monkeypatch.setattr(os, "replace", full)
    assert not PLANS.save()
    assert "cannot be written: No space left" in caplog.text
    assert store.read_text() == before
    assert {path.name for path in store.parent.iterdir()} == {store.name, ".tuned.json.lock"}


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
