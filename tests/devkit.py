"""A tree in VOC's format for tests, written file by file."""

import numpy as np
from PIL import Image

from da_ops.detection.voc import VOCDetection

DOG = {"name": "dog", "difficult": "0", "box": (10, 20, 30, 40)}
HARD_CAT = {"name": "cat", "difficult": "1", "box": (1, 1, 60, 48)}


class Devkit:
    """A tree as VOC's."""

    def __init__(self, root):
        self.root = root

    def add(self, name, *objects, year="2007", split="trainval", size=(60, 48), suffix=".jpg"):
        """An image of random pixels, its annotation, and its name at the end of the split."""
        for path in (self.image(name, year), self.annotation(name, year), self.split(split, year)):
            path.parent.mkdir(parents=True, exist_ok=True)
        with self.split(split, year).open("a", encoding="utf-8") as file:
            file.write(f"{name}\n")
        pixels = np.random.default_rng(len(name)).integers(0, 256, (size[1], size[0], 3), np.uint8)
        Image.fromarray(pixels).save(self.image(name, year, suffix), quality=95)
        self.annotation(name, year).write_text(self.xml(size, objects), encoding="utf-8")

    def annotation(self, name, year="2007"):
        return self.root / f"VOC{year}" / "Annotations" / f"{name}.xml"

    def image(self, name, year="2007", suffix=".jpg"):
        return self.root / f"VOC{year}" / "JPEGImages" / f"{name}{suffix}"

    def split(self, split="trainval", year="2007"):
        return self.root / f"VOC{year}" / "ImageSets" / "Main" / f"{split}.txt"

    def read(self, splits=(("2007", "trainval"),), **options):
        return VOCDetection(self.root, splits, **options)

    @staticmethod
    def xml(size, objects):
        things = ""
        for thing in objects:
            corners = zip(("xmin", "ymin", "xmax", "ymax"), thing["box"])
            box = "".join(f"<{tag}>{value}</{tag}>" for tag, value in corners)
            part = f"<part><name>head</name><bndbox>{box}</bndbox></part>"
            things += (
                f"<object><name>{thing['name']}</name><pose>Left</pose><truncated>0</truncated>"
                f"<difficult>{thing['difficult']}</difficult><bndbox>{box}</bndbox>{part}</object>"
            )
        return (
            f"<annotation><size><width>{size[0]}</width><height>{size[1]}</height><depth>3</depth>"
            f"</size><segmented>0</segmented>{things}</annotation>"
        )
