"""``tables``: parameters and GFLOPs of the paper's networks, beside its figures."""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import asdict
from pathlib import Path


def add(commands: argparse._SubParsersAction) -> None:
    """Declare the command."""
    text = "parameters and GFLOPs of the paper's Tables II and III, beside its figures"
    command = commands.add_parser("tables", help=text, description=text)
    command.add_argument(
        "table", nargs="?", type=int, choices=(2, 3), help="which table; both if left out"
    )
    command.add_argument("--json", metavar="FILE", type=Path, help="write the rows to FILE, too")
    command.set_defaults(run=_tables)


def _tables(args: argparse.Namespace) -> int:
    from .. import cost  # here, for it imports torchvision

    print(cost.render(args.table))
    if args.json is not None:
        rows = [asdict(row) for row in cost.rows(args.table)]
        _write(args.json, json.dumps(rows, indent=2) + "\n")
    return 0


def _write(path: Path, text: str) -> None:
    """Write all of it or nothing."""
    unfinished = path.parent / f".{path.name}.{os.getpid()}"
    try:
        unfinished.write_text(text)
        os.replace(unfinished, path)
    except OSError as error:
        unfinished.unlink(missing_ok=True)
        raise OSError(
            f"--json must name a file in a folder that can be written to, got {path}: "
            f"{error.strerror}"
        ) from error
