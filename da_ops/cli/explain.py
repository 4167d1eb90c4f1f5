"""``explain``: which backend and kernels a call gets, and why."""

from __future__ import annotations

import argparse

import torch

from ..checks import check_options
from ..explain import explain
from ..reference import GATES, ORDERS

_DTYPES = ("float16", "bfloat16", "float32", "float64")
_LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def add(commands: argparse._SubParsersAction) -> None:
    """Declare the command."""
    command = commands.add_parser("explain", help="which backend and kernels a call gets, and why")
    command.add_argument("shape", type=_shape, help="NxCxHxW, for example 64x256x56x56")
    command.add_argument("--dtype", choices=_DTYPES, default="float32")
    command.add_argument("--layout", choices=tuple(_LAYOUTS), default="contiguous")
    command.add_argument("--device", default="cpu", help="a torch device type, or sm_90 and so on")
    command.add_argument("--order", choices=ORDERS, default="spatial_channel")
    command.add_argument("--gate", choices=GATES, default="affine")
    command.add_argument("--backend", default="auto")
    command.add_argument("--json", action="store_true", help="print JSON")
    command.set_defaults(run=_explain)


def _explain(args: argparse.Namespace) -> int:
    check_options(args.order, args.gate)
    # Never touched, and so never really allocated.
    architecture = args.device if args.device.startswith("sm_") else None
    x = torch.empty(
        args.shape,
        dtype=getattr(torch, args.dtype),
        device="meta" if architecture else args.device,
        memory_format=_LAYOUTS[args.layout],
    )
    answer = explain(x, order=args.order, gate=args.gate, backend=args.backend, device=architecture)
    print(answer.to_json() if args.json else answer)
    return 0


def _shape(text: str) -> tuple[int, ...]:
    sizes = tuple(int(part) for part in text.split("x") if part.isdecimal())
    if len(sizes) != 4 or len(text.split("x")) != 4 or min(sizes[1:]) < 1:
        raise argparse.ArgumentTypeError(
            f"expected NxCxHxW, for example 64x256x56x56, got {text!r}"
        )
    return sizes
