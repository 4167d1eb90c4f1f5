"""Loading weights into the ResNets."""

from __future__ import annotations

import argparse
import logging
import pickle
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file
from torch import nn
from torchvision.models import ResNet18_Weights, ResNet34_Weights

from da_ops import DAModule, models
from da_ops.models import ATTENTIONS


@pytest.fixture(scope="module")
def plain():
    """A state dict of torchvision's ResNet-18 with 5 classes."""
    return torchvision.models.resnet18(num_classes=5).state_dict()


def load(weights, attention="da", num_classes=5):
    return models.resnet18(attention, weights=weights, num_classes=num_classes)


def assert_holds(network, state):
    own = network.state_dict()
    assert all(torch.equal(own[key], tensor) for key, tensor in state.items())


def wrapped(state):
    return {"epoch": 3, "state_dict": {f"module.{key}": t for key, t in state.items()}}


@pytest.mark.parametrize(
    "form", [dict, lambda s: {"model": s}, wrapped], ids=["bare", "model", "wrapped"]
)
def test_checkpoint_of_torchvision(form, plain, tmp_path):
    path = tmp_path / "checkpoint.pth"
    torch.save(form(plain), path)
    for weights in (path, str(path), form(plain)):
        assert_holds(load(weights), plain)
    assert_holds(load(path, attention=None), plain)


def scripted(state):
    """As torchvision's reference scripts and timm's trainer write it."""
    args = argparse.Namespace(
        model="resnet18", lr=0.1, device="cuda", output_dir=Path("runs") / "1"
    )
    args.nested = argparse.Namespace(milestones=[1, 2], amp_dtype=torch.float16)
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(2))], 0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=5)
    return {
        "state_dict": state,
        "optimizer": optimizer.state_dict(),
        "lr_scheduler": schedule.state_dict(),
        "args": args,
        "epoch": 3,
    }


@pytest.mark.parametrize("wrapper", ["state_dict", "model"])
def test_checkpoint_of_a_script_that_keeps_its_arguments(wrapper, plain, tmp_path):
    path = tmp_path / "checkpoint.pth"
    stored = scripted(plain)
    stored[wrapper] = stored.pop("state_dict")
    torch.save(stored, path)
    assert_holds(load(path), plain)
    with pytest.raises(pickle.UnpicklingError, match="Namespace"):  # still so for others
        torch.load(path, weights_only=True)


def averaged(network):
    return torch.optim.swa_utils.AveragedModel(network)


def parallel(network):
    with torch.device("meta"):
        return nn.DataParallel(network)


def partly_compiled(network):
    network.layer1 = torch.compile(network.layer1)
    network.layer2[0] = torch.compile(network.layer2[0])
    return network


@pytest.mark.parametrize(
    ("wrappers", "said"),
    [
        ([torch.compile], "'_orig_mod.'"),
        ([parallel], "'module.'"),
        ([averaged], "'module.'"),
        ([torch.compile, parallel], "'_orig_mod.' and 'module.'"),
        ([parallel, torch.compile], "'_orig_mod.' and 'module.'"),
        ([parallel, torch.compile, parallel, torch.compile], "'_orig_mod.' and 'module.'"),
        ([partly_compiled, parallel], "'_orig_mod.' and 'module.'"),
        ([torch.compile, averaged, torch.compile], "'_orig_mod.' and 'module.'"),
    ],
)
@pytest.mark.parametrize("attention", [None, "da"])
def test_prefixes_of_wrappers_are_taken_off_and_said(attention, wrappers, said, tmp_path, caplog):
    network = models.resnet18(attention, num_classes=5)
    expected = {key: tensor.clone() for key, tensor in network.state_dict().items()}
    for wrap in wrappers:
        network = wrap(network)
    assert not set(network.state_dict()) <= set(expected)
    path = tmp_path / "checkpoint.pth"
    torch.save({"model": network.state_dict()}, path)
    with caplog.at_level(logging.INFO, "da_ops"):
        assert_holds(load(path, attention), expected)
    (record,) = caplog.records
    assert record.getMessage() == f"da_ops: {path}: {said} taken off the keys"


def test_keys_that_only_look_like_prefixes_stay(plain):
    with pytest.raises(ValueError, match=r"unexpected: module.conv1.weight$"):
        load({**plain, "module.conv1.weight": plain["conv1.weight"]})
    with pytest.raises(ValueError, match=r"unexpected: n_averaged$"):
        load({**plain, "n_averaged": torch.tensor(3)})


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_missing_attention_is_said_once(attention, plain, caplog):
    with caplog.at_level(logging.WARNING, "da_ops"):
        network = load(plain, attention)
    (record,) = caplog.records
    fresh = len(network.state_dict()) - len(plain)
    assert record.getMessage() == (
        f"da_ops: resnet18: the given state dict has no attention, its {fresh} parameters keep "
        "their initial values"
    )


def test_checkpoint_of_timm(tmp_path):
    state = timm.create_model("resnet18", num_classes=5, zero_init_last=False).state_dict()
    save_file(state, tmp_path / "model.safetensors")
    assert_holds(load(tmp_path / "model.safetensors"), state)


def test_checkpoint_of_our_own(caplog):
    network = models.resnet18(num_classes=5)
    for module in network.modules():
        if isinstance(module, DAModule):
            nn.init.normal_(module.gate_weight)
    with caplog.at_level(logging.WARNING, "da_ops"):
        assert_holds(load(network.state_dict()), network.state_dict())
    assert not caplog.records


def test_old_checkpoints_do_not_count_batches(plain):
    old = {key: t for key, t in plain.items() if not key.endswith("num_batches_tracked")}
    assert_holds(load(old), old)


@pytest.mark.parametrize(
    "weights",
    [ResNet18_Weights.IMAGENET1K_V1, "IMAGENET1K_V1", "DEFAULT", "ResNet18_Weights.DEFAULT"],
)
def test_weights_of_torchvision(weights, tmp_path, monkeypatch):
    """As they lie in torch.hub's folder once they have been downloaded."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    state = torchvision.models.resnet18().state_dict()
    name = ResNet18_Weights.DEFAULT.url.rpartition("/")[2]
    (tmp_path / "hub/checkpoints").mkdir(parents=True)
    torch.save(state, tmp_path / "hub/checkpoints" / name)
    assert_holds(load(weights, num_classes=1000), state)


def without(state, *keys):
    return {key: tensor for key, tensor in state.items() if key not in keys}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: without(s, "bn1.weight"), r"does not fit, missing: bn1.weight$"),
        (lambda s: without(s, "fc.weight", "fc.bias"), r"missing: fc.weight, fc.bias$"),
        (lambda s: s | {"extra": torch.ones(1)}, r"unexpected: extra$"),
        (lambda s: s | {"layer1.0.se.fc1.weight": torch.ones(1)}, "unexpected: layer1.0.se.fc1"),
        (
            lambda s: s | {"layer1.0.attention.gate_weight": torch.zeros(64)},
            r"missing: layer1.0.attention.gate_bias, .* and 33 more$",
        ),
        (lambda s: s | {"bn1.bias": torch.ones(3)}, r"bn1.bias is \[3\] and should be \[64\]$"),
        (
            lambda s: s | {"fc.weight": torch.ones(9, 512), "fc.bias": torch.ones(9)},
            r"fc.weight is \[9, 512\].*; for another head, load with num_classes=9 and replace fc",
        ),
        (lambda s: {"net": s}, r"expected a state dict of tensors.* got a mapping of net$"),
        (lambda s: {}, "missing: conv1.weight"),
    ],
)
def test_other_differences_are_refused(change, message, plain):
    with pytest.raises(ValueError, match=message):
        load(change(plain))


def test_files_that_are_no_checkpoints(tmp_path):
    path = tmp_path / "model.pth"
    with pytest.raises(
        FileNotFoundError, match=r"IMAGENET1K_V1, DEFAULT or a file, got .*model.pth"
    ):
        load(path)
    with pytest.raises(FileNotFoundError, match="or a file, got '', which is neither"):
        load("")
    for content, message in (
        ("", "it is empty"),
        ("epoch 1\n", "it is text"),
        ("<!DOCTYPE html>\n<title>Sign in</title>", "it is text, perhaps a web page"),
        ("version https://git-lfs.github.com/spec/v1\noid sha256:0", "it is Git LFS's pointer"),
        ("GIF89a\0\1\0\1", "its bytes are not what torch.save writes of tensors and plain data"),
    ):
        for name in ("model.pth", "model.safetensors"):
            (tmp_path / name).write_text(content)
            if name == "model.safetensors" and "\0" in content:
                message = "Error while deserializing header"  # its own words will do
            with pytest.raises(ValueError, match=f"got a file that cannot be.* one: {message}"):
                load(tmp_path / name)
    torch.save([1, 2], path)
    with pytest.raises(ValueError, match=r"model.pth: expected a state dict of tensors.*a list"):
        load(path)
    torch.save({"model": nn.Linear(1, 1)}, path)  # reading it would run code
    with pytest.raises(ValueError, match=r"model.pth: .* torch.nn.modules.linear.Linear, .* could"):
        load(path)
    torch.save({"model": {1: torch.ones(1)}}, path)
    with pytest.raises(ValueError, match=r"model.pth: expected a state dict of tensors"):
        load(path)


def test_weights_of_another_network():
    with pytest.raises(ValueError, match="weights must be one of ResNet18_Weights, got ResNet34"):
        load(ResNet34_Weights.DEFAULT)
    with pytest.raises(TypeError, match=r"weights must be None, .* got int"):
        load(3)
