"""Tuning at the first call of a kind, where ``torch.backends.cudnn.benchmark`` asks for it.

The CUDA library tells of a call that it plans for the first time on a thread. So calls that were
planned before pay nothing, and calls that reach no library tell of nothing: traced ones, those on
fake tensors, those under transforms. What is found serves this process alone, as with cuDNN.

Plans are tried in this process: another would take seconds to start, and GPU memory. A plan that
hangs would therefore be the end, and only those take part whose blocks do not wait for one another
(the portable launches, one block an image), and those that :func:`da_ops.tune` chose for other
calls on this GPU. A thread of its own does the work, on which nothing is in force that the caller
has set: autocast, modes, streams.
"""

from __future__ import annotations

import logging
import threading
from dataclasses import replace

import torch
from torch import Tensor

from ..backends.base import Call
from ..backends.tuned import PLANS, Key, key
from ..reference import GATES, ORDERS
from . import supervise, trial
from .candidates import UNCONNECTED, possible_plans
from .found import decided
from .trial import Job

logger = logging.getLogger("da_ops")

SECONDS = 1 / 3  # of timing

_library = torch.library.Library("da_ops", "IMPL", "CUDA")
_told: set[Key] = set()
_lock = threading.Lock()
_here = threading.local()  # of this thread: `measuring`


def listen() -> None:
    """Have the CUDA library tell of first calls."""
    _library.impl("_cuda_first_call", first_call)


def first_call(x: Tensor, order: int, gate: int, backward: bool) -> None:
    """Measure the plans of a call that is about to be made, unless that was done before."""
    if not _wanted() or x.numel() == 0 or getattr(_here, "measuring", False):
        return
    call = Call(tuple(x.shape), x.dtype, not x.is_contiguous(), ORDERS[order], GATES[gate])
    of = key("cuda", call, backward, x.device)
    with _lock:  # others wait: they would run by whichever plan is being tried
        if of not in _told and of not in PLANS.in_force():
            _told.add(of)
            thread = threading.Thread(target=_measure, args=(of, call, x.device))
            thread.start()
            thread.join()


def _wanted() -> bool:
    """Whether the user leaves the choice to the clock, which no graph can capture."""
    return (
        torch.backends.cudnn.benchmark
        and not torch.backends.cudnn.deterministic
        and not torch.are_deterministic_algorithms_enabled()
        and not torch.cuda.is_current_stream_capturing()
    )


def _measure(of: Key, call: Call, device: torch.device) -> None:
    _here.measuring = True
    try:
        plans = _trusted(possible_plans("cuda", call, of.backward, device), of)
        if len(plans) > 1:
            job = Job.of(call, device, of.backward, SECONDS, plans)
            found = decided(of, supervise.in_this_process(job, trial.Kernels(job)))
            PLANS.put(of, replace(found.winner, at_first_call=True))
            logger.info("da_ops: torch.backends.cudnn.benchmark: %s", found)
    except Exception as error:  # such as no memory left: never worth a training run
        PLANS.try_out(of, "")
        first_line = str(error).strip().partition("\n")[0]
        logger.warning(
            "da_ops: torch.backends.cudnn.benchmark: the default plan runs the %s of %s, others "
            "could not be measured: %s",
            *(of.direction, "x".join(map(str, of.shape)), first_line or type(error).__name__),
        )
    torch.cuda.empty_cache()  # as PyTorch does after cuDNN's benchmark: the rest needs the memory


def _trusted(plans: list[str], of: Key) -> list[str]:
    """Those that cannot hang, or have shown on this GPU that they do not."""
    shown = {
        tuned.plan
        for k, tuned in PLANS.in_force().items()
        if (k.device, k.library) == (of.device, of.library) and not tuned.at_first_call
    }
    return [plan for plan in plans if plan in UNCONNECTED or plan in shown]
