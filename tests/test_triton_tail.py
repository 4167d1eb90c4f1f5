"""What only the Triton backend does of the residual tail: its tiles and statistics, its kernels on
GPUs that are not here, when "auto" takes it. What it computes, test_residual.py says."""

from __future__ import annotations

import copy
import logging
from dataclasses import replace

import pytest
import torch

import da_ops
from da_ops.accuracy import PARAMETERS
from da_ops.backends import BACKENDS, select
from da_ops.backends.triton import tiles
from da_ops.backends.triton.run import TritonFailed
from da_ops.residual import functional
from da_ops.residual.functional import residual_attention
from da_ops.residual.fusible import unfused

from .cases import FEW_CASES, FULL, LAYOUTS, assert_close, assert_equal
from .conftest import GPU, need
from .tails import TAILS, assert_as_good_as_steps, by, make_tail
from .test_residual_layer import assert_same, layer_of, norm_of, one_by_one
from .test_triton import TARGETS, assert_well_made, compiled

DEVICE = "cuda" if GPU else "cpu"
FEW = (
    TAILS
    if FULL
    else [("spatial_channel", "affine"), ("channel_spatial", "eca"), ("none", "sigmoid")]
)
SMALL = tiles.Limits(
    tile_bytes=256,
    narrowest=64,
    widest=64,
    programs=32,
    pixel_block=16,
    channel_block=16,
    stencil_block=8,
    norm_block=16,
    parts=32,
)


@pytest.fixture(autouse=True)
def _usable():
    need("triton")
    functional._told.clear()


@pytest.fixture
def many_programs(monkeypatch):
    """Sums in several shares, small maps in several blocks, each with several steps."""
    from da_ops.backends.triton import launch

    monkeypatch.setattr(launch, "LIMITS", SMALL)


# ---- what it computes, cut up


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("order", "gate"), FEW)
def test_many_programs(many_programs, order, gate, layout):
    """Also the same bits in every run."""
    shape = (2, 17, 3, 5) if gate == "affine" else (2, 6, 4, 7)
    tail = make_tail(shape, order, gate, dtype=torch.float64, layout=layout, device=DEVICE)
    got = tail.results(by("triton"))
    assert_close(got, tail.truth(), 1e-12)
    if GPU or order == "none":
        assert_equal(tail.results(by("triton")), got)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_super_rows(layout):
    """7x7 in half: rows that begin in the middle of a vector."""
    options = {"dtype": torch.float16, "layout": layout, "device": DEVICE}
    tail = make_tail((1, 16, 7, 7), **options)
    assert_as_good_as_steps([tail], [tail.results(by("triton"))])


@pytest.mark.parametrize("what", ["a large mean", "an outlier first", "an outlier last"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_statistics(many_programs, layout, what):
    """One read gives them as exactly as two would, over many tiles and whatever comes first."""
    tail = make_tail((1, 12, 9, 11), "none", "sigmoid", layout=layout, device=DEVICE)
    u = tail.u
    if what == "a large mean":
        u += 1000
    else:
        at = 0 if what == "an outlier first" else -1
        u[0, :, at, at] = 1e6
    no_parameters = [None] * 6
    _, mean, var, *_ = torch.ops.da_ops.triton_residual_forward(
        u, tail.shortcut, *tail.norm, *no_parameters, "none", "sigmoid", False
    )
    true_var, true_mean = torch.var_mean(u.double(), (0, 2, 3), correction=0)
    assert ((mean - true_mean).abs() <= 1e-6 * true_var.sqrt() + 6e-8 * true_mean.abs()).all()
    torch.testing.assert_close(var.double(), true_var, rtol=2e-6, atol=0)


@pytest.mark.parametrize("training", [True, False])
def test_the_layer_by_name(training):
    """Also what the norm keeps of a batch."""
    tensors = [torch.randn(2, 6, 5, 4, dtype=torch.float64, device=DEVICE) for _ in range(3)]
    u, shortcut, dout = tensors
    norm, layer = norm_of().train(training), layer_of(backend="triton")
    inputs = u.requires_grad_(), shortcut.requires_grad_(), dout
    assert_same(*inputs, norm.to(DEVICE), layer.to(DEVICE))


@pytest.mark.parametrize("batch", [True, False])
def test_opcheck(batch):
    tail = make_tail((2, 4, 3, 4), batch=batch, device=DEVICE)
    attention = [tail.parameters.get(name) for name in PARAMETERS]
    options = tail.order, tail.gate, False
    forward = (tail.u, tail.shortcut, *tail.norm, *attention, *options)
    ops = torch.ops.da_ops
    torch.library.opcheck(ops.triton_residual_forward.default, forward)
    out, mean, var, *maps = ops.triton_residual_forward(*forward)
    if not batch:
        mean, var = tail.norm.mean, tail.norm.var
    weight, bias, *_, eps = tail.norm
    norm = weight, bias, mean, var, batch, eps
    backward = (tail.dout, out, tail.u, *norm, *attention, *maps, *options)
    torch.library.opcheck(ops.triton_residual_backward.default, backward)


# ---- on GPUs that are not here


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_compiles_for(target):
    layouts = ("contiguous_format", "channels_last")
    every = FULL or target == "sm_90"
    odd = [(64, 2048, 7, 7), (8, 256, 75, 75)]
    cases = [
        (target, shape, layout, "float16", "spatial_channel", "affine", True)
        for shape in odd
        for layout in layouts[: 2 if every else 1]
    ]
    cases += [
        (target, shape, layout, "float16", "none", "affine", False)
        for shape, layout in zip(odd, layouts)
    ]
    dtypes = ("float32", "float64", "bfloat16")
    others = [*FEW_CASES[1:], ("none", "sigmoid")] if every else []
    cases += [
        (target, (2, 64, 28, 28), layouts[i % 2], dtypes[i % 3], order, gate, True)
        for i, (order, gate) in enumerate(TAILS if FULL else others)
    ]
    for case, kernels in compiled(cases):
        names = [k["kernel"] for k in kernels]
        assert names.count("scale") == 2 and names.count("moments") == 1, case
        assert {"normal", "column_sums", "dx_sums", "gradients"} <= set(names), case
        for kernel in kernels:
            assert_well_made(case, kernel, ("row_sums", "column_sums", "scale", "moments"))


# ---- when "auto" takes it


@pytest.fixture
def first_without(monkeypatch, choice):
    """As on a GPU with a CUDA library that has no kernel of the tail; no other backend has one."""
    known = replace(BACKENDS["triton"], explicit_only=None)
    monkeypatch.setitem(BACKENDS, "triton", known)
    eager = BACKENDS["eager"]
    first = replace(eager, name="cuda")
    monkeypatch.setitem(BACKENDS, "cuda", first)
    without = replace(BACKENDS["cpu"], residual_forward=None, residual_backward=None)
    monkeypatch.setitem(BACKENDS, "cpu", without)
    assert select("auto", DEVICE) == "cuda"


def breaks(monkeypatch, *directions):
    from da_ops.backends.triton import tail

    def broken(*_):
        raise TritonFailed("no assembler")

    for direction in directions:
        monkeypatch.setattr(tail, f"residual_{direction}", broken)


def call(dtype=torch.float64):
    u, shortcut, dout = (torch.randn(2, 6, 5, 4, dtype=dtype, device=DEVICE) for _ in range(3))
    return u.requires_grad_(), shortcut.requires_grad_(), dout


def test_auto_takes_it_where_the_first_has_none(first_without, caplog):
    norm, layer = norm_of().to(DEVICE), layer_of().to(DEVICE)
    with caplog.at_level(logging.INFO, "da_ops"):
        assert_same(*call(), norm, layer, steps=1)
        assert_same(*call(), norm, None, steps=1)
    told = [r.getMessage() for r in caplog.records if "residual tails" in r.getMessage()]
    assert told == [
        f"da_ops: backend 'triton' for residual tails of {DEVICE} tensors ('cuda' has no kernel of "
        "them)"
    ]
    assert select("auto", DEVICE) == "cuda"  # the layer alone


def test_benchmarks_name_the_backend_that_serves(first_without):
    of_benchmarks = pytest.importorskip("benchmarks.tail")
    assert of_benchmarks.unfused(norm_of(), None, "triton", DEVICE) is None
    assert "'triton' is taken" in of_benchmarks.unfused(norm_of(), None, "cuda", DEVICE)


def test_whoever_names_the_first_gets_no_other(first_without, monkeypatch):
    reason = "backend 'cuda' has no kernel of the residual tail"
    assert unfused(norm_of(), layer_of(backend="cuda"), DEVICE) == reason
    monkeypatch.setenv("DA_OPS_BACKEND", "cuda")
    assert unfused(norm_of(), layer_of(), DEVICE) == reason


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("directions", [("forward", "backward"), ("backward",)])
def test_auto_goes_on_without(monkeypatch, first_without, caplog, directions, compile):
    """It says so once, every result is there, and then modules are called one by one."""
    breaks(monkeypatch, *directions)
    norm, layer = norm_of().to(DEVICE), layer_of().to(DEVICE)
    others = copy.deepcopy((norm, layer))
    function = residual_attention
    if compile:
        torch._dynamo.reset()
        function = torch.compile(lambda *a: residual_attention(*a), backend="aot_eager")
    u, shortcut, dout = call()
    with caplog.at_level(logging.WARNING, "da_ops"):
        for _ in range(2):
            found = []
            for f, modules in ((function, (norm, layer)), (one_by_one, others)):
                out = f(u, shortcut, *modules)
                parameters = [p for m in modules for p in m.parameters()]
                gradients = torch.autograd.grad(out, [u, shortcut, *parameters], dout)
                found.append([out, *gradients, *(b.clone() for b in modules[0].buffers())])
            for ours, theirs in zip(*found, strict=True):
                torch.testing.assert_close(ours, theirs)
    told = [r.getMessage() for r in caplog.records if "does not work here" in r.getMessage()]
    assert len(told) == 1 and "no assembler" in told[0]
    reason = unfused(norm, layer, DEVICE)
    assert reason == (
        "backend 'cuda' has no kernel of the residual tail; not 'triton': no assembler"
    )
    torch._dynamo.reset()


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_asked_for_by_name_it_is_an_error(monkeypatch, direction):
    breaks(monkeypatch, direction)
    tail = make_tail(device=DEVICE)
    with pytest.raises(RuntimeError, match=r"backend 'triton' cannot serve.*no assembler"):
        tail.results(by("triton"))
    assert da_ops.backends()["triton"] is None  # it may work for another call
