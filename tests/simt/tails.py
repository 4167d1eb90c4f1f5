"""Hands calls of the residual tail to the CUDA kernels' executable, and takes their results."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from da_ops.reference import accumulation_dtype

from ..tails import Tail
from .calls import Answers, begin_request, memory_format, raw


def _request(tail: Tail, multiprocessors: int, aligned: bool, limits: str, far: int) -> bytes:
    plan = ",".join(filter(None, ("portable", limits)))
    begin, parameters = begin_request(
        tail.u, tail.parameters, tail.order, tail.gate, multiprocessors, aligned, plan, far=far
    )
    weight, bias, mean, var, eps = tail.norm
    given = [t for t in (weight, bias, mean, var) if t is not None]
    wide = any(t.dtype != tail.u.dtype for t in given)
    facts = [mean is None, weight is not None, wide, tail.shortcut is not None]
    of_norm = np.array(facts, np.int64).tobytes()
    of_norm += np.float64(eps).tobytes()
    like = memory_format(tail.u)
    others = [t for t in (tail.shortcut, tail.dout) if t is not None]
    full = (t.contiguous(memory_format=like) for t in others)
    return b"".join([begin, of_norm, parameters, *map(raw, given), raw(tail.u), *map(raw, full)])


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
    "running_var", and the number of "batches" after 41. The options are those of
    ``calls.results``."""
    requests = b"".join(_request(tail, multiprocessors, aligned, limits, far) for tail in tails)
    answers = Answers(executable, requests, **environment)
    everything = []
    for tail in tails:
        names = ["out", "d_u"] + ["d_shortcut"] * (tail.shortcut is not None)
        got = {name: answers.take(tail.u) for name in names}
        if tail.norm.weight is not None and tail.norm.bias is not None:
            got["d_norm_weight"] = answers.take(tail.norm.weight)
            got["d_norm_bias"] = answers.take(tail.norm.bias)
        if tail.norm.mean is None:
            like = torch.empty(tail.u.shape[1], dtype=accumulation_dtype(tail.u.dtype))
            got |= {"mean": answers.take(like), "var": answers.take(like)}
            kept = like.to(tail.u.dtype if tail.norm.weight is None else tail.norm.weight.dtype)
            got |= {"running_mean": answers.take(kept), "running_var": answers.take(kept)}
            got["batches"] = answers.take(torch.empty(1, dtype=torch.int64))
        everything.append(got | answers.parameters(tail.parameters))
    answers.end()
    return everything
