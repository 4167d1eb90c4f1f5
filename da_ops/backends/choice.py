"""The choice among the backends: the one that computes, and the reasons against the others."""

from __future__ import annotations

import logging
import os
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..parameters import Gradients
from .base import Backend, Call
from .tuned import ENVIRONMENT, OTHERS, PLANS

logger = logging.getLogger("da_ops")


class Choice:
    """Chooses a backend for each call, and remembers what it chose, warned of and gave up."""

    def __init__(self) -> None:
        self.backends: dict[str, Backend] = {}  # the best first
        self._chosen: dict[str, str] = {}  # name by device type, for "auto"
        # The backend by the name asked for and the device type, where :meth:`select` allowed it.
        self._allowed: dict[tuple[str, str], Backend] = {}
        # The same for residual tails: the backend, and what of it serves.
        self._of_tails: dict[tuple[str, str], tuple[Backend, Backend]] = {}
        self._warned: set[str] = set()  # reasons
        self._given_up: dict[str, str] = {}  # reason by name

    def forget(self) -> None:
        """Choose anew from here on, as after the import."""
        self._chosen.clear()
        self._of_tails.clear()
        self._allowed.clear()
        self._warned.clear()
        self._given_up.clear()
        self.follow_plans()

    def unusable(self, name: str) -> str | None:
        """Why backend ``name`` is not usable on this machine; None if it is."""
        backend = self.backends[name]
        return self._given_up.get(name) or backend.reason or backend.missing()

    def unserved(self, name: str, device_type: str) -> str | None:
        """Why backend ``name`` cannot serve tensors on ``device_type``; None if it can."""
        backend = self.backends[name]
        reason = self._given_up.get(name) or backend.reason
        if reason is not None:
            return reason
        if not backend.serves(device_type):
            return f"it does not serve tensors on {device_type!r}"
        return None if torch.compiler.is_compiling() else backend.unfit()

    def passed_over(self, name: str, device_type: str) -> str | None:
        """Why "auto" does not take backend ``name`` for tensors on ``device_type``."""
        return self.unserved(name, device_type) or self.backends[name].explicit_only

    def select(self, asked: str, device_type: str) -> str:
        """The name of the backend that computes for tensors on ``device_type``.

        ``"auto"`` takes the best usable one, or the one that the environment variable
        DA_OPS_BACKEND names, and logs its choice once for each device type.

        Raises:
            ValueError: there is no such backend.
            RuntimeError: ``asked`` is not usable here, or not for this device.
        """
        if asked == "auto":
            chosen = self._chosen.get(device_type)  # another thread may forget it at any time
            if chosen is None:
                chosen, why = self._best(device_type)
                if torch.compiler.is_compiling():
                    return chosen  # a traced call cannot log: the next one that is not will
                self._chosen[device_type] = chosen
                level = logging.WARNING if self._broken(chosen, device_type) else logging.INFO
                told = "da_ops: backend %r for %s tensors (%s)"
                logger.log(level, told, chosen, device_type, why)
            return chosen
        if asked not in self.backends:
            raise ValueError(
                f"da_attention: backend must be 'auto' or one of "
                f"{', '.join(map(repr, self.backends))}; got {asked!r}"
            )
        reason = self.unserved(asked, device_type)
        if reason is not None:
            raise RuntimeError(
                f"da_attention: backend {asked!r} cannot serve: {reason}; "
                "use backend='auto' for the best that can"
            )
        return asked

    def implementation(self, asked: str, device_type: str) -> Backend:
        """The backend that :meth:`select` names, in its variant for "auto"."""
        if asked != "auto":
            if torch.compiler.is_compiling():  # a graph would depend on what is remembered
                return self.backends[self.select(asked, device_type)]
            backend = self.backends.get(asked)
            if backend is None or self._allowed.get((asked, device_type)) is not backend:
                backend = self.backends[self.select(asked, device_type)]
                self._allowed[asked, device_type] = backend
            return backend
        name = self._chosen.get(device_type) or self.select(asked, device_type)  # most calls' way
        backend = self.backends[name]
        return backend.for_auto or backend

    def for_tails(self, asked: str, device_type: str) -> Backend:
        """The backend that computes residual tails: that of :meth:`implementation`, but where
        "auto" took one without a kernel of them, the best that has one. If none has, it is without,
        and :meth:`without_tails` says why."""
        if torch.compiler.is_compiling():  # a graph would depend on what is remembered
            return self._for_tails(asked, device_type)
        found = self._of_tails.get((asked, device_type))
        if found is None or self.backends[found[0].name] is not found[0]:
            serves = self._for_tails(asked, device_type)
            self._of_tails[asked, device_type] = self.backends[serves.name], serves
            return serves
        return found[1]

    def _for_tails(self, asked: str, device_type: str) -> Backend:
        first = self.implementation(asked, device_type)
        if first.residual_forward is not None or asked != "auto" or _wish() != "auto":
            return first
        able = self._able_for_tails(device_type)
        name = next((n for n, reason in able.items() if reason is None), first.name)
        if name != first.name and not torch.compiler.is_compiling():
            told = "da_ops: backend %r for residual tails of %s tensors (%r has no kernel of them)"
            logger.info(told, name, device_type, first.name)
        return self.backends[name].for_auto or self.backends[name]

    def without_tails(self, asked: str, device_type: str) -> str | None:
        """Why no kernel computes residual tails; None if one does."""
        if self.for_tails(asked, device_type).residual_forward is not None:
            return None
        reason = without_kernel(self.select(asked, device_type))
        if asked != "auto" or _wish() != "auto":
            return reason
        others = self._able_for_tails(device_type).items()
        return "; ".join([reason, *(f"not {name!r}: {why}" for name, why in others)])

    def _able_for_tails(self, device_type: str) -> dict[str, str | None]:
        """The backends with a kernel of residual tails for this device, the best first, and why
        "auto" does not take them."""
        return {
            name: self.passed_over(name, device_type)
            for name, backend in self.backends.items()
            if backend.residual_forward is not None and backend.serves(device_type)
        }

    def faster(self, name: str, call: Call, backward: bool, device: torch.device) -> str:
        """The name of the backend that computes such a call where "auto" has chosen ``name``:
        another one that can serve, where tuning found that faster."""
        tuned = PLANS.of(name, call, backward, device) if name in ENVIRONMENT else None
        return tuned.plan if tuned and tuned.plan in self.stand_ins(device.type) else name

    def stand_ins(self, device_type: str) -> list[str]:
        """The backends that "auto" may take in place of a compiled one, for calls that they are
        faster at: none where DA_OPS_BACKEND has chosen."""
        if _wish() != "auto":
            return []
        return [name for name in OTHERS if self.passed_over(name, device_type) is None]

    def follow_plans(self) -> None:
        """Have "auto" leave to other backends what tuning found them to be faster at. Where there
        is no such call, it costs none a look."""
        for name in ENVIRONMENT:
            backend = self.backends[name]
            by_call = self._by_call(name) if PLANS.by_others(name) else None
            if by_call or backend.for_auto:
                self.backends[name] = replace(backend, for_auto=by_call)

    def _by_call(self, name: str) -> Backend:
        first = replace(self.backends[name], for_auto=None)
        known: dict[Any, Backend] = {}

        def of(x: Tensor, order: str, gate: str, backward: bool) -> Backend:
            if not all(type(size) is int for size in x.shape):
                return first  # a graph for any sizes
            kind = x.shape, x.dtype, x.is_contiguous(), x.device, order, gate, backward
            found = known.get(kind)
            if found is None:
                call = Call(tuple(x.shape), x.dtype, not x.is_contiguous(), order, gate)
                faster = self.faster(name, call, backward, x.device)
                found = known[kind] = first if faster == name else self.backends[faster]
            return found

        def forward(
            x: Tensor, parameters: Any, order: str, gate: str
        ) -> tuple[Tensor, Tensor, Tensor]:
            other = of(x, order, gate, False)
            # Where plain PyTorch takes over there are no maps for another's backward to read; a
            # graph learns too late that it did.
            if torch.compiler.is_compiling() and of(x, order, gate, True) is first:
                other = first
            results = (other.for_auto or other).forward(x, parameters, order, gate)
            if self.gave_up(other.name):
                return first.forward(x, parameters, order, gate)
            return results

        def backward(dy: Tensor, x: Tensor, *arguments: Any) -> Gradients:
            *_, order, gate = arguments
            other = of(x, order, gate, True)
            return (other.for_auto or other).backward(dy, x, *arguments)

        return replace(first, forward=forward, backward=backward, checks=False)

    def give_up(self, name: str, reason: str) -> None:
        """Never choose backend ``name`` again, which turned out at run time not to work; warn."""
        self._given_up[name] = reason
        self._chosen.clear()
        self._of_tails.clear()
        self._allowed.clear()
        self.follow_plans()
        if reason not in self._warned:
            self._warned.add(reason)
            logger.warning(
                "da_ops: backend %r does not work here, not used again: %s", name, reason
            )

    def gave_up(self, name: str) -> bool:
        """Whether backend ``name`` was given up."""
        return name in self._given_up

    def _best(self, device_type: str) -> tuple[str, str]:
        """The backend that "auto" takes, and why."""
        wish = _wish()
        if wish != "auto":
            try:
                return self.select(wish, device_type), "by DA_OPS_BACKEND"
            except (ValueError, RuntimeError) as error:
                told = f"{error} (asked for by the environment's DA_OPS_BACKEND)"
                raise type(error)(told) from None
        passed: list[str] = []
        for name in self.backends:
            reason = self.passed_over(name, device_type)
            if reason is None:
                return name, "; ".join(passed) or "the best there is"
            passed.append(f"not {name!r}: {reason}")
        raise AssertionError("the eager backend serves everything")

    def _broken(self, chosen: str, device_type: str) -> bool:
        """Whether a better backend for this device does not work, for a reason not yet told."""
        if _wish() != "auto":
            return False
        names = list(self.backends)
        better = names[: names.index(chosen)]
        found = (
            self.unserved(name, device_type)
            for name in better
            if self.backends[name].serves(device_type)
        )
        reasons = {reason for reason in found if reason is not None}
        new = bool(reasons - self._warned)
        self._warned.update(reasons)
        return new


def without_kernel(name: str) -> str:
    return f"backend {name!r} has no kernel of the residual tail"


def _wish() -> str:
    return os.environ.get("DA_OPS_BACKEND") or "auto"  # set to nothing is not set


CHOICE = Choice()  # the only one; da_ops/backends/__init__.py gives it its backends
