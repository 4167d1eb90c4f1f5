"""Networks fused and not, and what tests compare of them."""

from __future__ import annotations

import copy

import torch
from timm.models import resnet as timm_resnet
from torch import nn
from torchvision.models import resnet as tv

from da_ops import DAModule
from da_ops.models import fuse, insert_attention

from .test_insert import NETWORKS, trained

TOLERANCE = 1e-8  # in double precision, through a network


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
