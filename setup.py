"""Everything declarative is in pyproject.toml; what is compiled, and when, in build_tools, and so
is what depends on where the repository lies."""

import os
import sys
from pathlib import Path

from setuptools import setup

sys.path.insert(0, str(Path(__file__).parent))  # an isolated build does not look beside setup.py

from build_tools import project_page
from build_tools.extension import BuildOps, extensions

page = project_page.fields(os.environ)
setup(ext_modules=extensions(), cmdclass={"build_ext": BuildOps}, **page)
