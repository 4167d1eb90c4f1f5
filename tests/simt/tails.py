"""Hands calls of the residual tail to the CUDA kernels' executable, and takes their results."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from da_ops.reference import accumulation_dtype
from da_ops.residual.reference import Norm

from ..tails import Tail
from .calls import Answers, begin_request, memory_format, raw


def _request(tail: Tail, multiprocessors: int, aligned: bool, limits: str, far: int) -> bytes:
    plan = ",".join(filter(None, ("portable", limits)))
    begin, parameters = begin_request(
        tail.u, tail.parameters, tail.order, tail.gate, multiprocessors, aligned, plan, far=far
    )
    norms = [tail.norm, tail.shortcut_norm or Norm(*(torch.empty(0),) * 4, 0.0)]
    of_norm, of_shortcut = (_of_norm(norm, tail.u.dtype) for norm in norms)
    facts = [tail.shortcut is not None, tail.shortcut_norm is not None]
    of_tail = of_norm + np.array(facts, np.int64).tobytes() + of_shortcut
    given = [t for norm in norms for t in norm[:4] if t is not None]
    like = memory_format(tail.u)
    others = [t for t in (tail.shortcut, tail.dout) if t is not None]
    full = (t.contiguous(memory_format=like) for t in others)
    return b"".join([begin, of_tail, parameters, *map(raw, given), raw(tail.u), *map(raw, full)])


def _of_norm(norm: Norm, dtype: torch.dtype) -> bytes:
    wide = any(t is not None and t.dtype != dtype for t in norm[:4])
    facts = [norm.mean is None, norm.weight is not None, wide]
    return np.array(facts, np.int64).tobytes() + np.float64(norm.eps).tobytes()


def _of_training(
    answers: Answers, norm: Norm, dtype: torch.dtype, channels: int, name: str
) -> dict[str, Tensor]:
    """The norm's gradients and its statistics, whose names begin with `name`."""
    got = {}
    if norm.weight is not None and norm.bias is not None:
        gradients = name or "norm_"
        got[f"d_{gradients}weight"] = answers.take(norm.weight)
        got[f"d_{gradients}bias"] = answers.take(norm.bias)
    if norm.mean is None:
        like = torch.empty(channels, dtype=accumulation_dtype(dtype))
        kept = like.to(dtype if norm.weight is None else norm.weight.dtype)
        got |= {f"{name}mean": answers.take(like), f"{name}var": answers.take(like)}
        got |= {f"{name}running_{kind}": answers.take(kept) for kind in ("mean", "var")}
        got[f"{name}batches"] = answers.take(torch.empty(1, dtype=torch.int64))
    return got


def results(
    executable: Path,
    tails: list[Tail],
    *,
    multiprocessors: int = 132,
    aligned: bool = True,
    limits: str = "",
    far: int = 0,
    **environment: str,
) -> list[dict[str, Tensor]]:
    """For each call `out` and every gradient, by name, as of ``Tail.results``; and of a norm in
    training the statistics, "mean" and "var", and a quarter of them, "running_mean" and
    "running_var", and the number of "batches" after 41; the same of the shortcut's norm, beginning
    with "shortcut_". The options are those of ``calls.results``."""
    requests = b"".join(_request(tail, multiprocessors, aligned, limits, far) for tail in tails)
    answers = Answers(executable, requests, **environment)
    everything = []
    for tail in tails:
        names = ["out", "d_u"] + ["d_shortcut"] * (tail.shortcut is not None)
        got = {name: answers.take(tail.u) for name in names}
        about = tail.u.dtype, tail.u.shape[1]
        got |= _of_training(answers, tail.norm, *about, "")
        if tail.shortcut_norm is not None:
            got |= _of_training(answers, tail.shortcut_norm, *about, "shortcut_")
        everything.append(got | answers.parameters(tail.parameters))
    answers.end()
    return everything
