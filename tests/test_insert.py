"""insert_attention: every block of networks as they are, and a start that changes nothing."""

from __future__ import annotations

import copy
import pickle

import pytest
import timm
import torch
import torchvision
from timm.models import resnet as timm_resnet
from torch import nn
from torchvision.models import resnet as tv
from torchvision.ops import FrozenBatchNorm2d

from da_ops import DAModule
from da_ops.models import ATTENTIONS, insert_attention
from da_ops.reference import GATES, ORDERS

SMALL = [1, 1, 1, 1]  # blocks in each stage


def group_norm(channels):
    return nn.GroupNorm(4, channels)


NETWORKS = {
    "basic": lambda: tv.ResNet(tv.BasicBlock, SMALL, num_classes=5),
    "bottleneck": lambda: tv.ResNet(tv.Bottleneck, SMALL, num_classes=5),
    "resnext": lambda: tv.ResNet(tv.Bottleneck, SMALL, 5, groups=32, width_per_group=4),
    "wide": lambda: tv.ResNet(tv.Bottleneck, SMALL, 5, width_per_group=128),
    "group norm": lambda: tv.ResNet(tv.BasicBlock, SMALL, 5, norm_layer=group_norm),
    "frozen": lambda: tv.ResNet(tv.BasicBlock, SMALL, 5, norm_layer=FrozenBatchNorm2d),
    "timm basic": lambda: timm_resnet.ResNet(timm_resnet.BasicBlock, SMALL, 5),
    "timm resnet26": lambda: timm.create_model("resnet26", num_classes=5),
}  # fmt: skip
# With how many blocks: the real ones, on no device.
FULL = {
    "torchvision": {
        "resnet18": 8, "resnet152": 50, "resnext50_32x4d": 16, "wide_resnet101_2": 33,
    },
    "timm": {"resnet18": 8, "resnet26d": 8, "resnext50_32x4d": 16, "wide_resnet50_2": 16},
}  # fmt: skip


# Orders and gates of DA. The mask of the "sigmoid" gate cannot be constant.
FORMS = [(o, g) for o in ORDERS for g in GATES if g != "sigmoid" or o == "spatial"]


def trained(network, dtype=torch.float64):
    """As if it had been: no parameter of a normalisation is 0 or 1 any more."""
    for module in network.modules():
        if isinstance(module, (nn.BatchNorm2d, nn.GroupNorm, FrozenBatchNorm2d)):
            module.weight.data.uniform_(0.5, 1.5)
            module.bias.data.normal_(std=0.2)
    return network.to(dtype)


# FCA's default needs maps of 7 x 7.
OPTIONS = {"fca": {"frequencies": "low4"}}


def images(size=32, dtype=torch.float64):
    return torch.randn(4, 3, size, size, dtype=dtype)


def new_parameters(network):
    return {
        name: p for name, p in network.named_parameters() if ".attention." in name or ".se." in name
    }


def outputs(network, x):
    """In training, which does not depend on running statistics, and in evaluation."""
    network = copy.deepcopy(network)
    return [network.train(mode)(x) for mode in (True, False)]


def assert_preserved(network, attention, size=32, **options):
    x = images(size)
    before = outputs(network, x)
    assert insert_attention(network, attention, preserve_function=True, **options) is network
    torch.testing.assert_close(outputs(network, x), before, rtol=1e-10, atol=1e-10)


def assert_all_learn(network, size=32):
    """Every new parameter has a gradient once one step has been made."""
    x, target = images(size), torch.tensor([0, 1, 2, 3])
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01)
    for _ in range(2):
        optimizer.zero_grad()
        nn.functional.cross_entropy(network.train()(x), target).backward()
        optimizer.step()
    without = [name for name, p in new_parameters(network).items() if not p.grad.count_nonzero()]
    assert new_parameters(network) and not without


@pytest.mark.parametrize("name", NETWORKS)
def test_the_function_is_preserved_in_every_network(name):
    network = trained(NETWORKS[name]())
    assert_preserved(network, "da")
    assert_all_learn(network)


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("name", ["basic", "timm basic"])
def test_the_function_is_preserved_with_every_attention(name, attention):
    network = trained(NETWORKS[name]())
    assert_preserved(network, attention, 64, **OPTIONS.get(attention, {}))
    assert_all_learn(network, 64)  # over a single position, SGE has nothing to learn


@pytest.mark.parametrize(("order", "gate"), FORMS)
def test_the_function_is_preserved_in_every_form_of_da(order, gate):
    network = trained(NETWORKS["basic"]())
    assert_preserved(network, "da", order=order, gate=gate)
    assert_all_learn(network)


def test_the_function_is_preserved_with_biases():
    network = trained(NETWORKS["basic"]())
    assert_preserved(network, "da", bias=True)
    assert_all_learn(network)


def test_the_function_is_preserved_in_float32():
    network = trained(torchvision.models.resnet18(), torch.float32).eval()
    x = images(dtype=torch.float32)
    before = network(x)
    insert_attention(network, preserve_function=True)
    torch.testing.assert_close(network(x), before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_without_preserve_function_it_is_another(attention):
    network = trained(NETWORKS["basic"]())
    x = images(64)
    before = outputs(network, x)[1]
    after = outputs(insert_attention(network, attention, **OPTIONS.get(attention, {})), x)[1]
    assert (after - before).norm() > 0.01 * before.norm()


def test_branches_that_start_at_zero_stay_there():
    network = tv.ResNet(tv.Bottleneck, SMALL, 5, zero_init_residual=True).double()
    assert_preserved(network, "da")
    assert not network.layer1[0].bn3.weight.count_nonzero()


@pytest.mark.parametrize(
    ("library", "name"), [(library, name) for library in FULL for name in FULL[library]]
)
def test_every_block_of_the_real_networks(library, name):
    slot = "attention" if library == "torchvision" else "se"
    with torch.device("meta"):
        create = timm.create_model if library == "timm" else torchvision.models.get_model
        network = create(name)
        before = list(network.state_dict())
        insert_attention(network, "da", preserve_function=True)
    layers = {n: m for n, m in network.named_modules() if isinstance(m, DAModule)}
    assert len(layers) == FULL[library][name]
    assert {key.rpartition(".")[2] for key in layers} == {slot}
    after = network.state_dict()
    assert before == [key for key in after if f".{slot}." not in key]
    assert len(after) == len(before) + 5 * len(layers)


def test_blocks_of_a_detector():
    with torch.device("meta"):
        network = torchvision.models.detection.retinanet_resnet50_fpn(
            weights=None, weights_backbone=None
        )
        insert_attention(network, "eca")
    assert "backbone.body.layer4.2.attention.conv.weight" in network.state_dict()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_layers_are_where_their_block_is(device, dtype):
    network = NETWORKS["basic"]().to(device, dtype).eval()
    insert_attention(network, "da", order="parallel", gate="scalar", backend="eager")
    parameters = new_parameters(network).values()
    assert {(p.device.type, p.dtype) for p in parameters} == {(device, dtype)}
    layer = network.layer3[0].attention
    assert (layer.order, layer.gate, layer.backend) == ("parallel", "scalar", "eager")
    assert not layer.training


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("name", ["basic", "bottleneck"])
def test_what_an_attention_gives_is_not_written_over(name, attention):
    """In training and evaluation, by the addition that follows or within the layer."""
    network = insert_attention(NETWORKS[name](), attention, **OPTIONS.get(attention, {}))
    kept = []
    for key, module in network.named_modules():
        if ".attention" in key or ".downsample" in key:
            module.register_forward_hook(lambda *call: kept.append((call[2], call[2].clone())))
    for mode in (True, False):
        network.train(mode)(images(64, dtype=torch.float32))
    assert len(kept) >= 2 * sum(SMALL)
    assert all(torch.equal(given, then) for given, then in kept)


def test_hooks_and_copies_live_on():
    network = NETWORKS["bottleneck"]().eval()
    seen = []
    network.layer2[0].register_forward_hook(lambda *_: seen.append("layer2"))
    insert_attention(network)
    x = torch.randn(2, 3, 32, 32)
    y = network(x)
    assert seen == ["layer2"] and isinstance(network.layer2[0], tv.Bottleneck)
    network.layer2[0]._forward_hooks.clear()
    for copied in (copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
        torch.testing.assert_close(copied(x), y, rtol=0, atol=0)


class OwnBlock(tv.BasicBlock):
    def forward(self, x):
        return x


def timm_network(**options):
    return lambda: timm.create_model("resnet10t", **options)


def without_norm(channels):
    return nn.Identity()


def not_affine():
    network = NETWORKS["basic"]()
    network.layer1[0].bn2 = nn.BatchNorm2d(64, affine=False)
    return network


def shared_norm():
    network = NETWORKS["basic"]()
    network.layer1[0].bn1 = network.layer1[0].bn2
    return network


def shared_weight():
    network = NETWORKS["basic"]()
    network.layer2[0].bn2.weight = network.layer3[0].bn1.weight
    return network


PRESERVE = {"preserve_function": True}


@pytest.mark.parametrize(
    ("network", "options", "message"),
    [
        (lambda: nn.Conv2d(1, 1, 1), {}, r"residual blocks .* found none in Conv2d"),
        (
            lambda: tv.ResNet(OwnBlock, SMALL),
            {},
            r"found none in ResNet but OwnBlock, a subclass, .*; call insert_attention before",
        ),
        (
            lambda: insert_attention(NETWORKS["basic"](), "eca"),
            {},
            r"layer1\.0 has attention already, ECAModule; pass a network without",
        ),
        (
            timm_network(block_args={"attn_layer": "se"}),
            {},
            r"layer1\.0 has attention already, SEModule",
        ),
        (NETWORKS["basic"], {"attention": "cbam"}, r"attention must be one of 'da'.* got 'cbam'"),
        (
            NETWORKS["basic"],
            {"attention": "se", "order": "parallel"},
            r"attention='se' does not take order, only reduction, device, dtype; leave it out",
        ),
        (NETWORKS["basic"], {"order": "both"}, r"order must be one of"),
        (NETWORKS["basic"], {"backend": "nope"}, r"backend must be 'auto' or one of .*'nope'"),
        (NETWORKS["basic"], {"attention": "sge", "groups": 48}, r"multiple of groups.*groups=48"),
        (NETWORKS["basic"], {"attention": "fca", "frequencies": "top64"}, r"got 'top64'"),
        (
            NETWORKS["basic"],
            {"gate": "sigmoid", **PRESERVE},
            r"gate='sigmoid' has no parameters; use gate='affine', 'scalar' or 'eca'",
        ),
        (
            lambda: tv.ResNet(tv.BasicBlock, SMALL, norm_layer=without_norm),
            PRESERVE,
            r"weight and bias .* got Identity\(\) in layer1\.0; use preserve_function=False",
        ),
        (
            not_affine,
            PRESERVE,
            r"weight and bias .* got BatchNorm2d\(64.*affine=False",
        ),
        (
            timm_network(norm_layer=timm.layers.BatchNormAct2d),
            PRESERVE,
            r"weight and bias .* got BatchNormAct2d",
        ),
        (
            shared_norm,
            PRESERVE,
            r"a normalisation of its own .* got one in layer1\.0 that is shared",
        ),
        (shared_weight, PRESERVE, r"got one in layer2\.0 that is shared"),
    ],
)
def test_a_refusal_leaves_the_network_as_it_was(network, options, message):
    network = network()
    before = copy.deepcopy(network.state_dict())
    with pytest.raises(ValueError, match=message):
        insert_attention(network, **options)
    assert network.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[key]) for key, tensor in network.state_dict().items())


def test_a_refusal_at_the_last_block_leaves_the_network_as_it_was():
    network = NETWORKS["basic"]()
    network.layer4[0].bn2 = nn.Identity()
    before = copy.deepcopy(network.state_dict())
    with pytest.raises(ValueError, match=r"Identity\(\) in layer4\.0"):
        insert_attention(network, preserve_function=True)
    assert all(torch.equal(tensor, before[key]) for key, tensor in network.state_dict().items())
    assert type(network.layer1[0]) is tv.BasicBlock
