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


def _raw(t: Tensor) -> bytes:
    flat = t.permute(0, 2, 3, 1) if t.dim() == 4 and not t.is_contiguous() else t
    return flat.reshape(-1).clone().view(torch.uint8).numpy().tobytes()


def _request(
    call: Call, multiprocessors: int, aligned: bool, on_chip: OnChip | None, limits: str, far: int
) -> bytes:
    given = [call.parameters.get(name) for name in PARAMETERS]
    present = sum(1 << i for i, p in enumerate(given) if p is not None)
    wide = any(p.dtype != call.x.dtype for p in call.parameters.values())
    gate_weight = call.parameters.get("gate_weight")
    header = [
        *call.x.shape,
        not call.x.is_contiguous(),
        _DTYPES.index(call.x.dtype),
        ORDERS.index(call.order),
        GATES.index(call.gate),
        gate_weight.numel() if call.gate == "eca" and gate_weight is not None else 0,
        wide,
        present,
        multiprocessors,
        aligned,
        on_chip.images_at_once if on_chip else 1,
        far,
    ]
    plan = ",".join(filter(None, (on_chip.plan if on_chip else "portable", limits))).encode()
    header.append(len(plan))
    dy = call.dy.contiguous(memory_format=_format(call))
    tensors = [*(p for p in given if p is not None), call.x, dy]
    return np.array(header, np.int64).tobytes() + plan + b"".join(map(_raw, tensors))


def _format(call: Call) -> torch.memory_format:
    return torch.contiguous_format if call.x.is_contiguous() else torch.channels_last


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
    done = run(executable, stdin=requests, **environment)
    if done.returncode == REFUSED:
        raise Refused(done.stderr)
    assert done.returncode == 0 and not done.stderr, done.stderr
    answer, at = np.frombuffer(done.stdout, np.uint8), 0

    def take(like: Tensor) -> Tensor:
        nonlocal at
        size = like.numel() * like.element_size()
        out = torch.empty(like.numel(), dtype=like.dtype)
        if size:
            out.view(torch.uint8).copy_(torch.from_numpy(answer[at : at + size].copy()))
        at += size
        if like.dim() == 4 and not like.is_contiguous():
            n, c, h, w = like.shape
            return out.view(n, h, w, c).permute(0, 3, 1, 2)
        return out.view(like.shape)

    everything = []
    for call in calls:
        got = {"y": take(call.x), "dx": take(call.x)}
        for name in PARAMETERS:
            if name in call.parameters:
                got[f"d_{name}"] = take(call.parameters[name])
        everything.append(got)
    assert at == len(answer)
    return everything
