"""What people do around a network does with one that is fused what it does with others: hooks,
copies, changed modules, tracing, compiling, checkpointing."""

from __future__ import annotations

import copy
import logging
import pickle

import pytest
import torch
import torchvision
from torch import nn
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint
from torchvision.models import resnet as tv
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names
from torchvision.ops import FrozenBatchNorm2d

from da_ops import models
from da_ops.models import fuse, unfused_blocks
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
)
from .test_insert import SMALL

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:ast"),
]


@pytest.fixture(autouse=True)
def _forget(fused_cpu):
    functional._told.clear()


# ------------------------------------------------------------------------------ what stays


@pytest.mark.parametrize("attention", ["da", None])
@pytest.mark.parametrize("name", ["bottleneck", "timm basic"])
def test_keys_hooks_references_and_copies(name, attention):
    network = make(name, attention)
    modules, keys = list(network.modules()), list(network.state_dict())
    block = network.layer1[0]
    kind = type(block)
    seen = []
    block.register_forward_hook(lambda *_: seen.append(1))
    assert fuse(network) is network
    assert list(network.modules()) == modules and list(network.state_dict()) == keys
    assert isinstance(block, kind)
    network.eval()(images())
    assert seen
    block._forward_hooks.clear()
    x = images()
    for copied in (copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
        assert not unfused_blocks(copied)
        assert torch.equal(copied(x), network(x))
    before = [type(module) for module in fuse(network).modules()]
    assert [type(module) for module in fuse(network).modules()] == before


def test_weights_load_both_ways(tmp_path):
    plain = models.resnet18("da", num_classes=5)
    torch.save(plain.state_dict(), tmp_path / "plain.pt")
    fused = models.resnet18("da", num_classes=5, fused=True, weights=tmp_path / "plain.pt")
    assert_same(fused.state_dict(), plain.state_dict(), 0)
    torch.save(fused.state_dict(), tmp_path / "fused.pt")
    again = models.resnet18("da", num_classes=5, weights=tmp_path / "fused.pt")
    assert_same(again.state_dict(), plain.state_dict(), 0)


@pytest.mark.parametrize("which", ["relu", "bn2", "attention", "attention.merge", "conv2"])
@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
def test_hooks_see_what_they_would(which, kind):
    """Every call of the module, with the same tensors; without hooks blocks are fused again."""
    plain, fused = pair()
    x = images()
    found, handles = [], []
    for network in (plain, fused):
        network.layer2[0].relu.inplace = False  # backward hooks forbid it
        kept = []

        def keep(module, *tensors, kept=kept):
            flat = [t for group in tensors for t in (group if type(group) is tuple else (group,))]
            kept.extend(t.detach().clone() for t in flat if t is not None)

        module = network.layer2[0].get_submodule(which)
        handles.append(getattr(module, f"register_{kind}_hook")(keep))
        step(network, x)
        found.append(kept)
    assert found[0] and len(found[0]) == len(found[1])
    assert_same(*(dict(enumerate(kept)) for kept in reversed(found)))
    part = {"bn2": "norm", "relu": "activation", "attention": "attention"}.get(which, "merge")
    told = {} if which == "conv2" else {"layer2.0": f"{'the ' * (part != 'merge')}{part} has hooks"}
    assert unfused_blocks(fused) == told
    for handle in handles:
        handle.remove()
    assert not unfused_blocks(fused)


@pytest.mark.parametrize("which", ["conv1", "bn1", "activation"])
@pytest.mark.parametrize("name", ["basic", "timm basic"])
def test_hooks_on_the_stem_see_what_they_would(name, which):
    found, x = [], images()
    for network in pair(name):
        kept = []
        activation = "act1" if hasattr(network, "act1") else "relu"
        module = network.get_submodule(which if which != "activation" else activation)
        module.register_forward_hook(lambda *a, kept=kept: kept.append(a[-1]))
        with torch.no_grad():  # operators write over what a convolution made, if nobody sees it
            kept.append(network(x))
        found.append(dict(enumerate(kept)))
    assert len(found[0]) == 2
    assert_same(found[1], found[0])


@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward", "own forward"])
def test_hooks_on_a_module_that_does_nothing_are_called(kind):
    calls = []
    for network in pair("timm basic"):
        seen = []
        module = network.layer2[0].drop_block
        network.layer2[0].act1.inplace = False  # which a hook of backward forbids
        if kind == "own forward":
            module.forward = lambda x, seen=seen: seen.append(1) or x
        else:
            getattr(module, f"register_{kind}_hook")(lambda *_, seen=seen: seen.append(1))
        network(images()).sum().backward()
        calls.append(len(seen))
    assert calls == [1, 1]


def test_hooks_on_all_modules_see_what_they_would():
    plain, fused = pair()
    calls = []
    for network in (plain, fused):
        seen = []
        handle = nn.modules.module.register_module_forward_hook(
            lambda module, *_, seen=seen: seen.append(type(module).__mro__[-3])
        )
        try:
            network(images())
        finally:
            handle.remove()
        calls.append(seen)
    assert sorted(map(str, calls[0])) == sorted(map(str, calls[1]))


def replaced_relu(block):
    block.relu = nn.GELU()


def replaced_norm(block):
    block.bn2 = nn.GroupNorm(4, 64).double()


def replaced_attention(block):
    block.attention = models.SEModule(64).double()


def pruned(block):
    prune.l1_unstructured(block.bn2, "weight", 0.5)


def own_forward(block):
    block.bn2.forward = lambda x: 2 * x


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (replaced_relu, "the activation is a GELU, expected nn.ReLU"),
        (replaced_norm, "the norm is a GroupNorm, expected nn.BatchNorm2d"),
        (replaced_attention, "the attention is a SEModule, expected DAModule"),
        (own_forward, "the norm has a forward of its own"),
        (pruned, "the norm has hooks"),
    ],
)
def test_modules_that_were_changed_afterwards(change, reason, caplog):
    plain, fused = pair()
    for network in (plain, fused):
        torch.manual_seed(3)
        change(network.layer1[0])
    with caplog.at_level(logging.WARNING, "da_ops"):
        assert_alike(plain, fused)
    told = unfused_blocks(fused)
    assert list(told) == ["layer1.0"] and reason in told["layer1.0"]
    assert len(caplog.records) == 1 and reason in caplog.text


def test_norms_that_were_made_synchronous():
    """Not fused, and said; in evaluation, for PyTorch has them train on GPUs alone."""
    plain, fused = (nn.SyncBatchNorm.convert_sync_batchnorm(n).eval() for n in pair())
    x = images()
    assert_same(step(fused, x), step(plain, x))
    assert set(unfused_blocks(fused).values()) == {
        "the norm is a SyncBatchNorm, expected nn.BatchNorm2d"
    }


def test_frozen_norms_of_a_detector():
    detector = torchvision.models.detection.retinanet_resnet50_fpn(
        weights=None, weights_backbone=None, num_classes=2, min_size=64, max_size=64
    ).eval()
    for module in detector.modules():
        if isinstance(module, FrozenBatchNorm2d):
            nn.init.uniform_(module.weight, 0.1, 0.3)
    fused = fuse(copy.deepcopy(detector))
    assert not unfused_blocks(fused)
    x = torch.randn(1, 3, 64, 64)
    assert len(fused_in(fused.backbone, x)) == 16
    for name, want in detector.backbone(x).items():
        torch.testing.assert_close(fused.backbone(x)[name], want, rtol=1e-3, atol=1e-4)


# ------------------------------------------------------------------------------ what is around it


@pytest.mark.parametrize("attention", ["da", None])
@pytest.mark.parametrize("name", ["bottleneck", "timm basic"])
def test_scripts_traces_and_graphs_are_those_of_a_network_that_is_not_fused(name, attention):
    plain, fused = (network.eval() for network in pair(name, attention))
    x = images(64)
    want = plain(x)
    graph = torch.fx.symbolic_trace(fused)
    for form in (
        torch.jit.script(fused),
        torch.jit.trace(fused, x),
        graph,
        torch.jit.script(graph),
        torch.export.export(fused, (x,)).module(),
    ):
        assert_same({"y": form(x)}, {"y": want})
    names = [sorted(get_graph_node_names(network)[1]) for network in (plain, fused)]
    assert names[0] == names[1]


def test_features_have_the_same_names():
    plain, fused = (network.eval() for network in pair())
    nodes = ["layer1.0.relu_1", "layer3.0.add", "layer4"]
    x = images(64)
    assert_same(
        create_feature_extractor(fused, nodes)(x), create_feature_extractor(plain, nodes)(x)
    )


@pytest.mark.parametrize(("name", "training"), [("basic", True), ("timm basic", False)])
def test_torch_compile(name, training):
    torch._dynamo.reset()
    plain, fused = pair(name)
    compiled = torch.compile(fused.train(training), fullgraph=True, backend="aot_eager")
    x = images()
    for _ in range(2):
        want = step(plain.train(training), x)
        fused.zero_grad()
        y = compiled(x)
        y.square().sum().backward()
        got = {k: p.grad for k, p in fused.named_parameters()} | dict(fused.named_buffers())
        assert_same({"y": y.detach(), **got}, want)
    torch._dynamo.reset()


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", ["basic", "timm basic"])
def test_checkpointing_updates_statistics_as_often(name, reentrant):
    found, x = [], images().requires_grad_()
    for network in pair(name):
        y = network.conv1(x)
        for block in blocks_of(network).values():
            y = checkpoint(block, y, use_reentrant=reentrant)
        y.square().sum().backward()
        gradients = {k: p.grad for k, p in network.named_parameters() if p.grad is not None}
        found.append({**gradients, **dict(network.named_buffers())})
    assert found[1]["layer2.0.bn2.num_batches_tracked"] == 2
    assert_same(found[1], found[0])


def test_checkpointing_a_whole_network_of_timm():
    found, x = [], images()
    for network in pair("timm basic"):
        network.set_grad_checkpointing()
        found.append(step(network.train(), x))
    assert found[1]["layer2.0.bn2.num_batches_tracked"] == 2
    assert found[1]["bn1.num_batches_tracked"] == 1
    assert_same(found[1], found[0])


def test_functional_transforms():
    plain, fused = (network.eval() for network in pair())
    x = images()

    def gradients(network):
        parameters = {name: p.detach() for name, p in network.named_parameters()}

        def loss(parameters):
            return torch.func.functional_call(network, parameters, (x,)).square().sum()

        return torch.func.grad(loss)(parameters)

    assert_same(gradients(fused), gradients(plain))


def test_double_backward():
    found, x = [], images(number=1).requires_grad_()
    for network in pair():
        network.eval()
        (gradient,) = torch.autograd.grad(network(x).square().sum(), x, create_graph=True)
        gradient.square().sum().backward()
        found.append({name: p.grad for name, p in network.named_parameters() if p.grad is not None})
    assert_same(found[1], found[0])


def test_averaged_and_moved():
    plain, fused = pair()
    averaged = [torch.optim.swa_utils.AveragedModel(network).eval() for network in (plain, fused)]
    x = images()
    assert_same({"y": averaged[1](x)}, {"y": averaged[0](x)})
    assert not unfused_blocks(averaged[1])
    with torch.device("meta"):
        network = fuse(tv.ResNet(tv.BasicBlock, SMALL))
    network.to_empty(device="cpu")
    assert not unfused_blocks(network)
