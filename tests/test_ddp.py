"""Two processes that share each step's images do what one does with all of them."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("torchvision")
pytest.importorskip("skimage")
pytest.importorskip("tensorboard")

from da_ops.detection import checkpoint
from da_ops.detection.synthetic import make_data

# PyTorch has no batch norm over several processes on the CPU. With norms that see one image at a
# time the processes share nothing but the loss and the gradient, which is what is tested.
SCRIPT = """
import sys
from pathlib import Path
import torch
from torch import nn
torch.cuda.is_available = lambda: False
torch.set_num_threads(1)
from da_ops.detection import checkpoint, training
from da_ops.detection.settings import Settings

def build_model(*args):
    model = checkpoint.build_model(*args)
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.BatchNorm2d):
                setattr(module, name, nn.GroupNorm(8, child.num_features))
    return model

training.build_model = build_model
settings = Settings(backbone="resnet18", size=32, batch_size=4, steps=3, warmup=1, lr=1e-3)
training.train(Path(sys.argv[1]), Path(sys.argv[2]), settings, eval_every=3)
"""
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folders of the same run by one process and by two."""
    folder = tmp_path_factory.mktemp("ddp")
    make_data(folder / "voc", train=7, test=3, size=64)
    script = folder / "script.py"
    script.write_text(SCRIPT)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    torchrun += ["--master-addr", "127.0.0.1", "--master-port", "0", "--standalone"]
    started = [
        subprocess.Popen(
            [*launcher, str(script), str(folder / "voc"), str(folder / name)],
            env=environment, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for name, launcher in (("one", [sys.executable]), ("two", torchrun))
    ]  # fmt: skip
    for process in started:
        output, _ = process.communicate(timeout=180)
        assert process.returncode == 0, output
    return folder / "one", folder / "two"


def rows(path):
    with path.open() as file:
        return [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]


def test_losses_and_gradients_are_those_of_one_process(runs):
    one, two = (rows(run / "train.csv") for run in runs)
    assert len(one) == len(two) == 3
    for mine, other in zip(one, two):
        assert mine == pytest.approx(other, rel=2e-4)
    assert one[0]["loss"] == pytest.approx(two[0]["loss"], rel=1e-6)


def test_weights_and_precision_are_those_of_one_process(runs):
    one, two = (checkpoint.load(run / "last.pt")["model"] for run in runs)
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-3, atol=1e-5, msg=name)
    found = [rows(run / "eval.csv") for run in runs]
    assert found[0][0] == pytest.approx(found[1][0], abs=0.02)


def test_only_the_first_process_writes(runs):
    for run in runs:
        assert len(list((run / "tensorboard").glob("events.*"))) == 1
        assert {p.name for p in run.iterdir()} == {
            "config.json", "eval.csv", "last.pt", "tensorboard", "train.csv"
        }  # fmt: skip
