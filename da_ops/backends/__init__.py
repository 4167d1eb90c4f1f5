"""The backends, and the choice among them."""

from __future__ import annotations

from . import cpu, cuda, eager, triton
from .choice import CHOICE
from .tuned import PLANS

for _backend in (cuda.BACKEND, triton.BACKEND, cpu.BACKEND, eager.BACKEND):  # the best first
    CHOICE.backends[_backend.name] = _backend
PLANS.changed = CHOICE.follow_plans
PLANS.changed()

BACKENDS = CHOICE.backends
NAMES = tuple(BACKENDS)
select, unserved, passed_over = CHOICE.select, CHOICE.unserved, CHOICE.passed_over
faster, stand_ins = CHOICE.faster, CHOICE.stand_ins


def backends() -> dict[str, str | None]:
    """Every backend by name, the best first: None if it is usable here, else the reason it is not.

    >>> import da_ops
    >>> da_ops.backends()["eager"] is None
    True
    """
    return {name: CHOICE.unusable(name) for name in NAMES}
