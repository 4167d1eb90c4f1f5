"""The detector: its box layout, what it takes and gives, precision, initial weights."""

import pytest
import torch
from torch import nn
from torchvision.models.resnet import resnet18 as plain_resnet18
from torchvision.ops import box_iou

from da_ops.models import da_resnet18, unfused_blocks
from da_ops.models.ssd import MAPPINGS, feature_sides, ssd, ssd300

CLASSES = 4  # with the background


def small(attention="da", **options):
    return ssd("resnet18", attention, **{"size": 64, "num_classes": CLASSES, **options})


def targets(*boxes):
    """A target with these boxes, of classes 1, 2 and so on."""
    return {
        "boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        "labels": torch.arange(1, len(boxes) + 1),
    }


def maps_and_boxes(model, size):
    """Sides of the feature maps, and the default boxes of one image."""
    seen = {}

    def look(module, arguments, output):
        seen["sides"] = [tuple(feature.shape[2:]) for feature in arguments[1]]
        seen["boxes"] = output[0]

    model.anchor_generator.register_forward_hook(look)
    with torch.no_grad():
        model.eval()([torch.rand(3, size, size)])
    return seen["sides"], seen["boxes"]


@pytest.mark.parametrize("mapping", MAPPINGS)
def test_the_papers_layout_at_300_pixels(mapping):
    sides, boxes = maps_and_boxes(ssd300("resnet18", num_classes=CLASSES, mapping=mapping), 300)
    assert sides == [(k, k) for k in (38, 19, 10, 5, 3, 1)]
    assert len(boxes) == 8732


@pytest.mark.parametrize(
    ("size", "sides"),
    [
        (512, [64, 32, 16, 8, 4, 2, 1]),
        (128, [16, 8, 4, 2, 1]),
        (96, [12, 6, 3, 1]),
        (48, [6, 3, 1]),
        (32, [4, 2, 1]),
    ],
)
def test_maps_halve_until_one_cell_is_left(size, sides):
    assert feature_sides(size) == sides
    assert feature_sides(size, "c3c4c5") == ([6, 3, 2] if size == 48 else sides)


@pytest.mark.parametrize("mapping", MAPPINGS)
@pytest.mark.parametrize("size", [32, 33, 40, 41, 48, 49, 50, 64, 96, 100])
def test_backbone_and_extra_stages_give_the_maps_of_the_rule(mapping, size):
    sides, _ = maps_and_boxes(small(size=size, mapping=mapping), size)
    assert sides == [(k, k) for k in feature_sides(size, mapping)]


def test_no_part_of_an_extra_stage_writes_over_another_ones_output():
    model, kept = small().eval(), []
    for module in model.backbone.extras.modules():
        module.register_forward_hook(lambda *call: kept.append((call[2], call[2].clone())))
    model([torch.rand(3, 64, 64)])
    assert len(kept) > 6 and all(torch.equal(given, then) for given, then in kept)


def test_512_pixels_have_the_papers_24564_boxes():
    ratios = ssd("resnet18", size=512).anchor_generator.num_anchors_per_location()
    assert sum(k * k * n for k, n in zip(feature_sides(512), ratios)) == 24564


def test_scales_at_300_pixels_are_vocs():
    model = ssd300("resnet18")
    assert model.anchor_generator.scales == pytest.approx([0.1, 0.2, 0.37, 0.54, 0.71, 0.88, 1.05])
    _, boxes = maps_and_boxes(model, 300)
    first = boxes[:4]  # of the cell at the top left
    width, height = (first[:, 2:] - first[:, :2]).T
    s, t = 30.0, 300 * (0.1 * 0.2) ** 0.5
    torch.testing.assert_close(width, torch.tensor([s, t, s * 2**0.5, s / 2**0.5]))
    torch.testing.assert_close(height, torch.tensor([s, t, s / 2**0.5, s * 2**0.5]))
    torch.testing.assert_close((first[:, :2] + first[:, 2:]) / 2, torch.full((4, 2), 150 / 38))


@pytest.mark.parametrize(("size", "share"), [(64, 0.9), (96, 0.9), (128, 0.9), (300, 0.85)])
def test_most_objects_overlap_a_default_box_by_half(size, share):
    """Of squares at random places, with sides from 14 pixels to .9 of the image."""
    _, boxes = maps_and_boxes(small(size=size), size)
    side = torch.empty(2000).uniform_(14 / size, 0.9).mul(size)
    corner = torch.rand(2000, 2) * (size - side)[:, None]
    objects = torch.cat([corner, corner + side[:, None]], 1)
    assert (box_iou(objects, boxes).amax(1) >= 0.5).float().mean() > share


@pytest.mark.parametrize("attention", ["da", "se", "eca", "fca", None])
def test_trains_on_images_with_and_without_objects(attention):
    model = small(attention)
    images = [torch.rand(3, 64, 64), torch.rand(3, 40, 70), torch.rand(3, 100, 90)]
    losses = model(
        images, [targets((4, 4, 30, 40)), targets(), targets((0, 0, 9, 9), (5, 5, 80, 80))]
    )
    sum(losses.values()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name


def test_one_image_without_objects_has_no_loss():
    losses = small()([torch.rand(3, 64, 64)], [targets()])
    assert losses["bbox_regression"] == 0 and losses["classification"] == 0
    sum(losses.values()).backward()


def test_boxes_come_back_in_the_pixels_of_each_image():
    model = small(score_thresh=0.0).eval()
    images = [torch.rand(3, 64, 64), torch.rand(3, 200, 100)]
    with torch.no_grad():
        found = model(images)
    for image, one in zip(images, found):
        height, width = image.shape[1:]
        assert 0 < len(one["boxes"]) == len(one["scores"]) == len(one["labels"])
        assert one["boxes"].min() >= 0 and (one["boxes"] <= torch.tensor([width, height] * 2)).all()
        assert one["labels"].min() >= 1 and one["labels"].max() < CLASSES
    assert found[1]["boxes"][:, 3].max() > 100


def test_large_images_are_resized_with_antialiasing():
    """Columns of black and white, one pixel wide, become grey."""
    columns = (torch.arange(256) % 2).float().expand(3, 256, 256)
    batch, _ = small().transform([columns])
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    grey = batch.tensors[0] * std[:, None, None] + mean[:, None, None]
    assert grey.shape == (3, 64, 64)
    torch.testing.assert_close(grey[:, :, 2:-2], torch.full((3, 64, 60), 0.5), atol=0.02, rtol=0)


def test_targets_follow_their_image_to_the_size_of_the_detector():
    _, (target,) = small().transform([torch.rand(3, 128, 32)], [targets((8, 16, 24, 64))])
    torch.testing.assert_close(target["boxes"], torch.tensor([[16.0, 8, 48, 32]]))


@pytest.mark.parametrize("attention", ["da", None])
def test_channels_last_gives_the_same_losses(attention):
    torch.manual_seed(1)
    model = small(attention)
    images, wanted = [torch.rand(3, 64, 64) for _ in range(2)], [targets((4, 4, 30, 40))] * 2
    expected = model(images, wanted)
    features = []
    hook = lambda module, arguments, out: features.extend(out.values())  # noqa: E731
    model.backbone.register_forward_hook(hook)
    got = model.to(memory_format=torch.channels_last)(images, wanted)
    assert all(f.is_contiguous(memory_format=torch.channels_last) for f in features)
    for name, loss in expected.items():
        torch.testing.assert_close(got[name], loss, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mapping", MAPPINGS)
def test_autocast_keeps_losses_and_boxes_in_float32(mapping):
    model = small(mapping=mapping)
    images, wanted = [torch.rand(3, 64, 64) for _ in range(2)], [targets((4, 4, 30, 40))] * 2
    expected = model(images, wanted)
    with torch.autocast("cpu", torch.bfloat16):
        losses = model(images, wanted)
    for name, loss in losses.items():
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, expected[name], rtol=0.05, atol=0.05)
    sum(losses.values()).backward()
    _, exact = maps_and_boxes(model, 64)
    with torch.autocast("cpu", torch.bfloat16):
        _, boxes = maps_and_boxes(model, 64)
        (found,) = model([images[0]])
    assert torch.equal(boxes, exact)
    assert found["boxes"].dtype == found["scores"].dtype == torch.float32


@pytest.mark.parametrize("attention", ["da", None, "se"])
def test_blocks_are_fused_where_that_is_the_same(fused_cpu, attention):
    torch.manual_seed(1)
    plain = small(attention, fused=False).double()
    fused = small(attention).double()
    fused.load_state_dict(plain.state_dict())
    plain.load_state_dict(fused.state_dict())
    assert len(unfused_blocks(plain)) == 6  # the network ends after layer3
    assert len(unfused_blocks(fused)) == (6 if attention == "se" else 0)
    images, wanted = (
        [torch.rand(3, 64, 64).double() for _ in range(2)],
        [targets((4, 4, 30, 40))] * 2,
    )
    losses = [model(images, wanted) for model in (plain, fused)]
    for name, loss in losses[0].items():
        torch.testing.assert_close(losses[1][name], loss, rtol=1e-6, atol=1e-8)
    found = [model.eval()(images[:1])[0]["scores"] for model in (plain, fused)]
    torch.testing.assert_close(*found)


def test_learns_one_image():
    torch.manual_seed(0)
    model = small(size=32)
    image = torch.zeros(3, 32, 32)
    image[0, 5:20, 10:25] = 1
    box = (10.0, 5.0, 25.0, 20.0)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for _ in range(20):
        optimizer.zero_grad()
        sum(model([image, image], [targets(box)] * 2).values()).backward()
        optimizer.step()
    (found,) = model.train(False)([image])
    assert found["labels"][0] == 1
    torch.testing.assert_close(found["boxes"][0], torch.tensor(box), atol=2, rtol=0)


def test_from_one_seed_all_but_the_attention_starts_the_same():
    states = []
    for attention in ("da", "se", "eca", "fca", None):
        torch.manual_seed(5)
        states.append(small(attention).state_dict())
    *rest, plain = states
    for state in rest:
        assert len(state) > len(plain)
        assert all(torch.equal(state[key], value) for key, value in plain.items())


def test_backbone_takes_weights_of_a_classifier_of_any_number_of_classes(caplog):
    plain = plain_resnet18(num_classes=7)
    body = small(None, weights=plain.state_dict()).backbone.body
    assert torch.equal(body.layer3[1].conv2.weight, plain.layer3[1].conv2.weight)
    headless = {k: v for k, v in da_resnet18().state_dict().items() if not k.startswith("fc")}
    body = small("da", weights=headless).backbone.body
    assert torch.equal(body.conv1.weight, headless["conv1.weight"])
    assert not caplog.records
    small("da", weights=plain.state_dict())
    assert "has no attention" in caplog.text


def test_backbone_refuses_weights_of_another_network():
    state = plain_resnet18(num_classes=7).state_dict()
    del state["conv1.weight"]
    with pytest.raises(ValueError, match=r"missing: conv1\.weight"):
        small(None, weights=state)


def test_mapping_c4_ends_after_layer3_at_a_stride_of_8():
    body = small().backbone.body
    assert not hasattr(body, "layer4")
    assert {m.stride for m in body.layer3.modules() if isinstance(m, nn.Conv2d)} == {(1, 1)}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 31}, "size must be at least 32 pixels, got 31"),
        ({"size": "64"}, "size must be a positive int, got '64'"),
        ({"num_classes": 2.5}, "num_classes must be a positive int, got 2.5"),
        (
            {"score_tresh": 0.9},
            "SSD, image_mean, .* score_thresh, .* got score_tresh; leave these out",
        ),
        ({"_skip_resize": True}, "options of torchvision's SSD, .* got _skip_resize"),
        ({"head": None}, "options of torchvision's SSD, .* got head"),
        ({"backend": "nope"}, "backend must be 'auto' or one of .* got 'nope'"),
        ({"mapping": "c5"}, "mapping must be one of c4, c3c4c5, got 'c5'"),
        ({"num_classes": 1}, "num_classes counts the background"),
        ({"order": "spatial", "attention": "se"}, "order goes with attention='da'"),
    ],
)
def test_unknown_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        small(**options)


def test_unknown_backbones_are_refused():
    with pytest.raises(ValueError, match=r"backbone must be one of resnet18, .* got 'vgg16'"):
        ssd("vgg16")
