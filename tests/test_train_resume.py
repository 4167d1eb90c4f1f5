"""A run that is killed and resumed is the run that nobody killed."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("torchvision")
pytest.importorskip("skimage")
pytest.importorskip("tensorboard")

from da_ops.detection import checkpoint, training
from da_ops.detection.logs import Table
from da_ops.detection.settings import Settings
from da_ops.detection.synthetic import make_data

STEPS = 14
SETTINGS = Settings(backbone="resnet18", size=32, batch_size=2, steps=STEPS, warmup=2, lr=1e-4)
OPTIONS = ["--backbone", "resnet18", "--size", "32", "--batch-size", "2", "--warmup", "2"]
OPTIONS += ["--steps", str(STEPS), "--lr", "1e-4", "--workers", "1"]
OPTIONS += ["--eval-every", "5", "--checkpoint-every", "3"]
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data") / "voc"
    make_data(root, train=5, test=2, size=64)
    return root


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """The folder of the run that nobody killed."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    with pytest.MonkeyPatch.context() as patch:  # on the CPU, where results are equal to the bit
        patch.setattr(torch.cuda, "is_available", lambda: False)
        training.train(data, folder, SETTINGS, eval_every=5, checkpoint_every=3)
    return folder


def start(data, folder, *more):
    command = [sys.executable, "-m", "da_ops", "train", str(data), "--out", str(folder), *OPTIONS]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    # A session of its own, so that the kill takes the loader's worker too.
    return subprocess.Popen(
        [*command, *more], env=environment, cwd=ROOT, start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def kill_at(process, folder, step):
    """SIGKILL once the run's log has this step."""
    log = folder / "train.csv"
    while process.poll() is None and not (log.exists() and f"\n{step}," in log.read_text()):
        time.sleep(0.002)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def assert_same(folder, whole):
    for name in ("train.csv", "eval.csv", "config.json"):
        assert (folder / name).read_text() == (whole / name).read_text(), name
    mine, other = (checkpoint.load(run / "last.pt") for run in (folder, whole))
    assert mine["step"] == other["step"] == STEPS
    for part in ("model", "optimizer"):
        torch.testing.assert_close(mine[part], other[part], rtol=0, atol=0)


def test_killed_at_random_steps_and_resumed(data, whole, tmp_path):
    step, more = random.SystemRandom().randrange(1, STEPS - 2), []
    for _ in range(2):
        kill_at(start(data, tmp_path / "run", *more), tmp_path / "run", step)
        step, more = min(step + 2, STEPS - 1), ["--resume"]
    process = start(data, tmp_path / "run", *more)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert_same(tmp_path / "run", whole)


def test_killed_before_the_first_checkpoint_or_between_log_and_checkpoint(
    data, whole, tmp_path, monkeypatch
):
    class Killed(BaseException):
        pass

    def kill(*args):
        raise Killed

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    run = tmp_path / "run"
    for times in range(3):
        with monkeypatch.context() as patch:
            patch.setattr(training, "save", kill)
            with pytest.raises(Killed):
                training.train(
                    data, run, SETTINGS, resume=times > 0, eval_every=5, checkpoint_every=3
                )
        assert not (run / "last.pt").exists()
    (run / ".last.pt.half").write_bytes(b"what a kill left of a checkpoint")
    training.train(data, run, SETTINGS, resume=True, eval_every=5, checkpoint_every=3)
    assert_same(run, whole)
    assert not list(run.glob(".*"))


def test_a_table_drops_what_is_later_and_what_is_torn(tmp_path):
    path = tmp_path / "table.csv"
    path.write_text("step,a,b\n1,0.5,1.0\n2,0.25,2.0\n3,0.1,3.0\n4,0.")
    table = Table(path, ("a", "b"), step=2)
    table.add(3, {"a": 7.0, "b": 8.0})
    table.file.close()
    assert path.read_text() == "step,a,b\n1,0.5,1.0\n2,0.25,2.0\n3,7.0,8.0\n"
    Table(path, ("a", "b"), step=0).file.close()
    assert path.read_text() == "step,a,b\n"
