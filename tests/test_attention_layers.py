"""DA's rivals compute what their papers and torchvision or timm have them compute."""

from __future__ import annotations

import pytest
import timm
import torch
from timm.layers import EcaModule
from torch import nn
from torchvision.ops import SqueezeExcitation

from da_ops.models import ATTENTIONS, ECAModule, SEModule, SGEModule

from .cases import LAYOUTS


def results(layer, x, dy):
    """Output, and gradients of input and parameters."""
    x = x.clone().requires_grad_()
    y = layer(x)
    return [y, *torch.autograd.grad(y, [x, *layer.parameters()], dy)]


def data(*shape, dtype=torch.float64):
    return torch.randn(shape, dtype=dtype), torch.randn(shape, dtype=dtype)


def test_se_is_torchvisions_without_biases():
    layer = SEModule(32, dtype=torch.float64)
    other = SqueezeExcitation(32, 2).double()
    for own, theirs in ((layer.fc1, other.fc1), (layer.fc2, other.fc2)):
        theirs.bias = None
        theirs.weight = nn.Parameter(own.weight.detach().clone())
    x, dy = data(2, 32, 5, 4)
    torch.testing.assert_close(results(layer, x, dy), results(other, x, dy))


def test_eca_is_timms():
    layer, other = ECAModule(64, dtype=torch.float64), EcaModule(64, dtype=torch.float64)
    other.load_state_dict(layer.state_dict())
    x, dy = data(2, 64, 5, 4)
    torch.testing.assert_close(results(layer, x, dy), results(other, x, dy))


@pytest.mark.parametrize("channels", [64, 128, 256, 512, 1024, 2048])
def test_eca_adapts_its_kernel_as_timm_does(channels):
    assert ECAModule(channels).conv.weight.shape == EcaModule(channels).conv.weight.shape
    assert ECAModule(channels, kernel_size=9).conv.weight.shape == (1, 1, 9)


def test_sge_is_its_papers_formula():
    """One group of one image at a time, as section 3 of the paper has it."""
    layer = SGEModule(12, groups=3, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.normal_()
        layer.bias.normal_()
    x, dy = data(2, 12, 3, 5)

    def formula(x):
        images = []
        for image in x:
            groups = []
            for k, group in enumerate(image.chunk(3)):
                vectors = group.flatten(1).T  # one at each position
                c = torch.stack([vector @ vectors.mean(0) for vector in vectors])
                c = (c - c.mean()) / (c.std() + 1e-5)
                a = 1 / (1 + torch.exp(-(layer.weight[k] * c + layer.bias[k])))
                groups.append((vectors * a[:, None]).T.reshape(group.shape))
            images.append(torch.cat(groups))
        return torch.stack(images)

    formula.parameters = layer.parameters
    torch.testing.assert_close(results(layer, x, dy), results(formula, x, dy))


def test_sge_starts_as_published():
    layer = SGEModule(128)
    assert torch.equal(layer.weight, torch.zeros(64)) and torch.equal(layer.bias, torch.ones(64))


def test_sge_over_a_single_position():
    layer = SGEModule(128, dtype=torch.float64)
    nn.init.normal_(layer.weight)
    x, dy = data(2, 128, 1, 1)
    y, *gradients = results(layer, x, dy)
    torch.testing.assert_close(y, x * torch.ones((), dtype=x.dtype).sigmoid())
    assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("name", ATTENTIONS)
def test_dtype_and_layout_are_kept(name, dtype, layout):
    layer = ATTENTIONS[name](128, dtype=dtype)
    x, dy = (t.contiguous(memory_format=LAYOUTS[layout]) for t in data(2, 128, 5, 4, dtype=dtype))
    y, dx, *gradients = results(layer, x, dy)
    for t in (y, dx):
        assert t.dtype == dtype and t.is_contiguous(memory_format=LAYOUTS[layout])
    assert all(gradient.dtype == dtype for gradient in gradients)


@pytest.mark.parametrize("name", ATTENTIONS)
def test_half_precision_with_float32_parameters(name):
    layer, half = ATTENTIONS[name](128), torch.randn(2, 128, 5, 4, dtype=torch.bfloat16)
    want = layer(half.float())
    plain = layer(half)
    with torch.autocast("cpu", torch.bfloat16):
        autocast = layer(half)
    for got in (plain, autocast):
        assert got.dtype == torch.bfloat16
        torch.testing.assert_close(got.float(), want, rtol=0.03, atol=0.01)


@pytest.mark.parametrize("name", ATTENTIONS)
def test_no_images(name):
    layer = ATTENTIONS[name](128)
    x = torch.randn(0, 128, 5, 4, requires_grad=True)
    layer(x).sum().backward()
    assert layer(x).shape == x.grad.shape == x.shape
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in layer.parameters())


@pytest.mark.parametrize("name", ATTENTIONS)
def test_layers_serve_timm(name):
    """As timm's own attention layers are asked for, with device and dtype."""
    network = timm.create_model(
        "resnet10t", block_args={"attn_layer": ATTENTIONS[name]}, dtype=torch.float64
    )
    assert sum(isinstance(module, ATTENTIONS[name]) for module in network.modules()) == 4
    assert network(torch.randn(2, 3, 32, 32, dtype=torch.float64)).isfinite().all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: SEModule(8),
            r"reduction must be between 1 and channels=8, got 16; pass a smaller",
        ),
        (lambda: SEModule(8, reduction=0), "reduction must be between 1"),
        (lambda: SGEModule(96), r"multiple of groups, got channels=96 and groups=64; pass groups"),
        (lambda: SGEModule(0), "channels must be a positive int, got 0"),
        (lambda: ECAModule(0), "channels must be a positive int, got 0"),
        (lambda: ECAModule(8, kernel_size=4), "kernel_size must be odd, got 4"),
    ],
)
def test_layers_refuse(make, message):
    with pytest.raises(ValueError, match=message):
        make()
