"""``eval``: average precision of a detector on a VOC tree."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from .files import check_file


def add(commands: argparse._SubParsersAction) -> None:
    """Declare the command."""
    text = "average precision of a detector on a VOC tree, class by class"
    command = commands.add_parser("eval", help=text, description=text)
    command.add_argument("checkpoint", type=Path, help="folder of a run, or a checkpoint in it")
    command.add_argument("data", type=Path, help="folder with VOC2007 in it")
    command.add_argument("--split", default="test", help="part of VOC2007 (default: test)")
    command.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    command.add_argument(
        "--plus-one",
        action="store_true",
        help="add 1 to widths and heights, as some evaluators do; boxes here end at the edges of"
        " pixels, and have VOC's own overlaps without it",
    )
    command.add_argument("--batch-size", type=int, default=32)
    command.add_argument("--workers", type=int, default=2, help="processes that load images")
    command.add_argument("--skip-bad", action="store_true", help="leave out unreadable images")
    command.set_defaults(run=_eval)


def _eval(args: argparse.Namespace) -> int:
    from ..detection.checkpoint import atomic, check_classes, load_detector
    from ..detection.distributed import join
    from ..detection.evaluation import evaluate
    from ..detection.training import evaluation_set
    from ..detection.voc import read_classes

    detector = load_detector(args.checkpoint)
    classes = read_classes(args.data)
    check_classes(classes, detector, args.data)
    dataset = evaluation_set(args.data, classes, split=args.split, skip_bad=args.skip_bad)
    if args.json:
        check_file("--json", args.json)
    with join() as world:
        found = evaluate(
            detector.model.to(world.device),
            dataset,
            classes,
            world,
            batch_size=args.batch_size,
            workers=args.workers,
            plus_one=args.plus_one,
            progress=True,
        )
        if not world.first:
            return 0
    width = max(map(len, (*classes, "mean")))
    print(f"{'':{width}}  11 points  all points   (average precision, percent)")
    for name in classes:
        print(f"{name:{width}}  {_percent(found['ap_11'][name])}  {_percent(found['ap'][name])}")
    print(f"{'mean':{width}}  {_percent(found['map_11'])}  {_percent(found['map'])}")
    if args.json:
        record = {
            "checkpoint": str(args.checkpoint),
            "step": detector.step,
            "settings": detector.settings.to_dict(),
            "split": args.split,
            "images": len(dataset),
            "plus_one": args.plus_one,
            **found,
        }
        with atomic(args.json) as file:
            file.write((json.dumps(record, indent=1) + "\n").encode())
    return 0


def _percent(value: float | None) -> str:
    """Nine columns; a class without an object has no precision."""
    return f"{'-':>9}" if value is None or value != value else f"{100 * value:9.1f}"
