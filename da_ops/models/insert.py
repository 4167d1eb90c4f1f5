"""Attention in the residual blocks of a network that exists."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.ops import FrozenBatchNorm2d

from ..module import DAModule
from .attention import ECAModule, SEModule, SGEModule, make_attention
from .blocks import BasicBlock, Bottleneck, no_blocks, residual_blocks, set_attention, tail_of
from .fuse import check_fusible, fuse

__all__ = ["BasicBlock", "Bottleneck", "insert_attention"]  # networks were pickled with the blocks


def insert_attention(
    model: nn.Module,
    attention: str = "da",
    *,
    preserve_function: bool = False,
    fused: bool = False,
    **options: Any,
) -> nn.Module:
    """Put an attention layer into every residual block of ``model``, in place.

    The layer comes after the last normalisation of the residual branch, before the addition, with
    the device and dtype of that block. State-dict keys of the network stay as they are. New ones
    are ``layer1.0.attention.*`` in torchvision's blocks, ``layer1.0.se.*`` in timm's, which have
    that slot for attention. An optimizer made before does not know the new parameters. A hook that
    keeps what the layer gives must copy it in timm's blocks, which add the shortcut to it in place.

    Args:
        model: any network with torchvision's or timm's ``BasicBlock`` or ``Bottleneck``: ResNet,
            ResNeXt, Wide-ResNet, or a detector over one.
        attention: ``"da"``, ``"se"``, ``"sge"``, ``"eca"`` or ``"fca"``.
        preserve_function: start with constant masks and divide weight and bias of the normalisation
            before them by their product, so that the output of ``model`` stays what it was, in
            training and evaluation, to rounding. DA then starts with ``merge`` and an "eca" gate at
            0, SE and FCA with ``fc2``, ECA with ``conv``, SGE with ``weight``. Layers before a
            weight at 0 get their first gradient after a step has moved that weight; so it is, too,
            with the last norms of a network that starts its branches at 0.
        fused: :func:`fuse` the blocks too, which goes with DA.
        options: keyword arguments of the layer, such as ``order``, ``gate`` and ``backend`` of
            :class:`da_ops.DAModule`.

    Returns:
        ``model``.

    Raises:
        ValueError: ``model`` has no such block, one of them has attention already, an option does
            not go with ``attention``, or the function cannot be preserved. ``model`` is unchanged.
    """
    check_fusible(fused, attention, "insert_attention")
    blocks = list(residual_blocks(model))
    if not blocks:
        raise no_blocks("insert_attention", model)
    layers, factors, users = [], [], _users(model)
    for name, block in blocks:  # everything that can fail comes before the first change
        conv, norm, present, *_ = tail_of(block)
        if present is not None:
            raise ValueError(
                f"insert_attention: {name} has attention already, {type(present).__name__}; pass a "
                "network without"
            )
        layer = make_attention(
            attention,
            conv.out_channels,
            device=conv.weight.device,
            dtype=conv.weight.dtype,
            **options,
        )
        layer.train(block.training)
        layers.append(layer)
        if preserve_function:
            _check_foldable(norm, name, users)
            factors.append(_make_constant(layer))

    for (_, block), layer in zip(blocks, layers):
        set_attention(block, layer)
    for (_, block), factor in zip(blocks, factors):
        norm = tail_of(block).norm
        with torch.no_grad():
            norm.weight.div_(factor)
            norm.bias.div_(factor)
    return fuse(model) if fused else model


def _users(model: nn.Module) -> Counter[int]:
    """How many modules have a module or parameter, by its id, as their own."""
    users: Counter[int] = Counter()
    for module in model.modules():
        users.update(map(id, (*module._modules.values(), *module._parameters.values())))
    return users


def _check_foldable(norm: nn.Module, block: str, users: Counter[int]) -> None:
    known = isinstance(norm, (_BatchNorm, nn.GroupNorm, FrozenBatchNorm2d))
    # One with children, as timm's with an activation, need not be linear in weight and bias.
    linear = known and not list(norm.children())
    if not linear or norm.weight is None or norm.bias is None:
        raise ValueError(
            "insert_attention: preserve_function=True needs a batch or group normalisation with "
            f"weight and bias at the end of each residual branch, got {norm} in {block}; use "
            "preserve_function=False"
        )
    if any(users[id(part)] > 1 for part in (norm, norm.weight, norm.bias)):
        raise ValueError(
            "insert_attention: preserve_function=True needs a normalisation of its own at the end "
            f"of each residual branch, got one in {block} that is shared; use "
            "preserve_function=False"
        )


@torch.no_grad()
def _make_constant(layer: nn.Module) -> float:
    """Set the layer to multiply by a constant, which is returned."""
    half, one = 0.5, 1 / (1 + math.exp(-1))  # sigmoid of 0 and of 1
    match layer:
        case DAModule():
            return _make_da_constant(layer, half, one)
        case SEModule():  # FCAModule, too
            layer.fc2.weight.zero_()
            return half
        case ECAModule():
            layer.conv.weight.zero_()
            return half
        case SGEModule():
            layer.weight.zero_()
            layer.bias.fill_(1)
            return one
    raise AssertionError(f"no constant start known for {type(layer).__name__}")


def _make_da_constant(layer: DAModule, half: float, one: float) -> float:
    factor = 1.0
    if layer.merge is not None:
        for p in layer.merge.parameters():
            p.zero_()
        factor *= half
    if layer.order == "spatial":
        return factor
    if layer.gate_weight is None:
        raise ValueError(
            f"insert_attention: preserve_function=True needs a channel mask that can be constant, "
            f"gate={layer.gate!r} has no parameters; use gate='affine', 'scalar' or 'eca'"
        )
    layer.gate_weight.zero_()
    if layer.gate_bias is None:
        return factor * half
    layer.gate_bias.fill_(1)
    return factor * one
