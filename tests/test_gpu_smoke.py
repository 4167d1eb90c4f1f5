"""First calls of the kernels on a GPU, and compute-sanitizer over them, without either."""

from __future__ import annotations

import os

import pytest

pytest.importorskip("psutil")

import da_ops
from benchmarks import environment, tally
from benchmarks.gpu import parts, run, sanitize, smoke
from da_ops.backends import native

from .plans import or_skipped


@pytest.fixture(autouse=True)
def _environment(monkeypatch):
    """What smoke.main sets for its process ends with the test."""
    for name in (smoke.PLAN, "DA_OPS_TRITON_AUTOTUNE"):
        monkeypatch.setenv(name, "")


def built(monkeypatch, compiler):
    """As where the CUDA library was not built, with this compiler."""
    record, why = {"cuda": {"built": False, "compiler": compiler}}, {"cuda": "no library"}
    there = da_ops.backends() | why
    monkeypatch.setattr(da_ops, "backends", lambda: there)
    monkeypatch.setattr(native, "build_record", lambda: record)


def test_smoke(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv(tally.VARIABLE, str(tmp_path / "told"))
    assert smoke.main(["--device", "cpu", "--targets", "eager", "--few"]) == 0
    assert "eager: right" in capsys.readouterr().out
    found = tally.read(tmp_path / "told")
    assert found.passed == found.of > 0
    built(monkeypatch, compiler="nvcc 13.0")
    assert smoke.main(["--device", "cpu", "--targets", "eager,cuda-block"]) == 1
    assert "cuda-block: failed" in capsys.readouterr().out


def test_smoke_finds_what_is_wrong(monkeypatch, capsys):
    right = smoke.results

    def wrong(*arguments):
        return {**(got := right(*arguments)), "dx": -got["dx"]}

    monkeypatch.setattr(smoke, "results", wrong)
    assert smoke.main(["--device", "cpu", "--targets", "eager", "--few"]) == 1
    assert "dx: error" in capsys.readouterr().out


def test_what_cannot_be_had_is_skipped(monkeypatch, capsys, tmp_path):
    """A plan that a device refuses, calls that a plan refuses, CUDA without nvcc."""
    monkeypatch.setenv(tally.VARIABLE, str(tmp_path / "told"))
    right = smoke.results

    def refused(x, *rest):
        if x.shape[1] == 16:
            raise RuntimeError("da_ops: DA_OPS_PLAN=cluster: clusters need 9.0; unset it")
        return right(x, *rest)

    monkeypatch.setattr(smoke, "results", refused)
    assert smoke.main(["--device", "cpu", "--targets", "eager-cluster", "--few"]) == 0
    found = tally.read(tmp_path / "told")
    assert found.passed == found.skipped > 0
    assert "clusters need 9.0" in capsys.readouterr().out

    built(monkeypatch, compiler=None)
    assert smoke.main(["--device", "cpu", "--targets", "cuda-block"]) == 0
    found = tally.read(tmp_path / "told")
    assert (found.passed, found.failed, found.skipped) == (0, 0, 1)
    built(monkeypatch, compiler="nvcc 13.0")
    assert smoke.main(["--device", "cpu", "--targets", "cuda-block"]) == 1


def test_tests_of_a_plan_that_is_refused_are_skipped():
    """By what the CUDA library says then, and by nothing else."""
    said = "da_ops: DA_OPS_PLAN="
    assert f'"{said}"' in (environment.ROOT / "csrc" / "cuda" / "ops_cuda.cpp").read_text()
    with pytest.raises(pytest.skip.Exception, match="the image is too large"), or_skipped():
        raise RuntimeError(f"{said}block: the image is too large; unset it")
    with pytest.raises(RuntimeError, match="CUDA error"), or_skipped():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")


TOOL = """#!/bin/sh
echo "$@" >> "{folder}/calls"
test "$2" != racecheck || {{ echo "a hazard"; exit 9; }}
case "$*" in *cuda-cluster*) echo '{{"skipped": 4, "of": 4}}' > "$DA_OPS_TALLY";; esac
"""


def test_the_sanitizers_findings_fail(tmp_path, monkeypatch, capsys):
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(TOOL.format(folder=tmp_path))
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv(tally.VARIABLE, str(tmp_path / "told"))
    assert sanitize.main() == 1
    assert "a hazard" in capsys.readouterr().out
    found = tally.read(tmp_path / "told")
    assert (found.passed, found.failed, found.skipped, found.of) == (7, 4, 2, 13)
    calls = (tmp_path / "calls").read_text().splitlines()
    assert len(calls) == 13
    for plan in ("portable", "block", "cluster", "counter"):
        assert sum(f"--targets cuda-{plan}" in call for call in calls) == 3
    assert all(("--report-api-errors no" in call) == ("memcheck" in call) for call in calls)


def test_without_a_sanitizer(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    todo = [parts.Part("sanitize", 1, lambda _: [[*parts.PYTHON, "benchmarks.gpu.sanitize"]])]
    (outcome,) = run.run_all(todo, 60, tmp_path, lambda outcomes: None)
    assert (outcome.status, outcome.skipped) == ("skipped", 13)
    assert "it comes with the CUDA toolkit" in outcome.note
