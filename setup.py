"""Everything declarative is in pyproject.toml; what is compiled, and when, in build_tools."""

import sys
from pathlib import Path

from setuptools import setup

sys.path.insert(0, str(Path(__file__).parent))  # an isolated build does not look beside setup.py

from build_tools.extension import BuildOps, extensions

setup(ext_modules=extensions(), cmdclass={"build_ext": BuildOps})
