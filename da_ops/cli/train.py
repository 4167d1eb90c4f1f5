"""``train``: a detector on a VOC tree."""

from __future__ import annotations

import argparse
import logging
import types
import typing
from dataclasses import fields
from pathlib import Path
from typing import Any

from ..detection.settings import Settings


def add(commands: argparse._SubParsersAction) -> None:
    """Declare the command: an option for each setting, and how to run."""
    command = commands.add_parser(
        "train",
        help="train a detector on a VOC tree",
        description="Train SSD on the trainval parts of a VOC tree. Defaults are SSD300's, as "
        "published. Start it with torchrun to share each step's images among several processes.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    command.add_argument("data", type=Path, help="folder with VOC2007 (and VOC2012) in it")
    command.add_argument("--out", type=Path, required=True, help="folder of the run")
    command.add_argument(
        "--resume", action="store_true", help="continue the run in --out, to the same result"
    )
    command.add_argument("--workers", type=_count, default=2, help="processes that load images")
    command.add_argument(
        "--eval-every", type=_count, default=0, help="steps between evaluations; 0: none"
    )
    command.add_argument(
        "--checkpoint-every", type=_count, default=1000, help="steps between checkpoints"
    )
    group = command.add_argument_group("settings")
    kinds = typing.get_type_hints(Settings)
    for setting in fields(Settings):
        names = ["--" + setting.name.replace("_", "-")]
        if setting.name == "steps":
            names.append("--iterations")
        group.add_argument(
            *names,
            dest=setting.name,
            default=setting.default,
            help=setting.metadata["help"],
            **_argument(kinds[setting.name], setting.metadata.get("choices")),
        )
    command.set_defaults(run=_train)


def _argument(kind: Any, choices: tuple[str, ...] | None) -> dict[str, Any]:
    """Options of argparse for a setting of this type."""
    if kind is bool:
        return {"action": argparse.BooleanOptionalAction}
    if isinstance(kind, types.UnionType):  # X | None
        kind = typing.get_args(kind)[0]
    if typing.get_origin(kind) is tuple:
        return {"type": typing.get_args(kind)[0], "nargs": "*"}
    return {"type": kind, "choices": choices}


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected a number of at least 0, got {text!r}")
    return int(text)


def _train(args: argparse.Namespace) -> int:
    from ..detection.checkpoint import CONFIG, LAST
    from ..detection.training import train

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    given = {setting.name: getattr(args, setting.name) for setting in fields(Settings)}
    if given["milestones"] is not None:
        given["milestones"] = tuple(given["milestones"])
    try:
        train(
            args.data,
            args.out,
            Settings(**given),
            resume=args.resume,
            workers=args.workers,
            eval_every=args.eval_every,
            checkpoint_every=args.checkpoint_every,
        )
    except KeyboardInterrupt:
        if (args.out / LAST).exists():
            told = f"the newest checkpoint is {args.out / LAST}; --resume goes on from there"
        elif (args.out / CONFIG).exists():
            told = f"{args.out} has no checkpoint yet; --resume starts the run again in it"
        else:
            told = f"before anything was written to {args.out}; start the run again"
        raise KeyboardInterrupt(f"{told}, with the same command otherwise") from None
    return 0
