"""What Grad-CAM refuses, and what it says then."""

from __future__ import annotations

import pytest
import torch
from torch import nn

pytest.importorskip("torchvision")
pytest.importorskip("pytorch_grad_cam")

from da_ops import models
from da_ops.detection import cam
from da_ops.models.ssd import ssd


@pytest.fixture(scope="module")
def classifier():
    return models.resnet18("da", num_classes=7).eval()


@pytest.fixture(scope="module")
def detector():
    return ssd("resnet18", "da", num_classes=4, size=64).eval()


def test_what_is_refused(classifier, detector):
    x = torch.randn(1, 3, 64, 64)
    with pytest.raises(ValueError, match=r"images must be floating-point \[N, 3, H, W\], got"):
        cam.grad_cam(classifier, x.byte())
    with pytest.raises(ValueError, match="expected a target for each of 1 images, got 2"):
        cam.grad_cam(classifier, x, [1, 2])
    with pytest.raises(ValueError, match=r"strongest: images must be floating-point \[N, 3, H"):
        cam.strongest(detector, x[0])
    for targets in (3, torch.tensor(3), [0.5], torch.ones(1), "3", [None]):
        with pytest.raises(TypeError, match="each of 1 images, a sequence of whole numbers, got"):
            cam.grad_cam(classifier, x, targets)
    with pytest.raises(ValueError, match="expected targets from 0 to 3, got 4"):
        cam.grad_cam(detector, x.sigmoid(), [4])
    with pytest.raises(ValueError, match="pass layer="):
        cam.grad_cam(nn.Sequential(nn.Conv2d(3, 4, 3)), x)
    with pytest.raises(TypeError, match=r"an nn.Module such as model.layer4\[-1\], got 'layer4'"):
        cam.grad_cam(classifier, x, layer="layer4")
    for call in (cam.grad_cam, cam.strongest):
        with pytest.raises(ValueError, match=r"floating-point \[N, 3, H, W\], got list"):
            call(detector, list(x))


class Other(nn.Module):
    """A network that gives what no classifier does."""

    def __init__(self, give):
        super().__init__()
        self.layer1, self.give = nn.Sequential(nn.Conv2d(3, 4, 3)), give

    def forward(self, x):
        return self.give(self.layer1(x))


@pytest.mark.parametrize(
    ("give", "got"),
    [
        (lambda y: [{"scores": y.mean()}], "list"),  # as detectors do
        (lambda y: {"out": y}, "dict"),  # as torchvision's segmentation does
        (lambda y: y, r"\[1, 4, 14, 14\]"),
        (lambda y: y.flatten(2), r"\[1, 4, 196\]"),
        (lambda y: y.mean(), r"\[\]"),
    ],
)
def test_networks_that_give_no_scores_of_classes_are_refused(give, got):
    for call in (cam.grad_cam, cam.strongest):
        with pytest.raises(ValueError, match=f"torchvision's SSD, got a Other that gives {got}; w"):
            call(Other(give), torch.rand(1, 3, 16, 16))


def test_networks_without_parameters_are_refused():
    model, x = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()), torch.rand(1, 3, 8, 8)
    with pytest.raises(ValueError, match="grad_cam: expected a model with parameters"):
        cam.grad_cam(model, x, [0], model[0])
    with pytest.raises(ValueError, match="strongest: expected a model with parameters"):
        cam.strongest(model, x)


class Odd(nn.Module):
    """Parts of all kinds that have no map."""

    def __init__(self):
        super().__init__()
        self.conv, self.relu, self.unused = nn.Conv2d(3, 4, 3), nn.ReLU(), nn.ReLU()
        self.pair, self.flat, self.cut = nn.Identity(), nn.Flatten(), nn.ReLU()

    def forward(self, x):
        x, _ = self.pair((self.relu(self.conv(x)), None))
        self.cut(x.detach())
        return self.flat(self.relu(x).mean((2, 3)))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("relu", "a layer that the model runs once, got a ReLU that runs 2 times"),
        ("unused", "a layer that the model runs once, got a ReLU that runs 0 times"),
        ("pair", r"a layer that gives \[1, C, H, W\], got a Identity that gives tuple"),
        ("flat", r"a layer that gives \[1, C, H, W\], got a Flatten that gives \[1, 4\]"),
        ("cut", "a layer that the score depends on, got a ReLU without a gradient"),
    ],
)
def test_layers_without_a_map_are_refused(name, message):
    model = Odd()
    with pytest.raises(ValueError, match=f"grad_cam: expected {message}; pass another layer="):
        cam.grad_cam(model, torch.randn(1, 3, 16, 16), [0], getattr(model, name))
    assert not getattr(model, name)._forward_hooks
