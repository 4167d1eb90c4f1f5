"""One process or several: the group that torchrun starts, and a loss that does not depend on it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .vision import SSD


@dataclass(frozen=True)
class World:
    """This process among all: its number, how many there are, and its device."""

    rank: int
    size: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this is the process that writes and prints."""
        return self.rank == 0

    def gather(self, value: Any) -> list[Any]:
        """Every process's value, in the order of their ranks, in every process."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value)
        return found

    def mean(self, values: Tensor) -> Tensor:
        """The mean of every process's values."""
        if self.size > 1:
            dist.all_reduce(values)
            values /= self.size
        return values

    def agree(self, model: nn.Module) -> None:
        """Give every process the first one's running statistics, which are those that are kept."""
        if self.size > 1:
            for buffer in model.buffers():
                dist.broadcast(buffer, 0)

    def share(self, model: nn.Module) -> nn.Module:
        """The model as the training step calls it.

        Of several processes each sees its part of the batch. On GPUs batch norms take their
        statistics from all of them; PyTorch has no such norm for CPUs, where each process has its
        own statistics and the running ones are the first's.
        """
        if self.size == 1:
            return model
        if self.device.type == "cuda":
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
            return DistributedDataParallel(model, device_ids=[self.device.index])
        return DistributedDataParallel(model)


@contextmanager
def join() -> Iterator[World]:
    """Join the processes that torchrun started, NCCL on GPUs and gloo on CPUs, until the end."""
    cuda = torch.cuda.is_available()
    local = int(os.environ.get("LOCAL_RANK") or 0)
    if cuda and local >= torch.cuda.device_count():
        raise RuntimeError(
            f"torchrun: expected at most one process per GPU, {torch.cuda.device_count()}, got"
            f" process {local + 1}; lower --nproc-per-node"
        )
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if not os.environ.get("RANK"):
        yield World(0, 1, device)
        return
    dist.init_process_group("nccl" if cuda else "gloo")
    try:
        yield World(dist.get_rank(), dist.get_world_size(), device)
        if not cuda:
            # Gloo's thread may still be letting go of a tensor, for which it needs Python's lock.
            # PyTorch 2.10 waits for that thread with the lock held; waiting here lets go of it.
            dist.barrier()
    finally:
        dist.destroy_process_group()


def normalise_over_all(model: SSD, world: World) -> None:
    """Make ``model``'s loss such that its mean over processes is the loss of the whole batch.

    SSD divides the sum of its losses by the number of default boxes that matched an object, here
    of this process's images alone. The mean of such quotients is not the quotient of the sums; it
    is once each is weighed by (own matches) * processes / (matches of all).
    """
    if world.size == 1:
        return
    local = model.compute_loss

    def compute_loss(
        targets: list[dict[str, Tensor]],
        head_outputs: dict[str, Tensor],
        anchors: list[Tensor],
        matched_idxs: list[Tensor],
    ) -> dict[str, Tensor]:
        losses = local(targets, head_outputs, anchors, matched_idxs)
        matches = torch.stack([(m >= 0).sum() for m in matched_idxs]).sum().double()
        total = matches.clone()
        dist.all_reduce(total)
        weight = matches.clamp(min=1) * world.size / total.clamp(min=1)
        return {name: loss * weight.to(loss.dtype) for name, loss in losses.items()}

    model.compute_loss = compute_loss
