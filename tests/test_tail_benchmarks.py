"""The benchmarks of the residual tail: what is measured is the tail, and none of it is dropped."""

from __future__ import annotations

import copy
import json

import pytest
import torch

pytest.importorskip("tqdm")
pytest.importorskip("psutil")
pytest.importorskip("matplotlib")

import da_ops
from benchmarks import (
    cases,
    charts,
    checks,
    files,
    layer,
    network,
    networks,
    op,
    pages,
    report,
    rivals,
    tail,
)
from benchmarks.summary import PLAIN

FAST = ["--device", "cpu", "--rivals", "eager", "--budget", "0.01"]
OURS = "da_ops:cpu"
BOTH = ("eager", OURS)
EVERY = (*BOTH, *(PLAIN + name for name in BOTH))


@pytest.fixture
def op_file(fused_cpu, tmp_path):
    path = tmp_path / "a-device-op.json"
    what = ["--subjects", "tail", "--shapes", "2x8x6x5,3x16x4x4"]
    assert op.main([*what, *FAST, "--output", str(path)]) == 0
    return path


def timing():
    return {"rounds": 3, "least": 3, "budget": 0.1, "sample_seconds": 1e-5}


def measured(*names):
    case = cases.Case((2, 8, 6, 5), "tail")
    return layer.measure_case(case, "cpu", list(names), timing(), lambda text: None)


def test_every_contender_is_checked_and_timed(op_file):
    results = json.loads(op_file.read_text())
    assert [c["role"] for c in results["cases"]] == ["asked tail"] * 2
    for case in results["cases"]:
        found = {(r["rival"], r["layout"]): r for r in case["results"]}
        assert set(found) == {(name, layout) for name in EVERY for layout in cases.LAYOUTS}
        for (name, _), result in found.items():
            assert result["status"] == "ok"
            with_attention = not name.startswith(PLAIN)
            assert ("attention.gate_weight" in result["accuracy"]) == with_attention
            of_all = {"inference", "y", "x", "shortcut", "norm.weight", "norm.bias"}
            of_all |= {"norm.running_mean", "norm.running_var"}
            assert of_all <= set(result["accuracy"])
            assert max(e["error"] for e in result["accuracy"].values()) < 1e-6
        pairs = {(s["fused"], s["rival"]) for s in case["speedups"]}
        assert pairs == {
            (OURS, "eager"),
            (OURS, PLAIN + "eager"),
            (PLAIN + OURS, PLAIN + "eager"),
        }


def test_the_rivals_are_the_modules_as_torchvision_calls_them():
    u = torch.randn(2, 6, 5, 4)
    for plain in tail.plains(rivals.PlainDA(6), u, 0.0).values():
        made = tail.build("eager", plain, u).train()
        x = torch.nn.functional.batch_norm(u, None, None, made.norm.weight, made.norm.bias, True)
        if made.attention is not None:
            x = made.attention(x)
        torch.testing.assert_close(made(u), torch.relu(x + plain.shortcut))


@pytest.mark.parametrize("layout", cases.LAYOUTS)
def test_fused_contenders_are_one_operator(fused_cpu, layout):
    u = torch.randn(2, 8, 6, 5).to(memory_format=cases.LAYOUTS[layout]).requires_grad_()
    for name in (OURS, PLAIN + OURS):
        plain = tail.plains(rivals.PlainDA(8), u.detach(), 1e-4)[
            PLAIN if name.startswith(PLAIN) else ""
        ]
        out = layer.build(name, plain, 8, u).train()(u)
        assert type(out.grad_fn).__name__ == "ResidualFunctionBackward"
        assert out.stride() == u.stride()


def test_what_is_not_one_operator_does_not_take_part(fused_cpu, monkeypatch):
    (record,) = measured("eager", OURS, "da_ops:eager")
    left_out = {r["rival"]: r["reason"] for r in record["results"] if r["status"] == "left out"}
    assert set(left_out) == {"da_ops:eager", PLAIN + "da_ops:eager"}
    assert "no kernel of the residual tail" in left_out["da_ops:eager"]
    assert checks.summarise([record])["checks"][0]["passed"]  # it is told, and nothing is wrong
    assert "left out: backend 'eager' has no kernel" in report.tables.case_line(record)

    def in_steps(self, u):  # and one that only seems to
        return torch.relu(self.branch(u) + self.shortcut)

    monkeypatch.setattr(tail.FusedTail, "forward", in_steps)
    (record,) = measured("eager", OURS)
    failed = {r["rival"] for r in record["results"] if r["status"] == "failed"}
    assert failed == {OURS, PLAIN + OURS}
    correct = checks.summarise([record])["checks"][0]
    assert not correct["passed"] and correct["must"]
    assert "expected one operator" in correct["got"]
    many = checks.summarise([record] * 20)["checks"][0]["got"]
    assert many.count("expected one operator") == 2 and many.endswith("; 78 more")


def test_nothing_that_is_rectified_is_near_zero():
    u = torch.randn(2, 8, 6, 5)
    for plain in tail.plains(rivals.PlainDA(8), u, 0.1).values():
        wide = plain.doubled()
        for training in (False, True):  # which changes the statistics
            assert (wide.train(training).branch(u.double()) + wide.shortcut).abs().min() > 0.09


@pytest.mark.parametrize("wrong", ["norm.running_mean", "shortcut"])
def test_wrong_tails_are_found(fused_cpu, monkeypatch, wrong):
    """Running statistics that are not kept, and a shortcut with twice its gradient."""

    def broken(self, u):
        kept, shortcut = self.norm.running_mean.clone(), self.shortcut
        if wrong == "shortcut" and self.training:
            shortcut = 2 * shortcut - shortcut.detach()
        out = da_ops.residual_attention(u, shortcut, self.norm, self.attention)
        if wrong == "norm.running_mean":
            self.norm.running_mean.copy_(kept)
        return out

    monkeypatch.setattr(tail.FusedTail, "forward", broken)
    (record,) = measured("eager", OURS)
    reasons = [r["reason"] for r in record["results"] if r["status"] == "failed"]
    assert len(reasons) == 4
    assert all(reason.startswith(f"wrong {wrong}: error") for reason in reasons)


def fake(shapes=cases.STAGES, threads=2, inference=2.0, training=4.0):
    """Records of the tail as a run writes them, with each speed-up as given."""
    results = [
        {"rival": name, "layout": layout, "status": "ok", "memory": {"peak": peak, "held": 0}}
        for layout in cases.LAYOUTS
        for name, peak in (("eager", 60), (PLAIN + "eager", 40), (OURS, 30), (PLAIN + OURS, 30))
    ]
    for result in results:
        error = {"dtype": "float32", "is_sum": False, "numbers": 99, "error": 2e-7, "value": 1.0}
        result["accuracy"] = {"y": error | {"share": 1e-7, "rounding": 6e-8}}
        phases = ("inference", "training", "forward", "backward")
        result["seconds"] = {p: {"median": 1.0, "p10": 1.0, "p90": 1.0} for p in phases}
        result["floor_percent"] = dict.fromkeys(phases, 50.0)
    speedups = [
        {
            **{"fused": ours, "layout": layout, "rival": rival, "part": part},
            "better_layout": layout,
            "same": {"median": value},
            "better": {"median": value},
        }
        for ours, rivals in (
            (OURS, ("eager", "compile", PLAIN + "eager", PLAIN + "compile")),
            (PLAIN + OURS, (PLAIN + "eager", PLAIN + "compile")),
        )
        for rival in rivals
        for layout in cases.LAYOUTS
        for part, value in (("inference", inference), ("training", training))
    ]
    return [
        {
            **{"shape": list(shape), "dtype": "float32", "role": "tail", "regime": "warm"},
            **{"launch": "stream", "threads": threads, "bytes": 10},
            "results": copy.deepcopy(results),
            "speedups": copy.deepcopy(speedups),
        }
        for shape in shapes
    ]


def test_no_case_of_the_tail_is_dropped(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    full = [c for c in cases.preset("full") if c.role == "tail"]
    assert [(c.threads, c.shape) for c in full] == [(n, s) for n in (2, 1) for s in cases.STAGES]
    (quick,) = [c for c in cases.preset("quick") if c.role == "tail"]
    assert quick.shape in cases.STAGES
    for case in (*full, quick):
        assert case.layouts == tuple(cases.LAYOUTS)
        assert case.compiled and case.dtype == "float32"
    known = ["eager", "compile", OURS]
    assert tail.contenders(known) == [*known, *(PLAIN + name for name in known)]


def test_no_check_of_the_tail_is_dropped():
    """The floors of each number of threads, against each rival."""
    targets = {
        ("inference", "eager"): 2.5,
        ("inference", "compile"): 1.3,
        ("inference", "plain:eager"): 1.1,
        ("training", "eager"): 3.2,
        ("training", "compile"): 3.0,
        ("training", "plain:eager"): 1.1,
    }
    assert checks.TARGETS["tail"] == targets
    records = [*fake(), *fake(threads=1, training=2.0)]
    found = {c["name"]: c for c in checks.summarise(records)["checks"]}
    for (part, rival), target in targets.items():
        for threads, training in ((2, 4.0), (1, 2.0)):
            speed = {"inference": 2.0, "training": training}[part]
            check = found[f"{part}, tail {OURS} against {rival}, {threads} thread(s)"]
            assert check["passed"] == (speed >= target)
            assert check["got"] == f"{speed:.2f}x"
    for name in (OURS, PLAIN + OURS):
        assert found[f"accuracy, tail {name}, float32"]["passed"]
        assert found[f"training memory, tail {name}"]["passed"]
    # A part that was not measured is said to be so.
    for record in records:
        record["speedups"] = [s for s in record["speedups"] if s["rival"] == "eager"]
    found = {c["name"]: c for c in checks.summarise(records)["checks"]}
    for part, rival in targets:
        check = found[f"{part}, tail {OURS} against {rival}, 1 thread(s)"]
        assert (check["passed"] is None) == (rival != "eager")
    # The layer's own means and promises are not those of the tail.
    (mean,) = {m["role"] for m in checks.summarise(fake())["means"]}
    assert mean == "tail"


def test_accuracy_and_memory_can_be_missed():
    records = fake()
    for record in records:
        for result in record["results"]:
            if result["rival"] == OURS:
                result["accuracy"]["y"]["error"] = 1.1e-6
                result["memory"]["peak"] = 60
    found = {c["name"]: c for c in checks.summarise(records)["checks"]}
    assert not found[f"accuracy, tail {OURS}, float32"]["passed"]
    assert not found[f"training memory, tail {OURS}"]["passed"]
    for record in records:  # where eager is off, too, twice its error is allowed
        for result in record["results"]:
            result["accuracy"]["y"]["error"] = 1.1e-6
    found = {c["name"]: c for c in checks.summarise(records)["checks"]}
    assert found[f"accuracy, tail {OURS}, float32"]["passed"]


def test_tables_and_title_tell_what_was_found():
    records = [*fake(), *fake(threads=1)]
    sections = report.tables.sections({"cases": records})
    assert [s.title for s in sections] == [
        f"{name}: tails of the ResNet-50 stages, {n} thread(s)"
        for name in ("fused (cpu)", "fused (cpu) without attention")
        for n in (2, 1)
    ]
    for section in sections:
        assert {len(line) for line in section.table} == {len(section.header)}
        assert len(section.table) == 2 * len(cases.STAGES) + 1
        assert "inference vs eager without" in section.header
    assert sections[0].table[-1].count("2.00x (2.00x)") == 4
    assert sections[2].table[-1].count("2.00x (2.00x)") == 2  # rivals without attention
    name, shown = charts.tails({"cases": records})
    assert (name, len(shown)) == (OURS, len(cases.STAGES))
    for speed in (1.25, 0.8):
        title = charts.tail_finding(name, fake(inference=speed, training=2 * speed))
        assert f"train {2 * speed:.2f}x, infer {speed:.2f}x as fast" in title
    assert charts.tail_finding(name, []) == ""


def test_chart_and_page(op_file, tmp_path):
    assert op_file.with_name("a-device.png").stat().st_size > 10_000
    block = pages.every_table(tmp_path, tmp_path / "page.md")
    assert "fused (cpu): tail as asked" in block
    assert "eager without attention, " in block
    page = tmp_path / "page.md"
    page.write_text("\n".join(pages.markers("benchmarks")))
    where = ["--results", str(tmp_path), "--page", str(page)]
    assert report.main([*where, "--write"]) == 0
    assert report.main([*where, "--check"]) == 0


def test_networks_with_fused_tails_compute_the_same(fused_cpu):
    pytest.importorskip("torchvision")
    names = ["plain", "tail:plain", "eager", f"tail:{OURS}"]
    made = networks.build(names, "resnet18", 3)
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    for one in made.values():
        one.double()
    assert networks.unfused(made["plain"]) is not None
    for same, fused in (names[:2], names[2:]):
        assert networks.unfused(made[fused]) is None
        for training in (True, False):
            out = [made[name].train(training)(x) for name in (same, fused)]
            torch.testing.assert_close(*out)


def test_a_network_is_measured(fused_cpu, tmp_path):
    pytest.importorskip("torchvision")
    pytest.importorskip("skimage")
    path = tmp_path / "a-device-network.json"
    small = ["--network", "resnet18", "--batch", "4", "--size", "64", "--rounds", "2"]
    assert network.main([*small, *FAST, "--output", str(path)]) == 0
    results = json.loads(path.read_text())
    (part,) = results["layouts"]
    assert {r["variant"]: r["status"] for r in part["results"]} == dict.fromkeys(
        ("plain", "eager", OURS, "tail:plain", f"tail:{OURS}"), "ok"
    )
    found = {c["name"]: c for c in results["summary"]["checks"]}
    name = f"tail:{OURS}"
    for check in ("training, {} against plain", "inference, {} against plain"):
        assert found[f"{check.format(name)}, channels_last"]["passed"] is not None
    assert found[f"memory, {name}, channels_last"]["passed"]
    assert found[f"losses, {name} as eager, channels_last"]["passed"]
    assert found["losses, tail:plain as plain, channels_last"]["passed"]
    rows = report.tables.network_rows(results)
    assert {len(row) for row in rows} == {len(report.tables.network_header(results))}
    assert [row[0] for row in rows][-2:] == ["no attention, fused tail", "fused tail (cpu)"]


def test_what_a_network_was_not_measured_for_is_told():
    plain = {"variant": "plain", "status": "ok", "memory": {"peak": 5}}
    ours = {"variant": f"tail:{OURS}", "status": "left out", "reason": "too late"}
    part = {"layout": "contiguous", "results": [plain, {**plain, "variant": "eager"}, ours]}
    found = {c["name"]: c for c in network.checks([part], 0)}
    assert len(found) == 3
    assert all(c["passed"] is None and "too late" in c["got"] for c in found.values())
    for speed, more, passed in ((1.5, 0, True), (0.5, 9, False)):
        fast = {"speedup": {"median": speed}}
        ours = {"status": "ok", **fast, "inference": fast, "memory": {"peak": 5 + more}}
        made = network.tail_checks("a tail", ours, plain, "contiguous", maps=3)
        assert [c["passed"] for c in made] == [passed] * 3


def test_results_without_tails_are_read():
    """Those of before: no tails, no inference of networks."""
    for together in files.load_folder(report.environment.COMMITTED).values():
        assert pages.device_lines(together, "a.png")
        for results in together.values():
            assert report.text(results)


def test_times_and_sizes_below_zero_read_as_those_above():
    for value in (-55.5628, -0.123456, 0.05):
        assert report.tables.ms(value / 1e3) == "-" * (value < 0) + report.tables.ms(
            abs(value) / 1e3
        )
    assert report.tables.mib(-(2.0**21)) == "-2.0"
