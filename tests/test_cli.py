"""The command line: what it refuses before it writes, and how it ends when it is cut short."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("torchvision")
pytest.importorskip("skimage")
pytest.importorskip("tensorboard")

import da_ops
from da_ops import models
from da_ops.backends import NAMES, native, unserved
from da_ops.cli import info, main
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


def test_variables_that_are_set_to_nothing_are_not_set(data, tmp_path, monkeypatch, choice):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "DA_OPS_BACKEND"):
        monkeypatch.setenv(name, "")
    training.train(data, tmp_path / "run", TINY)
    assert (tmp_path / "run" / "last.pt").exists()


# What a maintainer asks for


def told(capsys):
    """What `info` prints, and the same for programs."""
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    assert main(["info", "--json"]) == 0
    return text, json.loads(capsys.readouterr().out)


def strings(facts):
    """All texts in what programs get, but for the keys."""
    if isinstance(facts, (dict, list)):
        inside = facts.values() if isinstance(facts, dict) else facts
        return [text for fact in inside for text in strings(fact)]
    return [facts] if isinstance(facts, str) else []


@pytest.fixture
def folder(monkeypatch, tmp_path):
    """An installation with this record, and a library."""

    def install(**record):
        (tmp_path / "_cpu.abi3.so").write_bytes(b"not a library")
        if record:
            (tmp_path / "_build.json").write_text(json.dumps(record))
        monkeypatch.setattr(native, "FOLDER", tmp_path)
        return tmp_path

    return install


def test_info_says_to_people_what_it_says_to_programs(capsys, choice):
    text, facts = told(capsys)
    assert [said for said in strings(facts) if said not in text] == []


def test_info_tells_versions(capsys, choice):
    _, facts = told(capsys)
    versions = facts["versions"]
    assert versions["da_ops"] == da_ops.__version__
    assert versions["torch"] == torch.__version__
    assert versions["cuda"] == torch.version.cuda
    assert versions["numpy"] == np.__version__
    assert versions["python"] == platform.python_version()
    assert versions["libc"] == " ".join(platform.libc_ver())
    triton = pytest.importorskip("triton")
    assert versions["triton"] == triton.__version__


def test_info_tells_what_was_built_and_why_not(capsys, choice, folder):
    record = {
        "version": "1.2.3",
        "cpu": {"built": True, "reason": None},
        "plan": {"built": False, "reason": "no Python.h"},
        "cuda": {
            "built": False,
            "reason": "no nvcc",
            "arch_list": [],
            "compiler": None,
            "version": None,
        },
        "compiler": "c++ 99.1",
        "flags": ["-O3"],
        "torch": "9.9",
        "python": "3.99",
    }
    library = (folder(**record) / "_cpu.abi3.so").read_bytes()
    text, facts = told(capsys)
    assert {name: facts["build"][name] for name in record} == record
    digest = hashlib.blake2b(library, digest_size=16).hexdigest()
    assert facts["libraries"] == {"_cpu.abi3.so": {"bytes": len(library), "digest": digest}}
    for said in (digest, "no Python.h", "no nvcc", "c++ 99.1", "torch 9.9", "Python 3.99", "1.2.3"):
        assert said in text


def test_info_tells_architectures(capsys, choice, folder):
    built = {"built": True, "reason": None}
    cuda = {**built, "arch_list": ["8.0", "12.0+PTX"], "compiler": "nvcc 13.7 in /x, from PATH"}
    record = {"version": "1", "cpu": built, "plan": built, "cuda": cuda, "compiler": None}
    folder(**record, flags=[], torch="9.9", python="3.99")
    text, _ = told(capsys)
    assert "8.0 12.0+PTX" in text and "nvcc 13.7 in /x, from PATH" in text


def test_info_works_where_nothing_was_built(capsys, choice, folder):
    folder()
    text, facts = told(capsys)
    assert facts["build"] is None and "no record" in text


def test_info_works_without_the_planner(capsys, choice, monkeypatch):
    def planner():
        raise RuntimeError("no planner here")

    monkeypatch.setattr(native, "planner", planner)
    text, facts = told(capsys)
    assert facts["devices"]["cpu"]["instruction_set"] is None
    assert "instruction set unknown" in text


def test_info_tells_of_the_processor(capsys, choice, fused_cpu):
    _, facts = told(capsys)
    cpu = facts["devices"]["cpu"]
    assert cpu["cores"] == len(os.sched_getaffinity(0))
    assert cpu["threads"] == torch.get_num_threads()
    explained = da_ops.explain(torch.empty(1, 8, 4, 4)).to_dict()["details"]["instruction_set"]
    assert cpu["instruction_set"] == explained


def test_info_tells_of_every_gpu(capsys, choice, monkeypatch):
    gpus = [
        SimpleNamespace(name="Tesla T4", major=7, minor=5, total_memory=15 * 2**30),
        SimpleNamespace(name="NVIDIA H200", major=9, minor=0, total_memory=141 * 2**30),
        None,
    ]

    def properties(index):
        if gpus[index] is None:
            raise RuntimeError("CUDA error: it fell off the bus\nCompile with ...")
        return gpus[index]

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(gpus))
    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    monkeypatch.setattr(info, "select", lambda asked, kind: "triton" if kind == "cuda" else "cpu")
    monkeypatch.setattr(info, "passed_over", lambda name, kind: f"{name} does not suit {kind}")
    monkeypatch.setattr(info.driver, "version", lambda: "580.95.05")
    monkeypatch.setattr(info, "driver_version", lambda: "13.0")
    text, facts = told(capsys)
    assert facts["devices"]["gpus"] == [
        {"name": "Tesla T4", "capability": "7.5", "memory": 15 * 2**30},
        {"name": "NVIDIA H200", "capability": "9.0", "memory": 141 * 2**30},
        {"name": "CUDA error: it fell off the bus", "capability": None, "memory": None},
    ]
    assert facts["devices"]["driver"] == {"version": "580.95.05", "cuda": "13.0"}
    assert facts["auto"]["cuda"] == {
        "backend": "triton",
        "error": None,
        "passed_over": {"cuda": "cuda does not suit cuda"},
    }
    assert "NVIDIA H200, compute capability 9.0, 141.0 GiB" in text
    assert [said for said in strings(facts) if said not in text] == []


def test_info_tells_of_variables_that_are_set(capsys, choice, monkeypatch):
    monkeypatch.setenv("DA_OPS_PLAN", "portable,grid=64")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setenv("SOMEBODYS_TOKEN", "secret")
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    text, facts = told(capsys)
    assert facts["environment"]["DA_OPS_PLAN"] == "portable,grid=64"
    assert facts["environment"]["CUDA_VISIBLE_DEVICES"] == ""
    assert "DA_OPS_PLAN=portable,grid=64" in text and "OMP_NUM_THREADS=3" in text
    assert "TORCH_CUDA_ARCH_LIST" not in text and "secret" not in text


@pytest.mark.parametrize("wish", ["cpuu", "cuda"])
def test_info_works_where_the_backend_asked_for_does_not(capsys, choice, monkeypatch, wish):
    """There above all."""
    monkeypatch.setenv("DA_OPS_BACKEND", wish)
    text, facts = told(capsys)
    chosen = facts["auto"]["cpu"]
    assert chosen["backend"] is None and repr(wish) in chosen["error"]
    assert chosen["error"] in text and f"DA_OPS_BACKEND={wish}" in text


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
