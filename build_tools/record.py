"""The record that every build leaves in da_ops/_build.json, for `da-ops info`, and its table.

python -m build_tools.record    prints the table of the last build in this tree
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

RECORD = "_build.json"

NO_KERNELS = """\
da_ops is being installed WITHOUT its fused CPU kernels:
    {reason}
It will work, but every call on the CPU runs the slower plain PyTorch formula.
Install a C++ compiler (g++ or clang++), then install da_ops again."""


def summary(record: Mapping[str, Any]) -> str:
    rows = []
    for name in ("cpu", "plan", "cuda"):
        state = record[name]
        rows.append((name, "built" if state["built"] else f"not built: {state['reason']}"))
    if record["cuda"]["compiler"]:
        rows.append(("nvcc", record["cuda"]["compiler"].removeprefix("nvcc ")))
    if record["cuda"]["arch_list"]:
        rows.append(("archs", " ".join(record["cuda"]["arch_list"])))
    rows.append(("c++", record["compiler"] or "none"))
    rows.append(("torch", f"{record['torch']}, Python {record['python']}"))
    table = "\n".join(f"  {name:<6} {text}" for name, text in rows)
    text = f"\nda_ops {record['version']}\n{table}\n"
    if not record["cpu"]["built"] and not record["compiler"]:
        bar = "*" * 80
        text += f"\n{bar}\n{NO_KERNELS.format(reason=record['cpu']['reason'])}\n{bar}\n"
    return text


if __name__ == "__main__":
    print(summary(json.loads(Path("da_ops", RECORD).read_text())))
