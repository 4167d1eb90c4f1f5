"""nvcc from pip, for a machine that has an NVIDIA GPU but no nvcc of torch's CUDA version.

python -m build_tools.toolkit    puts it into this environment, where it is wanted and not there

A build fetches it by itself and does not name it among its requirements: one that pip cannot
install fails the whole install, and a build is not told where pip may look (--index-url and such).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from .cuda import PIP_TOOLKIT, CudaCompiler, find_cuda

# The folder in which a build keeps the compiler that it fetched.
IN_TREE = Path(__file__).resolve().parents[1] / "build" / "cuda-toolkit"
SIZE = "105 MB for CUDA 13.0"  # as downloaded; pip says the size of each part


def find(*folders: Path) -> CudaCompiler:
    """The nvcc that is there for the torch that is installed; pip may have put it in `folders`."""
    return find_cuda(torch.version.cuda, os.environ, [Path(torch.__file__).parents[1], *folders])


def find_or_fetch(folder: Path = IN_TREE) -> CudaCompiler:
    """The nvcc that is there or, where one is wanted and there is none, that pip has."""
    found = find(folder)
    if found.home or torch.version.cuda is None:
        return found
    why_not = unwanted(torch.version.cuda, torch.cuda.is_available())
    why_not = why_not or fetch(torch.version.cuda, folder)
    return CudaCompiler(None, None, f"{found.why}; {why_not}") if why_not else find(folder)


def unwanted(torch_cuda: str, gpu: bool, environ: Mapping[str, str] = os.environ) -> str | None:
    """Why nvcc is not to be fetched; None where it is."""
    asked = environ.get("DA_OPS_CUDA")
    if asked == "0":
        return "it is not fetched: DA_OPS_CUDA=0"
    if asked != "1" and not gpu:
        return "it is not fetched, for torch finds no NVIDIA GPU here: DA_OPS_CUDA=1 fetches it"
    if int(torch_cuda.split(".")[0]) < 13:
        return (
            f"pip has none for CUDA {torch_cuda} (nvidia-cuda-nvcc-cu12 is without it): install "
            f"NVIDIA's CUDA toolkit {torch_cuda}, or a torch for CUDA 13, then da_ops again"
        )
    return None


def fetch(torch_cuda: str, folder: Path | None = None) -> str | None:
    """Have pip install nvcc into `folder`, by default into this environment; None, or why it could
    not be done."""
    wanted = f"{PIP_TOOLKIT}=={torch_cuda}.*"  # such as 13.0.*
    tell(f"no nvcc of torch's CUDA {torch_cuda} here; pip fetches {wanted} ({SIZE})")
    try:
        error = install(wanted, folder) if folder else run(*own_pip(), wanted)
    except OSError as problem:
        error = str(problem)
    if error is None:
        return None
    return f"it could not be fetched ({error}): `pip install '{wanted}'`, then install da_ops again"


def install(wanted: str, folder: Path) -> str | None:
    """Have pip put `wanted` into `folder`, all of it or nothing; None, or why it could not."""
    command = next((c for c in pips() if run(*c, "--help", quiet=True) is None), None)
    if command is None:
        return "there is no pip"
    unfinished = folder.with_name(f"{folder.name}.part")
    for leftover in (unfinished, folder):
        shutil.rmtree(leftover, ignore_errors=True)
    error = run(*command, "--target", str(unfinished), wanted)
    if error is None:
        unfinished.rename(folder)
        size = sum(f.lstat().st_size for f in folder.rglob("*") if f.is_file())
        tell(f"fetched nvcc into {folder}, {size / 1e6:.0f} MB on disk")
    else:
        shutil.rmtree(unfinished, ignore_errors=True)
    return error


def own_pip() -> list[str]:
    return [sys.executable, "-m", "pip", "install"]


def pips() -> Iterator[list[str]]:
    """Commands that may install into a folder: an isolated build need not have a pip of its own."""
    yield own_pip()
    if uv := os.environ.get("UV"):  # uv says where it is to what it builds
        yield [uv, "pip", "install", "--python", sys.executable]
    if pip := shutil.which("pip"):
        yield [pip, "install"]


def run(*command: str, quiet: bool = False) -> str | None:
    """Run a pip; None, or in a line what went wrong."""
    # pip hides this environment's packages, itself among them, from what it builds in isolation.
    hiding = ("PYTHONPATH", "PYTHONNOUSERSITE")
    environ = {name: value for name, value in os.environ.items() if name not in hiding}
    environ |= {"PIP_USER": "0", "PIP_RETRIES": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    output = subprocess.DEVNULL if quiet else sys.stderr
    done = subprocess.run(command, env=environ, stdout=output, stderr=subprocess.PIPE, text=True)
    if done.returncode == 0:
        return None
    if not quiet:
        print(done.stderr, file=sys.stderr)
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    errors = [line for line in lines if line.lower().startswith("error")]
    last = (errors or lines or [f"it ended with {done.returncode}"])[-1]
    return last.partition(";")[0].strip()  # without a requirement's conditions


def tell(text: str) -> None:
    print(f"da_ops: {text}", file=sys.stderr, flush=True)


def main() -> None:
    if torch.version.cuda is None or find().home:
        return
    if unwanted(torch.version.cuda, torch.cuda.is_available()):
        return  # the build says why
    if why_not := fetch(torch.version.cuda):
        tell(why_not)


if __name__ == "__main__":
    main()
