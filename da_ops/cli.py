"""``python -m da_ops``: what is installed, and what a call will do."""

from __future__ import annotations

import argparse
import json
import platform
import sys
from typing import Any

import torch

from ._version import __version__
from .backends import backends, select
from .backends.native import build_record
from .checks import check_options
from .explain import explain
from .reference import GATES, ORDERS

_DTYPES = ("float16", "bfloat16", "float32", "float64")
_LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="da-ops", description="DA attention layer: information about this installation."
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="command")

    info = commands.add_parser("info", help="versions, what was built, which backends are usable")
    info.set_defaults(run=_info)

    plan = commands.add_parser("explain", help="which backend and kernels a call gets, and why")
    plan.add_argument("shape", type=_shape, help="NxCxHxW, for example 64x256x56x56")
    plan.add_argument("--dtype", choices=_DTYPES, default="float32")
    plan.add_argument("--layout", choices=tuple(_LAYOUTS), default="contiguous")
    plan.add_argument("--device", default="cpu", help="a torch device type, or sm_90 and the like")
    plan.add_argument("--order", choices=ORDERS, default="spatial_channel")
    plan.add_argument("--gate", choices=GATES, default="affine")
    plan.add_argument("--backend", default="auto")
    plan.set_defaults(run=_explain)

    for command in (info, plan):
        command.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args(argv)
    try:
        return int(args.run(args))
    except (RuntimeError, ValueError) as error:
        print(f"da-ops: {error}", file=sys.stderr)
        return 1


def _info(args: argparse.Namespace) -> int:
    record = build_record()
    facts: dict[str, Any] = {
        "da_ops": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "backends": backends(),
        "auto_on_cpu": select("auto", "cpu"),
        "build": record or None,
    }
    if args.json:
        print(json.dumps(facts, indent=2))
        return 0
    print(f"da_ops {__version__}, torch {facts['torch']}, Python {facts['python']}")
    print(f"{facts['machine']}, {facts['threads']} threads, GPU: {facts['cuda'] or 'none'}")
    print("backends, the best first:")
    for name, reason in facts["backends"].items():
        print(f"  {name:7s}{'usable' if reason is None else 'not usable: ' + reason}")
    print(f'"auto" takes {facts["auto_on_cpu"]!r} for tensors on the CPU')
    if not record:
        print("build: no record, the compiled parts were never built here")
        return 0
    print(f"build: {record['compiler'] or 'no compiler'}, against torch {record['torch']}")
    for part in ("cpu", "plan", "cuda"):
        reason = record[part]["reason"]
        print(f"  {part:7s}{'built' if reason is None else 'not built: ' + reason}")
    return 0


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
