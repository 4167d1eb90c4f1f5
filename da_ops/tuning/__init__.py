"""Plans that measure themselves: the fastest that is right, on the machine that will use it.

:mod:`.candidates` says which plans are possible, :mod:`.trial` checks and times them in a process
that :mod:`.supervise` watches, :mod:`.verdict` decides, and :mod:`da_ops.backends.tuned` keeps what
was found and has the compiled operators use it. :mod:`.first_call` does so with a few plans at a
call's first time, for ``torch.backends.cudnn.benchmark``.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ..accuracy import PROMISED
from ..backends import backends, select
from ..backends.base import Call
from ..backends.tuned import ENVIRONMENT, PLANS, file, key
from ..checks import check_options, positive_int
from . import first_call, supervise
from .candidates import possible_plans
from .found import Direction, decided
from .trial import Job

first_call.listen()


@dataclass(frozen=True)
class Tuning:
    """The answer of :func:`tune`; ``str()`` for people, ``to_dict()`` for programs."""

    directions: tuple[Direction, ...]
    saved: str | None  # the file that keeps the plans; None where this process alone has them

    def to_dict(self) -> dict[str, Any]:
        return {"saved": self.saved, "directions": [d.to_dict() for d in self.directions]}

    def __str__(self) -> str:
        return "\n\n".join([*map(str, self.directions), kept(self.saved)])


def kept(saved: str | None) -> str:
    """What becomes of the plans, in words."""
    return f"kept in {saved}" if saved else "kept in no file: they serve this process alone"


def tune(
    what: nn.Module | Sequence[int],
    *inputs: Any,
    dtype: torch.dtype = torch.float32,
    memory_format: torch.memory_format = torch.contiguous_format,
    device: torch.device | str = "cpu",
    order: str = "spatial_channel",
    gate: str = "affine",
    backward: bool = True,
    seconds: float = 10.0,
    save: bool = True,
    told: Callable[[Direction], object] | None = None,
) -> Tuning:
    """Time every plan that there is for a call of the compiled kernels, here and now; keep the
    fastest.

    Args:
        what: a network or layer, which is run once on ``inputs``, in evaluation mode and without
            gradients, for the calls in it, on a CPU those of fused tails, too, which run by the
            plans of their layer's call; or the shape ``[N, C, H, W]`` of one call.
        inputs: what the network takes.
        dtype, memory_format, device, order, gate: of the one call, as for
            :func:`da_ops.da_attention`; a network has its own.
        backward: tune the backward pass too.
        seconds: of timing, for each direction of each call.
        save: keep what was found on disk; else it serves this process alone.
        told: is given each direction once it is done.

    On a GPU the plans are those that ``DA_OPS_PLAN`` names and Triton's kernels, on the CPU slab
    sizes, streaming stores and how rows are taken (``DA_OPS_CPU_PLAN``). They are tried on random
    numbers in a process of its own, one that hangs for a minute or fails costs nothing but itself.
    First each plan's results must be as near to the exact ones as :mod:`da_ops.accuracy` promises.
    Then all take part in every round, over inputs that no cache holds. A plan takes the default's
    place where it is faster by more than the noise: the 99% interval of its median ratio, from
    rounds that did not choose it, must lie below 0.98.

    What was found serves calls of exactly this kind (shape, dtype, layout, order, gate, direction;
    on the CPU also the number of threads) from now on, also in graphs that are compiled, and in
    later processes, until device, driver or library change. ``DA_OPS_PLAN``, ``DA_OPS_CPU_PLAN``
    and ``DA_OPS_BACKEND`` win over it. Calls that Triton won go to it from backend "auto"; in a
    graph that is compiled after that, those for one shape of which it won both directions, or
    backward alone. Another plan may add numbers in another order: the results are as accurate, and
    bitwise equal from run to run, but not always those of the default plan to the last bit.

    ``torch.backends.cudnn.benchmark`` has a GPU's calls tuned when they are first made, by a few
    plans, for this process alone: see :mod:`.first_call`.

    Returns:
        a ``Tuning``: ``directions`` has what was found, ``saved`` the file that keeps it; ``str()``
        is for people, ``to_dict()`` for programs.

    Raises:
        ValueError: ``what`` is neither, options are unknown, or the network makes no call of the
            compiled kernels.
        RuntimeError: the compiled kernels cannot serve the device; an environment variable has
            chosen the plan already; or the default plan itself fails.
    """
    if not seconds >= 0:  # nor nan
        raise ValueError(f"da_ops.tune: seconds must be at least 0, got {seconds}")
    if isinstance(what, nn.Module):
        calls = _calls(what, inputs)
    else:
        calls = [(_call(what, dtype, memory_format, order, gate), _device(device))]
    found = []
    for call, on in calls:
        for is_backward in (False, True)[: 1 + backward]:
            direction = _tune(call, on, is_backward, seconds)
            PLANS.put(direction.key, direction.winner)
            found.append(direction)
            if told is not None:
                told(direction)
    saved = save and PLANS.save()
    return Tuning(tuple(found), str(file()) if saved else None)


def forget() -> None:
    """Take every tuned plan out of use, in this process and on disk.

    Raises:
        OSError: the file is there, and cannot be deleted.
    """
    PLANS.forget()


def _tune(call: Call, device: torch.device, backward: bool, seconds: float) -> Direction:
    backend = device.type
    if backend not in ENVIRONMENT:
        raise _no_device(device)
    if (reason := backends()[backend]) is not None:
        raise RuntimeError(f"da_ops.tune: backend {backend!r} cannot serve: {reason}")
    if backend == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    variable = ENVIRONMENT[backend]
    if os.environ.get(variable):
        raise RuntimeError(
            f"da_ops.tune: {variable}={os.environ[variable]} has chosen the plan of every call; "
            "unset it to use what is measured"
        )
    plans = possible_plans(backend, call, backward, device)
    outcome = supervise.supervise(Job.of(call, device, backward, seconds, plans))
    return decided(key(backend, call, backward, device), outcome)


def _device(device: torch.device | str) -> torch.device:
    """The device; ValueError where torch knows none of this name."""
    try:
        return torch.device(device)
    except RuntimeError:
        raise _no_device(device) from None


def _no_device(device: torch.device | str) -> ValueError:
    return ValueError(f"da_ops.tune: device must be 'cpu' or 'cuda', got {str(device)!r}")


def _call(
    shape: Sequence[int], dtype: torch.dtype, layout: torch.memory_format, order: str, gate: str
) -> Call:
    """The one call that is asked for.

    Raises:
        ValueError: there is no such call.
    """
    check_options(order, gate)
    if not isinstance(shape, Sequence) or isinstance(shape, str) or len(shape) != 4:
        got = f"a tensor of {list(shape.shape)}" if isinstance(shape, Tensor) else repr(shape)
        raise ValueError(f"da_ops.tune: expected a module, or a shape [N, C, H, W]; got {got}")
    if dtype not in PROMISED:
        known = ", ".join(str(each).removeprefix("torch.") for each in PROMISED)
        raise ValueError(f"da_ops.tune: dtype must be one of {known}; got {dtype}")
    sizes = tuple(positive_int("da_ops.tune: each of N, C, H and W", size) for size in shape)
    x = torch.empty(sizes, dtype=dtype, device="meta").contiguous(memory_format=layout)
    return _described(x, order, gate)


def _described(x: Tensor, order: str, gate: str) -> Call:
    return Call(tuple(x.shape), x.dtype, not x.is_contiguous(), order, gate)


_TAILS = ("residual_forward", "residual_forward_", "residual_training")


class _Recorder(TorchDispatchMode):
    """Writes down the calls of the compiled kernels, each kind once; also those that an earlier
    tuning left to Triton."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[tuple[Call, torch.device], None] = {}

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        library, _, name = function.name().partition("::")
        if library == "da_ops":
            names = (argument.name for argument in function._schema.arguments)
            self._note(name, args[0], dict(zip(names, args, strict=False)))
        return function(*args, **(kwargs or {}))

    def _note(self, operator: str, x: Tensor, given: dict[str, Any]) -> None:
        device = x.device
        tuned = operator == "forward"
        if operator == "triton_forward":
            tuned = select("auto", device.type) != "triton"
        elif operator in _TAILS:  # which run by the layer's plans, but on a GPU by their own
            tuned = device.type == "cpu" and given["order"] != "none"
        if tuned and x.numel():
            self.calls[_described(x, given["order"], given["gate"]), device] = None


def _calls(network: nn.Module, inputs: tuple[Any, ...]) -> list[tuple[Call, torch.device]]:
    """The calls of a network's forward pass, which leaves it as it was.

    Raises:
        ValueError: it makes none, or there is nothing to run it on.
    """
    if not inputs:
        raise ValueError("da_ops.tune: a module needs its inputs, as in tune(model, x); got none")
    modes = [(module, module.training) for module in network.modules()]
    recorder = _Recorder()
    try:
        network.eval()
        with torch.no_grad(), recorder:
            network(*inputs)
    finally:
        for module, training in modes:
            module.training = training
    if not recorder.calls:
        raise ValueError(
            "da_ops.tune: the module made no call that is tuned: of the layer's compiled kernels, "
            "or on a CPU of a fused tail's with attention; "
            "da_ops.explain(x, layer=...) says which backend serves a layer, and why"
        )
    return list(recorder.calls)
