"""The residual tail as a layer, and over modules that exist: it does what they do one by one."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

import da_ops
from da_ops.residual import functional
from da_ops.residual.functional import residual_attention

from .cases import LAYOUTS

TOLERANCE = {"rtol": 1e-9, "atol": 1e-12}  # in float64


@pytest.fixture(autouse=True)
def _forget(fused_cpu):
    functional._told.clear()


def one_by_one(u, shortcut, norm, attention):
    x = norm(u)
    x = x if attention is None else attention(x)
    return torch.relu(x if shortcut is None else x + shortcut)


def tensors(shape=(3, 6, 7, 8), dtype=torch.float64, layout="contiguous", requires_grad=True):
    u, shortcut, dout = (
        torch.randn(shape, dtype=dtype).contiguous(memory_format=LAYOUTS[layout]) for _ in range(3)
    )
    return u.requires_grad_(requires_grad), shortcut.requires_grad_(requires_grad), dout


def norm_of(dtype=torch.float64, channels=6, **options):
    norm = nn.BatchNorm2d(channels, dtype=dtype, **options)
    for t in (norm.weight, norm.bias):
        if t is not None:
            nn.init.normal_(t)
    if norm.running_mean is not None:
        nn.init.normal_(norm.running_mean)
        nn.init.uniform_(norm.running_var, 0.5, 2)
    return norm


def layer_of(dtype=torch.float64, channels=6, **options):
    layer = da_ops.DAModule(channels, dtype=dtype, **options)
    for p in layer.parameters():
        nn.init.normal_(p, std=0.5)
    return layer


def is_fused(out):
    return type(out.grad_fn).__name__ == "ResidualFunctionBackward"


def assert_same(u, shortcut, dout, norm, attention, *, fused=True, steps=2):
    """The tail over these modules and one by one over copies: results, gradients, buffers."""
    others = copy.deepcopy((norm, attention))
    for _ in range(steps):
        found = []
        for function, modules in ((residual_attention, (norm, attention)), (one_by_one, others)):
            out = function(u, shortcut, *modules)
            if function is residual_attention and out.requires_grad:
                assert is_fused(out) == fused
            parameters = [
                p for m in modules if m is not None for p in m.parameters() if p.requires_grad
            ]
            inputs = [t for t in (u, shortcut, *parameters) if t is not None and t.requires_grad]
            gradients = torch.autograd.grad(out, inputs, dout) if inputs else ()
            buffers = list(modules[0].buffers())
            found.append([out, *gradients, *buffers])
        for ours, theirs in zip(*found, strict=True):
            torch.testing.assert_close(ours, theirs, **TOLERANCE)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"momentum": None},
        {"momentum": 0.0},
        {"track_running_stats": False},
        {"affine": False},
        {"eps": 0.1},
    ],
    ids=str,
)
@pytest.mark.parametrize("attention", [True, False])
def test_norms(attention, options, training, layout):
    norm = norm_of(**options).train(training)
    assert_same(*tensors(layout=layout), norm, layer_of() if attention else None)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("attention", [True, False])
def test_without_a_shortcut(attention, training, layout):
    u, _, dout = tensors(layout=layout)
    assert_same(u, None, dout, norm_of().train(training), layer_of() if attention else None)


def test_running_statistics_are_the_same_in_every_run():
    runs = []
    for _ in range(2):
        torch.manual_seed(0)
        u, shortcut, _ = tensors(dtype=torch.float32)
        norm = norm_of(torch.float32)
        for _ in range(3):
            residual_attention(u, shortcut, norm, None)
        runs.append([norm.running_mean, norm.running_var, norm.num_batches_tracked])
    assert all(torch.equal(a, b) for a, b in zip(*runs))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_running_statistics_that_do_not_lie_together(dtype):
    """And in what they are kept."""
    u = torch.randn(3, 6, 7, 8, dtype=dtype)
    found = []
    for apart in (False, True):
        norm = norm_of(torch.float32 if dtype is torch.bfloat16 else dtype)
        nn.init.zeros_(norm.running_mean), nn.init.ones_(norm.running_var)
        if apart:
            norm.running_var = norm.running_var.repeat_interleave(2)[::2]
            assert not norm.running_var.is_contiguous()
        residual_attention(u, None, norm, None)
        found.append([norm.running_mean, norm.running_var.contiguous(), norm.num_batches_tracked])
    for one, other in zip(*found):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)
    assert found[0][2] == 1 and not torch.equal(found[0][1], torch.ones(6).to(found[0][1].dtype))


def test_batches_counted_by_a_number_of_another_dtype():
    norm = norm_of()
    norm.num_batches_tracked = torch.tensor(5, dtype=torch.int32)
    assert_same(*tensors(), norm, layer_of())
    assert norm.num_batches_tracked.dtype == torch.int32


def test_a_norm_that_no_longer_tracks_keeps_its_statistics():
    norm = norm_of()
    norm.track_running_stats = False
    assert_same(*tensors(), norm, layer_of())


def test_an_old_norm_that_counts_no_batches():
    norm = norm_of()
    norm.num_batches_tracked = None
    assert_same(*tensors(), norm, layer_of())
    norm.momentum = None
    assert_same(*tensors(), norm, layer_of())


def test_a_frozen_norm_of_torchvision():
    norm = FrozenBatchNorm2d(6).double()
    nn.init.normal_(norm.weight)
    nn.init.uniform_(norm.running_var, 0.5, 2)
    assert_same(*tensors(), norm, layer_of())


@pytest.mark.parametrize("frozen", ["norm", "attention", "weight", "all"])
def test_parameters_without_a_gradient(frozen):
    norm, layer = norm_of(), layer_of()
    if frozen == "weight":
        norm.weight.requires_grad_(False)
    else:
        for name, module in (("norm", norm), ("attention", layer)):
            if frozen in (name, "all"):
                module.requires_grad_(False)
    assert_same(*tensors(), norm, layer)
    u, shortcut, dout = tensors(requires_grad=False)
    assert_same(u, shortcut.requires_grad_(), dout, norm, layer)


def test_without_any_gradient():
    u, shortcut, _ = tensors(requires_grad=False)
    norm, layer = norm_of().eval(), layer_of()
    with torch.inference_mode():
        torch.testing.assert_close(
            residual_attention(u, shortcut, norm, layer), one_by_one(u, shortcut, norm, layer)
        )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_with_a_norm_in_float32(dtype):
    u, shortcut, _ = tensors(dtype=dtype)
    norm, layer = norm_of(torch.float32), layer_of(torch.float32)
    out = residual_attention(u, shortcut, norm, layer)
    assert is_fused(out)
    assert out.dtype == dtype
    wide = one_by_one(u.float(), shortcut.float(), norm, layer)
    torch.testing.assert_close(out.float(), wide, rtol=2e-2, atol=2e-2)


def test_autocast():
    u, shortcut, _ = tensors(dtype=torch.bfloat16)
    tail = da_ops.DAResidual(6)
    with torch.autocast("cpu", torch.bfloat16):
        out = tail(u, shortcut)
    assert is_fused(out)
    assert out.dtype == torch.bfloat16
    out.sum().backward()
    assert tail.norm.weight.grad.dtype == torch.float32


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"u": "u"}, TypeError, "u must be a torch.Tensor, got str"),
        ({"shortcut": 1.0}, TypeError, "shortcut must be a torch.Tensor, got float"),
        (
            {"shortcut": torch.zeros(3, 6, 7, 9)},
            ValueError,
            r"shortcut must have the shape of u, \[3, 6, 7, 8\], got \[3, 6, 7, 9\]",
        ),
        (
            {"shortcut": torch.zeros(4, 6, 7, 6, dtype=torch.float64)},  # as many elements
            ValueError,
            r"shortcut must have the shape of u, \[3, 6, 7, 8\], got \[4, 6, 7, 6\]",
        ),
        (
            {"norm": nn.BatchNorm2d(5).double()},
            ValueError,
            "norm must be over the 6 channels of u, got one over 5",
        ),
    ],
    ids=["u", "shortcut", "shape", "elements", "norm"],
)
def test_refusals(change, error, message):
    u, shortcut, _ = tensors()
    given = {"u": u, "shortcut": shortcut, "norm": norm_of(), "attention": None, **change}
    with pytest.raises(error, match=message):
        residual_attention(**given)


@pytest.mark.parametrize("attention", [True, False])
def test_one_value_a_channel_in_evaluation(attention):
    u, shortcut, dout = tensors((1, 6, 1, 1))
    assert_same(u, shortcut, dout, norm_of().eval(), layer_of() if attention else None)


@pytest.mark.parametrize("training", [True, False])
def test_torch_compile(training):
    u, shortcut, dout = tensors()
    plain = da_ops.DAResidual(6, dtype=torch.float64).train(training)
    compiled = copy.deepcopy(plain)
    function = torch.compile(compiled, fullgraph=True)
    for _ in range(2):
        found = []
        for module, call in ((plain, plain), (compiled, function)):
            out = call(u, shortcut)
            gradients = torch.autograd.grad(out, [u, shortcut, *module.parameters()], dout)
            found.append([out, *gradients, *(b.clone() for b in module.buffers())])
        for ours, theirs in zip(*found):
            torch.testing.assert_close(ours, theirs, **TOLERANCE)


def test_export_and_script_are_plain_operations():
    u, shortcut, _ = tensors(dtype=torch.float32, requires_grad=False)
    tail = da_ops.DAResidual(6).eval()
    want = tail(u, shortcut)
    exported = torch.export.export(tail, (u, shortcut))
    assert not any("residual" in str(node.target) for node in exported.graph.nodes)
    torch.testing.assert_close(exported.module()(u, shortcut), want)
    torch.testing.assert_close(torch.jit.script(tail)(u, shortcut), want)
    traced = torch.fx.symbolic_trace(tail)
    torch.testing.assert_close(traced(u, shortcut), want)


def test_functional_transforms():
    u, shortcut, _ = tensors(requires_grad=False)
    tail = da_ops.DAResidual(6, dtype=torch.float64).eval()

    def loss(parameters, u, shortcut):
        return torch.func.functional_call(tail, parameters, (u, shortcut)).square().sum()

    parameters = {name: p.detach() for name, p in tail.named_parameters()}
    gradients = torch.func.grad(loss)(parameters, u, shortcut)
    want = torch.autograd.grad(tail(u, shortcut).square().sum(), list(tail.parameters()))
    for found, expected in zip(gradients.values(), want, strict=True):
        torch.testing.assert_close(found, expected, **TOLERANCE)
    each = torch.func.vmap(lambda u, r: tail(u[None], r[None])[0])(u, shortcut)
    torch.testing.assert_close(each, tail(u, shortcut), **TOLERANCE)


def test_the_layer_has_the_modules_state():
    tail = da_ops.DAResidual(6, eps=1e-3, momentum=None, order="parallel", gate="scalar")
    assert (tail.norm.eps, tail.norm.momentum) == (1e-3, None)
    assert {key.partition(".")[0] for key in tail.state_dict()} == {"norm", "attention"}
    assert tail.attention.order == "parallel"
    other = copy.deepcopy(tail)
    other.load_state_dict(tail.state_dict())
    u, shortcut, _ = tensors(dtype=torch.float32)
    assert torch.equal(other(u, shortcut), tail(u, shortcut))
    with pytest.raises(ValueError, match="channels must be a positive int"):
        da_ops.DAResidual(0)


def test_a_norm_that_is_changed_between_forward_and_backward():
    u, shortcut, dout = tensors()
    norm = norm_of().eval()
    out = residual_attention(u, shortcut, norm, None)
    norm.running_mean.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward(dout)
