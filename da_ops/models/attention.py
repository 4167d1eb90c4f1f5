"""The attention layers that the DA block is compared with, in plain PyTorch.

Each is ``[N, C, H, W] -> [N, C, H, W]`` and keeps dtype and memory layout. Parameters are in the
dtype of ``x``, or float32 with half-precision ``x``. Each takes ``(channels, device=, dtype=)`` and
so serves as an ``attn_layer`` of timm.
"""

# Annotations are no strings here: FX copies those of `forward`, and TorchScript reads them.

import inspect
from collections.abc import Sequence
from typing import Any

import torch
import torch.fx
from torch import Tensor, nn

from ..checks import odd_int, positive_int
from ..module import DAModule, _adaptive_kernel_size
from ..reference import accumulation_dtype
from . import frequencies as dct


def _check_maps(x: Tensor, channels: int) -> None:
    if x.dim() != 4 or x.shape[1] != channels:
        raise ValueError(
            f"attention: x must be [N, {channels}, H, W], as the layer was made for, got"
            f" {list(x.shape)}"
        )


class SEModule(nn.Module):
    """Squeeze and excitation: ``x * sigmoid(fc2(relu(fc1(mean over H, W))))``, without biases.

    Args:
        channels: C of the feature maps.
        reduction: C over the number of hidden channels.
        device, dtype: of the parameters.

    Parameters: ``fc1.weight [C // reduction, C, 1, 1]``, ``fc2.weight [C, C // reduction, 1, 1]``.

    Raises:
        ValueError: ``channels`` below ``reduction``, or a number that is not positive; by
            ``forward``, maps of another number of channels.

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
        name = type(self).__name__
        channels = positive_int(f"{name}: channels", channels)
        reduction = positive_int(f"{name}: reduction", reduction)
        if reduction > channels:
            raise ValueError(
                f"{name}: reduction must be between 1 and channels={channels}, got {reduction}; "
                "pass a smaller reduction"
            )
        hidden = channels // reduction
        self.fc1 = nn.Conv2d(channels, hidden, 1, bias=False, device=device, dtype=dtype)
        self.relu = nn.ReLU()
        self.fc2 = nn.Conv2d(hidden, channels, 1, bias=False, device=device, dtype=dtype)

    def _pooled(self, x: Tensor) -> Tensor:
        return x.mean((2, 3), keepdim=True)

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(x, Tensor):  # what FX traces is none
            _check_maps(x, self.fc2.out_channels)
        pooled = self._pooled(x)
        if isinstance(x, Tensor):  # a graph of FX takes x in the parameters' dtype alone
            pooled = pooled.to(self.fc1.weight.dtype)
        mask = torch.sigmoid(self.fc2(self.relu(self.fc1(pooled))))
        return x * mask.to(x.dtype)


class FCAModule(SEModule):
    """Frequency channel attention: :class:`SEModule` with another pooling. The channels are split
    into as many groups as there are frequencies, and each is pooled by one function of the
    two-dimensional discrete cosine transform of its map: the sum over H, W of their product.

    Args:
        channels: C of the feature maps, a multiple of the number of frequencies.
        reduction: C over the number of hidden channels.
        frequencies: the name of a published set: ``"top16"``, the best 16 on ImageNet; ``"low16"``,
            the lowest; ``"bot16"``, the worst; each with 1, 2, 4, 8, 16 or 32. Frequency (0, 0)
            alone, ``"top1"``, is the mean times ``sqrt(H * W)``.
        size: H and W that maps are first pooled to, adaptively, where they are of another size; one
            number for both. By default they are taken as they are.
        device, dtype: of the parameters.

    The sets are of maps of 7 x 7; on others the frequencies are multiplied by the whole number of
    times that 7 goes into the side. The published layer is made for the maps of an image of
    224 x 224, and pools all others to their sizes: ``size=56``, 28, 14 and 7 in the four stages of
    a ResNet. For such images the default is the same. An ONNX model with ``size`` takes maps of the
    size that it was exported with.

    ``forward`` raises ValueError where a map is smaller than ``size``, or has no such frequency:
    7 x 7 is the least with ``"top16"``.

    Parameters: those of :class:`SEModule`. The basis is computed, and in no state dict.

    Raises:
        ValueError: as :class:`SEModule`; unknown frequencies, or channels that are no multiple of
            their number.

    Source: Qin et al., FcaNet, ICCV 2021; the sets are those of its published code.
    """

    size: list[int] | None  # for TorchScript

    def __init__(
        self,
        channels: int,
        *,
        reduction: int = 16,
        frequencies: str = "top16",
        size: int | tuple[int, int] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(channels, reduction=reduction, device=device, dtype=dtype)
        if frequencies not in dct.NAMES:
            raise ValueError(
                "FCAModule: frequencies must be 'top', 'low' or 'bot' and one of the numbers "
                f"{', '.join(map(str, dct.COUNTS))}, such as 'top16'; got {frequencies!r}"
            )
        self.frequencies = frequencies
        self.rows, self.columns = dct.frequencies(frequencies)
        if channels % len(self.rows):
            raise ValueError(
                "FCAModule: channels must be a multiple of the number of frequencies, got "
                f"channels={channels} and frequencies={frequencies!r}; pass fewer frequencies"
            )
        self.size = None if size is None else _side_by_side(size)
        if self.size is not None:
            least = max(self.rows) + 1, max(self.columns) + 1
            if self.size[0] < least[0] or self.size[1] < least[1]:
                raise ValueError(
                    f"FCAModule: size must be at least {least[0]} x {least[1]} with frequencies="
                    f"{frequencies!r}, got {self.size[0]} x {self.size[1]}"
                )

    def _pooled(self, x: Tensor) -> Tensor:
        pooled = _pooled_by_frequency(x, self.rows, self.columns, self.size)
        return pooled[:, :, None, None]

    def extra_repr(self) -> str:
        return f"frequencies={self.frequencies!r}" + (f", size={self.size}" if self.size else "")


def _side_by_side(size: int | tuple[int, int]) -> list[int]:
    sides = size if isinstance(size, Sequence) else (size, size)
    if len(sides) != 2:
        raise ValueError(f"FCAModule: size must be one number or two, got {size!r}")
    return [positive_int("FCAModule: size", side) for side in sides]


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

    Raises:
        ValueError: ``channels`` that are no multiple of ``groups``, or a number that is not
            positive; by ``forward``, maps of another number of channels.

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
        groups = positive_int("SGEModule: groups", groups)
        if channels % groups:
            raise ValueError(
                f"SGEModule: channels must be a multiple of groups, got channels={channels} and "
                f"groups={groups}; pass groups that divide it"
            )
        self.channels, self.groups = channels, groups
        # Held by a module without children, so that a counter of leaf modules sees them.
        self.weight = nn.Parameter(torch.zeros(groups, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.ones(groups, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(x, Tensor):  # what FX traces is none
            _check_maps(x, self.channels)
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
        self.channels = channels = positive_int("ECAModule: channels", channels)
        k = _adaptive_kernel_size(channels) if kernel_size is None else kernel_size
        k = odd_int("ECAModule: kernel_size", k)
        self.conv = nn.Conv1d(1, 1, k, padding=k // 2, bias=False, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(x, Tensor):  # what FX traces is none
            _check_maps(x, self.channels)
        pooled = x.mean((2, 3))
        if isinstance(x, Tensor):  # a graph of FX takes x in the parameters' dtype alone
            pooled = pooled.to(self.conv.weight.dtype)
        mask = torch.sigmoid(self.conv(pooled[:, None])[:, 0])
        return x * mask.to(x.dtype)[:, :, None, None]


@torch.fx.wrap  # a node of its own, for what it does with the sizes of x cannot be traced
def _pooled_by_frequency(
    x: Tensor,
    rows: list[int],
    columns: list[int],
    size: list[int] | None,
) -> Tensor:
    return dct.pooled(x, rows, columns, size)


@torch.fx.wrap  # a node of its own, for its choice of a dtype cannot be traced
def _accumulated_sum(t: Tensor) -> Tensor:
    """Over dimension 2, in the dtype of accumulation."""
    return t.sum(2, dtype=accumulation_dtype(t.dtype))


ATTENTIONS: dict[str, type[nn.Module]] = {
    "da": DAModule,
    "se": SEModule,
    "sge": SGEModule,
    "eca": ECAModule,
    "fca": FCAModule,
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
