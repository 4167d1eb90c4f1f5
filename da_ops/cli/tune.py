"""``tune``: times the plans that are possible for calls on this machine, keeps the fastest."""

from __future__ import annotations

import argparse
import json

import torch

from .. import tuning
from .explain import LAYOUTS, add_call, shape

_MOST_THREADS = 2**31 - 1  # that torch can count


def add(commands: argparse._SubParsersAction) -> None:
    """Declare the command."""
    text = "time the kernels' plans for calls on this machine, and use the fastest from then on"
    command = commands.add_parser("tune", help=text, description=text)
    command.add_argument("shapes", nargs="*", type=shape, metavar="NxCxHxW", help="16x256x56x56")
    add_call(command, "cpu or cuda")
    command.add_argument("--threads", type=int, help="of the CPU; by default as many as torch uses")
    command.add_argument("--forward-only", action="store_true", help="no backward pass")
    command.add_argument(
        "--seconds", type=float, default=10.0, help="of timing, for each direction of each shape"
    )
    command.add_argument("--dry", action="store_true", help="measure, and keep nothing")
    command.add_argument("--forget", action="store_true", help="first forget all that is kept")
    command.add_argument("--json", action="store_true", help="print JSON")
    command.set_defaults(run=_tune)


def _tune(args: argparse.Namespace) -> int:
    if not args.shapes and not args.forget:
        raise ValueError("tune: expected shapes such as 16x256x56x56, or --forget; got neither")
    if args.threads is not None:
        if not 1 <= args.threads <= _MOST_THREADS:
            raise ValueError(
                f"tune: --threads must be at least 1, and at most {_MOST_THREADS}; "
                f"got {args.threads}"
            )
        torch.set_num_threads(args.threads)
    if args.forget:
        tuning.forget()
    answers = [
        tuning.tune(
            one,
            dtype=getattr(torch, args.dtype),
            memory_format=LAYOUTS[args.layout],
            device=args.device,
            order=args.order,
            gate=args.gate,
            backward=not args.forward_only,
            seconds=args.seconds,
            save=not args.dry,
            told=None if args.json else lambda direction: print(direction, end="\n\n", flush=True),
        )
        for one in args.shapes
    ]
    if args.json:
        print(json.dumps([answer.to_dict() for answer in answers], indent=2))
    elif answers:
        print(tuning.kept(answers[-1].saved))
    return 0
