"""Generated pictures in VOC's format: the things of ``drawing`` over photographs.

Each picture is a function of the seed, its split and its number in it, and of nothing else: more
pictures leave the first ones as they are. Training and test pictures have no photograph in common.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
from PIL import Image
from tqdm import tqdm

from .drawing import CLASSES, CLUTTER, PATTERNS, Rng, draw
from .photographs import photographs
from .voc import CLASSES_FILE

# Without those that show something like a disc, a ring or a leaf: coins, wheels, cups, petals.
_PHOTOGRAPHS = {
    "trainval": ("astronaut", "brick", "chelsea", "china", "gravel", "hubble_deep_field", "moon"),
    "test": ("camera", "grass", "ihc", "rocket"),
}
_FIRST_NAME = {"trainval": 0, "test": 500_000}
_VALIDATION = 5  # one training picture of so many is for validation

MOST_THINGS = 12  # in a picture: up to 7 objects, up to 5 of clutter
_LARGEST = 0.9  # of the image's side
_LEAST_VISIBLE = 0.6  # of a thing; one that would show less is not drawn
_CLEARLY_VISIBLE = 0.7  # less is difficult
_CLEAR_SIDE = 8  # pixels of the shorter side; less is difficult
_CLEAR_PATTERN = 12  # the same for things that only their pattern tells apart


@dataclass(frozen=True)
class Thing:
    """An object in a picture."""

    name: str
    box: tuple[int, int, int, int]  # x1 y1 x2 y2 of what is visible: pixel edges, from 0
    truncated: bool
    occluded: bool
    difficult: bool


def picture(
    seed: int,
    index: int,
    *,
    split: str = "trainval",
    size: int = 300,
    min_scale: float = 0.05,
    most_things: int = MOST_THINGS,
) -> tuple[np.ndarray, list[Thing]]:
    """Picture ``index`` of a split: uint8 [size, size, 3], and the objects in it, at least one.

    Args:
        seed, index: from 0.
        split: ``"trainval"`` or ``"test"``.
        size: pixels a side.
        min_scale: least side of an object, as a share of the picture's; the largest is .9.
        most_things: in the picture; objects come before clutter.
    """
    rng = np.random.default_rng((seed, index, list(_PHOTOGRAPHS).index(split)))
    background = _background(split, size, rng)
    scene = _compose(background, min_scale, most_things, rng)
    while not scene.objects():  # clutter took all the room
        scene = _compose(background, min_scale, most_things, rng)
    noise = rng.normal(0, rng.uniform(2, 10), scene.pixels.shape)
    return np.clip(scene.pixels + noise, 0, 255).astype(np.uint8), scene.objects()


def _compose(background: np.ndarray, min_scale: float, most_things: int, rng: Rng) -> _Scene:
    """Objects and clutter at random, though some may find no place."""
    objects = 1 + min(int(rng.poisson(1.6)), 6)
    kinds = [*rng.choice(CLASSES, objects), *rng.choice(CLUTTER, rng.integers(0, 6))]
    kinds = kinds[:most_things]
    scales = np.exp(rng.uniform(math.log(min_scale), math.log(_LARGEST), len(kinds)))
    scene = _Scene(background.copy())
    # The large ones first, more or less, for they would hide the others.
    for k in np.argsort(-scales * rng.uniform(0.7, 1.4, len(kinds))):
        # A thing that would hide too much is tried elsewhere, and smaller.
        for scale in scales[k] * 0.8 ** np.arange(10):
            if scene.add(str(kinds[k]), max(scale, min_scale) * len(background), rng):
                break
    return scene


class _Scene:
    """Pixels, and which thing each of them shows."""

    def __init__(self, pixels: np.ndarray) -> None:
        self.pixels = pixels  # float32 [size, size, 3]
        self.owner = np.zeros(pixels.shape[:2], np.int64)  # 0: the background
        self.kinds = [""]
        self.areas = [0]  # pixels of the whole thing, as if nothing hid it
        self.inside = [0]  # pixels of it that lie in the picture

    def add(self, kind: str, side: float, rng: Rng) -> bool:
        """Draw a thing at a random place, unless it would lack or hide too much."""
        size = len(self.pixels)
        # Most things are inside; some lack up to three tenths at a border.
        over = side * 0.3 * (rng.random() < 0.2)
        top, left = (int(rng.uniform(-over, max(size - side, 0) + over)) for _ in range(2))
        end = math.ceil(side)
        behind = self.pixels[max(top, 0) : top + end, max(left, 0) : left + end]
        sprite = draw(kind, side, behind.mean((0, 1)), rng)

        height, width = sprite.alpha.shape
        if min(top + height, left + width) <= 0:
            return False
        picture = np.s_[max(top, 0) : top + height, max(left, 0) : left + width]
        part = np.s_[max(-top, 0) : size - top, max(-left, 0) : size - left]
        colour, alpha = sprite.colour[part], sprite.alpha[part]
        covers = alpha > 0.5
        area, inside = int((sprite.alpha > 0.5).sum()), int(covers.sum())
        owner = np.where(covers, len(self.kinds), self.owner[picture])
        hidden = self._counts(self.owner[picture]) - self._counts(owner)[: len(self.kinds)]
        left_over = self._counts(self.owner) - hidden
        if inside < max(1, _LEAST_VISIBLE * area):
            return False
        if np.any(left_over[1:] < _LEAST_VISIBLE * np.array(self.areas[1:])):
            return False
        self.pixels[picture] += alpha[..., None] * (colour - self.pixels[picture])
        self.owner[picture] = owner
        self.kinds.append(kind)
        self.areas.append(area)
        self.inside.append(inside)
        return True

    def objects(self) -> list[Thing]:
        """The things that have a class, each with the box of its visible part."""
        found = []
        for number, kind in enumerate(self.kinds):
            if kind not in CLASSES:
                continue
            rows, columns = np.nonzero(self.owner == number)
            x1, y1, x2, y2 = columns.min(), rows.min(), columns.max() + 1, rows.max() + 1
            clear = _CLEAR_PATTERN if kind in PATTERNS else _CLEAR_SIDE
            found.append(
                Thing(
                    name=kind,
                    box=(int(x1), int(y1), int(x2), int(y2)),
                    truncated=self.inside[number] < 0.97 * self.areas[number],
                    occluded=len(rows) < 0.97 * self.inside[number],
                    difficult=min(x2 - x1, y2 - y1) < clear
                    or len(rows) < _CLEARLY_VISIBLE * self.areas[number],
                )
            )
        return found

    def _counts(self, owner: np.ndarray) -> np.ndarray:
        return np.bincount(owner.ravel(), minlength=len(self.kinds))


def _background(split: str, size: int, rng: Rng) -> np.ndarray:
    """A random crop of a photograph of the split, in other colours: float32 [size, size, 3]."""
    photograph = _photographs(split)[rng.integers(len(_PHOTOGRAPHS[split]))]
    side = int(rng.uniform(0.25, 1) * min(photograph.size))
    x, y = (int(rng.integers(extent - side + 1)) for extent in photograph.size)
    crop = photograph.resize((size, size), Image.Resampling.BILINEAR, (x, y, x + side, y + side))
    pixels = np.asarray(crop, np.float32)[..., rng.permutation(3)]
    pixels = np.rot90(pixels, int(rng.integers(4)))
    contrast, brightness = rng.uniform(0.5, 1), rng.uniform(-30, 30)
    return np.ascontiguousarray(np.clip((pixels - 128) * contrast + 128 + brightness, 0, 255))


@cache
def _photographs(split: str) -> list[Image.Image]:
    return [Image.fromarray(pixels) for pixels in photographs(_PHOTOGRAPHS[split]).values()]


def make_data(
    out: str | os.PathLike[str],
    *,
    train: int = 2000,
    test: int = 500,
    size: int = 300,
    seed: int = 0,
    min_scale: float = 0.05,
    most_things: int = MOST_THINGS,
    progress: bool = False,
) -> Path:
    """Write pictures into the new folder ``out``, as ``VOCdevkit/VOC2007`` with all that VOC has.

    Files are the same, to the bit, for the same arguments. ``out`` appears when all is written.

    Args:
        train, test: how many pictures for ``trainval`` (``val`` is a fifth of it) and ``test``.
        size, seed, min_scale, most_things: see :func:`picture`.
        progress: show a bar.

    Returns:
        ``out``.

    Raises:
        FileExistsError: ``out`` exists; nothing is written over.
        ValueError: a count, a size or a scale that makes no sense.
    """
    out = Path(out)
    _check(
        train=train, test=test, size=size, seed=seed, min_scale=min_scale, most_things=most_things
    )
    if out.exists():
        raise FileExistsError(f"{out} exists and is left alone: remove it, or give another path")
    out.parent.mkdir(parents=True, exist_ok=True)
    unfinished = out.with_name(f".{out.name}.{os.getpid()}.unfinished")
    drawn = partial(picture, seed, size=size, min_scale=min_scale, most_things=most_things)
    try:
        _write(unfinished / "VOCdevkit", {"trainval": train, "test": test}, size, drawn, progress)
        unfinished.rename(out)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return out


def _check(
    *, train: int, test: int, size: int, seed: int, min_scale: float, most_things: int
) -> None:
    most = _FIRST_NAME["test"]
    for name, count in (("train", train), ("test", test)):
        if not 1 <= count <= most:
            raise ValueError(f"{name}: expected 1 to {most} pictures, got {count}")
    if size < 32:
        raise ValueError(f"size must be at least 32 pixels, got {size}")
    if seed < 0:
        raise ValueError(f"seed must be 0 or more, got {seed}")
    if not 0 < min_scale < _LARGEST:
        raise ValueError(f"min_scale must be above 0 and below {_LARGEST}, got {min_scale}")
    if most_things < 1:
        raise ValueError(f"most_things must be at least 1, got {most_things}")


def _write(
    devkit: Path,
    counts: dict[str, int],
    size: int,
    drawn: Callable[..., tuple[np.ndarray, list[Thing]]],
    progress: bool,
) -> None:
    year = devkit / "VOC2007"
    for folder in ("Annotations", "ImageSets/Main", "JPEGImages"):
        (year / folder).mkdir(parents=True)
    (devkit / CLASSES_FILE).write_text("".join(f"{name}\n" for name in CLASSES))
    splits: dict[str, dict[str, list[Thing]]] = {}
    with tqdm(total=sum(counts.values()), unit="picture", disable=not progress) as bar:
        for split, count in counts.items():
            pictures = splits[split] = {}
            for index in range(count):
                name = f"{_FIRST_NAME[split] + index:06d}"
                pixels, things = drawn(index, split=split)
                Image.fromarray(pixels).save(year / "JPEGImages" / f"{name}.jpg", quality=92)
                _annotation(name, size, things).write(year / "Annotations" / f"{name}.xml")
                pictures[name] = things
                bar.update()
    both = list(splits["trainval"].items())
    splits["train"] = dict(p for k, p in enumerate(both) if k % _VALIDATION)
    splits["val"] = dict(both[::_VALIDATION])
    for split, pictures in splits.items():
        _write_sets(year / "ImageSets" / "Main", split, pictures)


def _write_sets(folder: Path, split: str, pictures: dict[str, list[Thing]]) -> None:
    """The names of a split, and for each class whether it is there: 1, -1, 0 if only difficult."""
    (folder / f"{split}.txt").write_text("".join(f"{name}\n" for name in pictures))
    for kind in CLASSES:
        lines = []
        for name, things in pictures.items():
            difficult = [thing.difficult for thing in things if thing.name == kind]
            lines.append(f"{name} {-1 if not difficult else 0 if all(difficult) else 1:2d}\n")
        (folder / f"{kind}_{split}.txt").write_text("".join(lines))


def _annotation(name: str, size: int, things: Sequence[Thing]) -> ElementTree.ElementTree:
    """A picture's annotation in VOC's XML; pixels count from 1, and the last is in the box."""
    root = _element(
        "annotation",
        folder="VOC2007",
        filename=f"{name}.jpg",
        source={"database": "da_ops", "annotation": "generated", "image": "generated"},
        owner={"name": "da_ops"},
        size={"width": size, "height": size, "depth": 3},
        segmented=0,
    )
    for thing in things:
        x1, y1, x2, y2 = thing.box
        root.append(
            _element(
                "object",
                name=thing.name,
                pose="Unspecified",
                truncated=int(thing.truncated),
                occluded=int(thing.occluded),
                difficult=int(thing.difficult),
                bndbox={"xmin": x1 + 1, "ymin": y1 + 1, "xmax": x2, "ymax": y2},
            )
        )
    ElementTree.indent(root, "\t")
    return ElementTree.ElementTree(root)


def _element(tag: str, **children: Any) -> ElementTree.Element:
    element = ElementTree.Element(tag)
    for name, value in children.items():
        if isinstance(value, dict):
            element.append(_element(name, **value))
        else:
            ElementTree.SubElement(element, name).text = str(value)
    return element
