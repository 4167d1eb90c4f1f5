"""Files that a command is to write."""

from __future__ import annotations

from pathlib import Path


def check_file(option: str, path: Path) -> None:
    """Before anything is computed for it, raise FileNotFoundError where this can be no file."""
    if path.is_dir() or not path.parent.is_dir():
        raise FileNotFoundError(f"{option}: expected a file in a folder that exists, got {path}")
