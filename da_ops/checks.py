"""The checks of the operator's arguments, made before any kernel runs."""

from __future__ import annotations

import operator
from typing import Any, NoReturn

import torch
from torch import Tensor

from .parameters import Unnamed
from .reference import GATES, ORDERS

HALF = (torch.float16, torch.bfloat16)
DTYPES = (*HALF, torch.float32, torch.float64)
_CONV, _MERGE, _ONE = (1, 1, 3, 3), (1, 2, 1, 1), (1,)


def check_options(order: object, gate: object) -> None:
    """Raise ValueError unless ``order`` and ``gate`` are known names."""
    for name, value, options in (("order", order, ORDERS), ("gate", gate, GATES)):
        if value not in options:
            raise ValueError(
                f"da_attention: {name} must be one of {', '.join(map(repr, options))}; "
                f"got {value!r}"
            )


def positive_int(name: str, value: Any) -> int:
    """``value``, of any integer type, as an int; ValueError unless it is one and positive."""
    try:
        number = operator.index(value)
    except TypeError:
        number = 0
    if number < 1:
        raise ValueError(f"{name} must be a positive int, got {value!r}")
    return number


def odd_int(name: str, value: Any) -> int:
    """``value`` as an int; ValueError unless it is one, positive and odd."""
    number = positive_int(name, value)
    if number % 2 == 0:
        raise ValueError(f"{name} must be odd, got {value!r}")
    return number


def check_arguments(x: Tensor, parameters: Unnamed, order: str, gate: str) -> None:
    """Raise TypeError or ValueError, naming the argument, unless the operator can take the call.

    The calls of backends that do not check come here before they run, others once a kernel has
    refused them; and so a message is made only when it is needed.
    """
    conv_weight, dilated_weight, merge_weight, spatial_bias, gate_weight, gate_bias = parameters
    channels = check_x(x)
    if order not in ORDERS or gate not in GATES:
        check_options(order, gate)
    spatial, channel = order != "channel", order != "spatial"
    with_weight, with_bias = channel and gate != "sigmoid", channel and gate in ("affine", "scalar")
    gate_shape: tuple[int, ...] = (channels,) if gate == "affine" else _ONE
    if gate == "eca" and with_weight and isinstance(gate_weight, Tensor):
        gate_shape = gate_weight.shape
        if len(gate_shape) != 1 or gate_shape[0] % 2 == 0:
            raise ValueError(
                "da_attention: gate_weight of gate='eca' must have shape [k] with k odd, got "
                f"{list(gate_shape)}"
            )
    dtype, device = x.dtype, x.device
    shared = None  # the parameters' dtype
    for name, p, shape, wanted in (
        ("conv_weight", conv_weight, _CONV, spatial),
        ("dilated_weight", dilated_weight, _CONV, spatial),
        ("merge_weight", merge_weight, _MERGE, spatial),
        ("spatial_bias", spatial_bias, _ONE, spatial and spatial_bias is not None),
        ("gate_weight", gate_weight, gate_shape, with_weight),
        ("gate_bias", gate_bias, gate_shape, with_bias),
    ):
        if p is None and not wanted:
            continue
        if not wanted:
            _refuse_unused(name, order, gate)
        if not isinstance(p, Tensor) or p.shape != shape or p.device != device:
            _refuse(name, p, shape, x)
        own = p.dtype
        if own is shared:
            continue
        if own is not dtype and not (dtype in HALF and own is torch.float32):
            or_float32 = " or float32" if dtype in HALF else ""
            raise TypeError(
                f"da_attention: {name} must be {_name(dtype)} like x{or_float32}, got {_name(own)}"
            )
        if shared is not None:
            raise TypeError(
                "da_attention: all parameters must share one dtype, got "
                f"{_name(shared)} and, for {name}, {_name(own)}"
            )
        shared = own


def check_x(x: Tensor) -> int:
    """C of ``x``; TypeError or ValueError unless it is a feature map."""
    if not isinstance(x, Tensor):
        raise TypeError(f"da_attention: x must be a torch.Tensor, got {type(x).__name__}")
    if x.dtype not in DTYPES:
        raise TypeError(
            "da_attention: x must be float16, bfloat16, float32 or float64, got "
            f"{_name(x.dtype)}; convert it with x.float()"
        )
    if x.is_nested:
        raise ValueError(
            "da_attention: x must be one tensor [N, C, H, W], got a nested tensor; call the layer "
            "with each image of x.unbind() as a batch of one"
        )
    if x.layout is not torch.strided:
        raise ValueError(
            f"da_attention: x must be a strided tensor, got layout {x.layout}; use x.to_dense()"
        )
    shape = x.shape
    if len(shape) != 4:
        raise ValueError(
            f"da_attention: x must have 4 dimensions [N, C, H, W], got {len(shape)}: {list(shape)}"
        )
    if shape[1] == 0 or shape[2] == 0 or shape[3] == 0:
        raise ValueError(f"da_attention: C, H and W of x must be at least 1, got {list(shape)}")
    return shape[1]


def check_tail(u: object, shortcut: object, norm: Any) -> None:
    """Raise TypeError or ValueError, naming the argument, where a tail's modules would say less."""
    for name, given in (("u", u), ("shortcut", shortcut)):
        if not isinstance(given, Tensor | torch.fx.Proxy) and (given is not None or name == "u"):
            raise TypeError(
                f"residual_attention: {name} must be a torch.Tensor, got {type(given).__name__}"
            )
    # Sizes are no numbers while a call is traced. The norm refuses other dimensions.
    if not isinstance(u, Tensor) or torch.jit.is_tracing() or u.dim() != 4:
        return
    if isinstance(shortcut, Tensor):
        try:  # the modules take one that is broadcast
            torch.broadcast_shapes(u.shape, shortcut.shape)
        except RuntimeError:
            raise ValueError(
                f"residual_attention: shortcut must have the shape of u, {list(u.shape)}, got "
                f"{list(shortcut.shape)}"
            ) from None
    channels = getattr(norm, "num_features", u.shape[1])
    if channels != u.shape[1]:
        raise ValueError(
            f"residual_attention: norm must be over the {u.shape[1]} channels of u, got one over "
            f"{channels}"
        )


def _refuse_unused(name: str, order: str, gate: str) -> NoReturn:
    gate_is_used = name.startswith("gate") and order != "spatial"
    option = f"gate={gate!r}" if gate_is_used else f"order={order!r}"
    raise ValueError(
        f"da_attention: {option} does not take {name}, expected None and got one; leave it out"
    )


def _refuse(name: str, p: object, shape: tuple[int, ...], x: Tensor) -> NoReturn:
    if not isinstance(p, Tensor):
        got = "None" if p is None else type(p).__name__
        raise TypeError(f"da_attention: {name} must be a torch.Tensor, got {got}")
    if p.shape != shape:
        raise ValueError(
            f"da_attention: {name} must have shape {list(shape)} for x of shape {list(x.shape)}, "
            f"got {list(p.shape)}"
        )
    raise ValueError(f"da_attention: {name} must be on x's device {x.device}, got {p.device}")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def name_want_of_memory(error: Exception, x: Tensor) -> None:
    """Raise what PyTorch raises where memory is short, if it was: of an allocation that fails, a
    library learns no more than that it did."""
    if "aoti_torch_empty_strided" not in str(error):
        return
    size = "x".join(map(str, x.shape))
    raise torch.OutOfMemoryError(
        f"{'CUDA out' if x.is_cuda else 'Out'} of memory. da_ops: there is none for the results of "
        f"a call with {size} {_name(x.dtype)} on {x.device}"
    ) from error
