"""Training and evaluation: what a step is made of, what a run writes, and what stops it."""

from __future__ import annotations

import argparse
import csv
import dataclasses
import json
import logging
import math
import os
import re

import pytest
import torch

pytest.importorskip("torchvision")
pytest.importorskip("skimage")
pytest.importorskip("tensorboard")

from da_ops import models
from da_ops.cli import main
from da_ops.cli import train as train_command
from da_ops.detection import checkpoint, training
from da_ops.detection.distributed import World
from da_ops.detection.evaluation import evaluate
from da_ops.detection.loading import Seeded, StepSampler
from da_ops.detection.optimisation import NotFiniteError, parameter_groups, stepwise
from da_ops.detection.settings import Settings
from da_ops.detection.synthetic import make_data
from da_ops.detection.voc import VOCDetection, read_classes
from da_ops.models.blocks import residual_blocks

TINY = Settings(backbone="resnet18", size=32, batch_size=2, steps=4, warmup=2, lr=1e-3, seed=3)
OPTIONS = ["--backbone", "resnet18", "--size", "32", "--batch-size", "2", "--workers", "0"]
OPTIONS += ["--steps", "2", "--warmup", "1", "--seed", "3"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data") / "voc"
    make_data(root, train=6, test=3, size=64)
    return root


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    """The folder of a run of four steps."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    training.train(data, folder, TINY, eval_every=2, checkpoint_every=2)
    return folder


@pytest.mark.parametrize("augmentation", ["ssd", "mirror"])
def test_the_augmentation_that_was_asked_for(data, monkeypatch, augmentation):
    asked = []
    monkeypatch.setattr(training, "train_transforms", lambda *a: asked.append(a))
    settings = dataclasses.replace(TINY, augmentation=augmentation)
    training.training_set(data, read_classes(data), settings)
    assert asked == [(32, augmentation)]


def rows(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def weights(folder):
    return checkpoint.load(folder / "last.pt")["model"]


# The schedule


def test_the_defaults_are_the_papers():
    commands = argparse.ArgumentParser().add_subparsers()
    train_command.add(commands)
    args = vars(commands.choices["train"].parse_args(["data", "--out", "run"]))
    expected = {"batch_size": 32, "steps": 120_000, "lr": 1e-3, "warmup": 500, "size": 300}
    expected |= {"momentum": 0.9, "weight_decay": 5e-4, "backbone": "resnet50", "mapping": "c4"}
    assert {name: args[name] for name in expected} == expected
    assert Settings().divided_at == (80_000, 100_000)


def test_learning_rate():
    rate = stepwise(Settings(lr=1.0, steps=60, warmup=10, milestones=(30, 50)))
    assert [rate(step) for step in (0, 4, 9, 10, 29)] == pytest.approx([0.1, 0.5, 1, 1, 1])
    assert [rate(step) for step in (30, 49, 50, 59)] == pytest.approx([0.1, 0.1, 0.01, 0.01])


@pytest.mark.parametrize("attention", ["da", "se", "sge", "eca", "fca", None])
def test_weight_decay_spares_the_vectors_of_attention_layers(attention):
    model = models.resnet18(attention)
    with_decay, *without = parameter_groups(model, 0.1)
    names = {id(p): name for name, p in model.named_parameters()}
    spared = [names[id(p)] for group in without for p in group["params"]]
    assert with_decay["weight_decay"] == 0.1
    assert all(group["weight_decay"] == 0 for group in without)
    endings = {"da": ("gate_weight", "gate_bias"), "sge": ("weight", "bias")}.get(attention, ())
    held = [name for name in names.values() if name.partition(".attention.")[2] in endings]
    assert sorted(spared) == sorted(held)
    assert len(spared) == 8 * len(endings)
    assert len(with_decay["params"]) + len(spared) == len(names)


# What a step is made of


def test_every_image_once_an_epoch_in_a_new_order():
    keys = [key for step in StepSampler(7, 3, 0, 7, seed=1) for key in step]
    for epoch in range(3):
        mine = [index for e, index in keys if e == epoch]
        assert sorted(mine) == list(range(7))
    assert [i for _, i in keys[:7]] != [i for _, i in keys[7:14]]
    assert keys != [key for step in StepSampler(7, 3, 0, 7, seed=2) for key in step]


def test_steps_depend_neither_on_the_start_nor_on_the_number_of_processes():
    whole = list(StepSampler(10, 4, 0, 9, seed=1))
    assert list(StepSampler(10, 4, 5, 9, seed=1)) == whole[5:]
    shares = [StepSampler(10, 4, 0, 9, seed=1, rank=r, world_size=2) for r in range(2)]
    assert [a + b for a, b in zip(*shares)] == whole
    with pytest.raises(ValueError, match=r"batch_size: expected a multiple of the 3 processes"):
        StepSampler(10, 4, 0, 9, seed=1, world_size=3)


def test_augmentation_is_a_function_of_seed_epoch_and_index():
    class Dice:
        def __getitem__(self, index):
            return float(torch.rand(()))

    def draw(seed, epoch, index):
        return Seeded(Dice(), seed)[epoch, index]

    first = draw(0, 1, 2)
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    assert draw(0, 1, 2) == first
    assert torch.equal(torch.random.get_rng_state(), before)
    assert len({first, draw(1, 1, 2), draw(0, 2, 2), draw(0, 1, 3), draw(0, 2, 1)}) == 5


# What a run writes


def test_a_run_writes_its_settings_losses_precision_and_weights(run, data):
    config = json.loads((run / "config.json").read_text())
    assert Settings.from_dict(config["settings"]) == TINY
    assert config["classes"] == list(read_classes(data))
    losses = rows(run / "train.csv")
    assert [row["step"] for row in losses] == ["1", "2", "3", "4"]
    assert [float(row["lr"]) for row in losses] == pytest.approx([5e-4, 1e-3, 1e-4, 1e-5])
    for row in losses:
        parts = float(row["bbox_regression"]) + float(row["classification"])
        assert float(row["loss"]) == pytest.approx(parts, rel=1e-6)
    found = rows(run / "eval.csv")
    assert [row["step"] for row in found] == ["2", "4"]
    assert all(0 <= float(row["map_11"]) <= 1 for row in found)
    assert list((run / "tensorboard").glob("events.*"))
    detector = checkpoint.load_detector(run)
    assert detector.step == 4 and detector.settings == TINY and not detector.model.training


def test_the_same_seed_gives_the_same_run_whatever_the_workers(run, data, tmp_path):
    training.train(data, tmp_path / "again", TINY, eval_every=2, workers=2)
    assert (tmp_path / "again" / "train.csv").read_text() == (run / "train.csv").read_text()
    again = weights(tmp_path / "again")
    assert all(torch.equal(again[name], value) for name, value in weights(run).items())


def test_it_learns(data, tmp_path):
    settings = dataclasses.replace(TINY, batch_size=6, steps=20, lr=5e-3, clip_norm=10.0)
    training.train(data, tmp_path / "run", settings)
    losses = [float(row["loss"]) for row in rows(tmp_path / "run" / "train.csv")]
    assert sum(losses[-3:]) < 0.6 * sum(losses[:3])


@pytest.mark.parametrize("option", [{"amp": True}, {"channels_last": True}])
def test_mixed_precision_and_channels_last_train_alike(run, data, tmp_path, option):
    settings = dataclasses.replace(TINY, steps=1, **option)
    training.train(data, tmp_path / "run", settings)
    (first,) = rows(tmp_path / "run" / "train.csv")
    expected = float(rows(run / "train.csv")[0]["loss"])
    assert float(first["loss"]) == pytest.approx(expected, rel=0.05 if "amp" in option else 1e-4)
    layout = torch.channels_last if "channels_last" in option else torch.contiguous_format
    conv = weights(tmp_path / "run")["backbone.body.layer1.0.conv1.weight"]
    assert conv.dtype == torch.float32
    assert conv.is_contiguous(memory_format=layout)


def test_fused_and_not_train_alike_and_load_each_others_checkpoints(run, data, tmp_path):
    settings = dataclasses.replace(TINY, steps=1, fused=False)
    training.train(data, tmp_path / "run", settings)
    (first,) = rows(tmp_path / "run" / "train.csv")
    assert float(first["loss"]) == pytest.approx(
        float(rows(run / "train.csv")[0]["loss"]), rel=1e-5
    )
    for fused, folder in ((True, run), (False, tmp_path / "run")):
        model = checkpoint.load_detector(folder).model
        assert all(block.fused == fused for _, block in residual_blocks(model))
        other = dataclasses.replace(settings, fused=not fused)
        checkpoint.build_model(other, read_classes(data)).load_state_dict(weights(folder))


def test_settings_of_a_run_from_before_fusing():
    stored = TINY.to_dict()
    del stored["fused"]
    assert Settings.from_dict(stored) == TINY


# The command line


def test_train_then_eval(data, tmp_path, capsys):
    out, file = tmp_path / "run", tmp_path / "ap.json"
    assert main(["train", str(data), "--out", str(out), *OPTIONS, "--attention", "none"]) == 0
    command = ["eval", str(out), str(data), "--json", str(file), "--workers", "0"]
    assert main(command) == 0
    shown = capsys.readouterr().out
    found = json.loads(file.read_text())
    classes = read_classes(data)
    assert list(found["ap"]) == list(found["ap_11"]) == list(classes)
    assert all(name in shown for name in classes) and "mean" in shown
    assert found["images"] == 3 and found["step"] == 2 and not found["plus_one"]
    assert found["settings"]["attention"] == "none"


def test_eval_of_a_folder_without_a_checkpoint_of_other_files_and_of_other_classes(
    run, data, tmp_path, capsys
):
    def error(*arguments):
        assert main(["eval", *map(str, arguments), "--workers", "0"]) == 1
        return capsys.readouterr().err

    assert "without last.pt" in error(tmp_path, data)
    assert "nowhere.pt" in error(tmp_path / "nowhere.pt", data)
    torn = tmp_path / "torn.pt"
    torn.write_bytes((run / "last.pt").read_bytes()[:1000])
    assert f"{torn}: expected a checkpoint" in error(torn, data)
    torch.save({"conv": torch.zeros(1)}, torn)
    assert "got another file of torch.save" in error(torn, data)
    torch.save({"model": {}, "args": argparse.Namespace(lr=0.1)}, torn)
    assert "got another file of torch.save; give the last.pt of a run" in error(torn, data)
    make_data(tmp_path / "other", train=1, test=1, size=64)
    (tmp_path / "other" / "VOCdevkit" / "classes.txt").write_text("cat\ndog\n")
    message = error(run, tmp_path / "other")
    assert "expected the classes that the checkpoint was trained on" in message
    assert "cat, dog" in message
    assert "no such split" in error(run, data, "--split", "nothing")


def test_the_checkpoint_of_a_compiled_detector(run, tmp_path, caplog):
    stored = checkpoint.load(run / "last.pt")
    stored["model"] = {f"_orig_mod.{name}": value for name, value in stored["model"].items()}
    torch.save(stored, tmp_path / "a.pt")
    with caplog.at_level(logging.INFO, "da_ops"):
        detector = checkpoint.load_detector(tmp_path / "a.pt")
    assert f"{tmp_path / 'a.pt'}: '_orig_mod.' taken off the keys" in caplog.text
    own = detector.model.state_dict()
    assert all(torch.equal(own[name], value) for name, value in weights(run).items())


def test_eval_of_a_file_of_safetensors(data, tmp_path, capsys):
    path = tmp_path / "a.safetensors"
    pytest.importorskip("safetensors.torch").save_file({"conv": torch.zeros(1)}, path)
    assert main(["eval", str(path), str(data), "--workers", "0"]) == 1
    assert "got weights alone; give the last.pt of a run" in capsys.readouterr().err


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_detector_of_another_dtype_is_evaluated(run, data, dtype):
    classes = read_classes(data)
    model = checkpoint.load_detector(run / "last.pt").model
    dataset, world = training.evaluation_set(data, classes), World(0, 1, torch.device("cpu"))
    expected = evaluate(model, dataset, classes, world)["map"]
    found = evaluate(model.to(dtype), dataset, classes, world)["map"]
    assert found == pytest.approx(expected, abs=0.05)


# What stops a run


def test_a_run_is_not_overwritten(run, data):
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    with pytest.raises(FileExistsError, match=r"choose another, or continue .* with --resume"):
        training.train(data, run, TINY)
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


def test_a_run_that_was_killed_before_it_began_can_be_started_again(data, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / ".config.json.half").write_text("{")
    training.train(data, run, dataclasses.replace(TINY, steps=1))
    assert (run / "last.pt").exists()


def test_resume_needs_the_run_and_its_settings(run, data, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"leave out --resume to\s+start a run"):
        training.train(data, tmp_path / "none", TINY, resume=True)
    others = dataclasses.replace(TINY, lr=0.5, milestones=(1, 2))
    with pytest.raises(
        ValueError, match=r"It has lr 0.001, not 0.5; milestones None, not \[1, 2\]"
    ):
        training.train(data, run, others, resume=True)
    make_data(tmp_path / "more", train=7, test=1, size=64)
    with pytest.raises(ValueError, match="6 training images, not 7"):
        training.train(tmp_path / "more", run, TINY, resume=True)


def test_resuming_a_finished_run_changes_nothing(run, data):
    before = (run / "last.pt").read_bytes(), (run / "train.csv").read_bytes()
    training.train(data, run, TINY, resume=True, eval_every=2)
    assert ((run / "last.pt").read_bytes(), (run / "train.csv").read_bytes()) == before


def test_a_loss_that_is_not_finite_stops_the_run_and_names_step_and_images(data, tmp_path):
    settings = dataclasses.replace(TINY, lr=1e30, warmup=0, steps=9)
    with pytest.raises(NotFiniteError) as stopped:
        training.train(data, tmp_path / "run", settings, checkpoint_every=1)
    step = len(rows(tmp_path / "run" / "train.csv"))
    assert f"step {step}: expected a finite" in str(stopped.value)
    assert f"{tmp_path / 'run' / 'last.pt'} is as it was" in str(stopped.value)
    keys = next(iter(StepSampler(6, 2, step, step + 1, seed=settings.seed)))
    dataset = VOCDetection(data, [("2007", "trainval")], classes=read_classes(data))
    for _, index in keys:
        assert dataset.image_ids[index] in str(stopped.value)
    stored = checkpoint.load(tmp_path / "run" / "last.pt")
    assert stored["step"] == step
    assert all(v.isfinite().all() for v in stored["model"].values())
    with pytest.raises(NotFiniteError, match=r"no checkpoint is in .*another --out, or this one e"):
        training.train(data, tmp_path / "other", settings)


def test_a_checkpoint_is_written_whole_or_not_at_all(run, data, tmp_path, monkeypatch):
    training.train(data, tmp_path / "run", dataclasses.replace(TINY, steps=1))
    before = (tmp_path / "run" / "last.pt").read_bytes()

    def full_disk(*args):
        raise OSError("no space left")

    for module, name in ((torch, "save"), (os, "fsync"), (os, "replace")):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, full_disk)
            with pytest.raises(OSError, match="no space left"):
                checkpoint.save(tmp_path / "run" / "last.pt", {}, checkpoint.Run(TINY, (), 0))
        assert (tmp_path / "run" / "last.pt").read_bytes() == before
    assert not list((tmp_path / "run").glob(".last*"))


def test_data_without_images_or_without_objects_is_refused(data, tmp_path, capsys):
    def error(root):
        arguments = ["train", str(root), "--out", str(tmp_path / "run"), *OPTIONS]
        assert main(arguments) == 1
        assert not (tmp_path / "run").exists()
        return capsys.readouterr().err

    (tmp_path / "empty").mkdir()
    assert str(tmp_path / "empty") in error(tmp_path / "empty")
    assert "nowhere" in error(tmp_path / "nowhere")
    bare = tmp_path / "bare"
    make_data(bare, train=2, test=1, size=64)
    for path in bare.glob("VOCdevkit/VOC2007/Annotations/*.xml"):
        head, _, _ = path.read_text().partition("<object>")
        path.write_text(head + "</annotation>")
    assert "without a single box" in error(bare)


@pytest.mark.parametrize(
    "wrong",
    [
        {"steps": 0}, {"size": 0}, {"clip_norm": 0.0}, {"clip_norm": math.nan}, {"lr": -1.0},
        {"lr": math.inf}, {"lr": math.nan}, {"weight_decay": math.inf}, {"momentum": 1.0},
        {"momentum": math.nan}, {"seed": -1}, {"seed": 2**64}, {"milestones": (5, -3)},
        {"backend": "cpuu"}, {"backend": ""},
    ],
)  # fmt: skip
def test_settings_out_of_range(wrong):
    ((name, value),) = wrong.items()
    with pytest.raises(ValueError, match=rf"{name}: expected .*, got {re.escape(repr(value))}"):
        Settings(**wrong)
    Settings(seed=2**64 - 1, milestones=(), momentum=0.0)
