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

from .cuda import (
    NVCC_FLAGS,
    CudaCompiler,
    arch_list,
    gencode,
    include_folders,
    library_folders,
    runtime_flags,
    unknown_archs,
)
from .project_page import version
from .record import RECORD, summary

try:
    import torch
    from torch.utils import cpp_extension
    from torch.utils.cpp_extension import BuildExtension, include_paths, library_paths
except ModuleNotFoundError as error:
    raise SystemExit(
        f"da_ops needs torch >= 2.10 to build, but {error}. Install torch first, or leave out "
        "--no-build-isolation so that pip brings its own."
    ) from None

from . import toolkit

# The oldest torch that the binary runs on, whichever torch builds it.
TARGET_VERSION = "0x020a000000000000"  # 2.10
FLAGS = ["-O3", "-g0", "-std=c++17", "-ffp-contract=fast", "-fvisibility=hidden"]
HEADERS = (".h", ".inl", ".cuh")
FOR_NVCC = ["-Xcompiler=-fvisibility=hidden", "-Xfatbin=-compress-all", "--threads=2"]


def extensions() -> list[Extension]:
    csrc = str(Path("csrc").resolve())  # ninja runs in another folder
    common: dict[str, Any] = {
        "language": "c++",
        "depends": [str(p) for p in sorted(Path("csrc").rglob("*")) if p.suffix in HEADERS],
    }
    # Plain Extension, not CppExtension, which would link libtorch and with it CUDA: the stable ABI
    # lives in libtorch_cpu, so that one binary serves torch with CUDA or without.
    stable: dict[str, Any] = {
        "include_dirs": [csrc, *include_paths()],
        "library_dirs": library_paths(),
        "py_limited_api": True,
        **common,
    }
    target = ("TORCH_TARGET_VERSION", TARGET_VERSION)
    found = [
        Extension(
            "da_ops._cpu",
            ["csrc/ops.cpp", *sorted(glob("csrc/cpu/*.cpp"))],
            libraries=["torch_cpu"],
            define_macros=[target],
            extra_compile_args=FLAGS,
            **stable,
        ),
        Extension(
            "da_ops._plan",
            [
                "csrc/plan_module.cpp",
                *glob("csrc/cpu/plan.cpp"),
                *sorted(glob("csrc/cuda/plan/*.cpp")),
            ],
            include_dirs=[csrc, pybind11_include()],
            extra_compile_args=FLAGS,
            **common,
        ),
    ]
    # Without ops.cpp, for a schema must not be defined twice: _cuda is loaded after _cpu.
    kernels = sorted(glob("csrc/cuda/*.cu"))
    if kernels:
        cuda = Extension(
            "da_ops._cuda",
            [*kernels, *sorted(glob("csrc/cuda/**/*.cpp", recursive=True))],
            libraries=["torch_cpu", "torch_cuda"],  # torch_cuda: the current stream
            define_macros=[target, ("USE_CUDA", None)],
            extra_compile_args={"cxx": FLAGS, "nvcc": [*NVCC_FLAGS, *FOR_NVCC]},
            **stable,
        )
        found.append(cuda)
    return found


def use_toolkit(ext: Extension, home: Path, archs: list[str], cxx: str) -> None:
    """Build with the toolkit that find_cuda found, whichever torch would have guessed."""
    cpp_extension.CUDA_HOME = str(home)
    ext.extra_compile_args["nvcc"] += [f"-ccbin={cxx}", *gencode(archs)]
    # New lists: other extensions share the old ones.
    ext.include_dirs = [*ext.include_dirs, *include_folders(home)]
    ext.library_dirs = [*ext.library_dirs, *library_folders(home)]
    ext.extra_link_args = [*ext.extra_link_args, *runtime_flags(home)]


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
        # Nothing is fetched for a library that could not be built all the same.
        possible = find_cxx() is not None and os.environ.get("DA_OPS_CPU") != "0"
        cuda = toolkit.find_or_fetch() if possible else toolkit.find()
        self.record = record = survey({ext.name for ext in self.extensions}, cuda)
        # Nothing from an earlier build may pass for this one's.
        for name in [RECORD, *(Path(self.get_ext_filename(e.name)).name for e in self.extensions)]:
            (folder / name).unlink(missing_ok=True)
        self.extensions = [e for e in self.extensions if record[part_of(e)]["built"]]
        if record["compiler"]:  # one compiler for torch, for setuptools, for nvcc and the linker
            command = record["compiler"]["command"]
            os.environ["CXX"] = command  # also where it is set to nothing
        for ext in self.extensions:
            if part_of(ext) == "cuda":  # and so there is a C++ compiler
                use_toolkit(ext, cuda.home, record["cuda"]["arch_list"], command)
        record["compiler"] = record["compiler"] and record["compiler"]["version"]

        super().run()
        folder.mkdir(parents=True, exist_ok=True)
        (folder / RECORD).write_text(json.dumps(record, indent=2) + "\n")
        print(summary(record), file=sys.stderr)

    def build_extensions(self) -> None:
        shared, wanted, built = self.build_temp, self.extensions, []
        for ext in wanted:
            # Each by itself, in a folder of its own: plan.cpp is compiled by two with different
            # flags, and what torch has against nvcc must not stop the others.
            self.extensions, self.build_temp = [ext], os.path.join(shared, ext.name)
            try:
                super().build_extensions()
            except Exception as error:
                self.give_up(ext, error)
            else:
                built.append(ext)
        self.extensions, self.build_temp = built, shared

    def give_up(self, ext: Extension, error: Exception) -> None:
        """Fail the install, save where it can do without the part and nobody asked for it."""
        if part_of(ext) == "cuda" and os.environ.get("DA_OPS_CUDA") != "1":
            reason = f"it did not compile, pip's -v shows why: {str(error).partition(chr(10))[0]}"
            self.record["cuda"].update(built=False, reason=reason, arch_list=[])
            return
        switch = {"cpu": "DA_OPS_CPU", "cuda": "DA_OPS_CUDA"}.get(part_of(ext))
        advice = f"; {switch}=0 installs without it" if switch else ""
        raise CompileError(f"{ext.name} did not compile, see above{advice}") from error


def part_of(ext: Extension) -> str:
    return ext.name.removeprefix("da_ops._")


def survey(
    names: set[str], cuda: CudaCompiler, environ: Mapping[str, str] = os.environ
) -> dict[str, Any]:
    """What will be built of the extensions `names`, and why not the rest."""
    if tuple(int(n) for n in torch.__version__.split(".")[:2]) < (2, 10):
        raise SetupError(f"da_ops needs torch >= 2.10 to build, found {torch.__version__}")
    compiler = find_cxx(environ)
    no_cxx = None if compiler else "no C++ compiler: c++, g++, clang++ not found, or do not run"
    python_h = Path(sysconfig.get_path("include"), "Python.h")
    no_python_h = None if python_h.exists() else f"no {python_h}: install Python's headers"

    cpu = part("DA_OPS_CPU", no_cxx, environ)
    found = f"nvcc {cuda.version} in {cuda.home}, from {cuda.why}" if cuda.home else None
    archs = arch_list(cuda.home, environ) if cuda.home else []
    no_cuda = None if "da_ops._cuda" in names else "no CUDA sources in this version"
    no_cuda = no_cuda or no_cxx or (None if cuda.home else cuda.why)
    if not no_cuda and not cpu["built"]:
        no_cuda = f"the cpu part, which has the operators' schema, is not built: {cpu['reason']}"
    if not no_cuda and (not archs or unknown_archs(archs)):
        no_cuda = (
            "TORCH_CUDA_ARCH_LIST: expected architectures such as '8.0 9.0 12.0+PTX', or nothing "
            f"for all that nvcc knows, got {' '.join(archs)!r}"
        )

    record: dict[str, Any] = {
        "version": version(),
        "cpu": cpu,
        "plan": part(None, no_cxx or no_python_h, environ),
        "cuda": {
            **part("DA_OPS_CUDA", no_cuda, environ),
            "arch_list": [],
            "compiler": found,
            "version": cuda.version,
        },
        "compiler": compiler,
        "flags": FLAGS,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    if record["cuda"]["built"]:
        record["cuda"]["arch_list"] = archs
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
