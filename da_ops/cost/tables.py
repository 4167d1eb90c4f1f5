"""Tables II and III, every row under one counter, beside the paper's figures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from string import ascii_lowercase

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from .. import models
from .counter import Cost, count
from .paper import REASONS, Printed, with_rivals

_TITLES = {"params": "Params", "gflops": "GFLOPs"}
SIZE = 224  # pixels a side, the input that gives the paper's figures


@dataclass(frozen=True)
class Row:
    """One row; its fields, in this order, are the row's JSON.

    Parameters are numbers of parameters, ``gmacs_*`` are 1e9 multiply-accumulates for one image of
    224 x 224, nothing is rounded. ``deviation`` says which cells of the paper are not met to their
    last digit by ``params_torchstat`` and ``gmacs_torchstat``, and why; None if all are. The paper
    has no figures of "fca" and "stn", which is a spatial transformer in front of layer2.
    """

    backbone: str
    attention: str | None
    params_torchstat: int
    params: int
    gmacs_torchstat: float
    gmacs_torch: float
    paper_params_m: float | None
    paper_gflops: float | None
    deviation: str | None


def rows(table: int | None = None) -> list[Row]:
    """The rows of Table 2 or 3; of both, in this order, if ``table`` is None.

    Raises:
        ValueError: ``table`` is another number.
    """
    return [_row(printed) for printed in _printed(table)]


def _printed(table: int | None) -> list[Printed]:
    if table not in (None, 2, 3):
        raise ValueError(f"table must be 2 or 3, or None for both; got {table!r}")
    return [row for number in (2, 3) if table in (None, number) for row in with_rivals(number)]


@cache
def _cost(backbone: str, attention: str | None) -> Cost:
    # Fake tensors have shapes and no data, and go through the operator that real ones do.
    with FakeTensorMode():
        stn = {"transformer": "layer2"} if attention == "stn" else {}
        network = getattr(models, backbone)(None if stn else attention, **stn).eval()
        return count(network, torch.empty(1, 3, SIZE, SIZE))


def _row(printed: Printed) -> Row:
    cost = _cost(printed.backbone, printed.attention)
    return Row(
        backbone=printed.backbone,
        attention=printed.attention,
        params_torchstat=cost.params_torchstat,
        params=cost.params,
        gmacs_torchstat=cost.macs_torchstat / 1e9,
        gmacs_torch=cost.macs_torch / 1e9,
        paper_params_m=float(printed.params) if printed.params else None,
        paper_gflops=float(printed.gflops) if printed.gflops else None,
        deviation="; ".join(
            f"{_TITLES[column]}: {reason}" for column, reason in _deviations(printed, cost).items()
        )
        or None,
    )


def _deviations(printed: Printed, cost: Cost) -> dict[str, str]:
    """Column -> why the paper has another figure there, where it has."""
    found = {}
    for column, value in (
        ("params", cost.params_torchstat / 1e6),
        ("gflops", cost.macs_torchstat / 1e9),
    ):
        digits = getattr(printed, column)
        if digits and f"{value:.{len(digits.partition('.')[2])}f}" != digits:
            reason = REASONS.get(
                (*printed[:3], column), "the paper differs; the cause is not known"
            )
            found[column] = reason.format(insight=cost.macs_insight / 1e9)
    return found


def render(table: int | None = None) -> str:
    """Table 2 or 3, or both, as text; the paper's cells that are not met are marked.

    Raises:
        ValueError: ``table`` is another number.
    """
    printed = _printed(table)
    return "\n\n".join(
        _rendered(number, [row for row in printed if row.table == number])
        for number in sorted({row.table for row in printed})
    )


def _rendered(number: int, printed: Sequence[Printed]) -> str:
    lines = [
        ["", "Params, M", "", "", "GFLOPs", "", "", "mAP"],
        ["", "paper", "torchstat", "all", "paper", "torchstat", "torch", "paper"],
    ]
    letters: dict[str, str] = {}  # of the reasons
    for row in printed:
        cost = _cost(row.backbone, row.attention)
        marks = {"params": "", "gflops": ""}
        for column, reason in _deviations(row, cost).items():
            marks[column] = letters.setdefault(reason, f" {ascii_lowercase[len(letters)]}")
        lines.append(
            [
                _name(row),
                row.params + marks["params"],
                f"{cost.params_torchstat / 1e6:.5f}",
                f"{cost.params / 1e6:.5f}",
                row.gflops + marks["gflops"],
                f"{cost.macs_torchstat / 1e9:.5f}",
                f"{cost.macs_torch / 1e9:.5f}",
                row.map,
            ]
        )
    widths = [max(map(len, column)) for column in zip(*lines)]
    table = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths)) for line in lines]
    title = f"Table {'I' * number}: one image of {SIZE} x {SIZE}, GFLOPs are multiply-accumulates"
    notes = [f"{letter}  {reason}" for reason, letter in letters.items()]
    return "\n".join(map(str.rstrip, [title, *table, *notes, *_insight(number, printed)]))


def _insight(number: int, printed: Sequence[Printed]) -> list[str]:
    if number != 3:
        return []
    counted: dict[str, list[str]] = {}
    for row in printed:
        macs = _cost(row.backbone, row.attention).macs_insight / 1e9
        counted.setdefault(row.backbone, []).append(f"{macs:.4f} {_name(row)}")
    parts = [all_of[i : i + 4] for all_of in counted.values() for i in range(0, len(all_of), 4)]
    return [
        "PytorchInsight counts every call of a shared ReLU, and adaptive pooling. All rows by it:",
        *(f"   {', '.join(part)}" for part in parts),
    ]


def _name(row: Printed) -> str:
    backbone = row.backbone.replace("resnet", "ResNet")
    return backbone if row.attention is None else f"{backbone} + {row.attention.upper()}"
