"""timm's residual networks and blocks, with what is fused. Imports timm."""

# Annotations are no strings here: FX copies those of `forward`, and TorchScript reads them.

from typing import Any

import torch
from timm.models import checkpoint_seq
from timm.models import resnet as timm
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from ..residual.functional import rectified, shortcut_of, tail
from ..residual.fusible import own_ways


def _watched(module: nn.Module) -> bool:
    """Whether hooks, or a forward of its own, ask for a call of the module."""
    return own_ways(module) is not None or _has_any_global_hook()


class _Block:
    """Of both blocks: one module after the other, or what is fused."""

    fused = False

    def forward(self: Any, x: Tensor) -> Tensor:
        if torch.jit.is_scripting():
            return self._one_by_one(x)
        else:  # TorchScript compiles code after a return, but not this branch
            # FX, which brings no tensors, is to see every module.
            fused = self.fused and self.drop_path is None and isinstance(x, Tensor)
            return self._fused(x) if fused else self._one_by_one(x)

    def _added(self: Any, out: Tensor, x: Tensor) -> Tensor:
        if self.se is not None:
            out = self.se(out)
        if self.drop_path is not None:
            out = self.drop_path(out)
        return out + (x if self.downsample is None else self.downsample(x))

    def _dropped(self: Any, conv: nn.Module, x: Tensor, norm: nn.Module, act: nn.Module) -> Tensor:
        if type(self.drop_block) is nn.Identity and not _watched(self.drop_block):
            return rectified(conv, x, norm, act)
        return act(self.drop_block(norm(conv(x))))

    def _tail(
        self: Any, conv: nn.Module, out: Tensor, norm: nn.Module, act: nn.Module, x: Tensor
    ) -> Tensor:
        u = conv(out)
        shortcut, its_norm = shortcut_of(self.downsample, x)
        return tail(u, shortcut, norm, self.se, act, made_by=conv, shortcut_norm=its_norm)


class BasicBlock(_Block, timm.BasicBlock):
    """timm's; where it is ``fused``, each norm and ReLU are one operator, with attention and
    addition between them in the last.

    It writes over nothing that a hook may have kept.
    """

    def _one_by_one(self, x: Tensor) -> Tensor:
        out = self.aa(self.act1(self.drop_block(self.bn1(self.conv1(x)))))  # type: ignore[misc]
        return self.act2(self._added(self.bn2(self.conv2(out)), x))

    def _fused(self, x: Tensor) -> Tensor:
        out = self._dropped(self.conv1, x, self.bn1, self.act1)
        out = self.aa(out)  # type: ignore[misc]
        return self._tail(self.conv2, out, self.bn2, self.act2, x)


class Bottleneck(_Block, timm.Bottleneck):
    """timm's, as :class:`BasicBlock` is."""

    def _one_by_one(self, x: Tensor) -> Tensor:
        out = self.act1(self.bn1(self.conv1(x)))
        out = self.aa(self.act2(self.drop_block(self.bn2(self.conv2(out)))))  # type: ignore[misc]
        return self.act3(self._added(self.bn3(self.conv3(out)), x))

    def _fused(self, x: Tensor) -> Tensor:
        out = rectified(self.conv1, x, self.bn1, self.act1)
        out = self._dropped(self.conv2, out, self.bn2, self.act2)
        out = self.aa(out)  # type: ignore[misc]
        return self._tail(self.conv3, out, self.bn3, self.act3, x)


class ResNet(timm.ResNet):
    """timm's; where it is ``fused``, its first norm and activation are one operator."""

    fused = False

    def forward_features(self, x: Tensor) -> Tensor:
        x = self.maxpool(self._stem(x))
        if self.grad_checkpointing and not torch.jit.is_scripting():
            return checkpoint_seq(
                [self.layer1, self.layer2, self.layer3, self.layer4], x, flatten=True
            )
        return self.layer4(self.layer3(self.layer2(self.layer1(x))))  # type: ignore[operator]

    def _stem(self, x: Tensor) -> Tensor:
        if torch.jit.is_scripting():
            return self.act1(self.bn1(self.conv1(x)))
        else:  # see _Block
            if self.fused:
                return rectified(self.conv1, x, self.bn1, self.act1)
            return self.act1(self.bn1(self.conv1(x)))


BLOCKS: dict[type[nn.Module], type[nn.Module]] = {
    timm.BasicBlock: BasicBlock,
    timm.Bottleneck: Bottleneck,
}
NETWORKS: dict[type[nn.Module], type[nn.Module]] = {timm.ResNet: ResNet}
