"""A layer whose convolutions were changed computes with what they are now."""

from __future__ import annotations

import copy
import logging
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune

import da_ops
import da_ops.module
from da_ops import DAModule
from da_ops.backends import BACKENDS, select
from da_ops.models import resnet18

from .cases import LAYOUTS
from .test_module import Explicit, randomised

CHILDREN = ("conv", "dilated_conv", "merge")


class Plain(Explicit):
    """The default layer as README writes it, over the children of another."""


def assert_as_plain(layer, x, tolerance=1e-5):
    """Output and every gradient are those of the plain layer over the same children."""
    results = []
    for f in (layer, Plain(layer)):
        y = f(x)
        inputs = [x, *layer.parameters()]
        results.append([y, *torch.autograd.grad(y.square().sum(), inputs)])
    torch.testing.assert_close(*results, rtol=tolerance, atol=tolerance)


def data(*shape, **kind):
    return torch.randn(shape or (2, 8, 7, 6), requires_grad=True, **kind)


class Counted(nn.Conv2d):
    """A subclass that does more than its parent."""

    calls = 0

    def forward(self, x):
        type(self).calls += 1
        return 2 * super().forward(x)


class Adapter(nn.Module):
    """What low-rank adaptation puts around a convolution."""

    def __init__(self, base):
        super().__init__()
        self.base = base
        self.down = nn.Conv2d(base.in_channels, 2, 3, padding=1, bias=False)
        self.up = nn.Conv2d(2, base.out_channels, 1, bias=False)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


def pruned(layer, child):
    prune.l1_unstructured(getattr(layer, child), "weight", 1)


def spectrally_normalised(layer, child):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        nn.utils.spectral_norm(getattr(layer, child)).eval()  # power iterations change it


def weight_normalised(layer, child):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        nn.utils.weight_norm(getattr(layer, child))


def parametrised(layer, child):
    nn.utils.parametrizations.weight_norm(getattr(layer, child))


def subclassed(layer, child):
    old = getattr(layer, child)
    new = Counted(
        old.in_channels, 1, old.kernel_size, 1, old.padding, old.dilation, bias=old.bias is not None
    )
    new.load_state_dict(old.state_dict())
    setattr(layer, child, new)


def adapted(layer, child):
    setattr(layer, child, Adapter(getattr(layer, child)))


def circular(layer, child):
    getattr(layer, child).padding_mode = "circular"


def patched(layer, child):
    conv = getattr(layer, child)
    plain = conv.forward
    conv.forward = lambda x: 3 * plain(x)


def hooked(layer, child):
    getattr(layer, child).register_forward_hook(lambda module, args, out: 2 * out)


def hooked_before(layer, child):
    getattr(layer, child).register_forward_pre_hook(lambda module, args: (args[0] + 1,))


def hooked_backward(layer, child):
    getattr(layer, child).register_full_backward_hook(lambda module, dx, dy: (2 * dx[0],))


def wider(layer, child):
    """More maps between the convolutions and their merge."""
    layer.conv = nn.Conv2d(1, 3, 3, padding=1)
    layer.dilated_conv = nn.Conv2d(1, 2, 5, padding=2)
    layer.merge = nn.Conv2d(5, 1, 1)


CHANGES = [
    pruned,
    spectrally_normalised,
    weight_normalised,
    parametrised,
    subclassed,
    adapted,
    circular,
    patched,
    hooked,
    hooked_before,
    hooked_backward,
    wider,
]


@pytest.mark.parametrize("child", CHILDREN)
@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_changed_child(change, child):
    layer = randomised(DAModule(8))
    change(layer, child)
    assert layer.unfused() is not None
    assert_as_plain(layer, data())


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("order", da_ops.reference.ORDERS)
def test_through_its_children_it_is_the_same_layer(fused_cpu, order, dtype, layout, bias):
    """Also float32 parameters with half x."""
    tolerance = {torch.float64: 1e-12, torch.float16: 3e-3, torch.bfloat16: 2e-2}[dtype]
    parameter_dtype = torch.promote_types(dtype, torch.float32)
    layer = randomised(DAModule(8, order=order, bias=bias, dtype=parameter_dtype))
    x = torch.randn(2, 8, 7, 6, dtype=dtype).contiguous(memory_format=LAYOUTS[layout])
    want = layer(x)
    got = layer._through_children(x)
    assert got.dtype == dtype and got.stride() == x.stride()
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(
        layer.to(dtype)._through_children(x), want, rtol=tolerance * 4, atol=tolerance * 4
    )


@pytest.mark.parametrize("child", CHILDREN)
def test_a_bias_more(child):
    """An exact convolution in place of another, with a bias that the others do not have."""
    layer = randomised(DAModule(8))
    old = getattr(layer, child)
    new = nn.Conv2d(old.in_channels, 1, old.kernel_size, 1, old.padding, old.dilation)
    setattr(layer, child, randomised(new))
    assert layer.unfused() is None
    assert_as_plain(layer, data())


@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
def test_hooks_of_children_fire(kind):
    layer = DAModule(8)
    fired = []
    handles = []
    for name in CHILDREN:
        register = getattr(getattr(layer, name), f"register_{kind}_hook")
        handles.append(register(lambda *args, name=name: fired.append(name)))
    layer(data()).sum().backward()
    assert sorted(fired) == sorted(CHILDREN)
    for handle in handles:
        handle.remove()
    assert layer.unfused() is None


def test_pruned_network_trains_and_uses_its_masks():
    """Two steps of global pruning, then other weights into the pruned network."""
    torch.manual_seed(2)
    net = resnet18("da", num_classes=4).double()
    convolutions = [(m, "weight") for m in net.modules() if isinstance(m, nn.Conv2d)]
    prune.global_unstructured(convolutions, prune.L1Unstructured, amount=0.3)
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    for _ in range(2):
        net(x).square().sum().backward()
        optimizer.step()
    layer = net.layer1[0].attention
    masked = layer.conv.weight_mask == 0
    prune.l1_unstructured(layer.conv, "weight", 3)
    layer.load_state_dict(
        {k: 2 * v for k, v in layer.state_dict().items() if "mask" not in k}, strict=False
    )
    x = data(2, 64, 5, 5, dtype=torch.float64)
    assert_as_plain(layer, x, 1e-12)
    assert (layer.conv.weight[masked] == 0).all()


def test_what_is_made_permanent_is_fused_again():
    layer = randomised(DAModule(8))
    prune.l1_unstructured(layer.conv, "weight", 3)
    parametrize.register_parametrization(layer.merge, "weight", nn.Identity())
    assert layer.unfused() == "conv has hooks"
    prune.remove(layer.conv, "weight")
    parametrize.remove_parametrizations(layer.merge, "weight")
    assert layer.unfused() is None
    assert_as_plain(layer, data())


def test_pruned_gate_stays_fused():
    """The layer's own parameters reach the kernels as they are at each call."""
    layer = randomised(DAModule(8))
    for name in ("gate_weight", "gate_bias"):
        prune.l1_unstructured(layer, name, 3)
    assert layer.unfused() is None
    x = data()
    for _ in range(2):
        layer(x).sum().backward()
    layer.gate_weight_orig.data.mul_(2)
    y = layer(x)
    assert (layer.gate_weight == 0).sum() == 3
    torch.testing.assert_close(y, Plain(layer)(x))


def test_unchanged_layer_is_fused(backend, device, monkeypatch):
    """No child is called, whatever cloned the layer."""
    import pickle

    monkeypatch.setattr(nn.Conv2d, "forward", lambda *args: pytest.fail("a child was called"))
    layer = DAModule(8, backend=backend, device=device)
    for one in (layer, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), layer.double()):
        one(torch.randn(2, 8, 5, 4, device=device, dtype=one.conv.weight.dtype))


def test_says_so_once(caplog, monkeypatch):
    monkeypatch.setattr(da_ops.module, "_told", set())
    layers = [DAModule(8) for _ in range(3)]
    for layer in layers:
        layer.merge.register_forward_hook(lambda *args: None)
    with caplog.at_level(logging.WARNING, "da_ops"):
        for layer in layers:
            layer(data())
    assert [r.message for r in caplog.records] == [
        "da_ops: DAModule calls its convolutions in plain PyTorch operations, not the fused "
        "kernels: merge has hooks"
    ]


def test_explain_of_a_layer():
    layer = DAModule(8, order="parallel", gate="eca")
    x = torch.empty(2, 8, 7, 6)
    assert da_ops.explain(x, layer=layer).call.order == "parallel"
    assert da_ops.explain(x, layer=layer).backend == select("auto", "cpu")
    adapted(layer, "conv")
    explanation = da_ops.explain(x, layer=layer)
    assert explanation.backend == "eager"
    assert "conv is now Adapter" in str(explanation)
    assert set(explanation.passed_over) == set(BACKENDS) - {"eager"}


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiles_with_a_changed_child(compiler):
    torch._dynamo.reset()
    layer = randomised(DAModule(8)).double()
    adapted(layer.double(), "conv")
    layer.double()
    compiled = torch.compile(layer, fullgraph=True, backend=compiler)
    x = data(dtype=torch.float64)
    torch.testing.assert_close(compiled(x), layer(x))
    torch._dynamo.reset()
