"""What tries plans out: first whether each is right, then how fast.

A process of its own reads a :class:`Job` from its input and prints a line of JSON for each thing
that it is about to do or has found, so that whoever reads knows which plan it hangs on. It ends
with the first plan that fails, for nothing that a process does after that is to be believed.
"""

from __future__ import annotations

import json
import math
import random
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from .. import accuracy
from ..backends import BACKENDS, native
from ..backends.base import Call
from ..backends.tuned import OTHERS, PLANS, key
from ..module import DAModule
from ..parameters import Parameters
from .candidates import DEFAULT
from .verdict import finalists

_FIRST_ROUNDS = (3, 10)  # at least, at most
_ROUNDS = (12, 60)  # of the finalists
_SAMPLE = 1e-3  # seconds of calls
_COLD = 4  # caches' worth of input, which calls take in turn
_INPUTS = 256  # at most
_CHUNK = 2**20  # elements of x that are checked at a time
_KEPT = 2**25  # elements whose exact results are kept from one check to the next

Say = Callable[..., None]


@dataclass(frozen=True)
class Job:
    """One direction of a call, and the plans to try."""

    backend: str
    shape: tuple[int, int, int, int]
    dtype: str
    channels_last: bool
    order: str
    gate: str
    backward: bool
    device: str
    threads: int
    seconds: float  # of timing
    unchecked: list[str]  # plans
    right: list[str]  # plans that need no check any more

    @classmethod
    def of(
        cls, call: Call, device: torch.device, backward: bool, seconds: float, plans: list[str]
    ) -> Job:
        return cls(
            backend=device.type,
            shape=call.shape,  # type: ignore[arg-type]
            dtype=call.dtype_name,
            channels_last=call.channels_last,
            order=call.order,
            gate=call.gate,
            backward=backward,
            device=str(device),
            threads=torch.get_num_threads(),
            seconds=seconds,
            unchecked=plans,
            right=[],
        )

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @property
    def call(self) -> Call:
        dtype = getattr(torch, self.dtype)
        return Call(tuple(self.shape), dtype, self.channels_last, self.order, self.gate)


class Subject(Protocol):
    """What runs under a plan: the kernels, or what a test puts in their place."""

    def check(self, plan: str, beat: Callable[[], None]) -> str | None:
        """Why the plan's results are wrong; None if they are right. Calls ``beat`` meanwhile."""

    def sample(self, plan: str) -> float:
        """Seconds that a call takes."""


def serve(subject: Subject, job: Job, say: Say) -> None:
    """Check and time the job's plans."""
    trying = DEFAULT
    try:
        for trying in job.unchecked:
            say(trying=trying)
            if why := subject.check(trying, lambda: say()):
                return say(left_out=trying, why=f"wrong: {why}")
            say(right=trying)
        plans = [*job.right, *job.unchecked]
        rounds: list[dict[str, float]] = []
        for trying, measured in _rounds(subject, plans, job.seconds / 3, *_FIRST_ROUNDS):
            say(trying=trying, first=measured)
            rounds += [measured] if measured else []
        plans = [DEFAULT, *finalists(rounds)]
        for trying, measured in _rounds(subject, plans, 2 * job.seconds / 3, *_ROUNDS):
            say(trying=trying, final=measured)
    except Exception as error:
        first_line = str(error).strip().partition("\n")[0]
        return say(left_out=trying, why=f"failed: {first_line or type(error).__name__}")
    say(done=True)


def _rounds(
    subject: Subject, plans: list[str], seconds: float, least: int, most: int
) -> Iterator[tuple[str, dict[str, float] | None]]:
    """Each plan before it is timed; with a round's last, which is not timed again, its times."""
    shuffled, mixer = list(plans), random.Random(0)
    start = time.monotonic()
    for done in range(most):
        if done >= least and time.monotonic() - start > seconds:
            return
        mixer.shuffle(shuffled)
        times = {}
        for plan in shuffled:
            yield plan, None
            times[plan] = subject.sample(plan)
        yield shuffled[-1], {plan: times[plan] for plan in plans}


class Kernels:
    """One direction of a backend, over inputs that no cache holds all of.

    It leaves the library with the plan that was tried last, and random numbers as they were.
    """

    def __init__(self, job: Job) -> None:
        if job.backend == "cpu":
            torch.set_num_threads(job.threads)
        else:
            torch.cuda.set_device(job.device)
        self.job, call = job, job.call
        self.key = key(job.backend, call, job.backward)
        self.backend: Any = native  # or that of a plan
        with torch.device("meta"):
            layer = DAModule(call.shape[1], order=call.order, gate=call.gate, bias=True)
        generator = torch.Generator(job.device).manual_seed(0)
        layer = layer.to_empty(device=job.device)
        _randomise(layer, generator)
        self.parameters = _parameters(layer.to(call.dtype))
        tensors = 2 if job.backward else 1
        self.inputs = _inputs(call, tensors, _cache_bytes(job.backend), generator)
        self.maps = [self._forward(x)[1:] for x, *_ in self.inputs] if job.backward else []
        self.next = 0
        self.calls = 0  # of a sample; not yet known
        self.ready: set[str] = set()  # plans
        # A function: the cache of a method would keep this object and its tensors for a while.
        exact = partial(_exact, job, self.parameters, self.inputs[0])
        self.exact = lru_cache(math.ceil(_KEPT / _CHUNK))(exact)
        self.default: dict[str, Tensor] = {}

    def check(self, plan: str, beat: Callable[[], None]) -> str | None:
        self._try_out(plan)
        results = self._results(0)
        self._wait()
        if plan == DEFAULT:
            self.default = results
        elif self.default and all(
            torch.equal(result, self.default[name]) for name, result in results.items()
        ):
            return None
        return "; ".join(self._broken(results, beat)) or None

    def _try_out(self, plan: str) -> None:
        other = plan in OTHERS
        PLANS.try_out(self.key, DEFAULT if other else plan)
        self.backend = BACKENDS[plan] if other else native

    def sample(self, plan: str) -> float:
        self._try_out(plan)
        if plan not in self.ready:  # its first call plans, and loads kernels
            self._seconds(1)
            self.ready.add(plan)
        if not self.calls:
            self.calls = min(_INPUTS, math.ceil(_SAMPLE / max(self._seconds(2), 1e-7)))
        return self._seconds(self.calls)

    def _seconds(self, calls: int) -> float:
        self._wait()
        if self.job.backend == "cpu":
            start = time.perf_counter()
            for _ in range(calls):
                self._run(self._turn())
            return (time.perf_counter() - start) / calls
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(calls):
            self._run(self._turn())
        end.record()
        self._wait()
        return float(begin.elapsed_time(end)) / 1e3 / calls

    def _turn(self) -> int:
        self.next = (self.next + 1) % len(self.inputs)
        return self.next

    def _wait(self) -> None:
        if self.job.backend == "cuda":
            torch.cuda.synchronize()

    def _run(self, i: int) -> tuple[Tensor | None, ...]:
        if not self.job.backward:
            return self._forward(*self.inputs[i])
        x, dy = self.inputs[i]
        options = self.job.order, self.job.gate
        return tuple(self.backend.backward(dy, x, self.parameters, *self.maps[i], *options))

    def _forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.backend.forward(x, self.parameters, self.job.order, self.job.gate))

    def _results(self, i: int) -> dict[str, Tensor]:
        """By the names of :mod:`da_ops.accuracy`."""
        results = self._run(i)
        names = ("dx", *(f"d_{name}" for name in Parameters._fields))
        named = zip(names, results, strict=True) if self.job.backward else [("y", results[0])]
        return {name: result for name, result in named if result is not None}

    def _broken(self, results: dict[str, Tensor], beat: Callable[[], None]) -> list[str]:
        """What the results break of the promise. Images are taken a few at a time, since exact
        results take many times the memory; gradients of parameters are sums over all of them."""
        shared = {name: result for name, result in results.items() if name.startswith("d_")}
        of_images = {name: result for name, result in results.items() if name not in shared}
        draws = []
        sums: dict[str, accuracy.Exact] = {}
        step = _images(self.job)
        for begin in range(0, self.job.shape[0], step):
            beat()
            images = slice(begin, begin + step)
            exact = self.exact(begin)
            draws.append(accuracy.errors({k: v[images] for k, v in of_images.items()}, exact))
            for name in shared:
                one, before = exact[name], sums.get(name)
                sums[name] = one if before is None else _added(before, one)
        return accuracy.broken(draws) + accuracy.broken([accuracy.errors(shared, sums)])


def _images(job: Job) -> int:
    """How many are checked at a time."""
    return max(1, _CHUNK // math.prod(job.shape[1:]))


def _exact(
    job: Job, parameters: Parameters, inputs: tuple[Tensor, ...], begin: int
) -> dict[str, accuracy.Exact]:
    """What the results for a few images are measured by."""
    x, *dy = (t[begin : begin + _images(job)] for t in inputs)
    given = dy[0] if dy else torch.ones_like(x)
    return accuracy.exact(given, x, *parameters, order=job.order, gate=job.gate)


def _added(a: accuracy.Exact, b: accuracy.Exact) -> accuracy.Exact:
    return accuracy.Exact(a.value + b.value, a.terms + b.terms, a.is_sum)


def _randomise(layer: DAModule, generator: torch.Generator) -> None:
    """Parameters with which both masks differ from place to place."""
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(0.2, 0.3, generator=generator)


def _parameters(layer: DAModule) -> Parameters:
    convolutions = layer.conv, layer.dilated_conv, layer.merge
    conv, dilated, merge = (None if c is None else c.weight.detach() for c in convolutions)
    bias = None if layer.merge is None or layer.merge.bias is None else layer.merge.bias.detach()
    gate, gate_bias = (
        None if p is None else p.detach() for p in (layer.gate_weight, layer.gate_bias)
    )
    return Parameters(conv, dilated, merge, bias, gate, gate_bias)


def _inputs(
    call: Call, tensors: int, cache_bytes: int, generator: torch.Generator
) -> list[tuple[Tensor, ...]]:
    """Several times what x, or x and dy, are, side by side in memory: together more than a cache
    holds, or as many as may be."""
    layout = torch.channels_last if call.channels_last else torch.contiguous_format
    several = math.ceil(_COLD * cache_bytes / max(1, tensors * call.bytes))
    return [
        tuple(
            torch.randn(
                call.shape, generator=generator, device=generator.device, dtype=torch.float32
            )
            .add_(0.5)
            .to(call.dtype)
            .contiguous(memory_format=layout)
            for _ in range(tensors)
        )
        for _ in range(min(max(2, several), _INPUTS))
    ]


def _cache_bytes(backend: str) -> int:
    if backend == "cuda":
        return int(torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size)
    try:
        told = Path("/sys/devices/system/cpu/cpu0/cache/index3/size").read_text()
        return int(told.strip().removesuffix("K")) * 1024
    except (OSError, ValueError):
        return 32 * 2**20


def read_job() -> Job:
    """The job that was written to this process."""
    return Job(**json.loads(sys.stdin.readline()))


def say(**facts: Any) -> None:
    """Print a line for the process that reads."""
    sys.__stdout__.write(json.dumps(facts) + "\n")  # type: ignore[union-attr]
    sys.__stdout__.flush()  # type: ignore[union-attr]


def main() -> None:
    """Serve the job that comes in."""
    job = read_job()
    say()
    serve(Kernels(job), job, say)
