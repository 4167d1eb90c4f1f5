"""torchvision's residual networks and blocks with what is fused, and where a network has them."""

# Annotations are no strings here: FX copies those of `forward`, and TorchScript reads them.

import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torchvision.models import resnet as tv

from ..residual.functional import rectified, shortcut_of, tail


class _Block:
    """Of both blocks: one module after the other, or what is fused."""

    fused = False

    def forward(self: Any, x: Tensor) -> Tensor:
        if torch.jit.is_scripting():
            return self._one_by_one(x)
        else:  # TorchScript compiles code after a return, but not this branch
            return self._fused(x) if self.fused else self._one_by_one(x)

    def _added(self: Any, out: Tensor, x: Tensor) -> Tensor:
        if self.attention is not None:
            out = self.attention(out)
        # Not in place: a hook may have kept the attention's result.
        return out + (x if self.downsample is None else self.downsample(x))

    def _tail(self: Any, conv: nn.Module, out: Tensor, norm: nn.Module, x: Tensor) -> Tensor:
        u = conv(out)
        shortcut, its_norm = shortcut_of(self.downsample, x)
        return tail(
            u, shortcut, norm, self.attention, self.relu, made_by=conv, shortcut_norm=its_norm
        )


class BasicBlock(_Block, tv.BasicBlock):
    """torchvision's, with ``attention``, which may be None, at the end of the residual branch.

    Where it is ``fused``, each norm and ReLU are one operator, with attention and addition between
    them in the last.
    """

    def _one_by_one(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self._added(self.bn2(self.conv2(out)), x))

    def _fused(self, x: Tensor) -> Tensor:
        out = rectified(self.conv1, x, self.bn1, self.relu)
        return self._tail(self.conv2, out, self.bn2, x)


class Bottleneck(_Block, tv.Bottleneck):
    """torchvision's, as :class:`BasicBlock` is."""

    def _one_by_one(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        return self.relu(self._added(self.bn3(self.conv3(out)), x))

    def _fused(self, x: Tensor) -> Tensor:
        out = rectified(self.conv1, x, self.bn1, self.relu)
        out = rectified(self.conv2, out, self.bn2, self.relu)
        return self._tail(self.conv3, out, self.bn3, x)


class ResNet(tv.ResNet):
    """torchvision's; where it is ``fused``, its first norm and ReLU are one operator."""

    fused = False

    def _forward_impl(self, x: Tensor) -> Tensor:
        x = self.maxpool(self._stem(x))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(torch.flatten(self.avgpool(x), 1))

    def _stem(self, x: Tensor) -> Tensor:
        if torch.jit.is_scripting():
            return self.relu(self.bn1(self.conv1(x)))
        else:  # see _Block
            if self.fused:
                return rectified(self.conv1, x, self.bn1, self.relu)
            return self.relu(self.bn1(self.conv1(x)))


_BLOCKS: dict[type[nn.Module], type[nn.Module]] = {
    tv.BasicBlock: BasicBlock,
    tv.Bottleneck: Bottleneck,
}
_NETWORKS: dict[type[nn.Module], type[nn.Module]] = {tv.ResNet: ResNet}


class Ending(NamedTuple):
    """What a block does after its last convolution, or a network after its first; ``drop_path`` is
    timm's."""

    conv: nn.Conv2d
    norm: Any
    attention: Any
    drop_path: Any
    activation: Any


def tail_of(block: Any) -> Ending:
    last = 3 if hasattr(block, "conv3") else 2
    conv, norm = getattr(block, f"conv{last}"), getattr(block, f"bn{last}")
    if _torchvisions(block):
        return Ending(conv, norm, getattr(block, "attention", None), None, block.relu)
    return Ending(conv, norm, block.se, block.drop_path, getattr(block, f"act{last}"))


def stem_of(network: Any) -> Ending:
    activation = network.act1 if hasattr(network, "act1") else network.relu
    return Ending(network.conv1, network.bn1, None, None, activation)


def residual_blocks(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """torchvision's and timm's, and those that this package made of them, by name."""
    ours = _blocks()
    known = {*ours, *ours.values()}
    # By exact type: a subclass may have a forward of its own.
    return ((name, module) for name, module in model.named_modules() if type(module) in known)


def no_blocks(caller: str, model: nn.Module) -> ValueError:
    """The error of ``caller``, which found no residual blocks in ``model``."""
    found = f"none in {type(model).__name__}"
    derived = [type(m).__name__ for m in model.modules() if isinstance(m, tuple(_blocks()))]
    if derived:
        found += (
            f" but {derived[0]}, a subclass, which may compute something else; call {caller} "
            "before what makes it one, such as fully_shard"
        )
    return ValueError(
        f"{caller}: model must have residual blocks of torchvision or timm (BasicBlock or "
        f"Bottleneck of a ResNet, ResNeXt or Wide-ResNet), found {found}"
    )


def residual_networks(model: nn.Module) -> Iterator[Any]:
    """torchvision's and timm's residual networks, and this package's, in ``model``, which may be
    one."""
    ours = _networks()
    known = {*ours, *ours.values()}
    return (module for module in model.modules() if type(module) in known)


def fused_modules(model: nn.Module) -> list[Any]:
    """Blocks and networks that call operators in place of their modules."""
    blocks = (block for _, block in residual_blocks(model))
    return [m for m in (*blocks, *residual_networks(model)) if getattr(m, "fused", False)]


def own(module: Any) -> None:
    """Give the block or network this package's class, a subclass that differs in forward alone:
    keys, hooks and references live on."""
    ours = _blocks() | _networks()
    module.__class__ = ours.get(type(module), type(module))
    if _torchvisions(module) and not hasattr(module, "attention"):
        module.attention = None


def set_attention(block: Any, layer: nn.Module) -> None:
    """Put ``layer`` at the end of the block's residual branch."""
    if _torchvisions(block):
        own(block)
        block.attention = layer
    else:
        block.se = layer


def _torchvisions(block: Any) -> bool:
    return isinstance(block, tuple(_BLOCKS))


def _blocks() -> dict[type[nn.Module], type[nn.Module]]:
    """This package's block classes, by the class that each extends."""
    timms = _timms()
    return _BLOCKS if timms is None else _BLOCKS | timms.BLOCKS


def _networks() -> dict[type[nn.Module], type[nn.Module]]:
    timms = _timms()
    return _NETWORKS if timms is None else _NETWORKS | timms.NETWORKS


def _timms() -> Any:
    if "timm.models.resnet" not in sys.modules:  # never imported, no block of it
        return None
    from . import timm_blocks

    return timm_blocks
