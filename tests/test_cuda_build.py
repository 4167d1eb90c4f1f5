"""The CUDA part as built: it loads without a GPU, and its machine code is what its source means."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from build_tools import cuda_report
from build_tools.cuda import CudaCompiler, find_cuda, include_folders
from build_tools.machine_code import Function
from da_ops.backends.native import build_record

from .simt.build import CXX

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


# Machine code

USAGE = """
Resource usage:
 Common:
  GLOBAL:0
 Function _ZN2da4cuda5scaleIfLi4ELb1EEEvNS0_4ArgsIfEE:
  REG:255 STACK:24 SHARED:1024 LOCAL:8 CONSTANT[0]:880 TEXTURE:0 SURFACE:0 SAMPLER:0
 Function _ZN2da4cuda6finishIdEEvNS0_4ArgsIT_EE:
  REG:32 STACK:0 SHARED:0 LOCAL:0 CONSTANT[0]:880 TEXTURE:0 SURFACE:0 SAMPLER:0
"""


def kernel(local):
    return cuda_report.Kernel("finish<double>", "sm_80", Function("_Z6finish", (), ()), 32, local)


def test_registers_and_local_memory_are_read():
    assert cuda_report.usages(USAGE) == {
        "_ZN2da4cuda5scaleIfLi4ELb1EEEvNS0_4ArgsIfEE": (255, 32),
        "_ZN2da4cuda6finishIdEEvNS0_4ArgsIT_EE": (32, 0),
    }


@pytest.mark.parametrize("local", [0, 24])
def test_the_report_fails_on_a_fault_only(local, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(cuda_report, "find_cuda", lambda *_: CudaCompiler(tmp_path, "13.0", "PATH"))
    monkeypatch.setattr(cuda_report, "kernels", lambda *_: [kernel(local)])
    monkeypatch.setattr(cuda_report.Tools, "missing", lambda _: None)
    assert cuda_report.main(["--arch", "sm_80"]) == bool(local)
    told = "finish<double> on sm_80: expected no local memory, got 24 bytes of it"
    assert (told in capsys.readouterr().out) == bool(local)


def test_the_report_says_what_it_needs_to_read_machine_code(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(cuda_report, "find_cuda", lambda *_: CudaCompiler(tmp_path, "13.0", "PATH"))
    monkeypatch.setattr(cuda_report.importlib.util, "find_spec", lambda _: None)
    monkeypatch.setenv("PATH", "")
    assert cuda_report.main([]) == 1
    assert "cuda-report needs cuobjdump and nvdisasm" in capsys.readouterr().err


def test_a_library_older_than_a_source_is_not_read(monkeypatch, tmp_path):
    library, source = tmp_path / "library.so", tmp_path / "csrc" / "cuda" / "a.cuh"
    source.parent.mkdir(parents=True)
    source.touch()
    monkeypatch.setattr(cuda_report, "SOURCES", source.parent)
    assert not cuda_report.up_to_date(library)
    library.touch()
    os.utime(source, (1, 1))
    assert cuda_report.up_to_date(library)
    os.utime(library, (0, 0))
    assert not cuda_report.up_to_date(library)


def test_the_report_says_when_there_is_no_nvcc(monkeypatch, capsys):
    monkeypatch.setattr(cuda_report, "find_cuda", lambda *_: CudaCompiler(None, None, "no nvcc"))
    assert cuda_report.main([]) == 1
    assert "cuda-report needs nvcc: no nvcc" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("mangled", "name"),
    [
        ("_ZN2da4cuda6finishIdEEvNS0_4ArgsIT_EE", "finish<double>"),
        ("_ZN2da4cuda6finishI13__nv_bfloat16EEvv", "finish<bfloat16>"),
        (
            "_ZN2da4cuda9tail_sumsI6__halfLi8ELNS0_8TailSumsE2ELNS0_11ChannelsAreE0EEEvv",
            "tail_sums<half, 8, gradients, rows>",
        ),
        ("_ZN2da4cuda5plainEv", "plain"),
        ("__internal_something", "__internal_something"),
    ],
)
def test_names_are_short(mangled, name):
    assert cuda_report.short_name(mangled) == name


SUMS, SCALE = "sums<half, 8, forward, rows, whole>", "scale<half, 8, false, whole>"
CUDA = find_cuda(torch.version.cuda)
READS_CODE = CUDA.home is not None and cuda_report.Tools(CUDA.home).missing() is None
needs_nvcc = pytest.mark.skipif(not READS_CODE, reason="needs nvcc, cuobjdump and nvdisasm")


@pytest.mark.slow
@needs_nvcc
def test_the_machine_code_is_within_its_limits():
    table = run(sys.executable, "-m", "build_tools.cuda_report", "--arch", "sm_80", "sm_90")
    for kernel in (f"{SUMS} x", "scale<float, 4, true, split> dx", "finish<double>"):
        assert f"\n{kernel} " in table


# Faults in simt.cuh that no test on the CPU can see: what stands there, what stands there instead,
# and what is then said of which kernel.
PLANTED = {
    "none": (("", ""), {}),
    "a load through a reference": (
        ("SIMT_HD To bit_cast(From from) {", "SIMT_HD To bit_cast(const From& from) {"),
        {
            SUMS: [
                "expected accesses of 2 bytes and more, got 160 of 1",
                "loops over 4+0+0 vectors (from global, from shared, stored): expected 1, got 0",
            ]
        },
    ),
    "a store word by word": (
        (
            "  store_once(static_cast<Vector*>(address), value);\n",
            "  for (int i = 0; i < 4; i++)\n"
            "    store_once(static_cast<uint32_t*>(address) + i, value.word[i]);\n",
        ),
        {
            SCALE: [
                "loops over 4+0+4 vectors (from global, from shared, stored): expected 1, got 0",
                "got one over 4+0+0 vectors",
            ]
        },
    ),
    "local memory": (
        ("(from.word[i], to + 2 * i)", "(from.word[i], to + (2 * i ^ (thread() & 2)))"),
        {
            SUMS: ["expected no local memory, got 32 bytes", "accesses (STL"],
            SCALE: ["expected no local memory, got 32 bytes", "accesses (STL"],
        },
    ),
}
TWO_KERNELS = """\
#include "cuda/portable/passes.cuh"
namespace da::cuda {
template __global__ void sums<simt::float16, 8, Sums::forward, Adds::rows, Fit::whole>(
    SIMT_PARAM Args<float>);
template __global__ void scale<simt::float16, 8, false, Fit::whole>(SIMT_PARAM Args<float>);
}
"""


@pytest.mark.slow
@needs_nvcc
@pytest.mark.parametrize("fault", PLANTED)
def test_a_planted_fault_is_found_in_the_machine_code(fault, tmp_path, monkeypatch):
    (good, bad), told = PLANTED[fault]
    monkeypatch.chdir(ROOT)
    text = Path("csrc", "cuda", "simt", "simt.cuh").read_text()
    assert good in text
    changed = tmp_path / "cuda" / "simt" / "simt.cuh"
    changed.parent.mkdir(parents=True)
    changed.write_text(text.replace(good, bad) if good else text)
    (tmp_path / "two.cu").write_text(TWO_KERNELS)
    tools = cuda_report.Tools(CUDA.home)
    cubin = tools.compile(tmp_path / "two.cu", "sm_90", tmp_path / "two.cubin", [tmp_path])
    found = {kernel.name: list(kernel.faults()) for kernel in tools.kernels(cubin, "sm_90")}
    assert set(found) == {SUMS, SCALE}
    for kernel, faults in found.items():
        assert bool(faults) == (kernel in told), faults
        for part in told.get(kernel, []):
            assert any(part in fault for fault in faults), faults


# Launches

# Two threads launch a kernel with different amounts of shared memory: in a runtime of our own, the
# second one in the midst of the first one's launch.
TWO_THREADS = """
#include <cuda_runtime_api.h>

constexpr int kMost = 227 << 10;
int permitted = 48 << 10, launched = 0;

int launch_with(size_t shared_bytes);

extern "C" {
cudaError_t cudaGetLastError() { return cudaSuccess; }
const char* cudaGetErrorString(cudaError_t) { return ""; }
cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  return *value = kMost, cudaSuccess;
}
}
template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel*, cudaFuncAttribute, int value) {
  if (value > kMost) return cudaErrorInvalidValue;
  return permitted = value, cudaSuccess;
}
template <class Kernel>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, Kernel*) {
  if (launched++ == 0 && launch_with(50 << 10) != cudaSuccess) return cudaErrorUnknown;
  return int(config->dynamicSmemBytes) <= permitted ? cudaSuccess : cudaErrorInvalidValue;
}

#define __CUDACC__
#include "cuda/simt/launch.cuh"

void kernel() {}
int launch_with(size_t shared_bytes) {
  simt::Launch launch{1, 32};
  launch.shared_bytes = shared_bytes;
  return simt::launch(launch, kernel);
}

int main() {
  const bool both = launch_with(100 << 10) == cudaSuccess && launched == 2;
  const bool too_much = launch_with(228 << 10) == cudaErrorInvalidValue;
  return both && too_much ? 0 : 1;
}
"""
# The part of simt.cuh that launch.cuh needs, for a compiler that knows no GPU.
ONLY_LAUNCH = """
#pragma once
#include <cstddef>
namespace simt {
struct Launch {
  unsigned grid, block;
  size_t shared_bytes;
  void* stream;
  unsigned team;
  bool cluster, early;
};
}
"""


@pytest.mark.skipif(CUDA.home is None, reason="needs CUDA's headers")
def test_threads_that_launch_a_kernel_do_not_take_memory_from_each_other(tmp_path):
    fake = tmp_path / "cuda" / "simt" / "simt.cuh"
    fake.parent.mkdir(parents=True)
    fake.write_text(ONLY_LAUNCH)
    (tmp_path / "two.cpp").write_text(TWO_THREADS)
    folders = [tmp_path, ROOT / "csrc", *include_folders(CUDA.home)]
    includes = [f"-I{folder}" for folder in folders]
    run(CXX, "-std=c++17", "-w", *includes, tmp_path / "two.cpp", "-o", tmp_path / "two")
    run(tmp_path / "two")
