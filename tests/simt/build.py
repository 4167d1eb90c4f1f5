"""Compiles what runs CUDA sources on the CPU, plainly or under sanitizers, and runs it."""

from __future__ import annotations

import fcntl
import functools
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
CXX = os.environ.get("CXX") or "g++"
FLAGS = ["-std=c++17", "-O1", "-g", "-rdynamic", "-Wall", "-Wextra", "-Werror"]
FLAGS += [f"-I{ROOT / folder}" for folder in ("csrc", "tests/simt")]
KINDS = {
    "plain": [],
    "address": ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"],
    "thread": ["-fsanitize=thread"],
}


class Done(NamedTuple):
    returncode: int
    stdout: bytes
    stderr: str


def _run(command: list[str], stdin: bytes = b"", timeout: float = 300, **environment: str) -> Done:
    done = subprocess.run(
        command,
        input=stdin,
        capture_output=True,
        env={**os.environ, **environment},
        timeout=timeout,
    )
    return Done(done.returncode, done.stdout, done.stderr.decode(errors="replace"))


def _compile(source: Path, kind: str, executable: Path) -> Done:
    return _run([CXX, *FLAGS, *KINDS[kind], str(source), "-ldl", "-o", str(executable)])


@functools.cache
def unavailable(kind: str) -> str | None:
    """Why nothing of this kind can be built and run here, or None."""
    if shutil.which(CXX) is None:
        return f"no {CXX}"
    with tempfile.TemporaryDirectory() as folder:
        source, executable = Path(folder, "nothing.cpp"), Path(folder, "nothing")
        source.write_text("int main() {}\n")
        done = _compile(source, kind, executable)
        if done.returncode == 0:
            done = run(executable)
    return f"{CXX}, {kind}: {done.stderr.strip()[-200:]}" if done.returncode else None


def build(source: Path, kind: str, out_dir: Path) -> Path:
    """The executable, built by the first of the processes that share `out_dir`."""
    executable = out_dir / f"{source.stem}-{kind}"
    with open(executable.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not executable.exists():
            done = _compile(source, kind, executable)
            if done.returncode:
                raise RuntimeError(f"{source.name}, {kind}:\n{done.stderr}")
    return executable


def run(
    executable: Path,
    *arguments: str,
    stdin: bytes = b"",
    timeout: float = 300,
    **environment: str,
) -> Done:
    """Runs it with these settings; a sanitizer ends it at its first finding."""
    options = {
        "ASAN_OPTIONS": "detect_leaks=0",
        "TSAN_OPTIONS": "halt_on_error=1",
        "UBSAN_OPTIONS": "halt_on_error=1",
    }
    return _run([str(executable), *arguments], stdin, timeout, **{**options, **environment})
