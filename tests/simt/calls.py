"""Hands calls of the operator to the CUDA kernels' executable, and takes their results."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from da_ops.reference import GATES, ORDERS

from ..cases import PARAMETERS, Call
from .build import run

_DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]  # as da::Dtype

REFUSED = 5  # the executable's answer to a call that its kernels cannot run as asked


class Refused(Exception):
    """These kernels cannot run the call this way."""


class OnChip(NamedTuple):
    """One launch in which a team of blocks keeps an image in shared memory."""

    barrier: str = "block"
    blocks: int = 1  # of a team
    images_at_once: int = 1
    kept: int = 2**20  # chunks of x, then of dy, at most; the others are read again

    @property
    def plan(self) -> str:
        """As DA_OPS_PLAN has it."""
        return f"{self.barrier}:{self.blocks},kept={self.kept}"


def raw(t: Tensor) -> bytes:
    flat = t.permute(0, 2, 3, 1) if t.dim() == 4 and not t.is_contiguous() else t
    return flat.reshape(-1).clone().view(torch.uint8).numpy().tobytes()


def begin_request(
    x: Tensor,
    parameters: dict[str, Tensor],
    order: str,
    gate: str,
    multiprocessors: int,
    aligned: bool,
    plan: str,
    *,
    images_at_once: int = 1,
    far: int = 0,
) -> tuple[bytes, bytes]:
    """What a request begins with, and the parameters, which follow later."""
    given = [parameters.get(name) for name in PARAMETERS]
    gate_weight = parameters.get("gate_weight")
    header = [
        *x.shape,
        not x.is_contiguous(),
        _DTYPES.index(x.dtype),
        (*ORDERS, "none").index(order),
        GATES.index(gate),
        gate_weight.numel() if gate == "eca" and gate_weight is not None else 0,
        any(p.dtype != x.dtype for p in parameters.values()),
        sum(1 << i for i, p in enumerate(given) if p is not None),
        multiprocessors,
        aligned,
        images_at_once,
        far,
        len(plan),
    ]
    begin = np.array(header, np.int64).tobytes() + plan.encode()
    return begin, b"".join(raw(p) for p in given if p is not None)


def _request(
    call: Call, multiprocessors: int, aligned: bool, on_chip: OnChip | None, limits: str, far: int
) -> bytes:
    plan = ",".join(filter(None, (on_chip.plan if on_chip else "portable", limits)))
    begin, parameters = begin_request(
        call.x,
        call.parameters,
        call.order,
        call.gate,
        multiprocessors,
        aligned,
        plan,
        images_at_once=on_chip.images_at_once if on_chip else 1,
        far=far,
    )
    dy = call.dy.contiguous(memory_format=memory_format(call.x))
    return begin + parameters + raw(call.x) + raw(dy)


def memory_format(x: Tensor) -> torch.memory_format:
    return torch.contiguous_format if x.is_contiguous() else torch.channels_last


class Answers:
    """The results of requests, in the executable's order."""

    def __init__(self, executable: Path, requests: bytes, **environment: str) -> None:
        done = run(executable, stdin=requests, **environment)
        if done.returncode == REFUSED:
            raise Refused(done.stderr)
        assert done.returncode == 0 and not done.stderr, done.stderr
        self._bytes, self._at = np.frombuffer(done.stdout, np.uint8), 0

    def take(self, like: Tensor) -> Tensor:
        size = like.numel() * like.element_size()
        out = torch.empty(like.numel(), dtype=like.dtype)
        if size:
            part = self._bytes[self._at : self._at + size].copy()
            out.view(torch.uint8).copy_(torch.from_numpy(part))
        self._at += size
        if like.dim() == 4 and not like.is_contiguous():
            n, c, h, w = like.shape
            return out.view(n, h, w, c).permute(0, 3, 1, 2)
        return out.view(like.shape)

    def parameters(self, given: dict[str, Tensor]) -> dict[str, Tensor]:
        return {f"d_{name}": self.take(given[name]) for name in PARAMETERS if name in given}

    def end(self) -> None:
        assert self._at == len(self._bytes)


def results(
    executable: Path,
    calls: list[Call],
    *,
    multiprocessors: int = 132,
    aligned: bool = True,
    on_chip: OnChip | None = None,
    limits: str = "",
    far: int = 0,
    **environment: str,
) -> list[dict[str, Tensor]]:
    """For each call y and every gradient, by name, as of ``Call.results``.

    On fewer multiprocessors tiles are larger; unaligned tensors have no vector accesses. With
    `on_chip` the kernels run that keep an image in shared memory, or Refused is raised. `limits`
    are those of DA_OPS_PLAN. The call's images are the last of a tensor that holds `far` more,
    whose tiles are not run: all of them are zero.
    """
    requests = b"".join(
        _request(call, multiprocessors, aligned, on_chip, limits, far) for call in calls
    )
    answers = Answers(executable, requests, **environment)
    everything = [
        {"y": answers.take(call.x), "dx": answers.take(call.x)}
        | answers.parameters(call.parameters)
        for call in calls
    ]
    answers.end()
    return everything
