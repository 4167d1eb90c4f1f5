"""The command line: what it refuses before it writes, and how it ends when it is cut short."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

pytest.importorskip("torchvision")
pytest.importorskip("skimage")
pytest.importorskip("tensorboard")

from da_ops import models
from da_ops.backends import NAMES, unserved
from da_ops.cli import main
from da_ops.detection import synthetic, training
from da_ops.detection.interrupts import uninterrupted
from da_ops.detection.settings import Settings
from da_ops.detection.synthetic import make_data

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
TINY = Settings(backbone="resnet18", size=32, batch_size=2, steps=1, warmup=1)
OPTIONS = ["--backbone", "resnet18", "--size", "32", "--batch-size", "2", "--workers", "0"]
OPTIONS += ["--steps", "2", "--warmup", "1"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data") / "voc"
    make_data(root, train=4, test=2, size=64)
    return root


# What is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--backend cpuu", "invalid choice: 'cpuu'"),
        ("--backend unusable", "cannot serve"),
        ("--backend cpu --attention se", "backend goes with attention='da'"),
        ("--gate eca --attention none", "gate goes with attention='da'"),
        ("--weights nowhere.pt", "'nowhere.pt', which is neither"),
        ("--weights other.pt", "other.pt does not fit"),
        ("--size 31", "size must be at least 32 pixels"),
        ("--mapping c3c4c5 --batch-size 1", "at least 2 images for each process"),
        ("--attention fca", "got 4 x 4 from images of 32 pixels; train on larger"),
        ("--attention fca --mapping c3c4c5 --size 192", "got 6 x 6 from images of 192 pixels"),
        ("--attention fca --transformer layer5", "invalid choice: 'layer5'"),
        ("--transformer layer4", "one of layer1, layer2, layer3 with mapping='c4'"),
        ("--seed 18446744073709551616", "seed: expected"),
        ("--steps 0", "steps: expected"),
        ("--milestones 5 -3", "milestones: expected"),
        ("--lr inf", "lr: expected"),
        ("--eval-every -1", "expected a number of at least 0"),
        ("--workers -1", "expected a number of at least 0"),
        ("--resume", "leave out --resume to start a run"),
    ],
)
def test_what_can_be_refused_is_refused_before_there_is_a_folder(
    data, tmp_path, monkeypatch, capsys, options, message
):
    monkeypatch.chdir(tmp_path)
    torch.save(models.resnet34(None).state_dict(), "other.pt")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    unusable = next(name for name in NAMES if unserved(name, device))
    more = options.replace("unusable", unusable).split()
    try:
        status = main(["train", str(data), "--out", "run", *OPTIONS, *more])
    except SystemExit as stopped:  # argparse
        status = stopped.code
    assert status in (1, 2) and message in capsys.readouterr().err
    assert os.listdir() == ["other.pt"]


@pytest.mark.parametrize("wish", ["cpuu", "unusable"])
def test_a_backend_of_the_environment_is_looked_at_before_there_is_a_folder(
    data, tmp_path, monkeypatch, choice, wish
):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    unusable = next(name for name in NAMES if unserved(name, device))
    monkeypatch.setenv("DA_OPS_BACKEND", wish.replace("unusable", unusable))
    with pytest.raises((ValueError, RuntimeError), match="asked for by the environment's DA_OPS"):
        training.train(data, tmp_path / "run", TINY)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["eval_every", "checkpoint_every"])
def test_negative_intervals_are_refused(data, tmp_path, name):
    with pytest.raises(ValueError, match=f"{name}: expected a number of steps, .* got -1"):
        training.train(data, tmp_path / "run", TINY, **{name: -1})
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("path", ["nowhere/x.png", "."])
def test_a_picture_that_could_not_be_written_is_refused_before_networks_are_read(
    path, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    assert main(["cam", "no-image.png", "--da", "no-network", "--out", path]) == 1
    told = f"da-ops: --out: expected a file in a folder that exists, got {path}\n"
    assert capsys.readouterr().err == told


def test_variables_that_are_set_to_nothing_are_not_set(data, tmp_path, monkeypatch, choice):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "DA_OPS_BACKEND"):
        monkeypatch.setenv(name, "")
    training.train(data, tmp_path / "run", TINY)
    assert (tmp_path / "run" / "last.pt").exists()


# A reader that has gone


@pytest.mark.parametrize(
    ("command", "unbuffered"),
    [
        ("tables 2", ""),
        ("info", ""),
        ("info --json", "1"),
        ("explain 8x64x56x56", "1"),
        ("train --help", ""),
    ],
)
def test_output_that_nobody_reads_ends_the_command_quietly(command, unbuffered):
    """As `| head` does, after a line or before the first."""
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-m", "da_ops", *command.split()], cwd=ROOT, stdout=writing,
        env={**ENVIRONMENT, "PYTHONUNBUFFERED": unbuffered}, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    os.close(writing)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, "")


def test_progress_that_nobody_reads_ends_a_run_quietly(data, tmp_path):
    command = [sys.executable, "-m", "da_ops", "train", str(data), "--out", str(tmp_path / "run")]
    command += [*OPTIONS, "--steps", "1000", "--workers", "1"]
    process = subprocess.Popen(
        command, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert process.stdout.readline()
    process.stdout.close()
    assert process.wait(timeout=120) == 128 + signal.SIGPIPE


# Ctrl-C


@pytest.fixture
def interrupted(monkeypatch):
    """Ctrl-C in training, once it has written these files, and in making data."""

    def interrupt(*files):
        def train(data, out=None, settings=None, **options):
            for name in files:
                out.mkdir(exist_ok=True)
                (out / name).touch()
            raise KeyboardInterrupt

        monkeypatch.setattr(training, "train", train)
        monkeypatch.setattr(synthetic, "make_data", train)

    return interrupt


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], "before anything was written to {0}; start the run again"),
        (["config.json"], "{0} has no checkpoint yet; --resume starts the run again in it"),
        (
            ["config.json", "last.pt"],
            "the newest checkpoint is {0}/last.pt; --resume goes on from there",
        ),
    ],
)
@pytest.mark.parametrize("rank", ["", "0", "1"])
def test_an_interrupted_run_says_where_it_stands(
    interrupted, tmp_path, monkeypatch, capsys, rank, files, message
):
    """One line, of the first process if there are several."""
    interrupted(*files)
    monkeypatch.setenv("RANK", rank)
    folder = tmp_path / "run"
    assert main(["train", str(tmp_path), "--out", str(folder)]) == 128 + signal.SIGINT
    told = f"da-ops: interrupted: {message.format(folder)}, with the same command otherwise\n"
    assert capsys.readouterr().err == ("" if rank == "1" else told)


def test_other_commands_just_end(interrupted, tmp_path, capsys):
    interrupted()
    assert main(["make-data", str(tmp_path / "voc"), "--train", "1", "--test", "1"]) == 130
    assert capsys.readouterr().err == "da-ops: interrupted\n"


def test_what_must_not_be_cut_short_is_done_first():
    done, handler = [], signal.getsignal(signal.SIGINT)

    @uninterrupted()
    def work():
        signal.raise_signal(signal.SIGINT)
        done.append(1)

    @uninterrupted()
    def impatient():
        for _ in range(9):  # of which the third one does not wait
            done.append(0)
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        work()
    with pytest.raises(KeyboardInterrupt):
        impatient()
    assert done == [1, 0, 0, 0]
    del done[1:]
    with ThreadPoolExecutor() as pool:  # where no signal can be handled
        pool.submit(uninterrupted()(done.append), 2).result()
    assert done == [1, 2] and signal.getsignal(signal.SIGINT) is handler


def test_no_traceback_of_any_process(data, tmp_path):
    folder = tmp_path / "run"
    command = [sys.executable, "-m", "da_ops", "train", str(data), "--out", str(folder), *OPTIONS]
    command += ["--steps", "1000", "--workers", "2", "--checkpoint-every", "1"]
    process = subprocess.Popen(
        command, cwd=ROOT, env=ENVIRONMENT, start_new_session=True, text=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell may ignore it
    )  # fmt: skip
    while process.poll() is None and not (folder / "last.pt").exists():
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)  # a terminal sends it to the loader's workers too
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGINT
    *before, last = errors.splitlines()
    assert last.startswith(f"da-ops: interrupted: the newest checkpoint is {folder}/last.pt")
    assert all("da_ops: " in line or "step" in line for line in before if line), errors
