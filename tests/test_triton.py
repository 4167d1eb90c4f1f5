"""What only the Triton backend does: its tiles, its kernels on GPUs that are not here, and what
happens where Triton does not work. What it computes, the tests of all backends say."""

from __future__ import annotations

import json
import logging
import math
import os
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import da_ops
from da_ops.backends import BACKENDS, select
from da_ops.backends.triton import tiles
from da_ops.backends.triton.run import TritonFailed, run

from .cases import CASES, DTYPES, FEW_CASES, FULL, LAYOUTS, assert_equal, assert_promised, make
from .conftest import GPU, need

ROOT = Path(__file__).resolve().parents[1]
DEVICE = "cuda" if GPU else "cpu"


@pytest.fixture(autouse=True)
def _usable():
    need("triton")


# ---- tiles

SIZES = [
    (n, c, h, w)
    for n in (1, 64)
    for c in (1, 2, 3, 8, 48, 67, 2048)
    for h, w in [(1, 1), (1, 3), (3, 3), (5, 5), (7, 7), (14, 14), (19, 19), (56, 56), (75, 75)]
]


@pytest.mark.parametrize("itemsize", [2, 4, 8])
@pytest.mark.parametrize("channels_last", [False, True])
def test_tiles(itemsize, channels_last):
    """Super-rows are whole vectors, tiles cover everything and cross the end of one row at most."""
    for shape in SIZES:
        m = tiles.matrix(shape, itemsize, channels_last=channels_last)
        assert m.rows * m.cols == shape[1] * shape[2] * shape[3]
        assert m.rows % m.period == 0
        assert m.period * m.cols % m.vector == 0
        for phase in range(m.period):
            first = phase * m.cols
            begin = first // m.vector * m.vector
            end = -(-(first + m.cols) // m.vector) * m.vector
            assert end - begin <= m.reach
        for limits in (tiles.DEVICE, tiles.INTERPRETER):
            for t, cols in (
                (tiles.sum_tiles(m, shape[0], limits), m.reach),
                (tiles.scale_tiles(m, limits), m.cols * m.period),
            ):
                assert t.height * t.blocks >= m.super_rows
                assert t.width * t.windows >= cols
            assert m.period == 1 or t.width <= m.cols
            s = tiles.split(t.blocks, shape[0] * t.windows, limits)
            assert s.splits * s.each >= t.blocks
            assert s.splits <= limits.shares


@pytest.mark.parametrize("edge", [7, 14, 56, 75])
def test_loads_are_as_wide_at_odd_sizes(edge):
    for channels_last in (False, True):
        m = tiles.matrix((8, 256, edge, edge), 2, channels_last=channels_last)
        assert m.vector * m.itemsize == 16


SIDES = st.sampled_from([1, 2, 3, 5, 7, 14, 19, 28, 56, 75]) | st.integers(1, 300)
CHANNELS = st.sampled_from([1, 3, 8, 48, 67, 256, 2048]) | st.integers(1, 2048)


@settings(max_examples=1000 if FULL else 200)
@given(
    shape=st.tuples(st.integers(1, 64), CHANNELS, SIDES, SIDES),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(list(LAYOUTS)),
    large=st.sampled_from([2**30, 2**14]),
)
def test_vectors_and_super_rows_are_those_of_the_cuda_planner(shape, dtype, layout, large):
    """With one difference: in a large image whose rows are no whole vectors, elements are loaded
    one by one here, since an offset of 32 bits might not hold the length of a super-row."""
    plan = pytest.importorskip("da_ops._plan").cuda
    channels_last, name = layout == "channels_last", str(dtype).removeprefix("torch.")
    told = plan(shape, channels_last, name, "spatial_channel", "affine", 90, 0)
    expected = told["vector_bytes"], told["rows_a_super_row"]
    if math.prod(shape[1:]) >= large and expected[1] > 1:
        expected = dtype.itemsize, 1
    limits = replace(tiles.DEVICE, large=large)
    m = tiles.matrix(shape, dtype.itemsize, channels_last=channels_last, limits=limits)
    assert (m.vector * m.itemsize, m.period) == expected


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("order", "gate"), FEW_CASES)
def test_super_rows(order, gate, layout):
    """7x7 in half: rows that begin in the middle of a vector."""
    call = make((1, 16, 7, 7), order, gate, dtype=torch.float16, layout=layout, device=DEVICE)
    assert_promised(call, call.results(backend="triton"))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("order", "gate"), FEW_CASES)
def test_many_programs(monkeypatch, order, gate, layout):
    """A sum in several shares, small maps in several blocks, each with several steps."""
    from da_ops.backends.triton import launch

    small = tiles.Limits(
        tile_bytes=128,
        narrowest=64,
        widest=64,
        programs=64,
        pixel_block=16,
        channel_block=16,
        stencil_block=8,
        norm_block=16,
    )
    monkeypatch.setattr(launch, "LIMITS", small)
    call = make((1, 20, 3, 7), order, gate, layout=layout, kernel_size=5, device=DEVICE)
    assert_promised(call, call.results(backend="triton"))


# ---- the kernels on GPUs that are not here

TARGETS = ["sm_80", "sm_90", "gfx942"]


def compiled(cases):
    """What Triton makes of the kernels of calls; targets.py says what a case is."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.targets"],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "0"},
        input=json.dumps(cases),
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return list(zip(cases, json.loads(done.stdout)))


def assert_well_made(case, kernel, passes):
    """None spills but in float64: there a compiler's version decides, and what it spills is told as
    a warning. In half, odd sizes are read and written as vectors."""
    dtype = case[3]
    if dtype == "float64" and kernel["spilled"]:
        warnings.warn(f"{case}: {kernel}", stacklevel=1)
    else:
        assert kernel["spilled"] == 0, (case, kernel)
    if dtype == "float16" and kernel["kernel"] in passes:
        assert kernel["wide"] > 0, (case, kernel)
        assert kernel["narrow"] == 0, (case, kernel)


def cases_for(target):
    layouts = ("contiguous_format", "channels_last")
    every = FULL or target == "sm_90"
    odd = [(64, 2048, 7, 7), (64, 1024, 14, 14), (8, 256, 75, 75)]
    cases = [
        (target, shape, layout, "float16", "spatial_channel", "affine", None)
        for shape in odd
        for layout in layouts[: 2 if every else 1]
    ]
    others = (CASES if FULL else FEW_CASES[1:]) if every else []
    dtypes = ("float32", "float64", "bfloat16")
    cases += [
        (target, (2, 64, 28, 28), layouts[i % 2], dtypes[i % 3], order, gate, None)
        for i, (order, gate) in enumerate(others)
    ]
    return cases


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_compiles_for(target):
    """Every kernel, and well."""
    for case, kernels in compiled(cases_for(target)):
        *_, order, gate, _ = case
        assert {k["kernel"] for k in kernels} >= {"masks", "scale", "mask_gradients"}
        expected = 12 if order in ("spatial_channel", "channel_spatial") else 8
        if (order, gate) == ("channel", "sigmoid"):  # no parameters, no gradients of them
            expected -= 1
        assert len(kernels) == expected, case
        for kernel in kernels:
            assert_well_made(case, kernel, ("row_sums", "column_sums", "scale"))


# ---- where Triton does not work


@pytest.fixture
def auto_takes_triton(monkeypatch, choice):
    """As on a GPU without the CUDA library."""
    known = replace(BACKENDS["triton"], explicit_only=None)
    monkeypatch.setitem(BACKENDS, "triton", known)
    if "cuda" in BACKENDS:
        gone = replace(BACKENDS["cuda"], reason="left out for a test")
        monkeypatch.setitem(BACKENDS, "cuda", gone)
    assert select("auto", DEVICE) == "triton"


def breaks(monkeypatch, *directions):
    from da_ops.backends.triton import launch

    def broken(*_):
        raise TritonFailed("no assembler")

    for direction in directions:
        monkeypatch.setattr(launch, direction, broken)


@pytest.mark.parametrize("directions", [("forward", "backward"), ("backward",)])
@pytest.mark.parametrize("compile", [False, True])
def test_auto_goes_on_without(monkeypatch, auto_takes_triton, caplog, directions, compile):
    """It says so once, and every result is there, also from a graph compiled before."""
    breaks(monkeypatch, *directions)
    call = make(device=DEVICE)
    f = da_ops.da_attention
    if compile:
        torch._dynamo.reset()
        f = torch.compile(lambda x, **k: da_ops.da_attention(x, **k), backend="aot_eager")
    with caplog.at_level(logging.WARNING, "da_ops"):
        for _ in range(3):
            assert_promised(call, call.results(f))
    [record] = [r for r in caplog.records if r.name == "da_ops"]
    assert "triton" in record.getMessage()
    assert "no assembler" in record.getMessage()
    assert "no assembler" in da_ops.backends()["triton"]
    assert select("auto", DEVICE) != "triton"
    torch._dynamo.reset()


@pytest.mark.parametrize("directions", [("forward",), ("backward",)])
def test_asked_for_by_name_it_is_an_error(monkeypatch, directions):
    breaks(monkeypatch, *directions)
    with pytest.raises(RuntimeError, match=r"^da_attention: backend 'triton'.*no assembler"):
        make(device=DEVICE).results(backend="triton")
    assert da_ops.backends()["triton"] is None  # it may work for another call


class Kernel:
    """One that raises when it is started."""

    def __init__(self, error):
        self.error = error
        self.__name__ = "stand_in"

    def __getitem__(self, grid):
        return self

    def __call__(self, *_, **__):
        raise self.error


def test_the_reason_is_one_line():
    error = ValueError("\n  at 1:0:\n  no such\n\n  instruction\n")
    with pytest.raises(TritonFailed, match=r"'stand_in'.*ValueError: at 1:0: no such instruction$"):
        run(Kernel(error), 1)


def test_lack_of_memory_is_not_for_want_of_triton():
    with pytest.raises(torch.OutOfMemoryError):
        run(Kernel(torch.OutOfMemoryError("full")), 1)


def python(code, **environment):
    environment = {k: v for k, v in {**os.environ, **environment}.items() if v is not None}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.parametrize("instead", ["None", "types.ModuleType('triton')"])
def test_without_triton(instead):
    """Or with a module that stands in for it, but has no spec."""
    code = f"""
import sys, types, torch
sys.modules["triton"] = {instead}
import da_ops
print(da_ops.DAModule(4)(torch.ones(1, 4, 3, 3)).shape, da_ops.backends()["triton"])
"""
    assert "pip install triton" in python(code)


def test_kernels_are_imported_at_first_use():
    code = "import sys, da_ops; print('da_ops.backends.triton.launch' in sys.modules)"
    assert python(code).strip() == "False"


@pytest.mark.skipif(GPU, reason="there is a GPU")
def test_a_cpu_is_not_for_triton():
    """Unless Python is to run its kernels, and then only who asks for it gets it."""
    code = "import da_ops; print(da_ops.backends()['triton'])"
    assert "no GPU" in python(code, TRITON_INTERPRET=None)
    assert select("auto", "cpu") != "triton"
    assert "interpreted" in da_ops.explain(torch.empty(1, 4, 5, 5)).passed_over["triton"]


# ---- the choice among tiles


@pytest.mark.parametrize(
    ("wish", "capturing", "measured"), [("1", False, 1), ("0", False, 0), ("1", True, 0)]
)
def test_measures_once_and_only_when_it_may(monkeypatch, wish, capturing, measured):
    from da_ops.backends.triton import tune

    times, taken = [], []
    monkeypatch.setattr(tune, "INTERPRETED", False)
    monkeypatch.setattr(tune, "_chosen", {})
    monkeypatch.setattr(tune, "_quickest", lambda *_: times.append(1) or tune.CANDIDATES[2])
    monkeypatch.setattr(tune, "_scale", lambda *arguments: taken.append(arguments[-1]))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    monkeypatch.setenv("DA_OPS_TRITON_AUTOTUNE", wish)
    x = torch.empty(2, 8, 4, 4)
    m = tiles.matrix(tuple(x.shape), 4, channels_last=False)
    for _ in range(2):
        tune.scale(m, 2, (x, x, *[None] * 4, (), 2, 8, 16), {"OUTER": "neither"}, tiles.DEVICE)
    assert len(times) == measured
    assert taken == [tune.CANDIDATES[2 if measured else 0]] * 2


@pytest.mark.parametrize("layout", LAYOUTS)
def test_tiles_of_scaling_do_not_show(monkeypatch, layout):
    """What measurement chooses among gives the same bits."""
    from da_ops.backends.triton import tune

    call = make((1, 16, 7, 7), dtype=torch.float16, layout=layout, device=DEVICE)
    results = []
    for candidate in tune.CANDIDATES:
        original = tune._scale
        with monkeypatch.context() as patch:
            patch.setattr(tune, "_scale", lambda *a, c=candidate, f=original: f(*a[:-1], c))
            results.append(call.results(backend="triton"))
    for result in results[1:]:
        assert_equal(result, results[0])


# ---- as registered operators


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("order", "gate"), FEW_CASES if FULL else FEW_CASES[:2])
def test_opcheck(order, gate, layout):
    call = make((2, 4, 3, 4), order, gate, layout=layout, device=DEVICE)
    x, *parameters, order, gate = call.positional()
    forward = (x, *parameters, order, gate, False)
    _, m, g = torch.ops.da_ops.triton_forward(*forward)
    torch.library.opcheck(torch.ops.da_ops.triton_forward.default, forward)
    backward = (call.dy, x, *parameters, m, g, order, gate, False)
    torch.library.opcheck(torch.ops.da_ops.triton_backward.default, backward)


# ---- what is told of it


@pytest.mark.parametrize(
    ("order", "reads"),
    [("spatial_channel", (3, 4)), ("channel_spatial", (3, 4)), ("parallel", (2, 3)),
     ("spatial", (2, 3)), ("channel", (2, 3))],
)  # fmt: skip
def test_explain(order, reads):
    """On any machine, also one that could not run it."""
    x = torch.empty(64, 256, 56, 56, dtype=torch.float16, device="meta")
    answer = da_ops.explain(x, order=order, backend="triton")
    assert "not usable" in str(answer)
    told = answer.to_dict()
    assert told["unusable"]
    for direction, read in zip(("forward", "backward"), reads):
        passes = told[direction]["passes"]
        assert (sum(p["reads"] for p in passes), sum(p["writes"] for p in passes)) == (read, 1)
        assert told[direction]["bytes_moved"] == (read + 1) * 2 * x.numel()


def test_large_images_count_in_64_bits():
    """And do not take vectors over super-rows, whose length 32 bits might not hold."""
    m = tiles.matrix((1, 3 * 2**28, 3, 3), 2, channels_last=False)
    assert m.rows * m.cols >= tiles.DEVICE.large
    assert m.period == 1
