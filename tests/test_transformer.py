"""The spatial transformer, and its place in front of a stage."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import timm
import torch
import torchvision
from torch import fx, nn
from torchvision.models import resnet as tv
from torchvision.models.feature_extraction import create_feature_extractor

from da_ops.detection.checkpoint import build_model
from da_ops.detection.settings import Settings
from da_ops.models import STNModule, insert_attention, insert_transformer, resnet18
from da_ops.models.ssd import ssd

from .cases import LAYOUTS

SMALL = [1, 1, 1, 1]  # blocks in each stage


def turned(dtype=torch.float64, channels=6, much=0.3):
    """One that has learned to move what it sees, each image otherwise."""
    layer = STNModule(channels, dtype=dtype)
    nn.init.normal_(layer.fc2.weight, std=much)
    nn.init.normal_(layer.fc2.bias, std=much)
    return layer


def results(layer, x, dy):
    x = x.clone().requires_grad_()
    y = layer(x)
    return [y, *torch.autograd.grad(y, [x, *layer.parameters()], dy)]


def data(*shape, dtype=torch.float64):
    return torch.randn(shape, dtype=dtype), torch.randn(shape, dtype=dtype)


def part_means(x):
    """Of 4 x 4 equal parts: over 4 H x 4 W cells, into which every pixel falls apart evenly."""
    n, c, h, w = x.shape
    fine = x.repeat_interleave(4, 2).repeat_interleave(4, 3)
    return fine.reshape(n, c, 4, h, 4, w).mean((3, 5))


def sampled(image, matrix):
    """Pixel by pixel: where the centre of each comes from, and its four neighbours there."""
    _, h, w = image.shape
    rows = []
    for i in range(h):
        row = []
        for j in range(w):
            centre = image.new_tensor([(2 * j + 1) / w - 1, (2 * i + 1) / h - 1, 1.0])
            x, y = matrix @ centre
            x, y = ((x + 1) * w - 1) / 2, ((y + 1) * h - 1) / 2
            value = torch.zeros(len(image), dtype=image.dtype)
            left, top = math.floor(x.item()), math.floor(y.item())
            for q, p in ((top, left), (top, left + 1), (top + 1, left), (top + 1, left + 1)):
                if 0 <= q < h and 0 <= p < w:
                    value = value + image[:, q, p] * (1 - (x - p).abs()) * (1 - (y - q).abs())
            row.append(value)
        rows.append(torch.stack(row, -1))
    return torch.stack(rows, -2)


@pytest.mark.parametrize("shape", [(5, 7), (3, 9), (1, 1), (8, 8)])
def test_it_is_its_papers_formula(shape):
    layer = turned()
    x, dy = data(2, 6, *shape)

    def formula(x):
        seen = x
        for conv in (layer.conv1, layer.conv2):
            seen = torch.relu(
                nn.functional.conv2d(seen, conv.weight, conv.bias, stride=2, padding=1)
            )
        hidden = torch.relu(part_means(seen).flatten(1) @ layer.fc1.weight.T + layer.fc1.bias)
        theta = (hidden @ layer.fc2.weight.T + layer.fc2.bias).reshape(-1, 2, 3)
        theta = theta + torch.tensor([[1.0, 0, 0], [0, 1, 0]]).double()
        return torch.stack([sampled(image, matrix) for image, matrix in zip(x, theta)])

    formula.parameters = layer.parameters
    torch.testing.assert_close(results(layer, x, dy), results(formula, x, dy))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_it_changes_nothing_at_first(dtype, layout):
    layer = STNModule(6, dtype=dtype)
    x = torch.randn(2, 6, 19, 30, dtype=dtype).contiguous(memory_format=LAYOUTS[layout])
    y = layer(x)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-4}.get(dtype, 1e-2)
    torch.testing.assert_close(y, x, rtol=tolerance, atol=tolerance)
    assert y.is_contiguous(memory_format=LAYOUTS[layout])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtype_and_layout_are_kept(dtype, layout):
    layer = turned(dtype)
    x, dy = (t.contiguous(memory_format=LAYOUTS[layout]) for t in data(2, 6, 9, 8, dtype=dtype))
    y, *gradients = results(layer, x, dy)
    assert y.is_contiguous(memory_format=LAYOUTS[layout])
    assert all(t.dtype == dtype for t in (y, *gradients))


def test_half_precision_with_float32_parameters():
    layer, half = turned(torch.float32, much=0.1), torch.randn(2, 6, 9, 8, dtype=torch.bfloat16)
    want = layer(half.float())
    plain = layer(half)
    with torch.autocast("cpu", torch.bfloat16):
        autocast = layer(half)
    for got in (plain, autocast):
        assert got.dtype == torch.bfloat16
        torch.testing.assert_close(got.float(), want, rtol=0.1, atol=0.1)


def test_no_images():
    layer, x = STNModule(6), torch.randn(0, 6, 5, 4, requires_grad=True)
    layer(x).sum().backward()
    assert layer(x).shape == x.grad.shape == x.shape


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("scripted", [False, True])
@pytest.mark.parametrize("traced", [False, True])
def test_traced_and_scripted(traced, scripted):
    layer, (x, dy) = turned(), data(2, 6, 9, 8)
    got = fx.symbolic_trace(layer) if traced else layer
    got = torch.jit.script(got) if scripted else got
    want = dict(zip(["y", "x", *(n for n, _ in layer.named_parameters())], results(layer, x, dy)))
    found = dict(zip(["y", "x", *(n for n, _ in got.named_parameters())], results(got, x, dy)))
    torch.testing.assert_close(found, want)


def test_one_graph_for_any_size():
    torch._dynamo.reset()
    layer = turned()
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    compiled.parameters = layer.parameters
    for shape in ((2, 6, 14, 21), (3, 6, 9, 16)):
        x, dy = data(*shape)
        torch.testing.assert_close(results(compiled, x, dy), results(layer, x, dy))
    torch._dynamo.reset()


def test_onnx():
    """Standard operators only, for any size."""
    onnxruntime = pytest.importorskip("onnxruntime")
    layer, x = turned(torch.float32).eval(), torch.randn(2, 6, 16, 32)
    sizes = {0: "n", 2: "h", 3: "w"}
    program = torch.onnx.export(layer, (x,), dynamo=True, dynamic_shapes=(sizes,), verbose=False)
    assert {node.domain for node in program.model_proto.graph.node} == {""}
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString())
    for other in (x, torch.randn(3, 6, 33, 15)):
        (y,) = session.run(None, {session.get_inputs()[0].name: other.numpy()})
        torch.testing.assert_close(torch.from_numpy(y), layer(other).detach(), rtol=1e-3, atol=1e-3)


# ------------------------------------------------------------------------------ in networks

NETWORKS = {
    "basic": lambda: tv.ResNet(tv.BasicBlock, SMALL, num_classes=5),
    "bottleneck": lambda: tv.ResNet(tv.Bottleneck, SMALL, num_classes=5),
    "with attention": lambda: insert_attention(tv.ResNet(tv.BasicBlock, SMALL, 5)),
    "timm": lambda: timm.create_model("resnet10t", num_classes=5),
}


@pytest.mark.parametrize("stage", ["layer1", "layer2", "layer3", "layer4"])
@pytest.mark.parametrize("name", NETWORKS)
def test_the_function_is_preserved_and_keys_are(name, stage):
    network = NETWORKS[name]().double().eval()
    before, x = list(network.state_dict()), torch.randn(2, 3, 50, 64, dtype=torch.float64)
    want = network(x)
    assert insert_transformer(network, before=stage) is network
    torch.testing.assert_close(network(x), want, rtol=1e-9, atol=1e-9)
    new = [key for key in network.state_dict() if key not in before]
    assert [key for key in network.state_dict() if key in before] == before
    assert {key.rpartition(".")[0] for key in new} == {
        f"{stage}.transformer.{part}" for part in ("conv1", "conv2", "fc1", "fc2")
    }
    layer = network.get_submodule(f"{stage}.transformer")
    assert not layer.training and layer.conv1.weight.dtype == torch.float64
    seen = []
    layer.register_forward_hook(lambda *call: seen.append(call))
    network(x)
    assert len(seen) == 1 and seen[0][1][0].shape == seen[0][2].shape
    for copied in (copy.deepcopy(network), pickle.loads(pickle.dumps(insert(name)))):
        assert copied.get_submodule("layer2") is not None


def insert(name):
    return insert_transformer(NETWORKS[name](), before="layer2")


def test_it_learns_all_of_it():
    """What comes before the last layer from the second step on, for that starts at 0."""
    network, x = insert("basic"), torch.randn(4, 3, 64, 64)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(x), torch.tensor([0, 1, 2, 3])).backward()
        optimizer.step()
    parameters = network.layer2.transformer.named_parameters()
    assert not [name for name, p in parameters if not p.grad.count_nonzero()]


def test_decay_alone_leaves_the_identity():
    layer, (x, _) = turned(), data(2, 6, 9, 8)
    with torch.no_grad():
        for p in layer.parameters():
            p.zero_()
    torch.testing.assert_close(layer(x), x)


def test_what_is_around_a_network():
    network, x = insert("basic").eval(), torch.randn(2, 3, 64, 64)
    nn.init.normal_(network.layer2.transformer.fc2.weight, std=0.1)
    want = network(x)
    features = create_feature_extractor(network, ["layer2", "fc"])(x)
    torch.testing.assert_close(features["fc"], want)
    assert features["layer2"].shape == (2, 128, 8, 8)
    for copied in (copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
        assert torch.equal(copied(x), want)
    fused = insert_transformer(insert_attention(NETWORKS["basic"](), fused=True), "layer3").eval()
    assert fused(x).shape == (2, 5)


def test_a_resnet_with_one(caplog):
    torch.manual_seed(3)
    plain = resnet18(None, num_classes=5)
    torch.manual_seed(3)
    network = resnet18("se", transformer="layer2", num_classes=5)
    state = network.state_dict()
    assert all(torch.equal(state[key], value) for key, value in plain.state_dict().items())
    loaded = resnet18("se", transformer="layer2", num_classes=5, weights=plain.state_dict())
    told = [record.getMessage() for record in caplog.records]
    new = len([key for key in state if ".transformer." in key])
    assert len(told) == 2 and f"has no transformer, its {new} parameters keep" in told[1]
    again = resnet18("se", transformer="layer2", num_classes=5, weights=loaded.state_dict())
    for key, value in again.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[key])
    assert len(caplog.records) == 2
    part = {key: t for key, t in state.items() if "transformer.fc2" not in key}
    with pytest.raises(ValueError, match=r"missing: layer2\.transformer\.fc2\.weight"):
        resnet18("se", transformer="layer2", num_classes=5, weights=part)


@pytest.mark.parametrize("mapping", ["c4", "c3c4c5"])
def test_a_detector_with_one(mapping):
    settings = Settings("resnet18", "none", "layer3", size=64, mapping=mapping)
    model = build_model(settings, ["a", "b"])
    transformer = model.backbone.body["layer3"].transformer
    assert transformer.conv1.stride == (2, 2)
    x = torch.rand(3, 64, 64)
    plain = build_model(Settings("resnet18", "none", size=64, mapping=mapping), ["a", "b"])
    features, want = (m.eval().backbone(x[None]) for m in (model, plain))
    torch.testing.assert_close(dict(features), dict(want), rtol=1e-3, atol=1e-3)
    target = {"boxes": torch.tensor([[4.0, 4, 40, 40]]), "labels": torch.tensor([1])}
    sum(model.train()([x, x], [target, target]).values()).backward()
    assert transformer.fc2.weight.grad.count_nonzero()


def test_a_stage_that_a_detector_cuts_off():
    with pytest.raises(ValueError, match=r"layer1, layer2, layer3 with mapping='c4'.*got 'layer4'"):
        ssd("resnet18", None, transformer="layer4", size=64)


@pytest.mark.parametrize(
    ("network", "before", "message"),
    [
        (lambda: nn.Conv2d(1, 1, 1), "layer2", r"in Conv2d, of which there is none; got 'layer2'"),
        (
            NETWORKS["basic"],
            "layer5",
            "one of 'layer1', .* 'layer4'; got 'layer5'",
        ),
        (NETWORKS["basic"], "layer2.0", "got 'layer2.0'"),
        (NETWORKS["basic"], "layer2.0.downsample", "got 'layer2.0.downsample'"),
        (lambda: insert("basic"), "layer2", "layer2 has a transformer already"),
    ],
)
def test_a_refusal_leaves_the_network_as_it_was(network, before, message):
    network = network()
    keys = list(network.state_dict())
    with pytest.raises(ValueError, match=f"^insert_transformer: .*{message}"):
        insert_transformer(network, before=before)
    assert list(network.state_dict()) == keys


def test_channels():
    with pytest.raises(ValueError, match="STNModule: channels must be a positive int, got 0"):
        STNModule(0)
    with torch.device("meta"):  # of a detector, too
        network = torchvision.models.detection.retinanet_resnet50_fpn(
            weights=None, weights_backbone=None
        )
        insert_transformer(network, before="backbone.body.layer2")
    assert network.backbone.body["layer2"].transformer.conv1.weight.shape == (32, 256, 3, 3)
