"""``make-data``: generated pictures in VOC's format."""

from __future__ import annotations

import argparse


def add(commands: argparse._SubParsersAction) -> None:
    """Declare the command."""
    text = "generated pictures with objects in VOC's format, to train and test detectors on"
    command = commands.add_parser("make-data", help=text, description=text)
    command.add_argument("out", help="folder to write; must not exist")
    command.add_argument("--train", type=int, default=2000, help="training pictures [%(default)s]")
    command.add_argument("--test", type=int, default=500, help="test pictures [%(default)s]")
    command.add_argument("--size", type=int, default=300, help="pixels a side [%(default)s]")
    command.add_argument("--seed", type=int, default=0, help="[%(default)s]")
    command.add_argument(
        "--min-scale",
        type=float,
        default=0.05,
        help="least side of an object, as a share of the picture's [%(default)s]",
    )
    command.add_argument(
        "--most-things",
        type=int,
        default=12,
        help="most objects and clutter in a picture, objects first [%(default)s]",
    )
    command.set_defaults(run=_make_data)


def _make_data(args: argparse.Namespace) -> int:
    from ..detection.synthetic import make_data

    names = ("train", "test", "size", "seed", "min_scale", "most_things")
    out = make_data(args.out, **{name: getattr(args, name) for name in names}, progress=True)
    print(f"{out}: {args.train} pictures for training, {args.test} for testing")
    return 0
