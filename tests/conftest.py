"""The backends that every test runs on, and what holds for all tests."""

from __future__ import annotations

import ctypes
import fcntl
import functools
import os
import random
from collections import defaultdict
from types import SimpleNamespace

# Compiled graphs are few and small here: compiling them in this process is quicker than a pool.
os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = os.environ.get("TORCHINDUCTOR_COMPILE_THREADS") or "1"

import hypothesis
import pytest
import torch

# Without a GPU, Python runs the Triton kernels; Triton looks for this when it is imported.
GPU = torch.cuda.is_available()
if not GPU:
    os.environ["TRITON_INTERPRET"] = os.environ.get("TRITON_INTERPRET") or "1"
# With a GPU, no test but that of the measuring itself waits for Triton to time its tiles.
os.environ["DA_OPS_TRITON_AUTOTUNE"] = os.environ.get("DA_OPS_TRITON_AUTOTUNE") or "0"
# No test runs by plans that somebody measured.
os.environ["DA_OPS_CACHE"] = os.devnull

import da_ops  # noqa: E402
from da_ops.backends import tuned  # noqa: E402
from da_ops.backends.choice import CHOICE  # noqa: E402

from .cases import FULL  # noqa: E402
from .simt.build import ROOT, build, unavailable  # noqa: E402

# A new backend is one line: its name and the device to run it on.
BACKENDS = [
    ("cuda", "cuda"),
    ("triton", "cuda" if GPU else "cpu"),
    ("cpu", "cpu"),
    ("eager", "cpu"),
]

hypothesis.settings.register_profile("default", max_examples=40, deadline=None, derandomize=True)
hypothesis.settings.register_profile("full", max_examples=1000, deadline=None)
hypothesis.settings.load_profile("full" if FULL else "default")

# Small tensors and several test processes: more threads would wait for each other. Tests of threads
# ask for them.
THREADS = 1
torch.set_num_threads(THREADS)

# cuDNN may compute float32 convolutions in TF32, which has ten bits: the reference's, above all.
torch.backends.cudnn.allow_tf32 = False

# glibc fills every block it hands out with 0xFE bytes, NaN or a huge number in every dtype: what a
# kernel forgets to write is seen, in its results as in its scratch memory.
_M_PERTURB = -6
POISONED = hasattr(ctypes.CDLL(None), "mallopt") and ctypes.CDLL(None).mallopt(_M_PERTURB, 0x01)


# How many variants of a test run on Triton's kernels. Interpreted, a call takes a fraction of a
# second; on a GPU, nearly every variant is compiled for itself. With DA_OPS_TEST_FULL=1 all run.
FEW = 12 if GPU else 4


def interpreted(backend):
    """Whether Python runs the backend's kernels, slowly."""
    return backend == "triton" and not GPU


def pytest_collection_modifyitems(config, items):
    if FULL:
        return
    variants = defaultdict(list)
    for item in items:
        target = getattr(item, "callspec", None) and item.callspec.params.get("_target")
        if target and target[0] == "triton":
            variants[item.nodeid.partition("[")[0]].append(item)
    left_out = set()
    for name, several in variants.items():
        few = random.Random(name).sample(several, min(FEW, len(several)))  # the same ones each time
        left_out.update(set(several) - set(few))
    config.hook.pytest_deselected(items=[item for item in items if item in left_out])
    items[:] = [item for item in items if item not in left_out]


def need(name):
    """Skip the test unless a backend is usable here."""
    reason = da_ops.backends()[name]
    if reason is not None:
        pytest.skip(f"backend {name!r}: {reason}")


@pytest.fixture(params=BACKENDS, ids=lambda pair: pair[0])
def _target(request):
    need(request.param[0])
    return request.param


@pytest.fixture
def backend(_target):
    """The name of a usable backend."""
    return _target[0]


@pytest.fixture
def device(_target):
    """The device that `backend` serves."""
    return _target[1]


@pytest.fixture
def choice():
    """The choice of a backend, made anew in the test; what it came to is forgotten after."""
    CHOICE.forget()
    yield CHOICE
    CHOICE.forget()


@pytest.fixture
def store(fused_cpu, tmp_path, monkeypatch):
    """A file of tuned plans of the test's own; none is in force before and after."""
    monkeypatch.setenv("DA_OPS_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("DA_OPS_CPU_PLAN", raising=False)
    monkeypatch.delenv("DA_OPS_PLAN", raising=False)
    tuned.PLANS.forget()
    tuned.PLANS._told.clear()
    yield tuned.file()
    monkeypatch.setenv("DA_OPS_CACHE", os.devnull)
    tuned.PLANS.forget()
    tuned.PLANS._told.clear()


@pytest.fixture
def gpu(store, monkeypatch):
    """What torch tells of a GPU, where there is none; the plans that its library was given."""
    told = SimpleNamespace(major=9, minor=0, multi_processor_count=132, L2_cache_size=50 * 2**20)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: told)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Planted")
    monkeypatch.setattr(tuned.driver, "newest_cuda", lambda: 13000)
    monkeypatch.setattr(tuned, "_digest", lambda backend: "planted")
    monkeypatch.setattr(da_ops.tuning, "backends", lambda: {"cuda": None})
    tuned._device_name.cache_clear()
    set_in_library = []
    monkeypatch.setattr(tuned.Plans, "try_out", lambda self, *a: set_in_library.append(a))
    yield set_in_library
    tuned.PLANS._plans.clear()
    tuned._device_name.cache_clear()


@pytest.fixture
def fused_cpu():
    """For tests of what only the fused CPU kernels do."""
    need("cpu")
    return "cpu"


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory):
    """Shared by all workers of a test run."""
    folder = tmp_path_factory.getbasetemp()
    return folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder


@pytest.fixture(scope="session")
def once(shared_folder):
    """once(name, make): a folder that make(folder) has filled, in the first worker that asks."""

    def made(name, make):
        folder, unfinished = shared_folder / name, shared_folder / f"{name}.unfinished"
        with open(shared_folder / f"{name}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not folder.exists():
                unfinished.mkdir(exist_ok=True)
                make(unfinished)
                unfinished.rename(folder)
        return folder

    return made


@pytest.fixture(scope="session")
def executable(shared_folder):
    """executable(source, kind): built once for all workers of a test run."""

    @functools.cache
    def made(source, kind):
        if reason := unavailable(kind):
            pytest.skip(reason)
        return build(source, kind, shared_folder)

    return made


@pytest.fixture(scope="session")
def kernels(executable):
    """kernels(kind): the executable that runs the CUDA kernels on the CPU."""
    return lambda kind="plain": executable(ROOT / "tests" / "simt" / "run.cpp", kind)


@pytest.fixture(autouse=True)
def _settings_of_torch():
    """Each test starts from the same seed, and leaves threads and determinism as they were."""
    torch.manual_seed(0)
    yield
    torch.set_num_threads(THREADS)
    torch.use_deterministic_algorithms(False)
