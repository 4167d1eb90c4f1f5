"""The driver and the measurements for a GPU, without one."""

from __future__ import annotations

import itertools
import json
import os
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("tqdm")
pytest.importorskip("psutil")
pytest.importorskip("matplotlib")

from benchmarks import (
    cases,
    chosen,
    environment,
    fused,
    gpu,
    graphs,
    layer,
    network,
    op,
    report,
    smoke,
    summary,
)

FAST = ["--rivals", "eager", "--backends", "eager", "--budget", "0.01"]


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
        "device": {"kind": "cuda", "name": "NVIDIA H200", "sm": "9.0"} | cores,
        "digest": environment.digest("cuda"),
    }
    outcomes = [gpu.Outcome(name, "passed", passed=1) for name in environment.GPU_PARTS]
    written = gpu.results(outcomes, head, tmp_path)
    network_part = {"kind": "network", "layouts": [], "summary": {"checks": []}}
    about = {"name": "resnet50", "layers": 16, "batch": 128, "size": 224, "amp": "bfloat16"}
    return {
        **written,
        "op": measured | head | {"kind": "op"},
        "network": head | network_part | {"network": about},
    }


def check_h200(folder, results=None):
    if results is not None:
        environment.write_results(folder / "nvidia-h200.json", results)
    return report.main(["--check", "--device", "H200", "--results", str(folder)])


def test_gpu_results_that_count(gpu_results, tmp_path, capsys):
    readme = tmp_path / "README.md"
    assert check_h200(tmp_path, gpu_results) == 0
    shown = report.block(tmp_path, readme)
    assert "### NVIDIA H200" in shown
    assert "`make gpu`" in shown
    assert "bfloat16" in shown
    assert "left out" not in shown
    assert report.NO_GPU not in shown
    assert report.main(["--check", "--device", "A100", "--results", str(tmp_path)]) == 1
    assert "no results of a GPU named 'A100'" in capsys.readouterr().err
    assert report.main(["--device", "H200"]) == 2


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda r: r["checks"].update(triton=False), "part 'triton' failed"),
        (lambda r: r["checks"].update(sanitize=None), "part 'sanitize' was skipped"),
        (lambda r: r["checks"].pop("gpu"), "part 'gpu' was not run"),
        (lambda r: r.pop("op"), "no results of 'op'"),
        (lambda r: r.update(digest="0" * 64), "other kernel sources than today's"),
    ],
)
def test_gpu_results_that_do_not_count(gpu_results, tmp_path, capsys, change, why):
    change(gpu_results)
    assert check_h200(tmp_path, gpu_results) == 1
    assert why in capsys.readouterr().err
    shown = report.block(tmp_path, tmp_path / "README.md")
    assert "Results of NVIDIA H200 are left out: " in shown
    assert why in shown
    assert "###" not in shown


def test_no_gpu_results(tmp_path, capsys):
    assert check_h200(tmp_path) == 1
    assert "run make gpu there" in capsys.readouterr().err
    (tmp_path / "nvidia-h200.json").write_text("{")
    assert check_h200(tmp_path) == 1
    assert "expected a results file" in capsys.readouterr().err


def part(name, code, **options):
    return gpu.Part(name, 1, lambda seconds: [[sys.executable, "-c", code]], **options)


def test_a_failing_part_stops_no_other(tmp_path, capsys):
    endless = "import time; print('begun', flush=True); time.sleep(60)"
    parts = [
        part("build", "raise SystemExit('no compiler')"),
        part("cuda", "print('=== 1 failed, 2 passed, 3 skipped in 1s ==='); exit(1)"),
        part("triton", "print('5 skipped in 1s')"),
        gpu.Part("gpu", 1, lambda seconds: [["/no/such/program"]]),
        part("sanitize", "print('2 passed, 1 skipped')"),
        part("op", endless),
        part("network", "print('met: all of 7 contenders, 0 failed')"),
    ]
    outcomes = gpu.run_all(parts, 10, tmp_path)
    assert [(o.name, o.status, o.passed, o.failed, o.skipped) for o in outcomes] == [
        ("build", "failed", 0, 1, 0),
        ("cuda", "failed", 2, 1, 3),
        ("triton", "skipped", 0, 0, 5),
        ("gpu", "failed", 0, 1, 0),
        ("sanitize", "passed", 2, 0, 1),
        ("op", "failed", 0, 1, 0),
        ("network", "passed", 1, 0, 0),
    ]
    assert outcomes[5].note.startswith("stopped after")
    assert sum(o.seconds for o in outcomes) < 30
    assert "no compiler" in capsys.readouterr().out
    table = gpu.table(outcomes)
    assert len(table.splitlines()) == 2 + len(parts)
    checks = gpu.results(outcomes, {}, tmp_path)["checks"]
    assert checks["cuda"] is False
    assert checks["triton"] is None
    assert checks["network"] is True


@pytest.mark.parametrize("failing", [False, True])
def test_the_driver(failing, tmp_path, monkeypatch, capsys):
    """As on a machine with a GPU: its results, the table last, the exit status, the copy."""
    head = {"kind": "gpu", "device": {"name": "A GPU"}}
    parts = [part("build", "exit(1)" if failing else ""), part("op", "print('1 passed')")]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(environment, "head", lambda *arguments: dict(head))
    monkeypatch.setattr(gpu, "parts", lambda preset, scratch: parts)
    monkeypatch.setenv("OUT", str(tmp_path / "copy"))
    assert gpu.main(["--budget", "20", "--out", str(tmp_path / "out")]) == int(failing)
    last = capsys.readouterr().out.splitlines()[-2:]
    assert last[0].split()[:2] == ["build", "failed" if failing else "passed"]
    assert last[1].split()[:3] == ["op", "passed", "1"]
    for folder in ("out", "copy"):
        written = json.loads((tmp_path / folder / "a-gpu.json").read_text())
        assert written["checks"] == {"build": not failing, "op": True}
    assert "==== build.log" in (tmp_path / "copy" / "a-gpu.log").read_text()


def test_the_driver_needs_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == 2
    assert "no GPU" in capsys.readouterr().err


def test_the_plan_fits_its_budget(tmp_path):
    """Whether parts take all they get, or nothing."""
    parts = gpu.parts("quick", tmp_path)
    assert tuple(p.name for p in parts) == environment.GPU_PARTS
    for used in (0.0, 0.5, 1.0):
        left = gpu.BUDGET
        for i in range(len(parts)):
            seconds = gpu.limit(parts[i:], left)
            assert 0 < seconds <= left
            left -= used * seconds
        assert left >= -1e-6
    assert gpu.limit(parts, gpu.BUDGET) == parts[0].firm
    (command,) = parts[-1].commands(100)
    assert float(command[command.index("--seconds") + 1]) < 100
    for p in parts:
        assert all(command[0] in (sys.executable, "make", "env") for command in p.commands(60))


def test_gpu_cases():
    quick, full = (cases.gpu_preset(name) for name in ("quick", "full"))
    assert [c.shape[1:] for c in quick[:5]] == [shape[1:] for shape in cases.STAGES]
    assert {c.shape[0] for c in quick} >= {1, 8, 32, 64, 256}
    assert {c.dtype for c in quick} == {"float16", "bfloat16", "float32"}
    assert all(c.launches == cases.LAUNCHES and c.regimes == cases.REGIMES for c in quick[:5])
    assert [c.role for c in quick if c.compile] == ["stage"] * 5
    wanted = {
        (n, *shape[1:], dtype)
        for n in (1, 8, 32, 64, 256)
        for shape in cases.STAGES
        for dtype in ("float16", "bfloat16", "float32")
    }
    assert wanted <= {(*c.shape, c.dtype) for c in full}
    assert len({(c.shape, c.dtype) for c in full}) == len(full)


def test_a_run_out_of_time_names_what_it_left_out(tmp_path):
    path = tmp_path / "x-op.json"
    options = ["--shapes", "1x4x4x4,1x4x5x5", "--seconds", "-1"]
    assert op.main([*options, *FAST, "--output", str(path)]) == 0
    results = json.loads(path.read_text())
    assert results["left_out"] == ["1x4x4x4 float32", "1x4x5x5 float32"]
    assert "for want of time: 1x4x4x4" in report.text(results)


def test_percent_of_the_floor():
    """2S, 5S and 3S at the speed of a copy, which moves 2S."""
    seconds = {part: np.full(3, 8.0) for part in ("inference", *summary.TRAINING)}
    found = summary.timed({}, seconds, 4.0)["floor_percent"]
    assert found == {"inference": 50, "training": 125, "forward": 50, "backward": 75}


def test_graph_samples(monkeypatch):
    """Seconds per call, whatever a graph holds, with a clock that counts calls."""
    now = [0.0]

    class Clock:
        def mark(self):
            return now[0]

        def seconds(self, marks):
            return [b - a for a, b in itertools.pairwise(marks)]

    def spend(seconds):
        now[0] += seconds

    sample = graphs.sampler([lambda: spend(2 * 5), lambda: spend(3 * 5)], 5, Clock())
    for calls in (1, 5, 7, 20):
        np.testing.assert_allclose(np.array(sample(calls)) / calls, [5, 2, 3])
    sample = graphs.sampler([lambda: spend(4)], 1, Clock())
    np.testing.assert_allclose(sample(3), [12])
    assert graphs.repeats(2**20, 140 * 2**30) == graphs.MOST
    assert graphs.repeats(2**30, 140 * 2**30) == 1


def test_graphs_hold_every_input():
    seen = []

    def call(x):
        seen.append(x)
        return 2 * x

    xs = [torch.ones(3, requires_grad=True) for _ in range(4)]
    dys = [torch.ones(3) for _ in xs]
    for made, phases in (
        (graphs.inference_sampler(call, xs, list), 1),
        (graphs.training_sampler(call, [], xs, dys, list), 3),
    ):
        seen.clear()
        assert len(made(4)) == phases
        assert [id(x) for x in seen] == [id(x) for x in xs]


def test_both_launches_are_measured(tmp_path, monkeypatch):
    """The measurement of a GPU, with graphs that merely call, and one that cannot be recorded."""

    def record(works):
        if any(getattr(cell.cell_contents, "broken", False) for cell in works[0].__closure__):
            raise RuntimeError("operation not permitted\nwhen capturing")
        return list(works)

    monkeypatch.setattr(graphs.inference_sampler, "__defaults__", (record,))
    monkeypatch.setattr(graphs.training_sampler, "__defaults__", (record,))
    monkeypatch.setattr(layer, "many", lambda inputs: {k: 3 * v for k, v in inputs.items()})
    build = layer.build

    def breaking(rival, *arguments):
        made = build(rival, *arguments)
        made.broken = rival == "eager"
        return made

    monkeypatch.setattr(layer, "build", breaking)
    case = cases.Case((2, 4, 5, 5), "stage", launches=cases.LAUNCHES)
    timing = {"rounds": 3, "least": 3, "budget": 0.1, "sample_seconds": 1e-5}
    stream, graph = layer.measure_case(
        case, "cpu", ["eager", "da_ops:eager"], timing, lambda text: None
    )
    assert (stream["launch"], graph["launch"]) == cases.LAUNCHES
    assert {r["status"] for r in stream["results"]} == {"ok"}
    failed = [r for r in graph["results"] if r["status"] != "ok"]
    assert {(r["rival"], r["reason"]) for r in failed} == {
        ("eager", "CUDA graph: operation not permitted")
    }
    means = summary.means([stream, graph])
    assert {m["launch"] for m in means} == {"stream"}
    titles = [t for t, _ in report.tables.sections({"cases": [stream, graph]})]
    assert titles == [
        "fused (eager): ResNet-50 stages", "fused (eager): ResNet-50 stages, CUDA graph"
    ]  # fmt: skip


def test_a_plan_is_a_contender(monkeypatch):
    """Forward and backward of each contender run under its own plan, and are compared."""
    monkeypatch.setenv("DA_OPS_PLAN", "")
    assert fused.names("cuda") == ["da_ops:cuda", "da_ops:cuda:onchip"]
    assert fused.names("cpu") == ["da_ops:cpu"]
    build, seen = fused.build, set()

    def watched(name, *arguments):
        made = build(name, *arguments)
        note = lambda: seen.add((name, os.environ["DA_OPS_PLAN"]))  # noqa: E731
        made.register_forward_hook(lambda *_: note())
        made.merge.weight.register_hook(lambda _: note())
        return made

    monkeypatch.setattr(fused, "build", watched)
    timing = {"rounds": 3, "least": 3, "budget": 0.1, "sample_seconds": 1e-5}
    names = ["eager", "da_ops:eager", "da_ops:eager:onchip"]
    found = layer.measure_case(
        cases.Case((2, 4, 5, 5), "stage"), "cpu", names, timing, lambda text: None
    )
    assert {r["status"] for record in found for r in record["results"]} == {"ok"}
    assert seen == {("da_ops:eager", ""), ("da_ops:eager:onchip", "onchip")}
    assert os.environ["DA_OPS_PLAN"] == ""
    summarised = summary.summarise(found, "cuda")
    compared = [c["name"] for c in summarised["checks"] if "onchip against da_ops:" in c["name"]]
    assert compared == [
        f"{part}, da_ops:eager:onchip against da_ops:eager, warm, stream"
        for part in ("inference", "training")
    ]
    monkeypatch.setenv("DA_OPS_PLAN", "portable")  # for all
    assert fused.names("cuda") == ["da_ops:cuda"]


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


def test_smoke(monkeypatch, capsys):
    assert smoke.main(["--device", "cpu", "--backends", "eager", "--few"]) == 0
    assert "eager: right" in capsys.readouterr().out
    assert smoke.main(["--device", "cpu", "--backends", "cuda"]) == 1
    assert "cuda: failed" in capsys.readouterr().out
    monkeypatch.setattr(smoke, "sanitizer", lambda: None)
    assert smoke.main(["--sanitize"]) == 0
    assert capsys.readouterr().out.endswith("0 passed, 3 skipped\n")


def test_the_sanitizers_findings_fail(tmp_path, monkeypatch, capsys):
    tool = tmp_path / "compute-sanitizer"
    tool.write_text('#!/bin/sh\ntest "$2" != racecheck || { echo "a hazard"; exit 9; }\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert smoke.main(["--sanitize"]) == 1
    out = capsys.readouterr().out
    assert "a hazard" in out
    assert out.endswith("2 passed, 1 failed\n")


def test_whole_networks_are_compiled_and_compared(monkeypatch):
    pytest.importorskip("torchvision")
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **o: compiled.append(self))
    networks = network.build(["plain", "eager", "whole:eager", "whole:plain"], "resnet18", 3)
    assert compiled == [networks["whole:eager"], networks["whole:plain"]]
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        for name in ("plain", "eager"):
            networks[name].eval()
            networks[f"whole:{name}"].eval()
            torch.testing.assert_close(networks[f"whole:{name}"](x), networks[name](x))
    name = report.tables.name_of("whole:da_ops:cuda")
    assert name == "whole network compiled, fused (cuda)"
