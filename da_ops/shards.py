"""Distributed tensors: each device computes the images that it holds."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from torch import Tensor

from .parameters import Parameters


def is_distributed(x: object) -> bool:
    """Whether ``x`` is a DTensor; imports nothing."""
    made_by = sys.modules.get("torch.distributed.tensor")
    return made_by is not None and isinstance(x, made_by.DTensor)


def on_each_shard(
    function: Callable[..., Tensor], x: Any, parameters: Parameters, *options: str
) -> Tensor:
    """``function(x, *parameters, *options)`` where ``x`` is a DTensor ``[N, C, H, W]``.

    An image needs no other, and so ``x`` may be split over N; if it is split otherwise, it is
    gathered first. The parameters must be DTensors on the mesh of ``x``; their gradients are
    partial sums where ``x`` is split.

    Raises:
        TypeError: a parameter is not distributed.
    """
    from torch.distributed.tensor import DTensor, Partial, Replicate

    mesh = x.device_mesh
    placements = [p if p.is_shard(0) else Replicate() for p in x.placements]
    gradients = [Partial() if p.is_shard(0) else Replicate() for p in placements]

    def local(p: Any) -> Any:
        if not isinstance(p, Tensor):
            return p
        if not isinstance(p, DTensor):
            raise TypeError(
                "da_attention: all parameters must be DTensors where x is one, got a "
                f"{type(p).__name__} of shape {list(p.shape)}; distribute the layer with "
                "torch.distributed.tensor.distribute_module"
            )
        whole = p.redistribute(mesh, [Replicate()] * mesh.ndim)
        return whole.to_local(grad_placements=gradients)

    own = parameters.each(local)
    y = function(x.redistribute(mesh, placements).to_local(), *own, *options)
    return DTensor.from_local(
        y, mesh, placements, run_check=False, shape=x.shape, stride=x.stride()
    )
