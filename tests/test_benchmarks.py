"""The benchmarks run, tell the truth about what they ran on, and lose nothing."""

from __future__ import annotations

import copy
import json
import os

import numpy as np
import pytest
import torch

pytest.importorskip("tqdm")
pytest.importorskip("psutil")
pytest.importorskip("matplotlib")

from benchmarks import (
    cases,
    environment,
    layer,
    measure,
    network,
    op,
    pages,
    report,
    rivals,
    summary,
)

CPU = ["--device", "cpu"]
FAST = ["--rivals", "eager", "--budget", "0.01", *CPU]


class Negated(torch.nn.Module):
    """A contender that is wrong."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return -self.layer(x)


@pytest.fixture(scope="module")
def op_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("results") / "a-device-op.json"
    shapes = ["--shapes", "2x8x5x5,1x3x4x7", "--regimes", "warm,cold", "--backends", "eager"]
    shapes += ["--subjects", "layer"]
    assert op.main([*shapes, *FAST, "--output", str(path)]) == 0
    return path


@pytest.fixture(scope="module")
def network_file(op_file):
    pytest.importorskip("torchvision")
    pytest.importorskip("skimage")
    path = op_file.with_name("a-device-network.json")
    small = ["--network", "resnet18", "--batch", "4", "--size", "64", "--rounds", "2"]
    small += ["--backends", "eager"]
    assert network.main([*small, *FAST, "--output", str(path)]) == 0
    return path


def test_op_results(op_file):
    results = json.loads(op_file.read_text())
    assert results["schema"] == environment.SCHEMA
    assert results["kind"] == "op"
    assert results["digest"] == environment.digest("cpu")
    assert {"torch", "python", "da_ops"} <= set(results["versions"])
    assert {"name", "cores", "threads", "caches"} <= set(results["device"])
    assert "--output" not in results["command"]
    assert [(c["shape"], c["regime"]) for c in results["cases"]] == [
        ([2, 8, 5, 5], "warm"),
        ([2, 8, 5, 5], "cold"),
        ([1, 3, 4, 7], "warm"),
        ([1, 3, 4, 7], "cold"),
    ]
    for case in results["cases"]:
        assert {(r["rival"], r["layout"]) for r in case["results"]} == {
            (rival, layout) for rival in ("eager", "da_ops:eager") for layout in cases.LAYOUTS
        }
        assert case["buffers"] == 1 or case["regime"] == "cold"
        for result in case["results"]:
            assert result["status"] == "ok"
            assert max(e["error"] for e in result["accuracy"].values()) < 1e-6
            assert result["memory"]["peak"] >= 2 * case["bytes"]  # y and dx
            for part in ("inference", "training", "forward", "backward"):
                times = result["seconds"][part]
                assert 0 < times["p10"] <= times["median"] <= times["p90"]
        assert {s["part"] for s in case["speedups"]} == {"inference", *summary.TRAINING}
    assert {"means", "losses", "checks"} == set(results["summary"])
    assert op_file.with_name("a-device.png").stat().st_size > 10_000


def test_accuracy_is_judged_by_what_is_promised(op_file):
    results = json.loads(op_file.read_text())

    def verdict(change):
        """Of the first fused result whose errors are changed so."""
        changed = copy.deepcopy(results)
        fused = next(
            r for r in changed["cases"][0]["results"] if r["rival"].startswith(summary.FUSED)
        )
        change(fused)
        (line,) = [c for c in report.tables.check_lines(changed) if c[1].startswith("accuracy")]
        return line

    def off(name, **errors):
        return lambda fused: fused["accuracy"][name].update(errors)

    assert verdict(lambda fused: None)[:2] == ["met", "accuracy, da_ops:eager, float32"]
    word, _, found, _ = verdict(off("merge.weight", share=2e-6))
    assert word == "MISSED"
    assert "2.0e-06 of 1.0e-06 of the terms (merge.weight at 2x8x5x5 contiguous)" in found
    word, _, found, _ = verdict(off("x", error=1.5e-6, value=1.0))
    assert word == "MISSED"
    assert "1.5e-06 of 1.0e-06 relative (x at 2x8x5x5 contiguous)" in found
    word, _, found, _ = verdict(off("conv.weight", error=9e-7))
    assert word == "MISSED"
    assert "in root mean square (conv.weight over 4 draws)" in found
    # Results that do not tell are neither.
    word, _, found, _ = verdict(lambda fused: fused.pop("accuracy"))
    assert word == "-"
    assert "measure again" in found


def test_network_results(network_file):
    results = json.loads(network_file.read_text())
    assert results["network"]["layers"] == 8
    assert len(results["network"]["photographs"]) >= 2
    (part,) = results["layouts"]
    by_name = {r["variant"]: r for r in part["results"]}
    assert set(by_name) == {"plain", "eager", "da_ops:eager", "tail:plain", "tail:da_ops:eager"}
    left_out = by_name.pop("tail:da_ops:eager")  # no kernel of it
    assert left_out["status"] == "left out"
    assert "'eager' has no kernel" in left_out["reason"]
    by_name.pop("tail:plain")  # where the kernels are built
    assert all(np.isfinite(r["losses"]).all() for r in by_name.values())
    assert by_name["eager"]["losses"][0] == pytest.approx(by_name["da_ops:eager"]["losses"][0])
    assert by_name["eager"]["memory"]["held"] > by_name["plain"]["memory"]["held"]
    assert by_name["eager"]["cost"]["samples"] == by_name["plain"]["seconds"]["samples"]
    for result in by_name.values():
        assert result["inference"]["seconds"]["median"] < result["seconds"]["median"]


def test_results_are_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "x-op.json"
    environment.write_results(path, {"number": 1.23456789, "none": float("nan")})
    assert json.loads(path.read_text()) == {"number": 1.23457, "none": None}

    def full_disk(*args):
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", full_disk)
    with pytest.raises(OSError, match="no space left"):
        environment.write_results(path, {"number": 2})
    assert json.loads(path.read_text())["number"] == 1.23457
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("kind", ["wrong", "raises"])
def test_a_failing_rival_is_told_and_not_timed(kind, tmp_path, monkeypatch, capsys):
    def broken(layer, name):
        if kind == "raises":
            raise RuntimeError("no compiler\nlong story")
        return Negated(layer)

    monkeypatch.setattr(rivals, "compiled", broken)
    path = tmp_path / "x-op.json"
    options = ["--shapes", "1x4x4x4", "--layouts", "contiguous", "--budget", "0.01"]
    options += ["--subjects", "layer"]
    assert op.main([*options, *CPU, "--backends", "eager", "--output", str(path)]) == 0
    (case,) = json.loads(path.read_text())["cases"]
    result = {r["rival"]: r for r in case["results"]}
    assert result["compile"]["status"] == "failed"
    assert result["compile"]["reason"].startswith(
        "no compiler" if kind == "raises" else "wrong inference: error "
    )
    assert "seconds" not in result["compile"]
    assert "seconds" in result["da_ops:eager"]
    assert {s["rival"] for s in case["speedups"]} == {"eager"}
    assert "FAILED" in capsys.readouterr().out


def test_a_wrong_fused_layer_fails_the_run(tmp_path, monkeypatch):
    build = layer.build
    monkeypatch.setattr(
        layer, "build", lambda rival, *rest: build(rival, *rest)
        if rival == "eager" else Negated(build(rival, *rest)),
    )  # fmt: skip
    path = tmp_path / "x-op.json"
    shape = ["--shapes", "1x4x4x4", "--subjects", "layer", "--backends", "eager"]
    assert op.main([*shape, *FAST, "--output", str(path)]) == 1
    check = json.loads(path.read_text())["summary"]["checks"][0]
    assert check["name"] == "correct"
    assert not check["passed"]


def test_blocks_of_a_page(op_file, network_file, tmp_path, monkeypatch, capsys):
    """Means in one, every table in the other; what stands around them stays."""
    page = tmp_path / "page.md"
    begin, end = zip(pages.markers("speed"), pages.markers("benchmarks"))
    text = f"# Title\n\n{begin[0]}\n{end[0]}\n\nMore:\n\n{begin[1]}\n{end[1]}\n\nThe end.\n"
    page.write_text(text)
    where = ["--results", str(op_file.parent), "--page", str(page)]
    check, write = [*where, "--check"], [*where, "--write"]
    assert report.main(check) == 1
    assert page.read_text() == text  # a check writes nothing
    assert report.main(write) == 0
    once = page.read_text()
    assert once.startswith(f"# Title\n\n{begin[0]}")
    assert once.endswith(f"{end[1]}\n\nThe end.\n")
    means, tables = once.split("More:")
    assert "a-device.png" in means and "a-device.png" in tables
    assert "2x8x5x5" in tables and "2x8x5x5" not in means
    assert "resnet18" in tables
    assert report.main(check) == 0
    assert report.main(write) == 0
    assert page.read_text() == once

    assert "other kernel sources" not in once
    monkeypatch.setattr(environment, "digest", lambda device: "0" * 64)
    assert report.main(check) == 1
    assert report.main(write) == 0
    for part in page.read_text().split("More:"):
        assert "other kernel sources than today's" in part
    capsys.readouterr()

    page.write_text("no markers")
    assert report.main(write) == 2
    assert begin[1] in capsys.readouterr().err
    assert page.read_text() == "no markers"


def test_the_readme_has_figures_of_todays_kernels_and_names_who_has_others(op_file, tmp_path):
    results = json.loads(op_file.read_text())
    (tmp_path / "new-op.json").write_text(json.dumps(results))
    results["device"]["name"], results["digest"] = "Old Machine", "0" * 64
    (tmp_path / "old-op.json").write_text(json.dumps(results))
    block = pages.speed(tmp_path, tmp_path / "page.md")
    assert "new.png" in block and "old.png" not in block
    assert "With the kernels of before, in docs/benchmarks.md: Old Machine." in block
    (tmp_path / "new-op.json").unlink()
    assert "old.png" in pages.speed(tmp_path, tmp_path / "page.md")


@pytest.mark.parametrize("kind", ["op", "network"])
def test_files_are_what_they_say_however_they_are_named(
    kind, op_file, network_file, tmp_path, capsys
):
    file = op_file if kind == "op" else network_file
    (tmp_path / "mine.json").write_text(file.read_text())
    assert report.main(["--results", str(tmp_path)]) == 0
    assert report.text(report.load(file)) in capsys.readouterr().out
    assert list(report.load_folder(tmp_path)["mine"]) == [kind]


@pytest.mark.parametrize("content", ["{", "[]", '{"schema": 99, "kind": "op"}'])
def test_a_results_file_that_is_none(content, tmp_path, capsys):
    (tmp_path / "x-op.json").write_text(content)
    assert report.main(["--results", str(tmp_path)]) == 2
    assert "x-op.json: expected" in capsys.readouterr().err


def test_no_results(tmp_path, capsys):
    assert report.main(["--results", str(tmp_path)]) == 2
    assert pages.NO_GPU in pages.every_table(tmp_path, tmp_path / "page.md")
    assert "make bench" in capsys.readouterr().err


def test_plain_layer_has_the_fused_layers_parameters():
    import da_ops

    fused, plain = da_ops.DAModule(6, backend="eager"), rivals.PlainDA(6)
    plain.load_state_dict(fused.state_dict())
    x = torch.randn(2, 6, 5, 4)
    torch.testing.assert_close(plain(x), fused(x))


def test_interleaved_rounds_count_calls():
    taken = []

    def sampler(name, seconds):
        def sample(calls):
            taken.append(name)
            return [seconds * calls, 2 * seconds * calls]

        return sample

    contenders = {"a": sampler("a", 1e-4), "b": sampler("b", 2e-3)}
    times = measure.interleaved(contenders, rounds=6)
    assert times["a"].shape == (6, 2)
    np.testing.assert_allclose(times["a"], [[1e-4, 2e-4]] * 6)
    np.testing.assert_allclose(times["b"], [[2e-3, 4e-3]] * 6)
    rounds = np.array(taken[-12:]).reshape(6, 2)
    assert all(set(pair) == {"a", "b"} for pair in rounds)
    assert len({tuple(pair) for pair in rounds}) == 2  # both orders occur

    taken.clear()
    again = measure.interleaved(contenders, rounds=6, warm_up=1e-2)
    np.testing.assert_allclose(again["b"], times["b"])
    np.testing.assert_allclose(again["a"], times["a"])
    # Before the rounds two calls of each are timed; ten calls of "a" are a sample.
    assert (taken.count("a"), taken.count("b")) == (3 + 2 * 6, 2 + 2 * 6)
    in_turn = "".join(taken[-24:])
    assert {in_turn[i : i + 4] for i in range(0, 24, 4)} == {"aabb", "bbaa"}


def test_memory_is_exact():
    x = torch.randn(1000, 256, requires_grad=True)

    def forward():
        return (x * 2).sigmoid()  # x * 2 is freed, the output is kept for backward

    used = measure.memory(forward, lambda y: torch.autograd.grad(y, x, torch.ones_like(y)), "cpu")
    assert used["held"] < 100  # the factor
    # y, dy, the gradient before and after the factor 2
    assert used["peak"] == pytest.approx(4 * x.nbytes, rel=0.01)


def test_speedups_by_layout():
    def times(seconds):
        return {"inference": np.full(3, seconds), "training": np.full(3, 2 * seconds)}

    found = summary.speedups(
        {
            ("eager", "contiguous"): times(6.0),
            ("eager", "channels_last"): times(3.0),
            ("da_ops:cpu", "contiguous"): times(2.0),
        }
    )
    ratio = next(r for r in found if r["part"] == "inference")
    assert ratio["same"]["median"] == 3.0
    assert ratio["better"]["median"] == 1.5
    assert ratio["better_layout"] == "channels_last"
    assert summary.geomean([2.0, 8.0]) == pytest.approx(4.0)
    assert summary.geomean([]) is None


def test_losses_are_listed():
    record = {
        **{"shape": [1, 2, 3, 4], "dtype": "float32", "regime": "warm", "threads": 2},
        "speedups": [
            {
                **{"fused": "da_ops:cpu", "layout": "contiguous", "rival": "compile"},
                **{"part": "training", "same": {"median": 1.2}, "better": {"median": 0.8}},
            }
        ],
    }
    (lost,) = summary.losses([record])
    assert (lost["basis"], lost["ratio"]) == ("better", 0.8)
    (line,) = report.tables.loss_lines({"summary": {"losses": [lost]}})
    assert "1x2x3x4" in line
    assert "0.80x of torch.compile in its better layout" in line
