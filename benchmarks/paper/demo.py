"""From nothing to a picture: makes data, trains a small DA-ResNet18 SSD128, tests and draws.

python -m benchmarks.paper.demo        some minutes on two cores; goes on where it was stopped
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from pathlib import Path
from typing import Any

import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

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
    attention="da",
    size=128,
    augmentation="mirror",
    batch_size=16,
    steps=1500,
    lr=0.02,
    warmup=100,
    clip_norm=10.0,
    amp=True,
    channels_last=True,
)
PICTURES = {"train": 3000, "test": 300}
MIN_SCALE = 0.3  # of an object, as a share of the picture's side: small ones take longer to learn
SHOWN = 6
SURE = 0.4  # least score of a detection that is drawn


def demo(out: Path, settings: Settings, pictures: dict[str, int]) -> Path:
    """Data, run and picture in `out`; what is there already is taken up. Returns the picture."""
    data, run, drawn = out / "data", out / "run", out / "demo.png"
    if not data.exists():
        make_data(data, **pictures, size=settings.size, min_scale=MIN_SCALE, progress=True)
    begun = (run / "config.json").exists()
    train(data, run, settings, resume=begun, workers=1, checkpoint_every=100)
    precision = out / "precision.json"
    if da_ops(["eval", str(run), str(data), "--json", str(precision), "--workers", "0"]):
        raise RuntimeError(f"the evaluation of {run} failed, see above")
    detector = load_detector(run)
    found = json.loads(precision.read_text())
    draw(detector, evaluation_set(data, detector.classes), found, drawn)
    return drawn


def draw(detector: Detector, dataset: Any, precision: dict[str, Any], path: Path) -> None:
    """A column per test image: what was found in it, and what spoke for the surest of it."""
    images, targets = zip(*(dataset[i] for i in range(SHOWN)))
    with torch.no_grad():
        found = detector.model(list(images))
    labels = [int(one["labels"][one["scores"].argmax()]) for one in found]
    maps = grad_cam(detector.model, torch.stack(images), labels)
    figure = Figure(figsize=(2.1 * SHOWN, 5.0), dpi=150, layout="constrained")
    grid = figure.subplots(2, SHOWN)
    for i in range(SHOWN):
        picture = images[i].as_subclass(torch.Tensor)
        grid[0, i].imshow(picture.permute(1, 2, 0).numpy())
        for box in targets[i]["boxes"].tolist():
            outline(grid[0, i], box, "white", "")
        for box, label, score in zip(
            *(found[i][k].tolist() for k in ("boxes", "labels", "scores"))
        ):
            if score >= SURE:
                colour = matplotlib.colormaps["tab10"]((label - 1) % 10)
                outline(grid[0, i], box, colour, f"{detector.classes[label - 1]} {score:.2f}")
        show_map(grid[1, i], picture, maps[i])
        grid[1, i].set_title(f"Grad-CAM: {detector.classes[labels[i] - 1]}", fontsize=9, color=INK)
        for axes in grid[:, i]:
            axes.set_axis_off()
    s = detector.settings
    figure.suptitle(
        f"DA-ResNet18 SSD{s.size} after {detector.step} steps of {s.batch_size} generated images:"
        f" mAP {100 * precision['map_11']:.1f} on {precision['images']} others",
        x=0.01, ha="left", fontsize=12, fontweight="bold", color=INK,
    )  # fmt: skip
    figure.supxlabel(
        f"White: objects. Coloured: detections with a score of at least {SURE:g}. The first"
        f" {SHOWN} test images, not chosen.",
        x=0.01, ha="left", fontsize=9, color=QUIET,
    )  # fmt: skip
    figure.savefig(path, format="png", facecolor="white", metadata={"Software": None})


def outline(axes: Axes, box: list[float], colour: Any, text: str) -> None:
    """A box (x1 y1 x2 y2, edges of pixels), with words on it."""
    x1, y1, x2, y2 = (edge - 0.5 for edge in box)  # imshow's pixels are centred on whole numbers
    width = 1.8 if text else 0.8
    axes.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, color=colour, linewidth=width))
    if text:
        back = {"facecolor": colour, "pad": 0.8, "linewidth": 0}
        axes.text(x1, y1, text, fontsize=6.5, color="white", va="bottom", bbox=back)


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
