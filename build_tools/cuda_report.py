"""What each CUDA kernel takes of a multiprocessor on each architecture. Needs nvcc, but no GPU.

python -m build_tools.cuda_report                   every architecture of ours that nvcc knows
python -m build_tools.cuda_report --arch sm_80 sm_90

Fails where a kernel keeps registers or arrays in local memory, which is as slow as global memory.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from .cuda import NVCC_FLAGS, arch_list, find_cuda

SOURCES = Path("csrc", "cuda")


@dataclass(frozen=True)
class Usage:
    """What ptxas says of one kernel on one architecture; all but registers in bytes."""

    kernel: str
    arch: str
    registers: int = 0
    shared: int = 0  # static: what a launch asks for comes on top
    stack: int = 0
    spill_stores: int = 0
    spill_loads: int = 0

    @property
    def local(self) -> int:
        return self.stack + self.spill_stores + self.spill_loads


def parse(output: str, arch: str) -> list[Usage]:
    """Every kernel, and every function that was not inlined, in what `ptxas -v` printed."""
    found: dict[str, dict[str, int]] = {}
    name = ""
    for line in output.splitlines():
        if about := re.search(r"(?:Function properties for|entry function) '?([\w$.]+)", line):
            name = about[1]
            found.setdefault(name, {})
        elif frame := re.search(r"(\d+) bytes stack frame, (\d+) .* stores, (\d+) .* loads", line):
            values = map(int, frame.groups())
            found[name].update(zip(("stack", "spill_stores", "spill_loads"), values))
        elif used := re.search(r"Used (\d+) registers", line):
            shared = re.search(r"(\d+) bytes smem", line)
            found[name].update(registers=int(used[1]), shared=int(shared[1]) if shared else 0)
    return [Usage(short_name(name), arch, **values) for name, values in found.items()]


WORDS = {"6__half": "half", "13__nv_bfloat16": "bfloat16", "f": "float", "d": "double"}
WORDS |= {"Lb0E": "false", "Lb1E": "true"}
ARGUMENT = "|".join([*WORDS, r"Li\d+E", r"LN\w+?E\d+E"])  # types, numbers, enumerators


def short_name(mangled: str) -> str:
    """sums<half, 8, 2> for _ZN2da4cuda4sumsI6__halfLi8ELNS0_4SumsE2EEEv...; else as it is."""
    kernel = re.match(rf"_ZN2da4cuda\d+([a-z_0-9]+)(?:I((?:{ARGUMENT})+)E)?E", mangled)
    if not kernel:
        return mangled
    arguments = re.findall(ARGUMENT, kernel[2] or "")
    words = [WORDS.get(argument) or re.findall(r"\d+", argument)[-1] for argument in arguments]
    return f"{kernel[1]}<{', '.join(words)}>" if words else kernel[1]


def compile_for(nvcc: Path, source: Path, arch: str) -> list[Usage]:
    number = arch.removeprefix("sm_")
    command = [nvcc, *NVCC_FLAGS, f"-gencode=arch=compute_{number},code={arch}", "-Icsrc"]
    command += ["-cubin", "-Xptxas=-v", source, "-o", os.devnull]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{source} does not compile for {arch}:\n{done.stdout}{done.stderr}")
    return parse(done.stdout + done.stderr, arch)


def table(usages: Iterable[Usage]) -> str:
    """A line per kernel: registers on each architecture, the most it takes of all else."""
    kernels: dict[str, dict[str, Usage]] = {}
    for usage in usages:
        kernels.setdefault(usage.kernel, {})[usage.arch] = usage
    archs = list(dict.fromkeys(arch for by_arch in kernels.values() for arch in by_arch))
    archs.sort(key=lambda arch: int(re.sub(r"\D", "", arch)))
    width = max(map(len, kernels), default=0)
    head = "".join(f"{arch:>7}" for arch in archs)
    lines = [f"{'registers':<{width}}{head} |  shared   stack  spills"]
    for kernel, by_arch in sorted(kernels.items()):
        cells = (str(by_arch[arch].registers) if arch in by_arch else "" for arch in archs)
        most = [
            max(usage.shared for usage in by_arch.values()),
            max(usage.stack for usage in by_arch.values()),
            max(usage.spill_stores + usage.spill_loads for usage in by_arch.values()),
        ]
        row = "".join(f"{cell:>7}" for cell in cells)
        lines.append(f"{kernel:<{width}}{row} |" + "".join(f"{number:>8}" for number in most))
    return "\n".join(lines)


def complaints(usages: Iterable[Usage]) -> list[str]:
    return [
        f"{u.kernel} on {u.arch}: expected no local memory, got a stack frame of {u.stack} bytes, "
        f"{u.spill_stores} bytes of spill stores and {u.spill_loads} of spill loads"
        for u in usages
        if u.local
    ]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m build_tools.cuda_report")
    parser.add_argument("--arch", nargs="+", help="such as sm_80; default: all of ours")
    asked = parser.parse_args(arguments).arch

    import torch

    cuda = find_cuda(torch.version.cuda, os.environ, [Path(torch.__file__).parents[1]])
    if cuda.home is None:
        print(f"cuda-report needs nvcc: {cuda.why}. Set CUDA_HOME or install it.", file=sys.stderr)
        return 1
    ours = [arch.partition("+")[0].replace(".", "") for arch in arch_list(cuda.home, {})]
    archs = asked or [f"sm_{number}" for number in ours]
    nvcc = cuda.home / "bin" / "nvcc"
    jobs = [(nvcc, source, arch) for source in sorted(SOURCES.glob("*.cu")) for arch in archs]
    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 2)) as pool:
        reports = pool.map(lambda job: compile_for(*job), jobs)
        usages = list(dict.fromkeys(usage for report in reports for usage in report))
    print(f"nvcc {cuda.version}; registers a thread, all else in bytes, the most of any arch\n")
    print(table(usages))
    wrong = complaints(usages)
    print(*wrong, f"{len(wrong)} kernels use local memory" if wrong else "", sep="\n")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
