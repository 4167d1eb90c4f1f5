"""timm's residual blocks with a tail that may be one operator. Imports timm."""

# Annotations are no strings here: FX copies those of `forward`, and TorchScript reads them.

from typing import Any

import torch
from timm.models import resnet as timm
from torch import Tensor, nn

from ..residual.functional import tail


class _Added:
    """Of both blocks: the branch with attention, and the shortcut."""

    fused = False

    def _added(self: Any, out: Tensor, x: Tensor) -> Tensor:
        if self.se is not None:
            out = self.se(out)
        if self.drop_path is not None:
            out = self.drop_path(out)
        return out + (x if self.downsample is None else self.downsample(x))


class BasicBlock(_Added, timm.BasicBlock):
    """timm's; where it is ``fused``, the last norm, attention, addition and ReLU are one operator.

    It writes over nothing that a hook may have kept.
    """

    def forward(self, x: Tensor) -> Tensor:
        out = self.aa(self.act1(self.drop_block(self.bn1(self.conv1(x)))))  # type: ignore[misc]
        u = self.conv2(out)
        if torch.jit.is_scripting():
            return self.act2(self._added(self.bn2(u), x))
        else:  # TorchScript compiles code after a return, but not this branch
            if not self.fused or self.drop_path is not None:
                return self.act2(self._added(self.bn2(u), x))
            shortcut = x if self.downsample is None else self.downsample(x)
            return tail(u, shortcut, self.bn2, self.se, self.act2)


class Bottleneck(_Added, timm.Bottleneck):
    """timm's, as :class:`BasicBlock` is."""

    def forward(self, x: Tensor) -> Tensor:
        out = self.act1(self.bn1(self.conv1(x)))
        out = self.aa(self.act2(self.drop_block(self.bn2(self.conv2(out)))))  # type: ignore[misc]
        u = self.conv3(out)
        if torch.jit.is_scripting():
            return self.act3(self._added(self.bn3(u), x))
        else:  # TorchScript compiles code after a return, but not this branch
            if not self.fused or self.drop_path is not None:
                return self.act3(self._added(self.bn3(u), x))
            shortcut = x if self.downsample is None else self.downsample(x)
            return tail(u, shortcut, self.bn3, self.se, self.act3)


OURS: dict[type[nn.Module], type[nn.Module]] = {
    timm.BasicBlock: BasicBlock,
    timm.Bottleneck: Bottleneck,
}
