"""The residual tail in a network: checkpointing, mixed precision, an activation with hooks; what
autograd may ask of it; norms out of the ordinary."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint
from torchvision.ops import FrozenBatchNorm2d

import da_ops
from da_ops.residual import functional
from da_ops.residual.functional import residual_attention, tail
from da_ops.residual.fusible import unfused

from .test_residual_layer import is_fused, layer_of, norm_of, one_by_one, tensors


@pytest.fixture(autouse=True)
def _forget(fused_cpu):
    functional._told.clear()


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("attention", [True, False])
def test_checkpointing_updates_statistics_as_often_as_modules_do(attention, reentrant):
    """Computing again stops as soon as what backward needs is there, but not before them."""
    u, shortcut, dout = tensors()
    found = []
    modules = norm_of(), layer_of() if attention else None
    for function in (residual_attention, one_by_one):
        norm, layer = copy.deepcopy(modules)
        out = checkpoint(function, u, shortcut, norm, layer, use_reentrant=reentrant)
        gradients = torch.autograd.grad(out, [u, shortcut], dout) if not reentrant else ()
        if reentrant:
            out.backward(dout)
        found.append([out, *gradients, *norm.buffers()])
    assert found[0][-1] == 2  # batches tracked
    for ours, theirs in zip(*found):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_frozen_norm_in_float32_gives_float32(dtype):
    """As torchvision's does; only one of the same dtype is fused."""
    u, shortcut, _ = tensors(dtype=dtype)
    norm, layer = FrozenBatchNorm2d(6), layer_of(torch.float32)
    out = residual_attention(u, shortcut, norm, layer)
    assert out.dtype == torch.float32 and not is_fused(out)
    torch.testing.assert_close(out, one_by_one(u, shortcut, norm, layer))
    out = residual_attention(u, shortcut, norm.to(dtype), layer)
    assert out.dtype == dtype and is_fused(out)


@pytest.mark.parametrize(
    ("activation", "reason"),
    [(nn.GELU(), "the activation is a GELU, expected nn.ReLU"), (nn.ReLU(), None)],
)
def test_a_block_with_an_activation_of_its_own(activation, reason):
    u, shortcut, _ = tensors()
    norm, layer = norm_of(), layer_of()
    out = tail(u, shortcut, norm, layer, activation)
    torch.testing.assert_close(out, activation(layer(norm(u)) + shortcut))
    assert is_fused(out) == (reason is None)
    assert unfused(norm, layer, activation=activation) == reason
    seen = []
    activation.register_forward_hook(lambda module, args, out: seen.append(out))
    out = tail(u, shortcut, norm, layer, activation)
    assert seen == [out] and not is_fused(out)


def test_nothing_is_said_where_nothing_is_computed(caplog):
    with torch.device("meta"):
        out = da_ops.DAResidual(6)(torch.empty(2, 6, 5, 4), torch.empty(2, 6, 5, 4))
    assert out.shape == (2, 6, 5, 4) and not caplog.records


def test_a_compiled_layer_under_checkpointing():
    u, shortcut, dout = tensors()
    plain = da_ops.DAResidual(6, dtype=torch.float64)
    found = []
    for layer in (plain, torch.compile(copy.deepcopy(plain), backend="aot_eager")):
        out = checkpoint(layer, u, shortcut, use_reentrant=False)
        found.append([out, *torch.autograd.grad(out, [u, shortcut], dout)])
    for ours, theirs in zip(*found):
        torch.testing.assert_close(ours, theirs)


def test_a_graph_outlives_a_call_that_is_not_compiled(choice):
    """What a choice remembers of calls by a backend's name does not make a graph anew."""
    u, shortcut, _ = tensors()
    layer = da_ops.DAResidual(6, dtype=torch.float64, backend="cpu").eval()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    want = compiled(u, shortcut)
    torch.testing.assert_close(layer(u, shortcut), want)
    with torch._dynamo.config.patch(error_on_recompile=True):
        torch.testing.assert_close(compiled(u, shortcut), want)


def apart(how):
    """Lays a saved tensor out anew."""
    if how == "sparse":
        return (lambda t: t.to_sparse() if t.dim() == 4 and t.min() >= 0 else t), (
            lambda t: t.to_dense() if t.is_sparse else t
        )
    return (lambda t: torch.stack([t, t], -1)), (lambda t: t[..., 0])


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("how", ["sparse", "strided"])
def test_saved_tensors_that_hooks_lay_out_anew(how, layout):
    u, shortcut, dout = tensors(layout=layout)
    norm, layer = norm_of(), layer_of()
    with torch.autograd.graph.saved_tensors_hooks(*apart(how)):
        ours = residual_attention(u, shortcut, norm, layer)
    assert is_fused(ours)
    inputs = [u, shortcut, norm.weight, *layer.parameters()]
    torch.testing.assert_close(
        torch.autograd.grad(ours, inputs, dout),
        torch.autograd.grad(one_by_one(u, shortcut, norm, layer), inputs, dout),
    )


@pytest.mark.parametrize("attention", [True, False])
def test_batched_gradients(attention):
    """`is_grads_batched`, which runs backward under vmap."""
    u, shortcut, _ = tensors()
    norm, layer = norm_of(), layer_of() if attention else None
    out = residual_attention(u, shortcut, norm, layer)
    assert is_fused(out)
    inputs, douts = [u, shortcut, norm.weight], torch.randn(3, *out.shape, dtype=out.dtype)
    batched = torch.autograd.grad(out, inputs, douts, is_grads_batched=True, retain_graph=True)
    singly = [torch.autograd.grad(out, inputs, dout, retain_graph=True) for dout in douts]
    torch.testing.assert_close(batched, tuple(map(torch.stack, zip(*singly))))


@pytest.mark.parametrize("function", [residual_attention, one_by_one])
def test_a_tangent_goes_through_backward(function):
    """Forward-mode differentiation of the backward of a graph that was made before."""
    u, shortcut, dout = tensors()
    tangent = torch.randn_like(dout)
    out = function(u, shortcut, norm_of(), layer_of())

    def backward(dout):
        return torch.autograd.grad(out, u, dout, retain_graph=True)[0]

    with forward_ad.dual_level():
        through = forward_ad.unpack_dual(backward(forward_ad.make_dual(dout, tangent))).tangent
    torch.testing.assert_close(through, backward(tangent))  # it is linear
    torch.testing.assert_close(torch.func.jvp(backward, (dout,), (tangent,))[1], backward(tangent))


@pytest.mark.parametrize("momentum", [0.01, None])
@pytest.mark.parametrize("how", ["gradients", "no gradients", "compiled"])
def test_a_variance_that_half_precision_does_not_hold(how, momentum):
    """Its share of the running one may well be finite."""
    u = torch.randn(4, 6, 9, 9).mul(300).half()
    found = []
    for function in (residual_attention, one_by_one):
        norm = nn.BatchNorm2d(6, momentum=momentum).half()
        norm.num_batches_tracked.fill_(99)
        if how == "compiled" and function is residual_attention:
            function = torch.compile(function, backend="aot_eager", fullgraph=True)
        with torch.set_grad_enabled(how == "gradients"):
            function(u, None, norm, None)
        found.append(list(norm.buffers()))
    assert found[0][1].isfinite().all()
    for ours, theirs in zip(*found):
        torch.testing.assert_close(ours, theirs, rtol=2e-3, atol=1e-3)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("with_shortcut", [True, False])
def test_a_frozen_norm_passes_gradients_where_its_input_is_infinite(with_shortcut, layout):
    u, shortcut, dout = tensors(layout=layout)
    with torch.no_grad():
        u[0, 0, 0, :2] = torch.tensor([float("inf"), -float("inf")])
    norm = norm_of().eval()
    nn.init.ones_(norm.weight)
    shortcut = shortcut if with_shortcut else None
    ours, theirs = (f(u, shortcut, norm, None) for f in (residual_attention, one_by_one))
    assert is_fused(ours)
    ours, theirs = (torch.autograd.grad(out, u, dout)[0] for out in (ours, theirs))
    assert theirs.isfinite().all()
    torch.testing.assert_close(ours, theirs)
