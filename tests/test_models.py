"""The ResNets."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torchvision
from torch import nn

import hubconf
from da_ops import DAModule, models
from da_ops.models import ATTENTIONS
from da_ops.models.insert import BasicBlock, Bottleneck

ROOT = Path(__file__).resolve().parents[1]
BLOCKS = {"resnet18": 8, "resnet34": 16, "resnet50": 16, "resnet101": 33}


# ------------------------------------------------------------------------------ networks


@pytest.mark.parametrize("attention", [*ATTENTIONS, None])
@pytest.mark.parametrize("name", BLOCKS)
def test_keys_are_torchvisions(name, attention):
    with torch.device("meta"):
        network = getattr(models, name)(attention)
        plain = torchvision.models.get_model(name)
        if attention is not None:
            short = getattr(models, f"{attention}_{name}")()
            assert short.state_dict().keys() == network.state_dict().keys()
    keys = list(network.state_dict())
    assert [key for key in keys if ".attention." not in key] == list(plain.state_dict())
    layers = [m for m in network.modules() if isinstance(m, tuple(ATTENTIONS.values()))]
    assert len(layers) == (BLOCKS[name] if attention else 0)
    assert ("layer4.1.attention.conv.weight" in keys) == (attention in ("da", "eca"))
    assert isinstance(network, torchvision.models.ResNet)


def test_hub_builds_the_networks():
    """As from a repository, of which this is a checkout."""
    entries = {name for name in vars(hubconf) if not name.startswith("_")} - {"dependencies"}
    assert entries == {f"da_{name}" for name in BLOCKS}
    for name in entries:
        assert "num_classes: outputs" in getattr(hubconf, name).__doc__
        options = {"num_classes": 7, "gate": "eca"}
        with torch.device("meta"):
            network = torch.hub.load(str(ROOT), name, source="local", **options)
            ours = getattr(models, name)(**options)
        assert network.fc.out_features == 7
        assert network.state_dict().keys() == ours.state_dict().keys()


@pytest.mark.parametrize("attention", ["da", "se", "sge", "eca", "fca"])
def test_constructors_say_what_they_make(attention):
    for name in BLOCKS:
        constructor = getattr(models, f"{attention}_{name}")
        assert constructor.__name__ == f"{attention}_{name}"
        assert constructor.__doc__.startswith(f":func:`{name}` with attention={attention!r}: ")
        assert "num_classes: outputs" in constructor.__doc__


def test_options_of_the_da_layer():
    network = models.resnet18("da", order="parallel", gate="scalar", backend="eager", num_classes=7)
    layers = [module for module in network.modules() if isinstance(module, DAModule)]
    assert {(m.order, m.gate, m.backend) for m in layers} == {("parallel", "scalar", "eager")}
    assert network(torch.randn(2, 3, 32, 32)).shape == (2, 7)


def test_options_of_torchvision():
    network = models.resnet18(norm_layer=lambda channels: nn.GroupNorm(4, channels))
    assert isinstance(network.layer1[0].bn2, nn.GroupNorm)


@pytest.mark.parametrize("downsample", [False, True])
@pytest.mark.parametrize("block", [BasicBlock, Bottleneck])
def test_attention_is_last_in_the_branch(block, downsample):
    channels = 16 * block.expansion
    shortcut = nn.Conv2d(channels, channels, 1) if downsample else None
    block = block(channels, 16, downsample=shortcut)
    block.attention = DAModule(channels)
    x = torch.randn(2, channels, 5, 4)
    branch = [block.conv1, block.bn1, block.relu, block.conv2, block.bn2]
    if hasattr(block, "conv3"):
        branch += [block.relu, block.conv3, block.bn3]
    y = x
    for module in [*branch, block.attention]:
        y = module(y)
    want = torch.relu(y + (shortcut(x) if downsample else x))
    torch.testing.assert_close(block(x), want)


def test_what_networks_have_in_common_starts_the_same():
    states = []
    for attention in (None, *ATTENTIONS):
        torch.manual_seed(3)
        states.append(models.resnet18(attention, num_classes=5).state_dict())
    for key, tensor in states[0].items():
        assert all(torch.equal(tensor, state[key]) for state in states[1:])


def test_networks_can_be_copied_and_pickled():
    network = models.resnet18(num_classes=3).eval()
    x = torch.randn(1, 3, 32, 32)
    for copied in (copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
        torch.testing.assert_close(copied(x), network(x), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"attention": "cbam"}, "one of 'da', 'se', 'sge', 'eca', 'fca'; got 'cbam'"),
        ({"attention": "se", "order": "parallel"}, "order goes with attention='da'.*leave it out"),
        ({"attention": None, "gate": "eca"}, "gate goes with attention='da', got gate='eca'"),
        ({"attention": "eca", "backend": "eager"}, "backend goes with attention='da'"),
        ({"order": "both"}, "order must be one of"),
        ({"transformer": "layer5"}, "before must name a stage .* 'layer4'; got 'layer5'"),
        ({"gate": "none"}, "gate must be one of"),
        ({"backend": "nope"}, "backend must be 'auto' or one of .* got 'nope'"),
    ],
)
def test_networks_refuse(arguments, message):
    with torch.device("meta"), pytest.raises(ValueError, match=message):
        models.resnet18(**arguments)


# ------------------------------------------------------------------------------ what is not there


def python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_without_torchvision():
    done = python(
        "import sys; sys.modules['torchvision'] = None\n"
        "import da_ops, da_ops.cli\n"
        "try:\n    import da_ops.models\n"
        "except ImportError as error:\n    print(error)\n"
        "print(da_ops.cli.main(['tables']))"
    )
    message = 'pip install "da-ops[models]"'
    said, status = done.stdout.splitlines()
    assert message in said and status == "1"
    assert done.stderr.startswith("da-ops: ") and message in done.stderr


def test_detection_without_torchvision():
    """The command line starts, and what needs torchvision says how to get it."""
    done = python(
        "import sys; sys.modules['torchvision'] = None\n"
        "import importlib, pkgutil, da_ops.cli, da_ops.detection.settings\n"
        "for module in pkgutil.iter_modules(da_ops.detection.__path__, 'da_ops.detection.'):\n"
        "    try:\n        importlib.import_module(module.name)\n"
        "    except ImportError as error:\n        print(error)\n"
        "print(da_ops.cli.main(['train', 'data', '--out', 'run']))\n"
        "da_ops.cli.main(['--help'])"
    )
    *said, status, usage = done.stdout.partition("\n\n")[0].splitlines()
    assert status == "1" and usage.startswith("usage: da-ops"), done.stderr
    assert said and all('pip install "da-ops[detection]"' in text for text in said), said
    assert 'pip install "da-ops[detection]"' in done.stderr


def test_without_timm():
    done = python(
        "import sys, torch; sys.modules['timm'] = None\n"
        "from da_ops.models import resnet18\n"
        "print(resnet18(num_classes=4)(torch.randn(2, 3, 32, 32)).shape)"
    )
    assert done.stdout == "torch.Size([2, 4])\n", done.stderr
