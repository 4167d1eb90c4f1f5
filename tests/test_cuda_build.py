"""The CUDA part as built: it loads without a GPU, and its kernels stay out of local memory."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from build_tools import cuda_report
from build_tools.cuda import CudaCompiler, find_cuda
from da_ops.backends.native import build_record

from .cases import FULL

ROOT = Path(__file__).resolve().parents[1]

LOAD = """
import sys, torch
for library in ("_cpu", "_cuda"):
    torch.ops.load_library(f"{sys.argv[1]}/da_ops/{library}.abi3.so")
for name in ("forward", "backward"):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"da_ops::{name}", "CUDA")
"""


def run(*command, **env):
    done = subprocess.run(
        [str(part) for part in command],
        cwd=ROOT,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_the_library_loads_without_a_gpu():
    state = build_record().get("cuda", {"built": False, "reason": "never built"})
    if not state["built"]:
        pytest.skip(f"the CUDA part was not built: {state['reason']}")
    run(sys.executable, "-c", LOAD, ROOT, CUDA_VISIBLE_DEVICES="")


def test_the_library_brings_its_runtime():
    """No libcudart, whose name has CUDA's version in it: one binary for every torch with CUDA."""
    library = ROOT / "da_ops" / "_cuda.abi3.so"
    if not library.exists():
        pytest.skip("the CUDA part was not built")
    assert b"libcudart.so" not in library.read_bytes()


@pytest.mark.slow
@pytest.mark.skipif(
    not FULL or torch.version.cuda is None, reason="DA_OPS_TEST_FULL=1 with a CUDA torch"
)
def test_it_builds_and_loads_with_the_compiler_from_pip(tmp_path):
    wanted = f"cuda-toolkit[nvcc,cccl,crt,nvvm]=={torch.version.cuda}.*"
    pip = (sys.executable, "-m", "pip")
    run(*pip, "install", "-q", "--target", tmp_path / "pip", wanted)
    (home,) = tmp_path.glob("pip/nvidia/cu*")
    # A copy of the tracked files, for the build must leave the working tree's alone.
    files = run("git", "ls-files", "-co", "--exclude-standard").splitlines()
    for name in filter(os.path.exists, files):
        (tmp_path / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "tree" / name).write_bytes((ROOT / name).read_bytes())
    out = tmp_path / "site"
    options = ["--no-build-isolation", "--no-deps", "--no-index", "-v", "--target", out]
    told = run(
        *pip,
        "install",
        *options,
        tmp_path / "tree",
        CUDA_HOME=str(home),
        DA_OPS_CUDA="1",
        TORCH_CUDA_ARCH_LIST="9.0",
    )
    assert f"{home}, from CUDA_HOME" in told
    run(sys.executable, "-c", LOAD, out, CUDA_VISIBLE_DEVICES="")


# Registers and spills

PTXAS = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_ZN2da4cuda4sumsI6__halfLi8ELNS0_4SumsE2EEEvNS0_4ArgsIfEE' for 'sm_90'
ptxas info    : Function properties for _ZN2da4cuda4sumsI6__halfLi8ELNS0_4SumsE2EEEvNS0_4ArgsIfEE
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 80 registers, used 1 barriers, 1024 bytes smem, 720 bytes cmem[0]
ptxas info    : Compile time = 10.0 ms
ptxas info    : Compiling entry function '_ZN2da4cuda5scaleIfLi4ELb1EEEvNS0_4ArgsIfEE' for 'sm_90'
ptxas info    : Function properties for _ZN2da4cuda5scaleIfLi4ELb1EEEvNS0_4ArgsIfEE
    24 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers
"""  # noqa: E501
CLEAN = cuda_report.Usage("sums<half, 8, 2>", "sm_90", 80, 1024)
SPILLING = cuda_report.Usage("scale<float, 4, true>", "sm_90", 255, 0, 24, 8, 12)


def test_what_ptxas_prints_is_understood():
    assert cuda_report.parse(PTXAS, "sm_90") == [CLEAN, SPILLING]


def test_a_spilling_kernel_is_named():
    (complaint,) = cuda_report.complaints([CLEAN, SPILLING])
    assert complaint.startswith("scale<float, 4, true> on sm_90: expected no local memory, got")
    for number in ("24 bytes", "8 bytes of spill stores", "12 of spill loads"):
        assert number in complaint


@pytest.mark.parametrize("usage", [CLEAN, SPILLING])
def test_the_report_fails_on_a_spill_only(usage, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(cuda_report, "find_cuda", lambda *_: CudaCompiler(tmp_path, "13.0", "PATH"))
    monkeypatch.setattr(cuda_report, "compile_for", lambda *_: [usage])
    assert cuda_report.main(["--arch", "sm_90"]) == (usage is SPILLING)
    assert usage.kernel in capsys.readouterr().out


def test_the_report_says_when_there_is_no_nvcc(monkeypatch, capsys):
    monkeypatch.setattr(cuda_report, "find_cuda", lambda *_: CudaCompiler(None, None, "no nvcc"))
    assert cuda_report.main([]) == 1
    assert "cuda-report needs nvcc: no nvcc" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("mangled", "name"),
    [
        ("_ZN2da4cuda4foldIdEEvNS0_4ArgsIT_EE", "fold<double>"),
        ("_ZN2da4cuda9gate_sumsI13__nv_bfloat16EEvv", "gate_sums<bfloat16>"),
        ("_ZN2da4cuda5plainEv", "plain"),
        ("__internal_something", "__internal_something"),
    ],
)
def test_names_are_short(mangled, name):
    assert cuda_report.short_name(mangled) == name


@pytest.mark.slow
@pytest.mark.skipif(find_cuda(torch.version.cuda).home is None, reason="needs nvcc")
def test_no_kernel_uses_local_memory():
    table = run(sys.executable, "-m", "build_tools.cuda_report", "--arch", "sm_80", "sm_90")
    for kernel in ("sums<half, 8, 0>", "scale<float, 4, true>", "finish<double>"):
        assert kernel in table
