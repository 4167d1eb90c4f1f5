"""The residual tail in a network: checkpointing, mixed precision, an activation with hooks."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from torchvision.ops import FrozenBatchNorm2d

import da_ops
from da_ops.residual import functional
from da_ops.residual.functional import residual_attention, tail, unfused

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
