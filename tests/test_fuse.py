"""Networks whose blocks' tails are one operator: they do what the same networks do without that."""

from __future__ import annotations

import copy
import logging
import pickle

import pytest
import timm
import torch
import torchvision
from timm.models import resnet as timm_resnet
from torch import nn
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint
from torchvision.models import resnet as tv
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names
from torchvision.ops import FrozenBatchNorm2d

from da_ops import DAModule, models
from da_ops.models import fuse, insert_attention, unfused_blocks
from da_ops.residual import functional

from .test_insert import NETWORKS, SMALL, OwnBlock, trained

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:ast"),
]

TOLERANCE = 1e-8  # in double precision, through a network
FUSIBLE = [name for name in NETWORKS if name != "group norm"]


@pytest.fixture(autouse=True)
def _forget(fused_cpu):
    functional._told.clear()


def images(size=32, number=3):
    return torch.randn(number, 3, size, size, dtype=torch.float64)


def with_masks(network):
    """Every mask at work: gates and convolutions of the layers are random."""
    for module in network.modules():
        if isinstance(module, DAModule):
            for p in module.parameters():
                nn.init.normal_(p, std=0.5)
    return network


def make(name="basic", attention="da"):
    """A network in double precision, not fused."""
    network = NETWORKS[name]()
    if attention is not None:
        insert_attention(network, attention)
    return with_masks(trained(network))


def pair(name="basic", attention="da"):
    """The same network, not fused and fused."""
    plain = make(name, attention)
    return plain, fuse(copy.deepcopy(plain))


def blocks_of(network):
    known = (tv.BasicBlock, tv.Bottleneck, timm_resnet.BasicBlock, timm_resnet.Bottleneck)
    return {name: m for name, m in network.named_modules() if isinstance(m, known)}


def fused_in(network, x):
    """The names of the blocks whose result one operator made of it."""
    seen, handles = [], []
    for name, block in blocks_of(network).items():

        def note(module, args, out, name=name):
            if type(out.grad_fn).__name__ == "ResidualFunctionBackward":
                seen.append(name)

        handles.append(block.register_forward_hook(note))
    network(x)
    for handle in handles:
        handle.remove()
    return seen


def step(network, x, optimizer=None):
    """Output, gradients and buffers, after a step of ``optimizer`` if there is one."""
    network.zero_grad()
    y = network(x)
    y.square().sum().backward()
    gradients = {k: p.grad.clone() for k, p in network.named_parameters() if p.grad is not None}
    if optimizer is not None:
        optimizer.step()
    return {"y": y.detach(), **gradients, **{k: b.clone() for k, b in network.named_buffers()}}


def assert_same(found, expected, tolerance=TOLERANCE):
    """Each tensor within a relative L2 error of the one of the same name."""
    assert found.keys() == expected.keys()
    for name, want in expected.items():
        off = (found[name].double() - want.double()).norm()
        assert off <= tolerance * want.double().norm(), (name, off)


def assert_alike(plain, fused, x=None):
    """In training and in evaluation."""
    x = images() if x is None else x
    for training in (True, False):
        assert_same(step(fused.train(training), x), step(plain.train(training), x))


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
        (lambda: fuse(tv.ResNet(OwnBlock, SMALL)), r"found none in ResNet"),
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
