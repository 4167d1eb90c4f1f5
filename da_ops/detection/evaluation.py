"""How well a detector finds the objects of a data set."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

from .distributed import World
from .loading import started
from .metric import VOCEvaluator
from .vision import SSD
from .voc import collate


@torch.no_grad()
def evaluate(
    model: SSD,
    dataset: Any,
    classes: Sequence[str],
    world: World,
    *,
    batch_size: int = 32,
    workers: int = 0,
    plus_one: bool = False,
    progress: bool = False,
) -> dict[str, Any]:
    """Average precision over a data set, the images shared among all processes.

    Args:
        model: of any dtype; images are brought to it.
        dataset: items as of :class:`da_ops.detection.voc.VOCDetection`.
        classes: names without the background, in the order of the labels.
        plus_one: see :class:`da_ops.detection.metric.VOCEvaluator`.

    Returns:
        what :meth:`VOCEvaluator.compute` does, in every process. The model's mode is as before.
    """
    evaluator = VOCEvaluator(classes, plus_one=plus_one)
    share = Subset(dataset, range(world.rank, len(dataset), world.size))
    loader = DataLoader(share, batch_size, num_workers=workers, collate_fn=collate)
    batches = started(loader)
    training, dtype = model.training, next(model.parameters()).dtype
    world.agree(model)
    model.eval()
    try:
        hidden = None if progress and world.first else True  # None: hidden where there is no tty
        bar = tqdm(batches, "evaluation", len(loader), leave=False, disable=hidden)
        for images, targets in bar:
            found = model([image.to(world.device, dtype) for image in images])
            found = [{name: value.cpu() for name, value in one.items()} for one in found]
            evaluator.update(found, targets)
    finally:
        model.train(training)
    together = VOCEvaluator(classes, plus_one=plus_one)
    together.merge(world.gather(evaluator.state()))
    return together.compute()
