"""What a network costs, by four rules.

The paper's tables were made with torchstat 0.0.7, and two rows of each backbone in Table III with
PytorchInsight's copy of ptflops. Both look at modules, not at operations, and so miss what a
network computes without one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ..models import ECAModule, SEModule, SGEModule
from ..models.blocks import fused_modules
from ..module import DAModule
from ..residual.module import DAResidual

_POOLING = (nn.AdaptiveAvgPool2d, SEModule, SGEModule, ECAModule)
_ELEMENTWISE = (nn.MaxPool2d, nn.AvgPool2d, nn.ReLU)
_COUNTED = (nn.Conv2d, nn.Linear, nn.BatchNorm2d, DAModule, *_POOLING, *_ELEMENTWISE)


@dataclass(frozen=True)
class Cost:
    """Of one forward pass in evaluation mode.

    Attributes:
        params: all parameters.
        params_torchstat: those held directly by modules without children. A module with children
            may hold others: torchstat does not see ``gate_weight`` and ``gate_bias`` of DA.
        macs_torchstat: multiply-accumulates of ``Conv2d`` and ``Linear``, 2 per element of an
            affine ``BatchNorm2d`` (else 1), and the input elements of max and average pooling and
            of ReLU; nothing else, so ``Conv1d``, adaptive pooling, sigmoid and products are free.
            A module called several times counts once, with its last call: so does the ReLU that
            the convolutions of a residual block share.
        macs_insight: the same, but every call counts, and so do the input elements of adaptive
            pooling, among them the global pooling of an attention layer (SE, SGE, ECA, FCA, DA).
            Under every rule, the products that FCA pools with and the sampling of a spatial
            transformer are free.
        macs_torch: half of what ``torch.utils.flop_counter`` counts, which has 2 FLOPs per
            multiply-accumulate of convolutions and matrix products and nothing else.

    Under each rule the DA layer counts 9 + 9 + 2 multiply-accumulates per position (and one for
    each bias, except in ``macs_torch``), though a fused kernel calls no convolution.
    """

    params: int
    params_torchstat: int
    macs_torchstat: int
    macs_insight: int
    macs_torch: int


@torch.no_grad()
def count(model: nn.Module, x: Tensor) -> Cost:
    """The cost of ``model(x)``. With fake or meta tensors nothing is computed.

    Raises:
        ValueError: ``model`` is in training mode.
    """
    if model.training:
        raise ValueError("count: model must be in evaluation mode, call model.eval() first")
    last: dict[nn.Module, int] = {}
    every: list[int] = []

    def note(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        last[module] = _macs(module, inputs[0], output)
        every.append(last[module] + _pooled(module, inputs[0]))

    # Counted by their modules, which they would call if these had hooks, and say so.
    owners = [*fused_modules(model), *(m for m in model.modules() if isinstance(m, DAResidual))]
    fused = [m for m in model.modules() if isinstance(m, DAModule) and m.unfused() is None]
    # Counted with their layer, which would call them if they had hooks.
    replaced = {convolution for layer in fused for convolution in layer.children()}
    counted = [m for m in model.modules() if isinstance(m, _COUNTED) and m not in replaced]
    handles = [module.register_forward_hook(note) for module in counted]
    try:
        for owner in owners:
            owner.fused = False
        with FlopCounterMode(display=False) as flops:
            model(x)
    finally:
        for owner in owners:
            owner.fused = True
        for handle in handles:
            handle.remove()
    leaves = [module for module in model.modules() if not list(module.children())]
    return Cost(
        params=sum(p.numel() for p in model.parameters()),
        params_torchstat=sum(p.numel() for leaf in leaves for p in leaf.parameters()),
        macs_torchstat=sum(last.values()),
        macs_insight=sum(every),
        macs_torch=flops.get_total_flops() // 2,
    )


def _macs(module: Any, x: Tensor, y: Tensor) -> int:
    match module:
        case nn.Conv2d():
            return _convolution(module, y.numel())
        case nn.Linear():
            return x.numel() * module.out_features
        case nn.BatchNorm2d():
            return x.numel() * (2 if module.affine else 1)
        case DAModule() if module.unfused() is None:
            positions = x.numel() // x.shape[1]
            return sum(_convolution(conv, positions) for conv in module.children())
    return x.numel() if isinstance(module, _ELEMENTWISE) else 0


def _convolution(conv: Any, outputs: int) -> int:
    return outputs * (conv.weight[0].numel() + (conv.bias is not None))


def _pooled(module: nn.Module, x: Tensor) -> int:
    with_channels = isinstance(module, DAModule) and module.order != "spatial"
    return x.numel() if with_channels or isinstance(module, _POOLING) else 0
