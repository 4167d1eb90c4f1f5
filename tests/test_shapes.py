"""Any size, any strides, any layout of dy; nothing left unwritten; offsets beyond 2^31 elements."""

from __future__ import annotations

import mmap
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import da_ops
from da_ops.accuracy import PROMISED
from da_ops.backends.native import planner
from da_ops.reference import formula

from .cases import (
    CASES,
    DTYPE_PAIRS,
    DTYPES,
    FULL,
    LAYOUTS,
    assert_close,
    assert_equal,
    assert_promised,
    make,
)
from .conftest import POISONED, interpreted
from .plans import plans

# Around the vector widths of every instruction set, with and without a remainder.
CHANNELS = st.sampled_from([1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 64, 67, 130])
EDGES = st.sampled_from([1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 13, 16, 17, 23, 32, 37])


@st.composite
def planned_calls(draw, backend, device):
    """A call, and a plan for it: small tensors meet what otherwise only large ones do."""
    call = draw(calls(device))
    return call, draw(plans(backend, call))


@st.composite
def calls(draw, device):
    dtype, parameter_dtype = draw(st.sampled_from(DTYPE_PAIRS))
    order, gate = draw(st.sampled_from(CASES))
    return make(
        (draw(st.integers(1, 5)), draw(CHANNELS), draw(EDGES), draw(EDGES)),
        order,
        gate,
        dtype=dtype,
        parameter_dtype=parameter_dtype,
        layout=draw(st.sampled_from(list(LAYOUTS))),
        device=device,
        kernel_size=draw(st.sampled_from([1, 3, 7])),
        seed=draw(st.integers(0, 2**31)),
    )


CPU_CHOICES = ("threads", "slabs", "sum_together", "scale_together", "stream", "joint", "hot")


def cpu_choices(call, plan):
    """Which way each choice by size went."""
    dtype = str(call.x.dtype).removeprefix("torch.")
    last, shape = not call.x.is_contiguous(), tuple(call.x.shape)
    chosen = planner().cpu(shape, last, dtype, call.order, plan.threads, plan.text)
    return {
        (choice, int(chosen[choice]) > (choice in ("threads", "slabs"))) for choice in CPU_CHOICES
    }


def test_any_size(backend, device):
    fewer = {"max_examples": 12} if interpreted(backend) and not FULL else {}

    met = set()

    @settings(**fewer)
    @given(planned_calls(backend, device))
    def check(planned):
        call, plan = planned
        with plan():
            got = call.results(backend=backend)
        # Triton's interpreter cuts bfloat16 off where a GPU rounds.
        truncated = interpreted(backend) and call.x.dtype == torch.bfloat16
        assert_promised(call, got, truncated=truncated)
        if backend == "cpu":
            met.update(cpu_choices(call, plan))
            with plan.plain()():
                assert_equal(call.results(backend=backend), got)
        # The stride of a dimension of 1 means nothing.
        strides = [
            [stride for size, stride in zip(t.shape, t.stride()) if size > 1]
            for t in (call.x, got["y"], got["dx"])
        ]
        assert strides[0] == strides[1] == strides[2]

    check()
    if backend == "cpu":
        assert met == {(choice, way) for choice in CPU_CHOICES for way in (False, True)}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("order", "gate"), CASES)
def test_no_images(backend, device, order, gate, layout):
    """An empty batch gives an empty y and zero gradients."""
    call = make((0, 5, 4, 3), order, gate, layout=layout, device=device)
    got = call.results(backend=backend)
    assert got.pop("y").shape == got.pop("dx").shape == (0, 5, 4, 3)
    assert not any(gradient.any() for gradient in got.values())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_y_and_dx_keep_the_layout(backend, device, dtype, layout):
    call = make((2, 6, 5, 4), dtype=dtype, layout=layout, device=device)
    got = call.results(backend=backend)
    for result in (got["y"], got["dx"]):
        assert result.is_contiguous(memory_format=LAYOUTS[layout])
        assert result.stride() == call.x.stride()


# Views of other strides than the two native ones, of a tensor larger than needed.
VIEWS = {
    "every other row": lambda t: t[:, :, ::2],
    "every other column": lambda t: t[..., ::2],
    "every other channel": lambda t: t[:, ::2],
    "every other image": lambda t: t[::2],
    "some channels": lambda t: t[:, 1:4],
    "a window": lambda t: t[..., 1:5, 2:6],
    "one image onwards": lambda t: t[1:],
    "transposed": lambda t: t.transpose(2, 3),
    "images last": lambda t: t.permute(3, 1, 2, 0),
    "reversed": lambda t: t.permute(3, 2, 1, 0),
    "channels among pixels": lambda t: t.permute(0, 2, 1, 3),
    "one image, expanded": lambda t: t[:1].expand(4, -1, -1, -1),
    "one channel, expanded": lambda t: t[:, :1].expand(-1, 4, -1, -1),
    "one pixel, expanded": lambda t: t[..., :1, :1].expand(-1, -1, 3, 4),
    "one number, expanded": lambda t: t[:1, :1, :1, :1].expand(2, 3, 4, 5),
    "overlapping windows": lambda t: t.as_strided((2, 3, 4, 5), (60, 20, 2, 1)),
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("order", ["spatial_channel", "channel_spatial"])
def test_any_strides_of_x(backend, device, order, layout, view):
    big = make((4, 6, 8, 7), layout=layout, device=device)
    x = view(big.x)
    call = replace(make(tuple(x.shape), order, device=device), x=x)
    before = x.clone()
    got = call.results(backend=backend)
    assert torch.equal(x, before)
    assert_promised(call, got)


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides_of_dy(backend, device, layout, view):
    """Also that of `y.sum().backward()`, which has no strides at all."""
    big = make((4, 6, 8, 7), layout=layout, device=device)
    dy = view(big.dy)
    call = make(tuple(dy.shape), layout=layout, device=device)
    want = replace(call, dy=dy.clone().contiguous(memory_format=LAYOUTS[layout]))
    assert_equal(replace(call, dy=dy).results(backend=backend), want.results(backend=backend))


@pytest.mark.parametrize("x_layout", LAYOUTS)
@pytest.mark.parametrize("dy_layout", LAYOUTS)
def test_dy_in_either_layout(backend, device, x_layout, dy_layout):
    call = make((3, 6, 5, 7), layout=x_layout, device=device)
    dy = call.dy.contiguous(memory_format=LAYOUTS[dy_layout])
    got = replace(call, dy=dy).results(backend=backend)
    assert_equal(got, call.results(backend=backend))
    assert got["dx"].stride() == call.x.stride()


@pytest.mark.parametrize("shape", [(2, 1, 5, 7), (2, 6, 1, 1), (1, 6, 5, 7), (1, 1, 1, 1)])
def test_strides_of_dimensions_of_one(backend, device, shape):
    """Where a dimension is 1 its stride means nothing, whatever it says."""
    call = make(shape, device=device)
    want = call.results(backend=backend)
    for dim in [d for d in range(4) if shape[d] == 1]:
        strides = list(call.x.stride())
        strides[dim] = 12345
        for name in ("x", "dy"):
            odd = replace(call, **{name: getattr(call, name).as_strided(shape, strides)})
            assert_promised(odd, odd.results(backend=backend))
    assert_promised(call, want)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [1, 3])
def test_unaligned_memory(backend, device, dtype, layout, offset):
    """x and dy that begin in the middle of a vector."""

    def shifted(t):
        memory = torch.empty(t.numel() + offset, dtype=dtype, device=device)
        return memory.as_strided(t.shape, t.stride(), offset).copy_(t)

    call = make((2, 17, 5, 7), dtype=dtype, layout=layout, device=device)
    odd = replace(call, x=shifted(call.x), dy=shifted(call.dy))
    assert odd.x.stride() == call.x.stride()
    assert_equal(odd.results(backend=backend), call.results(backend=backend))


@pytest.mark.parametrize("view", [lambda t: t[::2], lambda t: t[:1].expand(6)])
def test_any_strides_of_parameters(backend, device, view):
    call = make((2, 6, 5, 4), device=device)
    wide = make((2, 12, 5, 4), device=device)
    gate = {name: view(wide.parameters[name]) for name in ("gate_weight", "gate_bias")}
    kernel = torch.randn(1, 1, 6, 6, device=device)[..., ::2, ::2].transpose(2, 3)
    call.parameters |= gate | {"conv_weight": kernel}
    assert_promised(call, call.results(backend=backend))


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_results_too_large_for_the_caches(fused_cpu, layout):
    """They are stored past the caches, and are the same."""
    few = make((8, 64, 32, 32), layout=layout)
    want = few.results(backend=fused_cpu)
    times = 2
    while not da_ops.explain(torch.empty(8 * times, 64, 32, 32)).to_dict()["details"]["stream"]:
        times *= 2
    x, dy = (
        t.repeat(times, 1, 1, 1).contiguous(memory_format=LAYOUTS[layout]) for t in (few.x, few.dy)
    )
    got = replace(few, x=x, dy=dy).results(backend=fused_cpu)
    for name in ("y", "dx"):
        assert torch.equal(got[name], want[name].repeat(times, 1, 1, 1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1000, 100_000, 10_000_000])
def test_new_memory_is_poisoned(dtype, size):
    """So that the tests here see what is left unwritten; see conftest.py."""
    if not POISONED:
        pytest.skip("needs glibc's mallopt")
    memory = torch.empty(size, dtype=dtype).double()
    assert (memory.isnan() | (memory.abs() > 1e30)).all()


# Memory that is only counted where it is touched.
def sparse_memory(elements, dtype):
    size = elements * torch.finfo(dtype).bits // 8
    return torch.frombuffer(mmap.mmap(-1, size, mmap.MAP_PRIVATE), dtype=dtype)


BEYOND = 2**31 + 12345


@pytest.mark.parametrize("stride", ["storage offset", "image", "channel", "row"])
def test_offsets_beyond_32_bits(backend, device, stride):
    """A small x spread over more than 2^31 elements."""
    if device != "cpu":
        pytest.skip("spreads memory that only a CPU leaves untouched")
    call = make((2, 2, 2, 3))
    strides, offset = list(call.x.stride()), 0
    if stride == "storage offset":
        offset = BEYOND
    else:
        strides[["image", "channel", "row"].index(stride)] = BEYOND
    memory = sparse_memory(BEYOND + 100, torch.float32)
    spread = memory.as_strided(call.x.shape, strides, offset).copy_(call.x)
    for far in (replace(call, x=spread), replace(call, dy=spread)):
        near = replace(far, x=far.x.contiguous(), dy=far.dy.contiguous())
        assert_equal(far.results(backend=backend), near.results(backend=backend))


@pytest.mark.slow
@pytest.mark.skipif(not FULL, reason="takes 15 GB of memory; only with DA_OPS_TEST_FULL=1")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(2**15 + 2, 16, 64, 64), (1, 2**17, 128, 129)])
def test_more_elements_than_32_bits_count(backend, device, shape, layout):
    """All is zero but the last rows of the last image, far beyond the 2^31st element."""
    if device != "cpu" or backend == "eager":
        pytest.skip("the memory of plain PyTorch is not at issue here")
    elements, rows = torch.Size(shape).numel(), 2
    assert elements > 2**31
    strides = torch.empty(shape, device="meta").contiguous(memory_format=LAYOUTS[layout]).stride()
    dtypes = {"dtype": torch.float16, "parameter_dtype": torch.float32}  # large sums, small memory
    small = make((1, shape[1], rows, shape[3]), "spatial", **dtypes, layout=layout)
    x, dy = (sparse_memory(elements, torch.float16).as_strided(shape, strides) for _ in range(2))
    x[-1:, :, -rows:], dy[-1:, :, -rows:] = small.x, small.dy
    got = replace(small, x=x, dy=dy).results(backend=backend)
    for name, far in (("y", got["y"]), ("dx", got["dx"])):
        got[name] = far[-1:, :, -rows:].clone()
        # dx reaches further than x and dy do: by the stencil.
        assert not far[-1, :, : -rows - 3].any()
        assert not far[:-1].any()
    assert_close(got, small.to(torch.float32).results(formula), PROMISED[torch.float16])
