"""How the layer and its rivals get on with what people use around a network: tracing, scripting,
quantising, counting, feature extraction, timm."""

from __future__ import annotations

import copy
import operator
import re
from functools import partial

import numpy as np
import pytest
import timm
import torch
from timm.models._features_fx import get_notrace_functions, get_notrace_modules
from torch import fx, nn
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

import da_ops
from da_ops import DAModule
from da_ops.functional import attention
from da_ops.models import (
    ATTENTIONS,
    ECAModule,
    FCAModule,
    SEModule,
    SGEModule,
    fuse,
    insert_attention,
    resnet18,
)

from .cases import CASES
from .test_module import randomised

# torch.jit.script and the FX mode of quantisation are deprecated, and still in use.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:torch.ao"),
]


def results(module, x):
    """Output, and gradients by name."""
    y = module(x)
    names, leaves = zip(("x", x), *sorted(module.named_parameters()))
    gradients = torch.autograd.grad(y.square().sum(), leaves)
    return {"y": y, **dict(zip(names, gradients))}


MACS = 20 * 16 * 16  # of the three convolutions on a map of 16x16


def network(attention, constructor=resnet18):
    """With random masks, in double precision, as it is at inference."""
    torch.manual_seed(1)
    if attention == "fca":  # by default it needs maps of 7 x 7, and larger images
        net = constructor(None, num_classes=7)
        insert_attention(net, attention, frequencies="low4")
    else:
        net = constructor(attention, num_classes=7)
    for module in net.modules():
        if isinstance(module, tuple(ATTENTIONS.values())):
            randomised(module)
    return net.double().eval()


def images(size=64):
    return torch.randn(2, 3, size, size, dtype=torch.float64)


def test_thop_counts_the_convolutions():
    thop = pytest.importorskip("thop")
    macs, _ = thop.profile(DAModule(8), (torch.randn(1, 8, 16, 16),), verbose=False)
    assert macs == MACS


def test_torchinfo_counts_the_convolutions():
    torchinfo = pytest.importorskip("torchinfo")
    summary = torchinfo.summary(DAModule(8), (1, 8, 16, 16), verbose=0)
    assert summary.total_mult_adds == MACS
    assert summary.total_params == 20 + 2 * 8


def test_ptflops_counts_the_convolutions():
    ptflops = pytest.importorskip("ptflops")
    macs, _ = ptflops.get_model_complexity_info(
        DAModule(8), (8, 16, 16), as_strings=False, print_per_layer_stat=False, backend="pytorch"
    )
    assert MACS <= macs < MACS + 10 * 8 * 256  # it counts the multiplications by the masks as well


def test_counting_leaves_the_layer_fused():
    thop, torchinfo = (pytest.importorskip(name) for name in ("thop", "torchinfo"))
    layer = DAModule(8)
    thop.profile(layer, (torch.randn(1, 8, 16, 16),), verbose=False)
    torchinfo.summary(layer, (1, 8, 16, 16), verbose=0)
    assert layer.unfused() is None


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("order", "gate"), CASES)
def test_a_traced_layer_is_one_node(order, gate, bias):
    layer = randomised(DAModule(8, order=order, gate=gate, bias=bias)).double()
    graph = fx.symbolic_trace(layer)
    assert [node.target for node in graph.graph.nodes].count(attention) == 1
    x = torch.randn(2, 8, 6, 5, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(results(graph, x), results(layer, x))
    with torch.no_grad():  # weights are read when the graph runs
        for p in layer.parameters():
            p.mul_(2)
    assert torch.equal(graph(x), layer(x))


def test_a_traced_function_is_one_node():
    layer = randomised(DAModule(8))

    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            own = self.layer
            weights = own.conv.weight, own.dilated_conv.weight, own.merge.weight
            gate = own.gate_weight, own.gate_bias
            return da_ops.da_attention(x, *weights, *gate) + 1

    graph = fx.symbolic_trace(Functional())
    assert [n.target for n in graph.graph.nodes if n.op == "call_function"] == [
        attention,
        operator.add,
    ]
    x = torch.randn(2, 8, 6, 5)
    torch.testing.assert_close(graph(x), layer(x) + 1)


def test_a_traced_layer_with_hooks_calls_its_children():
    layer = randomised(DAModule(8))
    layer.conv.register_forward_hook(lambda module, args, out: 2 * out)
    graph = fx.symbolic_trace(layer)
    called = [node.target for node in graph.graph.nodes if node.op == "call_module"]
    assert called == ["conv", "dilated_conv", "merge"]
    x = torch.randn(2, 8, 6, 5)
    torch.testing.assert_close(graph(x), layer(x))


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_features_of_a_network(attention):
    net, x = network(attention), images()
    extractor = create_feature_extractor(net, ["layer2", "layer4"])
    got = extractor(x)
    assert {name: t.shape[1] for name, t in got.items()} == {"layer2": 128, "layer4": 512}
    kept = {}
    net.layer4.register_forward_hook(lambda module, args, out: kept.update(layer4=out))
    net(x)
    torch.testing.assert_close(got["layer4"], kept["layer4"])


@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_a_scripted_network(attention, traced):
    net, x = network(attention), images()
    scripted = torch.jit.script(fx.symbolic_trace(net) if traced else net)
    torch.testing.assert_close(scripted(x), net(x))


@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("order", "gate"), CASES)
def test_a_scripted_layer(order, gate, bias, traced):
    """Through plain operations: the same output and gradients, half precision in float32."""
    layer = randomised(DAModule(8, order=order, gate=gate, bias=bias))
    scripted = torch.jit.script(fx.symbolic_trace(layer) if traced else layer)
    x = torch.randn(2, 8, 6, 5, requires_grad=True)
    torch.testing.assert_close(results(scripted, x), results(layer, x), rtol=1e-5, atol=1e-5)
    half = x.detach().bfloat16()  # with float32 parameters
    torch.testing.assert_close(scripted(half), layer(half), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("tool", ["thop", "torchinfo", "ptflops"])
def test_counting_a_fused_network(tool):
    """What is counted is what the modules do."""
    module = pytest.importorskip(tool)
    net = network("da").float()
    counts = []
    for counted in (net, fuse(copy.deepcopy(net))):
        if tool == "thop":
            counts.append(module.profile(counted, (images(32).float(),), verbose=False))
        elif tool == "torchinfo":
            summary = module.summary(counted, (2, 3, 32, 32), verbose=0)
            counts.append((summary.total_mult_adds, summary.total_params))
        else:
            options = {"as_strings": False, "print_per_layer_stat": False, "backend": "pytorch"}
            counts.append(module.get_model_complexity_info(counted, (3, 32, 32), **options))
    assert counts[0] == counts[1]


@pytest.mark.parametrize(
    ("attention", "fused"), [*((name, False) for name in ATTENTIONS), ("da", True), (None, True)]
)
def test_a_network_prepared_for_quantisation(attention, fused):
    """Observers change nothing; what can be quantised is, the operator stays as it is."""
    quantize_fx = pytest.importorskip("torch.ao.quantization.quantize_fx")
    from torch.ao.quantization import get_default_qconfig_mapping

    net = network(attention, partial(resnet18, fused=fused)).float()
    x = images().float()
    prepared = quantize_fx.prepare_fx(copy.deepcopy(net), get_default_qconfig_mapping(), (x,))
    torch.testing.assert_close(prepared(x), net(x), rtol=1e-4, atol=1e-4)
    quantised = quantize_fx.convert_fx(prepared)
    assert quantised(x).shape == (2, 7)
    assert any("quantized" in type(m).__module__ for m in quantised.modules())


@pytest.mark.parametrize(
    ("module", "kind"), [(DAModule, {}), (SEModule, {"reduction": 2}), (ECAModule, {}),
                         (SGEModule, {"groups": 4}),
                         (FCAModule, {"reduction": 2, "frequencies": "low8", "size": 4})]
)  # fmt: skip
def test_integers_of_numpy(module, kind):
    kind = {k: np.int32(v) if isinstance(v, int) else v for k, v in kind.items()}
    layer = module(np.int64(8), **kind)
    assert layer(torch.randn(2, 8, 4, 4)).shape == (2, 8, 4, 4)
    for wrong in (np.float64(8), np.int64(0), "8"):
        with pytest.raises(ValueError, match=re.escape(f"must be a positive int, got {wrong!r}")):
            module(wrong)


@pytest.fixture(scope="class", params=["resnet18", "resnet50"])
def timm_net(request):
    torch.manual_seed(0)
    return timm.create_model(request.param, num_classes=5, block_args={"attn_layer": DAModule})


def as_timm_traces(model):
    """What timm's own tests make of a network: an extractor of its last node."""
    kwargs = {
        "leaf_modules": list(get_notrace_modules()),
        "autowrap_functions": list(get_notrace_functions()),
    }
    train, evaluate = get_graph_node_names(model, tracer_kwargs=kwargs)
    return create_feature_extractor(
        model,
        train_return_nodes=[train[-1]],
        eval_return_nodes=[evaluate[-1]],
        tracer_kwargs=kwargs,
    )


class TestAsTimmTests:
    """What timm tests of each of its models, here with the layer in every block."""

    def output(self, model):
        with torch.no_grad():
            out = model(torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1)))
        return next(iter(out.values())) if isinstance(out, dict) else out

    def assert_all_gradients(self, model):
        model.zero_grad()
        out = model(torch.randn(2, 3, 64, 64))
        out = next(iter(out.values())) if isinstance(out, dict) else out
        out.mean().backward()
        assert all(p.grad is not None for p in model.parameters())
        assert out.shape == (2, 5) and not torch.isnan(out).any()

    def test_inference(self, timm_net):
        out = self.output(timm_net.eval())
        assert out.shape == (2, 5) and torch.isfinite(out).all()

    def test_forward_at_another_size(self, timm_net):
        assert timm_net.eval()(torch.randn(1, 3, 96, 80)).shape == (1, 5)

    def test_backward(self, timm_net):
        self.assert_all_gradients(timm_net.train())

    def test_default_configuration(self, timm_net):
        """Without a head, without pooling, features before the head."""
        net = copy.deepcopy(timm_net).eval()
        x = torch.randn(1, 3, 64, 64)
        assert net.forward_features(x).shape == (1, net.num_features, 2, 2)
        net.reset_classifier(0)
        assert net(x).shape == (1, net.num_features)
        net.reset_classifier(0, "")
        assert net(x).shape == (1, net.num_features, 2, 2)

    def test_torchscript(self, timm_net):
        net = timm_net.eval()
        torch.testing.assert_close(
            self.output(torch.jit.script(net)), self.output(net), rtol=1e-3, atol=1e-4
        )

    def test_features(self, timm_net):
        net = timm.create_model(
            timm_net.default_cfg["architecture"],
            features_only=True,
            block_args={"attn_layer": DAModule},
        ).eval()
        maps = net(torch.randn(2, 3, 64, 64))
        assert [m.shape[1] for m in maps] == net.feature_info.channels()
        assert [64 // m.shape[2] for m in maps] == net.feature_info.reduction()

    def test_intermediates(self, timm_net):
        net = timm_net.eval()
        x = torch.randn(2, 3, 64, 64)
        last, maps = net.forward_intermediates(x)
        torch.testing.assert_close(last, net.forward_features(x))
        assert len(maps) == len(net.feature_info)

    def test_fx(self, timm_net):
        net = timm_net.eval()
        torch.testing.assert_close(self.output(as_timm_traces(net).eval()), self.output(net))

    def test_fx_backward(self, timm_net):
        self.assert_all_gradients(as_timm_traces(timm_net).train())

    def test_fx_then_torchscript(self, timm_net):
        net = timm_net.eval()
        traced = as_timm_traces(net).eval()
        scripted = torch.jit.script(traced)
        torch.testing.assert_close(self.output(scripted), self.output(net), rtol=1e-3, atol=1e-4)
