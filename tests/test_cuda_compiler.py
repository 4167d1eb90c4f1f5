"""Finding nvcc, choosing what to compile for, and asking what was compiled for this GPU."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
import torch
from setuptools.errors import SetupError

from build_tools import here
from build_tools.cuda import (
    ARCHITECTURES,
    PTX,
    CudaCompiler,
    arch_list,
    find_cuda,
    gencode,
    include_folders,
    runtime_flags,
)
from build_tools.extension import find_cxx, part, survey
from da_ops.backends import cuda, native

ROOT = Path(__file__).resolve().parents[1]


def make_toolkit(home, release="13.0", archs="75 80 86 87 89 90 100 120"):
    """A folder that looks like a CUDA toolkit as far as the discovery asks."""
    (home / "bin").mkdir(parents=True)
    (home / "include" / "nv").mkdir(parents=True)
    for header in ("cuda_runtime.h", "nv/target"):
        (home / "include" / header).touch()
    listing = "".join(f"echo compute_{arch}; " for arch in archs.split())
    script(
        home / "bin" / "nvcc",
        f'case "$1" in --version) echo "Cuda compilation tools, release {release}, V1" ;; '
        f'--dryrun) echo "#$ TOP={home}/bin/.." >&2 ;; --list-gpu-arch) {listing} ;; esac',
    )
    return home


def script(path, body):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)


def test_cuda_home_comes_first(tmp_path):
    home = make_toolkit(tmp_path / "a")
    other = make_toolkit(tmp_path / "b")
    found = find_cuda("13.2", {"CUDA_HOME": str(home), "PATH": str(other / "bin")})
    assert (found.home, found.version, found.why) == (home, "13.0", "CUDA_HOME")


def test_a_wrapper_on_path_is_followed_to_its_toolkit(tmp_path):
    home = make_toolkit(tmp_path / "opt" / "cuda-13")
    script(tmp_path / "usr" / "bin" / "nvcc", f'exec {home}/bin/nvcc "$@"')
    found = find_cuda("13.0", {"PATH": str(tmp_path / "usr" / "bin")})
    assert (found.home, found.why) == (home, "PATH")


def test_a_link_on_path_is_followed_where_nvcc_does_not_tell(tmp_path):
    home = make_toolkit(tmp_path / "cuda")
    script(home / "bin" / "nvcc", '[ "$1" = --version ] && echo "release 13.1,"')
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "nvcc").symlink_to(home / "bin" / "nvcc")
    assert find_cuda("13.0", {"PATH": str(tmp_path / "bin")}).home == home


def test_the_compiler_from_pip_comes_last(tmp_path):
    home = make_toolkit(tmp_path / "nvidia" / "cu13")
    found = find_cuda("13.2", {"PATH": ""}, [tmp_path])
    assert (found.home, found.why) == (home, "pip")


def test_a_compiler_that_does_not_serve_is_passed_over_with_the_reason(tmp_path):
    old = make_toolkit(tmp_path / "old", release="12.4")
    pip = make_toolkit(tmp_path / "nvidia" / "cu13")
    environ = {"CUDA_HOME": str(tmp_path / "gone"), "PATH": str(old / "bin")}
    found = find_cuda("13.2", environ, [tmp_path])
    assert found.home == pip
    assert "CUDA_HOME: no working bin/nvcc" in found.why
    assert "PATH: nvcc is 12.4, torch was built with 13.2" in found.why


@pytest.mark.parametrize("header", ["cuda_runtime.h", "nv/target"])
def test_a_toolkit_without_headers_is_passed_over(tmp_path, header):
    home = make_toolkit(tmp_path / "cuda")
    (home / "include" / header).unlink()
    found = find_cuda("13.0", {"CUDA_HOME": str(home), "PATH": ""})
    assert found.home is None
    assert f"no {header} in {home}" in found.why


def test_headers_may_lie_where_cuda_13_has_them(tmp_path):
    home = make_toolkit(tmp_path / "cuda")
    (home / "include" / "nv").rename(home / "include" / "cccl")
    (home / "include" / "cccl" / "nv").mkdir()
    (home / "include" / "cccl" / "target").rename(home / "include" / "cccl" / "nv" / "target")
    assert find_cuda("13.0", {"CUDA_HOME": str(home), "PATH": ""}).home == home


def test_nothing_found_names_where_it_looked():
    found = find_cuda("99.0", {"PATH": ""})
    assert found.home is None
    assert "CUDA_HOME" in found.why


def test_a_torch_without_cuda_needs_no_nvcc():
    assert find_cuda(None, {}).why == "this torch was built without CUDA"


def test_arch_list_is_what_this_nvcc_knows_with_the_newest_ptx_that_is_made(tmp_path):
    home = make_toolkit(tmp_path / "new")
    assert arch_list(home, {}) == ["7.5", "8.0", "8.6", "8.9", "9.0", "10.0+PTX", "12.0"]
    old = make_toolkit(tmp_path / "old", archs="70 75 80")
    assert arch_list(old, {}) == ["7.5", "8.0+PTX"]


@pytest.mark.parametrize("text", ["9.0;10.0+PTX", "9.0 10.0+PTX", " 9.0, 10.0+PTX "])
def test_arch_list_obeys_the_environment(tmp_path, text):
    assert arch_list(tmp_path, {"TORCH_CUDA_ARCH_LIST": text}) == ["9.0", "10.0+PTX"]


@pytest.mark.parametrize(
    ("gpus", "built"),
    [
        ([], "9.0"),
        ([(9, 0), (9, 0)], "9.0"),
        ([(12, 0), (8, 6), (7, 5)], "7.5 8.6 12.0"),
        ([(8, 7)], "8.6"),
        ([(10, 3)], "10.0"),
        ([(11, 0), (9, 0)], ""),  # none of ours: PTX, which all of them carry
        ([(7, 0)], ""),
    ],
)
def test_a_tree_is_built_for_the_gpus_that_are_here(gpus, built):
    assert here.architectures(gpus) == built


def test_gencode_has_code_for_every_arch_and_ptx_where_asked():
    assert gencode(["7.5", "8.6", "8.9", "9.0a", "10.0", "12.0+PTX"]) == [
        "-gencode=arch=compute_75,code=[sm_75]",
        "-gencode=arch=compute_80,code=[sm_86,sm_89]",
        "-gencode=arch=compute_90a,code=[sm_90a]",
        "-gencode=arch=compute_100,code=[sm_100,sm_120,compute_100]",
    ]


def test_the_sources_tell_no_architectures_apart_that_share_ptx():
    text = "".join(file.read_text() for file in (ROOT / "csrc").rglob("*.cu*"))
    used = {int(number) for number in re.findall(r"__CUDA_ARCH__ *[<>=!]+ *(\d+)", text)}
    assert used and used <= {int(arch.replace(".", "")) * 10 for arch in PTX}


def test_the_runtime_is_linked_by_the_name_that_the_toolkit_has(tmp_path):
    home = make_toolkit(tmp_path / "cuda")
    assert include_folders(home) == [str(home / "include")]
    assert runtime_flags(home) == ["-lcudart"]
    (home / "lib").mkdir()
    (home / "lib" / "libcudart.so.13").touch()
    assert runtime_flags(home) == ["-l:libcudart.so.13"]
    (home / "targets" / "x86_64-linux" / "lib").mkdir(parents=True)
    (home / "targets" / "x86_64-linux" / "lib" / "libcudart.so").touch()
    assert runtime_flags(home) == ["-l:libcudart.so"]
    (home / "lib" / "libcudart_static.a").touch()
    assert runtime_flags(home)[0] == "-l:libcudart_static.a"


# What is built


def cuda_in(environ, tmp_path):
    """What becomes of the CUDA part in an environment that has nvcc."""
    toolkit = CudaCompiler(make_toolkit(tmp_path / "cuda"), "13.0", "PATH")
    environ = {"PATH": os.environ["PATH"], **environ}
    return survey({"da_ops._cpu", "da_ops._plan", "da_ops._cuda"}, toolkit, environ)["cuda"]


@pytest.mark.skipif(find_cxx() is None, reason="needs a C++ compiler")
def test_cuda_needs_the_cpu_part_for_its_schema(tmp_path):
    state = cuda_in({"DA_OPS_CPU": "0"}, tmp_path / "unset")
    assert not state["built"] and "schema" in state["reason"] and "DA_OPS_CPU=0" in state["reason"]
    with pytest.raises(SetupError, match=r"DA_OPS_CUDA=1 asks for .* schema"):
        cuda_in({"DA_OPS_CPU": "0", "DA_OPS_CUDA": "1"}, tmp_path / "asked")


@pytest.mark.skipif(find_cxx() is None, reason="needs a C++ compiler")
def test_cuda_is_built_where_nvcc_is_unless_told_otherwise(tmp_path):
    state = cuda_in({}, tmp_path / "unset")
    assert state["built"] and len(state["arch_list"]) == len(ARCHITECTURES)
    assert cuda_in({"DA_OPS_CUDA": "0"}, tmp_path / "off")["reason"] == "DA_OPS_CUDA=0"
    odd = cuda_in({"TORCH_CUDA_ARCH_LIST": "Hopper"}, tmp_path / "odd")
    assert "TORCH_CUDA_ARCH_LIST: expected" in odd["reason"] and "'Hopper'" in odd["reason"]


def test_a_switch_takes_0_or_1():
    with pytest.raises(SetupError, match="DA_OPS_CPU: expected 0, 1 or nothing, got 'yes'"):
        part("DA_OPS_CPU", None, {"DA_OPS_CPU": "yes"})
    off = {"built": False, "reason": "DA_OPS_CPU=0"}
    assert part("DA_OPS_CPU", None, {"DA_OPS_CPU": "0"}) == off
    assert part("DA_OPS_CPU", "no compiler", {})["reason"] == "no compiler"
    assert part("DA_OPS_CPU", None, {"DA_OPS_CPU": "1"})["built"]


def test_a_compiler_asked_for_and_not_there_fails():
    with pytest.raises(SetupError, match="CXX: expected a C\\+\\+ compiler"):
        find_cxx({"CXX": "no-such-c++", "PATH": os.environ["PATH"]})


@pytest.mark.parametrize(
    ("built", "capability", "usable"),
    [
        (["8.0", "9.0"], (8, 0), True),
        (["8.0", "9.0"], (8, 9), True),  # a binary serves later parts of its own major version
        (["8.6"], (8, 0), False),
        (["8.0", "9.0"], (10, 0), False),
        (["8.0", "9.0+PTX"], (12, 0), True),  # PTX serves all that come later
        (["9.0+PTX"], (8, 9), False),
        ([], (9, 0), False),
        (["9.0a"], (9, 0), True),  # one capability alone
        (["9.0a+PTX"], (10, 0), False),
        (["10.0a"], (10, 3), False),
        (["10.0f"], (10, 3), True),  # a family: one major version
        (["10.0f+PTX"], (12, 0), False),
    ],
)
def test_a_gpu_that_nothing_was_built_for_is_told_so(monkeypatch, built, capability, usable):
    monkeypatch.setattr(native, "build_record", lambda: {"cuda": {"arch_list": built}})
    monkeypatch.setattr(cuda, "driver_version", lambda: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A GPU")
    reason = cuda.BACKEND.unfit.__wrapped__()  # the answer is cached
    if usable:
        assert reason is None
    else:
        assert f"TORCH_CUDA_ARCH_LIST={capability[0]}.{capability[1]}" in reason
        assert "A GPU" in reason


@pytest.mark.parametrize(
    ("needed", "driver", "usable"),
    [("13.0", 13000, True), ("13.0", 13020, True), ("13.1", 13000, True), ("13.0", 12080, False)],
)
def test_an_old_driver_is_told_so(monkeypatch, needed, driver, usable):
    """The runtime is in the library, whichever torch loads it, and so wants a driver of its own."""
    monkeypatch.setattr(native, "build_record", lambda: {"cuda": {"version": needed}})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(cuda.driver, "newest_cuda", lambda: driver)
    reason = cuda.BACKEND.unfit.__wrapped__()
    assert (reason is None) == usable
    assert usable or "driver for CUDA 13 (580 or later), and this one is for CUDA 12.8" in reason
