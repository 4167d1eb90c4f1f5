"""nvcc from pip: when it is fetched, where it comes to lie, what is said when it cannot be had."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from build_tools import toolkit
from build_tools.cuda import PIP_TOOLKIT, CudaCompiler

from .test_cuda_compiler import make_toolkit, script

ROOT = Path(__file__).resolve().parents[1]
WANTED = f"{PIP_TOOLKIT}==13.0.*"


def make_wheel(house, name, version, *lines, content=None):
    """A wheel with `lines` in its metadata and the files of the folder `content`."""
    house.mkdir(exist_ok=True)
    info = f"{name.replace('-', '_')}-{version}.dist-info"
    metadata = "\n".join(["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}", *lines])
    with zipfile.ZipFile(house / f"{info[:-10]}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{info}/METADATA", metadata + "\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
        for path in content.rglob("*") if content else []:
            wheel.write(path, path.relative_to(content))


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """A machine with a GPU, a torch for CUDA 13.0, no nvcc, and pip's packages in a folder only."""
    for name in ("DA_OPS_CUDA", "CUDA_HOME", "CUDA_PATH", "UV", "PIP_EXTRA_INDEX_URL"):
        monkeypatch.delenv(name, raising=False)
    house = tmp_path / "house"
    house.mkdir()
    for name, value in {"NO_INDEX": 1, "FIND_LINKS": house, "CONFIG_FILE": os.devnull}.items():
        monkeypatch.setenv(f"PIP_{name}", str(value))
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("sysconfig.get_path", lambda name: "/nowhere")
    return house


@pytest.fixture
def house(offline, tmp_path):
    """The same, and the packages are there: nvcc of 13.0 and the next one."""
    for version in ("13.0", "13.1"):
        content = tmp_path / version
        make_toolkit(content / "nvidia" / "cu13", release=version)
        make_wheel(offline, "nvidia-cuda-nvcc", f"{version}.88", content=content)
        extras = [f"Provides-Extra: {extra}" for extra in ("nvcc", "cccl", "crt", "nvvm")]
        needs = f'Requires-Dist: nvidia-cuda-nvcc=={version}.88; extra == "nvcc"'
        make_wheel(offline, "cuda-toolkit", f"{version}.3", *extras, needs)
    return offline


@pytest.mark.parametrize(
    ("torch_cuda", "gpu", "asked", "told"),
    [
        ("13.0", True, None, None),
        ("13.0", True, "", None),  # set to nothing is not set
        ("13.2", False, "1", None),
        ("13.0", False, None, "no NVIDIA GPU here: DA_OPS_CUDA=1 fetches it"),
        ("13.0", True, "0", "not fetched: DA_OPS_CUDA=0"),
        ("12.8", True, "1", "install NVIDIA's CUDA toolkit 12.8, or a torch for CUDA 13"),
        ("12.8", False, None, "no NVIDIA GPU here"),
    ],
)
def test_nvcc_is_fetched_for_a_gpu_or_where_asked_for(torch_cuda, gpu, asked, told):
    answer = toolkit.unwanted(torch_cuda, gpu, {} if asked is None else {"DA_OPS_CUDA": asked})
    assert answer is None if told is None else told in answer


def test_the_compiler_of_torchs_version_is_fetched_once(house, tmp_path, monkeypatch, capfd):
    folder = tmp_path / "build" / "cuda-toolkit"
    found = toolkit.find_or_fetch(folder)
    assert found == CudaCompiler(folder / "nvidia" / "cu13", "13.0", "pip")
    told = capfd.readouterr().err
    assert f"pip fetches {WANTED}" in told and f"fetched nvcc into {folder}" in told
    assert not list(folder.parent.glob("*.part"))
    monkeypatch.setattr(toolkit, "run", lambda *_, **__: pytest.fail("fetched again"))
    assert toolkit.find_or_fetch(folder) == found


def test_what_an_earlier_fetch_left_is_replaced(house, tmp_path):
    folder = tmp_path / "cuda-toolkit"
    make_toolkit(folder / "nvidia" / "cu13", release="12.9")  # of an earlier torch
    (tmp_path / "cuda-toolkit.part").mkdir()
    (tmp_path / "cuda-toolkit.part" / "half").touch()
    assert toolkit.find_or_fetch(folder).version == "13.0"
    assert not (folder / "half").exists()


def test_where_it_cannot_be_fetched_that_is_said(offline, tmp_path, capfd):
    folder = tmp_path / "build" / "cuda-toolkit"
    found = toolkit.find_or_fetch(folder)
    assert found.home is None
    assert f"could not be fetched (ERROR: No matching distribution found for {PIP_TOOLKIT}" in (
        found.why.replace("cccl,crt,nvcc,nvvm", "nvcc,cccl,crt,nvvm")  # some pips sort them
    )
    assert f"`pip install '{WANTED}'`" in found.why
    assert "No matching distribution" in capfd.readouterr().err
    assert not folder.exists()


def test_a_folder_that_cannot_be_written_is_said(house, tmp_path):
    (tmp_path / "build").write_text("a file")
    found = toolkit.find_or_fetch(tmp_path / "build" / "cuda-toolkit")
    assert found.home is None and "could not be fetched" in found.why


@pytest.mark.parametrize("why", ["gpu", "switch", "torch"])
def test_where_it_is_not_wanted_pip_is_not_run(why, offline, tmp_path, monkeypatch):
    monkeypatch.setattr(toolkit, "run", lambda *_, **__: pytest.fail("ran pip"))
    if why == "gpu":
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    elif why == "switch":
        monkeypatch.setenv("DA_OPS_CUDA", "0")
    else:
        monkeypatch.setattr(torch.version, "cuda", None)
    assert toolkit.find_or_fetch(tmp_path / "folder").home is None
    toolkit.main()


def test_an_isolated_build_finds_the_pip_that_runs_it(house, tmp_path, monkeypatch):
    """pip puts what hides itself on PYTHONPATH."""
    script(tmp_path / "hide" / "pip" / "__init__.py", "raise ImportError('hidden')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "hide"))
    assert toolkit.find_or_fetch(tmp_path / "folder").home


def test_a_build_without_a_pip_of_its_own_takes_another(house, tmp_path, monkeypatch):
    monkeypatch.setattr(toolkit, "own_pip", lambda: [sys.executable, "-c", "raise SystemExit(1)"])
    assert "there is no pip" in toolkit.find_or_fetch(tmp_path / "none").why
    script(tmp_path / "bin" / "pip", f'exec {sys.executable} -m pip "$@"')
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    assert toolkit.find_or_fetch(tmp_path / "pip").home
    uv = 'echo "$@" > "$0.said"; shift 4; exec pip install "$@"'  # uv pip install --python ...
    script(tmp_path / "uv", uv)
    monkeypatch.setenv("UV", str(tmp_path / "uv"))
    assert toolkit.find_or_fetch(tmp_path / "by-uv").home
    said = (tmp_path / "uv.said").read_text()
    assert said.startswith(f"pip install --python {sys.executable} --target ")


def test_make_puts_it_into_the_environment(offline, monkeypatch, capfd):
    commands = []
    monkeypatch.setattr(toolkit, "run", lambda *command, **_: commands.append(command) or "no net")
    toolkit.main()
    assert commands == [(sys.executable, "-m", "pip", "install", WANTED)]
    assert "could not be fetched (no net)" in capfd.readouterr().err


# The Makefile


def make(tmp_path, *arguments):
    """What make has Python do, as lines; Python is a script that only writes down its arguments."""
    log = tmp_path / "log"
    writes = f'echo "${{PIP_NO_INDEX:+no index: }}$@" >> {log}'
    script(
        tmp_path / "env" / "bin" / "python",
        f'{writes}\n[ "$2" != build_tools.here ] || echo 9.0',
    )
    environ = {k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "PIP_", "MFLAGS"))}
    subprocess.run(["make", *arguments], cwd=ROOT, env=environ, check=True, capture_output=True)
    return log.read_text().splitlines()


needs_make = pytest.mark.skipif(shutil.which("make") is None, reason="needs make")


@needs_make
@pytest.mark.parametrize("target", ["build", "gpu"])
def test_make_fetches_it_between_torch_and_the_build(target, tmp_path):
    done = make(tmp_path, target, f"VENV={tmp_path / 'env'}")
    requirements, fetches, builds = (
        [i for i, line in enumerate(done) if text in line]
        for text in ("pip install -r", "-m build_tools.toolkit", "pip install --no-build-isolation")
    )
    if target == "build":
        assert requirements[0] < fetches[-1] < builds[0]
    else:
        (run,) = (i for i, line in enumerate(done) if line.startswith("-m benchmarks.gpu"))
        assert requirements[0] < fetches[0] < run


@needs_make
def test_make_without_an_environment_downloads_nothing(tmp_path):
    python = f"PYTHON={tmp_path / 'env' / 'bin' / 'python'}"
    done = make(tmp_path, "build", "VENV=", python, f"STAMPS={tmp_path / 'stamps'}")
    assert "no index: setup.py -q build_ext --inplace" in done
    assert not [line for line in done if "build_tools.toolkit" in line or "pip install" in line]
