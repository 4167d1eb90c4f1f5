"""Networks whose blocks' tails are one operator: they do what the same networks do without that."""

from __future__ import annotations

import copy
import logging

import pytest
import timm
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.models import resnet as tv

from da_ops import models
from da_ops.models import fuse, insert_attention, unfused_blocks
from da_ops.residual import functional

from .fused import (
    assert_alike,
    assert_same,
    blocks_of,
    fused_in,
    images,
    make,
    pair,
    step,
    with_masks,
)
from .test_insert import NETWORKS, SMALL, OwnBlock, trained

FUSIBLE = [name for name in NETWORKS if name != "group norm"]


@pytest.fixture(autouse=True)
def _forget(fused_cpu):
    functional._told.clear()


# ------------------------------------------------------------------------------ what it computes


@pytest.mark.parametrize(
    ("name", "attention"),
    [(name, "da") for name in FUSIBLE]
    + [("bottleneck", None), ("frozen", None), ("timm basic", None)],
)
def test_outputs_gradients_and_statistics(name, attention):
    plain, fused = pair(name, attention)
    assert not unfused_blocks(fused)
    assert fused_in(fused, images()) == list(blocks_of(fused))
    assert not fused_in(plain, images())
    plain.load_state_dict(fused.state_dict())  # looking has changed statistics
    assert_alike(plain, fused)


@pytest.mark.slow
def test_ten_training_steps():
    torch.manual_seed(1)
    plain = with_masks(models.resnet18("da", num_classes=5)).double()
    torch.manual_seed(1)
    fused = with_masks(models.resnet18("da", num_classes=5, fused=True)).double()
    assert_same(fused.state_dict(), plain.state_dict(), 0)
    optimizers = [torch.optim.SGD(n.parameters(), 1e-4, momentum=0.9) for n in (plain, fused)]
    for _ in range(10):
        x = images(64)
        found = [step(n, x, o) for n, o in zip((plain, fused), optimizers)]
    assert_same(found[1], found[0], 1e-6)
    assert_same(fused.state_dict(), plain.state_dict(), 1e-6)
    assert (found[0]["layer1.0.bn2.running_var"] - 1).abs().min() > 0.01  # they have moved


@pytest.mark.parametrize("constructor", ["resnet34", "resnet50", "resnet101", "da_resnet50"])
def test_constructors(constructor):
    with torch.device("meta"):
        network = getattr(models, constructor)(fused=True)
        assert set(unfused_blocks(getattr(models, constructor)()).values()) == {
            "fuse(model) was not called"
        }
    assert len(blocks_of(network)) >= 16
    assert all(block.fused for block in blocks_of(network).values())


def test_insert_attention_fused():
    plain = make("basic", None)
    fused = insert_attention(copy.deepcopy(plain), fused=True, preserve_function=True)
    x = images()
    assert fused_in(fused.eval(), x) == list(blocks_of(fused))
    torch.testing.assert_close(fused.eval()(x), plain.eval()(x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["basic", "bottleneck", "timm basic", "timm resnet26"])
def test_every_norm_with_a_relu_is_fused(name):
    _, fused = pair(name)
    nodes, seen = [fused(images()).grad_fn], set()
    while nodes:
        if (node := nodes.pop()) is not None and node not in seen:
            seen.add(node)
            nodes += [before for before, _ in node.next_functions]
    operators = [node for node in seen if node.name() == "ResidualFunctionBackward"]
    assert len(operators) == norms_with_relu(fused)


def norms_with_relu(network):
    blocks = blocks_of(network).values()
    return 1 + sum(3 if hasattr(block, "conv3") else 2 for block in blocks)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ["basic", "bottleneck", "timm basic"])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_a_norm_writes_over_what_a_convolution_made(mode, name, training):
    """Where they leave no running statistics behind."""
    plain, fused = (network.train(training) for network in pair(name))
    x = images()
    with mode(), torch.autograd.profiler.profile() as profile:
        found = [network(x) for network in (fused, plain)]
    torch.testing.assert_close(*found, rtol=1e-8, atol=1e-8)
    for ours, theirs in zip(fused.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-8)
    calls = [event.name for event in profile.function_events]
    overwriting = calls.count("da_ops::residual_forward_")
    assert overwriting == (0 if training else norms_with_relu(fused))


@pytest.mark.parametrize("which", ["conv1", "conv2"])
def test_what_a_hook_has_kept_of_a_convolution_is_not_written_over(which):
    plain, fused = (network.eval() for network in pair())
    x, kept = images(), []
    for network in (fused, plain):
        conv = network.layer2[0].get_submodule(which)
        conv.register_forward_hook(lambda module, args, out: kept.append(out))
        with torch.no_grad():
            network(x)
    torch.testing.assert_close(*kept, rtol=1e-8, atol=1e-8)


class Keeps:
    """A mode that keeps what convolutions give."""

    def __init__(self):
        super().__init__()
        self.kept = []

    def call(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function in (nn.functional.conv2d, torch.ops.aten.convolution.default):
            self.kept.append(result)
        return result


class KeepsOfFunctions(Keeps, TorchFunctionMode):
    __torch_function__ = Keeps.call


class KeepsOfOperators(Keeps, TorchDispatchMode):
    __torch_dispatch__ = Keeps.call


@pytest.mark.parametrize("keeps", [KeepsOfFunctions, KeepsOfOperators])
def test_what_a_mode_has_kept_of_a_convolution_is_not_written_over(keeps):
    x, kept = images(), []
    for network in pair():
        with torch.no_grad(), keeps() as mode:
            network.eval()(x)
        kept.append(mode.kept)
    assert len(kept[0]) == len(kept[1]) > 0
    for ours, theirs in zip(*kept):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("way", ["_conv_forward", "_compiled_call_impl"])
def test_what_a_convolution_of_its_own_ways_has_kept_is_not_written_over(way):
    plain, fused = (network.eval() for network in pair())
    x, kept = images(), []
    for network in (plain, fused):
        conv = network.layer2[0].conv1
        before = getattr(conv, "_conv_forward" if way == "_conv_forward" else "forward")

        def keeping(*args, before=before):
            kept.append(before(*args))
            return kept[-1]

        setattr(conv, way, keeping)
        with torch.no_grad():
            network(x)
    torch.testing.assert_close(*kept, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", ["basic", "timm basic"])
def test_attention_in_a_network_that_was_fused(name):
    plain = make(name, None)
    fused = fuse(copy.deepcopy(plain))
    torch.manual_seed(2)
    insert_attention(plain)
    torch.manual_seed(2)
    insert_attention(fused)
    assert_alike(plain, fused)
    assert not unfused_blocks(fused)


@pytest.mark.parametrize("name", ["bottleneck", "timm basic"])
def test_norms_in_any_mixture(name):
    plain, fused = pair(name)
    for network in (plain, fused):
        for number, block in enumerate(blocks_of(network).values()):
            norm = block.bn3 if hasattr(block, "conv3") else block.bn2
            if number == 0:
                norm.requires_grad_(False)
            if number == 1:
                norm.momentum = None
            if number == 2:
                norm.weight.requires_grad_(False)
        network.train()
        blocks = list(blocks_of(network).values())
        blocks[0].eval()  # frozen in a network that trains
        blocks[3].requires_grad_(False)
    x = images()
    for _ in range(2):
        assert_same(step(fused, x), step(plain, x))
    assert fused_in(fused, x) == list(blocks_of(fused))


def test_channels_last():
    plain, fused = pair("bottleneck")
    x = images().contiguous(memory_format=torch.channels_last)
    plain, fused = (n.to(memory_format=torch.channels_last) for n in (plain, fused))
    assert_alike(plain, fused, x)
    seen = []
    fused.layer1[0].register_forward_hook(lambda module, args, out: seen.append(out))
    fused(x)
    assert seen[0].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("name", ["basic", "frozen", "timm basic"])
def test_autocast(name):
    plain, fused = (network.float() for network in pair(name))
    x = images(64).float()
    seen = []
    for network in (plain, fused):
        network.layer3[0].register_forward_hook(lambda module, args, out: seen.append(out.dtype))
        with torch.autocast("cpu", torch.bfloat16):
            y = network(x)
        y.float().square().sum().backward()
    assert seen[0] == seen[1]
    assert all(p.grad.dtype == torch.float32 for p in fused.parameters())
    with torch.autocast("cpu", torch.bfloat16):
        # A frozen norm makes float32 of half precision, and is called.
        assert fused_in(fused, x) == ([] if name == "frozen" else list(blocks_of(fused)))
        torch.testing.assert_close(
            fused.eval()(x).float(), plain.eval()(x).float(), rtol=0.1, atol=0.1
        )


def test_networks_in_half_precision():
    plain, fused = (network.bfloat16().eval() for network in pair())
    x = images().bfloat16()
    assert fused_in(fused, x) == list(blocks_of(fused))
    torch.testing.assert_close(fused(x), plain(x), rtol=0.1, atol=0.1)


# ------------------------------------------------------------------------------ what is refused


def dropping(**options):
    return lambda: timm.create_model("resnet10t", num_classes=5, **options)


def synchronous(name="basic"):
    return nn.SyncBatchNorm.convert_sync_batchnorm(NETWORKS[name]())


@pytest.mark.parametrize(
    ("network", "reason"),
    [
        (NETWORKS["group norm"], "the norm is a GroupNorm, expected nn.BatchNorm2d"),
        (synchronous, "the norm is a SyncBatchNorm, expected nn.BatchNorm2d"),
        (
            lambda: insert_attention(NETWORKS["basic"](), "se"),
            "the attention is a SEModule, expected DAModule",
        ),
        (
            dropping(block_args={"attn_layer": "eca"}),
            "the attention is a EcaModule, expected DAModule",
        ),
        (dropping(act_layer=nn.SiLU), "the activation is a SiLU, expected nn.ReLU"),
        (dropping(norm_layer=timm.layers.BatchNormAct2d), "the norm is a BatchNormAct2d"),
    ],
)
def test_blocks_that_stay_as_they_are(network, reason, caplog):
    network = network()
    kinds = [type(module) for module in network.modules()]
    with caplog.at_level(logging.WARNING, "da_ops"):
        fuse(network)
    assert [type(module) for module in network.modules()] == kinds
    (record,) = caplog.records
    assert f"da_ops: fuse: layer1.0 and 3 more not fused: {reason}" in record.getMessage()
    assert len(unfused_blocks(network)) == 4


def test_blocks_that_drop_paths_stay_as_they_are(caplog):
    network = dropping(drop_path_rate=0.2)()
    with caplog.at_level(logging.WARNING, "da_ops"):
        fuse(network)
    dropped = [name for name, block in blocks_of(network).items() if block.drop_path is not None]
    assert dropped and list(unfused_blocks(network)) == dropped
    assert "there is a DropPath before the addition" in caplog.text


@pytest.mark.parametrize("modules", [(), (nn.Identity(),)])
def test_a_shortcut_through_a_sequential_that_does_little(modules):
    plain = tv.BasicBlock(8, 8, downsample=nn.Sequential(*modules)).double()
    fused = fuse(copy.deepcopy(plain))
    x = torch.randn(2, 8, 6, 6, dtype=torch.float64)
    assert fused.fused
    assert_same(step(fused, x), step(plain, x))


@pytest.mark.parametrize(
    "options",
    [{"aa_layer": timm.layers.BlurPool2d}, {"drop_block_rate": 0.1}],
    ids=["anti-aliasing", "drop block"],
)
def test_what_comes_before_the_last_convolution_does_not_matter(options):
    plain = trained(timm.create_model("resnet10t", num_classes=5, **options))
    fused = fuse(copy.deepcopy(plain))
    assert not unfused_blocks(fused)
    x = images()
    for training in (True, False):
        found = []
        for network in (plain, fused):
            torch.manual_seed(4)
            found.append(step(network.train(training), x))
        assert_same(found[1], found[0])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fuse(nn.Conv2d(1, 1, 1)), r"fuse: .* residual blocks .* found none in Conv2d"),
        (
            lambda: fuse(tv.ResNet(OwnBlock, SMALL)),
            r"found none in ResNet but OwnBlock, a subclass, .*; call fuse before .* fully_shard",
        ),
        (
            lambda: models.resnet18("se", fused=True),
            r"resnet18: fused=True goes with DA or without attention, got attention='se'; leave",
        ),
        (
            lambda: insert_attention(NETWORKS["basic"](), "eca", fused=True),
            r"insert_attention: fused=True goes with DA .* got attention='eca'; leave it out",
        ),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()
