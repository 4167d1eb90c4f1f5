"""The measurements for a GPU, without one."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import weakref

import numpy as np
import pytest
import torch

pytest.importorskip("tqdm")
pytest.importorskip("psutil")
pytest.importorskip("matplotlib")

from benchmarks import (
    cases,
    checks,
    environment,
    fused,
    graphs,
    layer,
    measure,
    network,
    networks,
    op,
    report,
    rivals,
    summary,
    tally,
)

FAST = ["--device", "cpu", "--rivals", "eager", "--backends", "eager", "--budget", "0.01"]


def test_gpu_cases():
    quick, full = (cases.gpu_preset(name) for name in ("quick", "full"))
    assert [c.shape[1:] for c in quick[:5]] == [shape[1:] for shape in cases.STAGES]
    assert {c.shape[0] for c in quick} >= {1, 8, 32, 64, 256}
    assert {c.dtype for c in quick} == {"float16", "bfloat16", "float32"}
    assert all(c.launches == cases.LAUNCHES and c.regimes == cases.REGIMES for c in quick[:5])
    compiled = [c for c in quick if c.compiled]  # measured without what compiles before
    assert [c.role for c in compiled] == ["stage"] * 2
    assert {c.shape for c in compiled} < {c.shape for c in quick[:5] if not c.compiled}
    assert all(c.compiled for c in full)
    wanted = {
        (n, *shape[1:], dtype)
        for n in (1, 8, 32, 64, 256)
        for shape in cases.STAGES
        for dtype in ("float16", "bfloat16", "float32")
    }
    assert wanted <= {(*c.shape, c.dtype) for c in full}
    assert len({(c.shape, c.dtype, c.subject) for c in full}) == len(full)
    for preset in (quick, full):
        tails = [c for c in preset if c.role == "tail"]
        assert len(tails) >= 2 and all(c.launches == cases.LAUNCHES for c in tails)


def test_a_run_out_of_time_names_what_it_left_out(tmp_path):
    path = tmp_path / "x-op.json"
    options = ["--shapes", "1x4x4x4,1x4x5x5", "--subjects", "layer", "--seconds", "1e-9"]
    assert op.main([*options, *FAST, "--output", str(path)]) == 0
    results = json.loads(path.read_text())
    assert results["left_out"] == ["1x4x4x4 float32", "1x4x5x5 float32"]
    assert "for want of time: 1x4x4x4" in report.text(results)
    correct = results["summary"]["checks"][0]
    assert (correct["name"], correct["passed"], correct["got"]) == ("correct", None, "not measured")


@pytest.mark.parametrize("told_to", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_leaves_the_cases_before(told_to, tmp_path, monkeypatch, capsys):
    path = tmp_path / "x-op.json"
    measure_case = layer.measure_case

    def interrupted(case, *rest):
        if case.shape == (1, 4, 5, 5):
            assert json.loads(path.read_text())["left_out"] == ["1x4x5x5 float32"]
            signal.raise_signal(told_to)
        return measure_case(case, *rest)

    monkeypatch.setattr(layer, "measure_case", interrupted)
    monkeypatch.setenv(tally.VARIABLE, str(tmp_path / "told"))
    options = ["--shapes", "1x4x4x4,1x4x5x5", "--subjects", "layer", *FAST, "--output", str(path)]
    before = signal.getsignal(signal.SIGTERM)
    assert op.main(options) == 128 + signal.SIGINT
    assert signal.getsignal(signal.SIGTERM) == before
    found = json.loads(path.read_text())
    assert [c["shape"] for c in found["cases"]] == [[1, 4, 4, 4]]
    assert found["summary"]["checks"][0]["passed"]
    assert "Not measured, for want of time: 1x4x5x5 float32" in capsys.readouterr().out
    assert tally.read(tmp_path / "told") == tally.Tally(passed=1, of=2)


def test_a_run_interrupted_at_once_shows_no_older_results(tmp_path, monkeypatch, capsys):
    (tmp_path / "x-op.json").write_text("older")
    monkeypatch.setattr(layer, "measure_case", lambda *_: signal.raise_signal(signal.SIGINT))
    output = ["--output", str(tmp_path / "x-op.json")]
    assert op.main(["--shapes", "1x4x4x4", *FAST, *output]) == 130
    assert (tmp_path / "x-op.json").read_text() == "older"


def test_an_interrupted_network_leaves_the_rounds_before(tmp_path, monkeypatch):
    pytest.importorskip("torchvision")
    pytest.importorskip("skimage")
    path = tmp_path / "x-network.json"
    sample = networks.Trainer.sample

    def interrupted(self, steps):
        if path.exists() and json.loads(path.read_text())["layouts"][0]["results"]:
            raise KeyboardInterrupt
        return sample(self, steps)

    monkeypatch.setattr(networks.Trainer, "sample", interrupted)
    monkeypatch.setattr(measure, "TELLING", 0.0)
    small = ["--network", "resnet18", "--batch", "2", "--size", "32", "--rounds", "9"]
    options = [*small, *FAST, "--output", str(path)]
    assert network.main(options) == 128 + signal.SIGINT
    (part,) = json.loads(path.read_text())["layouts"]
    found = {r["variant"]: r["seconds"]["samples"] for r in part["results"] if "seconds" in r}
    assert {found.pop(name) for name in ("plain", "eager", "da_ops:eager")} == {1}
    assert set(found) <= {"tail:plain"}  # where the kernels are built


def test_what_compiles_is_measured_last_and_in_place():
    """Cases that come again take the place of the first; until then they are said to be left."""
    todo = cases.gpu_preset("quick")
    names = op.labels(todo)
    assert len(set(names)) == len(names)
    again = next(i for i, name in enumerate(names) if "torch.compile" in name)
    assert todo[again].compiled and todo[again].shape == todo[1].shape
    records = [
        {"shape": list(c.shape), "dtype": c.dtype, "role": c.role, "threads": None, "case": i}
        for i, c in enumerate(todo)
    ]
    merged = []
    for record in records:
        merged = op.merged(merged, [record, dict(record)])
    assert [r["case"] for r in merged[:4]] == [0, 0, again, again]
    assert len(merged) == 2 * (len(todo) - 2)
    contenders = ["eager", "compile", "da_ops:cuda", "da_ops:cuda:onchip", "da_ops:triton"]
    assert [c for c in contenders if op.compiles(c)] == ["compile", "da_ops:triton"]


def test_where_there_is_no_time_to_compile_other_cases_are_measured(tmp_path, monkeypatch):
    todo = [cases.Case((1, 4, 4, 4), "stage"), cases.Case((1, 4, 5, 5), "stage", compiled=False)]
    monkeypatch.setattr(cases, "preset", lambda name: todo)
    monkeypatch.setattr(op, "COMPILING", {"cpu": 500.0})
    path = tmp_path / "x-op.json"
    options = ["--rivals", "eager,compile", "--seconds", "400", "--output", str(path)]
    assert op.main(["--device", "cpu", "--backends", "eager", "--budget", "0.01", *options]) == 0
    found = json.loads(path.read_text())
    assert found["left_out"] == ["1x4x4x4 float32"]
    assert [c["shape"] for c in found["cases"]] == [[1, 4, 5, 5]]


def test_quick_leaves_out_what_compiles_longest():
    def contenders(*arguments):
        options = op.parser().parse_args(["--device", "cuda", "--backends", "eager", *arguments])
        return op.contenders_for(options)[0]

    assert rivals.SLOW in rivals.compile_names("cuda")
    assert rivals.SLOW not in contenders()
    assert "compile:reduce-overhead" in contenders()
    assert rivals.SLOW in contenders("--preset", "full")
    assert rivals.SLOW in contenders("--rivals", f"eager,{rivals.SLOW}")


@pytest.mark.parametrize(("there", "device"), [(True, "cuda"), (False, "cpu")])
def test_the_gpu_is_measured_if_there_is_one(there, device, tmp_path, monkeypatch):
    """Unless the CPU is asked for; GPU results stay here until `make gpu` has tested it, too."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    monkeypatch.setattr(environment, "device_record", lambda device: {"name": f"a {device}"})
    for module in (op, network):
        options = module.parser().parse_args([])
        op.prepare(options)
        assert options.device == device
        options = module.parser().parse_args(["--device", "cpu"])
        op.prepare(options)
        assert options.device == "cpu"
    network.complete(options)
    assert options.batch == 8
    monkeypatch.setattr(environment, "LOCAL", tmp_path / "local")
    for preset in ("quick", "full"):
        path = environment.results_file("op", "cuda", preset, None)
        assert path == tmp_path / "local" / "a-cuda-op.json"


@pytest.mark.parametrize(("device", "told"), [("", ""), ("cpu", "--device cpu")])
def test_make_bench_passes_the_device_on(device, told):
    command = ["make", "-n", "VENV=", f"PYTHON={sys.executable}", f"DEVICE={device}", "bench"]
    try:
        done = subprocess.run(
            command, cwd=environment.ROOT, capture_output=True, text=True, check=True
        )
    except FileNotFoundError:
        pytest.skip("no make")
    lines = [x for x in done.stdout.splitlines() if "-m benchmarks." in x]
    assert [x.partition("--preset quick")[2].strip() for x in lines[:2]] == [told, told]
    assert lines[2].endswith("benchmarks.report")


def test_percent_of_the_floor():
    """2S, 5S and 3S at the speed of a copy, which moves 2S."""
    seconds = {part: np.full(3, 8.0) for part in ("inference", *summary.TRAINING)}
    found = summary.timed({}, seconds, 4.0)["floor_percent"]
    assert found == {"inference": 50, "training": 125, "forward": 50, "backward": 75}
    found = summary.timed({}, seconds, 4.0, "tail")["floor_percent"]
    assert found == {"inference": 75, "training": 275, "forward": 100, "backward": 175}


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
    seen, given = [], []

    def call(x):
        seen.append(x)
        y = 2 * x
        given.append(weakref.ref(y))
        return y

    xs = [torch.ones(3, requires_grad=True) for _ in range(4)]
    dys = [torch.ones(3) for _ in xs]
    for made, phases in (
        (graphs.inference_sampler(call, xs, list), 1),
        (graphs.training_sampler(call, [], xs, dys, list), 3),
    ):
        seen.clear()
        assert len(made(4)) == phases
        assert [id(x) for x in seen] == [id(x) for x in xs]
        # Nothing is left of one recording that the next could meet.
        assert not any(y() is not None for y in given)


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
    titles = [s.title for s in report.tables.sections({"cases": [stream, graph]})]
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
    summarised = checks.summarise(found, "cuda")
    compared = [c["name"] for c in summarised["checks"] if "onchip against da_ops:" in c["name"]]
    assert compared == [
        f"{part}, da_ops:eager:onchip against da_ops:eager, warm, stream"
        for part in ("inference", "training")
    ]
    monkeypatch.setenv("DA_OPS_PLAN", "portable")  # for all
    assert fused.names("cuda") == ["da_ops:cuda"]


def test_whole_networks_are_compiled_and_compared(monkeypatch):
    pytest.importorskip("torchvision")
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **o: compiled.append(self))
    made = networks.build(["plain", "eager", "whole:eager", "whole:plain"], "resnet18", 3)
    assert compiled == [made["whole:eager"], made["whole:plain"]]
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        for name in ("plain", "eager"):
            made[name].eval()
            made[f"whole:{name}"].eval()
            torch.testing.assert_close(made[f"whole:{name}"](x), made[name](x))
    name = report.tables.name_of("whole:da_ops:cuda")
    assert name == "whole network compiled, fused (cuda)"
