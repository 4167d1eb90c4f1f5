"""Small calls of the kernels on a GPU, compared with float64: few of Triton's, which compiles each.

    python -m benchmarks.smoke [--backends cuda,triton]   fails where one is not usable
    python -m benchmarks.smoke --sanitize                 the same under compute-sanitizer's tools

The tools run beside each other: memcheck over both backends, racecheck and synccheck over the CUDA
kernels (Triton places its own barriers).
"""

from __future__ import annotations

import argparse
import itertools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch

SHAPES = ((2, 16, 7, 7), (3, 33, 5, 6), (1, 64, 14, 14), (1, 3, 40, 41))
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
FEW = 2  # shapes and types
TOOLS = {"memcheck": "cuda,triton", "racecheck": "cuda", "synccheck": "cuda"}
NO_TOOL = "compute-sanitizer is not on the PATH nor in CUDA_HOME: it comes with the CUDA toolkit"


def run(backend: str, device: str, few: bool = False) -> list[str]:
    """Orders, gates, layouts and types forward and backward; what was wrong."""
    from da_ops import accuracy
    from da_ops.reference import GATES, ORDERS

    wrong = []
    layouts = (torch.contiguous_format, torch.channels_last)
    pairs = [(order, "affine") for order in ORDERS] + [("spatial_channel", g) for g in GATES[1:]]
    pairs = pairs[:1] if backend == "triton" else pairs
    most = FEW if few or backend == "triton" else None
    torch.manual_seed(0)
    for shape, (order, gate) in itertools.product(SHAPES[:most], pairs):
        for layout, dtype in itertools.product(layouts, DTYPES[:most]):
            name = f"{backend} {shape} {order} {gate} {dtype} {layout}"
            x, dy = (torch.randn(shape).to(device, dtype, memory_format=layout) for _ in range(2))
            given = [
                None if p is None else p.to(device, dtype) for p in weights(shape[1], order, gate)
            ]
            got = results(x, dy, given, (order, gate, backend))
            want = accuracy.exact(dy, x, *given, order=order, gate=gate)
            broken = accuracy.broken([accuracy.errors(got, want)])
            wrong += [f"{name}: {text}" for text in broken]
    return wrong


def weights(channels: int, order: str, gate: str) -> list[torch.Tensor | None]:
    """As a layer starts with them, and a gate that makes use of what was pooled."""
    conv, dilated = (torch.randn(1, 1, 3, 3) / 3 for _ in range(2))
    spatial = [conv, dilated, torch.randn(1, 2, 1, 1), torch.randn(1)]
    size = {"affine": channels, "scalar": 1, "eca": 3, "sigmoid": 0}[gate]
    weight = torch.randn(size) if size else None
    bias = torch.randn(size) if gate in ("affine", "scalar") else None
    return [
        *(spatial if order != "channel" else [None] * 4),
        *([weight, bias] if order != "spatial" else [None] * 2),
    ]


def results(
    x: torch.Tensor, dy: torch.Tensor, weights: list[torch.Tensor | None], how: tuple[str, ...]
) -> dict[str, torch.Tensor]:
    """y, dx and the gradient of every weight, named as in da_ops.accuracy."""
    import da_ops
    from da_ops.accuracy import PARAMETERS

    leaves = [None if t is None else t.detach().requires_grad_() for t in (x, *weights)]
    y = da_ops.DAFunction.apply(*leaves, *how)
    names = ("dx", *(f"d_{name}" for name in PARAMETERS))
    given = {name: t for name, t in zip(names, leaves, strict=True) if t is not None}
    return {"y": y.detach(), **dict(zip(given, torch.autograd.grad(y, [*given.values()], dy)))}


def sanitizer() -> str | None:
    """The program, or None."""
    home = os.environ.get("CUDA_HOME") or "/usr/local/cuda"
    return shutil.which("compute-sanitizer") or shutil.which(
        "compute-sanitizer", path=os.pathsep.join([f"{home}/bin", f"{home}/compute-sanitizer"])
    )


def sanitize() -> int:
    """Each tool in a process of its own, all at once; prints what they found."""
    program = sanitizer()
    if program is None:
        print(f"{NO_TOOL}\n0 passed, {len(TOOLS)} skipped")
        return 0
    # Every tensor an allocation of its own, so that no overrun stays unseen.
    environment = os.environ | {
        "PYTORCH_NO_CUDA_MEMORY_CACHING": "1",
        "PYTHONUNBUFFERED": "1",
    }
    running = {}
    for tool, backends in TOOLS.items():
        command = [program, "--tool", tool, "--error-exitcode", "9", "--print-limit", "20"]
        command += [sys.executable, "-m", "benchmarks.smoke", "--few", "--backends", backends]
        running[tool] = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            cwd=Path(__file__).resolve().parents[1],
        )  # fmt: skip
    failed = 0
    for tool, process in running.items():
        said, _ = process.communicate()
        print(f"---- {tool}: exit status {process.returncode}\n{said[-3000:]}", flush=True)
        failed += process.returncode != 0
    print(f"{len(TOOLS) - failed} passed, {failed} failed")
    return int(failed > 0)


def main(arguments: list[str] | None = None) -> int:
    kind = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        "python -m benchmarks.smoke", description=__doc__, formatter_class=kind
    )
    parser.add_argument("--backends", default="cuda,triton")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--few", action="store_true", help="few shapes and types")
    parser.add_argument("--sanitize", action="store_true")
    options = parser.parse_args(arguments)
    if options.sanitize:
        return sanitize()
    if options.device == "cuda":
        # Nothing here is measured.
        os.environ["DA_OPS_TRITON_AUTOTUNE"] = os.environ.get("DA_OPS_TRITON_AUTOTUNE") or "0"
    import da_ops

    usable, failed = da_ops.backends(), 0
    for backend in options.backends.split(","):
        try:
            if usable[backend]:
                raise RuntimeError(usable[backend])
            wrong = run(backend, options.device, options.few)
        except RuntimeError as error:
            wrong = [f"{backend}: {error}"]
        print(*wrong[:20], f"{backend}: {'failed' if wrong else 'right'}", sep="\n")
        failed += bool(wrong)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
