"""``info``: what a maintainer needs to answer a question about an installation."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
from collections.abc import Iterator
from importlib import metadata
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch

from .._version import __version__
from ..backends import BACKENDS, backends, driver, native, passed_over, select, tuned
from ..backends.cuda import driver_version

PARTS = ("cpu", "plan", "cuda")
# Besides our own, which begin with DA_OPS_: what decides which devices, libraries, compilers and
# threads there are. No others are told, for who reports a fault publishes what `info` prints.
VARIABLES = (
    *("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER", "CUDA_LAUNCH_BLOCKING", "CUDA_MODULE_LOADING"),
    *("CUDA_HOME", "CUDA_PATH", "CXX", "MAX_JOBS", "TORCH_CUDA_ARCH_LIST"),
    *("OMP_NUM_THREADS", "OMP_PROC_BIND", "OMP_WAIT_POLICY", "MKL_NUM_THREADS"),
    *("GOMP_CPU_AFFINITY", "KMP_AFFINITY", "KMP_BLOCKTIME", "ATEN_CPU_CAPABILITY"),
    *("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "NVIDIA_TF32_OVERRIDE"),
    *("TORCH_LOGS", "TORCH_COMPILE_DISABLE", "TORCHINDUCTOR_CACHE_DIR"),
    *("TRITON_INTERPRET", "TRITON_CACHE_DIR", "LD_LIBRARY_PATH", "LD_PRELOAD"),
)


def add(commands: argparse._SubParsersAction) -> None:
    """Declare the command."""
    command = commands.add_parser(
        "info",
        help="versions, what was built, devices, which backends are usable",
        description="Print versions, what was built and why not the rest, devices, the backends and"
        " which is used, environment variables, tuned plans: for a report of a fault.",
    )
    command.add_argument("--json", action="store_true", help="print JSON")
    command.set_defaults(run=_info)


def _info(args: argparse.Namespace) -> int:
    facts = collect()
    print(json.dumps(facts, indent=2) if args.json else "\n".join(_lines(facts)))
    return 0


def collect() -> dict[str, Any]:
    """All facts, as `--json` prints them. Nothing that is missing or broken is an error."""
    plans = tuned.PLANS.in_force().values()
    here = [plan for plan in plans if plan.at_first_call]
    names = sorted(name for name in os.environ if name in VARIABLES or name.startswith("DA_OPS_"))
    return {
        "versions": _versions(),
        "folder": str(native.FOLDER),
        "build": native.build_record() or None,
        "libraries": {path.name: _file(path) for path in sorted(native.FOLDER.glob("*.so"))},
        "devices": {
            "cpu": {
                "name": tuned.cpu_name(),
                "instruction_set": _instruction_set(),
                "cores": _cores(),
                "threads": torch.get_num_threads(),
            },
            "gpus": _gpus(),
            "driver": {"version": driver.version(), "cuda": driver_version()},
        },
        "backends": backends(),
        "auto": {kind: _chosen(kind) for kind in ("cpu", *(["cuda"] if _gpus() else []))},
        "environment": {name: os.environ[name] for name in names},
        "tuned": {
            "file": str(tuned.file()),
            "plans": len(plans) - len(here),
            "at_first_calls": len(here),
        },
    }


def _versions() -> dict[str, str | None]:
    return {
        "da_ops": __version__,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,  # that torch was built with
        "hip": torch.version.hip,
        "triton": _version_of("triton"),
        "numpy": _version_of("numpy"),
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.release()} {platform.machine()}",
        "libc": " ".join(platform.libc_ver()).strip() or None,
    }


def _version_of(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _file(library: Path) -> dict[str, Any]:
    content = library.read_bytes()
    digest = hashlib.blake2b(content, digest_size=16).hexdigest()
    return {"bytes": len(content), "digest": digest}


def _cores() -> int | None:
    """Those that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


def _instruction_set() -> str | None:
    """The one that the CPU kernels take; None where the planner, which knows it, is not there."""
    try:
        plan = native.planner().cpu((1, 1, 1, 1), False, "float32", "spatial_channel", 1)
    except RuntimeError:
        return None
    return str(plan["instruction_set"])


def _gpus() -> list[dict[str, Any]]:
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return [_gpu(index) for index in range(count)]


def _gpu(index: int) -> dict[str, Any]:
    """Of one that does not answer, CUDA's error in the place of its name."""
    try:
        gpu = torch.cuda.get_device_properties(index)
    except RuntimeError as error:
        return {"name": str(error).partition("\n")[0], "capability": None, "memory": None}
    capability = f"{gpu.major}.{gpu.minor}"
    return {"name": gpu.name, "capability": capability, "memory": gpu.total_memory}


def _chosen(kind: str) -> dict[str, Any]:
    """What "auto" takes for tensors on a kind of device, and why not a better one that serves it;
    or why it takes none."""
    try:
        name = select("auto", kind)
    except (RuntimeError, ValueError) as refused:  # what DA_OPS_BACKEND names
        return {"backend": None, "error": str(refused), "passed_over": {}}
    better = takewhile(lambda other: other != name, BACKENDS)
    reasons = {other: passed_over(other, kind) for other in better if BACKENDS[other].serves(kind)}
    passed = {other: reason for other, reason in reasons.items() if reason}
    return {"backend": name, "error": None, "passed_over": passed}


def _lines(facts: dict[str, Any]) -> Iterator[str]:
    has = {name: version or "not found" for name, version in facts["versions"].items()}
    yield f"da_ops {has['da_ops']} in {facts['folder']}"
    names = {"CUDA": facts["versions"]["cuda"], "HIP": facts["versions"]["hip"]}
    built_with = [f"{name} {version}" for name, version in names.items() if version]
    yield f"torch {has['torch']}, {' '.join(built_with) or 'without CUDA'}"
    yield f"triton {has['triton']}, numpy {has['numpy']}"
    yield f"Python {has['python']}, {has['platform']}, {has['libc']}"
    yield from _lines_of_build(facts["build"], facts["libraries"])
    yield from _lines_of_devices(facts["devices"])
    yield "backends, the best first:"
    for name, reason in facts["backends"].items():
        yield _row(name, "usable" if reason is None else f"not usable: {reason}")
    for kind, chosen in facts["auto"].items():
        yield f'"auto" on {kind}: {chosen["backend"] or chosen["error"]}'
        for name, reason in chosen["passed_over"].items():
            yield _row("", f"not {name}: {reason}")
    yield f"environment:{'' if facts['environment'] else ' nothing set'}"
    for name, value in facts["environment"].items():
        yield f"  {name}={value}"
    yield f"tuned plans: {facts['tuned']['plans']} known, from {facts['tuned']['file']}"
    if here := facts["tuned"]["at_first_calls"]:
        yield f"  and {here} of this process alone, by torch.backends.cudnn.benchmark"


def _lines_of_build(record: dict[str, Any] | None, libraries: dict[str, Any]) -> Iterator[str]:
    if record is None:
        yield "build: no record, the compiled parts were never built here"
    else:
        against = f"against torch {record['torch']}, Python {record['python']}"
        yield f"build of da_ops {record['version']}, {against}:"
        for part in PARTS:
            reason = record[part]["reason"]
            archs = " ".join(record[part].get("arch_list", []))
            built = f"built for {archs}" if archs else "built"
            yield _row(part, built if reason is None else f"not built: {reason}")
        compiler = record["compiler"] or "no C++ compiler"
        yield _row("with", f"{compiler}, {' '.join(record['flags'])}")
        if compiler := record["cuda"].get("compiler"):
            yield _row("with", compiler)
    for name, file in libraries.items():
        yield f"  {name}, {file['bytes']} bytes, {file['digest']}"


def _lines_of_devices(devices: dict[str, Any]) -> Iterator[str]:
    cpu, gpus = devices["cpu"], devices["gpus"]
    yield "devices:"
    instructions = cpu["instruction_set"] or "instruction set unknown"
    counts = f"{cpu['cores'] or 'unknown'} cores, {cpu['threads']} threads"
    yield _row("CPU", f"{cpu['name']}, {instructions}, {counts}")
    for index, gpu in enumerate(gpus):
        has = ""
        if gpu["memory"]:
            memory = f"{gpu['memory'] / 2**30:.1f} GiB"
            has = f", compute capability {gpu['capability']}, {memory}"
        yield _row(f"GPU {index}", f"{gpu['name']}{has}")
    if not gpus:
        yield _row("GPU", "none")
    driver = devices["driver"]
    if driver["cuda"]:
        yield _row("driver", f"{driver['version'] or 'version unknown'}, for CUDA {driver['cuda']}")


def _row(name: str, text: str) -> str:
    return f"  {name:8s}{text}"
