"""A network's training step and its inference as CUDA graphs, which are recorded once and replayed.

A fast GPU is done with a step before Python has launched it. A replay launches the whole of it at
once, and so takes the time that the GPU needs.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from benchmarks import fused, graphs, layer
from benchmarks.graphs import Work
from benchmarks.networks import Trainer
from benchmarks.summary import WHOLE

CAPTURE = 2.0  # seconds that it takes at most to record the graphs of one network: a guess


class Graphs:
    """The graphs of one network. As of a Trainer, each call of `sample` is a number of timed
    training steps, each call of `infer` a number of timed inferences; every replay is of the next
    batch, which is copied to where the graphs read it before the time is taken.

    `cache`: autocast keeps the weights that it has cast for as long as a forward pass takes.
    """

    def __init__(
        self,
        trainer: Trainer,
        record: Callable[[Sequence[Work]], list[Work]] = graphs.record,
        cache: bool = False,
    ) -> None:
        self.trainer = trainer
        self.cache = cache
        self.batches = itertools.cycle(trainer.data)
        self.x, self.labels = (tensor.clone() for tensor in trainer.data[0])
        try:
            self.replay_step, self.replay_inference = record([self.step, self.inference])
        finally:
            trainer.optimizer.zero_grad(set_to_none=True)

    def step(self) -> None:
        """The whole of a training step. Gradients are made anew within it and do not outlast it, so
        that their memory is free for the next graph."""
        trainer = self.trainer
        trainer.network.train()
        trainer.optimizer.zero_grad(set_to_none=True)
        trainer.update(trainer.loss(self.x, self.labels, self.cache))
        trainer.optimizer.zero_grad(set_to_none=True)

    def inference(self) -> None:
        self.trainer.network.eval()
        with torch.no_grad(), self.trainer.autocast(self.cache):
            self.trainer.network(self.x)

    def replayed(self, replay: Work, times: int) -> Sequence[float]:
        """The seconds of so many replays, without those of copying the batches."""
        watch = self.trainer.watch
        marks = []
        for x, labels in itertools.islice(self.batches, times):
            self.x.copy_(x)
            self.labels.copy_(labels)
            marks.append(watch.mark())
            replay()
            marks.append(watch.mark())
        return [sum(watch.seconds(marks)[::2])]

    def sample(self, steps: int) -> Sequence[float]:
        return self.replayed(self.replay_step, steps)

    def infer(self, calls: int) -> Sequence[float]:
        return self.replayed(self.replay_inference, calls)


def recorded(
    trainers: Mapping[str, Trainer], left: float, say: Callable[[str], None]
) -> tuple[dict[str, Graphs], dict[str, dict[str, Any]]]:
    """The graphs of each variant that is not compiled as a whole, and what to tell of those that
    have none. `left`: seconds until the last one must be recorded.

    All graphs share one pool of memory: no two are replayed at once, and none needs what it left
    there, so that together they take what the largest one takes.
    """
    found: dict[str, Graphs] = {}
    without: dict[str, dict[str, Any]] = {}
    chosen = {v: trainer for v, trainer in trainers.items() if not v.startswith(WHOLE)}
    enough = left >= CAPTURE * len(chosen)
    pool = None
    for variant, trainer in chosen.items():
        if why := refused(variant, trainer) or (None if enough else "--seconds are too few"):
            without[variant] = {"status": "left out", "reason": why}
            continue
        say(f"recording, {variant}")
        pool = pool or torch.cuda.graph_pool_handle()
        # torch.compile makes its code for one setting of autocast, and anew where that changes.
        cache = "compile" in variant
        try:
            with fused.under(variant):  # the plan is chosen here
                found[variant] = Graphs(trainer, partial(graphs.record, pool=pool), cache)
        except Exception as error:  # what cannot be recorded
            without[variant] = {"status": "failed", "reason": layer.reason_of_recording(error)}
            pool = None  # the failed recording's is taken
    return found, without


def refused(variant: str, trainer: Trainer) -> str | None:
    """Why a variant is not to be recorded, if it is not."""
    if trainer.scaler.is_enabled():
        return "the loss scaling of float16 waits for the GPU, which a CUDA graph cannot"
    if layer.is_own_graph(variant):
        return "torch.compile has made CUDA graphs of it"
    return None
