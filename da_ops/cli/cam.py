"""``cam``: where networks with and without attention look, side by side."""

from __future__ import annotations

import argparse
from pathlib import Path

from .files import check_file


def add(commands: argparse._SubParsersAction) -> None:
    """Declare the command."""
    command = commands.add_parser(
        "cam",
        help="draw where networks look (Grad-CAM), plain beside DA",
        description="Draw Grad-CAM of images, a row each: the image, then what the plain network"
        " looks at, then the one with DA. A network is the folder of a run, a checkpoint of"
        " `train`, or weights of an ImageNet ResNet: a file or a name of torchvision's.",
    )
    command.add_argument("images", type=Path, nargs="+", help="image files")
    command.add_argument("--out", type=Path, required=True, help="PNG to write")
    command.add_argument("--plain", metavar="NETWORK", help="the network without attention")
    command.add_argument("--da", metavar="NETWORK", help="the network with DA")
    command.add_argument(
        "--backbone", default="resnet50", help="of classifier weights (default: resnet50)"
    )
    command.add_argument(
        "--label",
        help="class to look for, by name or number; default: for each image the one that the first"
        " network is surest of",
    )
    command.set_defaults(run=_cam)


def _cam(args: argparse.Namespace) -> int:
    from ..detection.figures import draw_comparison, load_network

    check_file("--out", args.out)
    given = ((args.plain, None), (args.da, "da"))
    networks = [load_network(name, args.backbone, kind) for name, kind in given if name]
    if not networks:
        raise ValueError("cam: expected --plain or --da or both, got neither")
    draw_comparison(args.images, networks, args.out, label=args.label)
    print(f"drawn: {args.out}")
    return 0
