"""The ablation pairs its seeds, says what it found, and loses no run."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch

pytest.importorskip("torchvision")
pytest.importorskip("skimage")
pytest.importorskip("matplotlib")
pytest.importorskip("psutil")

from scipy import stats

from benchmarks import environment, files, pages
from benchmarks.environment import BenchmarkError
from benchmarks.paper import ablation, chart
from benchmarks.paper import report as findings

TINY = dataclasses.replace(
    ablation.PRESETS["small"],
    size=32,
    min_scale=0.3,
    train=6,
    test=3,
    batch_size=2,
    pretraining=2,
    steps=4,
    seeds=2,
)


@pytest.fixture
def tiny(monkeypatch):
    """The ablation with three networks of four steps."""
    monkeypatch.setitem(ablation.PRESETS, "small", TINY)
    few = {name: ablation.VARIANTS[name] for name in (findings.PLAIN, "DA", "SE")}
    monkeypatch.setattr(ablation, "VARIANTS", few)


def results(**values):
    """A results file with these mAPs (in percent) by variant and seed."""
    runs = [
        {"variant": name.replace("_", " "), "seed": seed, "map_11": value / 100, "curve": []}
        for name, found in values.items()
        for seed, value in enumerate(found)
    ]
    settings = {"backbone": "resnet18", "size": 64, "seeds": 3, "train": 9, "test": 9}
    settings |= {"steps": 5, "batch_size": 2}
    return {"settings": settings, "pretraining": None, "runs": runs, "seconds": 60.0}


def test_the_interval_is_that_of_a_paired_t_test():
    draw = np.random.default_rng()
    plain, mine = draw.normal(60, 2, 5), draw.normal(61, 2, 5)
    found = findings.difference(results(plain=plain, SE=mine), "SE")
    expected = stats.ttest_rel(mine, plain).confidence_interval(0.95)
    assert found.mean == pytest.approx((mine - plain).mean())
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))


def test_several_intervals_hold_together():
    draw = np.random.default_rng()
    plain, *others = draw.normal(60, 2, (4, 5))
    many = results(plain=plain, **dict(zip(("SE", "DA", "ECA"), others, strict=True)))
    found = findings.difference(many, "SE")
    expected = stats.ttest_rel(others[0], plain).confidence_interval(1 - 0.05 / 3)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))


def test_the_chart_says_what_differs_first():
    same = {"DA": [61, 60, 62], "SE": [60, 62, 61]}
    headline = chart.headline(results(plain=[60, 61, 62], **same))
    assert headline == "No difference from plain found for any"
    better = results(plain=[60, 61, 62], ECA=[65, 66.1, 67], **same)
    headline = chart.headline(better)
    assert headline == "Better than plain: ECA; no difference from plain found for the other 2"


def test_a_start_that_is_not_reached_again_is_told():
    record = results(plain=[60, 61, 62])
    assert "win back" not in findings.description(record)
    record["settings"]["pretraining"] = 7
    for before, told in ((0.6, False), (0.62, True)):
        record["pretraining"] = {"map_11": before, "seconds": 60.0}
        assert ("win back" in findings.description(record)) == told


def test_only_seeds_that_both_have_are_compared():
    found = findings.difference(results(plain=[50, 60], SE=[51, 63, 99]), "SE")
    assert found.mean == pytest.approx(2)
    assert findings.difference(results(plain=[50]), "SE") is None


@pytest.mark.parametrize(
    ("differences", "finding"),
    [
        ([1, 1.1, 0.9], "better"),
        ([-1, -1.1, -0.9], "worse"),
        ([2, -1, 0.5], "no difference found"),
        ([5], "one seed: no interval"),
    ],
)
def test_what_is_said_of_a_difference(differences, finding):
    assert findings.paired(differences).finding == finding


def test_tables_stand_beside_the_papers_figures():
    found = dict(findings.sections(results(plain=[60, 61, 62], DA=[61, 61.9, 63.2])))
    (one,), (two,), (three,) = (
        [rows for title, rows in found.items() if title.startswith(f"Table {number} ")]
        for number in ("I", "II", "III")
    )
    assert [row[-2:] for row in one] == [
        ["75.9", "-"], ["76.8", "+0.9"], ["77.0", "+1.1"], ["76.6", "+0.7"],
    ]  # fmt: skip
    assert [row[-2:] for row in two] == [["72.6", "-"], ["72.9", "+0.3"], ["73.1", "+0.5"]]
    assert [row[-2:] for row in three][1:] == [["76.3", "+0.4"], ["76.8", "+0.9"], ["77.0", "+1.1"]]
    assert one[0][1] == "61.0"
    assert one[2][:5] == ["DA (spatial, then channel)", "62.0", "+1.0", "+0.7 to +1.4", "better"]
    assert one[3][1:5] == ["-", "-", "-", "not run"]


def test_rivals_without_figures_stand_beside_the_tables():
    record = results(plain=[60, 61, 62], STN=[61, 61.9, 63.2])
    title, rows = findings.sections(record)[3]
    assert title == "Beside the tables (resnet18; the paper has no figures of these rivals)"
    assert [row[0] for row in rows] == ["plain", "FCA", "STN", "DA (spatial, then channel)"]
    assert rows[2][1:] == ["62.0", "+1.0", "+0.7 to +1.4", "better", "", ""]
    assert all(len(row) == len(findings.HEADER) and row[-2:] == ["", ""] for row in rows)
    assert chart.headline(record) == "Better than plain: STN"
    assert len(findings.sections(results(plain=[60], SE=[61]))) == 3


def test_networks_of_a_seed_start_alike_and_differ_between_seeds(tiny, tmp_path):
    data = ablation.load(TINY, tmp_path)
    assert (len(data.train), len(data.test)) == (6, 3)
    networks = {
        (name, seed): ablation.network(name, seed, TINY, data.classes, None).state_dict()
        for name in ablation.VARIANTS
        for seed in (0, 1)
    }
    plain = networks[findings.PLAIN, 0]
    for name in ("DA", "SE"):
        mine = networks[name, 0]
        assert plain.keys() < mine.keys()
        assert all((mine[key] == value).all() for key, value in plain.items())
    other = networks[findings.PLAIN, 1]
    assert any((other[key] != value).any() for key, value in plain.items())


def test_all_compute_what_the_pretrained_network_does(tmp_path):
    preset = dataclasses.replace(TINY, size=64)  # FCA's maps have 7 x 7 cells at least
    data = ablation.load(preset, tmp_path)
    start, found = ablation.pretrain(preset, data, torch.device("cpu"))
    assert 0 <= found["map_11"] <= 1 and found["loss"] > 0
    images = [data.test[i][0] for i in range(3)]

    def heads(name):
        model = ablation.network(name, 0, preset, data.classes, start).eval()
        with torch.no_grad():
            features = model.backbone(torch.stack(images))
            return torch.cat([level.flatten() for level in features.values()])

    plain = heads(findings.PLAIN)
    for name in ablation.VARIANTS:
        torch.testing.assert_close(heads(name), plain, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("tuning", "expected"), [(5e-3, 5e-3), (0.0, 2e-2)])
def test_what_was_pretrained_is_trained_at_its_own_rate(tmp_path, monkeypatch, tuning, expected):
    preset = dataclasses.replace(TINY, tuning_lr=tuning)
    data = ablation.load(preset, tmp_path)
    start = ablation.network(findings.PLAIN, 0, preset, data.classes, None).state_dict()
    rates, one_cycle = [], ablation.one_cycle

    def watched(given, steps):
        rates.append(max(map(one_cycle(given, steps), range(steps))))
        return one_cycle(given, steps)

    monkeypatch.setattr(ablation, "one_cycle", watched)
    for weights in (start, None):
        ablation.run_one("DA", 0, preset, data, weights, torch.device("cpu"))
    assert rates == pytest.approx([expected, 2e-2])


def test_an_interrupted_ablation_goes_on_to_the_same_result(tiny, tmp_path, monkeypatch, capsys):
    whole, stopped = tmp_path / "whole-ablation.json", tmp_path / "stopped-ablation.json"
    assert ablation.main(["--out", str(whole)]) == 0
    shown = capsys.readouterr().out
    assert (
        "Table II in miniature" in shown and "no difference found" in shown
    ) or "better" in shown
    assert whole.with_suffix(".png").stat().st_size > 10_000

    run_one, count = ablation.run_one, iter(range(3))

    def interrupted(*args):
        if next(count) == 2:
            raise KeyboardInterrupt
        return run_one(*args)

    monkeypatch.setattr(ablation, "run_one", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ablation.main(["--out", str(stopped)])
    assert len(json.loads(stopped.read_text())["runs"]) == 2
    monkeypatch.setattr(ablation, "run_one", run_one)
    assert ablation.main(["--out", str(stopped)]) == 2
    assert "--resume" in capsys.readouterr().err
    assert ablation.main(["--out", str(stopped), "--resume"]) == 0

    def found(path):
        runs = json.loads(path.read_text())["runs"]
        return [(r["variant"], r["seed"], r["map_11"], r["loss"], r["curve"]) for r in runs]

    assert found(stopped) == found(whole)
    assert [run[:2] for run in found(whole)] == [
        (name, seed) for seed in (0, 1) for name in ablation.VARIANTS
    ]


def test_results_of_another_experiment_are_not_resumed(tiny, tmp_path, monkeypatch, capsys):
    path = tmp_path / "x-ablation.json"
    record = environment.head("ablation", "cpu", "small")
    record |= {"settings": {**ablation.settings_record(TINY), "steps": 9}, "runs": []}
    record |= {"pretraining": None, "seconds": 0.0}
    environment.write_results(path, record)
    assert ablation.main(["--out", str(path), "--resume"]) == 2
    assert "settings" in capsys.readouterr().err


def test_the_block_of_a_page_is_generated_and_checked(tiny, tmp_path, monkeypatch, capsys):
    path, page = tmp_path / "x-ablation.json", tmp_path / "page.md"
    record = environment.head("ablation", "cpu", "small")
    record |= results(plain=[60, 61, 62], DA=[61, 61.9, 63.2])
    environment.write_results(path, record)
    monkeypatch.setattr(environment, "COMMITTED", tmp_path)
    page.write_text("\n".join(["before", *pages.markers("ablation"), "after\n"]))
    where = ["--page", str(page)]
    assert ablation.main([*where, "--check"]) == 1
    assert ablation.main([*where, "--write"]) == 0
    assert ablation.main([*where, "--check"]) == 0
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n")
    assert "| DA (spatial, then channel) | 62.0 | +1.0 | +0.7 to +1.4 | better |" in text
    assert "not finished: plain" not in text and "not finished: DA, channel first" in text
    page.write_text("no markers")
    assert ablation.main([*where, "--write"]) == 2
    assert "expected one line" in capsys.readouterr().err
    assert files.load_folder(tmp_path) == {}  # left to the ablation


def test_a_broken_results_file_is_refused(tmp_path):
    path = tmp_path / "x-ablation.json"
    path.write_text("{}")
    with pytest.raises(BenchmarkError, match="expected a results file"):
        findings.read(path)
