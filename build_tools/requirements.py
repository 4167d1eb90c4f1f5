"""Print what pyproject.toml asks for, so that `make` can install it without building da_ops.

python build_tools/requirements.py bench test            one requirement per line
python build_tools/requirements.py --missing bench test  those that this interpreter lacks
python build_tools/requirements.py --oldest bench test   with the oldest torch that is promised
"""

from __future__ import annotations

import re
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    from pip._vendor import tomli as tomllib


def requirements(extras: list[str]) -> list[str]:
    """What building da_ops, running it, and the given extras take."""
    pyproject = tomllib.loads(Path(__file__).parents[1].joinpath("pyproject.toml").read_text())
    wanted = [*pyproject["build-system"]["requires"], *pyproject["project"]["dependencies"]]
    for extra in extras:
        wanted += expand(extra, pyproject["project"])
    return list(dict.fromkeys(wanted))


def expand(extra: str, project: dict[str, Any]) -> list[str]:
    """An extra's requirements; `da-ops[a,b]` among them stands for the extras a and b."""
    found = []
    for requirement in project["optional-dependencies"][extra]:
        own = re.fullmatch(rf"{project['name']}\[(.+)\]", requirement)
        if own:
            for name in own.group(1).split(","):
                found += expand(name.strip(), project)
        else:
            found.append(requirement)
    return found


def oldest(requirement: str) -> str:
    """Of torch's minor versions only the lowest: torch>=2.10 becomes torch==2.10.*"""
    return re.sub(r"^torch>=([\d.]+)$", r"torch==\1.*", requirement)


def installed(requirement: str) -> bool:
    try:
        metadata.version(re.split(r"[^\w.-]", requirement)[0])
    except metadata.PackageNotFoundError:
        return False
    return True


if __name__ == "__main__":
    extras = [argument for argument in sys.argv[1:] if not argument.startswith("--")]
    names = requirements(extras)
    if "--oldest" in sys.argv:
        names = [oldest(name) for name in names]
    if "--missing" in sys.argv:
        names = [name for name in names if not installed(name)]
    print("\n".join(names))
