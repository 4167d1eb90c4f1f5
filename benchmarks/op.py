"""One layer, and the tail of a residual block: fused, eager and torch.compile, measured in one run.

    python -m benchmarks.op [--preset quick|full] [--shapes 16x64x56x56,...] [--layouts ...] ...

Leave the machine alone meanwhile: how much other programs took is measured and shown, for ratios
from a busy machine flatter the fused layer.

For each shape and type, contenders in every layout take turns (see measure.py):
- inference: the forward pass without gradients
- training: forward, then all gradients (x and every parameter) from a random dy; both parts are
  also given alone
The tail is batch norm, attention, shortcut and ReLU (--subjects tail). Its rivals are the same
modules, with attention and without, and the fused tail without attention takes part, too. In
inference the norm takes its running statistics, in training those of the batch; training then also
gives the gradients of the shortcut and of the norm's parameters.

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

Results are written after every case: a run that is interrupted leaves those before it. On a GPU
"quick" measures torch.compile (less its slowest mode) and Triton at two shapes only, for they are
compiled for each.

Before it is timed, each contender's y and gradients (and running statistics) are compared with the
formula in float64; one that is wrong is shown as failed and not timed. Floor: the time to move 2
(inference), 5 (training) or 3 (backward) times the bytes of x, for a tail 3, 11 or 7 times, at the
speed of a copy measured in the same rounds.
"""

from __future__ import annotations

import argparse
import math
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks import (
    cases,
    checks,
    environment,
    fused,
    layer,
    measure,
    report,
    rivals,
    summary,
    tables,
    tally,
)
from benchmarks.cases import DTYPES, LAYOUTS
from benchmarks.environment import BenchmarkError

Save = Callable[[dict[str, Any]], None]  # of results as they are until now

TIMING: dict[str, dict[str, Any]] = {
    "quick": {"rounds": 60, "least": 5, "budget": 2.5},
    "full": {"rounds": 100, "least": 20, "budget": 40.0},
    "cuda": {"rounds": 100, "least": 20, "budget": 1.5, "sample_seconds": 3e-4},
}

# The estimate for a case with contenders that are compiled for it, until one was measured.
COMPILING = {"cpu": 0.0, "cuda": 45.0}

DEVICE_HELP = "the GPU if torch finds one, else the CPU"
SECONDS_HELP = "in all: what would take longer is left out, and named in the results"
ALLOCATOR_HELP = "keep what is freed for the next allocation (keep), or glibc's default (system)"


def contenders_for(options: argparse.Namespace) -> tuple[list[str], dict[str, str | None]]:
    """Names of all contenders on this device, and why the backends left out are not usable."""
    known = ["eager", *rivals.compile_names(options.device)]
    chosen = tuple(name for name in known if options.preset == "full" or name != rivals.SLOW)
    if options.rivals is not None:
        chosen = cases.choose("--rivals", options.rivals, known)
    import da_ops

    reasons = da_ops.backends()
    if options.backends is not None:
        wanted = cases.choose("--backends", options.backends, list(reasons))
    else:
        worth = fused.BACKENDS[options.device]
        wanted = tuple(b for b in worth if reasons.get(b, "unknown") is None)
    return [*chosen, *(name for backend in wanted for name in fused.names(backend))], reasons


def compiles(contender: str) -> bool:
    """Whether it is compiled for every shape and type."""
    return (
        contender.removeprefix(summary.PLAIN).startswith("compile")
        or fused.parts(contender)[0] == "triton"
    )


def prepare(options: argparse.Namespace) -> None:
    """Choose the device, set the number of threads and the allocator."""
    environment.compute_in_float32()
    if options.allocator == "keep":
        measure.keep_freed_memory()
    if options.threads is not None:
        if options.threads < 1:
            raise BenchmarkError(f"--threads: expected at least 1, got {options.threads}")
        torch.set_num_threads(options.threads)
    if options.budget is not None and not options.budget >= 0:  # nor nan
        raise BenchmarkError(f"--budget: expected at least 0, got {options.budget:g}")
    if not options.seconds > 0:
        raise BenchmarkError(f"--seconds: expected more than 0, got {options.seconds:g}")
    there = torch.cuda.is_available()
    options.device = options.device or ("cuda" if there else "cpu")
    if options.device == "cuda" and not there:
        raise BenchmarkError("--device cuda: torch finds no GPU here; use --device cpu")


def parser() -> argparse.ArgumentParser:
    kind = argparse.RawDescriptionHelpFormatter
    result = argparse.ArgumentParser(
        "python -m benchmarks.op", description=__doc__, formatter_class=kind
    )
    add = result.add_argument
    add("--preset", choices=("quick", "full"), default="quick")
    add("--subjects", help=f"{','.join(cases.ASKED)} (both)")
    add("--shapes", help="NxCxHxW,... in place of the preset's")
    add("--dtypes", help=",".join(DTYPES))
    add("--layouts", help=",".join(LAYOUTS))
    add("--regimes", help=",".join(cases.REGIMES))
    add("--rivals", help="eager,compile,... (all)")
    add("--backends", help="backends of da_ops (all usable on the device)")
    add("--device", choices=("cpu", "cuda"), help=DEVICE_HELP)
    add("--threads", type=int, help="CPU threads (as torch has them)")
    add("--allocator", choices=("keep", "system"), default="keep", help=ALLOCATOR_HELP)
    add("--budget", type=float, help="seconds at most per measurement, beyond a few rounds")
    add("--seconds", type=float, default=math.inf, help=SECONDS_HELP)
    add("--output", metavar="FILE", help="results, JSON; the chart lies beside it")
    return result


def labels(todo: list[cases.Case]) -> list[str]:
    """Each case by name; one that comes again does so beside all contenders."""
    names = [str(case) for case in todo]
    again = ", torch.compile and Triton"
    return [name + again if name in names[:i] else name for i, name in enumerate(names)]


def merged(records: list[dict[str, Any]], new: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The records with those of a case that was just measured, in the place of its earlier ones."""
    keys = ("shape", "dtype", "role", "threads")
    same = [all(record[key] == new[0][key] for key in keys) for record in records]
    at = same.index(True) if any(same) else len(records)
    kept = [record for record, it_is in zip(records, same, strict=True) if not it_is]
    return kept[:at] + new + kept[at:]


def run(options: argparse.Namespace, save: Save) -> dict[str, Any]:
    """Measure all cases; the results as they are written. `save` gets them after every case."""
    start, others = time.perf_counter(), environment.Others()
    todo = cases.from_options(options)
    contenders, reasons = contenders_for(options)
    timing = dict(TIMING["cuda" if options.device == "cuda" else options.preset])
    if options.budget is not None:
        timing["budget"] = options.budget
    head = environment.head("op", options.device, options.preset)
    records: list[dict[str, Any]] = []
    left_out = labels(todo)  # until it is measured
    counted = tally.Tally(of=len(todo))
    longest = {True: COMPILING[options.device], False: 0.0}  # seconds of a case that compiles
    threads = torch.get_num_threads()

    def results() -> dict[str, Any]:
        summarised = checks.summarise(records, options.device)
        summarised["checks"].append(checks.quiet(others.percent(), others.LIMIT))
        return {
            **head,
            "seconds": time.perf_counter() - start,
            "timing": timing,
            "backends": reasons,
            "left_out": left_out,
            "cases": records,
            "summary": summarised,
        }

    with tqdm(list(zip(todo, labels(todo))), unit="case", leave=False, disable=None) as bar:
        say = environment.announcer(bar)
        for case, label in bar:
            begun = time.perf_counter()
            names = [c for c in contenders if case.compiled or not compiles(c)]
            compiling = any(map(compiles, names))
            if begun - start + longest[compiling] > options.seconds:
                continue
            torch.set_num_threads(case.threads or threads)
            try:
                new = layer.measure_case(case, options.device, names, timing, say)
            finally:
                torch.set_num_threads(threads)
            longest[compiling] = max(longest[compiling], time.perf_counter() - begun)
            records = merged(records, new)
            left_out.remove(label)
            for record in new:
                bar.write(tables.case_line(record))
            wrong = any(
                r["status"] == "failed" and summary.is_fused(r["rival"])
                for record in new
                for r in record["results"]
            )
            counted.add("failed" if wrong else "passed")
            save(results())
    return results()


def command(
    kind: str,
    options: argparse.Namespace,
    run: Callable[[argparse.Namespace, Save], dict[str, Any]],
) -> int:
    """Measure, write, show; the exit status: 1 where a check failed that must pass, 2 on misuse,
    130 when interrupted, after what was measured until then was shown."""
    written: list[Path] = []

    def save(results: dict[str, Any]) -> None:
        environment.write_results(path, results)
        written[:] = [path]

    try:
        prepare(options)
        path = environment.results_file(kind, options.device, options.preset, options.output)
        with environment.terminable():
            results = run(options, save)
    except BenchmarkError as error:
        print(f"benchmarks.{kind}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"benchmarks.{kind}: interrupted; what was measured until then:", file=sys.stderr)
        for path in written:
            report.show(path)
        return 128 + signal.SIGINT
    save(results)
    report.show(path)
    return 0 if all(c["passed"] for c in results["summary"]["checks"] if c["must"]) else 1


def main(arguments: list[str] | None = None) -> int:
    return command("op", parser().parse_args(arguments), run)


if __name__ == "__main__":
    sys.exit(main())
