"""``explain``: which backend and kernels a call gets, and why."""

from __future__ import annotations

import argparse

import torch

from ..backends.tail import MODES
from ..explain import explain
from ..reference import GATES, ORDERS

_DTYPES = ("float16", "bfloat16", "float32", "float64")
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
    # Never touched, and so never really allocated.
    architecture = args.device if args.device.startswith("sm_") else None
    x = torch.empty(
        args.shape,
        dtype=getattr(torch, args.dtype),
        device="meta" if architecture else args.device,
        memory_format=LAYOUTS[args.layout],
    )
    answer = explain(
        x,
        order=args.order,
        gate=args.gate,
        backend=args.backend,
        device=architecture,
        tail=args.tail,
        shortcut=args.shortcut,
    )
    print(answer.to_json() if args.json else answer)
    return 0


def shape(text: str) -> tuple[int, ...]:
    """NxCxHxW as numbers."""
    sizes = tuple(int(part) for part in text.split("x") if part.isdecimal())
    if len(sizes) != 4 or len(text.split("x")) != 4 or min(sizes[1:]) < 1:
        raise argparse.ArgumentTypeError(
            f"expected NxCxHxW, for example 64x256x56x56, got {text!r}"
        )
    return sizes
