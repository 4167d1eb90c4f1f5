"""What only a GPU can show: graphs, streams, no waiting for the device, very large tensors."""

from __future__ import annotations

import fcntl
import math

import pytest
import torch

import da_ops

from .cases import (
    CASES,
    FEW_CASES,
    FULL,
    LAYOUTS,
    assert_close,
    assert_equal,
    assert_promised,
    distance,
    make,
)
from .conftest import GPU, need
from .plans import Plan, or_skipped
from .tails import FEW_TAILS, by, defined, make_tail

pytestmark = pytest.mark.skipif(not GPU, reason="torch finds no GPU")
# Each way of CUDA to launch a call, which no two GPUs would choose alike.
PLANS = [("cuda", plan) for plan in ("portable", "block", "cluster", "counter")]
AS_THEY_COME = [("cuda", ""), ("triton", "")]
GIB = 2**30
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.fixture(params=[*PLANS, ("triton", "")], ids=lambda pair: "-".join(filter(None, pair)))
def _target(request):
    """A backend, and the plan that all its calls follow."""
    backend, plan = request.param
    need(backend)
    with Plan(backend, ways=plan)():
        yield request.param


@pytest.fixture
def made(backend):
    """As make(), on the GPU: a call that the plan can serve, and that has been made once, so that
    all kernels are there."""

    def made(*arguments, **options):
        call = make(*arguments, device="cuda", **options)
        with or_skipped():
            call.results(backend=backend)
        return call

    return made


def gradients(call, leaves, backend):
    y = call(backend=backend)
    return y, torch.autograd.grad(y, leaves, call.dy)


def static(call):
    """The call with tensors that stay where they are, and its leaves."""
    call = call.leaves()
    return call, [call.x, *call.parameters.values()]


def results(call, y, grads):
    names = ("dx", *(f"d_{name}" for name in call.parameters))
    return {"y": y.detach().clone(), **{n: g.clone() for n, g in zip(names, grads)}}


def refill(call, other):
    """New numbers in the same memory."""
    with torch.no_grad():
        call.x.copy_(other.x)
        call.dy.copy_(other.dy)
        for name, parameter in call.parameters.items():
            parameter.copy_(other.parameters[name])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("order", "gate"), FEW_CASES)
def test_graph_replays_with_new_data(made, backend, order, gate, dtype, layout):
    """Forward and backward in one graph; a replay is bit for bit the call it stands for."""
    shape = (3, 24, 14, 14)
    call, leaves = static(made(shape, order, gate, dtype=dtype, layout=layout))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        gradients(call, leaves, backend)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y, grads = gradients(call, leaves, backend)
    for seed in (1, 2, 3):
        other = make(shape, order, gate, dtype=dtype, layout=layout, device="cuda", seed=seed)
        refill(call, other)
        graph.replay()
        torch.cuda.synchronize()
        assert_equal(results(call, y, grads), other.results(backend=backend))


@pytest.fixture
def tail_kernels(monkeypatch):
    """The CUDA kernels of the residual tail, for tensors that are on the GPU."""
    need("cuda")
    monkeypatch.delenv("DA_OPS_PLAN", raising=False)
    return by("cuda")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("order", "gate"), FEW_TAILS)
def test_graph_replays_the_residual_tail_with_new_data(tail_kernels, order, gate, layout):
    """Statistics, forward and backward in one graph; a replay is bit for bit the call."""
    shape = (3, 24, 14, 14)
    tail = make_tail(shape, order, gate, layout=layout, device="cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        tail.results(tail_kernels)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = tail.results(tail_kernels)
    for seed in (1, 2):
        other = make_tail(shape, order, gate, layout=layout, device="cuda", seed=seed)
        for mine, new in zip(tail.tensors(), other.tensors(), strict=True):
            mine.copy_(new)
        graph.replay()
        torch.cuda.synchronize()
        assert_equal(got, other.results(tail_kernels))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(16, 256, 56, 56), (32, 2048, 7, 7)])
def test_the_residual_tail_at_real_sizes(tail_kernels, shape, layout):
    """The same bits twice, beside other work, and near the definition in float32."""
    dtypes = {"dtype": torch.float16, "parameter_dtype": torch.float32}
    tail = make_tail(shape, **dtypes, layout=layout, device="cuda")
    once, again = (tail.results(tail_kernels) for _ in range(2))
    assert_equal(once, again)
    want = tail.to(torch.float32).results(defined)
    for name in ("out", "d_u", "d_shortcut", "d_norm_weight", "d_norm_bias", "d_gate_weight"):
        assert distance(once[name], want[name]) <= 1e-2, name


@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_side_stream(made, backend, layout, recorded):
    """Kernels run on the current stream, behind what is in it; who drops x before they are done,
    and has said so to the allocator, may go on."""
    shape = (8, 64, 56, 56)
    call = made(shape, dtype=torch.float16, layout=layout)
    want = call.results(backend=backend)
    source = call.x  # kept, for the copy of it waits on the other stream
    filled = torch.full_like(source, float("nan"))
    side = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(100_000_000)  # what ignores the stream would be done long before
        filled.copy_(source)
        call.x = filled
        got = call.results(backend=backend)
    if recorded:
        filled.record_stream(side)
        del filled
        call.x = None
        spoilt = [  # would get x's memory if it were free
            torch.full(shape, float("nan"), dtype=torch.float16, device="cuda") for _ in range(8)
        ]
    torch.cuda.current_stream().wait_stream(side)
    assert_equal(got, want)
    if recorded:
        assert all(int(t.isnan().sum()) == t.numel() for t in spoilt)


def test_several_streams_at_once(made, backend):
    """Blocks that wait for each other get on, though other launches want their places."""
    calls = [made((8, 64, 28, 28), seed=seed) for seed in range(4)]
    want = [call.results(backend=backend) for call in calls]
    streams = [torch.cuda.Stream() for _ in calls]
    torch.cuda.synchronize()
    got = []
    for _ in range(3):
        for call, stream in zip(calls, streams):
            with torch.cuda.stream(stream):
                got.append(call.results(backend=backend))
    torch.cuda.synchronize()
    for a, b in zip(got, want * 3):
        assert_equal(a, b)


@pytest.mark.skipif(GPU and torch.cuda.device_count() < 2, reason="one GPU")
def test_second_device(backend):
    """Tensors that are not on the current device."""
    first, second = (make((2, 24, 14, 14), device=f"cuda:{i}") for i in range(2))
    with or_skipped():
        want = first.results(backend=backend)
    got = second.results(backend=backend)
    assert torch.cuda.current_device() == 0
    assert all(t.device.index == 1 for t in got.values())
    assert_close({k: v.cpu() for k, v in got.items()}, {k: v.cpu() for k, v in want.items()}, 1e-6)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("order", "gate"), CASES)
def test_no_waiting_for_the_device(made, backend, order, gate, layout):
    call, leaves = static(made((2, 24, 14, 14), order, gate, layout=layout))
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.no_grad():
            call(backend=backend)
        gradients(call, leaves, backend)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(4, 64, 56, 56), (5, 96, 7, 7), (2, 64, 75, 75), (8, 256, 1, 1)])
def test_accuracy(made, backend, shape, dtype, layout):
    """Sizes that fill the device, in memory that PyTorch fills with NaN before it hands it out."""
    call = made(shape, dtype=dtype, layout=layout)
    torch.use_deterministic_algorithms(True)
    got = call.results(backend=backend)
    torch.use_deterministic_algorithms(False)
    assert_promised(call, got)


@pytest.mark.parametrize("_target", AS_THEY_COME, indirect=True)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_compiled_in_one_graph(backend, layout):
    torch._dynamo.reset()

    def f(x, **arguments):
        return da_ops.da_attention(x.relu() + 0.5, **arguments, backend=backend) + x

    call = make((4, 24, 14, 14), layout=layout, device="cuda")
    assert_close(call.results(torch.compile(f, fullgraph=True)), call.results(f), 1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast(backend, dtype):
    """Half-precision maps with float32 parameters, in training."""
    torch.manual_seed(0)
    layer = da_ops.DAModule(32, bias=True, backend=backend)
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 32, 3), layer).cuda()
    x = torch.randn(4, 3, 30, 30, device="cuda")

    def run(name):
        layer.backend = name
        network.zero_grad()
        with torch.autocast("cuda", dtype):
            y = network(x)
        assert y.dtype == dtype
        y.float().square().mean().backward()
        return {k: p.grad.clone() for k, p in network.named_parameters()}

    with or_skipped():
        got = run(backend)
    want = run("eager")
    assert all(grad.dtype == torch.float32 for grad in got.values())
    assert_close(got, want, 5e-2)


def big(shape, backend, layout="contiguous"):
    """y and dx of a layer in float16 whose masks are 1/2 everywhere; x is 1, its last element 3."""
    elements = math.prod(shape)
    free, _ = torch.cuda.mem_get_info()
    # Five tensors, maps that may be as long as they, and the parts of the sums of each image.
    needed = 24 * elements + 80 * shape[0] + GIB
    if free < needed:
        pytest.skip(f"{free / GIB:.0f} GiB are free, {needed / GIB:.0f} are needed")
    x = torch.ones(shape, dtype=torch.float16, device="cuda")
    x = x.contiguous(memory_format=LAYOUTS[layout]).requires_grad_()
    with torch.no_grad():
        x[-1, -1, -1, -1] = 3
    layer = da_ops.DAModule(shape[1], gate="scalar", backend=backend, device="cuda")
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.zero_()
    with or_skipped():
        y = layer(x)
        (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    return y, dx


def assert_big(y, dx):
    assert y[-1, -1, -1, -1] == 0.75
    assert int((y != 0.25).sum()) == 1  # every element was written
    assert int((dx != 0.25).sum()) == 0


@pytest.fixture
def _room(shared_folder):
    """One such test at a time has the GPU's memory, whichever process it runs in."""
    with open(shared_folder / "room.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        torch.cuda.empty_cache()
        yield
        torch.cuda.empty_cache()


@pytest.mark.slow
@pytest.mark.skipif(not FULL, reason="takes minutes: only with DA_OPS_TEST_FULL=1")
@pytest.mark.usefixtures("_room")
class TestLarge:
    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("shape", [(33, 256, 512, 512), (1, 9, 2**14, 2**14), (9, 2**28, 1, 1)])
    def test_more_than_2_31_elements(self, backend, shape, layout):
        assert_big(*big(shape, backend, layout))

    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("axis", range(4))
    def test_a_very_long_axis(self, backend, axis, layout):
        shape = [1, 1, 1, 1]
        shape[axis] = 2**27
        assert_big(*big(tuple(shape), backend, layout))
