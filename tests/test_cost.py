"""The counter, against figures worked by hand, and the paper's tables, against what it prints."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from da_ops import DAModule, DAResidual, cost, models
from da_ops.cli import main
from da_ops.cost import paper, tables
from da_ops.cost.paper import PRINTED
from da_ops.residual import functional

from .conftest import need

BLOCKS = {"resnet18": 8, "resnet34": 16, "resnet50": 16, "resnet101": 33}
# Positions of all residual blocks' outputs, at 224 x 224: stages of 56, 28, 14 and 7 a side.
STAGES = {
    "resnet18": (2, 2, 2, 2),
    "resnet34": (3, 4, 6, 3),
    "resnet50": (3, 4, 6, 3),
    "resnet101": (3, 4, 23, 3),
}
POSITIONS = {
    name: sum(n * side**2 for n, side in zip(stages, (56, 28, 14, 7)))
    for name, stages in STAGES.items()
}
KEYS = [
    "backbone", "attention", "params_torchstat", "params", "gmacs_torchstat", "gmacs_torch",
    "paper_params_m", "paper_gflops", "deviation",
]  # fmt: skip


def row(backbone, attention, table=None):
    return next(
        row for row in cost.rows(table) if (row.backbone, row.attention) == (backbone, attention)
    )


# ------------------------------------------------------------------------------ the counter


def counted(network, *shape):
    return cost.count(network.eval(), torch.randn(shape))


def test_convolution():
    got = counted(nn.Sequential(nn.Conv2d(4, 6, 3, groups=2, padding=1)), 2, 4, 5, 7)
    macs = 2 * 6 * 5 * 7 * (9 * 2)  # two channels to each group
    assert got.macs_torch == macs
    assert got.macs_torchstat == got.macs_insight == macs + 2 * 6 * 5 * 7  # and the bias
    assert got.params == got.params_torchstat == 6 * 2 * 9 + 6


def test_linear():
    got = counted(nn.Sequential(nn.Linear(8, 3)), 2, 8)
    assert got.macs_torchstat == got.macs_insight == got.macs_torch == 2 * 8 * 3


@pytest.mark.parametrize(("affine", "each"), [(True, 2), (False, 1)])
def test_batch_norm(affine, each):
    got = counted(nn.Sequential(nn.BatchNorm2d(3, affine=affine)), 2, 3, 5, 7)
    assert got.macs_torchstat == got.macs_insight == each * 2 * 3 * 5 * 7
    assert got.macs_torch == 0


def test_pooling_counts_its_input_and_adaptive_pooling_only_for_insight():
    got = counted(nn.Sequential(nn.MaxPool2d(2), nn.AdaptiveAvgPool2d(1)), 1, 3, 8, 8)
    assert got.macs_torchstat == 3 * 64
    assert got.macs_insight == 3 * 64 + 3 * 16


def test_shared_relu():
    """torchstat keeps a module's last call, PytorchInsight adds all up."""
    relu = nn.ReLU()
    got = counted(nn.Sequential(relu, nn.MaxPool2d(2), relu), 1, 3, 8, 8)
    assert got.macs_torchstat == 3 * 64 + 3 * 16
    assert got.macs_insight == 3 * 64 + 3 * 64 + 3 * 16


@pytest.mark.parametrize("backend", ["cpu", "eager"])
@pytest.mark.parametrize("bias", [False, True])
def test_da_layer_is_counted_whichever_backend_runs(backend, bias):
    """9 + 9 + 2 at every position."""
    need(backend)
    got = counted(nn.Sequential(DAModule(6, bias=bias, backend=backend)), 2, 6, 5, 7)
    assert got.macs_torch == 20 * 2 * 5 * 7
    assert got.macs_torchstat == (20 + 3 * bias) * 2 * 5 * 7
    assert got.macs_insight == got.macs_torchstat + 2 * 6 * 5 * 7  # the global average pooling
    assert got.params_torchstat == 20 + 3 * bias  # the gate is held by a module with children
    assert got.params == got.params_torchstat + 2 * 6


def test_a_changed_da_layer_is_counted_by_its_children():
    layer = DAModule(6)
    layer.conv = nn.Sequential(layer.conv, nn.Conv2d(1, 1, 5, padding=2, bias=False))
    got = counted(nn.Sequential(layer), 2, 6, 5, 7)
    assert got.macs_torch == got.macs_torchstat == (20 + 25) * 2 * 5 * 7


@pytest.mark.parametrize("attention", ["da", None])
def test_a_fused_network_costs_what_it_did_before(fused_cpu, attention, caplog):
    """And is fused again after; nothing is said of hooks that are not the user's."""
    functional._told.clear()
    network = models.resnet18(attention).eval()
    want = cost.count(network, torch.randn(1, 3, 32, 32))
    assert cost.count(models.fuse(network), torch.randn(1, 3, 32, 32)) == want
    assert not models.unfused_blocks(network) and not caplog.records
    with pytest.raises(RuntimeError):
        cost.count(network, torch.randn(1, 2, 32, 32))
    assert not models.unfused_blocks(network)


def test_a_tail_is_counted_by_its_modules(fused_cpu, caplog):
    """And is fused again after; nothing is said of hooks that are not the user's."""

    class Adding(nn.Module):
        def __init__(self):
            super().__init__()
            self.tail = DAResidual(8)

        def forward(self, x):
            return self.tail(x, x)

    functional._told.clear()
    network = Adding().eval()
    got = counted(network, 1, 8, 5, 7)
    apart = counted(nn.Sequential(network.tail.norm, network.tail.attention), 1, 8, 5, 7)
    assert got == apart and network.tail.fused
    assert not caplog.records and not functional._told


def test_rivals():
    x = (2, 64, 5, 7)
    se = counted(nn.Sequential(models.SEModule(64)), *x)
    assert se.macs_torch == 2 * 2 * 64 * 4
    assert se.macs_torchstat == se.macs_torch + 2 * 4  # and the ReLU
    assert se.params == se.params_torchstat == 2 * 64 * 4
    sge = counted(nn.Sequential(models.SGEModule(64)), *x)
    assert (sge.macs_torchstat, sge.macs_torch, sge.params_torchstat) == (0, 0, 128)
    eca = counted(nn.Sequential(models.ECAModule(64)), *x)
    assert (eca.macs_torchstat, eca.macs_torch, eca.params_torchstat) == (0, 2 * 64 * 3, 3)
    fca = counted(nn.Sequential(models.FCAModule(64, frequencies="low16")), *x)
    assert fca == se
    for layer in (se, sge, eca):
        assert layer.macs_insight == layer.macs_torchstat + math.prod(x)


def test_fake_tensors_cost_what_real_ones_do():
    network = models.resnet18().eval()
    assert cost.count(network, torch.randn(1, 3, 224, 224)) == tables._cost("resnet18", "da")
    with torch.device("meta"):
        network = models.resnet18().eval()
        assert cost.count(network, torch.empty(1, 3, 224, 224)) == tables._cost("resnet18", "da")


def test_the_tables_count_the_fused_layer():
    need("cpu")
    with FlopCounterMode(display=False) as flops:
        tables._cost.__wrapped__("resnet18", "da")
    operators = {str(operator): n for operator, n in flops.get_flop_counts()["Global"].items()}
    assert operators["da_ops.forward"] == 2 * 20 * POSITIONS["resnet18"]


def test_training_networks_are_refused():
    with pytest.raises(ValueError, match=r"must be in evaluation mode, call model.eval\(\) first"):
        cost.count(nn.Conv2d(1, 1, 1), torch.randn(1, 1, 2, 2))


def test_no_hook_is_left():
    network = nn.Sequential(nn.Conv2d(1, 1, 1)).eval()
    with pytest.raises(RuntimeError):
        cost.count(network, torch.randn(1, 2, 2, 2))
    assert not network[0]._forward_hooks


# ------------------------------------------------------------------------------ the tables


@pytest.mark.parametrize("backbone", BLOCKS)
def test_what_da_adds(backbone):
    plain, da = row(backbone, None), row(backbone, "da")
    assert da.params_torchstat - plain.params_torchstat == 20 * BLOCKS[backbone]
    # and two numbers per channel of every block, the gate
    added = {"resnet18": 4_000, "resnet34": 7_872, "resnet50": 30_528, "resnet101": 65_684}
    assert da.params - plain.params == added[backbone]
    for gmacs in ("gmacs_torchstat", "gmacs_torch"):
        macs = (getattr(da, gmacs) - getattr(plain, gmacs)) * 1e9
        assert round(macs, 3) == 20 * POSITIONS[backbone]


@pytest.mark.parametrize("backbone", BLOCKS)
def test_what_the_rivals_add_that_the_paper_only_names(backbone):
    """FCA has SE's layers, and pools as much; an STN before layer2 two convolutions and two fully
    connected layers, on maps of 56 x 56."""
    plain, se, fca, stn = (row(backbone, attention) for attention in (None, "se", "fca", "stn"))
    for name in ("params_torchstat", "params", "gmacs_torchstat", "gmacs_torch"):
        assert getattr(fca, name) == getattr(se, name)
    c = 64 if backbone in ("resnet18", "resnet34") else 256
    convs, linears = 32 * c * 9, 32 * 32 * 9
    assert stn.params - plain.params == convs + linears + 32 * 512 + 32 * 6 + 3 * 32 + 6
    macs = convs * 28**2 + linears * 14**2 + 32 * 512 + 32 * 6
    biases_and_relu = 32 * (28**2 + 14**2) + 32  # the ReLU's last call is on 32 numbers
    got = round((stn.gmacs_torchstat - plain.gmacs_torchstat) * 1e9)
    assert got == macs + biases_and_relu
    means = 32 * (4 * 14 * 14 + 4 * 14 * 4)
    assert round((stn.gmacs_torch - plain.gmacs_torch) * 1e9) == macs + means
    for got in (fca, stn):
        assert got.paper_params_m is got.paper_gflops is got.deviation is None


def test_figures_worked_out_before():
    assert row("resnet50", "da").params == 25_587_560
    assert round(row("resnet18", "da").gmacs_torchstat, 5) == 1.82157
    assert round(row("resnet34", "da").gmacs_torchstat, 5) == 3.67450
    assert round(row("resnet50", "se").params_torchstat / 1e6, 4) == 28.0720
    assert round(row("resnet50", "se").gmacs_torchstat, 4) == 4.1211


@pytest.mark.parametrize("printed", PRINTED, ids=lambda p: f"{p.table}-{p.backbone}-{p.attention}")
def test_every_cell_of_the_paper_is_met_or_marked(printed):
    got = row(printed.backbone, printed.attention, printed.table)
    missed = set()
    for column, digits, value in (
        ("Params", printed.params, got.params_torchstat / 1e6),
        ("GFLOPs", printed.gflops, got.gmacs_torchstat),
    ):
        decimals = len(digits.split(".")[1])
        if round(value, decimals) != float(digits):
            missed.add(column)
            assert f"{column}: the paper" in got.deviation
    assert (got.deviation is None) == (not missed)
    known = {
        (2, "resnet18", "da"): {"GFLOPs"},
        (2, "resnet34", "da"): {"GFLOPs"},
        (3, "resnet50", "sge"): {"Params", "GFLOPs"},
        (3, "resnet50", "eca"): {"Params", "GFLOPs"},
        (3, "resnet101", "sge"): {"GFLOPs"},
        (3, "resnet101", "eca"): {"GFLOPs"},
    }
    assert missed == known.get(printed[:3], set())


def test_the_reasons_hold():
    """What is said of a cell that is not met is true of it."""
    one_lower = [row(name, "da", 2) for name in ("resnet18", "resnet34")]
    for got in one_lower:
        assert round((round(got.gmacs_torchstat, 4) - got.paper_gflops) * 1e4) == 1
        assert "one unit in the last place lower" in got.deviation
    sge, eca = row("resnet50", "sge"), row("resnet50", "eca")
    assert round(sge.params_torchstat / 1e6, 3) == eca.paper_params_m
    assert round(eca.params_torchstat / 1e6, 3) == sge.paper_params_m
    for name, insight in {"resnet50": 4.1274, "resnet101": 7.8584}.items():
        for attention in ("sge", "eca"):
            got = row(name, attention)
            macs = tables._cost(name, attention).macs_insight / 1e9
            assert round(macs, 4) == insight and round(macs, 3) == got.paper_gflops
            assert f"PytorchInsight's counter, which gives {insight}" in got.deviation
    assert round(tables._cost("resnet50", "da").macs_insight / 1e9, 4) == 4.1277
    assert round(tables._cost("resnet101", "da").macs_insight / 1e9, 4) == 7.8588


def test_a_cell_that_nobody_can_explain_is_marked(monkeypatch):
    monkeypatch.setattr(paper, "PRINTED", [PRINTED[0]._replace(params="11.6896")])
    got, *rivals = cost.rows()
    assert got.deviation == "Params: the paper differs; the cause is not known"
    assert "11.6896 a" in cost.render()
    assert [row.attention for row in rivals] == ["fca", "stn"]


@pytest.mark.parametrize(("arguments", "length"), [(["2"], 20), (["3"], 12), ([], 32)])
def test_json(arguments, length, tmp_path, capsys):
    path = tmp_path / "tables.json"
    path.write_text("an older one")
    assert main(["tables", *arguments, "--json", str(path)]) == 0
    table = int(arguments[0]) if arguments else None
    got = json.loads(path.read_text())
    assert [list(row) for row in got] == [KEYS] * length
    assert [tuple(row.values()) for row in got] == [
        tuple(getattr(row, key) for key in KEYS) for row in cost.rows(table)
    ]
    assert list(tmp_path.iterdir()) == [path]
    assert capsys.readouterr().out == cost.render(table) + "\n"


def test_text():
    text = cost.render()
    lines = [line.split() for line in text.splitlines()]
    numbers = ["25.5574", "25.55735", "25.58756", "4.1188", "4.11881", "4.08946", "77.0"]
    assert ["ResNet50", "+", "DA", *numbers] in lines
    for printed in PRINTED:
        assert any({printed.params, printed.gflops, printed.map} <= set(line) for line in lines)
    assert max(map(len, text.splitlines())) <= 100


@pytest.mark.parametrize("path", ["missing/tables.json", "."])
def test_paths_that_cannot_be_written(path, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["tables", "3", "--json", path]) == 1
    assert f"--json must name a file in a folder that can be written to, got {path}" in (
        capsys.readouterr().err
    )
    assert not list(tmp_path.iterdir())


def test_there_are_two_tables():
    with pytest.raises(ValueError, match="table must be 2 or 3, or None for both; got 1"):
        cost.rows(1)
    with pytest.raises(SystemExit):
        main(["tables", "1"])
