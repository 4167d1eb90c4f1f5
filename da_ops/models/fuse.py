"""The tails of residual blocks, and a network's other norms with a ReLU, as one operator each."""

from __future__ import annotations

import logging
from collections import defaultdict

from torch import nn

from ..residual import fusible
from .blocks import (
    Ending,
    fused_modules,
    no_blocks,
    own,
    residual_blocks,
    residual_networks,
    stem_of,
    tail_of,
)

logger = logging.getLogger("da_ops")

FUSIBLE = ("da", None)  # attentions


def fuse(model: nn.Module) -> nn.Module:
    """Compute the tail of every residual block of ``model`` as one operator, in place.

    The last norm of a block, DA if it is there, the addition and the ReLU become a call of
    :func:`da_ops.residual_attention`, with the norm that ends a plain ``nn.Sequential`` in the
    shortcut, and so do the norms and ReLUs before, and the stem's of a whole ResNet: the same
    result to rounding, with fewer passes over memory. On a CPU, without gradients, it is written
    over what the convolution made, if that has no hooks and no ``TorchFunctionMode`` or
    ``TorchDispatchMode`` looks on. Modules, parameters, state-dict keys, hooks and references stay
    as they are. While one of these modules has hooks, and under FX, TorchScript, tracing and
    export, a block calls them one by one.

    A block stays as it is, and a warning of the logger ``da_ops`` says why, where its last norm is
    no ``nn.BatchNorm2d`` or ``FrozenBatchNorm2d``, its activation no ``nn.ReLU``, its attention
    another than DA, or it drops paths; :func:`unfused_blocks` tells which. Fusing once more changes
    nothing.

    Args:
        model: any network with torchvision's or timm's ``BasicBlock`` or ``Bottleneck``: ResNet,
            ResNeXt, Wide-ResNet, or a detector over one; with DA or without attention.

    Returns:
        ``model``.

    Raises:
        ValueError: ``model`` has no such block.
    """
    blocks = list(residual_blocks(model))
    if not blocks:
        raise no_blocks("fuse", model)
    left = defaultdict(list)
    for name, block in blocks:
        if (reason := _unfit(tail_of(block))) is not None:
            left[reason].append(name)
        else:
            own(block)
            block.fused = True
    for network in residual_networks(model):
        if fused_modules(network) and _unfit(stem_of(network)) is None:
            own(network)
            network.fused = True
    for reason, names in left.items():
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        logger.warning("da_ops: fuse: %s%s not fused: %s", names[0] or "the block", more, reason)
    return model


def unfused_blocks(model: nn.Module) -> dict[str, str]:
    """Why residual blocks of ``model`` call the modules of their tail one by one: reasons by name;
    empty where :func:`fuse` has fused all, and nothing has come between since."""
    reasons = {}
    for name, block in residual_blocks(model):
        tail = tail_of(block)
        reason = _unfit(tail)
        if reason is None and not getattr(block, "fused", False):
            reason = "fuse(model) was not called"
        elif reason is None:
            device = tail.conv.weight.device.type
            reason = fusible.unfused(tail.norm, tail.attention, device, tail.activation)
        if reason is not None:
            reasons[name] = reason
    return reasons


def _unfit(tail: Ending) -> str | None:
    if tail.drop_path is not None:
        return f"there is a {type(tail.drop_path).__name__} before the addition"
    return fusible.unfit(tail.norm, tail.attention, tail.activation)


def check_fusible(fused: bool, attention: str | None, caller: str) -> None:
    """ValueError where ``fused`` is asked for with an attention that cannot be fused."""
    if fused and attention not in FUSIBLE:
        raise ValueError(
            f"{caller}: fused=True goes with DA or without attention, got attention="
            f"{attention!r}; leave it out"
        )
