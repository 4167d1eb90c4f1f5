"""``info``: versions, what was built, which backends are usable."""

from __future__ import annotations

import argparse
import json
import platform
from typing import Any

import torch

from .._version import __version__
from ..backends import backends, select, tuned
from ..backends.cuda import driver_version
from ..backends.native import build_record


def add(commands: argparse._SubParsersAction) -> None:
    """Declare the command."""
    text = "versions, what was built, which backends are usable"
    command = commands.add_parser("info", help=text, description=text)
    command.add_argument("--json", action="store_true", help="print JSON")
    command.set_defaults(run=_info)


def _info(args: argparse.Namespace) -> int:
    record = build_record()
    plans = tuned.PLANS.in_force().values()
    facts: dict[str, Any] = {
        "da_ops": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "driver": driver_version(),
        "backends": backends(),
        "auto_on_cpu": select("auto", "cpu"),
        "tuned": {
            "file": str(tuned.file()),
            "plans": len([plan for plan in plans if not plan.at_first_call]),
            "at_first_calls": len([plan for plan in plans if plan.at_first_call]),
        },
        "build": record or None,
    }
    if args.json:
        print(json.dumps(facts, indent=2))
        return 0
    print(f"da_ops {__version__}, torch {facts['torch']}, Python {facts['python']}")
    gpu = f"{facts['cuda']}, driver for CUDA {facts['driver']}" if facts["cuda"] else "none"
    print(f"{facts['machine']}, {facts['threads']} threads, GPU: {gpu}")
    print("backends, the best first:")
    for name, reason in facts["backends"].items():
        print(f"  {name:7s}{'usable' if reason is None else 'not usable: ' + reason}")
    print(f'"auto" takes {facts["auto_on_cpu"]!r} for tensors on the CPU')
    print(f"tuned plans: {facts['tuned']['plans']} known, from {facts['tuned']['file']}")
    if here := facts["tuned"]["at_first_calls"]:
        print(f"  and {here} of this process alone, by torch.backends.cudnn.benchmark")
    if not record:
        print("build: no record, the compiled parts were never built here")
        return 0
    print(f"build: {record['compiler'] or 'no compiler'}, against torch {record['torch']}")
    for part in ("cpu", "plan", "cuda"):
        reason = record[part]["reason"]
        print(f"  {part:7s}{'built' if reason is None else 'not built: ' + reason}")
    return 0
