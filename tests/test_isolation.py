"""No image, run, number of threads or instruction set shows in the results of another."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from .cases import CASES, FEW_CASES, LAYOUTS, assert_equal, make

ROOT = Path(__file__).resolve().parents[1]
# On both sides of where a kernel turns from one thread to several, more and fewer images than
# threads, an image of one pixel or one channel that is shared out.
SHAPES = [
    (1, 8, 5, 7),
    (3, 33, 20, 19),
    (1, 70, 33, 37),
    (2, 5, 96, 97),
    (1, 65536, 1, 1),
    (5, 1, 99, 101),
]


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("order", "gate"), CASES)
def test_a_nan_stays_in_its_image(backend, device, order, gate, layout, poison):
    call = make((4, 6, 9, 8), order, gate, layout=layout, device=device)
    want = call.results(backend=backend)
    call.x[1, 2, 3, 4] = poison
    call.dy[2, 2, 3, 4] = poison
    got = call.results(backend=backend)
    for image in (0, 2, 3):
        assert torch.equal(got["y"][image], want["y"][image])
    for image in (0, 3):
        assert torch.equal(got["dx"][image], want["dx"][image])
    for image, name in ((1, "y"), (1, "dx"), (2, "dx")):
        assert not got[name][image].isfinite().all()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("order", "gate"), CASES)
def test_each_image_is_as_if_alone(backend, device, order, gate, layout):
    call = make((3, 6, 9, 8), order, gate, layout=layout, device=device)
    together = call.results(backend=backend)
    x, dy = call.x, call.dy
    for image in range(3):
        call.x, call.dy = x[image : image + 1], dy[image : image + 1]
        alone = call.results(backend=backend)
        for name in ("y", "dx"):
            torch.testing.assert_close(together[name][image], alone[name][0])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_runs_are_bitwise_equal(backend, device, shape, layout):
    torch.set_num_threads(2)
    torch.use_deterministic_algorithms(True)
    call = make(shape, layout=layout, device=device)
    first = call.results(backend=backend)
    for _ in range(3):
        assert_equal(call.results(backend=backend), first)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("order", "gate"), FEW_CASES)
def test_threads_do_not_show(fused_cpu, order, gate, shape, layout):
    """The same bits on one thread, two and three, which PyTorch's own sums do not give."""
    call = make(shape, order, gate, layout=layout)
    torch.set_num_threads(1)
    want = call.results(backend=fused_cpu)
    for threads in (2, 3):
        torch.set_num_threads(threads)
        assert_equal(call.results(backend=fused_cpu), want)


@pytest.mark.parametrize(("order", "gate"), CASES)
def test_deterministic_algorithms(backend, device, order, gate):
    """PyTorch raises where an operator has no deterministic form."""
    torch.use_deterministic_algorithms(True)
    make(order=order, gate=gate, device=device).results(backend=backend)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("order", "gate"), CASES)
def test_arguments_are_not_modified(backend, device, order, gate, layout):
    call = make(order=order, gate=gate, layout=layout, device=device)
    arguments = [call.x, call.dy, *call.parameters.values()]
    before = [t.clone() for t in arguments]
    call.results(backend=backend)
    for t, copy in zip(arguments, before):
        assert torch.equal(t, copy)


def supported(instruction_set):
    if instruction_set == "generic":
        return True
    flags = Path("/proc/cpuinfo")
    flag = {"avx2": " avx2 ", "avx512": " avx512bw "}[instruction_set]
    return flags.exists() and flag in flags.read_text()


# y of the same call under every instruction set, each in its process: the choice is made once.
BITS = """
import hashlib, torch
from tests.cases import make
results = make((2, 64, 20, 21)).results(backend="cpu")
print(hashlib.sha256(b"".join(t.numpy().tobytes() for t in results.values())).hexdigest())
"""


def under(instruction_set, *command):
    return subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env={**os.environ, "DA_OPS_CPU_ISA": instruction_set},
        capture_output=True,
        text=True,
        timeout=600,
    )


@pytest.mark.slow
@pytest.mark.parametrize("instruction_set", ["generic", "avx2"])
def test_every_instruction_set_is_accurate(fused_cpu, instruction_set):
    """Of those below the widest, which all other tests run."""
    if not supported(instruction_set):
        pytest.skip(f"this machine has no {instruction_set}")
    accuracy = ["tests/test_operator.py", "-k", "cpu and (test_accuracy or saturate)"]
    sizes = ["tests/test_shapes.py::test_any_size"]
    for tests in (accuracy, [*sizes, "-k", "cpu"]):
        done = under(
            instruction_set,
            "-m",
            "pytest",
            "-q",
            "-x",
            "-p",
            "no:cacheprovider",
            "-p",
            "no:xdist",
            *tests,
        )
        assert done.returncode == 0, done.stdout[-4000:]
        assert " passed" in done.stdout
        assert "skipped" not in done.stdout


def test_the_instruction_set_is_the_one_asked_for(fused_cpu):
    """Vectors of another width add in another order, which shows in the last bits."""
    if not supported("avx2"):
        pytest.skip("this machine has but one instruction set")
    bits = {}
    for name in ("generic", "avx2", "avx512"):
        if supported(name):
            done = under(name, "-c", BITS)
            assert done.returncode == 0, done.stderr
            bits[name] = done.stdout
    assert len(set(bits.values())) == len(bits), bits


# Two threads, for what one of them threw would be told of twice.
REFUSED = """
import torch, da_ops
torch.set_num_threads(2)
x, norm = torch.randn(4, 64, 56, 56), torch.nn.BatchNorm2d(64)
for call in (
    da_ops.DAModule(64),
    lambda x: da_ops.residual_attention(x, None, norm, None),
    da_ops.explain,
):
    try:
        call(x)
    except RuntimeError as error:
        print(error)
"""


@pytest.mark.parametrize("name", ["AVX2", "avx9000"])
def test_an_instruction_set_that_is_none_is_refused(fused_cpu, name):
    done = under(name, "-c", REFUSED)
    refusal = f"DA_OPS_CPU_ISA: expected generic, avx2 or avx512; got {name}"
    assert done.stdout.splitlines() == [refusal] * 3 and not done.stderr
