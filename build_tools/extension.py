"""The compiled parts of da_ops: what they are made of, whether this machine can build them."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Mapping
from glob import glob
from pathlib import Path
from typing import Any

from setuptools import Extension
from setuptools.errors import CompileError, SetupError

from .cuda import arch_list, find_cuda
from .record import RECORD, summary

try:
    import torch
    from torch.utils.cpp_extension import BuildExtension, include_paths, library_paths
except ModuleNotFoundError as error:
    raise SystemExit(
        f"da_ops needs torch >= 2.10 to build, but {error}. Install torch first, or leave out "
        "--no-build-isolation so that pip brings its own."
    ) from None

# The oldest torch that the binary runs on, whichever torch builds it.
TARGET_VERSION = "0x020a000000000000"  # 2.10
FLAGS = ["-O3", "-g0", "-std=c++17", "-ffp-contract=fast", "-fvisibility=hidden"]


def extensions() -> list[Extension]:
    csrc = str(Path("csrc").resolve())  # ninja runs in another folder
    common: dict[str, Any] = {
        "language": "c++",
        "extra_compile_args": FLAGS,
        "depends": sorted(glob("csrc/**/*.[hi]*", recursive=True)),  # .h, .inl
    }
    return [
        # Plain Extension, not CppExtension, which would link libtorch and with it CUDA: the
        # stable ABI lives in libtorch_cpu, so that one binary serves torch with CUDA or without.
        Extension(
            "da_ops._cpu",
            ["csrc/ops.cpp", *sorted(glob("csrc/cpu/*.cpp"))],
            include_dirs=[csrc, *include_paths()],
            library_dirs=library_paths(),
            libraries=["torch_cpu"],
            define_macros=[("TORCH_TARGET_VERSION", TARGET_VERSION)],
            py_limited_api=True,
            **common,
        ),
        Extension(
            "da_ops._plan",
            ["csrc/plan_module.cpp", *sorted(glob("csrc/*/plan.cpp"))],
            include_dirs=[csrc, pybind11_include()],
            **common,
        ),
    ]


def pybind11_include() -> str:
    try:
        import pybind11
    except ModuleNotFoundError:  # torch ships the headers as well
        return include_paths()[0]
    return pybind11.get_include()


class BuildOps(BuildExtension):
    """Build what this machine can, or fail where a part that was asked for cannot be built."""

    def run(self) -> None:
        folder = Path("da_ops") if self.inplace else Path(self.build_lib, "da_ops")
        record = survey({ext.name for ext in self.extensions})
        # Nothing from an earlier build may pass for this one's.
        for name in [RECORD, *(Path(self.get_ext_filename(e.name)).name for e in self.extensions)]:
            (folder / name).unlink(missing_ok=True)
        self.extensions = [e for e in self.extensions if record[part_of(e)]["built"]]
        if record["compiler"]:  # one compiler for torch, for setuptools and for the linker
            os.environ.setdefault("CXX", record["compiler"]["command"])
        record["compiler"] = record["compiler"] and record["compiler"]["version"]

        super().run()
        folder.mkdir(parents=True, exist_ok=True)
        (folder / RECORD).write_text(json.dumps(record, indent=2) + "\n")
        print(summary(record), file=sys.stderr)

    def build_extension(self, ext: Extension) -> None:
        # A folder each: both compile plan.cpp, with different flags.
        shared, self.build_temp = self.build_temp, os.path.join(self.build_temp, ext.name)
        try:
            super().build_extension(ext)
        except Exception as error:
            advice = "; DA_OPS_CPU=0 installs without it" if part_of(ext) == "cpu" else ""
            raise CompileError(f"{ext.name} did not compile, see above{advice}") from error
        finally:
            self.build_temp = shared


def part_of(ext: Extension) -> str:
    return ext.name.removeprefix("da_ops._")


def survey(names: set[str], environ: Mapping[str, str] = os.environ) -> dict[str, Any]:
    """What will be built of the extensions `names`, and why not the rest."""
    if tuple(int(n) for n in torch.__version__.split(".")[:2]) < (2, 10):
        raise SetupError(f"da_ops needs torch >= 2.10 to build, found {torch.__version__}")
    compiler = find_cxx(environ)
    no_cxx = None if compiler else "no C++ compiler: c++, g++, clang++ not found, or do not run"
    python_h = Path(sysconfig.get_path("include"), "Python.h")
    no_python_h = None if python_h.exists() else f"no {python_h}: install Python's headers"

    cuda = find_cuda(torch.version.cuda, environ, [Path(torch.__file__).parents[1]])
    found = f"nvcc {cuda.version} in {cuda.home}, from {cuda.why}" if cuda.home else None
    no_cuda = None if "da_ops._cuda" in names else "no CUDA sources in this version"
    no_cuda = no_cuda or no_cxx or (None if cuda.home else cuda.why)

    record: dict[str, Any] = {
        "version": Path("da_ops/_version.py").read_text().split('"')[1],
        "cpu": part("DA_OPS_CPU", no_cxx, environ),
        "plan": part(None, no_cxx or no_python_h, environ),
        "cuda": {**part("DA_OPS_CUDA", no_cuda, environ), "arch_list": [], "compiler": found},
        "compiler": compiler,
        "flags": FLAGS,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    if record["cuda"]["built"]:
        record["cuda"]["arch_list"] = arch_list(cuda.home, environ)
    return record


def part(switch: str | None, obstacle: str | None, environ: Mapping[str, str]) -> dict[str, Any]:
    """Whether to build a part, from its switch (0, 1, or unset: if possible) and what hinders."""
    asked = environ.get(switch, "") if switch else ""
    if asked not in ("", "0", "1"):
        raise SetupError(f"{switch}: expected 0, 1 or nothing, got {asked!r}")
    if asked == "1" and obstacle:
        raise SetupError(
            f"{switch}=1 asks for a part that cannot be built here: {obstacle}. "
            f"Unset {switch} to install without it."
        )
    reason = f"{switch}=0" if asked == "0" else obstacle
    return {"built": reason is None, "reason": reason}


def find_cxx(environ: Mapping[str, str] = os.environ) -> dict[str, str] | None:
    """The C++ compiler, as a command and as it names itself; None where there is none."""
    asked = environ.get("CXX")
    for command in [asked] if asked else ["c++", "g++", "clang++"]:
        path = shutil.which(command, path=environ.get("PATH", ""))
        if path is None:
            continue
        try:
            done = subprocess.run([path, "--version"], capture_output=True, text=True, check=True)
        except (OSError, subprocess.SubprocessError):
            continue
        return {"command": command, "version": (done.stdout.splitlines() or [command])[0]}
    if asked:
        raise SetupError(
            f"CXX: expected a C++ compiler, one program without arguments, got {asked!r}, which "
            "is not found or does not run. Unset CXX to use c++, g++ or clang++ from PATH."
        )
    return None
