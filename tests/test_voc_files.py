"""The VOC reader takes names and encodings as people and tools write them."""

import numpy as np
import pytest
from PIL import Image

from da_ops.detection.augment import eval_transforms
from da_ops.detection.loading import StepSampler, training_loader
from da_ops.detection.voc import BadFileError, read_classes

from .devkit import DOG, HARD_CAT, Devkit


@pytest.fixture
def devkit(tmp_path):
    return Devkit(tmp_path / "VOCdevkit")


def box(width):
    """A dog whose box tells which annotation was read."""
    return {**DOG, "box": (1, 1, width, 10)}


def widths(data):
    return [int(a.boxes[0, 2]) for a in data.annotations.values()]


# Names


@pytest.mark.parametrize("name", ["traffic light", "stop  sign", "vélo à moteur", "a/b", "1"])
def test_a_class_is_a_line(devkit, name):
    devkit.add("a", {**DOG, "name": f" {name}\n"})
    (devkit.root / "classes.txt").write_text(f"person\n  {name} \n\n", encoding="utf-8")
    classes = read_classes(devkit.root)
    assert classes == ("person", name)
    data = devkit.read(classes=classes)
    assert data[0][1]["labels"].tolist() == [2]
    assert data.counts() == {"person": 0, name: 1}


NAMES = ["img 1", "img  2", "a/b/c", "a/b d", "v1.2", "é", "000001.v2", "1", "0 -1", "x.jpg.y"]


def test_an_image_is_a_line(devkit):
    for width, name in enumerate(NAMES, 10):
        devkit.add(name, box(width))
    data = devkit.read()
    assert data.image_ids == tuple(f"2007/{name}" for name in NAMES)
    assert widths(data) == list(range(10, 20))
    for index, name in enumerate(NAMES):
        image, target = data[index]
        assert target["image_id"] == f"2007/{name}"
        with Image.open(devkit.image(name)) as expected:
            assert np.array_equal(image.permute(1, 2, 0).numpy(), np.asarray(expected))


def test_such_names_go_through_loading_in_workers(devkit):
    for name in ("img 1", "a/b"):
        devkit.add(name, DOG)
    data = devkit.read(transforms=eval_transforms())
    loader = training_loader(data, StepSampler(2, 2, 0, 1, seed=0), workers=1, cuda=False)
    ((_, targets),) = loader
    assert sorted(t["image_id"] for t in targets) == ["2007/a/b", "2007/img 1"]


@pytest.mark.parametrize("split", ["trainval", "my_split", "dog_some"])
@pytest.mark.parametrize("numbers", [(1, 2), (0, 1), (1, -1), (1,)])
def test_numbered_images_are_never_one_image_without_the_number(devkit, split, numbers):
    devkit.add("img", box(10), split="other")
    for number in numbers:
        devkit.add(f"img {number}", box(20 + number), split=split)
    data = devkit.read([("2007", split)])
    assert data.image_ids == tuple(f"2007/img {number}" for number in numbers)
    assert widths(data) == [20 + number for number in numbers]
    for number in numbers:
        devkit.annotation(f"img {number}").unlink()
        devkit.image(f"img {number}").unlink()
    if len(numbers) > 1 or split != "dog_some":
        with pytest.raises(BadFileError, match=rf"img {numbers[0]}\.xml: cannot be read"):
            devkit.read([("2007", split)])
        with pytest.raises(BadFileError, match="got none that can be used"):
            devkit.read([("2007", split)], skip_bad=True)


def test_a_missing_numbered_image_leaves_the_others(devkit):
    for name in ("img", "img 1", "img 2"):
        devkit.add(name, DOG, split="all")
    devkit.split().write_text("img 1\nimg 2\n")
    devkit.annotation("img 1").unlink()
    assert devkit.read(skip_bad=True).image_ids == ("2007/img 2",)


@pytest.mark.parametrize("name", ["dog", "traffic light"])
def test_sets_of_a_class_say_after_each_name_whether_it_is_there(devkit, name):
    names = ["000005", "img 1", "a/b c", "2008_000001"]
    for image in names:
        devkit.add(image, DOG)
    flags = [f"{image} {flag:2d}" for image, flag in zip(names, (1, -1, 0, -1))]
    devkit.split(f"{name}_trainval").write_text("\n".join(flags) + "\n\n")
    data = devkit.read([("2007", f"{name}_trainval")], classes=("dog", "traffic light"))
    assert data.image_ids == tuple(f"2007/{image}" for image in names)


def test_an_image_listed_twice_counts_once(devkit, caplog):
    devkit.add("a", DOG)
    devkit.add("b", DOG)
    devkit.image("b").unlink()
    devkit.split().write_text("a\nb\na\nb\n")
    devkit.split("dog_trainval").write_text("a  1\na  1\n")
    both = [("2007", "trainval"), ("2007", "dog_trainval")]
    assert devkit.read(both, skip_bad=True).image_ids == ("2007/a",)
    assert "skipped 1 of 2 images" in caplog.text


@pytest.mark.parametrize(
    "suffix", [".JPG", ".jpeg", ".JPEG", ".Jpg", ".png", ".PNG", ".bmp", ".tif", ".TIFF", ".webp"]
)
@pytest.mark.parametrize("name", ["a", "sub/v1.2"])
def test_pictures_of_other_kinds_are_found(devkit, name, suffix):
    devkit.add(name, DOG, suffix=suffix)
    image, target = devkit.read(skip_bad=True)[0]
    assert image.shape == (3, 48, 60) and target["image_id"] == f"2007/{name}"


def test_jpg_is_taken_before_others(devkit):
    devkit.add("a", DOG)
    for suffix in (".png", ".bmp", ".PNG"):
        Image.new("RGB", (60, 48), "red").save(devkit.image("a", suffix=suffix))
    with Image.open(devkit.image("a")) as expected:
        assert np.array_equal(devkit.read()[0][0].permute(1, 2, 0).numpy(), np.asarray(expected))


@pytest.mark.parametrize("listed", ["a.jpg", "a.JPG", "a.Png", "sub/a.png"])
def test_a_name_may_be_listed_with_its_suffix(devkit, listed):
    """Beside one of another kind, the picture is the one that is listed."""
    name, suffix = listed.rsplit(".", 1)
    devkit.add(name, box(33), suffix="." + suffix)
    other = ".png" if suffix.lower() == "jpg" else ".jpg"
    Image.new("RGB", (60, 48), "red").save(devkit.image(name, suffix=other))
    devkit.split().write_text(f"{listed}\n")
    data = devkit.read()
    assert data.image_ids == (f"2007/{listed}",) and widths(data) == [33]
    with Image.open(devkit.image(name, suffix="." + suffix)) as expected:
        assert np.array_equal(data[0][0].permute(1, 2, 0).numpy(), np.asarray(expected))


@pytest.mark.parametrize(("listed", "missing"), [("a", "a.jpg"), ("a.PNG", "a.PNG")])
def test_a_missing_picture_is_named_as_it_should_be_there(devkit, listed, missing):
    devkit.add("a", DOG)
    devkit.image("a").unlink()
    devkit.split().write_text(f"{listed}\n")
    with pytest.raises(BadFileError, match=rf"JPEGImages/{missing}: there is no such file"):
        devkit.read()[0]
    devkit.annotation("a").rename(devkit.annotation("a").with_suffix(".XML"))
    assert len(devkit.read()) == 1


# Encodings of lists

ENCODINGS = ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "latin-1"]


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_lists_are_read_in_any_encoding_that_can_be_told(devkit, encoding, end):
    names = ("bête 1", "über", "z")
    for width, name in enumerate(names, 20):
        devkit.add(name, {**box(width), "name": "vélo"})
    (devkit.root / "classes.txt").write_bytes(end.join(("chien", "vélo")).encode(encoding))
    devkit.split().write_bytes((end.join(names) + end).encode(encoding))
    classes = read_classes(devkit.root)
    assert classes == ("chien", "vélo")
    data = devkit.read(classes=classes)
    assert data.image_ids == tuple(f"2007/{name}" for name in names)
    assert widths(data) == [20, 21, 22]


def test_big_endian_lists_with_a_mark_and_lists_joined_with_theirs(devkit):
    devkit.add("猫", DOG)
    devkit.add("b", DOG)
    devkit.split().write_bytes("\ufeff猫\nb\n".encode("utf-16-be"))
    assert devkit.read().image_ids == ("2007/猫", "2007/b")
    devkit.split().write_bytes("\ufeff猫\n\ufeffb\n".encode())
    assert devkit.read().image_ids == ("2007/猫", "2007/b")


def test_windows_own_characters_are_read(devkit):
    devkit.add("l’été – 5 €", DOG)
    devkit.split().write_bytes("l’été – 5 €\r\n".encode("cp1252"))
    assert devkit.read().image_ids == ("2007/l’été – 5 €",)


BAD_TEXT = {
    "utf-16 cut": "\ufeffab".encode("utf-16-le")[:-1],
    "no utf-8": b"\xef\xbb\xbf\xff\xfe\xfd",
    "no text": b"a\0\0\0\0b\0",
    "half a pair": b"\xff\xfe\x00\xd8a\0",
}


@pytest.mark.parametrize("case", BAD_TEXT)
def test_a_list_that_is_no_text_is_named(devkit, case):
    devkit.add("a", DOG)
    for path, action in (
        (devkit.split(), devkit.read),
        (devkit.root / "classes.txt", lambda: read_classes(devkit.root)),
    ):
        path.write_bytes(BAD_TEXT[case])
        with pytest.raises(BadFileError, match=rf"{path.name}: expected text.*save it as UTF-8"):
            action()


# Annotations


def xml(*objects, encoding=None, path="x"):
    """An annotation as labelling tools write it: with a prolog, and a path from their machine."""
    prolog = f'<?xml version="1.0" encoding="{encoding}"?>\n' if encoding else ""
    text = Devkit.xml((60, 48), objects)
    return prolog + text.replace("<size>", f"<path>{path}</path><size>")


@pytest.mark.parametrize(
    ("declared", "written"),
    [
        ("gb2312", "gb2312"),
        ("GB2312", "gb18030"),  # as Windows and browsers understand the name
        ("gbk", "gbk"),
        ("big5", "big5"),
        ("euc-kr", "euc-kr"),
        ("Shift_JIS", "shift_jis"),
        ("UTF-8", "utf-8-sig"),
        ("UTF-16", "utf-16"),
        ("utf-16", "utf-16-le"),
        ("utf-16", "utf-8"),  # .NET's way to say what it does not do
        ("gb2312", "utf-8-sig"),
        ("ISO-8859-1", "latin-1"),
        ("windows-1252", "cp1252"),
        ("cp437", "cp437"),
        (None, "utf-8"),
        (None, "utf-16"),
        (None, "latin-1"),
    ],
)
def test_annotations_are_read_in_any_encoding_that_python_knows(devkit, declared, written):
    words = {"gb18030": "鎔", "gb2312": "猫", "gbk": "猫", "big5": "貓", "shift_jis": "猫"}
    name = words.get(written, "고양이" if written == "euc-kr" else "ténia")
    devkit.add("a")
    text = xml({**DOG, "name": name}, encoding=declared)
    devkit.annotation("a").write_bytes(text.encode(written))
    assert devkit.read(classes=("dog", name))[0][1]["labels"].tolist() == [2]


BAD_XML = {
    "unknown encoding": (
        xml(DOG, encoding="x-mac-klingon").encode(),
        "expected an encoding that Python knows, got 'x-mac-klingon'",
    ),
    "no encoding of text": (
        xml(DOG, encoding="hex").encode(),
        "expected an encoding that Python knows, got 'hex'",
    ),
    "others' bytes": (
        xml(DOG, encoding="gb2312", path="\xff").encode("latin-1"),
        "expected text in gb2312, got",
    ),
    "no ascii": (xml(DOG, encoding="ascii", path="é").encode(), "expected text in ascii, got"),
    "cut": (xml(DOG).encode("utf-16")[:-1], "expected text in utf-16, got"),
    "no text": (bytes(100), "expected text, got zero bytes"),
    "empty": (b"", "expected XML, got a broken file"),
    "difficult": (
        xml({**DOG, "difficult": "2"}).encode(),
        "expected 0 or 1, true .* in <difficult> .*'2'",
    ),
    "two boxes": (
        xml(DOG).replace("</bndbox><part>", "</bndbox><bndbox></bndbox><part>").encode(),
        "expected one <bndbox> in <object>, got 2",
    ),
    "two names": (
        xml(DOG).replace("<pose>", "<name>cat</name><pose>").encode(),
        "expected one <name> in <object>, got 2",
    ),
    "two corners": (
        xml(DOG).replace("<xmin>", "<xmin>1</xmin><xmin>").encode(),
        "expected one <xmin> in <bndbox>, got 2",
    ),
    "two flags": (
        xml(DOG).replace("<difficult>", "<difficult>1</difficult><difficult>").encode(),
        "expected one <difficult> in <object>, got 2",
    ),
    "two sizes": (
        xml(DOG).replace("<size>", "<size/><size>").encode(),
        "expected one <size> in <annotation>, got 2",
    ),
}


@pytest.mark.parametrize("case", BAD_XML)
def test_what_cannot_be_read_is_named_and_skipped(devkit, case):
    data, message = BAD_XML[case]
    devkit.add("a")
    devkit.add("b")
    devkit.annotation("a").write_bytes(data)
    with pytest.raises(BadFileError, match=rf"a\.xml: {message}.*--skip-bad"):
        devkit.read()
    assert devkit.read(skip_bad=True).image_ids == ("2007/b",)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1", True),
        (" 1\n", True),
        ("true", True),
        ("True", True),
        ("TRUE", True),
        ("yes", True),
        ("0", False),
        ("false", False),
        ("False", False),
        ("no", False),
        ("", False),
    ],
)
def test_difficult_in_words(devkit, text, expected):
    devkit.add("a", {**HARD_CAT, "difficult": text})
    assert devkit.read()[0][1]["difficult"].tolist() == [expected]


def test_an_object_without_the_flag_is_not_difficult(devkit):
    devkit.add("a", DOG)
    devkit.annotation("a").write_text(xml(DOG).replace("<difficult>0</difficult>", ""))
    assert devkit.read()[0][1]["difficult"].tolist() == [False]
