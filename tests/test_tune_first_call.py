"""`torch.backends.cudnn.benchmark`: a call is tuned when it is first made, by safe plans."""

from __future__ import annotations

import gc
import itertools
import logging
import subprocess
import threading
import weakref
from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.cpp_extension import include_paths, library_paths

import da_ops
from build_tools.extension import TARGET_VERSION
from da_ops import cli
from da_ops.backends import BACKENDS, tuned
from da_ops.backends.tuned import PLANS, Tuned
from da_ops.reference import GATES, ORDERS
from da_ops.tuning import first_call, trial

from .cases import assert_promised, make
from .conftest import need
from .simt.build import CXX, ROOT, unavailable
from .tuned import PLAN, call, job, put
from .tuned_device import TIMES, Device

SHAPE = (64, 256, 14, 14)  # whose image a block can keep


@pytest.fixture
def tried(gpu, monkeypatch):
    """The jobs that a GPU does which is there in name only, where "block" is fast; the flag is on,
    and no call has been made yet."""
    jobs = []

    class Planted(Device):
        def __init__(self, job):
            super().__init__()
            self.turns["block"] = itertools.cycle(TIMES["fast"])
            jobs.append(job)

    monkeypatch.setattr(trial, "Kernels", Planted)
    monkeypatch.setattr(first_call, "_told", set())
    with torch.backends.cudnn.flags(benchmark=True):
        yield jobs


def make_call(shape=SHAPE, backward=False, order="spatial_channel", gate="affine"):
    x = torch.empty(shape, dtype=torch.float16)
    first_call.first_call(x, ORDERS.index(order), GATES.index(gate), backward)


def kind(backward=False, **options):
    return tuned.key("cuda", call(SHAPE, torch.float16, **options), backward)


def test_the_first_call_is_tuned(tried, gpu):
    for _ in range(3):
        make_call()
    [given] = tried
    assert given.unchecked == ["", "block"] and given.seconds < 1
    assert (given.shape, given.dtype, given.channels_last) == (SHAPE, "float16", False)
    assert PLANS.in_force()[kind()].plan == "block"
    assert gpu[-1] == (kind(), "block")
    make_call(backward=True)
    make_call(order="parallel", gate="eca")
    assert [(j.backward, j.order, j.gate) for j in tried[1:]] == [
        (True, "spatial_channel", "affine"),
        (False, "parallel", "eca"),
    ]


def test_users_see_where_the_plan_comes_from(tried, capsys, store):
    make_call()
    told = BACKENDS["cuda"].plan(call(SHAPE, torch.float16))
    assert told.details["tuned forward"].endswith(", by torch.backends.cudnn.benchmark)")
    assert len(told.forward.passes) == 1 and len(told.backward.passes) > 1
    put()  # as tune does
    assert PLANS.save() and "block" not in store.read_text()
    assert cli.main(["info"]) == 0
    told = capsys.readouterr().out
    assert "tuned plans: 1 known" in told
    assert "and 1 of this process alone, by torch.backends.cudnn.benchmark" in told


def test_what_tune_found_is_not_measured_again(tried):
    PLANS.put(kind(), Tuned("counter:8"))
    make_call()
    assert not tried and PLANS.in_force()[kind()].plan == "counter:8"


@pytest.mark.parametrize("at_first_call", [False, True])
def test_plans_that_may_hang_take_part_once_tune_has_shown_that_they_do_not(tried, at_first_call):
    """On this GPU, of this library."""
    PLANS.put(replace(kind(), shape=(1, 2, 3, 4)), Tuned("counter:8", at_first_call=at_first_call))
    PLANS.put(replace(kind(), device="another"), Tuned("cluster:4"))
    PLANS.put(replace(kind(), library="another"), Tuned("cluster:8"))
    make_call()
    assert tried[0].unchecked == ["", "block"] + ["counter:8"] * (not at_first_call)


def test_nothing_is_measured_of_a_call_that_has_one_safe_plan(tried):
    make_call((1, 300, 75, 75))
    assert not tried and not PLANS.in_force()


@pytest.mark.parametrize("why", ["off", "cudnn", "torch", "capture", "empty"])
def test_nothing_is_measured(tried, monkeypatch, why):
    shape = SHAPE
    if why == "off":
        monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    elif why == "cudnn":
        monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    elif why == "torch":
        torch.use_deterministic_algorithms(True)
    elif why == "capture":
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    else:
        shape = (0, *SHAPE[1:])
    make_call(shape)
    assert not tried and not PLANS.in_force()


def test_the_calls_of_a_trial_are_no_first_calls(tried, monkeypatch):
    check = trial.Kernels.check

    def calls_itself(self, plan, beat):
        make_call()
        make_call((2, *SHAPE[1:]))
        return check(self, plan, beat)

    monkeypatch.setattr(trial.Kernels, "check", calls_itself)
    make_call()
    assert len(tried) == 1 and PLANS.in_force()[kind()].plan == "block"


def test_other_threads_wait_for_the_plan(tried, monkeypatch):
    begun, go_on = threading.Event(), threading.Event()
    check = trial.Kernels.check

    def waits(self, plan, beat):
        begun.set()
        go_on.wait(60)
        return check(self, plan, beat)

    monkeypatch.setattr(trial.Kernels, "check", waits)
    seen = []
    first, second = (
        threading.Thread(target=lambda: (make_call(), seen.append(PLANS.in_force())))
        for _ in range(2)
    )
    first.start()
    assert begun.wait(60)
    second.start()
    second.join(0.05)
    assert not seen
    go_on.set()
    first.join()
    second.join()
    assert [plans[kind()].plan for plans in seen] == ["block", "block"] and len(tried) == 1


def test_a_trial_that_fails_costs_a_warning(tried, gpu, monkeypatch, caplog):
    def no_memory(job):
        tried.append(job)
        raise torch.OutOfMemoryError("CUDA out of memory.\nOf 80 GiB")

    monkeypatch.setattr(trial, "Kernels", no_memory)
    for _ in range(2):
        make_call()
    [record] = [r for r in caplog.records if r.levelno == logging.WARNING]
    assert "the default plan runs the forward of 64x256x14x14" in record.getMessage()
    assert record.getMessage().endswith("measured: CUDA out of memory.")
    assert gpu[-1] == (kind(), "") and not PLANS.in_force() and len(tried) == 1


def test_a_plan_that_is_wrong_is_left_out(tried, monkeypatch):
    monkeypatch.setattr(
        trial.Kernels, "check", lambda self, plan, beat: "y is off" if plan == "block" else None
    )
    make_call()
    assert PLANS.in_force()[kind()].plan == "" and len(tried) == 1


@pytest.mark.parametrize("backward", [False, True])
def test_a_trial_leaves_nothing_behind(store, backward):
    """Random numbers are as they were, and memory is free at once."""
    given = job("", PLAN, backward=backward)
    before = torch.get_rng_state()
    kernels = trial.Kernels(given)
    assert all(kernels.check(plan, lambda: None) is None for plan in given.unchecked)
    kernels.sample(PLAN)
    assert torch.equal(torch.get_rng_state(), before)
    x = weakref.ref(kernels.inputs[0][0])
    gc.disable()
    try:
        del kernels
        assert x() is None
    finally:
        gc.enable()
        PLANS.try_out(tuned.key("cpu", given.call, backward), "")


# What the library does to tell of a call


@pytest.fixture(scope="module")
def library(once):
    """The operators of first_call.cpp."""
    if reason := unavailable("plain"):
        pytest.skip(reason)

    def make(folder):
        flags = ["-shared", "-fPIC", "-std=c++17", f"-DTORCH_TARGET_VERSION={TARGET_VERSION}"]
        flags += [f"-I{path}" for path in (ROOT / "csrc", *include_paths())]
        flags += [f"-L{path}" for path in library_paths()]
        source, out = str(ROOT / "tests" / "first_call.cpp"), str(folder / "first_call.so")
        subprocess.run([CXX, *flags, source, "-ltorch_cpu", "-o", out], check=True)

    torch.ops.load_library(str(once("first_call", make) / "first_call.so"))
    return torch.ops.da_ops_first_call


def test_the_library_tells_python(library, monkeypatch):
    got = []
    operators = torch.library.Library("da_ops", "FRAGMENT")
    schema = str(library.schema.default._schema)
    if hasattr(torch.ops.da_ops, "_cuda_first_call"):
        assert str(torch.ops.da_ops._cuda_first_call.default._schema).endswith(
            schema.partition("(")[2]
        )
    else:
        operators.define("_cuda_first_call(" + schema.partition("(")[2])
    operators.impl("_cuda_first_call", lambda *arguments: got.append(arguments), "CPU")
    x = torch.randn(2, 3, 4, 5, requires_grad=True)
    for order, gate, backward in itertools.product(ORDERS, GATES, [False, True]):
        library.tell(x, order, gate, backward)
        of, *rest = got.pop()
        assert of.data_ptr() == x.data_ptr() and of.shape == x.shape
        assert (ORDERS[rest[0]], GATES[rest[1]], rest[2]) == (order, gate, backward)
    assert not got
    operators._destroy()


def test_for_real(store, monkeypatch):
    """On a GPU, at sizes that no other test has."""
    need("cuda")
    monkeypatch.setattr(first_call, "_told", set())
    monkeypatch.setattr(first_call, "SECONDS", 0.0)
    before, given, captured = (
        make((5, channels, 14, 14), dtype=torch.float16, device="cuda") for channels in (72, 80, 88)
    )
    before.results()
    assert not PLANS.in_force()
    with torch.backends.cudnn.flags(benchmark=True):
        with FakeTensorMode(), torch.device("cuda"):
            da_ops.DAModule(96, backend="cuda")(torch.empty(5, 96, 14, 14))
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            captured()
        assert not PLANS.in_force()
        assert_promised(given, given.results())
    assert {(k.shape, k.backward) for k in PLANS.in_force()} == {
        (tuple(given.x.shape), False),
        (tuple(given.x.shape), True),
    }
    assert all(plan.at_first_call for plan in PLANS.in_force().values())
    assert_promised(given, given.results())
    assert not store.exists()
