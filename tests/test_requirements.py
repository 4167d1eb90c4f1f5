"""What an environment takes, as pyproject.toml has it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from build_tools import requirements

GROUP = """
import os, pytest

@pytest.mark.xdist_group("one")
@pytest.mark.parametrize("number", range(6))
def test_worker(number):
    open(os.environ["PYTEST_XDIST_WORKER"], "a").close()
"""


def test_requirements_are_those_of_pyproject():
    names = requirements.requirements(["dev"])
    for name in ("numpy", "ninja", "torchvision", "hypothesis", "ruff"):
        assert name in names
    assert len(names) == len(set(names))
    assert not [name for name in names if name.startswith("da-ops")]
    assert requirements.installed("torch>=1")
    assert not requirements.installed("no-such-package-of-ours>=1")


def test_groups_of_tests_stay_together(tmp_path):
    """As those must that share what takes long to build, or that open ports."""
    pytest.importorskip("xdist")
    (tmp_path / "test_group.py").write_text(GROUP)
    command = [sys.executable, "-m", "pytest", "-q", "-n", "2", "--dist", "loadgroup", "."]
    others = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST")}
    subprocess.run(command, cwd=tmp_path, env=others, check=True, capture_output=True)
    assert len(list(tmp_path.glob("gw*"))) == 1
