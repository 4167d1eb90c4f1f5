"""Where a network looks: Grad-CAM of classifiers and of SSD, through the grad-cam library."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from .vision import SSD

try:
    from pytorch_grad_cam import GradCAM
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
except ImportError as error:
    raise ImportError(
        f'da_ops.detection.cam needs grad-cam ({error}): pip install "da-ops[detection]"'
    ) from error


def grad_cam(
    model: nn.Module,
    images: Tensor,
    targets: Iterable[int] | Tensor | None = None,
    layer: nn.Module | None = None,
) -> Tensor:
    """Maps of the evidence for a class in each image, after Selvaraju et al., Grad-CAM, ICCV 2017.

    They are of the output as the layer gives it, even if the next layer writes into it, as a ReLU
    in place does. Works under ``torch.no_grad``, ``torch.inference_mode`` and autocast.

    Args:
        model: a classifier ``[N, 3, H, W] -> [N, classes]``, or torchvision's SSD; compiled or not.
        images: ``[N, 3, H, W]``, float, as the model takes them: for a classifier normalised, for
            SSD from 0 to 1. They are brought to the model's device and dtype.
        targets: a class for each image, a sequence of whole numbers or a tensor ``[N]`` of an
            integer dtype; None takes the one that the model is surest of. With SSD 0 is the
            background, and the map is of the default box that is surest of the class.
        layer: whose output ``[N, C, H, W]`` is looked at; it must run once. None takes the last
            block of the ResNet's deepest stage, ``layer4[-1]``, or ``layer3[-1]`` in an SSD that
            was cut there.

    Returns:
        ``[N, H, W]``, float32 on the CPU, each map from 0 to 1: 0 where the evidence is least, all
        0 if nothing speaks for the class, and all 1 if everything does alike, as in a layer's map
        of one cell. The model is left as it was: mode, gradients, ``requires_grad``.

    Raises:
        TypeError: targets that are no whole numbers, or not one for each of several images, or a
            ``layer`` that is no module.
        ValueError: images or targets of the wrong shape or range, no ``layer`` to be found or one
            that has no map, or a model that gives no scores of classes, has no parameters or was
            made under ``torch.inference_mode``.
    """
    _check_images(images, "grad_cam")
    model = _uncompiled(model)
    if layer is not None and not isinstance(layer, nn.Module):
        raise TypeError(
            "grad_cam: expected a layer of the model, an nn.Module such as model.layer4[-1], got"
            f" {layer!r}"
        )
    labels = None if targets is None else _whole_numbers(targets, len(images))
    layer = deepest_block(model) if layer is None else layer
    if len(images) == 0:
        return torch.zeros(0, *images.shape[-2:])
    _check_differentiable(model)
    with torch.inference_mode(False), torch.enable_grad(), _untouched(model):
        scored, inputs = _scored(model, images, "grad_cam")
        outputs: list[Any] = []
        with torch.no_grad(), _hooked(layer, lambda module, args, out: outputs.append(out)):
            scores = scored(inputs.clone())  # a copy, for the model may write into its input
        _check_scores(scores, model, len(inputs), "grad_cam")
        _check_outputs(outputs, layer, len(inputs))
        # Frozen layers give gradients too, as long as something before them asks for one.
        inputs = inputs.requires_grad_().clone()
        cam = _GradCAM(scored, [layer], reshape_transform=Tensor.float)  # NumPy has no bfloat16
        # The next layer may write into this one's output, and so it gets a copy.
        with cam, _hooked(layer, lambda module, args, out: out.clone()):
            maps = torch.from_numpy(cam(inputs, _targets(scores, labels)))
        maps[torch.from_numpy(cam.alike)] = 1
    if maps.shape[-2:] != images.shape[-2:]:
        maps = F.interpolate(maps[None], images.shape[-2:], mode="bilinear")[0]
    return maps


def strongest(model: nn.Module, images: Tensor) -> list[int]:
    """For each image the class, other than SSD's background, that the model is surest of.

    ``model`` and ``images`` are those of :func:`grad_cam`; ValueError if they are others.
    """
    _check_images(images, "strongest")
    model = _uncompiled(model)
    if len(images) == 0:
        return []
    with torch.inference_mode(False), torch.no_grad(), _evaluating(model):
        scored, inputs = _scored(model, images, "strongest")
        scores = scored(inputs)
        _check_scores(scores, model, len(inputs), "strongest")
        return _strongest(scores)


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


def _uncompiled(model: nn.Module) -> nn.Module:
    """What ``torch.compile`` wrapped, of which alone it can be told whether it is an SSD."""
    return getattr(model, "_orig_mod", model)


def _check_images(images: Tensor, caller: str) -> None:
    if not isinstance(images, Tensor) or images.dim() != 4 or images.shape[1] != 3:
        got = _told(images)
    elif not images.is_floating_point():
        got = f"{images.dtype} {_told(images)}"
    else:
        return
    raise ValueError(f"{caller}: images must be floating-point [N, 3, H, W], got {got}")


def _told(value: object) -> str:
    return str(list(value.shape)) if isinstance(value, Tensor) else type(value).__name__


def _check_scores(scores: Any, model: nn.Module, images: int, caller: str) -> None:
    dimensions = 3 if isinstance(model, SSD) else 2  # of default boxes, or of images
    if not isinstance(scores, Tensor) or scores.dim() != dimensions or len(scores) != images:
        raise ValueError(
            f"{caller}: expected a classifier that gives [{images}, classes], or torchvision's SSD,"
            f" got a {type(model).__name__} that gives {_told(scores)}; wrap it in a module that"
            " gives a score for each class"
        )


def _whole_numbers(targets: Iterable[int] | Tensor, images: int) -> list[int]:
    expected = f"grad_cam: expected a target for each of {images} images"
    try:
        labels = [operator.index(target) for target in targets]
    except TypeError as error:
        raise TypeError(f"{expected}, a sequence of whole numbers, got {targets!r}") from error
    if len(labels) != images:
        raise ValueError(f"{expected}, got {len(labels)}")
    return labels


def _check_differentiable(model: nn.Module) -> None:
    if any(tensor.is_inference() for tensor in (*model.parameters(), *model.buffers())):
        raise ValueError(
            "grad_cam: expected a model that gradients can flow through, got one with tensors made"
            " under torch.inference_mode(); pass copy.deepcopy(model), copied outside of it"
        )


@contextmanager
def _hooked(layer: nn.Module, hook: Callable[[nn.Module, Any, Any], Any]) -> Iterator[None]:
    """The layer with a forward hook, called after those that it has."""
    handle = layer.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def _check_outputs(outputs: list[Any], layer: nn.Module, images: int) -> None:
    name = type(layer).__name__
    if len(outputs) != 1:
        raise ValueError(
            f"grad_cam: expected a layer that the model runs once, got a {name} that runs"
            f" {len(outputs)} times; pass another layer="
        )
    (output,) = outputs
    if not isinstance(output, Tensor) or output.dim() != 4 or len(output) != images:
        raise ValueError(
            f"grad_cam: expected a layer that gives [{images}, C, H, W], got a {name} that gives"
            f" {_told(output)}; pass another layer="
        )


class _GradCAM(GradCAM):
    """The library's GradCAM, which fails on None if the layer got no gradient, with an error; and
    which images' maps are positive and the same everywhere, of which it makes 0."""

    alike: NDArray[np.bool_]

    def get_cam_image(self, *arguments: Any) -> NDArray[np.float32]:
        maps: NDArray[np.float32] = super().get_cam_image(*arguments)
        least = maps.min((1, 2))
        self.alike = (least > 0) & (least == maps.max((1, 2)))
        return maps

    def get_cam_weights(
        self,
        input_tensor: Tensor,
        target_layers: nn.Module,
        targets: list[Callable[[Tensor], Tensor]],
        activations: NDArray[np.float32],
        grads: NDArray[np.float32] | None,
    ) -> NDArray[np.float32]:
        if grads is None:
            raise ValueError(
                "grad_cam: expected a layer that the score depends on, got a"
                f" {type(target_layers).__name__} without a gradient; pass another layer="
            )
        return super().get_cam_weights(input_tensor, target_layers, targets, activations, grads)


def _scored(model: nn.Module, images: Tensor, caller: str) -> tuple[nn.Module, Tensor]:
    """A network that maps a batch to scores, [N, classes] or [N, boxes, classes], and the batch,
    a copy of the images."""
    parameter = next(model.parameters(), None)
    if parameter is None:
        raise ValueError(
            f"{caller}: expected a model with parameters, whose device and dtype its images are"
            f" brought to, got a {type(model).__name__} without; give it one"
        )
    images = images.detach().to(parameter.device, copy=True)
    if isinstance(model, SSD):
        # Not in half precision, in which images cannot be resized everywhere.
        images = images.to(torch.promote_types(images.dtype, torch.float32))
        return _BoxLogits(model), model.transform(list(images))[0].tensors.to(parameter.dtype)
    return model, images.to(parameter.dtype)


def _strongest(scores: Tensor) -> list[int]:
    if scores.dim() == 3:  # of boxes: nearly all are surest of the background
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


def _targets(scores: Tensor, labels: list[int] | None) -> list[Callable[[Tensor], Tensor]]:
    """For each image the score to differentiate; ``scores`` [N, classes] or [N, boxes, classes]."""
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
def _evaluating(model: nn.Module) -> Iterator[None]:
    """The model in inference mode and not compiled, since compiled code ignores new hooks; then as
    before."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def _untouched(model: nn.Module) -> Iterator[None]:
    """The model in inference mode, its parameters out of reach of gradients; then as before."""
    before = [(p, p.grad, p.requires_grad) for p in model.parameters()]
    try:
        model.requires_grad_(False)
        with _evaluating(model):
            yield
    finally:
        for parameter, gradient, required in before:
            parameter.requires_grad_(required).grad = gradient
