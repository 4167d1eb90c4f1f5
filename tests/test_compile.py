"""torch.compile, export, ONNX, tracing, autocast and FLOP counting."""

from __future__ import annotations

import io
import subprocess
import sys
from dataclasses import replace

import onnxruntime
import pytest
import torch
from torch._dynamo.backends.common import aot_autograd
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import da_ops
from da_ops.accuracy import PROMISED
from da_ops.reference import formula

from .cases import (
    CASES,
    DTYPES,
    FEW_CASES,
    FULL,
    LAYOUTS,
    PARAMETERS,
    assert_close,
    assert_equal,
    distance,
    make,
)


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(backend, compiler, **options):
    """da_attention, compiled as one graph."""

    def f(x, **arguments):
        return da_ops.da_attention(x, **arguments, backend=backend)

    return torch.compile(f, fullgraph=True, backend=compiler, **options)


def strides(results):
    return {name: result.stride() for name, result in results.items()}


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("order", "gate"), FEW_CASES)
def test_compiled_graph(backend, device, order, gate, layout, dynamic):
    """Forward and backward of the whole operator in one graph each; other sizes with no new one."""
    f = compiled(backend, "aot_eager", dynamic=dynamic)
    # No size is by chance that of another argument, which the compiler would take for a rule.
    shapes = [(4, 6, 5, 7), (3, 8, 7, 9), (5, 7, 11, 6)][: 3 if dynamic else 1]
    for i, shape in enumerate(shapes):
        call = make(shape, order, gate, layout=layout, device=device)
        want = call.results(backend=backend)
        with torch._dynamo.config.patch(error_on_recompile=i > 0):
            got = call.results(f)
        assert_close(got, want, 1e-6)
        assert strides(got) == strides(want)


def hvp(f):
    """The Hessian of f times its argument."""
    return lambda x: torch.func.jvp(torch.func.grad(f), (x,), (x,))[1]


def vjp(f):
    return lambda x: torch.func.vjp(f, x)[1](torch.ones(()).to(x))[0]


def jvp(f):
    return lambda x: torch.func.jvp(f, (x,), (torch.ones_like(x),))[1]


def vmap_of_grad(f):
    return lambda x: torch.func.vmap(torch.func.grad(f))(torch.stack([x, 2 * x]))


@pytest.mark.parametrize(
    "transform",
    [
        torch.func.grad,
        vjp,
        jvp,
        torch.func.jacrev,
        torch.func.jacfwd,
        vmap_of_grad,
        hvp,
        torch.func.hessian,
    ],
    ids=lambda f: f.__name__,
)
def test_transforms_in_a_graph(backend, device, transform):
    """torch.func inside torch.compile, by the plain formula."""
    call = make((2, 3, 4, 3), dtype=torch.float64, device=device)
    weights = {name: call.parameters.get(name) for name in call.parameters}

    def loss(x, function=da_ops.da_attention):
        options = {} if function is formula else {"backend": backend}
        return function(x, **weights, **options).square().mean()

    def true_loss(x):
        return loss(x, formula)

    compiled = torch.compile(transform(loss), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(call.x), transform(true_loss)(call.x))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "dynamic"),
    [(layout, dynamic) for layout in LAYOUTS for dynamic in (False, True)]
    if FULL
    else [("contiguous", True), ("channels_last", False)],
)
@pytest.mark.parametrize(("order", "gate"), CASES if FULL else [("spatial_channel", "affine")])
def test_inductor(backend, device, order, gate, layout, dynamic):
    """Between other operators, whose strides and fusions the compiler chooses."""

    def f(x, **arguments):
        y = da_ops.da_attention(x.relu() + 0.5, **arguments, backend=backend)
        return (y + x).relu()

    call = make((2, 8, 6, 5), order, gate, layout=layout, device=device)
    graph = torch.compile(f, fullgraph=True, dynamic=dynamic)
    assert_close(call.results(graph), call.results(f), 1e-6)
    with torch.no_grad():
        assert distance(call(graph), call(f)) < 1e-6


def test_compiled_graph_of_few_gradients(backend, device):
    """Parameters frozen, then x."""
    call = make((2, 6, 5, 4), device=device)
    want = call.results(backend=backend)
    for leaf, name in [(call.x, "dx"), (call.parameters["conv_weight"], "d_conv_weight")]:
        leaf.requires_grad_()
        call(compiled(backend, "aot_eager")).backward(call.dy)
        assert distance(leaf.grad, want[name]) < 1e-6
        leaf.requires_grad_(False)
        leaf.grad = None
        torch._dynamo.reset()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_compiled_graph_of_any_strides(backend, device, layout):
    """x that is copied, dy in another layout and dy without strides."""
    big = make((2, 6, 9, 8), layout=layout, device=device)
    call = make((2, 6, 5, 4), device=device)
    other = LAYOUTS["channels_last" if layout == "contiguous" else "contiguous"]
    for x, dy in [
        (big.x[:, :, 2:7, 1:8:2], call.dy),
        (call.x, big.dy[:, :, 2:7, 1:8:2]),
        (call.x.contiguous(memory_format=other), call.dy),
        (call.x, torch.ones((), device=device).expand_as(call.dy)),
    ]:
        odd = replace(call, x=x, dy=dy)
        f = compiled(backend, "aot_eager")
        assert_close(odd.results(f), odd.results(backend=backend), 1e-6)


def test_compiled_graph_in_half(backend, device):
    call = make(dtype=torch.bfloat16, parameter_dtype=torch.float32, device=device)
    got = call.results(compiled(backend, "aot_eager"))
    assert got["y"].dtype == torch.bfloat16
    assert got["d_conv_weight"].dtype == torch.float32
    assert_close(got, call.results(backend=backend), PROMISED[torch.bfloat16])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_kernels_are_in_the_graph(fused_cpu, layout):
    """One fused operator forward, one backward, and no copy of x or dy."""
    graphs = []

    def keep(graph, _):
        graphs.append([node.target for node in graph.graph.nodes if node.op == "call_function"])
        return graph.forward

    f = compiled(fused_cpu, aot_autograd(fw_compiler=keep, bw_compiler=keep))
    make(layout=layout).results(f)
    forward, backward = ([t for t in graph if "getitem" not in str(t)] for graph in graphs)
    assert forward == [torch.ops.da_ops.forward.default]
    assert backward == [torch.ops.da_ops.backward.default]


def test_the_first_call_of_all_is_compiled():
    """DAFunction itself, before anything has chosen a backend, which Dynamo then has to trace."""
    code = """
import torch, da_ops
m = da_ops.DAModule(6)
weights = (m.conv.weight, m.dilated_conv.weight, m.merge.weight, None, m.gate_weight, m.gate_bias)
f = lambda x: da_ops.DAFunction.apply(x, *weights, "spatial_channel", "affine", "auto")
x = torch.randn(2, 6, 5, 4, requires_grad=True)
y = torch.compile(f, fullgraph=True, backend="aot_eager")(x)
y.sum().backward()
torch.testing.assert_close(y, m(x))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_compiled_module_trains(backend, device):
    torch.manual_seed(0)
    layer = da_ops.DAModule(6, bias=True, backend=backend, device=device)
    x = torch.randn(2, 6, 5, 4, device=device)
    layer(x).square().sum().backward()
    want = [p.grad.clone() for p in layer.parameters()]
    layer.zero_grad()
    torch.compile(layer, fullgraph=True, backend="aot_eager")(x).square().sum().backward()
    torch.testing.assert_close([p.grad for p in layer.parameters()], want)


def operator_arguments(call):
    """Of torch.ops.da_ops.forward, and of backward."""
    x, *parameters, order, gate = call.positional()
    forward = (x, *parameters, order, gate)
    _, channel_mean, pooled = torch.ops.da_ops.forward(*forward)
    return forward, (call.dy, x, *parameters, channel_mean, pooled, order, gate)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("order", "gate"), FEW_CASES)
def test_opcheck(fused_cpu, order, gate, dtype, layout):
    """PyTorch's own checks of a registered operator: schema, fake kernel, dynamic shapes."""
    forward, backward = operator_arguments(make(order=order, gate=gate, dtype=dtype, layout=layout))
    torch.library.opcheck(torch.ops.da_ops.forward.default, forward)
    torch.library.opcheck(torch.ops.da_ops.backward.default, backward)


SHAPES = [(2, 6, 5, 4), (1, 6, 5, 4), (2, 1, 5, 4), (2, 6, 1, 1), (0, 6, 5, 4), (1, 1, 1, 1)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("order", "gate"), CASES)
def test_fake_kernels_tell_the_truth(fused_cpu, order, gate, layout, shape):
    call = make(shape, order, gate, layout=layout, parameter_dtype=torch.float64)
    call = call.to(torch.float32)
    forward, backward = operator_arguments(call)
    for operator, arguments in (
        (torch.ops.da_ops.forward, forward),
        (torch.ops.da_ops.backward, backward),
    ):
        mode = FakeTensorMode()
        fakes = [mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in arguments]
        with mode:
            claimed = operator(*fakes)
        for claim, real in zip(claimed, operator(*arguments)):
            assert claim.shape == real.shape
            assert claim.stride() == real.stride()
            assert claim.dtype == real.dtype
            assert claim.device == real.device


def layer_and_input(backend, device, order="spatial_channel", gate="affine"):
    torch.manual_seed(0)
    layer = da_ops.DAModule(6, order=order, gate=gate, bias=True, backend=backend, device=device)
    with torch.no_grad():
        for p in layer.parameters():
            p.normal_()
    return layer.eval(), torch.randn(2, 6, 8, 7, device=device)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("order", "gate"), FEW_CASES)
def test_export(backend, device, order, gate, layout):
    """torch.export with any batch, height and width, saved and loaded."""
    layer, x = layer_and_input(backend, device, order, gate)
    x = x.contiguous(memory_format=LAYOUTS[layout])
    dims = [torch.export.Dim(name) for name in ("n", "h", "w")]
    dynamic = {0: dims[0], 2: dims[1], 3: dims[2]}
    file = io.BytesIO()
    torch.export.save(torch.export.export(layer, (x,), dynamic_shapes=(dynamic,)), file)
    file.seek(0)
    exported = torch.export.load(file).module()
    for size in ((2, 6, 8, 7), (5, 6, 13, 11)):
        x = torch.randn(size, device=device).contiguous(memory_format=LAYOUTS[layout])
        torch.testing.assert_close(exported(x), layer(x))


@pytest.mark.parametrize(("order", "gate"), FEW_CASES)
def test_onnx(backend, device, order, gate):
    """A model of standard operators only, which ONNX Runtime computes alike at other sizes."""
    layer, small = layer_and_input(backend, device, order, gate)
    dynamic = {0: "n", 2: "h", 3: "w"}
    program = torch.onnx.export(
        layer, (small,), dynamo=True, dynamic_shapes=(dynamic,), verbose=False
    )
    nodes = list(program.model_proto.graph.node)
    assert nodes
    assert {node.domain for node in nodes} == {""}
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString())
    for x in (small, torch.randn(3, 6, 5, 9, device=device)):
        (y,) = session.run(None, {session.get_inputs()[0].name: x.cpu().numpy()})
        torch.testing.assert_close(
            torch.from_numpy(y), layer(x).detach().cpu(), atol=1e-6, rtol=1e-5
        )


def test_trace(backend, device):
    """torch.jit.trace gives plain operators, so that the file needs no da_ops to load."""
    layer, small = layer_and_input(backend, device)
    traced = torch.jit.trace(layer, (small,))
    assert "da_ops::" not in str(traced.inlined_graph)
    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    for x in (small, torch.randn(3, 6, 5, 9, device=device)):
        torch.testing.assert_close(torch.jit.load(file)(x), layer(x))
        file.seek(0)


@pytest.mark.parametrize(("order", "gate"), CASES)
def test_flops_are_those_of_the_formula(backend, device, order, gate):
    call = make((2, 6, 8, 7), order, gate, device=device)
    counts = []
    for f, options in ((da_ops.da_attention, {"backend": backend}), (formula, {})):
        with FlopCounterMode(display=False) as forward:
            call(f, **options)
        with FlopCounterMode(display=False) as both:
            call.results(f, **options)
        counts.append((forward.get_total_flops(), both.get_total_flops()))
    assert counts[0][0] == counts[1][0]
    if backend != "eager":  # which computes the masks again in backward
        assert counts[0] == counts[1]
    assert (counts[1][0] > 0) == (order != "channel" or gate == "eca")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast(backend, device, dtype):
    """Autocast neither casts x, which comes as the layer before left it, nor the sums inside."""
    call = make(dtype=dtype, parameter_dtype=torch.float32, device=device)
    want = call.results(backend=backend)

    def f(*args, **kwargs):
        with torch.autocast(device, torch.bfloat16):
            return da_ops.da_attention(*args, **kwargs, backend=backend)

    got = call.results(f)
    assert got["y"].dtype == dtype
    assert all(got[f"d_{name}"].dtype == torch.float32 for name in PARAMETERS)
    assert_equal(got, want)


def test_autocast_network(backend, device):
    """Convolutions in bfloat16, float32 parameters, float32 gradients; also compiled."""
    torch.manual_seed(0)
    network = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3), da_ops.DAModule(8, bias=True, backend=backend)
    ).to(device)
    x = torch.randn(2, 3, 9, 8, device=device)

    def run(f):
        network.zero_grad()
        with torch.autocast(device, torch.bfloat16):
            y = f(x)
        assert y.dtype == torch.bfloat16
        y.float().square().sum().backward()
        return {name: p.grad.clone() for name, p in network.named_parameters()}

    want = run(network)
    assert all(grad.dtype == torch.float32 for grad in want.values())
    assert_close(run(torch.compile(network, fullgraph=True, backend="aot_eager")), want, 2e-2)
