"""What an environment takes, as pyproject.toml has it."""

from __future__ import annotations

from build_tools import requirements


def test_requirements_are_those_of_pyproject():
    names = requirements.requirements(["dev"])
    for name in ("numpy", "ninja", "torchvision", "hypothesis", "ruff"):
        assert name in names
    assert len(names) == len(set(names))
    assert not [name for name in names if name.startswith("da-ops")]
    assert requirements.installed("torch>=1")
    assert not requirements.installed("no-such-package-of-ours>=1")
