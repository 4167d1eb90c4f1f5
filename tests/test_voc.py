"""The VOC reader and its augmentation: what it makes of good data, and of bad."""

import logging
import pickle
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import tv_tensors

from da_ops.detection.augment import eval_transforms, train_transforms
from da_ops.detection.voc import (
    VOC_CLASSES,
    BadFileError,
    VOCDetection,
    available_splits,
    collate,
    read_classes,
)

from .devkit import DOG, HARD_CAT, Devkit


@pytest.fixture
def devkit(tmp_path):
    kit = Devkit(tmp_path / "VOCdevkit")
    kit.add("000005", DOG, HARD_CAT)
    kit.add("000007")
    kit.add("2008_000001", DOG, year="2012", size=(40, 70))
    return kit


def test_an_image_and_its_objects(devkit):
    image, target = devkit.read()[0]
    assert isinstance(image, tv_tensors.Image) and isinstance(
        target["boxes"], tv_tensors.BoundingBoxes
    )
    assert image.dtype == torch.uint8 and image.shape == (3, 48, 60)
    # Pixels 10 to 30 counted from 1 are those between the edges 9 and 30.
    assert target["boxes"].tolist() == [[9, 19, 30, 40], [0, 0, 60, 48]]
    assert target["boxes"].dtype == torch.float32 and target["boxes"].canvas_size == (48, 60)
    assert target["labels"].tolist() == [1 + VOC_CLASSES.index(c) for c in ("dog", "cat")]
    assert target["labels"].dtype == torch.int64
    assert target["difficult"].tolist() == [False, True]
    assert target["image_id"] == "2007/000005"
    with Image.open(devkit.image("000005")) as expected:
        assert np.array_equal(image.permute(1, 2, 0).numpy(), np.asarray(expected))


def test_an_image_without_objects(devkit):
    _, target = devkit.read()[1]
    assert target["boxes"].shape == (0, 4)
    assert target["labels"].shape == target["difficult"].shape == (0,)


def test_by_default_trainval_of_both_years_of_the_devkit_or_of_its_parent(devkit):
    for root in (devkit.root, devkit.root.parent):
        data = VOCDetection(root)
        assert data.image_ids == ("2007/000005", "2007/000007", "2012/2008_000001")
        assert data[2][0].shape == (3, 70, 40)
        assert data.counts() == {c: {"dog": 2, "cat": 1}.get(c, 0) for c in VOC_CLASSES}


def test_twenty_classes():
    assert len(VOC_CLASSES) == 20 and list(VOC_CLASSES) == sorted(VOC_CLASSES)


def test_classes_come_from_the_data_if_it_says_so(devkit):
    assert read_classes(devkit.root) == VOC_CLASSES
    (devkit.root / "classes.txt").write_text("cat\ndog\n")
    assert read_classes(devkit.root.parent) == ("cat", "dog")
    assert devkit.read(classes=("cat", "dog"))[0][1]["labels"].tolist() == [2, 1]
    (devkit.root / "classes.txt").write_text("cat\ncat\n")
    with pytest.raises(BadFileError, match=r"classes\.txt: expected one class name a line"):
        read_classes(devkit.root)


def test_collate_and_pickle(devkit):
    data = pickle.loads(pickle.dumps(VOCDetection(devkit.root)))
    images, targets = collate([data[0], data[2]])
    assert [i.shape[1:] for i in images] == [(48, 60), (70, 40)]
    assert [t["image_id"] for t in targets] == ["2007/000005", "2012/2008_000001"]


def test_sets_of_one_class_can_be_read_too(devkit):
    path = devkit.root / "VOC2007/ImageSets/Main/dog_trainval.txt"
    path.write_text("000005  1\n000007 -1\n\n")
    assert len(devkit.read([("2007", "dog_trainval")])) == 2
    assert available_splits(devkit.root) == [("2007", "trainval"), ("2012", "trainval")]


def test_a_folder_without_voc_is_named(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"nowhere: expected VOC's VOCdevkit folder.*no such"
    ):
        VOCDetection(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"expected VOC's VOCdevkit folder.*it has none"):
        VOCDetection(tmp_path)


def test_a_missing_split_is_named_with_those_that_exist(devkit):
    message = r"test\.txt: there is no such split, expected one of 2007 trainval, 2012 trainval"
    with pytest.raises(FileNotFoundError, match=message):
        devkit.read([("2007", "test")])


@pytest.mark.parametrize("splits", ["trainval", ("2007", "trainval"), ["07"], [("2007",)]])
def test_splits_that_are_no_pairs_are_refused(devkit, splits):
    with pytest.raises(ValueError, match=r"splits: expected a \(year, split\) each, .* got"):
        devkit.read(splits)


def test_an_empty_split_is_refused(devkit):
    (devkit.root / "VOC2007/ImageSets/Main/val.txt").write_text("\n")
    with pytest.raises(BadFileError, match="expected images in 2007 val, got none"):
        devkit.read([("2007", "val")])


BAD_ANNOTATIONS = {
    "broken": ("<annotation><size>", "expected XML, got a broken file"),
    "no size": ("<annotation></annotation>", "expected a number in <size/height>"),
    "empty size": (Devkit.xml((0, 48), []), "expected a size of at least 1x1, got 0x48"),
    "unknown class": (
        Devkit.xml((60, 48), [{**DOG, "name": "wolf"}]),
        "unknown class 'wolf', expected one of aeroplane, bicycle",
    ),
    "no width": (
        Devkit.xml((60, 48), [{**DOG, "box": (10, 20, 9, 40)}]),
        "a dog has an empty box, xmin 10, ymin 20, xmax 9, ymax 40",
    ),
    "upside down": (
        Devkit.xml((60, 48), [{**DOG, "box": (10, 40, 30, 20)}]),
        "a dog has an empty box",
    ),
    "outside": (
        Devkit.xml((60, 48), [{**DOG, "box": (10, 20, 65, 40)}]),
        "a dog has a box out of the image, xmin 10, .* xmax 65, ymax 40 in 60x48",
    ),
    "no number": (
        Devkit.xml((60, 48), [{**DOG, "box": (10, 20, "x", 40)}]),
        "expected a number in <bndbox/xmax> of <object>, got 'x'",
    ),
}


@pytest.mark.parametrize("case", BAD_ANNOTATIONS)
def test_a_bad_annotation_is_named_with_what_is_wrong_and_what_to_do(devkit, case):
    text, message = BAD_ANNOTATIONS[case]
    devkit.annotation("000005").write_text(text)
    with pytest.raises(BadFileError, match=rf"000005\.xml: {message}.*--skip-bad"):
        devkit.read()
    assert devkit.read(skip_bad=True).image_ids == ("2007/000007",)


def test_a_missing_annotation_is_named(devkit):
    devkit.annotation("000005").unlink()
    with pytest.raises(BadFileError, match=r"000005\.xml: cannot be read .*--skip-bad"):
        devkit.read()


def truncate(path):
    path.write_bytes(path.read_bytes()[:-500])


BAD_IMAGES = {
    "missing": (lambda path: path.unlink(), "there is no such file, though a split lists it"),
    "empty": (
        lambda path: path.write_bytes(b""),
        "expected an image file, got one that cannot be read",
    ),
    "truncated": (truncate, "expected an image file, got one that cannot be read"),
    "other size": (
        lambda path: Image.new("RGB", (48, 60)).save(path),
        "is 48x60, its annotation says 60x48",
    ),
}


@pytest.mark.parametrize("case", BAD_IMAGES)
def test_a_bad_image_is_named_when_it_is_read(devkit, case):
    damage, message = BAD_IMAGES[case]
    damage(devkit.image("000005"))
    data = devkit.read()
    with pytest.raises(BadFileError, match=rf"000005\.jpg: {message}.*--skip-bad"):
        data[0]
    assert devkit.read(skip_bad=True).image_ids == ("2007/000007",)


def test_what_is_skipped_is_counted_and_named(devkit, caplog):
    devkit.image("000005").unlink()
    devkit.annotation("2008_000001", "2012").write_text("<")
    with caplog.at_level(logging.INFO, "da_ops"):
        data = VOCDetection(devkit.root, skip_bad=True)
    assert len(data) == 1
    *each, summary = [record.getMessage() for record in caplog.records]
    assert "000005.jpg" in each[0] and "2008_000001.xml" in each[1]
    assert "skipped 2 of 3 images, the first because of" in summary and "000005.jpg" in summary


def test_if_all_is_bad_there_is_nothing_to_train_on(devkit):
    for name in ("000005", "000007"):
        devkit.image(name).unlink()
    with pytest.raises(BadFileError, match="got none that can be used"):
        devkit.read(skip_bad=True)


def test_a_box_may_be_one_pixel(devkit):
    devkit.add("000009", {**DOG, "box": (10, 20, 10, 20)})
    assert devkit.read()[2][1]["boxes"].tolist() == [[9, 19, 10, 20]]


def test_coordinates_may_be_fractions_and_miss_by_a_pixel(devkit):
    boxes = [{**DOG, "box": box} for box in ((0, 1, 60.5, 49), ("45.70000076", 20, 50, 40))]
    devkit.annotation("000005").write_text(devkit.xml((60, 48), boxes))
    _, target = devkit.read()[0]
    torch.testing.assert_close(
        torch.Tensor(target["boxes"]), torch.tensor([[0, 0, 60, 48], [44.70000076, 19, 50, 40]])
    )


def test_grey_images_have_three_channels(devkit):
    Image.new("L", (60, 48), 77).save(devkit.image("000005"))
    image, _ = devkit.read()[0]
    assert image.shape == (3, 48, 60) and (image == 77).all()


def scene():
    """Objects whose label, and whether they are difficult, can be told from their colour."""
    pixels = torch.zeros(3, 80, 100, dtype=torch.uint8)
    boxes = [(5, 5, 35, 30), (60, 10, 95, 40), (10, 45, 45, 75), (55, 50, 90, 78)]
    for label, (x1, y1, x2, y2) in enumerate(boxes, 1):
        pixels[:, y1:y2, x1:x2] = 50 * label
    target = {
        "boxes": tv_tensors.BoundingBoxes(
            torch.tensor(boxes, dtype=torch.float32), format="XYXY", canvas_size=(80, 100)
        ),
        "labels": torch.arange(1, 5),
        "difficult": torch.tensor([False, True, False, True]),
        "image_id": "2007/000001",
    }
    return tv_tensors.Image(pixels), target


def test_labels_and_difficult_stay_with_their_boxes(monkeypatch):
    monkeypatch.setattr(
        "torchvision.transforms.v2.RandomPhotometricDistort.forward", lambda s, *x: x
    )
    transforms = train_transforms(64)
    counts = set()
    for seed in range(60):
        torch.manual_seed(seed)
        image, target = transforms(*scene())
        assert image.dtype == torch.float32 and image.shape == (3, 64, 64)
        assert image.min() >= 0 and image.max() <= 1
        assert len(target["boxes"]) == len(target["labels"]) == len(target["difficult"])
        counts.add(len(target["boxes"]))
        assert torch.equal(target["difficult"], target["labels"] % 2 == 0)
        for (x1, y1, x2, y2), label in zip(target["boxes"].tolist(), target["labels"]):
            assert 0 <= x1 < x2 <= 64 and 0 <= y1 < y2 <= 64
            if min(x2 - x1, y2 - y1) > 4:
                middle = image[:, int((y1 + y2) / 2), int((x1 + x2) / 2)]
                torch.testing.assert_close(middle, (label * 50 / 255).expand(3), atol=0.05, rtol=0)
    assert counts >= {1, 2, 3, 4}  # some crops lose objects


def test_mirroring_keeps_every_object():
    images, boxes = {}, {}
    for seed in range(20):
        torch.manual_seed(seed)
        image, found = train_transforms(64, "mirror")(*scene())
        first = found["boxes"][0, 0].item()
        images[first], boxes[first] = image, found["boxes"]
        assert torch.equal(found["labels"], scene()[1]["labels"])
    (one, other), (seen, mirrored) = images.values(), boxes.values()
    assert torch.equal(one, other.flip(-1))
    torch.testing.assert_close(seen[:, [0, 2]], 64 - mirrored[:, [2, 0]])
    assert torch.equal(seen[:, [1, 3]], mirrored[:, [1, 3]])


def test_augmentation_is_drawn_from_torchs_generator_alone():
    results = []
    for _ in range(2):
        torch.manual_seed(3)
        results.append(train_transforms(32)(*scene()))
        np.random.default_rng().random()
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1]["boxes"], results[1][1]["boxes"])


def test_unknown_augmentations_are_refused():
    with pytest.raises(ValueError, match="must be one of 'ssd', 'mirror'; got 'none'"):
        train_transforms(64, "none")


def test_augmentation_takes_images_without_objects(devkit):
    _, target = VOCDetection(devkit.root, [("2007", "trainval")], transforms=train_transforms(32))[
        1
    ]
    assert target["boxes"].shape == (0, 4) and target["labels"].shape == (0,)


def test_evaluation_leaves_size_and_boxes_alone():
    image, target = scene()
    got, same = eval_transforms()(image, target)
    torch.testing.assert_close(torch.Tensor(got), torch.Tensor(image).float() / 255)
    assert torch.equal(same["boxes"], target["boxes"]) and same["image_id"] == target["image_id"]


def test_the_tests_devkit_is_well_formed(devkit):
    assert ElementTree.parse(devkit.annotation("000005")).findtext("object/name") == "dog"
