from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks import environment, files
from benchmarks import gpu as package
from benchmarks.gpu import parts, results, run


def main(arguments: list[str] | None = None) -> int:
    """The exit status: 0 if no part failed, 1 if one did, 2 without a GPU, 130 when interrupted."""
    kind = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        "python -m benchmarks.gpu", description=package.__doc__, formatter_class=kind
    )
    add = parser.add_argument
    add("--budget", type=float, default=parts.BUDGET, help="seconds in all")
    add("--preset", choices=("quick", "full"), default="quick", help="of tests and benchmarks")
    add("--out", metavar="FOLDER", help="results")
    add("--only", choices=environment.GPU_PARTS, metavar="PART", action="append")
    options = parser.parse_args(arguments)
    import torch

    if not torch.cuda.is_available():
        print("benchmarks.gpu: torch finds no GPU here; nothing was run", file=sys.stderr)
        return 2
    folder = environment.LOCAL if options.only else environment.COMMITTED
    folders = [Path(options.out) if options.out else folder]
    folders += [Path(os.environ["OUT"])] if os.environ.get("OUT") else []
    head = environment.head("gpu", "cuda", options.preset)
    outcomes: Sequence[run.Outcome] = []
    status = 0
    with tempfile.TemporaryDirectory() as name, environment.terminable():
        scratch = Path(name)
        todo = parts.parts(options.preset, scratch)
        if options.only:
            todo = [part for part in todo if part.name in options.only]

        def save(until_now: Sequence[run.Outcome]) -> None:
            nonlocal outcomes
            outcomes = until_now
            written = results.results(until_now, head, scratch)
            results.write(written, folders, scratch)
            if until_now[-1].name in files.KINDS and until_now[-1].note != run.UNFINISHED:
                results.draw(written, folders)

        try:
            run.run_all(todo, options.budget, scratch, save)
        except KeyboardInterrupt:
            print("\nbenchmarks.gpu: interrupted; what was done until then is written")
            status = 128 + signal.SIGINT
    print(f"\n{results.table(outcomes)}")
    for folder in folders:
        print(f"results: {files.shown(folder)}", flush=True)
    return status or int(any(o.status == "failed" for o in outcomes))


if __name__ == "__main__":
    sys.exit(main())
