"""Where tensors lie: contiguous and channels_last are native, all other layouts cost one copy."""

from __future__ import annotations

import torch
from torch import Tensor


def device_type(x: Tensor) -> str:
    """``x.device.type``, without the two objects that this makes."""
    return "cpu" if x.is_cpu else "cuda" if x.is_cuda else x.device.type


def dense(x: Tensor) -> Tensor:
    """``x`` itself if it is contiguous or channels_last, else a copy in the nearer of the two."""
    if x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last):
        return x
    if x.stride(1) == 1 and x.shape[1] > 1:
        return x.contiguous(memory_format=torch.channels_last)
    return x.contiguous()


def like(dy: Tensor, x: Tensor) -> Tensor:
    """``dy`` in the layout of ``x``, which is dense."""
    if dy.stride() == x.stride():
        return dy
    if x.is_contiguous():
        return dy.contiguous()
    return dy.contiguous(memory_format=torch.channels_last)


def empty_gradient(p: Tensor) -> Tensor:
    """An empty tensor for the gradient of ``p``: contiguous, but with the strides of ``p`` in
    dimensions of size 1, which mean nothing and which DistributedDataParallel compares."""
    return torch.empty_like(p.contiguous())
