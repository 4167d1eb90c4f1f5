"""Which images make up a step, and how each is augmented: functions of seed and step alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from .interrupts import uninterrupted
from .voc import collate

Key = tuple[int, int]  # epoch, index into the data set


class StepSampler(Sampler[list[Key]]):
    """The keys of each step's images from step ``start`` on, of one process's share.

    The data set is gone through in a new random order each epoch, and steps follow each other
    without regard to where one ends: every step has ``batch_size`` images. Nothing is remembered
    from step to step, so a run that is resumed goes on with the images that it would have had.

    Args:
        length: of the data set.
        batch_size: images per step, over all processes.
        start, stop: the first step, and the one after the last.
        rank, world_size: which share of each step.
    """

    def __init__(
        self,
        length: int,
        batch_size: int,
        start: int,
        stop: int,
        *,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if length < 1:
            raise ValueError("training set: expected at least one image, got none")
        if batch_size % world_size:
            raise ValueError(
                f"batch_size: expected a multiple of the {world_size} processes, got {batch_size}"
            )
        self.length, self.batch_size, self.start, self.stop = length, batch_size, start, stop
        self.seed, self.rank, self.share = seed, rank, batch_size // world_size

    def __len__(self) -> int:
        return self.stop - self.start

    def __iter__(self) -> Iterator[list[Key]]:
        epoch, order = -1, torch.empty(0)
        for step in range(self.start, self.stop):
            first = step * self.batch_size + self.rank * self.share
            keys = []
            for position in range(first, first + self.share):
                if position // self.length != epoch:
                    epoch = position // self.length
                    draw = torch.Generator().manual_seed(mixed(self.seed, epoch))
                    order = torch.randperm(self.length, generator=draw)
                keys.append((epoch, int(order[position % self.length])))
            yield keys


class Seeded(Dataset[Any]):
    """A data set whose item ``[epoch, index]`` depends on (seed, epoch, index) alone: random
    transforms are drawn anew for each item, whichever process or worker asks."""

    def __init__(self, dataset: Any, seed: int) -> None:
        self.dataset, self.seed = dataset, seed

    def __getitem__(self, key: Key) -> Any:
        epoch, index = key
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(mixed(self.seed, epoch, index))
            return self.dataset[index]


def mixed(*numbers: int) -> int:
    """One seed from several numbers, far from that of their neighbours."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


def training_loader(dataset: Any, sampler: StepSampler, workers: int, cuda: bool) -> DataLoader:
    """Batches of the sampler's steps, decoded and augmented by so many worker processes."""
    return DataLoader(
        Seeded(dataset, sampler.seed),
        batch_sampler=sampler,
        num_workers=workers,
        collate_fn=collate,
        pin_memory=cuda,
    )


def started(loader: DataLoader) -> Iterator[Any]:
    """The loader's batches, by workers that Ctrl-C does not reach, each handed over whole.

    Keep the iterator in a variable: when it is let go it waits for its workers to end.
    """
    with uninterrupted():
        batches = iter(loader)
    return _whole(batches)


def _whole(batches: Iterator[Any]) -> Iterator[Any]:
    end = object()
    while True:
        with uninterrupted():  # or the worker would complain that nobody takes what it hands over
            batch = next(batches, end)
        if batch is end:
            return
        yield batch
