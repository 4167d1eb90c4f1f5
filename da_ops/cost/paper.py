"""Tables II and III as the paper prints them, rivals that it only names, and what is known of cells
that cannot be met."""

from __future__ import annotations

from typing import NamedTuple


class Printed(NamedTuple):
    """A row: parameters in millions, GFLOPs and mAP, with the digits that are printed, empty where
    nothing is. The attention "stn" is a spatial transformer in front of layer2, and none else."""

    table: int
    backbone: str
    attention: str | None
    params: str
    gflops: str
    map: str


# Misprints of single characters in some copies (25.55T for 25.557) are read as what they stand for.
PRINTED = (
    Printed(2, "resnet18", None, "11.6895", "1.8214", "72.6"),
    Printed(2, "resnet18", "se", "11.7766", "1.8215", "72.9"),
    Printed(2, "resnet18", "da", "11.6897", "1.8215", "73.1"),
    Printed(2, "resnet34", None, "21.7977", "3.6742", "74.5"),
    Printed(2, "resnet34", "se", "21.9549", "3.6744", "74.8"),
    Printed(2, "resnet34", "da", "21.7980", "3.6744", "75.1"),
    Printed(2, "resnet50", None, "25.5570", "4.1185", "75.9"),
    Printed(2, "resnet50", "se", "28.0720", "4.1211", "76.5"),
    Printed(2, "resnet50", "da", "25.5574", "4.1188", "77.0"),
    Printed(2, "resnet101", None, "44.5492", "7.8444", "77.0"),
    Printed(2, "resnet101", "se", "49.2923", "7.8492", "77.6"),
    Printed(2, "resnet101", "da", "44.5498", "7.8448", "78.2"),
    Printed(3, "resnet50", None, "25.557", "4.119", "75.9"),
    Printed(3, "resnet50", "sge", "25.557", "4.127", "76.3"),
    Printed(3, "resnet50", "eca", "25.559", "4.127", "76.8"),
    Printed(3, "resnet50", "da", "25.557", "4.119", "77.0"),
    Printed(3, "resnet101", None, "44.549", "7.844", "77.0"),
    Printed(3, "resnet101", "sge", "44.553", "7.858", "77.4"),
    Printed(3, "resnet101", "eca", "44.549", "7.858", "78.0"),
    Printed(3, "resnet101", "da", "44.550", "7.845", "78.2"),
)

# Rivals that the paper names and has no figures of, beside each of its backbones.
_BESIDE = ("fca", "stn")


def with_rivals(table: int) -> list[Printed]:
    """The rows of a table, and after those of each backbone its rivals', with nothing printed."""
    rows = [row for row in PRINTED if row.table == table]
    backbones = dict.fromkeys(row.backbone for row in rows)
    return [
        row
        for backbone in backbones
        for row in (
            *(row for row in rows if row.backbone == backbone),
            *(Printed(table, backbone, rival, "", "", "") for rival in _BESIDE),
        )
    ]


_LAST_PLACE = "the paper is one unit in the last place lower; the cause is not known"
_SWAPPED = "the paper's cells of SGE and ECA are swapped"
_INSIGHT = "the paper's cell is by PytorchInsight's counter, which gives {insight:.4f}"

# Why a cell is not met: (table, backbone, attention, column).
REASONS: dict[tuple[int, str, str | None, str], str] = {
    (2, "resnet18", "da", "gflops"): _LAST_PLACE,
    (2, "resnet34", "da", "gflops"): _LAST_PLACE,
    (3, "resnet50", "sge", "params"): _SWAPPED,
    (3, "resnet50", "eca", "params"): _SWAPPED,
    (3, "resnet50", "sge", "gflops"): _INSIGHT,
    (3, "resnet50", "eca", "gflops"): _INSIGHT,
    (3, "resnet101", "sge", "gflops"): _INSIGHT,
    (3, "resnet101", "eca", "gflops"): _INSIGHT,
}
