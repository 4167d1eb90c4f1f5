"""``python -m da_ops``: one module a command, each with ``add(commands)``."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from typing import TextIO

from .._version import __version__
from . import cam, eval, explain, info, make_data, tables, train, tune

_COMMANDS = (info, explain, tune, make_data, train, eval, cam, tables)
_BY_SIGNAL = 128  # plus the signal's number: how a shell tells that one ended a command


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    try:
        try:
            return _run(argv)
        finally:
            sys.stdout.flush()  # now, so that a reader who has gone is not taken for a failure
    except BrokenPipeError:
        _leave_unread()
        return _BY_SIGNAL + signal.SIGPIPE
    except KeyboardInterrupt as interrupt:
        if argv is None:  # in a process of its own, which only has to end
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        if os.environ.get("RANK", "") in ("", "0"):  # of torchrun's processes the first
            print(": ".join(["da-ops: interrupted", *map(str, interrupt.args)]), file=sys.stderr)
        return _BY_SIGNAL + signal.SIGINT


def _run(argv: list[str] | None) -> int:
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
    except BrokenPipeError:
        raise
    except (RuntimeError, ValueError, OSError, ImportError) as error:
        print(f"da-ops: {error}", file=sys.stderr)
        return 1


def _leave_unread() -> None:
    """Send unread output nowhere, or Python would complain of it once more at its end."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in filter(_unread, (sys.stdout, sys.stderr)):
        os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def _unread(stream: TextIO) -> bool:
    try:
        stream.flush()
    except BrokenPipeError:
        return True
    return False
