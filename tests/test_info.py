"""``info``: what a maintainer asks for, told to people and to programs."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import da_ops
from da_ops.backends import native
from da_ops.cli import info, main


def told(capsys):
    """The text that `info` prints, and its JSON."""
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    assert main(["info", "--json"]) == 0
    return text, json.loads(capsys.readouterr().out)


def strings(facts):
    """All texts in what programs get, but for the keys."""
    if isinstance(facts, (dict, list)):
        inside = facts.values() if isinstance(facts, dict) else facts
        return [text for fact in inside for text in strings(fact)]
    return [facts] if isinstance(facts, str) else []


@pytest.fixture
def folder(monkeypatch, tmp_path):
    """An installation with this record, and a library."""

    def install(**record):
        (tmp_path / "_cpu.abi3.so").write_bytes(b"not a library")
        if record:
            (tmp_path / "_build.json").write_text(json.dumps(record))
        monkeypatch.setattr(native, "FOLDER", tmp_path)
        return tmp_path

    return install


def test_info_says_to_people_what_it_says_to_programs(capsys, choice):
    text, facts = told(capsys)
    assert [said for said in strings(facts) if said not in text] == []


def test_info_tells_versions(capsys, choice):
    _, facts = told(capsys)
    versions = facts["versions"]
    assert versions["da_ops"] == da_ops.__version__
    assert versions["torch"] == torch.__version__
    assert versions["cuda"] == torch.version.cuda
    assert versions["numpy"] == np.__version__
    assert versions["python"] == platform.python_version()
    assert versions["libc"] == " ".join(platform.libc_ver())
    triton = pytest.importorskip("triton")
    assert versions["triton"] == triton.__version__


def test_info_tells_what_was_built_and_why_not(capsys, choice, folder):
    record = {
        "version": "1.2.3",
        "cpu": {"built": True, "reason": None},
        "plan": {"built": False, "reason": "no Python.h"},
        "cuda": {
            "built": False,
            "reason": "no nvcc",
            "arch_list": [],
            "compiler": None,
            "version": None,
        },
        "compiler": "c++ 99.1",
        "flags": ["-O3"],
        "torch": "9.9",
        "python": "3.99",
    }
    library = (folder(**record) / "_cpu.abi3.so").read_bytes()
    text, facts = told(capsys)
    assert {name: facts["build"][name] for name in record} == record
    digest = hashlib.blake2b(library, digest_size=16).hexdigest()
    assert facts["libraries"] == {"_cpu.abi3.so": {"bytes": len(library), "digest": digest}}
    for said in (digest, "no Python.h", "no nvcc", "c++ 99.1", "torch 9.9", "Python 3.99", "1.2.3"):
        assert said in text


def test_info_tells_architectures(capsys, choice, folder):
    built = {"built": True, "reason": None}
    cuda = {**built, "arch_list": ["8.0", "12.0+PTX"], "compiler": "nvcc 13.7 in /x, from PATH"}
    record = {"version": "1", "cpu": built, "plan": built, "cuda": cuda, "compiler": None}
    folder(**record, flags=[], torch="9.9", python="3.99")
    text, _ = told(capsys)
    assert "8.0 12.0+PTX" in text and "nvcc 13.7 in /x, from PATH" in text


def test_info_works_where_nothing_was_built(capsys, choice, folder):
    folder()
    text, facts = told(capsys)
    assert facts["build"] is None and "no record" in text


def test_info_works_without_the_planner(capsys, choice, monkeypatch):
    def planner():
        raise RuntimeError("no planner here")

    monkeypatch.setattr(native, "planner", planner)
    text, facts = told(capsys)
    assert facts["devices"]["cpu"]["instruction_set"] is None
    assert "instruction set unknown" in text


def test_info_tells_of_the_processor(capsys, choice, fused_cpu):
    _, facts = told(capsys)
    cpu = facts["devices"]["cpu"]
    assert cpu["cores"] == len(os.sched_getaffinity(0))
    assert cpu["threads"] == torch.get_num_threads()
    explained = da_ops.explain(torch.empty(1, 8, 4, 4)).to_dict()["details"]["instruction_set"]
    assert cpu["instruction_set"] == explained


def test_info_tells_of_every_gpu(capsys, choice, monkeypatch):
    gpus = [
        SimpleNamespace(name="Tesla T4", major=7, minor=5, total_memory=15 * 2**30),
        SimpleNamespace(name="NVIDIA H200", major=9, minor=0, total_memory=141 * 2**30),
        None,
    ]

    def properties(index):
        if gpus[index] is None:
            raise RuntimeError("CUDA error: it fell off the bus\nCompile with ...")
        return gpus[index]

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(gpus))
    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    monkeypatch.setattr(info, "select", lambda asked, kind: "triton" if kind == "cuda" else "cpu")
    monkeypatch.setattr(info, "passed_over", lambda name, kind: f"{name} does not suit {kind}")
    monkeypatch.setattr(info.driver, "version", lambda: "580.95.05")
    monkeypatch.setattr(info, "driver_version", lambda: "13.0")
    text, facts = told(capsys)
    assert facts["devices"]["gpus"] == [
        {"name": "Tesla T4", "capability": "7.5", "memory": 15 * 2**30},
        {"name": "NVIDIA H200", "capability": "9.0", "memory": 141 * 2**30},
        {"name": "CUDA error: it fell off the bus", "capability": None, "memory": None},
    ]
    assert facts["devices"]["driver"] == {"version": "580.95.05", "cuda": "13.0"}
    assert facts["auto"]["cuda"] == {
        "backend": "triton",
        "error": None,
        "passed_over": {"cuda": "cuda does not suit cuda"},
    }
    assert "NVIDIA H200, compute capability 9.0, 141.0 GiB" in text
    assert [said for said in strings(facts) if said not in text] == []


def test_info_tells_of_variables_that_are_set(capsys, choice, monkeypatch):
    monkeypatch.setenv("DA_OPS_PLAN", "portable,grid=64")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setenv("SOMEBODYS_TOKEN", "secret")
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    text, facts = told(capsys)
    assert facts["environment"]["DA_OPS_PLAN"] == "portable,grid=64"
    assert facts["environment"]["CUDA_VISIBLE_DEVICES"] == ""
    assert "DA_OPS_PLAN=portable,grid=64" in text and "OMP_NUM_THREADS=3" in text
    assert "TORCH_CUDA_ARCH_LIST" not in text and "secret" not in text


@pytest.mark.parametrize("wish", ["cpuu", "cuda"])
def test_info_works_where_the_backend_asked_for_does_not(capsys, choice, monkeypatch, wish):
    """There above all."""
    monkeypatch.setenv("DA_OPS_BACKEND", wish)
    text, facts = told(capsys)
    chosen = facts["auto"]["cpu"]
    assert chosen["backend"] is None and repr(wish) in chosen["error"]
    assert chosen["error"] in text and f"DA_OPS_BACKEND={wish}" in text
