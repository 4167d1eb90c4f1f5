"""Small calls of the kernels on a GPU, compared with float64.

    python -m benchmarks.gpu.smoke [--targets cuda,cuda-block,triton,...] [--few]

A target is a backend, and a plan of it behind a dash (DA_OPS_PLAN; "cuda" alone is cuda-portable).
What cannot be had here is skipped, and the reason told.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
from collections.abc import Iterator
from typing import Any

import torch

from benchmarks.tally import Tally

SHAPES = ((2, 16, 7, 7), (3, 33, 5, 6), (1, 64, 14, 14), (1, 3, 40, 41))
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LAYOUTS = (torch.contiguous_format, torch.channels_last)
FEW = 2  # shapes and types
CUDA = ("cuda-portable", "cuda-block", "cuda-cluster", "cuda-counter")
PLAN = "DA_OPS_PLAN"


def calls(few: bool) -> Iterator[tuple[Any, ...]]:
    """Shape, order, gate, layout and type of each."""
    from da_ops.reference import GATES, ORDERS

    most = FEW if few else None
    pairs = [(order, "affine") for order in ORDERS] + [("spatial_channel", g) for g in GATES[1:]]
    for shape, (order, gate) in itertools.product(SHAPES[:most], pairs):
        for layout, dtype in itertools.product(LAYOUTS, DTYPES[:most]):
            yield shape, order, gate, layout, dtype


def run(backend: str, device: str, tally: Tally, few: bool = False) -> list[str]:
    """Forward and backward of every call; what was wrong."""
    from da_ops import accuracy

    wrong = []
    todo = list(calls(few or backend == "triton"))
    todo = todo[:4] if backend == "triton" else todo  # which compiles a dozen kernels for each
    tally.of += len(todo)
    torch.manual_seed(0)
    for shape, order, gate, layout, dtype in todo:
        name = f"{tuple(shape)} {order} {gate} {dtype} {layout}"
        x, dy = (torch.randn(shape).to(dtype, memory_format=layout) for _ in range(2))
        given = [None if p is None else p.to(dtype) for p in weights(shape[1], order, gate)]
        there = [None if t is None else t.to(device) for t in given]
        try:
            got = results(x.to(device), dy.to(device), there, (order, gate, backend))
        except RuntimeError as error:
            if f"{PLAN}=" not in str(error):
                raise
            tally.add("skipped")  # this plan cannot serve this call
            print(f"skipped: {name}: {str(error).splitlines()[0]}")
            continue
        # On the CPU: a sanitizer is slow, and these kernels are not what it is to look at.
        want = accuracy.exact(dy, x, *given, order=order, gate=gate)
        on_cpu = {key: value.cpu() for key, value in got.items()}
        broken = accuracy.broken([accuracy.errors(on_cpu, want)])
        wrong += [f"{name}: {text}" for text in broken]
        tally.add("failed" if broken else "passed")
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


def without(backend: str) -> str | None:
    """Why a backend cannot be had on this machine, where that is no fault of ours: no nvcc."""
    import da_ops
    from da_ops.backends.native import build_record

    cuda = build_record().get("cuda")
    nvcc = cuda is None or cuda["built"] or cuda.get("compiler")
    return da_ops.backends()[backend] if backend == "cuda" and not nvcc else None


def lost() -> bool:
    """Whether the GPU can no longer be used by this process, as after an access to memory that is
    not there."""
    try:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def main(arguments: list[str] | None = None) -> int:
    kind = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        "python -m benchmarks.gpu.smoke", description=__doc__, formatter_class=kind
    )
    parser.add_argument("--targets", default=",".join(CUDA))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--few", action="store_true", help="few shapes and types")
    options = parser.parse_args(arguments)
    # Nothing here is measured.
    os.environ["DA_OPS_TRITON_AUTOTUNE"] = os.environ.get("DA_OPS_TRITON_AUTOTUNE") or "0"
    import da_ops

    usable, tally, failed = da_ops.backends(), Tally(), 0
    for target in options.targets.split(","):
        backend, _, plan = target.partition("-")
        os.environ[PLAN] = plan or ("portable" if backend == "cuda" else "")
        if reason := without(backend):
            tally.of += 1
            tally.add("skipped")
            print(f"skipped: {target}: {reason}")
            continue
        try:
            if usable[backend]:
                raise RuntimeError(usable[backend])
            wrong = run(backend, options.device, tally, options.few)
        except RuntimeError as error:
            wrong = [f"{target}: {error}"]
            tally.add("failed")
        print(*wrong[:20], f"{target}: {'failed' if wrong else 'right'}", sep="\n", flush=True)
        failed += bool(wrong)
        if wrong and lost():
            print("the GPU's context is lost: nothing more was tried")
            break
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
