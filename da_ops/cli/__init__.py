"""``python -m da_ops``: one module a command, each with ``add(commands)``."""

from __future__ import annotations

import argparse
import sys

from .._version import __version__
from . import cam, eval, explain, info, make_data, tables, train

_COMMANDS = (info, explain, make_data, train, eval, cam, tables)


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="da-ops", description="DA attention layer: the operator, and the paper's system."
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="command")
    for command in _COMMANDS:
        command.add(commands)
    args = parser.parse_args(argv)
    try:
        return int(args.run(args))
    except (RuntimeError, ValueError, OSError, ImportError) as error:
        print(f"da-ops: {error}", file=sys.stderr)
        return 1
