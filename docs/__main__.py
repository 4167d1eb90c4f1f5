"""The generated parts of these pages: pictures, and a plan as explain prints it.

python -m docs            writes docs/pictures/*.svg and the block of docs/how-it-works.md
python -m docs --check    exit 1 if they are not what it would write
"""

from __future__ import annotations

import argparse
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import torch

import da_ops
from benchmarks.pages import marked, read_page, with_block

from .pictures import DEVICE, PICTURES, SHAPE

FOLDER = Path(__file__).parent
PAGE = FOLDER / "how-it-works.md"


def plan() -> str:
    """The forward half of what explain says of the pages' example."""
    x = torch.empty(SHAPE, dtype=torch.float16, device="meta")
    text = str(da_ops.explain(x, device=DEVICE))
    lines = text[: text.index("\nbackward:")].splitlines()
    wrapped = (textwrap.wrap(line, 100, subsequent_indent=" " * 27) for line in lines)
    shown = [line for part in wrapped for line in part]
    return marked("explain", "python -m docs", ["", "```", *shown, "```", ""])


def written() -> Iterator[tuple[Path, str]]:
    """Each file and what should be in it."""
    for name, draw in PICTURES.items():
        yield FOLDER / "pictures" / name, draw().render()
    yield PAGE, with_block(read_page(PAGE), plan(), PAGE)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m docs", description="Write the pictures, and the plan in how-it-works.md."
    )
    parser.add_argument(
        "--check", action="store_true", help="write nothing, fail where anything would be written"
    )
    check = parser.parse_args(arguments).check
    status = 0
    for path, new in written():
        if not check:
            path.parent.mkdir(exist_ok=True)
            path.write_text(new, encoding="utf-8")
        elif not path.exists() or path.read_text(encoding="utf-8") != new:
            print(f"docs: {path} is not what is written of today's sources; run python -m docs")
            status = 1
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
