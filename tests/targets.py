"""Compiles the Triton kernels for GPUs that need not be there; run by test_triton.py in a process
of its own, where Triton compiles. Prints what it made of them, as JSON."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from da_ops.backends.triton import launch, run, tune

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


def resources(binary):
    with TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(binary)
        command = [CUOBJDUMP, "-res-usage", file]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack, local = (
        int(re.search(rf"\b{what}:(\d+)", text).group(1)) for what in ("REG", "STACK", "LOCAL")
    )
    return {"registers": registers, "spilled": stack + local}


def compiled(kernel, target, arguments, options):
    """What a launch would compile, specialised by Triton itself; tensors count as aligned."""
    backend = make_backend(TARGETS[target])
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    options = {"enable_fp_fusion": True, **options}
    bound, specialization, others = bind(*arguments, **options)
    others, *source = kernel._pack_args(backend, options, bound, specialization, others)
    made = triton.compile(ASTSource(kernel, *source), TARGETS[target], vars(others))
    if "ptx" in made.asm:
        accesses = re.findall(r"\b(?:ld|st)\.global\S*", made.asm["ptx"])
        return {
            "wide": sum(".v4.b32" in access for access in accesses),
            "narrow": sum(access.endswith((".b16", ".u16", ".b8")) for access in accesses),
            **resources(made.asm["cubin"]),
        }
    scalar, vector = re.findall(r"[sv]gpr_spill_count: +(\d+)", made.asm["amdgcn"])
    return {
        "wide": len(re.findall(r"_(?:load|store)_dwordx4", made.asm["amdgcn"])),
        "narrow": len(re.findall(r"_(?:load_u|store_)short", made.asm["amdgcn"])),
        "registers": int(re.search(r"\.vgpr_count: +(\d+)", made.asm["amdgcn"]).group(1)),
        "spilled": int(scalar) + int(vector),
    }


def launches(shape, layout, dtype, order, gate):
    """The kernels of one call forward and backward with their arguments; none is run."""
    made = []

    def note(kernel, programs, *arguments, **options):
        made.append((kernel, arguments, options))

    launch.run = tune.run = note
    tune._may_measure = lambda: False
    x = torch.empty(shape, dtype=dtype, device="meta").contiguous(memory_format=layout)
    size = {"affine": shape[1], "scalar": 1, "eca": 5}.get(gate)
    spatial = order != "channel"
    parameters = [
        torch.empty(1, 1, 3, 3, device="meta") if spatial else None,
        torch.empty(1, 1, 3, 3, device="meta") if spatial else None,
        torch.empty(1, 2, 1, 1, device="meta") if spatial else None,
        torch.empty(1, device="meta") if spatial else None,
        torch.empty(size, device="meta") if size and order != "spatial" else None,
        torch.empty(size, device="meta") if size and order != "spatial" and gate != "eca" else None,
    ]
    if dtype == torch.float64:
        parameters = [None if p is None else p.double() for p in parameters]
    _, m, g = launch.forward(x, *parameters, order, gate)
    launch.backward(x, x, *parameters, m, g, order, gate)
    return made


def main():
    """One JSON object: for each case on standard input, its kernels by name."""
    assert not run.INTERPRETED
    answers = []
    for target, shape, layout, dtype, order, gate in json.load(sys.stdin):
        kernels = []
        call = launches(shape, getattr(torch, layout), getattr(torch, dtype), order, gate)
        for kernel, arguments, options in call:
            made = compiled(kernel, target, arguments, options)
            kernels.append({"kernel": kernel.__name__, **made})
        answers.append(kernels)
    json.dump(answers, sys.stdout)


if __name__ == "__main__":
    main()
