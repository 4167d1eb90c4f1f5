"""CUDA graphs of whole networks: what is recorded and measured, and what is shown of it.

Where there is no GPU, what is recorded is merely called again.
"""

from __future__ import annotations

import copy
import itertools
import json
from functools import partial
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("tqdm")
pytest.importorskip("psutil")
pytest.importorskip("matplotlib")

from benchmarks import (
    cases,
    graphs,
    layer,
    network,
    networks,
    pages,
    report,
    rivals,
    steps,
    summary,
)

OURS = "da_ops:cpu"
COSTS = ("cost", "cost_percent", "speedup")
DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")),
]


def record(works, pool=None):
    """As graphs.record: all are called once, and again in each replay."""
    for work in works:
        work()
    return list(works)


def trainer(device="cpu", amp="none"):
    """Of a network small enough for any machine, with batch statistics."""
    torch.manual_seed(0)
    layers = torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.AdaptiveAvgPool2d(1)
    made = torch.nn.Sequential(*layers, torch.nn.Flatten(), torch.nn.Linear(4, 3))
    data = [(torch.randn(2, 3, 8, 8), torch.tensor([0, n])) for n in range(3)]
    found = networks.Trainer(made, data, "channels_last", device, amp)
    found.sample(1)  # momentum is there before anything is recorded
    return found


@pytest.mark.parametrize("device", DEVICES)
def test_replays_are_training_steps(device):
    """Each on the next batch; the losses remain those of the steps that are launched one by one."""
    replayed, stepped = trainer(device), trainer(device)
    recording = graphs.record if device == "cuda" else record
    made = steps.Graphs(replayed, recording)
    assert len(made.sample(2)) == 1
    for index in (0, 0, 1):  # before the recording, then twice
        stepped.optimizer.zero_grad()
        stepped.update(stepped.loss(*stepped.data[index]))
    for name, value in replayed.network.state_dict().items():
        torch.testing.assert_close(value, stepped.network.state_dict()[name])
    assert len(replayed.losses) == 1
    assert all(p.grad is None for p in replayed.network.parameters())
    before = copy.deepcopy(replayed.network.state_dict())
    assert len(made.infer(2)) == 1
    assert not replayed.network.training
    for name, value in replayed.network.state_dict().items():
        assert torch.equal(value, before[name])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_pool_is_shared_and_survives_a_failed_recording():
    pool = torch.cuda.graph_pool_handle()
    first = steps.Graphs(trainer("cuda", "bfloat16"), partial(graphs.record, pool=pool))
    second = steps.Graphs(trainer("cuda", "bfloat16"), partial(graphs.record, pool=pool))
    broken = trainer("cuda")
    broken.network.register_forward_hook(lambda *call: call[-1].sum().item())
    found, without = steps.recorded({"eager": broken, "plain": trainer("cuda")}, 60.0, print)
    assert without["eager"]["status"] == "failed"
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    for made in (first, second, found["plain"]):
        for _ in range(2):
            made.sample(1)
            made.infer(1)
        torch.cuda.synchronize()
        for value in made.trainer.network.state_dict().values():
            assert value.isfinite().all()
    for name, value in first.trainer.network.state_dict().items():
        other = second.trainer.network.state_dict()[name]
        torch.testing.assert_close(value, other, rtol=1e-2, atol=1e-3)
    broken.network._forward_hooks.clear()
    broken.sample(1)


def test_copying_a_batch_is_not_timed(monkeypatch):
    now = [0.0]

    def spend(seconds):
        now[0] += seconds

    clock = SimpleNamespace(
        mark=lambda: now[0], seconds=lambda marks: [b - a for a, b in itertools.pairwise(marks)]
    )
    made = steps.Graphs(trainer(), record)
    made.trainer.watch = clock
    made.x = SimpleNamespace(copy_=lambda x: spend(5))
    made.replay_step, made.replay_inference = partial(spend, 3), partial(spend, 1)
    assert (made.sample(1), made.sample(2), made.infer(3)) == ([3], [6], [3])


@pytest.fixture
def faked(monkeypatch):
    """A CPU that is measured by both launches; the pools of memory that were given out."""
    pools = []

    def recording(works, pool=None):
        pools.append(pool)
        inner = works[0].__self__.trainer.network.modules()
        if any(isinstance(module, rivals.PlainDA) for module in inner):
            raise RuntimeError("operation not permitted\nwhen capturing")
        return record(works)

    complete = network.complete

    def both(options):
        complete(options)
        options.launches = cases.LAUNCHES

    handles = itertools.count(1)
    monkeypatch.setattr(network, "complete", both)
    monkeypatch.setattr(graphs, "record", recording)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, next(handles)))
    return pools


def measured(path, *more):
    pytest.importorskip("torchvision")
    pytest.importorskip("skimage")
    small = ["--network", "resnet18", "--batch", "4", "--size", "64", "--rounds", "2", *more]
    fast = ["--device", "cpu", "--rivals", "eager", "--backends", "cpu", "--budget", "0.01"]
    assert network.main([*small, *fast, "--output", str(path)]) == 0
    return json.loads(path.read_text())


def test_both_launches_of_a_network_are_measured(fused_cpu, faked, tmp_path, capsys):
    path = tmp_path / "a-device-network.json"
    results = measured(path)
    (part,) = results["layouts"]
    by_name = {r["variant"]: r for r in part["results"]}
    failed = by_name.pop("eager")
    assert failed["graph"] == {"status": "failed", "reason": "operation not permitted"}
    assert failed["status"] == "ok" and "cost" in failed and "inference" in failed
    assert set(by_name) == {"plain", OURS, "tail:plain", f"tail:{OURS}"}
    assert faked == [(0, 1), (0, 1), (0, 2), (0, 2), (0, 2)]  # another pool after what failed
    for name, r in by_name.items():
        assert len(r["losses"]) == 2 + network.WARM_UP
        for phase, graph in ((r, r["graph"]), (r["inference"], r["graph"]["inference"])):
            keys = {"seconds"} if name == "plain" else {*COSTS, "seconds"}
            assert keys == set(graph) - {"inference"} == set(phase) & {*COSTS, "seconds"}
            assert graph["seconds"]["samples"] >= 2
    checks = {c["name"]: c for c in results["summary"]["checks"] if c["name"].endswith("graph")}
    assert set(checks) == {
        f"{what}, tail:{OURS} against plain, channels_last, graph"
        for what in ("training", "inference")
    }
    assert not any(c["must"] for c in checks.values())
    for shown in (capsys.readouterr().out, "\n".join(pages.device_lines({"network": results}, ""))):
        assert "CUDA graph of eager channels_last failed: operation not permitted" in shown
        assert "training, tail:da_ops:cpu against plain, channels_last, graph" in shown
    assert path.with_name("a-device.png").exists()


def test_an_interruption_leaves_what_was_launched_one_by_one(
    fused_cpu, faked, tmp_path, monkeypatch
):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(steps, "recorded", interrupted)
    pytest.importorskip("torchvision")
    pytest.importorskip("skimage")
    path = tmp_path / "x-network.json"
    with pytest.raises(AssertionError, match="130"):
        measured(path)
    (part,) = json.loads(path.read_text())["layouts"]
    assert all("inference" in r and "graph" not in r for r in part["results"])


def test_what_is_not_recorded_says_why(monkeypatch):
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 1))
    caches = {}

    def made(trainer, record, cache):
        caches[trainer.name] = cache

    monkeypatch.setattr(steps, "Graphs", made)

    def some(*names, scaled=False):
        scaler = SimpleNamespace(is_enabled=lambda: scaled)
        return {name: SimpleNamespace(name=name, scaler=scaler) for name in names}

    quiet = lambda text: None  # noqa: E731
    every = some("plain", "compile", "compile:reduce-overhead", "whole:plain")
    found, without = steps.recorded(every, 60.0, quiet)
    assert list(found) == ["plain", "compile"]
    assert caches == {"plain": False, "compile": True}
    assert set(without) == {"compile:reduce-overhead"}
    for trainers, left, reason in (
        (some("plain", "eager"), steps.CAPTURE, "--seconds are too few"),
        (some("plain", "eager", scaled=True), 60.0, "float16"),
    ):
        found, without = steps.recorded(trainers, left, quiet)
        assert not found and set(without) == {"plain", "eager"}
        for why in without.values():
            assert why["status"] == "left out" and reason in why["reason"]


def test_what_is_compiled_leaves_time_for_graphs():
    options = SimpleNamespace(device="cuda", budget=8.0, launches=cases.LAUNCHES)
    assert network.needed("plain", options, 3) == network.PLAINLY + 10
    assert network.needed("compile", options, 3) == network.LAYERS + 20 + 4 * steps.CAPTURE
    options = SimpleNamespace(device="cpu", budget=8.0, launches=cases.LAUNCHES[:1])
    assert network.needed("whole:plain", options, 3) == network.WHOLLY + 10


def by_both(percent, replayed):
    """A variant's record in results of a network."""

    def phase(percent):
        spread = {"median": 0.03, "p10": 0.03, "p90": 0.03, "samples": 3}
        speedup = {"median": 100 / (100 + percent)}
        return {"seconds": spread, "cost": spread, "cost_percent": percent, "speedup": speedup}

    graph = {} if replayed is None else {"graph": {**phase(replayed), "inference": phase(replayed)}}
    memory = {"peak": 2**20, "held": 2**20}
    return {
        "status": "ok",
        **phase(percent),
        "inference": phase(percent),
        "memory": memory,
        **graph,
    }


def results(*variants):
    about = {"name": "resnet18", "layers": 8, "batch": 2, "size": 32, "amp": "bfloat16"}
    return {"network": about, "layouts": [{"layout": "contiguous", "results": list(variants)}]}


@pytest.mark.parametrize("replayed", [None, -20.0, 25.0])
def test_checks_of_a_graph_are_there_where_it_was_measured(replayed):
    ours, plain = by_both(25.0, replayed), by_both(0.0, replayed)
    found = network.tail_checks("a tail", ours, plain, "contiguous", maps=3)
    assert [c["passed"] for c in found[:3]] == [False, False, True]
    assert [c["passed"] for c in found[3:]] == [replayed == -20.0] * 2 * (replayed is not None)
    assert all(c["name"].endswith("against plain, contiguous, graph") for c in found[3:])


def test_both_launches_are_shown():
    eager = {"variant": "eager", **by_both(30.0, 40.0)}
    ours = {"variant": OURS, **by_both(5.0, 2.0)}
    without = results({"variant": "eager", **by_both(30.0, None)})
    assert len(report.tables.network_tables(without)) == 1
    assert report.tables.graph_lines(without) == []
    assert pages.network_line(without) == (
        "A training step of resnet18 with the layer, contiguous: eager +30.0%."
    )
    failed = {**ours, "graph": {"status": "failed", "reason": "no"}}
    stream, graph = report.tables.network_tables(results(eager, ours, {**failed, "variant": "x"}))
    assert len(stream[1]) == 3
    assert graph[1] == [
        ["eager", "contiguous", "30.0", "30.0", "40.0", "30.0", "40.0"],
        ["fused (cpu)", "contiguous", "30.0", "30.0", "2.0", "30.0", "2.0"],
    ]
    assert {len(row) for row in graph[1]} == {len(graph[0])}
    assert "CUDA graph" in report.tables.plain_table(*graph)
    assert report.tables.graph_lines(results(failed)) == [
        "CUDA graph of fused (cpu) contiguous failed: no"
    ]
    assert pages.network_line(results(eager, ours)) == (
        "A training step of resnet18 with the layer, contiguous: eager +30.0%, fused (cpu) +5.0%."
        " As a CUDA graph: eager +40.0%, fused (cpu) +2.0%."
    )
    # A report of rounds of training has no inference yet.
    del ours["graph"]["inference"]
    (row,) = report.tables.graph_rows(results(ours))
    assert row[-2:] == ["-", "-"]


def test_costs_are_beside_plain():
    found = summary.beside_plain(
        {"plain": torch.ones(3, 1).numpy(), "x": 2 * torch.ones(3, 1).numpy()}
    )
    assert found["x"]["cost_percent"] == 100
    assert found["x"]["speedup"]["median"] == 0.5
    assert set(found["plain"]) == {"seconds"}


def test_a_recording_that_fails_tells_what_failed_first():
    class Recording:
        def __enter__(self):
            return self

        def __exit__(self, *error):
            raise RuntimeError("failed due to a previous error")

    with pytest.raises(RuntimeError) as raised, Recording():
        raise ValueError("not while recording\nat line 1")
    told = layer.reason_of_recording(raised.value)
    assert told == "not while recording; then failed due to a previous error"
    assert layer.reason_of_recording(ValueError("alone")) == "alone"
