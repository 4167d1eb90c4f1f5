"""DAModule: its parameters, its life as an nn.Module, its places in networks."""

from __future__ import annotations

import copy
import io
import math
import pickle
from dataclasses import replace
from functools import partial

import pytest
import timm
import torch
import torchvision
from torch import nn

from da_ops import DAModule
from da_ops.backends import BACKENDS
from da_ops.reference import GATES, ORDERS

from .cases import CASES, LAYOUTS, distance

CONVOLUTIONS = {"conv": (1, 1, 3, 3), "dilated_conv": (1, 1, 3, 3), "merge": (1, 2, 1, 1)}
GATE_SHAPES = {
    "affine": {"gate_weight": (12,), "gate_bias": (12,)},
    "scalar": {"gate_weight": (1,), "gate_bias": (1,)},
    "eca": {"gate_weight": (3,)},
    "sigmoid": {},
}


def randomised(layer):
    with torch.no_grad():
        for p in layer.parameters():
            p.copy_(0.3 + 0.5 * torch.randn_like(p))
    return layer


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("order", ORDERS)
def test_state_dict(order, gate, bias):
    want = {}
    if order != "channel":
        for name, shape in CONVOLUTIONS.items():
            want[f"{name}.weight"] = shape
            if bias:
                want[f"{name}.bias"] = (1,)
    if order != "spatial":
        want |= GATE_SHAPES[gate]
    layer = DAModule(12, order=order, gate=gate, bias=bias)
    assert {name: tuple(t.shape) for name, t in layer.state_dict().items()} == want
    assert all(isinstance(p, nn.Parameter) and p.requires_grad for p in layer.parameters())


def test_state_dict_is_the_same_for_every_backend(backend):
    want = DAModule(12, bias=True).state_dict()
    layer = DAModule(12, bias=True, backend=backend)
    assert layer.state_dict().keys() == want.keys()
    layer.load_state_dict(want, strict=True)


def test_cost_of_the_spatial_mask():
    """20 numbers: 9 + 9 + 2."""
    assert sum(p.numel() for p in DAModule(64, order="spatial").parameters()) == 20


@pytest.mark.parametrize("gate", ["affine", "scalar"])
def test_gate_starts_open_and_constant(gate):
    layer = DAModule(12, gate=gate)
    assert not layer.gate_weight.any()
    assert layer.gate_bias.eq(1).all()


def test_convolutions_start_as_those_of_torch():
    """The same numbers from the same seed, in the order of the state_dict."""
    torch.manual_seed(5)
    layer = DAModule(12, bias=True)
    torch.manual_seed(5)
    for got, want in [
        (layer.conv, nn.Conv2d(1, 1, 3)),
        (layer.dilated_conv, nn.Conv2d(1, 1, 3)),
        (layer.merge, nn.Conv2d(2, 1, 1)),
    ]:
        torch.testing.assert_close(got.state_dict(), want.state_dict(), rtol=0, atol=0)


def test_eca_starts_as_a_convolution():
    bound = 1 / math.sqrt(9)
    weights = torch.cat([DAModule(8, gate="eca", kernel_size=9).gate_weight for _ in range(200)])
    assert weights.abs().max() <= bound
    assert weights.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.1)
    assert weights.mean().item() == pytest.approx(0, abs=0.03)


def test_reset_parameters():
    layer = randomised(DAModule(12, bias=True))
    torch.manual_seed(5)
    layer.reset_parameters()
    torch.manual_seed(5)
    torch.testing.assert_close(layer.state_dict(), DAModule(12, bias=True).state_dict())


@pytest.mark.parametrize(
    ("channels", "kernel_size"),
    [(1, 1), (4, 1), (8, 3), (64, 3), (128, 5), (256, 5), (512, 5), (1024, 5), (2048, 7)],
)
def test_adaptive_kernel_size(channels, kernel_size):
    """ECA-Net's: t = int((log2(C) + 1) / 2), then t or, if that is even, t + 1."""
    t = int((math.log2(channels) + 1) / 2)
    assert kernel_size == t + 1 - t % 2
    assert DAModule(channels, gate="eca").gate_weight.shape == (kernel_size,)


def test_kernel_size_may_be_given():
    assert DAModule(64, gate="eca", kernel_size=7).gate_weight.shape == (7,)


class Explicit(nn.Module):
    """The layer written as anyone would, each convolution with its bias."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def spatial(self, x):
        m = x.mean(1, keepdim=True)
        maps = torch.cat([self.layer.conv(m), self.layer.dilated_conv(m)], 1)
        return x * torch.sigmoid(self.layer.merge(maps))

    def forward(self, x):
        y = self.spatial(x)
        logit = self.layer.gate_weight * y.mean((2, 3)) + self.layer.gate_bias
        return y * torch.sigmoid(logit)[:, :, None, None]


@pytest.mark.parametrize("bias", [False, True])
def test_equals_the_explicit_layer(backend, device, bias):
    """Also the gradient of each convolution's bias, which the layer folds into one number."""
    layer = randomised(DAModule(12, bias=bias, backend=backend, device=device)).double()
    x = torch.randn(2, 12, 9, 8, dtype=torch.float64, device=device, requires_grad=True)
    results = []
    for f in (layer, Explicit(layer)):
        y = f(x)
        inputs = [x, *layer.parameters()]
        results.append([y, *torch.autograd.grad(y.square().sum(), inputs)])
    torch.testing.assert_close(*results)


def clone_by_pickle(layer):
    return pickle.loads(pickle.dumps(layer))


def clone_by_save(layer):
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def test_parametrised_weights():
    """Weights that are computed anew at each access, and not where nn.Module keeps parameters."""
    layer = randomised(DAModule(12))
    x = torch.randn(2, 12, 5, 6)
    expected = copy.deepcopy(layer)
    with torch.no_grad():
        for p in (expected.dilated_conv.weight, expected.gate_weight):
            p.mul_(2)

    class Double(nn.Module):
        def forward(self, p):
            return 2 * p

    nn.utils.parametrize.register_parametrization(layer.dilated_conv, "weight", Double())
    nn.utils.parametrize.register_parametrization(layer, "gate_weight", Double())
    torch.testing.assert_close(layer(x), expected(x))
    layer(x).sum().backward()
    assert all(p.grad is not None for p in layer.parameters())


@pytest.mark.parametrize("clone", [copy.deepcopy, clone_by_pickle, clone_by_save])
@pytest.mark.parametrize(("order", "gate"), CASES)
def test_clones_are_equal_and_independent(backend, device, order, gate, clone):
    layer = DAModule(12, order=order, gate=gate, bias=True, backend=backend, device=device)
    randomised(layer)
    x = torch.randn(2, 12, 5, 4, device=device)
    want = layer(x)
    other = clone(layer)
    assert repr(other) == repr(layer)
    randomised(layer)
    assert torch.equal(other(x), want)


def test_state_dict_through_a_file(backend, device):
    layer = randomised(DAModule(12, bias=True, backend=backend, device=device))
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other = DAModule(12, bias=True, backend=backend, device=device)
    other.load_state_dict(torch.load(file, weights_only=True))
    x = torch.randn(2, 12, 5, 4, device=device)
    assert torch.equal(other(x), layer(x))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
def test_to_dtype(backend, device, dtype, bias):
    layer = randomised(DAModule(12, bias=bias, backend=backend, device=device)).to(dtype)
    assert {p.dtype for p in layer.parameters()} == {dtype}
    y = layer(torch.randn(2, 12, 5, 4, device=device, dtype=dtype))
    assert y.dtype == dtype
    y.sum().backward()
    assert {p.grad.dtype for p in layer.parameters()} == {dtype}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
def test_float32_parameters_with_half_activations(backend, device, dtype, bias):
    layer = randomised(DAModule(12, bias=bias, backend=backend, device=device))
    x = torch.randn(2, 12, 5, 4, device=device).to(dtype)
    y = layer(x)
    assert y.dtype == dtype
    assert distance(y, layer(x.float())) < 4e-3
    y.sum().backward()
    assert {p.grad.dtype for p in layer.parameters()} == {torch.float32}


def test_device_and_dtype_of_construction():
    layer = DAModule(12, bias=True, device="meta", dtype=torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in layer.parameters()} == {("meta", torch.bfloat16)}


def test_meta_device(backend, device):
    """Built without memory, then given some: what loaders of large models do."""
    with torch.device("meta"):
        layer = DAModule(12, bias=True)
    x = torch.empty(2, 12, 5, 4, device="meta").contiguous(memory_format=torch.channels_last)
    y = layer(x)  # shapes alone
    assert (y.device.type, y.shape, y.stride()) == ("meta", x.shape, x.stride())
    source = randomised(DAModule(12, bias=True, backend=backend, device=device))
    layer = layer.to_empty(device=device)
    layer.load_state_dict(source.state_dict())
    x = torch.randn(2, 12, 5, 4, device=device)
    torch.testing.assert_close(layer(x), source(x))


def test_repr_says_what_it_is():
    assert repr(DAModule(64)).startswith(
        "DAModule(\n  64, order='spatial_channel', gate='affine'\n"
    )
    eca = DAModule(64, order="channel", gate="eca", backend="eager")
    assert repr(eca) == (
        "DAModule(64, order='channel', gate='eca', kernel_size=3, backend='eager')"
    )


def test_backend_argument_reaches_the_operator(backend, device, monkeypatch):
    used = []

    def spy(*args, forward=BACKENDS[backend].forward):
        used.append(backend)
        return forward(*args)

    monkeypatch.setitem(BACKENDS, backend, replace(BACKENDS[backend], forward=spy))
    DAModule(4, backend=backend, device=device)(torch.randn(1, 4, 3, 3, device=device))
    assert used == [backend]


def train(network, x, target):
    loss = nn.functional.cross_entropy(network(x), target)
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in network.named_parameters()}


def assert_trains_like_eager(make_network, backend, device, layout):
    """The same loss and gradients as with plain operations, forward and backward, in float64."""
    results = []
    for which in (backend, "eager"):
        torch.manual_seed(3)
        network = make_network(partial(DAModule, backend=which)).to(device).double()
        network = network.to(memory_format=LAYOUTS[layout])
        assert sum(isinstance(m, DAModule) for m in network.modules()) == 8
        x = torch.randn(2, 3, 64, 64, dtype=torch.float64, device=device)
        x = x.contiguous(memory_format=LAYOUTS[layout])
        results.append(train(network, x, torch.tensor([1, 4], device=device)))
    torch.testing.assert_close(*results, rtol=1e-8, atol=1e-10)
    assert all(grad is not None for grad in results[0][1].values())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_timm(backend, device, layout):
    """As timm's own attention layers are asked for."""

    def network(layer):
        return timm.create_model("resnet18", block_args={"attn_layer": layer}, num_classes=10)

    assert_trains_like_eager(network, backend, device, layout)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_torchvision(backend, device, layout):
    """After the last batch norm of each residual block, before the addition."""

    def network(layer):
        model = torchvision.models.resnet18(num_classes=10)
        for module in model.modules():
            if isinstance(module, torchvision.models.resnet.BasicBlock):
                module.bn2 = nn.Sequential(module.bn2, layer(module.bn2.num_features))
        return model

    assert_trains_like_eager(network, backend, device, layout)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"channels": 0}, "channels must be a positive int, got 0"),
        ({"channels": 2.5}, "channels must be a positive int, got 2.5"),
        ({"channels": "8"}, "channels must be a positive int, got '8'"),
        ({"channels": 8, "order": "both"}, "order must be one of .* got 'both'"),
        ({"channels": 8, "gate": "se"}, "gate must be one of .* got 'se'"),
        ({"channels": 8, "backend": "nope"}, "backend must be 'auto' or one of .*; got 'nope'"),
        ({"channels": 8, "kernel_size": 3}, "kernel_size goes with gate='eca', got gate='affine'"),
        ({"channels": 8, "gate": "eca", "kernel_size": 4}, "kernel_size must be odd, got 4"),
        (
            {"channels": 8, "gate": "eca", "kernel_size": -1},
            "kernel_size must be a positive int, got -1",
        ),
    ],
)
def test_bad_construction(arguments, words):
    with pytest.raises(ValueError, match=words):
        DAModule(**arguments)
