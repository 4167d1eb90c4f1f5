"""Grad-CAM is what its paper defines, of classifiers and of SSD, and leaves the model alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

pytest.importorskip("torchvision")
pytest.importorskip("pytorch_grad_cam")
pytest.importorskip("skimage")
pytest.importorskip("matplotlib")

from da_ops import cam, figures, models
from da_ops.cli import main
from da_ops.detection import checkpoint
from da_ops.models.ssd import ssd
from da_ops.settings import Settings


@pytest.fixture(scope="module")
def classifier():
    torch.manual_seed(0)
    return models.resnet18("da", num_classes=7).eval()


@pytest.fixture(scope="module")
def detector():
    torch.manual_seed(0)
    return ssd("resnet18", "da", num_classes=4, size=64).eval()


def defined(layer, scores, forward):
    """The ICCV paper's map: channels weighed by their mean gradient, summed, the positive part."""
    kept = []
    hook = layer.register_forward_hook(lambda module, args, out: kept.append(out))
    chosen = scores(forward())
    hook.remove()
    (gradient,) = torch.autograd.grad(chosen.sum(), kept[0])
    heat = (gradient.mean((2, 3), keepdim=True) * kept[0]).sum(1).relu().detach()
    low, high = heat.amin((1, 2), keepdim=True), heat.amax((1, 2), keepdim=True)
    return (heat - low) / (high - low + 1e-7)


def close(found, small):
    """The same but for the resampling, which here is by the library."""
    expected = F.interpolate(small[None], found.shape[-2:], mode="bilinear")[0]
    return torch.corrcoef(torch.stack([found.flatten(), expected.flatten()]))[0, 1] > 0.98


def test_classifier(classifier):
    x = torch.randn(2, 3, 96, 128)
    heat = cam.grad_cam(classifier, x, [3, 5])
    assert heat.shape == (2, 96, 128) and heat.dtype == torch.float32
    assert heat.min() >= 0 and heat.max() <= 1
    expected = defined(
        classifier.layer4[-1], lambda out: out[[0, 1], [3, 5]], lambda: classifier(x)
    )
    assert close(heat, expected)
    assert not torch.allclose(heat, cam.grad_cam(classifier, x, [4, 6]))


def test_the_class_that_the_model_is_surest_of_is_the_default(classifier, detector):
    x = torch.randn(2, 3, 64, 64)
    best = classifier(x).argmax(1).tolist()
    assert cam.strongest(classifier, x) == best
    assert torch.equal(cam.grad_cam(classifier, x), cam.grad_cam(classifier, x, best))
    images = torch.rand(2, 3, 64, 64)
    found = detector(list(images))
    best = [int(one["labels"][one["scores"].argmax()]) for one in found]
    assert cam.strongest(detector, images) == best
    assert torch.equal(cam.grad_cam(detector, images), cam.grad_cam(detector, images, best))


def test_detector(detector):
    images = torch.rand(2, 3, 80, 48)
    heat = cam.grad_cam(detector, images, [2, 3])
    assert heat.shape == (2, 80, 48)
    assert heat.min() >= 0 and heat.max() <= 1
    inputs = detector.transform(list(images))[0].tensors

    def scores(out):
        logits = detector.head(list(out.values()))["cls_logits"]
        boxes = logits.softmax(-1)[[0, 1], :, [2, 3]].argmax(1)
        return logits[[0, 1], boxes, [2, 3]]

    layer = detector.backbone.body["layer3"][-1]
    expected = defined(layer, scores, lambda: detector.backbone(inputs))
    assert close(heat, expected)


@pytest.mark.parametrize(("mapping", "stage"), [("c4", "layer3"), ("c3c4c5", "layer4")])
def test_the_default_layer_is_the_last_block_of_the_deepest_stage(mapping, stage):
    model = ssd("resnet18", None, num_classes=4, size=64, mapping=mapping)
    assert cam.deepest_block(model) is model.backbone.body[stage][-1]
    layer = model.backbone.body["layer2"][-1]
    images = torch.rand(1, 3, 64, 64)
    assert not torch.equal(
        cam.grad_cam(model, images, [1]), cam.grad_cam(model, images, [1], layer)
    )


def test_the_model_is_left_as_it_was(classifier):
    model = classifier.train()
    model.layer1.eval()
    model.conv1.weight.requires_grad_(False)
    model.fc.weight.grad = torch.ones_like(model.fc.weight)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    cam.grad_cam(model, torch.randn(1, 3, 64, 64))
    assert model.training and model.layer4.training and not model.layer1.training
    assert not model.conv1.weight.requires_grad and model.fc.weight.requires_grad
    assert model.fc.weight.grad.eq(1).all() and model.fc.bias.grad is None
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not model.layer4[-1]._forward_hooks
    model.requires_grad_(True).eval()


def test_what_is_refused(classifier, detector):
    x = torch.randn(1, 3, 64, 64)
    with pytest.raises(ValueError, match=r"images must be floating-point \[N, 3, H, W\], got"):
        cam.grad_cam(classifier, x.byte())
    with pytest.raises(ValueError, match="expected a target for each of 1 images, got 2"):
        cam.grad_cam(classifier, x, [1, 2])
    with pytest.raises(ValueError, match="expected targets from 0 to 3, got 4"):
        cam.grad_cam(detector, x.sigmoid(), [4])
    with pytest.raises(ValueError, match="pass layer="):
        cam.grad_cam(nn.Sequential(nn.Conv2d(3, 4, 3)), x)


# The command


@pytest.fixture
def files(tmp_path):
    """Two images, and checkpoints of a plain and a DA detector."""
    draw = np.random.default_rng(0)
    for name in ("a", "b"):
        pixels = draw.integers(0, 256, (50, 70, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
    for attention in ("none", "da"):
        settings = Settings(backbone="resnet18", attention=attention, size=64)
        run = checkpoint.Run(settings, ("disc", "ring"), 1)
        model = checkpoint.build_model(settings, run.classes)
        (tmp_path / attention).mkdir()
        state = {"model": model.state_dict(), "step": 1}
        checkpoint.save(tmp_path / attention / "last.pt", state, run)
    return tmp_path


def test_side_by_side(files):
    out = files / "cam.png"
    images = [str(files / "a.png"), str(files / "b.png")]
    networks = ["--plain", str(files / "none"), "--da", str(files / "da" / "last.pt")]
    assert main(["cam", *images, *networks, "--label", "ring", "--out", str(out)]) == 0
    with Image.open(out) as picture:
        assert picture.format == "PNG"
        assert picture.width > 1.2 * picture.height  # three columns, two rows
        assert len(np.unique(np.asarray(picture.convert("RGB")).reshape(-1, 3), axis=0)) > 1000


def test_classifier_weights(tmp_path):
    plain = models.resnet18(None)
    torch.save(plain.state_dict(), tmp_path / "plain.pt")
    network = figures.load_network(str(tmp_path / "plain.pt"), "resnet18")
    assert network.title == "ResNet-18" and not network.detector
    assert network.number("tabby") == network.number("281") == 281
    picture = network.see(Image.new("RGB", (300, 200)))
    assert network.inputs(picture).shape == (1, 3, 224, 224)


def test_the_command_names_what_is_wrong(files, capsys):
    def error(*arguments):
        assert main(["cam", *map(str, arguments), "--out", str(files / "x.png")]) == 1
        assert not (files / "x.png").exists()
        return capsys.readouterr().err

    assert "--plain or --da" in error(files / "a.png")
    assert "disc, ring; got 'cat'" in error(files / "a.png", "--da", files / "da", "--label", "cat")
    (files / "broken.png").write_bytes(b"no image")
    assert "broken.png: expected an image file" in error(files / "broken.png", "--da", files / "da")
    assert "IMAGENET1K_V1" in error(files / "a.png", "--plain", files / "nowhere.pt")
