"""The logs of a run: rows of CSV, and the same for TensorBoard."""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from .checkpoint import TABLES, atomic


class Table:
    """A CSV file with a row per step. It holds nothing that differs from run to run, such as
    times, so that a resumed run's is the uninterrupted run's to the byte.

    Args:
        path: of the file; made if it is not there.
        columns: after "step".
        step: rows from this step on, which a killed run had written, are dropped.
    """

    def __init__(self, path: Path, columns: Sequence[str], step: int) -> None:
        self.columns = ["step", *columns]
        kept = []
        if step and path.exists():
            lines = path.read_text(encoding="utf-8").splitlines()[1:]
            complete = (line.split(",") for line in lines if line.count(",") == len(columns))
            kept = [row for row in complete if row[0].isdecimal() and int(row[0]) <= step]
        with atomic(path) as file:
            rows = [self.columns, *kept]
            file.write("".join(",".join(row) + "\n" for row in rows).encode())
        self.file = path.open("a", encoding="utf-8", newline="", buffering=1)  # a line at a time
        self.writer = csv.writer(self.file, lineterminator="\n")

    def add(self, step: int, values: Mapping[str, float]) -> None:
        self.writer.writerow([step, *(repr(float(values[name])) for name in self.columns[1:])])

    def sync(self) -> None:
        """Bring all rows to the disk."""
        self.file.flush()
        os.fsync(self.file.fileno())


class Log:
    """``train.csv``, ``eval.csv`` and ``tensorboard/`` of a run folder, as of ``step``."""

    TRAIN = ("lr", "loss", "bbox_regression", "classification", "gradient_norm")
    EVAL = ("map_11", "map")

    def __init__(self, folder: Path, step: int) -> None:
        self.tables = {
            Path(name).stem: Table(folder / name, columns, step)
            for name, columns in zip(TABLES, (self.TRAIN, self.EVAL))
        }
        self.board = SummaryWriter(folder / "tensorboard", purge_step=step + 1)

    def add(self, table: str, step: int, values: Mapping[str, float], **board: float) -> None:
        """A row of a table; ``board`` holds what TensorBoard alone is told."""
        self.tables[table].add(step, values)
        shown = {name: values[name] for name in self.tables[table].columns[1:]}
        for name, value in {**shown, **board}.items():
            self.board.add_scalar(f"{table}/{name}", value, step)

    def sync(self) -> None:
        """Bring all rows to the disk; a checkpoint must not be ahead of them."""
        for table in self.tables.values():
            table.sync()

    def close(self) -> None:
        for table in self.tables.values():
            table.file.close()
        self.board.close()
