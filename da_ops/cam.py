"""Where a network looks: Grad-CAM of classifiers and of SSD, through the grad-cam library."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

try:
    from pytorch_grad_cam import GradCAM
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
    from torchvision.models.detection.ssd import SSD
except ImportError as error:
    raise ImportError(
        f'da_ops.cam needs grad-cam ({error}): pip install "da-ops[detection]"'
    ) from error


def grad_cam(
    model: nn.Module,
    images: Tensor,
    targets: Sequence[int] | None = None,
    layer: nn.Module | None = None,
) -> Tensor:
    """What speaks for a class in each image, after Selvaraju et al., Grad-CAM, ICCV 2017.

    Args:
        model: a classifier ``[N, 3, H, W] -> [N, classes]``, or torchvision's SSD.
        images: ``[N, 3, H, W]``, float, as the model takes them: for a classifier normalised, for
            SSD from 0 to 1.
        targets: a class for each image; None takes the one that the model is surest of. With SSD 0
            is the background, and the map is of the default box that is surest of the class.
        layer: whose output is looked at; None takes the last block of the ResNet's deepest stage,
            ``layer4[-1]``, or ``layer3[-1]`` in an SSD that was cut there.

    Returns:
        ``[N, H, W]``, float32 on the CPU, each map from 0 to 1; all 0 where nothing speaks for the
        class. The model is left as it was: mode, gradients, ``requires_grad``.

    Raises:
        ValueError: images or targets of the wrong shape or range, or no ``layer`` to be found.
    """
    if images.dim() != 4 or images.shape[1] != 3 or not images.is_floating_point():
        raise ValueError(
            "grad_cam: images must be floating-point [N, 3, H, W], got"
            f" {images.dtype} {list(images.shape)}"
        )
    if targets is not None and len(targets) != len(images):
        raise ValueError(
            f"grad_cam: expected a target for each of {len(images)} images, got {len(targets)}"
        )
    layer = deepest_block(model) if layer is None else layer
    with _untouched(model):
        scored, inputs = _scored(model, images)
        with torch.no_grad():
            scores = scored(inputs)
        # Frozen layers give gradients too, as long as something before them asks for one.
        inputs = inputs.detach().requires_grad_()
        with GradCAM(scored, [layer]) as cam:
            maps = torch.from_numpy(cam(inputs, _targets(scores, targets)))
    if maps.shape[-2:] != images.shape[-2:]:
        maps = F.interpolate(maps[None], images.shape[-2:], mode="bilinear")[0]
    return maps


def strongest(model: nn.Module, images: Tensor) -> list[int]:
    """For each image the class, other than SSD's background, that the model is surest of."""
    with _untouched(model), torch.no_grad():
        scored, inputs = _scored(model, images)
        return _strongest(scored(inputs))


def deepest_block(model: nn.Module) -> nn.Module:
    """The last block of the last of a ResNet's ``layer1`` to ``layer4``, wherever it lies."""
    stages = {
        int(found[1]): module
        for name, module in model.named_modules()
        if (found := re.search(r"(?:^|\.)layer([1-4])$", name))
        and isinstance(module, nn.Sequential)
    }
    if not stages:
        raise ValueError(
            f"grad_cam: expected a ResNet with layer1 to layer4, got {type(model).__name__};"
            " pass layer="
        )
    return stages[max(stages)][-1]


def _scored(model: nn.Module, images: Tensor) -> tuple[nn.Module, Tensor]:
    """A network that maps a batch to scores, [N, classes] or [N, boxes, classes], and the batch."""
    images = images.to(next(model.parameters()).device)
    if isinstance(model, SSD):
        return _BoxLogits(model), model.transform(list(images))[0].tensors
    return model, images


def _strongest(scores: Tensor) -> list[int]:
    if scores.dim() == 3:  # boxes, of which each is background first of all
        return [int(one) + 1 for one in scores.softmax(-1)[..., 1:].amax(1).argmax(-1)]
    return [int(one) for one in scores.argmax(-1)]


class _BoxLogits(nn.Module):
    """An SSD from the network's input ``[N, 3, S, S]`` to the classes' scores of its default boxes,
    ``[N, boxes, classes]``: before softmax and suppression, and so differentiable throughout."""

    def __init__(self, model: SSD) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        features = list(self.model.backbone(x).values())
        return self.model.head(features)["cls_logits"]


class _BoxTarget:
    """The score of one default box for one class."""

    def __init__(self, box: int, label: int) -> None:
        self.box, self.label = box, label

    def __call__(self, logits: Tensor) -> Tensor:
        return logits[self.box, self.label]


def _targets(scores: Tensor, labels: Sequence[int] | None) -> list[Callable[[Tensor], Tensor]]:
    """What to differentiate for each image, of ``scores`` [N, classes] or [N, boxes, classes]."""
    classes = scores.shape[-1]
    for label in labels or ():
        if not 0 <= label < classes:
            raise ValueError(f"grad_cam: expected targets from 0 to {classes - 1}, got {label}")
    labels = _strongest(scores) if labels is None else labels
    if scores.dim() == 2:
        return [ClassifierOutputTarget(label) for label in labels]
    # Boxes are compared by probability: a score says nothing without those of the other classes.
    sure = scores.softmax(-1)
    boxes = [int(one[:, label].argmax()) for one, label in zip(sure, labels)]
    return [_BoxTarget(box, label) for box, label in zip(boxes, labels)]


@contextmanager
def _untouched(model: nn.Module) -> Iterator[None]:
    """The model in inference mode, its parameters out of reach of gradients; then as before."""
    modes = [(module, module.training) for module in model.modules()]
    before = [(p, p.grad, p.requires_grad) for p in model.parameters()]
    try:
        model.eval().requires_grad_(False)
        yield
    finally:
        for module, training in modes:
            module.training = training
        for parameter, gradient, required in before:
            parameter.requires_grad_(required).grad = gradient
