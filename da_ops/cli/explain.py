"""``explain``: which backend and kernels a call gets, and why."""

from __future__ import annotations

import argparse
import math
import textwrap

import torch

from ..backends.base import MODES, STATISTICS
from ..explain import explain
from ..reference import GATES, ORDERS

_DTYPES = ("float16", "bfloat16", "float32", "float64")
_MOST = 2**48  # elements, more than any machine holds, and few enough for sums in 64 bits
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def add(commands: argparse._SubParsersAction) -> None:
    """Declare the command."""
    command = commands.add_parser("explain", help="which backend and kernels a call gets, and why")
    command.add_argument("shape", type=shape, help="NxCxHxW, for example 64x256x56x56")
    add_call(command, "a torch device type, or sm_90 and so on", (*ORDERS, "none"))
    command.add_argument(
        "--tail",
        choices=MODES,
        help="of relu(attention(norm(u)) + shortcut), in which mode; without attention by "
        "--order none",
    )
    command.add_argument(
        "--no-shortcut", dest="shortcut", action="store_false", help="of a tail without one"
    )
    command.add_argument(
        "--shortcut-norm",
        choices=STATISTICS,
        help="of a tail whose shortcut goes through a norm, by whose statistics",
    )
    command.add_argument("--backend", default="auto")
    command.add_argument("--json", action="store_true", help="print JSON")
    command.set_defaults(run=_explain)


def add_call(
    command: argparse.ArgumentParser, device: str, orders: tuple[str, ...] = ORDERS
) -> None:
    """Declare what there is to a call besides its shape; `device` says what may be named there."""
    command.add_argument("--dtype", choices=_DTYPES, default="float32")
    command.add_argument("--layout", choices=tuple(LAYOUTS), default="contiguous")
    command.add_argument("--device", default="cpu", help=device)
    command.add_argument("--order", choices=orders, default="spatial_channel")
    command.add_argument("--gate", choices=GATES, default="affine")


def _explain(args: argparse.Namespace) -> int:
    architecture = args.device if args.device.startswith("sm_") else None
    x = _untouched(args, "meta" if architecture else args.device)
    answer = explain(
        x,
        order=args.order,
        gate=args.gate,
        backend=args.backend,
        device=architecture,
        tail=args.tail,
        shortcut=args.shortcut,
        shortcut_norm=args.shortcut_norm,
    )
    print(answer.to_json() if args.json else answer)
    return 0


def _untouched(args: argparse.Namespace, device: str) -> torch.Tensor:
    """Such an x, never touched, and so never really allocated; ValueError where there can be none.

    What torch says of a device that it cannot use is an AssertionError, or goes on for pages.
    """
    try:
        return torch.empty(
            args.shape,
            dtype=getattr(torch, args.dtype),
            device=device,
            memory_format=LAYOUTS[args.layout],
        )
    except (AssertionError, RuntimeError) as error:
        said = textwrap.shorten(str(error).partition("\n")[0], 200, placeholder=" ...")
        raise ValueError(
            "explain: expected --device cpu, cuda or another on which torch can make the tensor, or"
            f" an architecture such as sm_90; got {device!r}: {said}"
        ) from None


def shape(text: str) -> tuple[int, ...]:
    """NxCxHxW as numbers."""
    sizes = tuple(int(part) for part in text.split("x") if part.isdecimal())
    if len(sizes) != 4 or len(text.split("x")) != 4 or min(sizes[1:]) < 1:
        raise argparse.ArgumentTypeError(
            f"expected NxCxHxW, for example 64x256x56x56, got {text!r}"
        )
    if math.prod(sizes) > _MOST:
        raise argparse.ArgumentTypeError(
            f"expected NxCxHxW of at most {_MOST} elements, got {text!r}"
        )
    return sizes
