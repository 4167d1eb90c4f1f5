"""How far a command has come, told while it runs to whoever started it: what has passed, failed and
been skipped until now and out of how many, in the file that a variable of the environment names."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

VARIABLE = "DA_OPS_TALLY"


@dataclass
class Tally:
    passed: int = 0
    failed: int = 0
    skipped: int = 0
    of: int = 0  # 0: not known

    @property
    def done(self) -> int:
        return self.passed + self.failed + self.skipped

    def add(self, outcome: str) -> None:
        """One more that has "passed", "failed" or been "skipped"."""
        setattr(self, outcome, getattr(self, outcome) + 1)
        self.tell()

    def tell(self) -> None:
        """Write it, whole, for whoever asked."""
        if path := os.environ.get(VARIABLE):
            unfinished = Path(f"{path}.{os.getpid()}")
            unfinished.write_text(json.dumps(asdict(self)))
            unfinished.replace(path)


def read(path: Path) -> Tally | None:
    """What a command told last; None if nothing."""
    try:
        return Tally(**json.loads(path.read_text()))
    except FileNotFoundError:
        return None
