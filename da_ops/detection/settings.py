"""The settings that decide the result of a training run; the defaults are the paper's SSD300."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from ..backends import NAMES
from ..reference import GATES, ORDERS

BACKBONES = ("resnet18", "resnet34", "resnet50", "resnet101")
ATTENTIONS = ("da", "se", "sge", "eca", "fca", "none")
STAGES = ("layer1", "layer2", "layer3", "layer4")
AUGMENTATIONS = ("ssd", "mirror")


def _setting(default: Any, help: str, **more: Any) -> Any:
    return field(default=default, metadata={"help": help, **more})


@dataclass(frozen=True)
class Settings:
    """Settings of a run; ``metadata`` of each field is what the command line says of it.

    A run can be resumed only with the settings that it was started with. The numbers of processes
    and of loader workers are no settings: neither decides which images make up a step.

    Raises:
        ValueError: a value out of its range.
    """

    backbone: str = _setting("resnet50", "network that the features come from", choices=BACKBONES)
    attention: str = _setting("da", "layer in each residual block", choices=ATTENTIONS)
    transformer: str = _setting(
        "none", "stage that a spatial transformer (STN) comes before", choices=(*STAGES, "none")
    )
    order: str = _setting("spatial_channel", "of DA's halves", choices=ORDERS)
    gate: str = _setting("affine", "form of DA's channel mask", choices=GATES)
    backend: str = _setting("auto", "kernels that compute DA", choices=("auto", *NAMES))
    fused: bool = _setting(True, "norm, DA, addition and ReLU of a block as one operator")
    size: int = _setting(300, "side of the network's square input, pixels")
    mapping: str = _setting("c4", "stages that feed SSD", choices=("c4", "c3c4c5"))
    weights: str | None = _setting(
        None, "backbone's initial weights: a file or a name of torchvision's; random if left out"
    )
    augmentation: str = _setting(
        "ssd", "of the images: SSD's own, or only mirrored, for short runs", choices=AUGMENTATIONS
    )
    batch_size: int = _setting(32, "images per step, over all processes")
    steps: int = _setting(120_000, "steps to train")
    lr: float = _setting(1e-3, "learning rate")
    milestones: tuple[int, ...] | None = _setting(
        None, "steps that divide the rate by ten; default: 2/3 and 5/6 of --steps"
    )
    warmup: int = _setting(500, "steps over which the rate rises from 0")
    momentum: float = _setting(0.9, "of SGD")
    weight_decay: float = _setting(5e-4, "of all but the vectors that attention layers hold")
    clip_norm: float | None = _setting(None, "longest gradient; not clipped if left out")
    amp: bool = _setting(False, "mixed precision: float16 on a GPU, bfloat16 on the CPU")
    channels_last: bool = _setting(False, "memory layout")
    seed: int = _setting(0, "of initial weights, order and augmentation")
    skip_bad: bool = _setting(False, "leave out unreadable images and boxes instead of stopping")

    def __post_init__(self) -> None:
        for name in ("size", "batch_size", "steps"):
            self._check(name, getattr(self, name) >= 1, "at least 1")
        for name in ("lr", "weight_decay", "warmup"):
            value = getattr(self, name)
            self._check(name, value >= 0 and math.isfinite(value), "a number of at least 0")
        self._check("momentum", 0 <= self.momentum < 1, "at least 0 and less than 1")
        self._check("seed", 0 <= self.seed < 2**64, "at least 0 and less than 2**64")
        self._check("milestones", min(self.divided_at, default=0) >= 0, "steps of at least 0")
        self._check("clip_norm", self.clip_norm is None or self.clip_norm > 0, "more than 0")
        for f in fields(self):
            if choices := f.metadata.get("choices"):
                self._check(f.name, getattr(self, f.name) in choices, " or ".join(choices))

    def _check(self, name: str, holds: bool, expected: str) -> None:
        if not holds:
            raise ValueError(f"{name}: expected {expected}, got {getattr(self, name)!r}")

    @property
    def divided_at(self) -> tuple[int, ...]:
        """The steps at which the learning rate is divided by ten."""
        if self.milestones is None:
            return (self.steps * 2 // 3, self.steps * 5 // 6)
        return self.milestones

    def to_dict(self) -> dict[str, Any]:
        """As JSON and checkpoints keep it."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> Settings:
        """The settings that ``to_dict`` gave; ValueError for names that are none of them."""
        names = [field.name for field in fields(cls)]
        if unknown := set(stored) - set(names):
            raise ValueError(
                f"settings: expected {', '.join(names)}, got also {', '.join(unknown)};"
                " another version of da_ops wrote them"
            )
        values = dict(stored)
        if values.get("milestones") is not None:
            values["milestones"] = tuple(values["milestones"])
        return cls(**values)

    def differences(self, other: Settings) -> list[str]:
        """``"lr 0.001, not 0.01"`` for each setting in which ``other`` differs from this one."""
        mine, theirs = self.to_dict(), other.to_dict()
        return [f"{k} {v!r}, not {theirs[k]!r}" for k, v in mine.items() if v != theirs[k]]
