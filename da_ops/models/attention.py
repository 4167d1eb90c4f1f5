"""The attention layers that the DA block is compared with, in plain PyTorch.

Each is ``[N, C, H, W] -> [N, C, H, W]`` and keeps dtype and memory layout. Parameters are in the
dtype of ``x``, or float32 with half-precision ``x``. Each takes ``(channels, device=, dtype=)`` and
so serves as an ``attn_layer`` of timm.
"""

# Annotations are no strings here: FX copies those of `forward`, and TorchScript reads them.

import inspect
from typing import Any

import torch
import torch.fx
from torch import Tensor, nn

from ..checks import odd_int, positive_int
from ..module import DAModule, _adaptive_kernel_size
from ..reference import accumulation_dtype


class SEModule(nn.Module):
    """Squeeze and excitation: ``x * sigmoid(fc2(relu(fc1(mean over H, W))))``, without biases.

    Args:
        channels: C of the feature maps.
        reduction: C over the number of hidden channels.
        device, dtype: of the parameters.

    Parameters: ``fc1.weight [C // reduction, C, 1, 1]``, ``fc2.weight [C, C // reduction, 1, 1]``.

    Source: Hu et al., Squeeze-and-Excitation Networks, CVPR 2018. Without biases as its follow-ups
    have it, whose parameter count is the one that the DA paper prints.
    """

    def __init__(
        self,
        channels: int,
        *,
        reduction: int = 16,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        channels = positive_int("SEModule: channels", channels)
        if not 1 <= reduction <= channels:
            raise ValueError(
                f"SEModule: reduction must be between 1 and channels={channels}, got {reduction}; "
                "pass a smaller reduction"
            )
        hidden = channels // reduction
        self.fc1 = nn.Conv2d(channels, hidden, 1, bias=False, device=device, dtype=dtype)
        self.relu = nn.ReLU()
        self.fc2 = nn.Conv2d(hidden, channels, 1, bias=False, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        pooled = x.mean((2, 3), keepdim=True)
        if isinstance(x, Tensor):  # a graph of FX takes x in the parameters' dtype alone
            pooled = pooled.to(self.fc1.weight.dtype)
        mask = torch.sigmoid(self.fc2(self.relu(self.fc1(pooled))))
        return x * mask.to(x.dtype)


class SGEModule(nn.Module):
    """Spatial group-wise enhance: a spatial mask per group of channels.

    In each group, the likeness of every position to the mean, ``t = sum_c x * mean_p x``, is
    normalised over the positions (unbiased deviation, plus 1e-5) and gated:
    ``x * sigmoid(weight * t + bias)``. Over a single position the normalised ``t`` is 0.

    Args:
        channels: C of the feature maps, a multiple of ``groups``.
        groups: number of groups.
        device, dtype: of the parameters.

    Parameters: ``weight [groups]``, which starts at 0, and ``bias [groups]``, which starts at 1.

    Source: Li et al., Spatial Group-wise Enhance, 2019 (arXiv 1905.09646).
    """

    def __init__(
        self,
        channels: int,
        *,
        groups: int = 64,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        channels = positive_int("SGEModule: channels", channels)
        if groups < 1 or channels % groups:
            raise ValueError(
                f"SGEModule: channels must be a multiple of groups, got channels={channels} and "
                f"groups={groups}; pass groups that divide it"
            )
        self.channels, self.groups = channels, groups
        # Held by a module without children, so that a counter of leaf modules sees them.
        self.weight = nn.Parameter(torch.zeros(groups, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.ones(groups, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        grouped = x.unflatten(1, (self.groups, -1))  # [N, groups, C / groups, H, W], a view
        mean = grouped.mean((3, 4), keepdim=True)
        t = _accumulated_sum(grouped * mean)
        t = t - t.mean((2, 3), keepdim=True)
        # Not torch.std, which is NaN over a single position; there 1 // positions is 1.
        positions = x.shape[2] * x.shape[3]
        freedom = positions - 1 + 1 // positions
        deviation = torch.linalg.vector_norm(t, dim=(2, 3), keepdim=True) / freedom**0.5
        t = t / (deviation + 1e-5)
        mask = torch.sigmoid(t * self.weight[:, None, None] + self.bias[:, None, None])
        return (grouped * mask.to(x.dtype).unsqueeze(2)).flatten(1, 2)

    def extra_repr(self) -> str:
        return f"{self.channels}, groups={self.groups}"


class ECAModule(nn.Module):
    """Efficient channel attention: ``x * sigmoid(conv1d over the channels of (mean over H, W))``.

    Args:
        channels: C of the feature maps.
        kernel_size: of the convolution, odd; None adapts it to ``channels`` (gamma 2, b 1).
        device, dtype: of the parameters.

    Parameters: ``conv.weight [1, 1, kernel_size]``.

    Source: Wang et al., ECA-Net, CVPR 2020.
    """

    def __init__(
        self,
        channels: int,
        *,
        kernel_size: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        channels = positive_int("ECAModule: channels", channels)
        k = _adaptive_kernel_size(channels) if kernel_size is None else kernel_size
        k = odd_int("ECAModule: kernel_size", k)
        self.conv = nn.Conv1d(1, 1, k, padding=k // 2, bias=False, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        pooled = x.mean((2, 3))
        if isinstance(x, Tensor):  # a graph of FX takes x in the parameters' dtype alone
            pooled = pooled.to(self.conv.weight.dtype)
        mask = torch.sigmoid(self.conv(pooled[:, None])[:, 0])
        return x * mask.to(x.dtype)[:, :, None, None]


@torch.fx.wrap  # a node of its own, for its choice of a dtype cannot be traced
def _accumulated_sum(t: Tensor) -> Tensor:
    """Over dimension 2, in the dtype of accumulation."""
    return t.sum(2, dtype=accumulation_dtype(t.dtype))


ATTENTIONS: dict[str, type[nn.Module]] = {
    "da": DAModule,
    "se": SEModule,
    "sge": SGEModule,
    "eca": ECAModule,
}


def make_attention(attention: str, channels: int, **options: Any) -> nn.Module:
    """The layer called ``attention`` for ``channels``, with keyword arguments of its constructor.

    Raises:
        ValueError: there is no such layer, it does not take one of the options, or not that value.
    """
    if attention not in ATTENTIONS:
        raise ValueError(
            f"attention must be one of {', '.join(map(repr, ATTENTIONS))}; got {attention!r}"
        )
    layer = ATTENTIONS[attention]
    takes = list(inspect.signature(layer).parameters)[1:]
    for name in options:
        if name not in takes:
            raise ValueError(
                f"attention={attention!r} does not take {name}, only {', '.join(takes)}; leave it "
                "out"
            )
    return layer(channels, **options)
