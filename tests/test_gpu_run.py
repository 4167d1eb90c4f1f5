"""`make gpu` and what it leaves, without a GPU."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("tqdm")
pytest.importorskip("psutil")
pytest.importorskip("matplotlib")

import benchmarks.gpu.__main__ as driver
import da_ops
from benchmarks import environment, op, report, tally
from benchmarks.gpu import chosen, parts, results, run, sanitize, smoke
from da_ops.backends import native

FAST = ["--device", "cpu", "--rivals", "eager", "--backends", "eager", "--budget", "0.01"]


@pytest.fixture(scope="module")
def op_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("results") / "x-op.json"
    assert op.main(["--shapes", "2x8x5x5", *FAST, "--output", str(path)]) == 0
    return path


@pytest.fixture
def gpu_results(op_file, tmp_path):
    """Results of a GPU that was tested and measured, all well, with today's sources."""
    measured = json.loads(op_file.read_text())
    cores = {"cores": 16, "threads": 16, "vector": "AVX512"}
    head = {
        **{"schema": environment.SCHEMA, "kind": "gpu", "preset": "quick", "date": "2026-01-02"},
        **{"command": "python -m benchmarks.gpu", "versions": {"python": "3", "torch": "2"}},
        "device": {"kind": "cuda", "name": "NVIDIA H100 80GB HBM3", "sm": "9.0"} | cores,
        "digest": environment.digest("cuda"),
    }
    outcomes = [run.Outcome(name, "passed", passed=1, note="") for name in environment.GPU_PARTS]
    written = results.results(outcomes, head, tmp_path)
    network_part = {"kind": "network", "layouts": [], "summary": {"checks": []}}
    about = {"name": "resnet50", "layers": 16, "batch": 128, "size": 224, "amp": "bfloat16"}
    return {
        **written,
        "op": measured | head | {"kind": "op"},
        "network": head | network_part | {"network": about},
    }


def check_gpu(folder, written=None, name="H100"):
    if written is not None:
        environment.write_results(folder / "nvidia-h100-80gb-hbm3.json", written)
    return report.main(["--check", "--device", name, "--results", str(folder)])


def test_gpu_results_that_count(gpu_results, tmp_path, capsys):
    """Also those of a part that was cut; they are found by any part of the GPU's name, or the
    file's."""
    cut = next(p for p in gpu_results["parts"] if p["name"] == "onchip")
    cut.update(status="cut", passed=500, of=800)
    assert check_gpu(tmp_path, gpu_results) == 0
    line = next(x for x in capsys.readouterr().out.splitlines() if x.startswith("onchip"))
    assert line.split()[:6] == ["onchip", "cut", "500", "0", "0", "800"]
    for name in ("NVIDIA H100 80GB HBM3", "nvidia-h100", str(next(tmp_path.glob("*.json")))):
        assert check_gpu(tmp_path, name=name) == 0
    shown = report.block(tmp_path, tmp_path / "README.md")
    assert "### NVIDIA H100 80GB HBM3" in shown
    assert "`make gpu`" in shown
    assert "bfloat16" in shown
    assert "left out" not in shown
    assert report.NO_GPU not in shown
    assert report.main(["--device", "H100"]) == 2


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"name": "triton", "status": "failed"}, "part 'triton' failed"),
        ({"name": "cuda", "status": "cut", "failed": 1}, "part 'cuda' failed"),
        (
            {"name": "cuda", "status": "cut", "passed": 0},
            "part 'cuda' was cut before anything passed",
        ),
        (
            {"name": "sanitize", "status": "skipped", "note": "no tool"},
            "part 'sanitize' was skipped (no tool)",
        ),
        ({"name": "gpu"}, "part 'gpu' was not run"),
        ({"op": None}, "no results of 'op'"),
        ({"digest": "0" * 64}, "other kernel sources than today's"),
    ],
)
def test_gpu_results_that_do_not_count(gpu_results, tmp_path, capsys, change, why):
    for name, value in change.items():
        if name in gpu_results:
            gpu_results[name] = value
    gpu_results = {name: value for name, value in gpu_results.items() if value is not None}
    if part := next((p for p in gpu_results["parts"] if p["name"] == change.get("name")), None):
        part.update(change)
        if len(change) == 1:
            gpu_results["parts"].remove(part)
    assert check_gpu(tmp_path, gpu_results) == 1
    assert why in capsys.readouterr().err
    shown = report.block(tmp_path, tmp_path / "README.md")
    assert "Results of NVIDIA H100 80GB HBM3 are left out: " in shown
    assert why in shown
    assert "###" not in shown


def test_no_gpu_results(gpu_results, op_file, tmp_path, capsys):
    """The message names what there is, and what to do."""

    def said(**options):
        assert check_gpu(tmp_path, **options) == 1
        return capsys.readouterr().err

    assert "there are those of no GPU: run make gpu on that machine" in said()
    assert "'A100'" in (text := said(written=gpu_results, name="A100"))
    assert "there are those of nvidia-h100-80gb-hbm3" in text
    assert "expected results of make gpu, got those of 'op'" in said(name=str(op_file))
    assert "expected a results file" in said(name="none.json")
    (tmp_path / "nvidia-h100-80gb-hbm3.json").write_text("{")
    assert "expected a results file" in said()


# ---- the driver

TELLING = """
import sys, time
from benchmarks.tally import Tally
tally = Tally(of=5)
for outcome in {outcomes}:
    tally.add(outcome)
print('begun', flush=True)
time.sleep({seconds})
sys.exit({code})
"""


def part(name, code, share=1):
    return parts.Part(name, share, lambda seconds: [[sys.executable, "-c", code]])


def telling(name, *outcomes, seconds=0, code=0, share=1):
    return part(name, TELLING.format(outcomes=outcomes, seconds=seconds, code=code), share)


def test_a_failing_part_stops_no_other_and_a_cut_one_counts(tmp_path, capsys):
    five = ["passed"] * 5
    todo = [
        part("build", "raise SystemExit('no compiler')"),
        telling("cuda", "failed", "passed", "passed", "skipped", "passed", code=1),
        telling("onchip", *["skipped"] * 5),
        parts.Part("gpu", 1, lambda seconds: [["/no/such/program"]]),
        telling("sanitize", *five),
        telling("op", "passed", "passed", seconds=60, share=0.3),
        telling("triton", "passed", "failed", seconds=60, share=0.3),
        telling("network", "passed", "passed"),
        part("deaf", "import time; time.sleep(60)", share=0.3),
        part("plain", "print('met: all of 7 contenders')"),
    ]
    saved = []
    outcomes = run.run_all(todo, 20, tmp_path, lambda o: saved.append([vars(x).copy() for x in o]))
    assert [(o.name, o.status, o.passed, o.failed, o.skipped, o.of) for o in outcomes] == [
        ("build", "failed", 0, 1, 0, 1),
        ("cuda", "failed", 3, 1, 1, 5),
        ("onchip", "skipped", 0, 0, 5, 5),
        ("gpu", "failed", 0, 1, 0, 1),
        ("sanitize", "passed", 5, 0, 0, 5),
        ("op", "cut", 2, 0, 0, 5),  # by time
        ("triton", "failed", 1, 1, 0, 5),
        ("network", "cut", 2, 0, 0, 5),  # by itself
        ("deaf", "cut", 0, 0, 0, 0),
        ("plain", "passed", 1, 0, 0, 1),
    ]
    assert outcomes[5].note.startswith("stopped after")
    assert sorted({len(s) for s in saved}) == list(range(1, 11))  # after each
    assert sum(o.seconds for o in outcomes) < 40
    assert "no compiler" in capsys.readouterr().out
    assert len(results.table(outcomes).splitlines()) == 2 + len(todo)


@pytest.fixture
def driven(tmp_path, monkeypatch):
    """As on a machine with a GPU, whose parts are these."""

    def with_parts(*todo):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        head = {"kind": "gpu", "device": {"name": "A GPU"}}
        monkeypatch.setattr(environment, "head", lambda *arguments: dict(head))
        monkeypatch.setattr(parts, "parts", lambda preset, scratch: list(todo))
        monkeypatch.setenv("OUT", str(tmp_path / "copy"))
        return driver.main(["--budget", "20", "--out", str(tmp_path / "out")])

    return with_parts


def written(tmp_path):
    out, copy = (json.loads((tmp_path / f / "a-gpu.json").read_text()) for f in ("out", "copy"))
    assert out == copy
    return {p["name"]: p for p in out["parts"]}


@pytest.mark.parametrize("failing", [False, True])
def test_the_driver(failing, driven, tmp_path, capsys):
    """Its results, the table, the exit status, the copy."""
    build = part("build", "exit(1)" if failing else "")
    assert driven(build, telling("op", *["passed"] * 5)) == int(failing)
    lines = [x.split() for x in capsys.readouterr().out.splitlines()]
    assert ["build", "failed" if failing else "passed"] in [x[:2] for x in lines]
    assert ["op", "passed", "5", "0", "0", "5"] in [x[:6] for x in lines]
    assert {n: p["status"] for n, p in written(tmp_path).items()} == {
        "build": "failed" if failing else "passed",
        "op": "passed",
    }
    assert "==== build.log" in (tmp_path / "copy" / "a-gpu.log").read_text()


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_a_driver_that_is_stopped_leaves_what_it_had(how, driven, tmp_path, monkeypatch, capfd):
    """Even of the part that is under way, and no process."""
    monkeypatch.setattr(run, "TICK", 0.1)
    child = os.fork()
    if child == 0:
        try:
            os._exit(driven(part("build", ""), telling("cuda", "passed", "passed", seconds=60)))
        finally:
            os._exit(99)
    path, end = tmp_path / "copy" / "a-gpu.json", time.monotonic() + 60
    while not (path.exists() and written(tmp_path).get("cuda", {}).get("passed") == 2):
        assert time.monotonic() < end
        time.sleep(0.05)
    os.kill(child, how)
    _, status = os.waitpid(child, 0)
    assert written(tmp_path)["build"]["status"] == "passed"
    cuda = written(tmp_path)["cuda"]
    assert (cuda["status"], cuda["passed"], cuda["of"], cuda["note"]) == ("cut", 2, 5, "unfinished")
    if how == signal.SIGTERM:
        assert os.waitstatus_to_exitcode(status) == 130
        assert "interrupted" in capfd.readouterr().out


def test_the_driver_needs_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert driver.main([]) == 2
    assert "no GPU" in capsys.readouterr().err


def test_the_plan_fits_its_budget(tmp_path, monkeypatch):
    """Whether parts take all they get, or nothing; the benchmarks end by themselves."""
    todo = parts.parts("quick", tmp_path)
    assert tuple(p.name for p in todo) == environment.GPU_PARTS
    for used in (0.0, 0.5, 1.0):
        left = parts.BUDGET
        for i in range(len(todo)):
            seconds = parts.limit(todo[i:], left)
            assert 0 < seconds <= left
            left -= used * seconds
        assert left >= -1e-6
    assert parts.limit(todo, parts.BUDGET) == todo[0].firm
    (command,) = todo[-1].commands(100)
    assert float(command[command.index("--seconds") + 1]) < 100
    for p in todo:
        assert all(command[0] in (sys.executable, "make", "env") for command in p.commands(60))

    def commands(preset):
        return {p.name: " ".join(p.commands(60)[-1]) for p in parts.parts(preset, tmp_path)}

    assert "-n 8" in commands("quick")["cuda"]
    assert "--at-most 60 " in commands("quick")["triton"]
    assert "DA_OPS_PLAN=onchip" in commands("quick")["onchip"]
    assert all("DA_OPS_TEST_FULL=1" in commands("full")[n] for n in ("cuda", "onchip", "gpu"))
    monkeypatch.setattr(parts, "several", lambda: False)  # pytest-xdist is not installed
    assert "-n 8" not in commands("quick")["cuda"]
    assert "--at-most 160 " in commands("quick")["cuda"]


def test_tests_of_one_backend_are_chosen():
    class Item:
        def __init__(self, target):
            if target:
                self.callspec = SimpleNamespace(params={"_target": (target, "cpu")})

    items = [Item(name) for name in ("cuda", "triton", None, "cuda", "cuda") * 10]
    few = chosen.choose(items, "cuda", 7)
    assert len(few) == 7
    assert all(i.callspec.params["_target"][0] == "cuda" for i in few)
    assert few == chosen.choose(items, "cuda", 7)
    assert len(chosen.choose(items, "cuda", 100)) == 30


A_SUITE = """
import pytest
from benchmarks.gpu import smoke

@pytest.mark.parametrize("_target", [("cuda", "cuda"), ("triton", "cuda")])
@pytest.mark.parametrize("i", range(40))
def test(i, _target):
    assert _target[0] == "cuda"
    if i == 5:
        pytest.skip("for a reason")
    assert not smoke.lost(), "the test before spoils it"
    if i == 3:
        smoke.lost = lambda: True
        assert False
"""


@pytest.mark.parametrize("several", [True, False])
def test_how_far_a_suite_comes(several, tmp_path, monkeypatch):
    """What was chosen is counted as it goes; where there are several processes, one in which the
    GPU is lost ends, and another goes on."""
    several and pytest.importorskip("xdist")
    (tmp_path / "test_x.py").write_text(A_SUITE)
    (tmp_path / "pytest.ini").write_text("[pytest]")
    monkeypatch.setattr(parts, "several", lambda: several)
    monkeypatch.setattr(parts, "WORKERS", 1)
    command = parts.pytest("cuda", 400, "-c", str(tmp_path / "pytest.ini"), str(tmp_path))
    told, log = tmp_path / "told", tmp_path / "log"
    assert run.run_command(command, 60, log, told, lambda: None) == 1
    found = tally.read(told)
    assert (found.of, found.skipped) == (40, 1), log.read_text()
    assert (found.passed, found.failed) == ((38, 2) if several else (3, 36)), log.read_text()


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
    for plan in ("portable", "block", "cluster", "group"):
        assert sum(f"--targets cuda-{plan}" in call for call in calls) == 3
    assert all(("--report-api-errors no" in call) == ("memcheck" in call) for call in calls)


def test_without_a_sanitizer(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    todo = [parts.Part("sanitize", 1, lambda _: [[*parts.PYTHON, "benchmarks.gpu.sanitize"]])]
    (outcome,) = run.run_all(todo, 60, tmp_path, lambda outcomes: None)
    assert (outcome.status, outcome.skipped) == ("skipped", 13)
    assert "it comes with the CUDA toolkit" in outcome.note
