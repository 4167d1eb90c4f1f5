"""`make gpu` and what it leaves, without a GPU."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("tqdm")
pytest.importorskip("psutil")
pytest.importorskip("matplotlib")

import benchmarks.gpu.__main__ as driver
from benchmarks import environment, op, pages, report, tally
from benchmarks.gpu import chosen, parts, results, run

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
    shown = pages.every_table(tmp_path, tmp_path / "page.md")
    assert "## NVIDIA H100 80GB HBM3" in shown
    assert "`make gpu`" in shown
    assert "bfloat16" in shown
    assert "left out" not in shown
    assert pages.NO_GPU not in shown
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
    shown = pages.every_table(tmp_path, tmp_path / "page.md")
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


def written(folder):
    return {p["name"]: p for p in json.loads((folder / "a-gpu.json").read_text())["parts"]}


@pytest.mark.parametrize("failing", [False, True])
def test_the_driver(failing, driven, tmp_path, capsys):
    """Its results, the table, the exit status, the copy."""
    build = part("build", "exit(1)" if failing else "")
    assert driven(build, telling("op", *["passed"] * 5)) == int(failing)
    lines = [x.split() for x in capsys.readouterr().out.splitlines()]
    assert ["build", "failed" if failing else "passed"] in [x[:2] for x in lines]
    assert ["op", "passed", "5", "0", "0", "5"] in [x[:6] for x in lines]
    assert {n: p["status"] for n, p in written(tmp_path / "out").items()} == {
        "build": "failed" if failing else "passed",
        "op": "passed",
    }
    assert written(tmp_path / "copy") == written(tmp_path / "out")
    assert "==== build.log" in (tmp_path / "copy" / "a-gpu.log").read_text()


STOPPED = """
import sys, torch
import benchmarks.gpu.__main__ as driver
from benchmarks import environment
from benchmarks.gpu import parts, run
torch.cuda.is_available = lambda: True
environment.head = lambda *arguments: {{"kind": "gpu", "device": {{"name": "A GPU"}}}}
run.TICK = 0.1
code = [sys.executable, "-c"]
parts.parts = lambda *arguments: [
    parts.Part("build", 1, lambda seconds: [[*code, ""]]),
    parts.Part("cuda", 1, lambda seconds: [[*code, {telling!r}]]),
]
sys.exit(driver.main(["--budget", "200", "--out", {folder!r}]))
"""


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_a_driver_that_is_stopped_leaves_what_it_had(how, tmp_path):
    """Even of the part that is under way."""
    telling = TELLING.format(outcomes=["passed"] * 2, seconds=20, code=0)
    script = STOPPED.format(telling=telling, folder=str(tmp_path))
    process = subprocess.Popen(
        [sys.executable, "-c", script], cwd=environment.ROOT, stdout=subprocess.PIPE, text=True
    )
    end = time.monotonic() + 90
    there = tmp_path / "a-gpu.json"
    while not (there.exists() and written(tmp_path).get("cuda", {}).get("passed") == 2):
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.05)
    process.send_signal(how)
    said, _ = process.communicate()
    assert written(tmp_path)["build"]["status"] == "passed"
    cuda = written(tmp_path)["cuda"]
    assert (cuda["status"], cuda["passed"], cuda["of"], cuda["note"]) == ("cut", 2, 5, "unfinished")
    if how == signal.SIGTERM:
        assert process.returncode == 128 + signal.SIGINT
        assert "interrupted" in said


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

    if parts.installed("xdist"):
        assert "-n 8 " in commands("quick")["cuda"]
        assert "--at-most 60 " in commands("quick")["triton"]
    assert "DA_OPS_PLAN=onchip" in commands("quick")["onchip"]
    assert all("DA_OPS_TEST_FULL=1" in commands("full")[n] for n in ("cuda", "onchip", "gpu"))
    assert ("--timeout=60" in commands("quick")["cuda"]) == parts.installed("pytest_timeout")
    monkeypatch.setattr(parts, "installed", lambda module: module == "pytest_timeout")
    assert "-n 8" not in commands("quick")["cuda"]
    assert "--timeout" not in commands("quick")["cuda"]
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
    monkeypatch.setattr(parts, "installed", lambda module: several and module == "xdist")
    monkeypatch.setattr(parts, "WORKERS", 1)
    command = parts.pytest("cuda", 400, "-c", str(tmp_path / "pytest.ini"), str(tmp_path))
    told, log = tmp_path / "told", tmp_path / "log"
    assert run.run_command(command, 60, log, told, lambda: None) == 1
    found = tally.read(told)
    assert (found.of, found.skipped) == (40, 1), log.read_text()
    assert found.passed + found.failed == (40 if several else 39), log.read_text()
    assert (found.failed == 2) == several, log.read_text()


WITHOUT = """
import sys
class Without:
    def find_spec(self, name, *rest):
        if name.partition(".")[0] in ("thop", "ptflops", "torchinfo", "pytorch_grad_cam"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Without())
"""


@pytest.mark.slow
def test_the_suite_does_without_what_a_machine_may_lack(tmp_path, monkeypatch):
    """A GPU's machine may have no network, and not all that the tests of other things need."""
    (tmp_path / "without.py").write_text(WITHOUT)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(parts, "installed", lambda module: False)
    command = parts.pytest("cuda", 10**6, "-p", "without", "--collect-only", "tests")
    done = subprocess.run(command, cwd=environment.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
