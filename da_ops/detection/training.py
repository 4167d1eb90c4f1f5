"""A training run, from the settings to the last checkpoint."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ..backends import select
from .augment import eval_transforms, train_transforms
from .checkpoint import (
    LAST,
    Run,
    build_model,
    check_new,
    check_resumable,
    create_run,
    load,
    save,
    sweep,
)
from .distributed import World, join
from .evaluation import evaluate
from .interrupts import uninterrupted
from .loading import StepSampler, started, training_loader
from .logs import Log
from .optimisation import NotFiniteError, Trainer, parameter_groups, stepwise
from .settings import Settings
from .voc import VOCDetection, available_splits, read_classes

logger = logging.getLogger("da_ops")

TRAIN_SPLITS = (("2007", "trainval"), ("2012", "trainval"))


def train(
    data: Path,
    out: Path,
    settings: Settings,
    *,
    resume: bool = False,
    workers: int = 0,
    eval_every: int = 0,
    checkpoint_every: int = 1000,
) -> None:
    """Train a detector on a VOC tree, alone or as one of torchrun's processes.

    The same settings and data give the same weights and the same ``train.csv``, bitwise on one
    CPU, however often the run was killed and resumed.

    Args:
        data: folder with ``VOC2007`` and perhaps ``VOC2012`` in it. The trainval parts that are
            there are for training, the test part of 2007 is for evaluation.
        out: folder of the run, new unless ``resume``. It gets ``config.json``, ``last.pt`` (the
            newest checkpoint), ``train.csv``, ``eval.csv`` and ``tensorboard/``.
        workers: processes that load images, for each process that trains.
        eval_every, checkpoint_every: steps. A checkpoint is also written after the last step, and
            nothing is evaluated if ``eval_every`` is 0.

    Raises:
        FileExistsError: ``out`` holds something, and not ``resume``.
        ValueError: ``resume``, with other settings or data than the run was started with; settings,
            weights or data that cannot make a run. Nothing is written then.
        RuntimeError: the settings' backend cannot serve here. Nothing is written then, either.
        NotFiniteError: the loss is not finite; ``last.pt``, if it is there, is as it was.
    """
    for name, steps in (("eval_every", eval_every), ("checkpoint_every", checkpoint_every)):
        if steps < 0:
            raise ValueError(f"{name}: expected a number of steps, 0 for never, got {steps}")
    with join() as world:
        check_servable(settings, world)
        classes = read_classes(data)
        dataset = training_set(data, classes, settings)
        tested_on = None
        if eval_every:
            tested_on = evaluation_set(data, classes, skip_bad=settings.skip_bad)
        run = Run(settings, tuple(classes), len(dataset))
        if resume:
            check_resumable(out, run)
        else:
            check_new(out)
        trainer = make_trainer(settings, classes, world)
        if resume and (out / LAST).exists():
            trainer.load_state_dict(load(out / LAST))
        sampler = StepSampler(
            len(dataset),
            settings.batch_size,
            trainer.step,
            settings.steps,
            seed=settings.seed,
            rank=world.rank,
            world_size=world.size,
        )
        loader = training_loader(dataset, sampler, workers, world.device.type == "cuda")
        world.gather(None)  # all have looked at the folder before the first one writes to it
        if world.first and resume:
            sweep(out)
        elif world.first:
            create_run(out, run)
        batches = started(loader)
        with Recorder(out, run, trainer) as recorder:
            for batch in batches:
                try:
                    values = trainer.update(batch)
                except NotFiniteError as error:
                    raise NotFiniteError(f"{error}. {kept(out)}") from error
                recorder.step(values)
                last = trainer.step == settings.steps
                if eval_every and (last or trainer.step % eval_every == 0):
                    with trainer.autocast():
                        found = evaluate(
                            trainer.model, tested_on, classes, world, batch_size=sampler.share,
                            workers=workers, progress=True,
                        )  # fmt: skip
                    recorder.evaluation(found)
                if last or (checkpoint_every and trainer.step % checkpoint_every == 0):
                    recorder.checkpoint()


def kept(out: Path) -> str:
    """What a run that stopped has left, and what its folder is good for."""
    last = out / LAST
    there = f"{last} is as it was" if last.exists() else f"no checkpoint is in {out} yet"
    return f"Nothing was written: {there}. Other settings need another --out, or this one emptied"


def check_servable(settings: Settings, world: World) -> None:
    """RuntimeError or ValueError where the first step would fail, whatever the data are."""
    if settings.attention == "da":
        select(settings.backend, world.device.type)
    smallest = -(-settings.size // (32 if settings.mapping == "c3c4c5" else 8))  # map of a block
    if settings.attention == "fca" and smallest < 7:
        raise ValueError(
            f"size: expected maps of at least 7 x 7 in every block with attention fca, got "
            f"{smallest} x {smallest} from images of {settings.size} pixels; train on larger ones"
        )
    norms_see_all = world.size > 1 and world.device.type == "cuda"
    share = settings.batch_size // world.size
    one_cell = settings.mapping == "c3c4c5" and settings.size <= 32  # in the maps of layer4
    if one_cell and share == 1 and not norms_see_all:
        raise ValueError(
            "batch_size: expected at least 2 images for each process with mapping c3c4c5 at 32"
            " pixels, where layer4 has one cell, and one value has no variance for its batch norms;"
            f" got {settings.batch_size} for {world.size}"
        )


def make_trainer(settings: Settings, classes: Sequence[str], world: World) -> Trainer:
    """The trainer at step 0, on the world's device."""
    layout = torch.channels_last if settings.channels_last else torch.contiguous_format
    model = build_model(settings, classes).to(world.device, memory_format=layout)
    optimizer = torch.optim.SGD(
        parameter_groups(model, settings.weight_decay), settings.lr, settings.momentum
    )
    return Trainer(
        model,
        optimizer,
        stepwise(settings),
        world,
        amp=settings.amp,
        clip_norm=settings.clip_norm,
    )


class Recorder:
    """The progress and the logs of a run, from the first process alone; others do nothing."""

    @uninterrupted()
    def __init__(self, folder: Path, run: Run, trainer: Trainer) -> None:
        self.folder, self.run, self.trainer = folder, run, trainer
        self.first = trainer.world.first
        if self.first:
            self.log = Log(folder, trainer.step)
            self.bar = tqdm(
                total=run.settings.steps,
                initial=trainer.step,
                unit="step",
                dynamic_ncols=True,
                mininterval=0.1 if sys.stderr.isatty() else 10,
            )
            self.clock = time.perf_counter()

    @uninterrupted()
    def step(self, values: dict[str, float]) -> None:
        if not self.first:
            return
        before, self.clock = self.clock, time.perf_counter()
        speed = self.run.settings.batch_size / (self.clock - before)
        self.log.add("train", self.trainer.step, values, images_per_second=speed)
        self.bar.set_postfix(loss=f"{values['loss']:.3f}", refresh=False)
        self.bar.update()

    @uninterrupted()
    def evaluation(self, found: dict[str, Any]) -> None:
        if self.first:
            self.log.add("eval", self.trainer.step, found)
            self.bar.write(
                f"step {self.trainer.step}: mAP {100 * found['map_11']:.1f} (11 points),"
                f" {100 * found['map']:.1f} (all points)"
            )

    @uninterrupted()
    def checkpoint(self) -> None:
        if self.first:
            self.log.sync()
            save(self.folder / LAST, self.trainer.state_dict(), self.run)

    def __enter__(self) -> Recorder:
        return self

    @uninterrupted()
    def __exit__(self, *error: object) -> None:
        if self.first:
            self.bar.close()
            self.log.close()


def training_set(data: Path, classes: Sequence[str], settings: Settings) -> VOCDetection:
    """The training parts that are there, augmented; ValueError if there is no object in them."""
    there = set(available_splits(data))
    splits = [split for split in TRAIN_SPLITS if split in there]
    if not splits:
        raise FileNotFoundError(
            f"{data}: expected the split 2007 trainval or 2012 trainval, got"
            f" {', '.join(map(' '.join, sorted(there))) or 'none'}; give the folder of VOC's tree"
        )
    dataset = VOCDetection(
        data,
        splits,
        classes=classes,
        transforms=train_transforms(settings.size, settings.augmentation),
        skip_bad=settings.skip_bad,
    )
    objects = sum(dataset.counts().values())
    told = " and ".join(map(" ".join, splits))
    if not objects:
        raise ValueError(
            f"{data}: expected objects to learn from, got {len(dataset)} images in {told} without"
            " a single box; look at their Annotations"
        )
    logger.info("da_ops: training on %s: %d images, %d objects", told, len(dataset), objects)
    return dataset


def evaluation_set(
    data: Path, classes: Sequence[str], *, split: str = "test", skip_bad: bool = False
) -> VOCDetection:
    """A part of VOC2007 as it is; ValueError if there is no object in it to be found."""
    dataset = VOCDetection(
        data, [("2007", split)], classes=classes, transforms=eval_transforms(), skip_bad=skip_bad
    )
    if all(a.difficult.all() for a in dataset.annotations.values()):
        raise ValueError(
            f"{data}: expected objects to be found in 2007 {split}, got {len(dataset)} images"
            " without a box that is not difficult: average precision has no meaning there"
        )
    return dataset
