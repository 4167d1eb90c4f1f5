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
from triton.compiler import ASTSource

from da_ops.backends.triton import launch, run, tune

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
TYPES = {
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
}


def source(kernel, arguments, constants):
    """As Triton's own launcher specialises: on None, on 1 and on what 16 divides."""
    signature, constexprs, attributes = {}, {}, {}
    for i, name in enumerate(kernel.arg_names):
        value = arguments[i] if i < len(arguments) else constants[name]
        if i >= len(arguments) or value is None or (isinstance(value, int) and value == 1):
            signature[name] = "constexpr"
            constexprs[(i,)] = value
        elif isinstance(value, torch.Tensor):
            signature[name] = TYPES[value.dtype]
            attributes[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "i32"
            if value % 16 == 0:
                attributes[(i,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, constexprs=constexprs, attrs=attributes)


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
    constants = {k: v for k, v in options.items() if k in kernel.arg_names}
    others = {k: v for k, v in options.items() if k not in constants}
    made = triton.compile(
        source(kernel, arguments, constants), TARGETS[target], {"enable_fp_fusion": True, **others}
    )
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
