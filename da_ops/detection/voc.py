"""PASCAL VOC: images and boxes from VOC2007, VOC2012, and any data in their format."""

from __future__ import annotations

import logging
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from .files import BadFileError, Files, decoded, read_lines
from .pictures import SUFFIXES, open_picture
from .vision import F, tv_tensors

VOC_CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
    "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train",
    "tvmonitor",
)  # fmt: skip
CLASSES_FILE = "classes.txt"

Target = dict[str, Any]

logger = logging.getLogger("da_ops")


@dataclass(frozen=True)
class Annotation:
    """The objects of one image, as VOC's XML has them."""

    size: tuple[int, int]  # height, width
    boxes: np.ndarray  # float32 [K, 4], x1 y1 x2 y2 of pixel edges, from 0
    labels: np.ndarray  # int64 [K], from 1
    difficult: np.ndarray  # bool [K]


class VOCDetection(Dataset[tuple[tv_tensors.Image, Target]]):
    """Images of one or more splits of VOC, with their objects.

    Item ``i`` is an image uint8 [3, H, W] and a target with

    - ``boxes``: float32 [K, 4], x1 y1 x2 y2, the edges of pixels counted from 0. VOC counts pixels
      from 1 and includes the last: its box 1 to W is the box 0 to W here.
    - ``labels``: int64 [K], 1 for the first of ``classes``
    - ``difficult``: bool [K]
    - ``image_id``: year and name, as ``"2007/000005"``

    where K may be 0. Annotations are read at construction, images when asked for.

    A name is a line of a split's file and may have spaces and slashes; an image that is listed
    twice counts once. Its picture has one of ``pictures.SUFFIXES``, in any case; where there are
    several, the line may have the suffix, or else the first of them in that order is taken.
    Pictures are turned as their EXIF data says, unless only the stored one has the size that its
    annotation gives: :func:`~da_ops.detection.pictures.open_picture` says more, and
    :func:`~da_ops.detection.pictures.to_rgb` how each kind becomes RGB of 8 bits.

    Args:
        root: VOC's ``VOCdevkit`` folder, or the one that holds it.
        splits: (year, split) each; a split is a file in ``ImageSets/Main``. Of VOC's sets of one
            class, such as ``dog_trainval``, all images are taken.
        classes: names of the classes, without the background.
        transforms: of image and target, as those of :mod:`torchvision.transforms.v2`.
        skip_bad: leave out images that are missing or broken, or whose annotation is, and log how
            many. Decodes every image once, at construction.

    Raises:
        ValueError: ``splits`` are no pairs.
        FileNotFoundError: no such folder or split; the message lists the splits that exist.
        BadFileError: a file of the data set that cannot be used, if not ``skip_bad``.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        splits: Sequence[tuple[str, str]] = (("2007", "trainval"), ("2012", "trainval")),
        *,
        classes: Sequence[str] = VOC_CLASSES,
        transforms: Callable[..., Any] | None = None,
        skip_bad: bool = False,
    ) -> None:
        self.root = devkit(root)
        self.splits = tuple(splits)
        if any(isinstance(pair, str) or len(pair) != 2 for pair in self.splits):
            raise ValueError(
                'splits: expected a (year, split) each, as in [("2007", "trainval")], got'
                f" {splits!r}"
            )
        self.classes = tuple(classes)
        self.transforms = transforms
        self.annotations: dict[str, Annotation] = {}
        self._pictures: dict[str, Path] = {}
        labels = {name: label for label, name in enumerate(self.classes, 1)}
        reasons: list[str] = []
        for image_id, xml, picture in self._listed():
            try:
                annotation = read_annotation(xml, labels)
                if skip_bad:
                    _read_image(picture, annotation.size)
            except BadFileError as error:
                if not skip_bad:
                    raise
                reasons.append(str(error))
                logger.info("da_ops: skipped: %s", error)
                continue
            self.annotations[image_id], self._pictures[image_id] = annotation, picture
        self.image_ids = tuple(self.annotations)
        if reasons:
            logger.warning(
                "da_ops: %s: skipped %d of %d images, the first because of %s",
                self.root,
                len(reasons),
                len(reasons) + len(self.image_ids),
                reasons[0],
            )
        if not self.image_ids:
            raise BadFileError(
                f"{self.root}: expected images in {_told(self.splits)}, got none that can be used"
            )

    def __len__(self) -> int:
        return len(self.image_ids)

    def __getitem__(self, index: int) -> tuple[Any, Target]:
        image_id = self.image_ids[index]
        annotation = self.annotations[image_id]
        image = tv_tensors.Image(_read_image(self._pictures[image_id], annotation.size))
        boxes = torch.from_numpy(annotation.boxes.copy())
        target = {
            "boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=annotation.size),
            "labels": torch.from_numpy(annotation.labels.copy()),
            "difficult": torch.from_numpy(annotation.difficult.copy()),
            "image_id": image_id,
        }
        return (image, target) if self.transforms is None else self.transforms(image, target)

    def counts(self) -> dict[str, int]:
        """Objects of each class, the difficult ones too."""
        found = Counter(int(k) for a in self.annotations.values() for k in a.labels)
        return {name: found[label] for label, name in enumerate(self.classes, 1)}

    def _listed(self) -> Iterator[tuple[str, Path, Path]]:
        """Id, annotation and picture of each image that the splits list."""
        seen = set()
        for year, split in self.splits:
            folder = self.root / f"VOC{year}"
            annotations = Files(folder / "Annotations", (".xml",))
            pictures = Files(folder / "JPEGImages", SUFFIXES)
            for name in _names(self.root, year, split, self.classes, annotations):
                if (year, name) not in seen:
                    seen.add((year, name))
                    xml = annotations.find(name) or annotations.path(pictures.stem(name))
                    yield f"{year}/{name}", xml, pictures.path(name)


def collate(batch: Sequence[tuple[Any, Target]]) -> tuple[list[Any], list[Target]]:
    """Images and targets as lists, as torchvision's detectors take them."""
    images, targets = zip(*batch)
    return list(images), list(targets)


def devkit(root: str | os.PathLike[str]) -> Path:
    """The folder with ``VOC2007`` and so on: ``root`` itself, or ``VOCdevkit`` in it.

    Raises:
        FileNotFoundError: neither has any.
    """
    for folder in (Path(root), Path(root) / "VOCdevkit"):
        if any(folder.glob("VOC[0-9]*/ImageSets/Main")):
            return folder
    missing = "there is no such folder" if not Path(root).is_dir() else "it has none"
    raise FileNotFoundError(
        f"{root}: expected VOC's VOCdevkit folder, with VOC2007 or the like and its ImageSets/Main "
        f"in it, but {missing}; give its path, or make such data with `da-ops make-data`"
    )


def available_splits(root: str | os.PathLike[str]) -> list[tuple[str, str]]:
    """(year, split) of each split of whole images, not of a single class, under ``root``."""
    files = devkit(root).glob("VOC[0-9]*/ImageSets/Main/*.txt")
    return sorted((f.parts[-4][3:], f.stem) for f in files if "_" not in f.stem)


def read_classes(root: str | os.PathLike[str]) -> tuple[str, ...]:
    """Names of the data's classes: one a line of ``classes.txt``, VOC's where there is none.

    Raises:
        BadFileError: the file is no text, has no names, or one twice.
    """
    path = devkit(root) / CLASSES_FILE
    if not path.is_file():
        return VOC_CLASSES
    names = tuple(read_lines(path))
    if not names or len(set(names)) < len(names):
        raise BadFileError(f"{path}: expected one class name a line, each once, got {list(names)}")
    return names


def read_annotation(path: Path, labels: dict[str, int]) -> Annotation:
    """Objects of an XML file of VOC; ``labels`` maps names to numbers.

    Raises:
        BadFileError: naming the file, what is wrong with it and what to do.
    """
    try:
        root = ElementTree.fromstring(decoded(path.read_bytes()))
    except OSError as error:
        raise _bad(path, f"cannot be read ({error.strerror})") from None
    except ElementTree.ParseError as error:
        raise _bad(path, f"expected XML, got a broken file ({error})") from None
    except ValueError as error:
        raise _bad(path, str(error)) from None
    size = _number(root, "size/height", path), _number(root, "size/width", path)
    if min(size) < 1:
        raise _bad(path, f"expected a size of at least 1x1, got {size[1]:g}x{size[0]:g}")
    boxes, classes, difficult = [], [], []
    for thing in root.iterfind("object"):
        name = _text(thing, "name", path)
        if name not in labels:
            known = ", ".join(labels)
            raise _bad(path, f"unknown class {name!r}, expected one of {known}")
        x1, y1, x2, y2 = (_number(thing, f"bndbox/{k}", path) for k in _CORNERS)
        if x2 < x1 or y2 < y1:  # both are inside: a box from 10 to 10 has one pixel
            raise _bad(path, f"a {name} has an empty box, {_box_text(x1, y1, x2, y2)}")
        box = np.array((x1 - 1, y1 - 1, x2, y2))
        inside = np.clip(box, 0, (size[1], size[0]) * 2)
        # Rounding, or counting from 0, may miss by a pixel.
        if np.abs(inside - box).max() > 1 or (inside[2:] <= inside[:2]).any():
            told = f"{_box_text(x1, y1, x2, y2)} in {size[1]:g}x{size[0]:g}"
            raise _bad(path, f"a {name} has a box out of the image, {told}")
        boxes.append(inside)
        classes.append(labels[name])
        difficult.append(_flag(thing, "difficult", path))
    return Annotation(
        (int(size[0]), int(size[1])),
        np.array(boxes, np.float32).reshape(-1, 4),
        np.array(classes, np.int64),
        np.array(difficult, bool),
    )


_CORNERS = ("xmin", "ymin", "xmax", "ymax")


def _box_text(*corners: float) -> str:
    return ", ".join(f"{name} {value:g}" for name, value in zip(_CORNERS, corners))


def _text(element: ElementTree.Element, tag: str, path: Path) -> str:
    """The text at ``tag``, a path of names that must each be there once or not at all."""
    found: ElementTree.Element | None = element
    for part in tag.split("/"):
        if found is not None:
            parent, children = found, found.findall(part)
            if len(children) > 1:
                told = f"<{part}> in <{parent.tag}>"
                raise _bad(path, f"expected one {told}, got {len(children)}")
            found = children[0] if children else None
    return "" if found is None else (found.text or "").strip()


def _number(element: ElementTree.Element, tag: str, path: Path) -> float:
    text = _text(element, tag, path)
    try:
        number = float(text)
    except ValueError:
        number = float("nan")
    if not np.isfinite(number):
        raise _bad(path, f"expected a number in <{tag}> of <{element.tag}>, got {text!r}")
    return number


def _flag(element: ElementTree.Element, tag: str, path: Path) -> bool:
    text = _text(element, tag, path)
    if text.lower() not in _FLAGS:
        told = f"<{tag}> of <{element.tag}>"
        raise _bad(path, f"expected 0 or 1, true or false, yes or no in {told}, got {text!r}")
    return _FLAGS[text.lower()]


_FLAGS = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False, "": False}


def _read_image(path: Path, size: tuple[int, int]) -> Tensor:
    """Decoded pixels, uint8 [3, H, W]."""
    height, width = size
    try:
        picture = open_picture(path, (width, height))
    except FileNotFoundError as error:
        raise BadFileError(f"{error}, though a split lists it; {_REMEDY}") from None
    except ValueError as error:
        raise BadFileError(f"{error}; {_REMEDY}") from None
    if picture.size != (width, height):
        told = "is {}x{}, its annotation says {}x{}".format(*picture.size, width, height)
        raise _bad(path, told)
    image: Tensor = F.pil_to_tensor(picture)
    return image


_REMEDY = "repair it, or leave such images out with skip_bad=True (--skip-bad)"


def _bad(path: Path, what: str) -> BadFileError:
    return BadFileError(f"{path}: {what}; {_REMEDY}")


def _names(
    root: Path, year: str, split: str, classes: Sequence[str], annotations: Files
) -> list[str]:
    """Names of a split's images: its lines, but for the flags of VOC's sets of one class."""
    path = root / f"VOC{year}" / "ImageSets" / "Main" / f"{split}.txt"
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: there is no such split, expected one of {_told(available_splits(root))}"
        )
    lines = list(dict.fromkeys(read_lines(path)))
    # A line "img 1" of <class>_<split> may be the image "img" with its flag, or one called "img 1":
    # it is the latter if such an image is there, or if "img" would be listed twice.
    if any(split.startswith(f"{name}_") for name in classes):
        flagged = [_FLAGGED.fullmatch(line) for line in lines]
        names = {match[1] for match in flagged if match}
        if len(names) == len(lines) and not any(map(annotations.find, lines)):
            return [match[1] for match in flagged if match]
    return lines


_FLAGGED = re.compile(r"(.*\S)\s+(?:1|-1|0)")


def _told(splits: Sequence[tuple[str, str]]) -> str:
    return ", ".join(f"{year} {split}" for year, split in splits) or "(there are none)"
