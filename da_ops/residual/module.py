"""The residual tail as a layer."""

# Annotations are no strings here: TorchScript reads them.

import torch
from torch import Tensor, nn

from ..module import DAModule
from .functional import residual_attention


class DAResidual(nn.Module):
    """``relu(attention(norm(u)) + shortcut)``: the tail of a residual branch.

    It takes the place of the branch's last batch norm, the layer, the addition and the ReLU, with
    the child modules ``norm`` (``nn.BatchNorm2d``) and ``attention`` (:class:`DAModule`), and
    computes what they do one after the other; see :func:`da_ops.residual_attention`.

    Args:
        channels: C of the feature maps.
        eps, momentum: of the norm.
        order, gate, bias, kernel_size, backend: of the layer; see :class:`da_ops.DAModule`.
        device, dtype: of the parameters.

    ``forward(u, shortcut)`` takes what the last convolution gives and the shortcut, which may be
    None, both ``[N, C, H, W]``, and keeps their dtype and memory layout.

    Raises:
        ValueError: as :class:`da_ops.DAModule` does.
        what :func:`da_ops.residual_attention` raises, by ``forward``.
    """

    fused = True

    def __init__(
        self,
        channels: int,
        *,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        order: str = "spatial_channel",
        gate: str = "affine",
        bias: bool = False,
        kernel_size: int | None = None,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.attention = DAModule(
            channels,
            order=order,
            gate=gate,
            bias=bias,
            kernel_size=kernel_size,
            backend=backend,
            device=device,
            dtype=dtype,
        )
        self.norm = nn.BatchNorm2d(
            self.attention.channels, eps=eps, momentum=momentum, device=device, dtype=dtype
        )

    def forward(self, u: Tensor, shortcut: Tensor | None) -> Tensor:
        if torch.jit.is_scripting():
            return self._one_by_one(u, shortcut)
        elif self.fused:  # TorchScript compiles code after a return, but not this branch
            return residual_attention(u, shortcut, self.norm, self.attention)
        else:
            return self._one_by_one(u, shortcut)

    def _one_by_one(self, u: Tensor, shortcut: Tensor | None) -> Tensor:
        x = self.attention(self.norm(u))
        return torch.relu(x if shortcut is None else x + shortcut)
