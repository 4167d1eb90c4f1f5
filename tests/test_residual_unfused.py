"""Where the residual tail calls its modules one by one: it says why, and does what they do."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

import da_ops
from da_ops.residual import functional
from da_ops.residual.functional import residual_attention
from da_ops.residual.fusible import unfused

from .test_residual_layer import assert_same, is_fused, layer_of, norm_of, one_by_one, tensors


@pytest.fixture(autouse=True)
def _forget(fused_cpu):
    functional._told.clear()


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: (nn.GroupNorm(2, 6).double(), layer_of()), "GroupNorm"),
        (lambda: (nn.SyncBatchNorm(6).double().eval(), layer_of()), "SyncBatchNorm"),
        (lambda: (norm_of(), nn.Identity()), "Identity"),
        (lambda: (nn.utils.parametrizations.weight_norm(norm_of()), None), "Parametrized"),
    ],
)
def test_what_cannot_be_fused_is_called_and_told_once(make, reason, caplog):
    norm, attention = make()
    u, shortcut, _ = tensors()
    with caplog.at_level(logging.WARNING, "da_ops"):
        for _ in range(2):
            out = residual_attention(u, shortcut, norm, attention)
    assert not is_fused(out)
    assert len([r for r in caplog.records if "residual tail" in r.message]) == 1
    assert reason in caplog.text
    assert reason in unfused(norm, attention)


@pytest.mark.parametrize("which", ["norm", "attention", "conv"])
def test_hooks_are_called(which):
    norm, layer = norm_of(), layer_of()
    module = {"norm": norm, "attention": layer, "conv": layer.conv}[which]
    seen = []
    handle = module.register_forward_hook(lambda *_: seen.append(1))
    assert "has hooks" in unfused(norm, layer)
    assert_same(*tensors(), norm, layer, fused=False, steps=1)
    assert seen
    handle.remove()
    assert unfused(norm, layer) is None


def test_hooks_on_all_modules_are_called():
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda m, *_: seen.append(type(m)))
    try:
        residual_attention(*tensors()[:2], norm_of(), layer_of())
    finally:
        handle.remove()
    assert seen == [nn.BatchNorm2d, da_ops.DAModule]


def test_a_backend_without_a_kernel_of_the_tail(caplog):
    with caplog.at_level(logging.WARNING, "da_ops"):
        assert_same(*tensors(), norm_of(), layer_of(backend="eager"), fused=False)
    assert "backend 'eager' has no kernel of the residual tail" in caplog.text


@pytest.mark.parametrize(
    "change",
    [
        lambda u, r: (u, r[:1]),  # broadcast
        lambda u, r: (u[:0], r[:0]),
        lambda u, r: (u, r.float()),
        lambda u, r: (u, r[..., :1]),
    ],
    ids=["broadcast", "no images", "another dtype", "a column"],
)
@pytest.mark.parametrize("gradients", [True, False])
def test_shortcuts_that_no_kernel_takes(gradients, change):
    u, shortcut = change(*tensors()[:2])
    norm, layer = norm_of().eval(), layer_of()
    with torch.set_grad_enabled(gradients):
        out = residual_attention(u, shortcut, norm, layer)
        torch.testing.assert_close(out, one_by_one(u, shortcut, norm, layer))
    assert not gradients or not is_fused(out)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("gradients", [True, False])
def test_only_what_the_kernels_refuse_is_looked_at(gradients, training, monkeypatch):
    looked = []
    fits = functional.fits
    monkeypatch.setattr(functional, "fits", lambda *given: looked.append(1) or fits(*given))
    u, shortcut, _ = tensors()
    norm, layer = norm_of().train(training), layer_of()
    with torch.set_grad_enabled(gradients):
        residual_attention(u, shortcut, norm, layer)
        assert not looked
        residual_attention(u, shortcut[:1], norm, layer)
        assert looked


def test_half_precision_with_a_frozen_norm_of_float32():
    """Whose result is float32."""
    norm = FrozenBatchNorm2d(6)
    u, shortcut, _ = tensors(dtype=torch.bfloat16)
    out = residual_attention(u, shortcut, norm, None)
    assert out.dtype == torch.float32 and not is_fused(out)
    assert torch.equal(out, one_by_one(u, shortcut, norm, None))


def test_errors_are_those_of_the_modules():
    norm, layer = norm_of(), layer_of()
    u = torch.randn(1, 6, 1, 1, dtype=torch.float64)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        residual_attention(u, u, norm, layer)
    with pytest.raises(ValueError, match="4D"):
        residual_attention(u[0], u[0], norm, layer)
    u = torch.randn(2, 6, 3, 3, dtype=torch.float64)
    with pytest.raises(ValueError, match="gate_weight must have shape"):
        residual_attention(u, u, norm, layer_of(channels=5))
    with pytest.raises((RuntimeError, ValueError), match="device"):
        residual_attention(u, u, norm, layer_of().to("meta"))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "elsewhere", [{"dtype": torch.float32}, {"dtype": torch.bfloat16}, {"device": "meta"}], ids=str
)
def test_a_norm_that_no_kernel_takes(elsewhere, training):
    """PyTorch has its way."""
    found = []
    for function in (residual_attention, one_by_one):
        torch.manual_seed(0)
        u, shortcut, _ = tensors()
        norm = norm_of().to(**elsewhere).train(training)
        try:
            out = function(u, shortcut, norm, None)
            assert not is_fused(out)
            found.append([out.tolist(), norm.running_mean.tolist()])
        except RuntimeError as error:
            found.append(str(error))
    assert found[0] == found[1]


def outcome(function, *args):
    try:
        return function(*args).tolist()
    except ValueError as error:
        return str(error)


def test_a_norm_without_eps_is_refused_as_the_module_does(caplog):
    u, shortcut, _ = tensors()
    norm = norm_of(eps=0.0)
    results = [outcome(f, u, shortcut, norm, None) for f in (residual_attention, one_by_one)]
    assert results[0] == results[1]
    assert "the norm's eps is 0.0, expected more than 0" in caplog.text


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ["running_mean", "running_var"])
def test_statistics_that_are_to_be_learned_are_the_modules_own_affair(name, training):
    u, shortcut, _ = tensors()
    norm = norm_of().train(training)
    getattr(norm, name).requires_grad_()
    with pytest.raises(RuntimeError, match=name) as theirs:
        one_by_one(u, shortcut, norm, None)
    with pytest.raises(RuntimeError) as ours:
        residual_attention(u, shortcut, norm, None)
    assert str(ours.value) == str(theirs.value)
