"""Installing da_ops: from an sdist, without a compiler, with a broken binary.

The project is copied, packed and compiled once for all tests of this file.
"""

from __future__ import annotations

import email
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
import torch

import da_ops
from build_tools import project_page
from build_tools.cuda import find_cuda
from build_tools.cuda_report import Tools

from .cases import FULL
from .test_cuda_build import LOAD
from .test_release import REPOSITORY

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.xdist_group("install")

# One forward and backward, on whichever backend is there; prints what cannot be had and why.
TRY = """
import json, torch, da_ops
x = torch.randn(2, 8, 5, 5, requires_grad=True)
layer, plain = da_ops.DAModule(8), da_ops.DAModule(8, backend="eager")
plain.load_state_dict(layer.state_dict())
y = layer(x)
torch.testing.assert_close(y, plain(x))
y.square().sum().backward()
assert x.grad.isfinite().all() and x.grad.count_nonzero()
print(json.dumps({"file": da_ops.__file__, "backends": da_ops.backends()}))
"""


def run(*command, env=None, cwd=None, check=True):
    """Run a command with nothing of ours in its environment save `env`; return what it did."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("DA_OPS_", "PYTHON"))}
    done = subprocess.run(
        [str(part) for part in command],
        env={**clean, **(env or {})},
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=900,
    )
    if check and done.returncode:
        pytest.fail(f"{command} failed:\n{done.stdout}\n{done.stderr}")
    return done


def try_package(folder, cwd):
    """Use the da_ops that lies in `folder`; return its backends and why each is not usable."""
    found = json.loads(
        run(sys.executable, "-c", TRY, env={"PYTHONPATH": str(folder)}, cwd=cwd).stdout
    )
    assert Path(found["file"]).is_relative_to(folder)
    return found["backends"]


def pip_wheel(source, out, env=None, check=True, offline=True):
    options = ["--no-build-isolation", "--no-deps", "-v", "-w", out]
    # Also for the pip that fetches nvcc, which obeys no options.
    no_index = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": "", "PIP_CONFIG_FILE": os.devnull}
    env = {**(no_index if offline else {}), **(env or {})}
    return run(sys.executable, "-m", "pip", "wheel", *options, source, env=env, check=check)


def unpack(wheel_folder, into):
    (wheel,) = wheel_folder.glob("da_ops-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(into)
    return into


def record_of(folder):
    return json.loads((folder / "da_ops" / "_build.json").read_text())


@pytest.fixture(scope="session")
def sdist(tmp_path_factory):
    """Packed from a copy, so that the working tree and what others build in it stay apart."""
    copy = tmp_path_factory.mktemp("copy") / "da_ops"
    leave = shutil.ignore_patterns(
        ".*_cache", ".git", ".venv*", ".hypothesis", "__pycache__", "build", "dist", "*.egg-info"
    )
    shutil.copytree(ROOT, copy, ignore=leave)
    out = tmp_path_factory.mktemp("sdist")
    hook = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
    run(sys.executable, "-c", hook, out, cwd=copy)
    (archive,) = out.glob("da_ops-*.tar.gz")
    return archive


@pytest.fixture(scope="session")
def wheels(sdist, once):
    # One architecture of CUDA, where there is nvcc: all of them take minutes.
    environment = {"DA_OPS_CPU": "1", "TORCH_CUDA_ARCH_LIST": "9.0"}
    return once("wheels", lambda out: pip_wheel(sdist, out, env=environment))


@pytest.fixture
def package(wheels, tmp_path):
    """A folder with the built package, to be broken at will."""
    return unpack(wheels, tmp_path / "site")


@pytest.fixture
def no_compiler(tmp_path):
    """An environment in which no C++ compiler and no nvcc is to be found."""
    tools = tmp_path / "bin"
    tools.mkdir()
    return {"PATH": str(tools), "CXX": "", "CC": "", "CUDA_HOME": "", "CUDA_PATH": ""}


# Packing and installing


@pytest.mark.slow
def test_sdist_holds_all_that_a_build_needs(sdist):
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    for path in ("setup.py", "pyproject.toml", "LICENSE", "README.md", "da_ops/py.typed"):
        assert path in names
    for folder in ("csrc", "build_tools", "da_ops"):
        for source in (ROOT / folder).rglob("*"):
            if source.suffix in (".py", ".cpp", ".h", ".inl", ".cu", ".cuh"):
                assert source.relative_to(ROOT).as_posix() in names
    assert not [name for name in names if name.endswith((".so", "_build.json", ".pyc"))]


@pytest.mark.slow
def test_wheel_holds_the_binaries_and_their_record(package):
    inside = {path.name for path in (package / "da_ops").iterdir()}
    assert {"_cpu.abi3.so", "_build.json", "py.typed"} <= inside
    assert "_plan" + sysconfig.get_config_var("EXT_SUFFIX") in inside
    record = record_of(package)
    for name in ("cpu", "plan"):
        assert record[name] == {"built": True, "reason": None}
    assert ("_cuda.abi3.so" in inside) == record["cuda"]["built"]
    assert record["cuda"]["arch_list"] == (["9.0"] if record["cuda"]["built"] else [])
    assert record["compiler"]
    assert not (package / "build_tools").exists()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("readelf") is None, reason="needs readelf")
def test_cpu_library_asks_for_no_cuda(package):
    """So that what was built with a CUDA torch loads in a CPU one, and the other way round."""
    dynamic = run("readelf", "-d", package / "da_ops" / "_cpu.abi3.so").stdout
    needed = {line.split("[")[1].rstrip("]") for line in dynamic.splitlines() if "NEEDED" in line}
    assert {name.split(".so")[0] for name in needed if "torch" in name} == {"libtorch_cpu"}
    assert not [name for name in needed if "cuda" in name or "python" in name]


@pytest.mark.slow
def test_sdist_installs_into_a_fresh_environment(wheels, tmp_path):
    venv.create(tmp_path / "env", symlinks=True)
    python = tmp_path / "env" / "bin" / "python"
    (own,) = (tmp_path / "env").glob("lib/python*/site-packages")
    # It sees this environment's torch and pip, but not this environment's da_ops.
    own.joinpath("outer.pth").write_text(sysconfig.get_path("purelib") + "\n")
    options = ["--no-deps", "--no-index", "--ignore-installed", "--find-links", wheels]
    run(python, "-m", "pip", "install", *options, "da-ops")

    found = json.loads(run(python, "-c", TRY, cwd=tmp_path).stdout)
    assert Path(found["file"]).is_relative_to(own)
    assert found["backends"]["cpu"] is None
    info = run(python, "-m", "da_ops", "info", cwd=tmp_path).stdout
    assert "cpu" in info
    assert run(tmp_path / "env" / "bin" / "da-ops", "info", cwd=tmp_path).stdout == info
    smoke = (python, "-I", ROOT / "build_tools" / "smoke.py")  # as `make wheel` tries it
    assert info in run(*smoke, da_ops.__version__).stdout
    assert "smoke test: version: not as expected" in run(*smoke, "0.0", check=False).stderr


@pytest.mark.slow
def test_without_a_compiler_the_install_succeeds_and_says_so(sdist, no_compiler, tmp_path):
    done = pip_wheel(sdist, tmp_path / "out", env=no_compiler)
    assert "WITHOUT its fused CPU kernels" in done.stdout + done.stderr
    site = unpack(tmp_path / "out", tmp_path / "site")
    assert not list(site.rglob("*.so"))
    record = record_of(site)
    assert not record["cpu"]["built"]
    assert "no C++ compiler" in record["cpu"]["reason"]

    backends = try_package(site, tmp_path)
    assert backends["eager"] is None
    assert "compiler" in backends["cpu"]


# The page on a package index


def metadata_of(text):
    """Addresses and the page of a package's metadata."""
    fields = email.message_from_string(text)
    assert fields["Description-Content-Type"] == "text/markdown"
    assert fields["Version"] == da_ops.__version__
    return fields.get_all("Project-URL", []), fields.get_payload().strip()


@pytest.mark.slow
def test_who_publishes_says_where_the_repository_is(sdist, tmp_path):
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path)
    (source,) = tmp_path.glob("da_ops-*")
    readme = (ROOT / "README.md").read_text().strip()
    assert metadata_of((source / "PKG-INFO").read_text()) == ([], readme)

    hook = "from setuptools import build_meta; build_meta.prepare_metadata_for_build_wheel('.')"
    run(sys.executable, "-c", hook, cwd=source, env={"DA_OPS_REPOSITORY": REPOSITORY})
    (info,) = source.glob("*.dist-info")
    urls, page = metadata_of((info / "METADATA").read_text())
    tag = f"v{da_ops.__version__}"
    assert urls == [
        f"Repository, {REPOSITORY}",
        f"Issues, {REPOSITORY}/issues",
        f"Changelog, {REPOSITORY}/blob/{tag}/CHANGELOG.md",
    ]
    assert page == project_page.absolute(readme, REPOSITORY, tag) != readme


# Asking for more or less than auto


@pytest.mark.slow
def test_cuda_asked_for_and_impossible_fails(sdist, no_compiler, tmp_path):
    done = pip_wheel(sdist, tmp_path, env={**no_compiler, "DA_OPS_CUDA": "1"}, check=False)
    assert done.returncode != 0
    assert "DA_OPS_CUDA=1 asks for a part that cannot be built here" in done.stdout + done.stderr


@pytest.fixture
def broken_cuda(sdist, tmp_path):
    """A source tree whose CUDA part does not compile, and all else in no time."""
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path)
    (source,) = tmp_path.glob("da_ops-*")
    for path in [*source.glob("csrc/*/**/*.cpp"), *source.glob("csrc/cuda/*.cu")]:
        path.unlink()
    for name in ("ops.cpp", "plan_module.cpp"):
        (source / "csrc" / name).write_text("int nothing;\n")
    (source / "csrc" / "cuda" / "broken.cu").write_text("#error broken on purpose\n")
    return source


needs_nvcc = pytest.mark.skipif(
    find_cuda(torch.version.cuda).home is None, reason="needs nvcc of torch's CUDA version"
)


@pytest.mark.slow
@needs_nvcc
def test_cuda_that_does_not_compile_is_left_out_with_the_reason(broken_cuda, tmp_path):
    done = pip_wheel(broken_cuda, tmp_path / "out")
    assert "broken on purpose" in done.stdout + done.stderr
    site = unpack(tmp_path / "out", tmp_path / "site")
    assert not (site / "da_ops" / "_cuda.abi3.so").exists()
    record = record_of(site)
    assert record["cpu"]["built"] and not record["cuda"]["built"]
    assert record["cuda"]["arch_list"] == []
    assert "did not compile" in record["cuda"]["reason"]
    assert f"cuda   not built: {record['cuda']['reason']}" in done.stdout + done.stderr


@pytest.mark.slow
@needs_nvcc
def test_cuda_asked_for_that_does_not_compile_fails_the_install(broken_cuda, tmp_path):
    done = pip_wheel(broken_cuda, tmp_path / "out", env={"DA_OPS_CUDA": "1"}, check=False)
    assert done.returncode != 0
    assert "broken on purpose" in done.stdout + done.stderr
    assert "DA_OPS_CUDA=0 installs without it" in done.stdout + done.stderr


@pytest.fixture
def no_nvcc():
    """An environment without nvcc that has all else."""
    folders = os.environ["PATH"].split(os.pathsep)
    path = os.pathsep.join(f for f in folders if not Path(f, "nvcc").exists())
    env = {"PATH": path, "CXX": shutil.which("c++") or "", "CUDA_HOME": "", "CUDA_PATH": ""}
    if torch.version.cuda is None or int(torch.version.cuda.split(".")[0]) < 13:
        pytest.skip("needs a torch whose nvcc pip has")
    if find_cuda(torch.version.cuda, env).home:
        pytest.skip("nvcc is in the environment")
    return env


@pytest.mark.slow
def test_nvcc_that_cannot_be_fetched_fails_only_who_asked_for_cuda(broken_cuda, no_nvcc, tmp_path):
    done = pip_wheel(broken_cuda, tmp_path / "out", env=no_nvcc)
    record = record_of(unpack(tmp_path / "out", tmp_path / "site"))
    assert record["cpu"]["built"] and not record["cuda"]["built"]
    reason = "could not be fetched" if torch.cuda.is_available() else "it is not fetched, for torch"
    assert reason in record["cuda"]["reason"]
    assert f"cuda   not built: {record['cuda']['reason']}" in done.stdout + done.stderr

    done = pip_wheel(broken_cuda, tmp_path, env={**no_nvcc, "DA_OPS_CUDA": "1"}, check=False)
    assert done.returncode != 0
    told = " ".join((done.stdout + done.stderr).split())
    assert "DA_OPS_CUDA=1 asks for a part that cannot be built here" in told
    assert f"`pip install 'cuda-toolkit[nvcc,cccl,crt,nvvm]=={torch.version.cuda}.*'`" in told


@pytest.mark.slow
@pytest.mark.skipif(not FULL, reason="DA_OPS_TEST_FULL=1: it downloads 105 MB and compiles")
def test_a_build_fetches_the_nvcc_that_is_not_there(sdist, no_nvcc, tmp_path):
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path)
    (source,) = tmp_path.glob("da_ops-*")
    env = {**no_nvcc, "DA_OPS_CUDA": "1", "TORCH_CUDA_ARCH_LIST": "8.0 9.0"}
    done = pip_wheel(source, tmp_path / "out", env=env, offline=False)
    wanted = f"cuda-toolkit[nvcc,cccl,crt,nvvm]=={torch.version.cuda}.*"
    assert f"pip fetches {wanted}" in done.stdout + done.stderr
    (home,) = source.glob("build/cuda-toolkit/nvidia/cu*")

    site = unpack(tmp_path / "out", tmp_path / "site")
    cuda = record_of(site)["cuda"]
    assert cuda["built"] and cuda["arch_list"] == ["8.0", "9.0"]
    assert f"{home}, from pip" in cuda["compiler"]
    run(sys.executable, "-c", LOAD, site, env={"CUDA_VISIBLE_DEVICES": ""})
    tools = Tools(home)
    if tools.missing() is None:
        (tmp_path / "code").mkdir()
        library = site / "da_ops" / "_cuda.abi3.so"
        assert set(tools.extract(library, tmp_path / "code")) == {"sm_80", "sm_90"}


@pytest.mark.slow
def test_sources_that_do_not_compile_fail_the_install(sdist, tmp_path):
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path)
    (source,) = tmp_path.glob("da_ops-*")
    (source / "csrc" / "ops.cpp").write_text("#error broken on purpose\n")
    for other in (source / "csrc" / "cpu").glob("*.cpp"):
        other.unlink()
    done = pip_wheel(source, tmp_path / "out", check=False)
    assert done.returncode != 0
    assert "broken on purpose" in done.stdout + done.stderr
    assert "DA_OPS_CPU=0 installs without it" in done.stdout + done.stderr


# Binaries that went missing or bad after the install


@pytest.mark.slow
def test_import_works_without_the_binaries(package, tmp_path):
    for binary in (package / "da_ops").glob("*.so"):
        binary.unlink()
    backends = try_package(package, tmp_path)
    assert backends["eager"] is None
    assert "_cpu.abi3.so" in backends["cpu"]


@pytest.mark.slow
def test_import_works_with_broken_binaries(package, tmp_path):
    for binary in (package / "da_ops").glob("*.so"):
        binary.write_bytes(b"not a library")
    backends = try_package(package, tmp_path)
    assert backends["eager"] is None
    assert "_cpu.abi3.so" in backends["cpu"]


@pytest.mark.slow
def test_import_works_without_the_record(package, tmp_path):
    (package / "da_ops" / "_build.json").unlink()
    assert try_package(package, tmp_path)["cpu"] is None


# What the Makefile installs


def test_import_is_quick():
    """It brings no compiler of graphs and no networks: each takes a second and more."""
    slow = ("torch._dynamo", "torchvision", "torch.distributed.tensor")
    program = (
        "import sys, torch; before = set(sys.modules); import da_ops;"
        f" print([name for name in {slow} if name in sys.modules.keys() - before])"
    )
    assert run(sys.executable, "-c", program, cwd=ROOT).stdout.strip() == "[]"
