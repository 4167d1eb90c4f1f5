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

from da_ops.backends.triton import launch, run, tail, tune

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


def launches(shape, layout, dtype, order, gate, shortcut):
    """The kernels of one call forward and backward with their arguments; none is run. Of the layer;
    or in training of the residual tail, if `shortcut` says whether there is one."""
    made = []

    def note(kernel, programs, *arguments, **options):
        made.append((kernel, arguments, options))

    launch.run = tune.run = tail.run = note
    tune._may_measure = lambda: False
    x = torch.empty(shape, dtype=dtype, device="meta").contiguous(memory_format=layout)
    size = {"affine": shape[1], "scalar": 1, "eca": 5}.get(gate)
    spatial = order not in ("channel", "none")
    parameters = [
        torch.empty(1, 1, 3, 3, device="meta") if spatial else None,
        torch.empty(1, 1, 3, 3, device="meta") if spatial else None,
        torch.empty(1, 2, 1, 1, device="meta") if spatial else None,
        torch.empty(1, device="meta") if spatial else None,
        torch.empty(size, device="meta") if size and order not in ("spatial", "none") else None,
        torch.empty(size, device="meta")
        if size and order not in ("spatial", "none") and gate != "eca"
        else None,
    ]
    parameters_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    parameters = [None if p is None else p.to(parameters_dtype) for p in parameters]
    if shortcut is not None:
        norm = [torch.empty(shape[1], dtype=parameters_dtype, device="meta") for _ in range(2)]
        attention = (*parameters, order, gate)
        inputs = x, x if shortcut else None, *norm, None, None, 1e-5
        _, *statistics, m, g = tail.residual_forward(*inputs, *attention)
        kept = (*norm, *statistics, True, 1e-5, *parameters, m, g, order, gate)
        tail.residual_backward(x, x if shortcut else None, x, *kept)
    else:
        _, m, g = launch.forward(x, *parameters, order, gate)
        launch.backward(x, x, *parameters, m, g, order, gate)
    return made


def main():
    """One JSON object: for each case on standard input, its kernels by name. A case is a target,
    x's shape, layout and dtype, the order, the gate, and null for the layer, or whether the
    residual tail has a shortcut."""
    assert not run.INTERPRETED
    answers = []
    for target, shape, layout, dtype, order, gate, shortcut in json.load(sys.stdin):
        kernels = []
        kinds = getattr(torch, layout), getattr(torch, dtype)
        call = launches(shape, *kinds, order, gate, shortcut)
        for kernel, arguments, options in call:
            made = compiled(kernel, target, arguments, options)
            kernels.append({"kernel": kernel.__name__, **made})
        answers.append(kernels)
    json.dump(answers, sys.stdout)


if __name__ == "__main__":
    main()
