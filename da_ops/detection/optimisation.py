"""One training step after another: parameter groups, schedule, precision, and what may go wrong."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .vision import SSD

# isort: split
from ..models.attention import SGEModule
from ..module import DAModule
from .distributed import World, normalise_over_all
from .settings import Settings

Batch = tuple[Sequence[Tensor], Sequence[dict[str, Any]]]


class NotFiniteError(RuntimeError):
    """The loss or its gradient is NaN or infinite; names the step and the images."""


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Parameters with weight decay, and those without.

    Without are the vectors that scale and shift an attention layer's mask: ``gate_weight`` and
    ``gate_bias`` of :class:`da_ops.DAModule`, ``weight`` and ``bias`` of
    :class:`da_ops.models.SGEModule`. Decay would pull them towards a constant mask. All others
    have it: convolutions (those of DA, SE and ECA too), biases, batch norms, as in SSD.
    """
    without = [
        parameter
        for module in model.modules()
        if isinstance(module, DAModule | SGEModule)
        for parameter in module.parameters(recurse=False)
    ]
    left_out = {id(parameter) for parameter in without}
    with_decay = [p for p in model.parameters() if id(p) not in left_out]
    groups = [
        {"params": with_decay, "weight_decay": weight_decay},
        {"params": without, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def stepwise(settings: Settings) -> Callable[[int], float]:
    """The learning rate of a step, the first being 0: it rises linearly over the warm-up, and is
    divided by ten at each milestone."""

    def rate(step: int) -> float:
        warm = min(1.0, (step + 1) / max(1, settings.warmup))
        return settings.lr * warm / 10 ** sum(step >= m for m in settings.divided_at)

    return rate


class Trainer:
    """A detector in training: model, optimizer, loss scale, and the number of steps done.

    Args:
        model: an SSD, on the world's device and in training mode from here on.
        optimizer: over its parameters.
        rate: the learning rate of each step, the first being 0.
        world: the processes that share each step's batch.
        amp: autocast to float16 with a loss scale on a GPU, to bfloat16 on the CPU.
        clip_norm: gradients longer than this are scaled down to it.
    """

    SMALLEST_SCALE = 1.0  # float16 gradients that overflow even so are not finite at all

    def __init__(
        self,
        model: SSD,
        optimizer: torch.optim.Optimizer,
        rate: Callable[[int], float],
        world: World,
        *,
        amp: bool = False,
        clip_norm: float | None = None,
    ) -> None:
        self.model, self.optimizer, self.rate, self.world = model, optimizer, rate, world
        self.clip_norm = clip_norm or float("inf")
        self.kind = world.device.type
        self.amp = amp
        self.scaler = torch.amp.GradScaler(self.kind, enabled=amp and self.kind == "cuda")
        self.step = 0
        normalise_over_all(model, world)
        self.shared = world.share(model).train()

    def autocast(self) -> torch.autocast:
        half = torch.float16 if self.kind == "cuda" else torch.bfloat16
        return torch.autocast(self.kind, dtype=half, enabled=self.amp)

    def update(self, batch: Batch) -> dict[str, float]:
        """One step on this process's share of the batch.

        Returns the learning rate, the batch's losses and the gradient's length, over all processes.

        Raises:
            NotFiniteError: and the weights are as they were before the step.
        """
        images, targets = batch
        rate = self.rate(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        images = [self._here(image) for image in images]
        known = [{k: self._here(target[k]) for k in ("boxes", "labels")} for target in targets]
        self.optimizer.zero_grad(set_to_none=True)
        with self.autocast():
            losses = self.shared(images, known)
        loss = torch.stack(list(losses.values())).sum()
        values = self.world.mean(torch.stack([loss, *losses.values()]).detach())
        self._check(values[0], "loss", targets)
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.clip_norm)
        if not self.scaler.is_enabled() or self.scaler.get_scale() < self.SMALLEST_SCALE:
            self._check(norm, "gradient", targets)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.step += 1
        numbers = dict(zip(("loss", *losses), values.tolist()))
        return {"lr": rate, **numbers, "gradient_norm": float(norm)}

    def _here(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.world.device, non_blocking=True)

    def _check(self, value: Tensor, name: str, targets: Sequence[dict[str, Any]]) -> None:
        if torch.isfinite(value):
            return
        mine = [str(target["image_id"]) for target in targets]
        images = [image for share in self.world.gather(mine) for image in share]
        raise NotFiniteError(
            f"step {self.step}: expected a finite {name}, got {value.item()} on the images"
            f" {', '.join(images)}. Look at these images and their boxes; if they are right, lower"
            " the learning rate, lengthen the warm-up, or clip the gradient"
        )

    def state_dict(self) -> dict[str, Any]:
        """All that decides the steps to come."""
        return {
            "step": self.step,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step = int(state["step"])
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if state["scaler"]:  # empty if the run was on a CPU until now
            self.scaler.load_state_dict(state["scaler"])
