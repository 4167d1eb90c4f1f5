"""The backends, and the choice among them."""

from __future__ import annotations

from . import cpu, cuda, eager, triton
from .choice import CHOICE

for _backend in (cuda.BACKEND, triton.BACKEND, cpu.BACKEND, eager.BACKEND):  # the best first
    CHOICE.backends[_backend.name] = _backend

BACKENDS = CHOICE.backends
NAMES = tuple(BACKENDS)
select, unserved, passed_over = CHOICE.select, CHOICE.unserved, CHOICE.passed_over


def backends() -> dict[str, str | None]:
    """Every backend by name, the best first: None if it is usable here, else the reason it is not.

    >>> import da_ops
    >>> da_ops.backends()["eager"] is None
    True
    """
    return {name: CHOICE.unusable(name) for name in NAMES}
