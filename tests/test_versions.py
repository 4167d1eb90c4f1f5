"""One binary for every PyTorch that is promised: what was built loads in the one that is here.

`make test-oldest` and `make test-versions` run this beside other versions than it was built with.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from build_tools import extension, requirements
from da_ops.backends import BACKENDS, cuda, native

ROOT = Path(__file__).resolve().parents[1]
PROMISE = next(r for r in requirements.requirements([]) if re.match(r"torch\b", r))


def built(part):
    """Skip the test unless the last build made this part."""
    record = native.build_record().get(part)
    if record is None or not record["built"]:
        pytest.skip(f"{part} was not built: {record['reason'] if record else 'no build here'}")


def test_the_cpu_kernels_load():
    built("cpu")
    assert BACKENDS["cpu"].reason is None


def test_the_planner_loads():
    built("plan")
    native.planner()


def test_the_cuda_kernels_load():
    """Without a GPU, and beside a PyTorch of another CUDA version: they bring their runtime."""
    built("cuda")
    if torch.version.cuda is None:
        pytest.skip("torch was built without CUDA")
    assert BACKENDS["cuda"].reason is None


def test_beside_a_torch_without_cuda_nothing_is_to_be_rebuilt(monkeypatch, tmp_path):
    (tmp_path / "_cuda.abi3.so").touch()
    monkeypatch.setattr(native, "FOLDER", tmp_path)
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(native, "load", lambda library: pytest.fail(f"loaded {library}"))
    assert "torch was built without CUDA" in cuda._load()


def test_a_library_that_does_not_load_says_why(monkeypatch, tmp_path):
    (tmp_path / "_cuda.abi3.so").write_bytes(b"not a library")
    monkeypatch.setattr(native, "FOLDER", tmp_path)
    assert "_cuda.abi3.so: file too short" in native.load("_cuda.abi3.so")


def test_the_oldest_torch_is_the_same_everywhere():
    """In what is required, in what the binary is built for, and in what users are told."""
    [version] = re.findall(r"^torch>=(\d+\.\d+)$", PROMISE)
    pyproject = (ROOT / "pyproject.toml").read_text()
    assert set(re.findall(r'"(torch\b[^"]*)"', pyproject)) - {"torchvision"} == {PROMISE}
    assert requirements.oldest(PROMISE) == f"torch=={version}.*"
    assert requirements.oldest("torchvision>=0.1") == "torchvision>=0.1"
    major, minor = map(int, version.split("."))
    assert int(extension.TARGET_VERSION, 16) == (major << 56) + (minor << 48)
    assert f"PyTorch {version} or later" in (ROOT / "README.md").read_text()


def test_torch_is_one_that_is_promised():
    promised = tuple(map(int, PROMISE.removeprefix("torch>=").split(".")))
    assert tuple(map(int, torch.__version__.split(".")[:2])) >= promised
