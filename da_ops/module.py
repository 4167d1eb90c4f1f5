"""The operator as a layer."""

# Annotations are no strings here: FX copies those of `forward`, and TorchScript reads them.

import logging
import math
from typing import Any

import torch
from torch import Tensor, nn

from .backends import BACKENDS, select
from .checks import check_options, odd_int, positive_int
from .functional import attention
from .parameters import Unnamed
from .reference import accumulation_dtype, channel_logit, channel_mean, pooled

logger = logging.getLogger("da_ops")

_P = Tensor | None
_Spatial = tuple[_P, _P, _P, _P]  # the first four of Parameters


class DAModule(nn.Module):
    """Attention over space and channels, ``[N, C, H, W] -> [N, C, H, W]``.

    Args:
        channels: C of the feature maps.
        order: how the two halves are combined; see :func:`da_ops.da_attention`.
        gate: the form of the channel mask; see :func:`da_ops.da_attention`.
        bias: give each of the three convolutions a bias, as ``nn.Conv2d`` does.
        kernel_size: of ``gate="eca"``, odd; None adapts it to ``channels`` as ECA-Net does
            (gamma 2, b 1).
        backend: see :func:`da_ops.da_attention`.
        device, dtype: of the parameters.

    Parameters, the same whichever backend runs: ``conv.weight [1, 1, 3, 3]``,
    ``dilated_conv.weight [1, 1, 3, 3]``, ``merge.weight [1, 2, 1, 1]`` (each with ``.bias [1]``
    if ``bias``), ``gate_weight`` and ``gate_bias`` (``[C]`` for "affine", ``[1]`` for "scalar",
    weight ``[k]`` alone for "eca"). The "affine" and "scalar" gates start at weight 0 and bias 1;
    the convolutions as ``nn.Conv2d`` and ``nn.Conv1d`` do.

    The layer keeps ``x``'s dtype and memory layout. It takes ``(channels, device=, dtype=)`` and so
    serves as an ``attn_layer`` of timm.

    The fused kernels take the place of the three convolutions, and so need them as they were made.
    A layer with one that was replaced, pruned, normalised, parametrised, set to convolve otherwise
    or given hooks calls all three, in plain PyTorch operations, and says so once, as a warning of
    the logger ``da_ops``; :meth:`unfused` and ``da_ops.explain(x, layer=layer)`` say why.

    Raises:
        ValueError: ``channels`` is no positive int, ``order``, ``gate`` or ``backend`` is no known
            name, ``kernel_size`` is even or goes with another gate than "eca".
        what :func:`da_ops.da_attention` raises, by ``forward``.

    Source: the DA block, an extremely lightweight attention mechanism for detection backbones. What
    its paper leaves open (the gate's form, the convolutions' biases) is decided in docs/paper.md.
    """

    def __init__(
        self,
        channels: int,
        *,
        order: str = "spatial_channel",
        gate: str = "affine",
        bias: bool = False,
        kernel_size: int | None = None,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        channels = positive_int("DAModule: channels", channels)
        check_options(order, gate)
        if backend != "auto" and backend not in BACKENDS:
            select(backend, "cpu")  # which says what names there are
        if kernel_size is not None:
            if gate != "eca":
                raise ValueError(f"DAModule: kernel_size goes with gate='eca', got gate={gate!r}")
            kernel_size = odd_int("DAModule: kernel_size", kernel_size)
        self.channels, self.order, self.gate, self.backend = channels, order, gate, backend
        factory: dict[str, Any] = {"device": device, "dtype": dtype}

        self.conv = self.dilated_conv = self.merge = None
        if order != "channel":
            self.conv = nn.Conv2d(1, 1, 3, padding=1, bias=bias, **factory)
            self.dilated_conv = nn.Conv2d(1, 1, 3, padding=3, dilation=3, bias=bias, **factory)
            self.merge = nn.Conv2d(2, 1, 1, bias=bias, **factory)

        size = 0
        if order != "spatial" and gate != "sigmoid":
            size = {"affine": channels, "scalar": 1}.get(
                gate, kernel_size or _adaptive_kernel_size(channels)
            )
        with_bias = size > 0 and gate != "eca"
        self.gate_weight = nn.Parameter(torch.empty(size, **factory)) if size else None
        self.gate_bias = nn.Parameter(torch.empty(size, **factory)) if with_bias else None
        self._reset_gate()

    def reset_parameters(self) -> None:
        """Initialise every parameter anew."""
        for conv in (self.conv, self.dilated_conv, self.merge):
            if conv is not None:
                conv.reset_parameters()
        self._reset_gate()

    def _reset_gate(self) -> None:
        if self.gate_weight is None:
            return
        if self.gate_bias is None:  # eca: as nn.Conv1d(1, 1, k) does
            bound = 1 / math.sqrt(self.gate_weight.numel())
            nn.init.uniform_(self.gate_weight, -bound, bound)
        else:
            nn.init.zeros_(self.gate_weight)
            nn.init.ones_(self.gate_bias)

    def forward(self, x: Tensor) -> Tensor:
        if torch.jit.is_scripting():
            return self._through_children(x)
        else:  # TorchScript compiles code after a return, but not this branch
            parameters = self.fused_parameters()
            if parameters is None:
                self._tell()
                return self._through_children(x)
            if not isinstance(x, Tensor):  # a Proxy of FX, whose tracer sees attributes alone
                parameters = self._attributes()
            return attention(x, *parameters, self.order, self.gate, self.backend)

    def fused_parameters(self) -> Unnamed | None:
        """The kernels' six parameters; None where the layer calls its convolutions."""
        spatial: _Spatial = (None, None, None, None)
        if self.order != "channel":
            children = self._modules
            conv = _weights(children["conv"], _CONV)
            dilated = _weights(children["dilated_conv"], _DILATED_CONV)
            merge = _weights(children["merge"], _MERGE)
            if conv is None or dilated is None or merge is None:
                return None
            spatial = (conv[0], dilated[0], merge[0], _folded_bias(conv[1], dilated[1], *merge))
        return (*spatial, _parameter(self, "gate_weight"), _parameter(self, "gate_bias"))

    def _attributes(self) -> Unnamed:
        """:meth:`fused_parameters`, each read as an attribute."""
        spatial: _Spatial = (None, None, None, None)
        if self.conv is not None and self.dilated_conv is not None and self.merge is not None:
            conv, dilated, merge = self.conv, self.dilated_conv, self.merge
            bias = _folded_bias(conv.bias, dilated.bias, merge.weight, merge.bias)
            spatial = (conv.weight, dilated.weight, merge.weight, bias)
        return (*spatial, _parameter(self, "gate_weight"), _parameter(self, "gate_bias"))

    def unfused(self) -> str | None:
        """Why the layer calls its convolutions; None where the fused kernels take their place.

        >>> layer = DAModule(8)
        >>> _ = layer.conv.register_forward_hook(print)
        >>> layer.unfused()
        'conv has hooks'
        """
        if self.order == "channel":
            return None
        for name, made in (("conv", _CONV), ("dilated_conv", _DILATED_CONV), ("merge", _MERGE)):
            child = self._modules[name]
            if _weights(child, made) is None:
                if any(child.__dict__.get(kind) for kind in _HOOKS):
                    return f"{name} has hooks"
                if "forward" in child.__dict__:
                    return f"{name} has a forward of its own"
                return f"{name} is now {child}".partition("\n")[0].removesuffix("(")
        return None

    def _tell(self) -> None:
        if torch.compiler.is_compiling():  # nothing is said in a graph
            return
        reason = self.unfused()
        if reason not in _told:
            _told.add(reason)
            logger.warning(
                "da_ops: DAModule calls its convolutions in plain PyTorch operations, not the fused"
                " kernels: %s",
                reason,
            )

    def _through_children(self, x: Tensor) -> Tensor:
        """The layer in plain operations, its convolutions called as what they have become."""
        y = x
        if isinstance(x, Tensor):  # what FX traces stays in the dtype of x
            y = x.to(accumulation_dtype(x.dtype))
        first = y
        for half in self.order.replace("parallel", "spatial_channel").split("_"):
            seen = first if self.order == "parallel" else y  # by the mask
            if half == "spatial":
                y = y * self._spatial_mask(seen)
            else:
                logit = channel_logit(pooled(seen), self.gate, self.gate_weight, self.gate_bias)
                y = y * torch.sigmoid(logit)[:, :, None, None]
        return y.to(x.dtype)

    def _spatial_mask(self, x: Tensor) -> Tensor:
        assert self.conv is not None and self.dilated_conv is not None and self.merge is not None
        m = channel_mean(x)
        if torch.jit.is_scripting():
            m = m.to(self.conv.weight.dtype)
        elif isinstance(x, Tensor):
            for p in self.conv.parameters():
                m = m.to(p.dtype) if p.is_floating_point() else m
        z = self.merge(torch.cat([self.conv(m), self.dilated_conv(m)], 1))
        return torch.sigmoid(z.to(x.dtype))

    def extra_repr(self) -> str:
        parts = [str(self.channels), f"order={self.order!r}", f"gate={self.gate!r}"]
        if self.gate == "eca" and self.gate_weight is not None:
            parts.append(f"kernel_size={self.gate_weight.numel()}")
        if self.backend != "auto":
            parts.append(f"backend={self.backend!r}")
        return ", ".join(parts)


# The convolutions that the kernels compute, each as in_channels, out_channels, kernel_size, stride,
# padding, dilation, groups, padding_mode.
_CONV = (1, 1, (3, 3), (1, 1), (1, 1), (1, 1), 1, "zeros")
_DILATED_CONV = (1, 1, (3, 3), (1, 1), (3, 3), (3, 3), 1, "zeros")
_MERGE = (2, 1, (1, 1), (1, 1), (0, 0), (1, 1), 1, "zeros")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")

_told: set[str | None] = set()  # reasons


def _weights(child: Any, made: tuple[Any, ...]) -> tuple[Any, Any] | None:
    """Weight and bias of a convolution that computes what the kernels do, else None.

    Every call comes here, and so the comparisons are written out.
    """
    own = child.__dict__
    if (
        type(child) is not nn.Conv2d
        or own["_forward_hooks"]
        or own["_forward_pre_hooks"]
        or own["_backward_hooks"]
        or own["_backward_pre_hooks"]
        or "forward" in own
        or made
        != (
            own["in_channels"],
            own["out_channels"],
            own["kernel_size"],
            own["stride"],
            own["padding"],
            own["dilation"],
            own["groups"],
            own["padding_mode"],
        )
    ):
        return None
    return _parameter(child, "weight"), _parameter(child, "bias")


def _parameter(module: nn.Module, name: str) -> Any:
    """``module.name``, past nn.Module's own look-up, which takes ten times as long."""
    own = module._parameters
    return own[name] if name in own else getattr(module, name)  # it may be computed


def _folded_bias(conv_bias: Any, dilated_bias: Any, merge_weight: Any, bias: Any) -> Any:
    """One number for three: a constant on either side of the merge is a constant after it."""
    if conv_bias is None and dilated_bias is None:
        return bias
    for i, constant in enumerate((conv_bias, dilated_bias)):
        if constant is not None:
            term = merge_weight[:, i, 0, 0] * constant
            bias = term if bias is None else bias + term
    return bias


def _adaptive_kernel_size(channels: int) -> int:
    """ECA-Net's rule with gamma 2 and b 1: ``(log2(channels) + 1) / 2``, rounded down and then, if
    that is even, one more."""
    k = int((math.log2(channels) + 1) / 2)
    return k if k % 2 else k + 1
