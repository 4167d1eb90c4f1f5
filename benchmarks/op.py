"""One layer: the fused one against eager PyTorch and torch.compile, measured in one run.

    python -m benchmarks.op [--preset quick|full] [--shapes 16x64x56x56,...] [--layouts ...] ...

Leave the machine alone meanwhile: how much other programs took is measured and shown, for ratios
from a busy machine flatter the fused layer.

For each shape and type, contenders in every layout take turns (see measure.py):
- inference: the forward pass without gradients
- training: forward, then all gradients (x and every parameter) from a random dy; both parts are
  also given alone
The input is random. Warm, the default, gives each call the same input, as a layer meets the
output of the one before it; but all contenders take turns, so what is larger than the last cache
comes from memory. Cold cycles through copies of the input, twice the last-level cache in all (four
times that of a GPU). On a GPU, times are those of CUDA events around calls that are launched one by
one, and again around replays of CUDA graphs that hold many.
Outputs are allocated in every call, as in use, from memory that the allocator has kept, as
jemalloc and tcmalloc do. glibc's default, --allocator system, returns some to the operating system,
and whoever allocates next pays for new pages: with large tensors more than the layer costs, and by
chance. The copy that the floor is taken from writes to memory it has written before. cuDNN computes
float32 convolutions in float32, not in TF32.

Before it is timed, each contender's y and gradients are compared with the formula in float64; one
that is wrong is shown as failed and not timed. Floor: the time to move 2 (inference), 5 (training)
or 3 (backward) times the bytes of x at the speed of a copy measured in the same rounds.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from tqdm import tqdm

from benchmarks import cases, environment, fused, layer, measure, report, rivals, summary, tables
from benchmarks.cases import DTYPES, LAYOUTS
from benchmarks.environment import BenchmarkError

TIMING: dict[str, dict[str, Any]] = {
    "quick": {"rounds": 60, "least": 5, "budget": 2.5},
    "full": {"rounds": 100, "least": 20, "budget": 40.0},
    "cuda": {"rounds": 100, "least": 20, "budget": 4.0, "sample_seconds": 3e-4},
}

SECONDS_HELP = "in all: what would take longer is left out, and named in the results"
ALLOCATOR_HELP = "keep what is freed for the next allocation (keep), or glibc's default (system)"


def contenders_for(options: argparse.Namespace) -> tuple[list[str], dict[str, str | None]]:
    """Names of all contenders on this device, and why the backends left out are not usable."""
    known = ["eager", *rivals.compile_names(options.device)]
    chosen = cases.choose("--rivals", options.rivals, known) if options.rivals else tuple(known)
    import da_ops

    reasons = da_ops.backends()
    if options.backends:
        wanted = cases.choose("--backends", options.backends, list(reasons))
    else:
        worth = fused.BACKENDS[options.device]
        wanted = tuple(b for b in worth if reasons.get(b, "unknown") is None)
    return [*chosen, *(name for backend in wanted for name in fused.names(backend))], reasons


def prepare(options: argparse.Namespace) -> None:
    """Set the number of threads and the allocator, and see that the device is there."""
    environment.compute_in_float32()
    if options.allocator == "keep":
        measure.keep_freed_memory()
    if options.threads is not None:
        if options.threads < 1:
            raise BenchmarkError(f"--threads: expected at least 1, got {options.threads}")
        torch.set_num_threads(options.threads)
    if options.device == "cuda" and not torch.cuda.is_available():
        raise BenchmarkError("--device cuda: torch finds no GPU here; use --device cpu")


def parser() -> argparse.ArgumentParser:
    kind = argparse.RawDescriptionHelpFormatter
    result = argparse.ArgumentParser(
        "python -m benchmarks.op", description=__doc__, formatter_class=kind
    )
    add = result.add_argument
    add("--preset", choices=("quick", "full"), default="quick")
    add("--shapes", help="NxCxHxW,... in place of the preset's")
    add("--dtypes", help=",".join(DTYPES))
    add("--layouts", help=",".join(LAYOUTS))
    add("--regimes", help=",".join(cases.REGIMES))
    add("--rivals", help="eager,compile,... (all)")
    add("--backends", help="backends of da_ops (all usable on the device)")
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--threads", type=int, help="CPU threads (as torch has them)")
    add("--allocator", choices=("keep", "system"), default="keep", help=ALLOCATOR_HELP)
    add("--budget", type=float, help="seconds at most per measurement, beyond a few rounds")
    add("--seconds", type=float, default=math.inf, help=SECONDS_HELP)
    add("--output", metavar="FILE", help="results, JSON; the chart lies beside it")
    return result


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure all cases; the results as they are written."""
    start, others = time.perf_counter(), environment.Others()
    todo = cases.from_options(options)
    contenders, reasons = contenders_for(options)
    timing = dict(TIMING["cuda" if options.device == "cuda" else options.preset])
    if options.budget is not None:
        timing["budget"] = options.budget
    records: list[dict[str, Any]] = []
    left_out: list[str] = []
    longest: dict[bool, float] = {}  # seconds of a case, with and without torch.compile
    threads = torch.get_num_threads()
    with tqdm(todo, unit="case", leave=False, disable=None) as bar:
        say = environment.announcer(bar)
        for case in bar:
            begun = time.perf_counter()
            if begun - start + longest.get(case.compile, 0.0) > options.seconds:
                left_out.append(str(case))
                continue
            names = [c for c in contenders if case.compile or not c.startswith("compile")]
            torch.set_num_threads(case.threads or threads)
            try:
                new = layer.measure_case(case, options.device, names, timing, say)
            finally:
                torch.set_num_threads(threads)
            longest[case.compile] = max(longest.get(case.compile, 0.0), time.perf_counter() - begun)
            records += new
            for record in new:
                bar.write(tables.case_line(record))
    summarised = summary.summarise(records, options.device)
    summarised["checks"].append(summary.quiet(others.percent(), others.LIMIT))
    return {
        **environment.head("op", options.device, options.preset),
        "seconds": time.perf_counter() - start,
        "timing": timing,
        "backends": reasons,
        "left_out": left_out,
        "cases": records,
        "summary": summarised,
    }


def command(
    kind: str, options: argparse.Namespace, run: Callable[[argparse.Namespace], dict[str, Any]]
) -> int:
    """Measure, write, show; the exit status: 1 where a check failed that must pass, 2 on misuse."""
    try:
        prepare(options)
        path = environment.results_file(kind, options.device, options.preset, options.output)
        results = run(options)
    except BenchmarkError as error:
        print(f"benchmarks.{kind}: {error}", file=sys.stderr)
        return 2
    environment.write_results(path, results)
    report.show(path)
    return 0 if all(c["passed"] for c in results["summary"]["checks"] if c["must"]) else 1


def main(arguments: list[str] | None = None) -> int:
    return command("op", parser().parse_args(arguments), run)


if __name__ == "__main__":
    sys.exit(main())
