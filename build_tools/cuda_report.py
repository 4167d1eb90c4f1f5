"""What nvcc made of each CUDA kernel on each architecture. Needs nvcc, but no GPU.

python -m build_tools.cuda_report                   every architecture of ours that nvcc knows
python -m build_tools.cuda_report --arch sm_80 sm_90

Reads the machine code: of the library in the tree for the architectures that it has, if no source
is newer, else compiled for the purpose. Fails where it is not what cuda_limits.py says.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from . import cuda_limits, machine_code
from .cuda import NVCC_FLAGS, arch_list, find_cuda, gencode
from .cuda_limits import number

SOURCES = Path("csrc", "cuda")
LIBRARY = Path("da_ops", "_cuda.abi3.so")


@dataclass(frozen=True)
class Kernel:
    """A kernel on one architecture."""

    name: str
    arch: str
    code: machine_code.Function
    registers: int  # a thread
    local: int  # bytes a thread

    def faults(self) -> Iterator[str]:
        if self.local:
            yield f"expected no local memory, got {self.local} bytes of it"
        yield from cuda_limits.faults(self.name, self.arch, self.code)


LEGEND = """\
The loops that read x or dy, or the residual tail's tensors. Vectors are of 16 bytes: so many a
turn come from global memory, from shared memory, are stored. Instructions are those for a vector
that is loaded, at most: with every sum that the loop can be asked for, and of rows that begin
inside a vector. Vectors are in flight when they are asked for before the first is used. H100 and
H200: what share of all instructions that these GPUs, which are sm_90, can issue it is while their
memory moves 3.0 and 4.3 TB/s; "all that is kept" is a launch whose image stays in shared memory,
with all sums in all sweeps. On sm_75 the limit is larger by what rounding to bfloat16 takes
there."""

WORDS = {"6__half": "half", "13__nv_bfloat16": "bfloat16", "f": "float", "d": "double"}
WORDS |= {"Lb0E": "false", "Lb1E": "true"}
ENUMERATORS = {
    "Sums": ("forward", "backward", "through"),
    "Adds": ("rows", "cols", "any"),
    "Fit": ("whole", "split"),
    "Made": ("masks_of_sums", "masks_again", "terms"),
    "TailSums": ("moments", "deviations", "gradients", "rectified"),
    "TailScale": ("forward", "backward", "rectified", "normed"),
    "ChannelsAre": ("rows", "cols"),
}
ARGUMENT = "|".join([*WORDS, r"Li\d+E", r"LN\w+?E\d+E"])  # types, numbers, enumerators


def short_name(mangled: str) -> str:
    """scale<half, 8, true, split> for _ZN2da4cuda5scaleI6__halfLi8ELb1ELNS0_3FitE1EEEv...; another
    function's name as it is."""
    kernel = re.match(rf"_ZN2da4cuda\d+([a-z_0-9]+)(?:I((?:{ARGUMENT})+)E)?E", mangled)
    if not kernel:
        return mangled
    arguments = re.findall(ARGUMENT, kernel[2] or "")
    words = [WORDS.get(argument) or _value(argument) for argument in arguments]
    return f"{kernel[1]}<{', '.join(words)}>" if words else kernel[1]


def _value(argument: str) -> str:
    """A number, or an enumerator's name."""
    number = re.findall(r"\d+", argument)[-1]
    enumeration = re.search(r"\d([A-Za-z]+)E\d+E$", argument)
    return ENUMERATORS[enumeration[1]][int(number)] if enumeration else number


class Tools:
    """nvcc, and what takes machine code apart: of the same toolkit, on PATH, or Triton's."""

    def __init__(self, home: Path) -> None:
        self.nvcc = home / "bin" / "nvcc"
        triton = importlib.util.find_spec("triton")
        folders = [str(home / "bin"), os.environ.get("PATH", "")]
        if triton and triton.origin:
            folders.append(str(Path(triton.origin).parent / "backends" / "nvidia" / "bin"))
        path = os.pathsep.join(folders)
        self.cuobjdump, self.nvdisasm = (
            shutil.which(name, path=path) for name in ("cuobjdump", "nvdisasm")
        )

    def missing(self) -> str | None:
        if self.cuobjdump and self.nvdisasm:
            return None
        return (
            "cuobjdump and nvdisasm, which are neither in the CUDA toolkit nor on PATH. Install "
            "Triton, which brings them"
        )

    def compile(self, source: Path, arch: str, cubin: Path, include: Iterable[Path] = ()) -> Path:
        folders = [f"-I{folder}" for folder in (*include, "csrc")]
        target = gencode([re.sub(r"sm_(\d+)(\d)", r"\1.\2", arch)])
        command = [self.nvcc, *NVCC_FLAGS, *target, *folders]
        run(*command, "-cubin", source, "-o", cubin, why=f"{source} does not compile for {arch}")
        return cubin

    def extract(self, library: Path, folder: Path) -> dict[str, list[Path]]:
        """A library's binaries, by architecture."""
        run(self.cuobjdump, "-xelf", "all", library.resolve(), folder=folder)
        found: dict[str, list[Path]] = {}
        for cubin in sorted(folder.glob("*.cubin")):
            found.setdefault(cubin.suffixes[-2][1:], []).append(cubin)
        return found

    def kernels(self, cubin: Path, arch: str) -> list[Kernel]:
        usage = usages(run(self.cuobjdump, "-res-usage", cubin))
        found = machine_code.functions(run(self.nvdisasm, "-c", cubin))
        return [Kernel(short_name(code.name), arch, code, *usage[code.name]) for code in found]


def run(*command: object, folder: Path | None = None, why: str = "") -> str:
    words = [str(word) for word in command]
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{why or ' '.join(words)}:\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def usages(listing: str) -> dict[str, tuple[int, int]]:
    """Registers, and bytes of local memory, by function, in what `cuobjdump -res-usage` prints."""
    line = r"Function ([\w$.]+):\s+REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)"
    return {
        name: (int(registers), int(stack) + int(local))
        for name, registers, stack, local in re.findall(line, listing)
    }


def kernels(tools: Tools, archs: list[str]) -> list[Kernel]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        built = tools.extract(LIBRARY, folder) if up_to_date(LIBRARY) else {}
        if ready := [arch for arch in archs if arch in built]:
            print(f"{', '.join(ready)}: as in {LIBRARY}; other architectures: compiled\n")

        def read(job: tuple[Path, str]) -> list[Kernel]:
            file, arch = job
            if file.suffix == ".cu":
                file = tools.compile(file, arch, folder / f"{file.stem}.{arch}.cubin")
            return tools.kernels(file, arch)

        jobs = [
            (file, arch) for arch in archs for file in built.get(arch, sorted(SOURCES.glob("*.cu")))
        ]
        with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 2)) as pool:
            found = {
                (kernel.name, kernel.arch): kernel
                for kernels in pool.map(read, jobs)
                for kernel in kernels
            }
    return sorted(found.values(), key=lambda kernel: (kernel.name, number(kernel.arch)))


def up_to_date(library: Path) -> bool:
    sources = [file for file in SOURCES.parent.rglob("*") if file.is_file()]
    return library.exists() and all(
        file.stat().st_mtime <= library.stat().st_mtime for file in sources
    )


def by_name(kernels: Iterable[Kernel]) -> dict[str, dict[str, Kernel]]:
    found: dict[str, dict[str, Kernel]] = {}
    for kernel in kernels:
        found.setdefault(kernel.name, {})[kernel.arch] = kernel
    return found


def registers(kernels: list[Kernel], archs: list[str]) -> Iterator[list[str]]:
    yield ["registers a thread", *archs]
    for name, on in by_name(kernels).items():
        yield [name, *(str(on[arch].registers) if arch in on else "" for arch in archs)]


def hot_loops(kernels: list[Kernel], archs: list[str]) -> Iterator[list[str]]:
    """A line a loop over vectors; the worst where there are several alike."""
    gpus = list(cuda_limits.SLOTS)
    yield ["instructions a vector / in flight", "vectors", *archs, "limit", *gpus]
    for name, on in by_name(kernels).items():
        base, size, _ = cuda_limits.kernel_of(name)
        loops = {arch: dict(cuda_limits.found_loops(name, on[arch].code)) for arch in on}
        for hot in next(iter(loops.values())):
            found = {arch: loops[arch][hot] for arch in archs if arch in on}
            yield [
                f"{name} {hot.name}",
                "+".join(f"{count}" for count in hot.vectors),
                *(loop_cell(hot, found.get(arch, [])) for arch in archs),
                str(cuda_limits.limit_of(hot, size, "bfloat16" in name)),
                *(loop_share(hot, found.get("sm_90", []), gpu) if size < 8 else "" for gpu in gpus),
            ]
        if base in cuda_limits.MOVED:
            total = {
                arch: cuda_limits.kept_instructions(name, kernel.code)
                for arch, kernel in on.items()
            }
            moved = cuda_limits.MOVED[base]
            yield [
                f"{name} all that is kept",
                "",
                *(f"{total[arch]:.0f}" if total.get(arch) else "" for arch in archs),
                "",
                *(percent(total.get("sm_90"), moved, gpu) for gpu in gpus),
            ]


def loop_cell(hot: cuda_limits.HotLoop, loops: list[machine_code.Loop]) -> str:
    if not loops:
        return ""
    flight = min(loop.in_flight() for loop in loops)
    return f"{max(map(hot.instructions, loops)):.0f}" + (f"/{flight}" if hot.vectors[0] else "")


def loop_share(hot: cuda_limits.HotLoop, loops: list[machine_code.Loop], gpu: str) -> str:
    """What is kept on the chip waits for no memory."""
    loads, kept, stores = hot.vectors
    if kept or not loops:
        return ""
    return percent(max(map(hot.instructions, loops)), 1 + stores / loads, gpu)


def percent(instructions: float | None, moved: float, gpu: str) -> str:
    return f"{cuda_limits.share(instructions, moved, gpu):.0%}" if instructions else ""


def table(rows: Iterable[list[str]]) -> str:
    lines = list(rows)
    widths = [max(len(line[n]) for line in lines) for n in range(len(lines[0]))]
    return "\n".join(
        line[0].ljust(widths[0])
        + "".join(f"  {cell:>{width}}" for cell, width in zip(line[1:], widths[1:]))
        for line in lines
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m build_tools.cuda_report")
    parser.add_argument("--arch", nargs="+", help="such as sm_80; default: all of ours")
    asked = parser.parse_args(arguments).arch

    import torch

    cuda = find_cuda(torch.version.cuda, os.environ, [Path(torch.__file__).parents[1]])
    if cuda.home is None:
        print(f"cuda-report needs nvcc: {cuda.why}. Set CUDA_HOME or install it.", file=sys.stderr)
        return 1
    tools = Tools(cuda.home)
    if missing := tools.missing():
        print(f"cuda-report needs {missing}.", file=sys.stderr)
        return 1
    ours = [arch.partition("+")[0].replace(".", "") for arch in arch_list(cuda.home, {})]
    archs = sorted(asked or [f"sm_{arch}" for arch in ours], key=number)
    found = kernels(tools, archs)
    print(f"nvcc {cuda.version}\n\n{table(registers(found, archs))}\n\n{LEGEND}\n")
    print(table(hot_loops(found, archs)), end="\n\n")
    wrong = [f"{k.name} on {k.arch}: {fault}" for k in found for fault in k.faults()]
    print(*wrong, f"{len(wrong)} faults in {len(found)} kernels", sep="\n")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
