"""The benchmarks' options: what they choose, and what is refused before anything is measured."""

from __future__ import annotations

import pytest

pytest.importorskip("tqdm")
pytest.importorskip("psutil")
pytest.importorskip("matplotlib")

from benchmarks import cases, network, op
from benchmarks.environment import BenchmarkError

CPU = ["--device", "cpu"]


@pytest.mark.parametrize("module", [op, network])
def test_unwritable_results_are_refused_before_measuring(module, tmp_path, monkeypatch, capsys):
    occupied = tmp_path / "occupied"
    occupied.write_text("a file, not a folder")
    monkeypatch.setattr(module, "run", lambda *_: pytest.fail("measured"))
    for target in (occupied / "op.json", tmp_path):
        assert module.main([*CPU, "--output", str(target)]) == 2
        message = capsys.readouterr().err
        assert str(target) in message
        assert "nothing was measured" in message
        assert "--output FILE" in message
    assert occupied.read_text() == "a file, not a folder"


@pytest.mark.parametrize(
    "arguments",
    [
        ["--shapes", "16x64x56"],
        ["--shapes", "0x1x1x1"],
        ["--dtypes", "int8"],
        ["--layouts", "nhwc"],
        ["--subjects", "head"],
        ["--rivals", "jax"],
        ["--backends", "none"],
        ["--threads", "0"],
        ["--budget", "-1"],
        ["--budget", "nan"],
        ["--seconds", "0"],
        ["--seconds", "nan"],
        ["--shapes="],
        ["--layouts="],
        ["--rivals="],
        ["--backends="],
        ["--shapes", "1x1x1x1"],
        ["--shapes", "4x2x3x3,1x7x1x1", "--subjects", "tail"],
        ["--preset", "quick", "--dtypes", "float16"],
    ],
)
def test_bad_options(arguments, tmp_path, capsys):
    assert op.main([*arguments, *CPU, "--output", str(tmp_path / "x-op.json")]) == 2
    assert capsys.readouterr().err.startswith("benchmarks.op: ")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("options", [["--budget", "-1"], ["--seconds", "-1"]])
def test_bad_options_of_networks(options, tmp_path, capsys):
    assert network.main([*options, *CPU, "--output", str(tmp_path / "x.json")]) == 2
    name = options[0]
    assert f"benchmarks.network: {name}: expected" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_one_value_a_channel_is_enough_for_the_layer():
    options = op.parser().parse_args([*CPU, "--shapes", "1x3x1x1", "--subjects", "layer"])
    assert [case.shape for case in cases.from_options(options)] == [(1, 3, 1, 1)]


def test_presets():
    stages = [c for c in cases.preset("full") if c.role == "stage"]
    assert tuple(c.shape for c in stages) == cases.STAGES
    assert all(c.layouts == ("contiguous", "channels_last") for c in stages)
    roles = {"stage", "ssd", "single", "half", "overhead", "tail"}
    assert {c.role for c in cases.preset("full")} == roles
    assert {c.role for c in cases.preset("quick")} == {"stage", "overhead", "tail"}


def test_shapes_are_parsed():
    with pytest.raises(BenchmarkError, match="such as 16x64x56x56"):
        cases.parse_shapes("1x2x3")
    assert cases.parse_shapes("1x2x3x4,5x6x7x8") == [(1, 2, 3, 4), (5, 6, 7, 8)]
