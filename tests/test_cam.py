"""Grad-CAM is what its paper defines, of classifiers and of SSD, and leaves the model alone."""

from __future__ import annotations

import argparse
import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

pytest.importorskip("torchvision")
pytest.importorskip("timm")
pytest.importorskip("pytorch_grad_cam")
pytest.importorskip("skimage")
pytest.importorskip("matplotlib")

from timm.models import resnet as timm_resnet
from torchvision.models import resnet as tv

from da_ops import models
from da_ops.cli import main
from da_ops.detection import cam, checkpoint, figures
from da_ops.detection.settings import Settings
from da_ops.models.ssd import ssd


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

    def keep(module, args, out):
        kept.append(out)
        return out.clone()  # so that what follows the layer cannot write into its output

    hook = layer.register_forward_hook(keep)
    chosen = scores(forward())
    hook.remove()
    (gradient,) = torch.autograd.grad(chosen.sum(), kept[0])
    return (gradient.mean((2, 3), keepdim=True) * kept[0]).sum(1).relu().detach().float()


def stretched(heat):
    """As the library does it, from 0 to a little less than 1."""
    low, high = heat.amin((1, 2), keepdim=True), heat.amax((1, 2), keepdim=True)
    return (heat - low) / (high - low + 1e-7)


def resampled(heat, *size):
    return stretched(F.interpolate(stretched(heat)[None], size, mode="bilinear")[0])


def assert_close(found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=5e-3)  # the library resamples coarsely


def picked(out):
    return out[[0, 1], [3, 5]]


def test_classifier(classifier):
    x = torch.randn(2, 3, 96, 128)
    heat = cam.grad_cam(classifier, x, [3, 5])
    assert heat.shape == (2, 96, 128) and heat.dtype == torch.float32
    assert heat.min() >= 0 and heat.max() <= 1
    expected = defined(classifier.layer4[-1], picked, lambda: classifier(x))
    assert_close(heat, resampled(expected, 96, 128))
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
    expected = resampled(expected, 64, 64)
    assert_close(heat, F.interpolate(expected[None], (80, 48), mode="bilinear")[0])


BLOCKS = {
    "basic": tv.BasicBlock,
    "bottleneck": tv.Bottleneck,
    "timm basic": timm_resnet.BasicBlock,
    "timm bottleneck": timm_resnet.Bottleneck,
}


def two_blocks(block, attention):
    """The first has a convolution on its shortcut; activations and additions are in place."""
    wide = 16 * block.expansion
    shortcut = nn.Sequential(nn.Conv2d(16, wide, 1, stride=2), nn.BatchNorm2d(wide))
    network = nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(inplace=True)),
        nn.Sequential(block(16, 16, 2, shortcut), block(wide, 16)),
        nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(wide, 7)),
    )
    options = {"sge": {"groups": 4}, "fca": {"frequencies": "low4"}}.get(attention, {})
    name, fused = attention.removesuffix(", fused"), attention.endswith("fused")
    models.insert_attention(network, name, fused=fused, **options)
    for p in network.parameters():  # gates that start at 0 would show little
        p.data.add_(torch.rand_like(p), alpha=0.2)
    return network.eval()


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("attention", [*models.ATTENTIONS, "da, fused"])
def test_layers_into_whose_output_the_network_writes(attention, block):
    network, x = two_blocks(BLOCKS[block], attention), torch.randn(2, 3, 32, 24)
    stem, blocks, _ = network
    shown = 0
    for last in blocks:
        layer = last.se if "timm" in block else last.attention
        for looked_at in (last, layer, last.bn1, last.bn2, stem[1]):
            expected = defined(looked_at, picked, lambda: network(x))
            shown += bool(expected.amax())
            assert_close(cam.grad_cam(network, x, [3, 5], looked_at), resampled(expected, 32, 24))
    assert shown > 2


@pytest.mark.parametrize(("mapping", "stage"), [("c4", "layer3"), ("c3c4c5", "layer4")])
def test_the_default_layer_is_the_last_block_of_the_deepest_stage(mapping, stage):
    model = ssd("resnet18", None, num_classes=4, size=64, mapping=mapping)
    assert cam.deepest_block(model) is model.backbone.body[stage][-1]
    layer = model.backbone.body["layer2"][-1]
    images = torch.rand(1, 3, 64, 64)
    assert not torch.equal(
        cam.grad_cam(model, images, [1]), cam.grad_cam(model, images, [1], layer)
    )


MODES = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["classifier", "detector"])
def test_modes_that_pictures_are_drawn_in(mode, kind, request):
    """The map is the one that it is outside, of tensors made there, after the model ran there."""
    model, images = request.getfixturevalue(kind), torch.rand(2, 3, 64, 64)
    expected = cam.grad_cam(model, images, [1, 2])
    with MODES[mode]():
        made_there = images * 1
        model(made_there if kind == "classifier" else list(made_there))
        best = cam.strongest(model, made_there)
        found = cam.grad_cam(model, made_there, torch.tensor([1, 2]) + 0)
    assert found.dtype == torch.float32 and not found.requires_grad
    if mode == "autocast":
        torch.testing.assert_close(found, expected, rtol=0, atol=0.2)
        assert not torch.equal(found, expected)
    else:
        assert torch.equal(found, expected) and best == cam.strongest(model, images)


def test_modes_within_each_other(classifier):
    x = torch.randn(1, 3, 64, 64)
    with MODES["autocast"]():
        expected = cam.grad_cam(classifier, x, [1])
        for mode in ("no_grad", "inference_mode"):
            with MODES[mode]():
                classifier(x)
                assert torch.equal(cam.grad_cam(classifier, x, [1]), expected)
        assert torch.equal(cam.grad_cam(classifier, x, [1]), expected)
    assert classifier(x).requires_grad


def test_a_model_made_in_inference_mode_can_be_copied():
    with torch.inference_mode():
        model = models.resnet18("da", num_classes=7).eval()
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert cam.strongest(model, x) == model(x).argmax(1).tolist()
    for whole in (model, nn.Sequential(nn.Conv2d(3, 3, 1), model)):
        with pytest.raises(ValueError, match=r"pass copy.deepcopy\(model\), copied outside"):
            cam.grad_cam(whole, x)
    assert cam.grad_cam(copy.deepcopy(model), x).amax() > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("kind", ["classifier", "detector"])
def test_networks_of_other_dtypes(kind, dtype, request):
    model = request.getfixturevalue(kind)
    images = torch.rand(2, 3, 80, 64)
    expected = cam.grad_cam(model, images, [1, 2])
    other = copy.deepcopy(model).to(dtype)
    assert len(cam.strongest(other, images)) == 2
    for given in (images, images.to(dtype)):
        found = cam.grad_cam(other, given, [1, 2])
        assert found.dtype == torch.float32
        tolerance = 0.2 if dtype == torch.bfloat16 else 1e-3
        torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    "form",
    [
        tuple,
        torch.tensor,
        lambda labels: torch.tensor(labels, dtype=torch.uint8),
        np.array,
        lambda labels: [np.int32(label) for label in labels],
        lambda labels: [torch.tensor(label) for label in labels],
        iter,
    ],
)
def test_targets_are_whole_numbers_of_any_kind(classifier, form):
    x = torch.randn(2, 3, 64, 64)
    expected = cam.grad_cam(classifier, x, [3, 5])
    assert torch.equal(cam.grad_cam(classifier, x, form([3, 5])), expected)


def test_an_empty_batch_has_no_maps(classifier, detector):
    for model in (classifier, detector):
        for targets in (None, [], torch.zeros(0, dtype=torch.long)):
            assert cam.grad_cam(model, torch.rand(0, 3, 48, 64), targets).shape == (0, 48, 64)
        assert cam.strongest(model, torch.rand(0, 3, 48, 64)) == []


def test_images_stay_as_they_are():
    model = nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1))
    model.append(nn.Flatten())
    x = torch.randn(2, 3, 16, 16)
    before = x.clone()
    expected = defined(model[1], picked, lambda: model(x.clone()))
    assert cam.strongest(model, x) == model(x.clone()).argmax(1).tolist()
    assert_close(cam.grad_cam(model, x, [3, 5], model[1]), resampled(expected, 16, 16))
    assert torch.equal(x, before)


def test_a_compiled_network():
    """What was compiled knows nothing of hooks that come later."""
    network, x = two_blocks(tv.BasicBlock, "eca"), torch.randn(2, 3, 32, 32)
    layer = network[1][0].attention
    expected = cam.grad_cam(network, x, [3, 5], layer)
    compiled = torch.compile(network, backend="eager")
    with torch.no_grad():
        assert compiled(x).argmax(1).tolist() == cam.strongest(compiled, x)
    for whole in (compiled, nn.Sequential(compiled)):
        assert torch.equal(cam.grad_cam(whole, x, [3, 5], layer), expected)


def test_a_compiled_detector(detector):
    images = torch.rand(2, 3, 64, 64)
    compiled = torch.compile(detector, backend="eager")
    assert cam.strongest(compiled, images) == cam.strongest(detector, images)
    assert torch.equal(cam.grad_cam(compiled, images), cam.grad_cam(detector, images))


def test_evidence_that_is_the_same_everywhere():
    """A map of one cell, whose minimum is its maximum."""
    pool, fc = nn.AdaptiveAvgPool2d(1), nn.Linear(3, 2, bias=False)
    fc.weight.data = torch.tensor([[1.0, 1, 1], [-1, -1, -1]])
    model, x = nn.Sequential(pool, nn.Flatten(), fc), torch.rand(2, 3, 8, 8)
    assert cam.grad_cam(model, x, [0, 1], pool).eq(torch.tensor([1.0, 0])[:, None, None]).all()


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


@pytest.mark.parametrize("more", [{}, {"args": argparse.Namespace(lr=0.1)}])
def test_classifier_weights(tmp_path, more):
    plain = models.resnet18(None)
    torch.save({"model": plain.state_dict(), **more}, tmp_path / "plain.pt")
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
