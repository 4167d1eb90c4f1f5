"""Plans that were measured on this machine: the file that keeps them, and the libraries' tables.

:func:`da_ops.tune` measures, and so do first calls under ``torch.backends.cudnn.benchmark``. The
compiled operators look a call up in a table of their own, so that compiled graphs find its plan as
eager code does. The file is read when a library is loaded; whatever is wrong with it is logged
once, as a warning, and is never an error.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import cache
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from . import driver
from .base import Call

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger("da_ops")

VERSION = 1  # of the file
ENVIRONMENT = {"cpu": "DA_OPS_CPU_PLAN", "cuda": "DA_OPS_PLAN"}  # which win over what was measured
OTHERS = ("triton",)  # backends that a plan may name, which then compute in the library's place
_FOLDER = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Key:
    """The kind of call that a plan was measured for, and on what."""

    backend: str
    device: str  # its name, a GPU's with the version of its driver
    threads: int  # of the CPU; 0 on a GPU
    library: str  # digest of the compiled library; on a GPU, of Triton and its kernels too
    shape: tuple[int, ...]
    dtype: str
    channels_last: bool
    order: str
    gate: str
    backward: bool

    @property
    def place(self) -> str:
        """The device, in the words of the library's table."""
        return str(self.threads) if self.backend == "cpu" else self.device

    @property
    def direction(self) -> str:
        return "backward" if self.backward else "forward"


@dataclass(frozen=True)
class Tuned:
    """A plan that was measured: a text as the backend's environment variable takes it, the name of
    another backend, or an empty text where nothing was found faster than the default. Its time over
    the default plan's: median, 10th and 90th percentile of rounds."""

    plan: str
    median: float = 1.0
    p10: float = 1.0
    p90: float = 1.0
    at_first_call: bool = False  # by torch.backends.cudnn.benchmark, for this process alone

    @property
    def other(self) -> str | None:
        """The backend that computes in the library's place, if one does."""
        return self.plan if self.plan in OTHERS else None

    @property
    def launches(self) -> str:
        """The library's own plan, for whoever asks for its backend by name."""
        return "" if self.other else self.plan

    def __str__(self) -> str:
        by = ", by torch.backends.cudnn.benchmark" if self.at_first_call else ""
        if not self.plan:
            return f"the default, nothing was faster{by}"
        return (
            f"{self.plan.replace(',', ' ')} ({self.median:.2f} of the default's time, "
            f"{self.p10:.2f} to {self.p90:.2f}{by})"
        )


def file() -> Path:
    """Where plans are kept: in the folder DA_OPS_CACHE, else in da_ops of the user's caches."""
    folder = os.environ.get("DA_OPS_CACHE")
    if not folder:
        caches = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        folder = os.path.join(caches, "da_ops")
    return Path(folder, "tuned.json")


def key(backend: str, call: Call, backward: bool, device: torch.device | None = None) -> Key:
    """The key of a call here and now, on ``device`` or the current one."""
    if backend == "cuda" and (device is None or device.index is None):
        device = torch.device("cuda", torch.cuda.current_device())
    return Key(
        backend,
        _device_name(backend, device),
        torch.get_num_threads() if backend == "cpu" else 0,
        _digest(backend),
        call.shape,
        call.dtype_name,
        call.channels_last,
        call.order,
        call.gate,
        backward,
    )


@cache
def _device_name(backend: str, device: torch.device | None = None) -> str:
    if backend == "cuda":  # as csrc/cuda/ops_cuda.cpp says it
        return f"{torch.cuda.get_device_name(device)}, driver {driver.newest_cuda()}"
    parts = [cpu_name(), f"{os.cpu_count()} cores"]
    if at_most := os.environ.get("DA_OPS_CPU_ISA"):
        parts.append(f"at most {at_most}")
    return ", ".join(parts)


def cpu_name() -> str:
    """The processor as it names itself, or its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


@cache
def _digest(backend: str) -> str:
    digest = hashlib.blake2b((_FOLDER / f"_{backend}.abi3.so").read_bytes(), digest_size=16)
    if backend == "cuda":
        for source in (*sorted((_FOLDER / "backends" / "triton").glob("*.py")), _triton()):
            digest.update(source.read_bytes() if source else b"")
    return digest.hexdigest()


def find_triton() -> ModuleSpec | None:
    """Triton, which takes long to import; None where it is not installed, or where a module that
    somebody made stands in for it."""
    with suppress(ValueError):
        return find_spec("triton")
    return None


def _triton() -> Path | None:
    """The file that says which version of Triton there is."""
    found = find_triton()
    return Path(found.origin) if found and found.origin else None


class Plans:
    """The plans in force in this process, and what was told of their file."""

    def __init__(self) -> None:
        self._plans: dict[Key, Tuned] = {}
        self._refused: set[Key] = set()  # of the file's, by the library
        self._told: set[str] = set()
        self.changed: Callable[[], object] = lambda: None  # called after plans come or go

    def recall(self, backend: str) -> None:
        """Put the file's plans for a library that was just loaded in force."""
        for key, tuned in self._read().items():
            # Which GPU computes is known to the library; here it would have to be woken.
            here = backend == "cuda" or key.device == _device_name("cpu")
            if key.backend == backend and here and key.library == _digest(backend):
                self._put_or_refuse(key, tuned)

    def _put_or_refuse(self, key: Key, tuned: Tuned) -> None:
        try:
            self.put(key, tuned)
        except Exception as error:  # a plan is never worth a training run
            self._refused.add(key)
            first_line = str(error).partition("\n")[0]
            self._tell(f"a plan in {file()} is not used: {first_line}; run tune again")

    def put(self, key: Key, tuned: Tuned) -> None:
        """Put a plan in force.

        Raises:
            RuntimeError: the text is no plan of the backend.
        """
        self.try_out(key, tuned.launches)
        self._plans[key] = tuned
        self.changed()

    def try_out(self, key: Key, plan: str) -> None:
        """Have the library run calls of this kind by ``plan`` from now on, and say so nowhere."""
        operator = getattr(torch.ops.da_ops, f"_{key.backend}_tune")
        call = (*key.shape, key.channels_last, key.dtype, key.order, key.gate, key.backward)
        operator(*call, key.place, plan)

    def of(
        self, backend: str, call: Call, backward: bool, device: torch.device | None = None
    ) -> Tuned | None:
        """The plan in force for a call; None where none was measured, or another was asked for."""
        if not self._plans or call.sm is not None or os.environ.get(ENVIRONMENT[backend]):
            return None
        return self._plans.get(key(backend, call, backward, device))

    def words(self, backend: str, call: Call, *, by_others: bool = False) -> dict[str, str]:
        """How each tuned direction of a call runs, in words; with ``by_others`` those directions
        that another backend was found faster at, without it the others."""
        tuned = (self.of(backend, call, backward) for backward in (False, True))
        return {
            name: str(plan)
            for name, plan in zip(("tuned forward", "tuned backward"), tuned, strict=True)
            if plan and (plan.other is not None) == by_others
        }

    def by_others(self, backend: str) -> bool:
        """Whether another backend was found faster for any call of this one."""
        return any(k.backend == backend and t.other for k, t in self.in_force().items())

    def in_force(self) -> dict[Key, Tuned]:
        """All of them, those that found the default best among them: a copy, for while one goes
        through it first calls on other threads may add to them."""
        return dict(self._plans)

    def save(self) -> bool:
        """Add the plans in force to the file; False, and a warning once, if that cannot be."""
        path = file()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with _alone(path):
                self._add_to(path)
        except OSError as error:
            self._tell(
                f"tuned plans serve this process alone, {path} cannot be written: "
                f"{error.strerror or error}; set DA_OPS_CACHE to a folder that can"
            )
            return False
        return True

    def _add_to(self, path: Path) -> None:
        others = {k: tuned for k, tuned in self._read().items() if k not in self._refused}
        kept = {k: tuned for k, tuned in self.in_force().items() if not tuned.at_first_call}
        records = [_record(key, tuned) for key, tuned in {**others, **kept}.items()]
        text = json.dumps({"version": VERSION, "plans": records}, indent=1)
        unfinished = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            unfinished.write_text(text + "\n")
            os.replace(unfinished, path)
        finally:
            unfinished.unlink(missing_ok=True)

    def forget(self) -> None:
        """Take all plans out of force and delete their file.

        Raises:
            OSError: the file is there, and cannot be deleted.
        """
        for key in self.in_force():
            self.try_out(key, "")
        self._plans.clear()
        self.changed()
        with suppress(FileNotFoundError, NotADirectoryError):
            file().unlink()

    def _read(self) -> dict[Key, Tuned]:
        """The file's plans; none, and a warning once, where it cannot be read."""
        path = file()
        try:
            text = path.read_text()
        except (FileNotFoundError, NotADirectoryError):
            return {}
        except (OSError, ValueError) as error:
            self._tell(f"tuned plans are not used, {path} cannot be read: {error}")
            return {}
        try:
            kept = json.loads(text)
            if kept["version"] != VERSION:
                raise ValueError(f"it is of version {kept['version']}, and this is {VERSION}")
            return dict(map(_parsed, kept["plans"]))
        except Exception as error:  # whatever somebody wrote there
            self._tell(
                f"tuned plans are not used, {path} is not what this version writes "
                f"({type(error).__name__}: {error}); delete it, or run tune again"
            )
            return {}

    def _tell(self, what: str) -> None:
        if what not in self._told:
            self._told.add(what)
            logger.warning("da_ops: %s", what)


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Meanwhile no other process is in here for this file, where the system can see to that."""
    with path.with_name(f".{path.name}.lock").open("a") as lock:
        if fcntl is not None:
            with suppress(OSError):  # some network drives have no locks
                fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _record(key: Key, tuned: Tuned) -> dict[str, Any]:
    record = {**asdict(key), **asdict(tuned)}
    del record["at_first_call"]  # which is not kept
    return record


def _parsed(record: dict[str, Any]) -> tuple[Key, Tuned]:
    """A record of the file.

    Raises:
        TypeError, KeyError, ValueError: it is none.
    """
    of_key = {name: record[name] for name in Key.__dataclass_fields__}
    shape = tuple(record["shape"])
    numbers = [*shape, record["threads"]]
    texts = [record[k] for k in ("backend", "device", "library", "dtype", "order", "gate", "plan")]
    truths = [record["channels_last"], record["backward"]]
    for values, kind in ((numbers, int), (texts, str), (truths, bool)):
        if not all(type(value) is kind for value in values):
            raise ValueError(f"expected {kind.__name__} in all of {values}")
    if len(shape) != 4 or record["backend"] not in ENVIRONMENT:
        raise ValueError(f"no call of a compiled backend: {record}")
    median, p10, p90 = (float(record[name]) for name in ("median", "p10", "p90"))
    return Key(**{**of_key, "shape": shape}), Tuned(record["plan"], median, p10, p90)


PLANS = Plans()  # the only ones
