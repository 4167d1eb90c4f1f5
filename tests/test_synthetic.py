"""Generated data: pictures that are functions of seed and number, in exactly VOC's format."""

import hashlib
from xml.etree import ElementTree

import numpy as np
import pytest
import torchvision
from PIL import Image

from da_ops.cli import main
from da_ops.detection import photographs, synthetic
from da_ops.detection.drawing import CLASSES, CLUTTER, LEAVES, PATTERNS, SHAPES, draw
from da_ops.detection.synthetic import make_data, picture
from da_ops.detection.voc import VOCDetection, available_splits, read_classes

GREY = np.full(3, 128.0)


def digests(root):
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("data") / "made", train=20, test=6, size=64, seed=1)


def test_a_picture_is_a_function_of_seed_number_and_split():
    pixels, things = picture(3, 5, size=64)
    again, same = picture(3, 5, size=64)
    assert np.array_equal(pixels, again) and things == same
    for other in (
        picture(4, 5, size=64),
        picture(3, 6, size=64),
        picture(3, 5, size=64, split="test"),
    ):
        assert not np.array_equal(other[0], pixels)


def test_files_are_the_same_for_the_same_arguments(data, tmp_path):
    again = make_data(tmp_path / "again", train=20, test=6, size=64, seed=1)
    assert digests(again) == digests(data)
    other = make_data(tmp_path / "other", train=20, test=6, size=64, seed=2)
    assert digests(other) != digests(data)


def test_more_pictures_leave_the_first_ones_as_they_are(data, tmp_path):
    fewer = digests(make_data(tmp_path / "fewer", train=3, test=2, size=64, seed=1))
    more = digests(data)
    pictures = [name for name in fewer if name.endswith(("jpg", "xml"))]
    assert len(pictures) == 10
    assert all(fewer[name] == more[name] for name in pictures)


def test_the_tree_is_vocs(data):
    year = data / "VOCdevkit" / "VOC2007"
    assert {p.name for p in year.iterdir()} == {"Annotations", "ImageSets", "JPEGImages"}
    assert available_splits(data) == [("2007", s) for s in ("test", "train", "trainval", "val")]
    names = {
        split: (year / "ImageSets/Main" / f"{split}.txt").read_text().split()
        for split in ("train", "val", "trainval", "test")
    }
    assert len(names["trainval"]) == 20 and len(names["test"]) == 6
    assert sorted(names["train"] + names["val"]) == names["trainval"]
    assert not set(names["trainval"]) & set(names["test"])
    for folder, suffix in (("Annotations", ".xml"), ("JPEGImages", ".jpg")):
        found = {path.name for path in (year / folder).iterdir()}
        assert found == {name + suffix for name in names["trainval"] + names["test"]}


def test_annotations_have_all_fields_of_vocs(data):
    root = ElementTree.parse(data / "VOCdevkit/VOC2007/Annotations/000000.xml").getroot()
    assert [e.tag for e in root][:6] == [
        "folder",
        "filename",
        "source",
        "owner",
        "size",
        "segmented",
    ]
    thing = root.find("object")
    fields = ["name", "pose", "truncated", "occluded", "difficult", "bndbox"]
    assert [e.tag for e in thing] == fields
    assert [e.tag for e in thing.find("bndbox")] == ["xmin", "ymin", "xmax", "ymax"]


def test_this_librarys_reader_finds_what_was_drawn(data):
    assert read_classes(data) == CLASSES
    for split, count in (("trainval", 20), ("test", 6)):
        read = VOCDetection(data, [("2007", split)], classes=read_classes(data), skip_bad=True)
        assert len(read) == count
        for index, (image, target) in enumerate(read):
            pixels, things = picture(1, index, split=split, size=64)
            assert target["boxes"].tolist() == [list(thing.box) for thing in things]
            assert [CLASSES[k - 1] for k in target["labels"]] == [thing.name for thing in things]
            assert target["difficult"].tolist() == [thing.difficult for thing in things]
            difference = image.permute(1, 2, 0).numpy().astype(float) - pixels
            assert np.abs(difference).mean() < 12  # JPEG's loss


def test_torchvisions_reader_takes_it_as_voc2007(data):
    for split, count in (("trainval", 20), ("test", 6)):
        read = torchvision.datasets.VOCDetection(str(data), year="2007", image_set=split)
        assert len(read) == count
        image, annotation = read[0]
        assert image.size == (64, 64)
        assert annotation["annotation"]["object"][0]["name"] in CLASSES


def test_sets_of_a_class_say_where_it_is(data):
    read = VOCDetection(data, [("2007", "test")], classes=CLASSES)
    for label, name in enumerate(CLASSES, 1):
        lines = (
            (data / f"VOCdevkit/VOC2007/ImageSets/Main/{name}_test.txt").read_text().splitlines()
        )
        for line, (_, target) in zip(lines, read):
            difficult = target["difficult"][target["labels"] == label].tolist()
            expected = -1 if not difficult else 0 if all(difficult) else 1
            assert line.split() == [target["image_id"].split("/")[1], str(expected)]


def test_training_and_test_pictures_have_no_photograph_in_common():
    train, test = synthetic._PHOTOGRAPHS.values()
    assert train and test and not set(train) & set(test)


def test_boxes_are_those_of_what_is_visible():
    seen = set()
    for index in range(150):
        _, things = picture(0, index, size=48)
        assert things
        for thing in things:
            x1, y1, x2, y2 = thing.box
            assert 0 <= x1 < x2 <= 48 and 0 <= y1 < y2 <= 48
            assert max(x2 - x1, y2 - y1) <= 0.9 * 48 + 1
            if min(x2 - x1, y2 - y1) < 8:
                assert thing.difficult
            seen |= {thing.name, ("truncated", thing.truncated), ("occluded", thing.occluded)}
            seen |= {("difficult", thing.difficult)}
    flags = {(flag, value) for flag in ("truncated", "occluded", "difficult") for value in (0, 1)}
    assert seen == {*CLASSES, *flags}


def test_min_scale_leaves_out_small_objects():
    sides = [
        max(x2 - x1, y2 - y1)
        for index in range(60)
        for thing in picture(0, index, size=64, min_scale=0.4)[1]
        if not (thing.truncated or thing.occluded)
        for x1, y1, x2, y2 in [thing.box]
    ]
    assert len(sides) > 20 and min(sides) >= 0.4 * 64 - 2


@pytest.mark.parametrize("most", [1, 2])
def test_most_things_leaves_out_clutter_first(most, monkeypatch):
    drawn = []
    add = synthetic._Scene.add

    def counts(scene, kind, side, rng):
        if added := add(scene, kind, side, rng):
            drawn[-1].append(kind)
        return added

    monkeypatch.setattr(synthetic._Scene, "add", counts)
    objects = []
    for index in range(40):
        drawn.append([])
        objects.append(len(picture(0, index, size=64, most_things=most)[1]))
    assert max(map(len, drawn)) == max(objects) == most
    clutter = [kind for kinds in drawn for kind in kinds if kind in CLUTTER]
    assert bool(clutter) == (most > 1)


def test_there_is_an_object_even_where_one_thing_fills_the_picture():
    """What comes first may be clutter, which then leaves no room."""
    for index in range(40):
        assert picture(0, index, size=32, min_scale=0.85)[1]


@pytest.mark.parametrize("kind", CLASSES + CLUTTER)
def test_a_drawing_fills_its_box_and_stands_out(kind):
    for seed in range(20):
        sprite = draw(kind, 40.0, GREY, np.random.default_rng(seed))
        solid = sprite.alpha > 0.5
        assert abs(max(sprite.alpha.shape) - 40) <= 1
        assert solid[[0, 1, -1, -2]].any(1).any() and sprite.alpha.max() == 1
        assert sprite.colour.min() >= 0 and sprite.colour.max() <= 255
        contrast = np.linalg.norm(sprite.colour[solid] - GREY, axis=1)
        assert np.median(contrast) > 40


@pytest.mark.parametrize("kind", LEAVES + ("greenleaf",))
def test_only_its_own_channel_is_strongest_in_a_leaf(kind):
    channel = {"redleaf": 0, "greenleaf": 1, "blueleaf": 2}[kind]
    for seed in range(30):
        sprite = draw(kind, 30.0, GREY, np.random.default_rng(seed))
        assert (sprite.colour[sprite.alpha > 0.5].argmax(1) == channel).all()


def test_patterns_have_two_colours_and_shapes_one():
    def spread(kind, seed):
        sprite = draw(kind, 60.0, GREY, np.random.default_rng(seed))
        direction = sprite.colour[sprite.alpha > 0.9]
        return np.linalg.norm(direction.std(0))

    for seed in range(20):
        assert max(spread(kind, seed) for kind in SHAPES) < min(
            spread(kind, seed) for kind in PATTERNS
        )


def test_an_existing_folder_is_left_alone(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "work.txt").write_text("kept")
    with pytest.raises(FileExistsError, match="mine exists and is left alone"):
        make_data(tmp_path / "mine", train=1, test=1)
    assert digests(tmp_path) == {"mine/work.txt": digests(tmp_path / "mine")["work.txt"]}


def test_nothing_half_done_is_left(tmp_path, monkeypatch):
    def fails(*args, **options):
        if args[1] == 2:
            raise KeyboardInterrupt
        return picture(*args, **options)

    monkeypatch.setattr(synthetic, "picture", fails)
    with pytest.raises(KeyboardInterrupt):
        make_data(tmp_path / "made", train=5, test=1, size=32)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train": 0}, "train: expected 1 to 500000 pictures, got 0"),
        ({"test": 500_001}, "test: expected 1 to 500000 pictures, got 500001"),
        ({"size": 31}, "size must be at least 32 pixels, got 31"),
        ({"min_scale": 0.9}, "min_scale must be above 0 and below 0.9, got 0.9"),
        ({"most_things": 0}, "most_things must be at least 1, got 0"),
        ({"seed": -1}, "seed must be 0 or more, got -1"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        make_data(tmp_path / "made", **options)
    assert list(tmp_path.iterdir()) == []


def test_the_command(tmp_path, capsys):
    out = tmp_path / "a" / "made"
    line = f"make-data {out} --train 3 --test 2 --size 32 --seed 4 --min-scale 0.3 --most-things 1"
    assert main(line.split()) == 0
    assert "3 pictures for training, 2 for testing" in capsys.readouterr().out
    pixels, _ = picture(4, 1, split="test", size=32, min_scale=0.3, most_things=1)
    with Image.open(out / "VOCdevkit/VOC2007/JPEGImages/500001.jpg") as image:
        assert np.abs(np.asarray(image) - pixels.astype(float)).mean() < 15
    assert main(line.split()) == 1
    assert "exists and is left alone" in capsys.readouterr().err


def test_photographs_that_are_not_installed_are_named(monkeypatch):
    with pytest.raises(RuntimeError, match="got none of mona_lisa; pip install scikit-image"):
        photographs.photographs(["brick", "mona_lisa"])
    monkeypatch.setattr(photographs, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match="pip install scikit-image scikit-learn"):
        photographs.photographs()
