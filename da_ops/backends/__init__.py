"""Who computes: every backend, why one is not usable here, and the choice among them."""

from __future__ import annotations

import logging
import os
from dataclasses import replace

import torch

from . import cpu, cuda, eager, triton
from .base import Backend

logger = logging.getLogger("da_ops")

NAMES = ("cuda", "triton", "cpu", "eager")  # the best first

BACKENDS: dict[str, Backend] = {
    backend.name: backend for backend in (cuda.BACKEND, triton.BACKEND, cpu.BACKEND, eager.BACKEND)
}

_chosen: dict[str, str] = {}  # by device type, for "auto"
_warned: set[str] = set()  # of these reasons


def backends() -> dict[str, str | None]:
    """Every backend by name, the best first: None if it is usable here, else the reason it is not.

    >>> import da_ops
    >>> da_ops.backends()["eager"] is None
    True
    """
    return {name: BACKENDS[name].reason or BACKENDS[name].missing() for name in NAMES}


def unserved(name: str, device_type: str) -> str | None:
    """Why backend ``name`` cannot serve tensors on ``device_type``; None if it can."""
    backend = BACKENDS[name]
    if backend.reason is not None:
        return backend.reason
    if not backend.serves(device_type):
        return f"it does not serve tensors on {device_type!r}"
    return None if torch.compiler.is_compiling() else backend.unfit()


def select(backend: str, device_type: str) -> str:
    """The name of the backend that computes for tensors on ``device_type``.

    ``"auto"`` takes the best usable one, or what the environment variable DA_OPS_BACKEND says, and
    logs its choice once for each device type.

    Raises:
        ValueError: there is no such backend.
        RuntimeError: ``backend`` is not usable here, or not for this device.
    """
    if backend == "auto":
        if device_type not in _chosen:
            name, why = _choose(device_type)
            if torch.compiler.is_compiling():
                return name  # a traced call cannot log: the next one that is not will
            _chosen[device_type] = name
            level = logging.WARNING if _broken(name, device_type) else logging.INFO
            logger.log(level, "da_ops: backend %r for %s tensors (%s)", name, device_type, why)
        return _chosen[device_type]
    if backend not in NAMES:
        raise ValueError(
            f"da_attention: backend must be 'auto' or one of {', '.join(map(repr, NAMES))}; "
            f"got {backend!r}"
        )
    reason = unserved(backend, device_type)
    if reason is not None:
        raise RuntimeError(
            f"da_attention: backend {backend!r} cannot serve: {reason}; "
            "use backend='auto' for the best that can"
        )
    return backend


def implementation(name: str, asked: str) -> Backend:
    """The backend ``name`` as it serves who asked for ``asked``, which may be "auto"."""
    backend = BACKENDS[name]
    return backend.forgiving or backend if asked == "auto" else backend


def passed_over(name: str, device_type: str) -> str | None:
    """Why "auto" does not take backend ``name`` for tensors on ``device_type``."""
    return unserved(name, device_type) or BACKENDS[name].explicit_only


def give_up(name: str, reason: str) -> None:
    """Backend ``name`` turned out at run time not to work here: say so, never choose it again."""
    BACKENDS[name] = replace(BACKENDS[name], reason=reason)
    _chosen.clear()
    if reason not in _warned:
        _warned.add(reason)
        logger.warning("da_ops: backend %r does not work here, not used again: %s", name, reason)


def _broken(chosen: str, device_type: str) -> bool:
    """Whether a better backend is for this device and cannot be had; told of each reason once."""
    if _wish() != "auto":
        return False
    better = NAMES[: NAMES.index(chosen)]
    found = (unserved(name, device_type) for name in better if BACKENDS[name].serves(device_type))
    reasons = {reason for reason in found if reason is not None}
    new = bool(reasons - _warned)
    _warned.update(reasons)
    return new


def _wish() -> str:
    return os.environ.get("DA_OPS_BACKEND") or "auto"  # set to nothing is not set


def _choose(device_type: str) -> tuple[str, str]:
    """What "auto" takes, and why."""
    wish = _wish()
    if wish != "auto":
        try:
            return select(wish, device_type), "by DA_OPS_BACKEND"
        except (ValueError, RuntimeError) as error:
            raise type(error)(f"{error} (asked for by the environment's DA_OPS_BACKEND)") from None
    passed: list[str] = []
    for name in NAMES:
        reason = passed_over(name, device_type)
        if reason is None:
            return name, "; ".join(passed) or "the best there is"
        passed.append(f"not {name!r}: {reason}")
    raise AssertionError("the eager backend serves everything")
