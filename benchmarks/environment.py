"""What was measured, on what, and where results go: device, versions, digest, files."""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import importlib
import importlib.util
import json
import os
import platform
import re
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
COMMITTED = ROOT / "benchmarks" / "results"  # full runs, which README.md and docs show
LOCAL = ROOT / "bench-results"  # quick runs, not under version control
SCHEMA = 1
CPUINFO = Path("/proc/cpuinfo")
GPU_PARTS = (  # of `make gpu`
    "build", "cuda", "onchip", "gpu", "sanitize", "op", "triton", "network",
)  # fmt: skip
# Sources that decide the speed on one kind of device only, and so are in no digest of the other.
FOREIGN = {
    "cpu": (
        "csrc/cuda/",
        "csrc/plan_module.cpp",
        "da_ops/backends/cuda.py",
        "da_ops/backends/triton/",
    ),
    "cuda": ("csrc/cpu/", "da_ops/backends/cpu.py"),
}
GIB = 2**30


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """Within, being told to end is being interrupted: what was measured is there, and is shown.

    A shell's background command ignores interrupts unless it asks for them.
    """
    told = (signal.SIGTERM, signal.SIGINT)
    before = [signal.signal(number, signal.default_int_handler) for number in told]
    try:
        yield
    finally:
        for number, handler in zip(told, before, strict=True):
            signal.signal(number, handler)


class BenchmarkError(Exception):
    """What was expected, what came, what to do. Shown to the user without a traceback."""


def cpu_says(field: str) -> str | None:
    """A field of the first core in /proc/cpuinfo, such as "model name"; None where it is not."""
    if not CPUINFO.exists():
        return None
    found = re.search(rf"^{field}[ \t]*:[ \t]*(.+)$", CPUINFO.read_text(), re.MULTILINE)
    return found.group(1) if found else None


def cpu_model() -> str:
    """The processor's name as it gives it, without trademark signs."""
    name = cpu_says("model name") or platform.processor() or platform.machine()
    return re.sub(r"\((R|TM|r|tm)\)| CPU|\s+@.*| +\d+-Core Processor", "", name).strip()


def cpu_numbers() -> dict[str, int]:
    """Family and model of a processor whose name has no number, as virtual machines have them:
    {"cpu_family": 26, "cpu_model": 2}. Empty where the name has one, or nothing tells them."""
    if re.search(r"\d", cpu_model()):
        return {}
    said = {"cpu_family": cpu_says("cpu family"), "cpu_model": cpu_says("model")}
    return {name: int(value) for name, value in said.items() if value and value.isdecimal()}


def cpu_caches() -> dict[str, int]:
    """Bytes of each data cache as the first core sees it, such as {"L1": 32768, "L3": ...}."""
    caches = {}
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        try:
            level, kind, size = (
                (index / name).read_text().strip() for name in ("level", "type", "size")
            )
        except OSError:
            continue
        if kind != "Instruction" and re.fullmatch(r"\d+[KM]", size):
            caches[f"L{level}"] = int(size[:-1]) * (1024 if size[-1] == "K" else 1024**2)
    return caches


def cpu_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def last_level_cache(device: str) -> int:
    """Bytes of the last cache before memory; 32 MiB where the machine does not tell."""
    if device == "cuda":
        return int(torch.cuda.get_device_properties(0).L2_cache_size)
    caches = cpu_caches()
    return caches[max(caches)] if caches else 32 * 2**20


def device_record(device: str) -> dict[str, Any]:
    """The device by name, with what its speed depends on. Sizes in bytes."""
    import psutil

    record: dict[str, Any] = {
        "kind": device,
        "name": cpu_model(),  # without the numbers, for files of results are named after it
        **cpu_numbers(),
        "cores": cpu_cores(),
        "threads": torch.get_num_threads(),
        "caches": cpu_caches(),
        "vector": torch.backends.cpu.get_cpu_capability(),
        "memory": psutil.virtual_memory().total,
        "system": f"{platform.system()} {platform.machine()}",
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        record |= {
            "name": properties.name,
            "sm": f"{properties.major}.{properties.minor}",
            "host": record["name"],
            "memory": properties.total_memory,
            "caches": {"L2": properties.L2_cache_size},
        }
    return record


class Others:
    """How much of this process's cores other programs took since this object was made.

    Parallel loops wait for their slowest thread, so a busy machine slows eager PyTorch and
    torch.compile, which have many, far more than one fused call: ratios flatter the fused layer.
    """

    LIMIT = 5.0  # percent; beyond it a result is marked

    def __init__(self) -> None:
        self.start = time.perf_counter(), *self.used()

    @staticmethod
    def used() -> tuple[float, float]:
        """Seconds that these cores were busy, and seconds of this process and its children."""
        import psutil

        cores = psutil.cpu_times(percpu=True)
        if hasattr(os, "sched_getaffinity"):
            cores = [c for i, c in enumerate(cores) if i in os.sched_getaffinity(0)]
        idle = ("idle", "iowait", "guest", "guest_nice")  # guest time is also user time
        busy = sum(sum(c) - sum(getattr(c, name, 0.0) for name in idle) for c in cores)
        own = 0.0
        me = psutil.Process()
        for process in [me, *me.children(recursive=True)]:
            with contextlib.suppress(psutil.Error):
                spent = process.cpu_times()
                own += spent.user + spent.system
                own += getattr(spent, "children_user", 0.0) + getattr(spent, "children_system", 0.0)
        return busy, own

    def percent(self) -> float:
        """Percent of all core time."""
        wall, busy, own = (
            now - then
            for now, then in zip((time.perf_counter(), *self.used()), self.start, strict=True)
        )
        return max(0.0, 100 * (busy - own) / (wall * cpu_cores()))


def compute_in_float32() -> None:
    """Let cuDNN compute float32 convolutions in float32, not in TF32 with its ten bits: for all
    contenders alike, in the operator and in whole networks."""
    torch.backends.cudnn.allow_tf32 = False


def versions() -> dict[str, str]:
    """Versions of what decides the result; what is not installed is left out."""
    found = {"python": platform.python_version()}
    for name in ("torch", "torchvision", "triton", "da_ops"):
        if importlib.util.find_spec(name):
            found[name] = str(importlib.import_module(name).__version__)
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    return found


def digest(device: str, root: Path = ROOT) -> str:
    """SHA-256 over the sources that decide the speed of the layer and its tail on this kind of
    device: names and contents, in order."""
    kinds = {".cpp", ".h", ".cu", ".cuh", ".inl", ".py"}
    sources = [root / "da_ops" / name for name in ("functional.py", "function.py", "module.py")]
    for folder in (root / "csrc", root / "da_ops" / "backends", root / "da_ops" / "residual"):
        sources += (path for path in folder.rglob("*") if path.suffix in kinds)
    total = hashlib.sha256()
    for path in sorted(path for path in sources if path.is_file()):
        name = path.relative_to(root).as_posix()
        if name.startswith(FOREIGN[device]):
            continue
        total.update(name.encode() + b"\0")
        total.update(path.read_bytes() + b"\0")
    return total.hexdigest()


def slug(name: str) -> str:
    """A device's name as part of a file name: "AMD EPYC" is "amd-epyc"."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "device"


def head(kind: str, device: str, preset: str, module: str = "") -> dict[str, Any]:
    """The part that every results file has; `module` is the one that ran, benchmarks.KIND if it is
    left out."""
    arguments = iter(sys.argv[1:])
    shown = []
    for argument in arguments:  # where the file was written is nobody's business but the user's
        if argument in ("--output", "--out"):
            next(arguments, None)
        elif not argument.startswith(("--output=", "--out=")):
            shown.append(argument)
    return {
        "schema": SCHEMA,
        "kind": kind,
        "preset": preset,
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "command": " ".join(["python", "-m", module or f"benchmarks.{kind}", *shown]),
        "device": device_record(device),
        "versions": versions(),
        "digest": digest(device),
    }


def announcer(bar: Any) -> Callable[[str], None]:
    """What tells the step that is under way: the progress bar, or lines where output is no tty."""
    if sys.stderr.isatty():
        return lambda text: bar.set_description_str(text)
    return lambda text: print(f"  {text}", flush=True)


def results_file(kind: str, device: str, preset: str, output: str | None) -> Path:
    """Where this run's results go, proved writable now, before anything is measured."""
    # A GPU's results are committed only from `make gpu`, which also tests.
    folder = COMMITTED if preset == "full" and device == "cpu" else LOCAL
    path = folder / f"{slug(device_record(device)['name'])}-{kind}.json"
    if output is not None:
        path = Path(output)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
        if path.is_dir():
            raise IsADirectoryError(f"{path} is a folder")
    except OSError as error:
        raise BenchmarkError(
            f"results: expected a file that can be written, got {path} ({error.strerror or error});"
            " nothing was measured. Choose another with --output FILE"
        ) from error
    return path


def write_atomically(path: Path, text: str) -> None:
    """Write beside the target and rename: a reader sees the old file or the new, never half."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def rounded(value: Any) -> Any:
    """The same data with floats cut to six digits, and to null where they are not finite."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if value - value == 0 else None
    return value


def read_results(path: Path, *kinds: str) -> dict[str, Any]:
    """A results file of this schema and one of these kinds."""
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        schema, kind = results["schema"], results["kind"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BenchmarkError(f"{path}: expected a results file, got {error!r}") from error
    if schema != SCHEMA or kind not in kinds:
        raise BenchmarkError(
            f"{path}: expected schema {SCHEMA} of {' or '.join(kinds)}, got {schema} of {kind!r}; "
            "measure again or remove the file"
        )
    return dict(results)


def write_results(path: Path, results: dict[str, Any]) -> None:
    write_atomically(path, json.dumps(rounded(results), indent=1) + "\n")
