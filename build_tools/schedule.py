"""Write the schedule of csrc/schedule.h, as the planner was built with it, into Python.

python -m build_tools.schedule    renews the table in da_ops/backends/schedule.py
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

FILE = Path(__file__).parents[1] / "da_ops" / "backends" / "schedule.py"
MARK = "# The rest is generated: python -m build_tools.schedule\n"


def table(schedules: Mapping[str, Mapping[str, Sequence[Mapping[str, Any]]]]) -> str:
    """The source of SCHEDULES, of what the planner says."""
    return "\n".join(["SCHEDULES = {", *_orders(schedules), "}", ""])


def _orders(schedules: Mapping[str, Mapping[str, Sequence[Mapping[str, Any]]]]) -> Iterator[str]:
    for order, directions in schedules.items():
        yield f'    "{order}": Schedule('
        for direction in ("forward", "backward"):
            yield f"        {direction}=("
            for step in directions[direction]:
                arguments = (
                    f'"{step["name"]}"',
                    _strings(step["reads"]),
                    _strings(step["writes"]),
                    f'"{step["weights"]}"',
                    _axes(step["sums"]),
                    _axes(step["complete"]),
                )
                yield f"            Pass({', '.join(arguments)}),"
            yield "        ),"
        yield "    ),"


def _strings(names: Sequence[str]) -> str:
    quoted = [f'"{name}"' for name in names]
    return f"({quoted[0]},)" if len(quoted) == 1 else f"({', '.join(quoted)})"


def _axes(names: Sequence[str]) -> str:
    return {0: "NONE", 1: "".join(names).upper(), 2: "BOTH"}[len(names)]


def renewed(text: str, schedules: Mapping[str, Any]) -> str:
    head, mark, _ = text.partition(MARK)
    return head + mark + table(schedules)


if __name__ == "__main__":
    from da_ops import _plan

    FILE.write_text(renewed(FILE.read_text(), _plan.schedules()))
