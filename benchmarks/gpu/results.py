"""What a run on a GPU leaves: one results file with a chart, the logs, a table."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import environment, files, pages, report, tables
from benchmarks.gpu.run import Outcome

LONGEST_LOG = 8_000_000  # characters


def table(outcomes: Sequence[Outcome]) -> str:
    rows = pages.part_rows({"parts": [vars(o) for o in outcomes]})
    return tables.plain_table(
        [*pages.PART_HEADER, "note"],
        [[*row, o.note] for row, o in zip(rows, outcomes, strict=True)],
    )


def results(outcomes: Sequence[Outcome], head: dict[str, Any], scratch: Path) -> dict[str, Any]:
    """The parts, and what the benchmarks have written until now."""
    found = {
        kind: json.loads(path.read_text())
        for kind in files.KINDS
        if (path := scratch / f"x-{kind}.json").exists()
    }
    return {
        **head,
        "seconds": sum(o.seconds for o in outcomes),
        "parts": [dict(vars(o)) for o in outcomes],
        **found,
    }


def write(written: dict[str, Any], folders: Sequence[Path], scratch: Path) -> None:
    """The JSON to every folder, and all logs in one to OUT."""
    name = environment.slug(written["device"]["name"])
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
        environment.write_results(folder / f"{name}.json", written)
    if os.environ.get("OUT"):
        logs = [
            f"==== {path.name}\n{path.read_text(errors='replace')}"
            for path in sorted(scratch.glob("*.log"))
        ]
        (Path(os.environ["OUT"]) / f"{name}.log").write_text("\n".join(logs)[-LONGEST_LOG:])


def draw(written: dict[str, Any], folders: Sequence[Path]) -> None:
    """The chart, beside the JSON."""
    name = environment.slug(written["device"]["name"])
    together = {kind: written[kind] for kind in files.KINDS if kind in written}
    try:
        for folder in folders:
            report.draw(together, folder / f"{name}.png")
    except Exception as error:  # the results are written, and the table is still to come
        print(f"no chart: {error}")
