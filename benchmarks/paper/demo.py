"""From nothing to a picture: makes data, trains two small detectors, tests and draws them.

One is a plain ResNet-18, the other has DA in each block: the same seed, images and settings.

python -m benchmarks.paper.demo        15 minutes on two cores; goes on where it was stopped
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from benchmarks import environment
from benchmarks.charts import INK, QUIET
from da_ops.cli import main as da_ops
from da_ops.detection.cam import grad_cam
from da_ops.detection.checkpoint import Detector, load_detector
from da_ops.detection.figures import show_map
from da_ops.detection.settings import Settings
from da_ops.detection.synthetic import make_data
from da_ops.detection.training import evaluation_set, train

SETTINGS = Settings(
    backbone="resnet18",
    size=64,
    augmentation="mirror",
    batch_size=16,
    steps=2500,
    lr=0.02,
    warmup=100,
    clip_norm=10.0,
    amp=True,
    channels_last=True,
)
NETWORKS = {"plain": "none", "da": "da"}  # folder of the run, and its attention
PICTURES = {"train": 8000, "test": 500}
# Few objects, and large ones: small and hidden ones take longer to learn.
EASY: dict[str, Any] = {"min_scale": 0.4, "most_things": 2}
SHOWN = 6
SURE = 0.4  # least score of a detection that is drawn


@dataclasses.dataclass(frozen=True)
class Tested:
    """A trained detector, and how it does on all test images."""

    detector: Detector
    precision: float
    on_class: float  # share of the images whose heat map is warmest on an object of its class

    @property
    def title(self) -> str:
        plain = self.detector.settings.attention == "none"
        return "Plain ResNet-18" if plain else "DA-ResNet-18"


def demo(out: Path, settings: Settings, pictures: dict[str, int]) -> Path:
    """Data, runs and picture in `out`; what is there already is taken up. Returns the picture."""
    options = {**pictures, "size": settings.size, **EASY}
    data = out / "data-{train}-{test}-{size}-{min_scale:g}-{most_things}".format(**options)
    if not data.exists():
        make_data(data, **options, progress=True)
    tested = []
    for name, attention in NETWORKS.items():
        run, found = out / name, out / f"{name}.json"
        begun = (run / "config.json").exists()
        own = dataclasses.replace(settings, attention=attention)
        train(data, run, own, resume=begun, workers=1, checkpoint_every=100)
        if da_ops(["eval", str(run), str(data), "--json", str(found), "--workers", "0"]):
            raise RuntimeError(f"the evaluation of {run} failed, see above")
        detector, precision = load_detector(run), json.loads(found.read_text())["map_11"]
        dataset = evaluation_set(data, detector.classes)
        tested.append(Tested(detector, precision, on_class(detector.model, dataset)))
    drawn = out / "demo.jpg"
    draw(tested, dataset, drawn)
    return drawn


def on_class(model: torch.nn.Module, dataset: Any) -> float:
    """Share of the images whose map of ``largest``'s class is warmest in a box of that class."""
    hits = 0
    for image, target in (dataset[i] for i in range(len(dataset))):
        label = largest(target)
        heat = grad_cam(model, image.as_subclass(Tensor)[None], [label])[0]
        y, x = divmod(int(heat.argmax()), heat.shape[1])
        hits += bool(heat.any() and boxes_of(target, label, heat.shape)[y, x])
    return hits / len(dataset)


def boxes_of(target: dict[str, Any], label: int, shape: Sequence[int]) -> Tensor:
    """Which pixels of an image lie in a box of a class, bool [H, W]."""
    inside = torch.zeros(*shape, dtype=torch.bool)
    for x1, y1, x2, y2 in target["boxes"][target["labels"] == label].int().tolist():
        inside[y1:y2, x1:x2] = True
    return inside


def draw(tested: list[Tested], dataset: Any, path: Path) -> None:
    """A column per test image, two rows per detector: what it found, and what spoke for a class.

    The class is that of the image's largest object, whatever the detectors found."""
    items = [dataset[i] for i in range(len(dataset))]
    images, targets = zip(*items[:SHOWN])
    classes, labels = tested[0].detector.classes, [largest(target) for target in targets]
    pictures = [image.as_subclass(Tensor) for image in images]
    figure = Figure(figsize=(2.0 * SHOWN + 0.4, 9.3), dpi=110, layout="constrained")
    grid = figure.subplots(2 * len(tested), SHOWN)
    for axes in grid.flat:
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
    for k, one in enumerate(tested):
        with torch.no_grad():
            found = one.detector.model(pictures)
        maps = grad_cam(one.detector.model, torch.stack(pictures), labels)
        top, bottom = grid[2 * k : 2 * k + 2]
        title = f"{one.title}: mAP {100 * one.precision:.1f}"
        top[0].set_ylabel(title, fontsize=9, fontweight="bold", color=INK)
        bottom[0].set_ylabel("its Grad-CAM", fontsize=9, color=INK)
        for i in range(SHOWN):
            show_detections(top[i], pictures[i], targets[i]["boxes"], found[i], classes)
            show_map(bottom[i], pictures[i], maps[i])
            bottom[i].set_xlabel(classes[labels[i] - 1], fontsize=9, color=INK)
    detector, s = tested[0].detector, tested[0].detector.settings
    warmest = " and ".join(f"{100 * one.on_class:.0f}% ({one.title})" for one in tested)
    chance = [boxes_of(t, largest(t), i.shape[-2:]).float().mean().item() for i, t in items]
    figure.suptitle(
        f"SSD{s.size} after {detector.step} steps of {s.batch_size} generated images,"
        f" tested on {len(dataset)} others",
        x=0.01, ha="left", fontsize=12, fontweight="bold", color=INK,
    )  # fmt: skip
    figure.supxlabel(
        f"The first {SHOWN} test images, not chosen. White: objects. Coloured: detections with a"
        f" score of at least {SURE:g}. Both networks have the same seed, images and settings.\n"
        "Grad-CAM is of the class written under it, that of the image's largest object; if all is"
        f" blue, nothing speaks for it.\nIt is warmest in a box of that class in {warmest} of all"
        f" {len(items)} test images; a random point would be in {100 * fmean(chance):.0f}%.\n"
        "This is one pair of networks: neither figure tells which is the better.",
        x=0.01, ha="left", fontsize=9, color=QUIET,
    )  # fmt: skip
    figure.savefig(path, facecolor="white")


def largest(target: dict[str, Any]) -> int:
    """The label of the object with the largest box."""
    x1, y1, x2, y2 = target["boxes"].unbind(1)
    return int(target["labels"][((x2 - x1) * (y2 - y1)).argmax()])


def show_detections(
    axes: Axes, picture: Tensor, true: Tensor, found: dict[str, Tensor], classes: tuple[str, ...]
) -> None:
    """A picture with its objects and what was found in it."""
    axes.imshow(picture.permute(1, 2, 0).numpy())
    side = picture.shape[-1]
    for box in true.tolist():
        outline(axes, box, side, "white", "")
    boxes, labels, scores = (found[key].tolist() for key in ("boxes", "labels", "scores"))
    for rank, (box, label, score) in enumerate(zip(boxes, labels, scores)):
        if score >= SURE:
            colour = matplotlib.colormaps["tab10"]((label - 1) % 10)
            text = f"{classes[label - 1]} {score:.2f}"
            outline(axes, box, side, colour, text, at_top=rank % 2 == 0)


def outline(
    axes: Axes, box: list[float], side: int, colour: Any, text: str, at_top: bool = True
) -> None:
    """A box (x1 y1 x2 y2, edges of pixels), with words on it that stay inside the picture."""
    x1, y1, x2, y2 = (edge - 0.5 for edge in box)  # imshow's pixels are centred on whole numbers
    width = 1.8 if text else 0.8
    axes.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, color=colour, linewidth=width))
    if text:
        x, ha = (x2, "right") if x1 + x2 > side else (x1, "left")
        y, va = (y1 if at_top else y2), ("top" if at_top and y1 < side / 10 else "bottom")
        back = {"facecolor": colour, "pad": 0.8, "linewidth": 0}
        axes.text(x, y, text, ha=ha, va=va, fontsize=7.5, color="white", bbox=back)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.paper.demo", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--out", type=Path, default=environment.LOCAL / "demo", metavar="FOLDER")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        print(f"drawn: {demo(options.out, SETTINGS, PICTURES)}")
    except (OSError, ValueError, RuntimeError) as error:
        print(f"benchmarks.paper.demo: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
