"""Checkpoints and the folder of a run: written whole or not at all."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch

from .vision import SSD

# isort: split
from ..models.ssd import ssd
from ..models.weights import read, unprefixed
from .settings import Settings

FORMAT = 1
LAST = "last.pt"  # the newest checkpoint of a run
CONFIG = "config.json"
TABLES = ("train.csv", "eval.csv")


class Run(NamedTuple):
    """The contents of a run folder's ``config.json``."""

    settings: Settings
    classes: tuple[str, ...]
    images: int


class Detector(NamedTuple):
    """A detector from a checkpoint."""

    model: SSD
    classes: tuple[str, ...]
    settings: Settings
    step: int


@contextmanager
def atomic(path: Path) -> Iterator[IO[bytes]]:
    """A file to write to that takes the name ``path`` once it is complete and on the disk."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the new name too survives a power cut
    finally:
        os.close(folder)


def check_new(folder: Path) -> None:
    """FileExistsError if there is anything that a new run in this folder would overwrite."""
    # A run that was killed before it began leaves hidden files.
    if folder.exists() and (not folder.is_dir() or any(folder.glob("[!.]*"))):
        raise FileExistsError(
            f"{folder}: expected a new or empty folder for the run, got one with files in it;"
            " choose another, or continue the run in it with --resume"
        )


def create_run(folder: Path, run: Run) -> None:
    """Make the folder of a new run, with its configuration in it."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "format": FORMAT,
        "settings": run.settings.to_dict(),
        "classes": list(run.classes),
        "images": run.images,
    }
    with atomic(folder / CONFIG) as file:
        file.write((json.dumps(config, indent=1) + "\n").encode())


def sweep(folder: Path) -> None:
    """Remove the unfinished files that a killed run has left."""
    for name in (CONFIG, LAST, *TABLES):
        for path in folder.glob(f".{name}.*"):
            path.unlink()


def check_resumable(folder: Path, run: Run) -> None:
    """ValueError unless the folder's run is this one: same settings, same data."""
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        stored = Run(
            Settings.from_dict(config["settings"]), tuple(config["classes"]), config["images"]
        )
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{folder}: expected a run to resume, got no {CONFIG} there; leave out --resume to"
            " start a run"
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / CONFIG}: expected a run's settings, got {error!r}") from error
    differences = stored.settings.differences(run.settings)
    if stored.classes != run.classes:
        differences.append(f"classes {list(stored.classes)}, not {list(run.classes)}")
    if stored.images != run.images:
        differences.append(f"{stored.images} training images, not {run.images}")
    if differences:
        raise ValueError(
            f"{folder}: expected the settings that the run was started with, got others. It has"
            f" {'; '.join(differences)}. Resume with those, or start another run"
        )


def save(path: Path, state: dict[str, Any], run: Run) -> None:
    """Write a checkpoint: the trainer's state, and what it takes to rebuild the model."""
    with atomic(path) as file:
        torch.save(
            {
                "format": FORMAT,
                **state,
                "settings": run.settings.to_dict(),
                "classes": list(run.classes),
            },
            file,
        )


def load(path: Path) -> dict[str, Any]:
    """The contents of a file of ``save``, on the CPU; ValueError if it is no such file."""
    stored = read(path)
    if not isinstance(stored, dict) or not {"format", "step", "model", "classes"} <= set(stored):
        other = "weights alone" if path.suffix == ".safetensors" else "another file of torch.save"
        raise ValueError(
            f"{path}: expected a checkpoint of `da_ops train`, got {other}; give the {LAST} of a"
            " run, or its folder"
        )
    if stored["format"] != FORMAT:
        raise ValueError(
            f"{path}: expected format {FORMAT}, got {stored['format']}; load it with the version"
            " of da_ops that wrote it"
        )
    return stored


def build_model(settings: Settings, classes: Sequence[str], *, pretrained: bool = True) -> SSD:
    """The detector that the settings describe, randomly initialised from their seed.

    Args:
        classes: names without the background.
        pretrained: load the settings' ``weights`` into the backbone.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(settings.seed)
        return ssd(
            settings.backbone,
            None if settings.attention == "none" else settings.attention,
            transformer=None if settings.transformer == "none" else settings.transformer,
            num_classes=len(classes) + 1,
            size=settings.size,
            mapping=settings.mapping,
            order=settings.order,
            gate=settings.gate,
            backend=settings.backend,
            fused=settings.fused,
            weights=settings.weights if pretrained else None,
        )


def load_detector(path: Path) -> Detector:
    """The detector of a checkpoint or of a run folder's newest one, in inference mode."""
    if not path.exists():
        raise FileNotFoundError(
            f"{path}: expected the folder of a run, or a checkpoint; there is neither"
        )
    if path.is_dir():
        path = path / LAST
        if not path.exists():
            raise FileNotFoundError(
                f"{path.parent}: expected the folder of a run, got one without {LAST}; give a run"
                " that has reached its first checkpoint, or a checkpoint"
            )
    stored = load(path)
    settings, classes = Settings.from_dict(stored["settings"]), tuple(stored["classes"])
    model = build_model(settings, classes, pretrained=False)
    model.load_state_dict(unprefixed(stored["model"], str(path)))
    return Detector(model.eval(), classes, settings, int(stored["step"]))


def check_classes(found: Sequence[str], detector: Detector, data: Path) -> None:
    """ValueError unless the data's classes are those that the detector was trained on."""
    if tuple(found) != detector.classes:
        raise ValueError(
            f"{data}: expected the classes that the checkpoint was trained on,"
            f" {', '.join(detector.classes)}; got {', '.join(found)}. Labels are numbers in this"
            " order: evaluate on data with the same list"
        )
