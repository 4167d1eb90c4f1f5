"""Tables I, II and III in miniature: orders of DA's halves and its rivals, on generated data.

python -m benchmarks.paper.ablation                 ResNet-18 on two cores, within 45 minutes
python -m benchmarks.paper.ablation --preset gpu    ResNet-50 SSD300, five seeds
python -m benchmarks.paper.ablation --resume        goes on where the last one was stopped
python -m benchmarks.paper.ablation --write         measures nothing, writes docs/paper.md's block
                                 of the committed results; --check: exits 1 if it is another

All networks of one seed start from the same weights, as far as they share them, and see the same
images in the same order, augmented in the same way: what differs is the attention. Where time is
short they all start from one plain network that was trained before, with layers that change nothing
at first.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset
from torchvision.models.detection.ssd import SSD
from tqdm import tqdm

from benchmarks import environment
from benchmarks.environment import BenchmarkError
from benchmarks.pages import read_page, with_block
from benchmarks.paper import report
from da_ops.detection.augment import eval_transforms, train_transforms
from da_ops.detection.checkpoint import build_model
from da_ops.detection.distributed import World
from da_ops.detection.evaluation import evaluate
from da_ops.detection.loading import StepSampler, training_loader
from da_ops.detection.optimisation import Trainer, parameter_groups
from da_ops.detection.settings import Settings
from da_ops.detection.synthetic import make_data
from da_ops.detection.voc import VOCDetection, read_classes
from da_ops.models import insert_attention, insert_transformer

VARIANTS: dict[str, dict[str, Any]] = {
    report.PLAIN: {"attention": "none"},
    "DA": {"attention": "da", "order": "spatial_channel"},
    "DA, channel first": {"attention": "da", "order": "channel_spatial"},
    "DA, parallel": {"attention": "da", "order": "parallel"},
    "SE": {"attention": "se"},
    "SGE": {"attention": "sge"},
    "ECA": {"attention": "eca"},
    "FCA": {"attention": "fca"},
    "STN": {"attention": "none", "transformer": "layer2"},
}


@dataclass(frozen=True)
class Preset:
    """One experiment. Sizes in pixels; `min_scale` is the least side of an object
    as a share of the image's; `lr` is the highest of the one cycle; `light` keeps the
    decoded images in memory and mirrors them, without SSD's augmentation, which takes as long as
    a small network's step."""

    backbone: str
    size: int
    min_scale: float
    train: int
    test: int
    batch_size: int
    pretraining: int  # steps of the plain network that all start from; 0: from random weights
    steps: int
    lr: float
    seeds: int
    light: bool
    workers: int
    tuning_lr: float = 0.0  # after a pretraining, which a high rate would undo; 0: `lr`
    weight_decay: float = 5e-4
    warm: float = 0.1  # part of the steps over which the rate rises
    curve: tuple[float, ...] = (0.25, 0.5)  # when plain is evaluated on the way


PRESETS = {
    "small": Preset("resnet18", 64, 0.3, 8000, 1000, 16, 5500, 400, 2e-2, 3, True, 0, 5e-3),
    "gpu": Preset("resnet50", 300, 0.05, 16_000, 2000, 32, 0, 15_000, 1e-3, 5, False, 8),
}


class InMemory(Dataset[Any]):
    """A data set, decoded once; its transforms are applied each time."""

    def __init__(self, dataset: VOCDetection, transforms: Callable[..., Any]) -> None:
        self.items = [dataset[i] for i in range(len(dataset))]
        self.transforms = transforms

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        return self.transforms(*self.items[index])


@dataclass(frozen=True)
class Data:
    """What every network is trained and tested on."""

    classes: tuple[str, ...]
    train: Any
    test: Any


def load(preset: Preset, folder: Path) -> Data:
    """Generated images, the same for every run of the preset."""
    root = folder / "data"
    make_data(
        root,
        train=preset.train,
        test=preset.test,
        size=preset.size,
        min_scale=preset.min_scale,
        progress=True,
    )
    classes = tuple(read_classes(root))

    def part(name: str, transforms: Callable[..., Any]) -> Any:
        splits = (("2007", name),)
        if preset.light:
            return InMemory(VOCDetection(root, splits, classes=classes), transforms)
        return VOCDetection(root, splits, classes=classes, transforms=transforms)

    augment = train_transforms(preset.size, "mirror" if preset.light else "ssd")
    return Data(classes, part("trainval", augment), part("test", eval_transforms()))


def one_cycle(preset: Preset, steps: int) -> Callable[[int], float]:
    """Linearly up to the preset's rate, then down to 0 along a cosine."""
    rise = max(1, round(preset.warm * steps))

    def rate(step: int) -> float:
        if step < rise:
            return preset.lr * (step + 1) / rise
        done = (step - rise) / max(1, steps - rise)
        return preset.lr * 0.5 * (1 + math.cos(math.pi * done))

    return rate


State = dict[str, torch.Tensor]


def network(
    name: str, seed: int, preset: Preset, classes: tuple[str, ...], start: State | None
) -> SSD:
    """A variant before training: from one seed, what all have in common starts the same.

    With `start`, the plain network's weights, all compute the same at first."""
    options = VARIANTS[name] if start is None else VARIANTS[report.PLAIN]
    settings = Settings(backbone=preset.backbone, size=preset.size, seed=seed, **options)
    model = build_model(settings, classes)
    if start is not None:
        model.load_state_dict(start)
        options = dict(VARIANTS[name])
        stage = options.pop("transformer", None)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            if options["attention"] != "none":
                insert_attention(model, preserve_function=True, **options)
            if stage is not None:
                insert_transformer(model, before=f"backbone.body.{stage}")
    return model


class Training:
    """A network on its way: trained step by step, tested at any of them."""

    def __init__(
        self, model: SSD, seed: int, steps: int, preset: Preset, data: Data, device: torch.device
    ) -> None:
        self.world = World(0, 1, device)
        self.data, self.workers = data, preset.workers
        model = model.to(device, memory_format=torch.channels_last)
        groups = parameter_groups(model, preset.weight_decay)
        optimizer = torch.optim.SGD(groups, preset.lr, momentum=0.9, nesterov=True)
        schedule = one_cycle(preset, steps)
        self.trainer = Trainer(model, optimizer, schedule, self.world, amp=True, clip_norm=10.0)
        sampler = StepSampler(len(data.train), preset.batch_size, 0, steps, seed=seed)
        self.loader = training_loader(data.train, sampler, preset.workers, device.type == "cuda")

    def steps(self, title: str) -> Iterator[int]:
        """Train; yields the number of each step when it is done."""
        self.losses: list[float] = []
        for batch in tqdm(self.loader, desc=title, leave=False, disable=None):
            self.losses.append(self.trainer.update(batch)["loss"])
            yield self.trainer.step

    def loss(self) -> float:
        """Mean over the last twentieth of the steps."""
        tail = self.losses[-max(1, len(self.losses) // 20) :]
        return sum(tail) / len(tail)

    def test(self) -> dict[str, float]:
        """mAP of 11 points, the paper's, and of all."""
        with self.trainer.autocast():
            found = evaluate(
                self.trainer.model,
                self.data.test,
                self.data.classes,
                self.world,
                workers=self.workers,
            )
        return {name: float(found[name]) for name in ("map_11", "map")}


def pretrain(preset: Preset, data: Data, device: torch.device) -> tuple[State, dict[str, float]]:
    """The plain network that all start from, and what is to be said of it."""
    started = time.perf_counter()
    seed = preset.seeds  # none of the variants'
    model = network(report.PLAIN, seed, preset, data.classes, None)
    training = Training(model, seed, preset.pretraining, preset, data, device)
    for _ in training.steps("pretraining"):
        pass
    found = {**training.test(), "loss": training.loss()}
    state = {key: value.cpu() for key, value in training.trainer.model.state_dict().items()}
    return state, {**found, "seconds": time.perf_counter() - started}


def run_one(
    name: str, seed: int, preset: Preset, data: Data, start: State | None, device: torch.device
) -> Any:
    """Train and test one network."""
    started = time.perf_counter()
    model = network(name, seed, preset, data.classes, start)
    if start is not None:
        preset = replace(preset, lr=preset.tuning_lr or preset.lr)
    training = Training(model, seed, preset.steps, preset, data, device)
    stops = {round(part * preset.steps) for part in preset.curve if name == report.PLAIN}
    training_steps = training.steps(f"seed {seed}, {name}")
    curve = [{"step": step, **training.test()} for step in training_steps if step in stops]
    found = training.test()
    return {
        "variant": name,
        "seed": seed,
        **found,
        "curve": [*curve, {"step": preset.steps, **found}],
        "loss": training.loss(),
        "parameters": sum(p.numel() for p in model.parameters()),
        "seconds": time.perf_counter() - started,
    }


def experiment(preset: Preset, options: argparse.Namespace, path: Path) -> None:
    """All networks of one seed, then of the next; the file is complete after each."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    results = environment.head("ablation", device.type, options.preset, report.MODULE)
    settings = settings_record(preset)
    results |= {"settings": settings, "pretraining": None, "runs": [], "seconds": 0.0}
    if options.resume:
        results = resumed(path, results)
    done = {(run["variant"], run["seed"]) for run in results["runs"]}
    wanted = [(name, seed) for seed in range(preset.seeds) for name in VARIANTS]
    before, started = results["seconds"], time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        data, start = load(preset, Path(folder)), None
        if preset.pretraining:  # again on --resume, to the same weights
            start, results["pretraining"] = pretrain(preset, data, device)
            print(f"pretraining: mAP {100 * results['pretraining']['map_11']:.1f}", flush=True)
        for name, seed in wanted:
            if (name, seed) in done:
                continue
            run = run_one(name, seed, preset, data, start, device)
            results["runs"].append(run)
            results["seconds"] = before + time.perf_counter() - started
            environment.write_results(path, results)
            print(
                f"seed {seed}, {name}: mAP {100 * run['map_11']:.1f}, {run['seconds']:.0f} s",
                flush=True,
            )


def settings_record(preset: Preset) -> dict[str, Any]:
    """The preset as JSON reads it back."""
    return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(preset).items()}


def resumed(path: Path, fresh: dict[str, Any]) -> dict[str, Any]:
    """The results to go on with; BenchmarkError where they are of another experiment."""
    stored = report.read(path)
    for key in ("preset", "settings", "digest", "versions"):
        if stored[key] != environment.rounded(fresh[key]):
            raise BenchmarkError(
                f"--resume: expected {path} to have this run's {key}, {fresh[key]}, got"
                f" {stored[key]}; leave out --resume to start again, or choose another --out"
            )
    if stored["device"]["name"] != fresh["device"]["name"]:
        raise BenchmarkError(
            f"--resume: expected {path} to be of {fresh['device']['name']}, got"
            f" {stored['device']['name']}; choose another --out"
        )
    return stored


def write_block(options: argparse.Namespace) -> int:
    """The block of the committed results in docs/paper.md, or whether it is there."""
    page = options.page or environment.ROOT / "docs" / "paper.md"
    old = read_page(page)
    new = with_block(old, report.block(environment.COMMITTED, page.resolve()), page)
    if not options.check:
        environment.write_atomically(page, new)
    elif new != old:
        print(
            f"{report.MODULE}: {page}: the block between the ablation markers is not what the"
            f" results generate; run {report.COMMAND}",
            file=sys.stderr,
        )
        return 1
    return 0


def run(options: argparse.Namespace) -> int:
    if options.write or options.check:
        return write_block(options)
    preset = PRESETS[options.preset]
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    path = environment.results_file("ablation", kind, "full", options.out)
    if path.exists() and not options.resume:
        raise BenchmarkError(
            f"results: expected a new file, got {path}; go on with it with --resume, choose another"
            " with --out, or remove it"
        )
    experiment(preset, options, path)
    results = report.read(path)
    print(report.text(results))
    chart = report.draw(results, path.with_suffix(".png"))
    print(f"\nresults: {path}" + (f"\nchart:   {chart}" if chart else ""))
    return 0


def main(arguments: list[str] | None = None) -> int:
    kind = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        f"python -m {report.MODULE}", description=__doc__, formatter_class=kind
    )
    parser.add_argument("--preset", choices=tuple(PRESETS), default="small")
    parser.add_argument("--out", metavar="FILE", help="where the results go")
    parser.add_argument("--resume", action="store_true", help="go on with the results there")
    parser.add_argument("--write", action="store_true", help="measure nothing, write the block")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if it is old")
    parser.add_argument("--page", type=Path, help="whose block, in place of docs/paper.md's")
    try:
        return run(parser.parse_args(arguments))
    except BenchmarkError as error:
        print(f"{report.MODULE}: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
