"""Find the CUDA compiler, and decide which architectures to build for. Needs no torch, no GPU."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sysconfig
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

ARCHITECTURES = ("7.5", "8.0", "8.6", "8.9", "9.0", "10.0", "12.0")
# Those that nvcc makes PTX for, which serves every later architecture up to the next: the sources
# make use of what 8.0 and 9.0 brought, and nvcc 13.0 of what 10.0 did, in up to half as many
# instructions.
PTX = ("7.5", "8.0", "9.0", "10.0")
NVCC_FLAGS = ["-O3", "-std=c++17", "--expt-relaxed-constexpr"]
PIP_TOOLKIT = "cuda-toolkit[nvcc,cccl,crt,nvvm]"  # pip's nvcc, and all that it needs to compile
HEADERS = ("cuda_runtime.h", "nv/target")  # toolkits in parts may lack either


@dataclass(frozen=True)
class CudaCompiler:
    home: Path | None  # None: none was found that serves
    version: str | None  # of nvcc, such as "13.0"
    why: str  # where it was found, and why the places before it were passed over


def find_cuda(
    torch_cuda: str | None,
    environ: Mapping[str, str] = os.environ,
    site_packages: Iterable[str | Path] = (),
) -> CudaCompiler:
    """The first nvcc of torch's CUDA major version in CUDA_HOME, on PATH, or installed by pip.

    torch guesses its CUDA_HOME from where `nvcc` lies, which is wrong where that is a wrapper
    script, and it does not know pip's compiler at all; hence this search.
    """
    if torch_cuda is None:
        return CudaCompiler(None, None, "this torch was built without CUDA")
    passed_over = []
    for where, home in _candidates(torch_cuda, environ, site_packages):
        version = _nvcc_version(home)
        if version is None:
            passed_over.append(f"{where}: no working bin/nvcc in {home}")
        elif version.split(".")[0] != torch_cuda.split(".")[0]:
            passed_over.append(f"{where}: nvcc is {version}, torch was built with {torch_cuda}")
        elif missing := _missing_headers(home):
            passed_over.append(f"{where}: no {' and no '.join(missing)} in {home}")
        else:
            return CudaCompiler(home, version, "; ".join([where, *passed_over]))
    nowhere = f"no nvcc in CUDA_HOME, on PATH, or from pip's {PIP_TOOLKIT}"
    return CudaCompiler(None, None, "; ".join(passed_over) or nowhere)


def arch_list(home: Path, environ: Mapping[str, str] = os.environ) -> list[str]:
    """TORCH_CUDA_ARCH_LIST where it is set, else every architecture of ours that this nvcc knows.

    The newest of PTX carries it in the library as well, so that GPUs yet to come can run it.
    """
    asked = environ.get("TORCH_CUDA_ARCH_LIST", "").replace(";", " ").replace(",", " ").split()
    if asked:
        return asked
    listing = _run(home / "bin" / "nvcc", "--list-gpu-arch") or ""
    known = {f"{major}.{minor}" for major, minor in re.findall(r"compute_(\d+)(\d)\b", listing)}
    archs = [arch for arch in ARCHITECTURES if arch in known]
    kept = max((arch for arch in archs if arch in PTX), key=_number, default="")
    return [f"{arch}+PTX" if arch == kept else arch for arch in archs]


def gencode(archs: Iterable[str]) -> list[str]:
    """nvcc's flags for architectures such as "9.0", "9.0a" and "12.0+PTX"."""
    made: dict[str, list[str]] = {}  # binaries, and PTX, by the PTX that they are made from
    for arch in archs:
        name, _, keep = arch.partition("+")
        ptx = ptx_for(name).replace(".", "")
        codes = made.setdefault(ptx, [])
        codes.append(f"sm_{name.replace('.', '')}")
        if keep:
            codes.append(f"compute_{ptx}")
    return [f"-gencode=arch=compute_{ptx},code=[{','.join(made[ptx])}]" for ptx in made]


def ptx_for(arch: str) -> str:
    """The architecture that the PTX for `arch` is made for: "8.0" for "8.6"; its own for "9.0a"."""
    if arch[-1] in "af":
        return arch
    return max((ptx for ptx in PTX if _number(ptx) <= _number(arch)), key=_number, default=arch)


def _number(arch: str) -> tuple[int, ...]:
    return tuple(int(part) for part in arch.split("."))


def unknown_archs(archs: Iterable[str]) -> list[str]:
    return [arch for arch in archs if not re.fullmatch(r"\d+\.\d[af]?(\+PTX)?", arch)]


def include_folders(home: Path) -> list[str]:
    return _folders(home, "include")


def library_folders(home: Path) -> list[str]:
    return _folders(home, "lib64", "lib")


def runtime_flags(home: Path) -> list[str]:
    """What links the CUDA runtime: into the library, so that it needs none of torch's version.

    A toolkit without the static one has the shared one, pip's under its full name only.
    """
    static = "libcudart_static.a"
    folders = [Path(folder) for folder in library_folders(home)]
    if any((folder / static).exists() for folder in folders):
        return [f"-l:{static}", f"-Wl,--exclude-libs,{static}", "-lrt", "-ldl", "-lpthread"]
    for name in ("libcudart.so", "libcudart.so.*"):
        for folder in folders:
            for library in sorted(folder.glob(name)):
                return [f"-l:{library.name}"]
    return ["-lcudart"]  # the linker may know where


def _folders(home: Path, *names: str) -> list[str]:
    found = [home / name for name in names]
    found += [folder for name in names for folder in home.glob(f"targets/*/{name}")]
    return [str(folder) for folder in found if folder.is_dir()]


def _candidates(
    torch_cuda: str, environ: Mapping[str, str], site_packages: Iterable[str | Path]
) -> Iterator[tuple[str, Path]]:
    for name in ("CUDA_HOME", "CUDA_PATH"):
        if environ.get(name):
            yield name, Path(environ[name])
    nvcc = shutil.which("nvcc", path=environ.get("PATH", ""))
    if nvcc:
        yield "PATH", _home_of(Path(nvcc))
    for folder in dict.fromkeys([*map(str, site_packages), sysconfig.get_path("purelib")]):
        home = Path(folder, "nvidia", f"cu{torch_cuda.split('.')[0]}")
        if (home / "bin" / "nvcc").exists():
            yield "pip", home


def _home_of(nvcc: Path) -> Path:
    """Ask nvcc itself: it may be a wrapper script that lies far from its toolkit."""
    top = re.search(r"^#\$ TOP=(.+)$", _run(nvcc, "--dryrun", "-x", "cu", os.devnull) or "", re.M)
    return Path(top.group(1).strip()).resolve() if top else nvcc.resolve().parent.parent


def _nvcc_version(home: Path) -> str | None:
    found = re.search(r"release (\d+\.\d+)", _run(home / "bin" / "nvcc", "--version") or "")
    return found.group(1) if found else None


def _missing_headers(home: Path) -> list[str]:
    folders = [f for folder in include_folders(home) for f in (folder, f"{folder}/cccl")]
    return [name for name in HEADERS if not any(Path(f, name).exists() for f in folders)]


def _run(*command: str | Path) -> str | None:
    """What the command prints, on either stream; None where it cannot run or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout + done.stderr if done.returncode == 0 else None
