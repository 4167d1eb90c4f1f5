"""DA's rivals compute what their papers and torchvision or timm have them compute."""

from __future__ import annotations

import itertools
import math

import pytest
import timm
import torch
from timm.layers import EcaModule
from torch import nn
from torchvision.ops import SqueezeExcitation

from da_ops.models import ATTENTIONS, ECAModule, FCAModule, SEModule, SGEModule
from da_ops.models import frequencies as dct

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


def cosine_sums(x, pairs):
    """Each group of channels of each image, position by position, as the paper defines the DCT."""
    n, c, h, w = x.shape
    pooled = torch.zeros(n, c, dtype=x.dtype)
    for group, (u, v) in enumerate(pairs):
        scale = math.sqrt((1 if u == 0 else 2) / h) * math.sqrt((1 if v == 0 else 2) / w)
        channels = slice(group * c // len(pairs), (group + 1) * c // len(pairs))
        for i in range(h):
            for j in range(w):
                wave = math.cos(math.pi * u * (i + 0.5) / h) * math.cos(math.pi * v * (j + 0.5) / w)
                pooled[:, channels] = pooled[:, channels] + x[:, channels, i, j] * wave * scale
    return pooled


# The best 16 of the paper's Figure 5 and its code, along the height and along the width.
TOP16 = [
    (0, 0), (0, 1), (6, 0), (0, 5), (0, 2), (1, 0), (1, 2), (4, 0),
    (5, 0), (1, 6), (3, 0), (0, 4), (0, 6), (0, 3), (3, 5), (2, 2),
]  # fmt: skip


@pytest.mark.parametrize(
    ("shape", "times", "options"),
    [
        ((7, 7), (1, 1), {}),
        ((9, 13), (1, 1), {}),
        ((14, 23), (2, 3), {}),
        ((14, 14), (2, 2), {"size": 14}),
        ((15, 11), (1, 1), {"size": 7}),
        ((14, 16), (1, 2), {"size": (7, 14)}),
    ],
)
def test_fca_is_its_papers_formula(shape, times, options):
    """Frequencies of a map of 7 x 7, as many times as high where 7 goes into the side; another size
    than the one asked for is pooled to it first."""
    layer = FCAModule(32, dtype=torch.float64, **options)
    x, dy = data(2, 32, *shape)
    size = options.get("size", shape)

    def formula(x):
        seen = nn.functional.adaptive_avg_pool2d(x, size)
        pooled = cosine_sums(seen, [(u * times[0], v * times[1]) for u, v in TOP16])
        hidden = torch.relu(pooled @ layer.fc1.weight[:, :, 0, 0].T)
        return x * torch.sigmoid(hidden @ layer.fc2.weight[:, :, 0, 0].T)[:, :, None, None]

    formula.parameters = layer.parameters
    torch.testing.assert_close(results(layer, x, dy), results(formula, x, dy))


@pytest.mark.parametrize("name", ["top1", "low1"])
def test_fca_at_frequency_zero_is_se_with_its_pooling_scaled(name):
    layer, se = FCAModule(32, frequencies=name, dtype=torch.float64), SEModule(32).double()
    se.load_state_dict(layer.state_dict())
    with torch.no_grad():
        se.fc1.weight.mul_(math.sqrt(5 * 4))
    x, dy = data(2, 32, 5, 4)
    (y, dx, d1, d2), (want, *gradients) = results(layer, x, dy), results(se, x, dy)
    gradients[1] *= math.sqrt(5 * 4)
    torch.testing.assert_close([y, dx, d1, d2], [want, *gradients])


@pytest.mark.parametrize("side", [7, 10, 56, 75])
def test_fca_takes_an_orthonormal_basis(side):
    """Also in float32 at high frequencies: large angles lose no digits."""
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        waves = dct._cosines(6, side, torch.empty(0, dtype=dtype))
        torch.testing.assert_close(
            waves @ waves.T, torch.eye(7, dtype=dtype), rtol=0, atol=tolerance
        )
        frequency = torch.arange(7, dtype=torch.float64)[:, None] * (side // 7)
        position = torch.arange(side, dtype=torch.float64) + 0.5
        want = torch.cos(math.pi * frequency * position / side) * (2 / side) ** 0.5
        want[0] /= 2**0.5
        torch.testing.assert_close(waves.double(), want, rtol=0, atol=tolerance / 10)


def test_fca_knows_the_published_sets():
    assert len(dct.NAMES) == 18
    for name in dct.NAMES:
        pairs = list(zip(*dct.frequencies(name), strict=True))
        assert len(pairs) == len(set(pairs)) == int(name[3:])
        assert {*itertools.chain(*pairs)} <= set(range(7))
        whole = list(zip(*dct.frequencies(f"{name[:3]}32")))
        assert whole[: len(pairs)] == pairs
        FCAModule(64, frequencies=name)(torch.randn(1, 64, 7, 7))
    assert list(zip(*dct.frequencies("top16"))) == TOP16
    best, worst = ({*zip(*dct.frequencies(name))} for name in ("top16", "bot16"))
    assert not best & worst
    lowest = [u + v for u, v in zip(*dct.frequencies("low16"))]
    assert max(lowest) == 5 and sorted(lowest)[:15] == [n for n in range(5) for _ in range(n + 1)]


@pytest.mark.parametrize(
    ("options", "least", "small"),
    [
        ({}, "7 x 7", (7, 6)),
        ({"frequencies": "low2"}, "1 x 2", (4, 1)),
        ({"size": 14}, "14 x 14", (13, 20)),
    ],
)
def test_fca_refuses_maps_smaller_than_its_basis(options, least, small):
    layer = FCAModule(32, **options)
    sides = [int(side) for side in least.split(" x ")]
    layer(torch.randn(1, 32, *sides))
    message = f"FCAModule: x must have maps of at least {least}, got {small[0]} x {small[1]}; use"
    with pytest.raises(ValueError, match=message):
        layer(torch.randn(1, 32, *small))


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
    x, dy = (t.contiguous(memory_format=LAYOUTS[layout]) for t in data(2, 128, 9, 8, dtype=dtype))
    y, dx, *gradients = results(layer, x, dy)
    for t in (y, dx):
        assert t.dtype == dtype and t.is_contiguous(memory_format=LAYOUTS[layout])
    assert all(gradient.dtype == dtype for gradient in gradients)


@pytest.mark.parametrize("name", ATTENTIONS)
def test_half_precision_with_float32_parameters(name):
    layer, half = ATTENTIONS[name](128), torch.randn(2, 128, 9, 8, dtype=torch.bfloat16)
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
    x = torch.randn(0, 128, 9, 8, requires_grad=True)
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
    size = 224 if name == "fca" else 32  # maps of 7 x 7 at least
    assert network(torch.randn(2, 3, size, size, dtype=torch.float64)).isfinite().all()


@pytest.mark.parametrize("name", ATTENTIONS)
def test_one_graph_for_any_size(name):
    torch._dynamo.reset()
    layer = ATTENTIONS[name](128, dtype=torch.float64)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    compiled.parameters = layer.parameters
    for shape in ((2, 128, 14, 21), (3, 128, 9, 16)):
        x, dy = data(*shape)
        torch.testing.assert_close(results(compiled, x, dy), results(layer, x, dy))
    torch._dynamo.reset()


@pytest.mark.parametrize("name", ATTENTIONS)
def test_onnx(name):
    """Standard operators only, for any size."""
    onnxruntime = pytest.importorskip("onnxruntime")
    layer, x = ATTENTIONS[name](128).eval(), torch.randn(2, 128, 14, 21)
    sizes = {0: "n", 2: "h", 3: "w"}
    program = torch.onnx.export(layer, (x,), dynamo=True, dynamic_shapes=(sizes,), verbose=False)
    assert {node.domain for node in program.model_proto.graph.node} == {""}
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString())
    for other in (x, torch.randn(3, 128, 9, 16)):
        (y,) = session.run(None, {session.get_inputs()[0].name: other.numpy()})
        want = layer(other).detach()
        torch.testing.assert_close(torch.from_numpy(y), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: SEModule(8),
            r"reduction must be between 1 and channels=8, got 16; pass a smaller",
        ),
        (lambda: SEModule(8, reduction=0), "SEModule: reduction must be a positive int, got 0"),
        (
            lambda: SEModule(64, reduction=2.5),
            "SEModule: reduction must be a positive int, got 2.5",
        ),
        (
            lambda: FCAModule(64, reduction="a"),
            "FCAModule: reduction must be a positive int, got 'a'",
        ),
        (lambda: SGEModule(64, groups=2.0), "SGEModule: groups must be a positive int, got 2.0"),
        (lambda: SGEModule(64, groups="a"), "SGEModule: groups must be a positive int, got 'a'"),
        (lambda: FCAModule(8), "FCAModule: reduction must be between 1 and channels=8, got 16"),
        (lambda: FCAModule(0), "FCAModule: channels must be a positive int, got 0"),
        (
            lambda: FCAModule(72),
            r"multiple of the number of frequencies, got channels=72 and frequencies='top16'; pass",
        ),
        (lambda: FCAModule(64, frequencies="top3"), r"1, 2, 4, 8, 16, 32, such as .* got 'top3'"),
        (lambda: FCAModule(64, frequencies="best16"), "got 'best16'"),
        (lambda: FCAModule(64, size=0), "FCAModule: size must be a positive int, got 0"),
        (lambda: FCAModule(64, size=(7, 6)), "size must be at least 7 x 7 .*, got 7 x 6"),
        (lambda: FCAModule(64, size=(7, 7, 7)), r"size must be one number or two, got \(7, 7, 7\)"),
        (lambda: SGEModule(96), r"multiple of groups, got channels=96 and groups=64; pass groups"),
        (lambda: SGEModule(0), "channels must be a positive int, got 0"),
        (lambda: ECAModule(0), "channels must be a positive int, got 0"),
        (lambda: ECAModule(8, kernel_size=4), "kernel_size must be odd, got 4"),
    ],
)
def test_layers_refuse(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("name", ["se", "sge", "eca", "fca"])
@pytest.mark.parametrize("shape", [(2, 32, 8, 8), (2, 128, 8, 8), (64, 8, 8), (2, 64, 1, 8, 8)])
def test_layers_refuse_maps_of_other_channels_or_dimensions(name, shape):
    layer = ATTENTIONS[name](64)
    for call in (layer, torch.jit.script(layer)):
        with pytest.raises((ValueError, torch.jit.Error), match=r"x must be \[N, 64, H, W\], as"):
            call(torch.randn(shape))
