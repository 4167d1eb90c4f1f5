"""Tables and charts, from results files and from nothing else.

python -m benchmarks.report           tables and charts of the newest results
python -m benchmarks.report --write   and the blocks of README.md and docs/benchmarks.md, of the
                                      committed ones
python -m benchmarks.report --check   exit 1 if the blocks are not what these generate
python -m benchmarks.report --check --device NAME
                                      exit 1 unless `make gpu` passed there, with today's kernel
                                      sources: H100, H200, any part of a GPU's name, or its results
                                      file
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from benchmarks import environment, pages, tables
from benchmarks.cases import TAILS
from benchmarks.environment import BenchmarkError
from benchmarks.files import KINDS, doubts, faults, load, load_folder, named, newest, shown
from benchmarks.pages import CHECK_HEADER, PART_HEADER, part_rows
from benchmarks.tables import Results


def check_device(folder: Path, wanted: str) -> int:
    """0 if all results of GPUs of this name count; else print why not."""
    status = 0
    for name, gpu in named(folder, wanted).items():
        if found := faults(gpu):
            print(f"benchmarks.report: {name}: {'; '.join(found)}", file=sys.stderr)
            status = 1
        else:
            print(f"{name}: passed\n{tables.plain_table(PART_HEADER, part_rows(gpu))}")
    return status


def text(results: Results) -> str:
    """What the terminal shows of one results file."""
    lines = ["", tables.device_line(results)]
    lines += [f"NOTE: {doubt}" for doubt in doubts(results)]
    if results["kind"] == "gpu":
        lines += [f"NOTE: {fault}" for fault in faults(results)]
        return "\n".join([*lines, tables.plain_table(PART_HEADER, part_rows(results))])
    if results["kind"] == "op":
        sections = tables.sections(results)
        if not sections:
            lines += ["", f"no fused layer was measured; backends: {results['backends']}"]
        for section in sections:
            lines += ["", section.title, tables.plain_table(section.header, section.table)]
        lines.append("  (in brackets: against the rival in the layout that suits it better)")
        if any(section.role in TAILS for section in sections):
            lines.append(f"  ({pages.TAIL_NOTE})")
        if memory := tables.memory_rows(results):
            lines += ["", tables.plain_table(tables.MEMORY_HEADER, memory)]
        lost = tables.loss_lines(results)
        lines += ["", "Slower than a rival: " + ("nowhere" if not lost else f"{len(lost)} case(s)")]
        lines += [f"  {line}" for line in lost]
        if left_out := results.get("left_out"):
            lines += ["", "Not measured, for want of time: " + ", ".join(left_out)]
    else:
        made = (tables.plain_table(header, rows) for header, rows in tables.network_tables(results))
        lines += ["", tables.network_title(results), "\n\n".join(made)]
        lines += [f"  {line}" for line in tables.graph_lines(results)]
    lines += ["", tables.plain_table(CHECK_HEADER, tables.check_lines(results), left=4)]
    return "\n".join(lines)


def show(path: Path) -> None:
    """Print one results file's tables, draw its device's chart, say where both lie."""
    results = load(path)
    print(text(results))
    device = path.name.removesuffix(".json").removesuffix(f"-{results['kind']}")
    together = {results["kind"]: results}
    for kind in KINDS:
        other = path.with_name(f"{device}-{kind}.json")
        if kind not in together and other != path and other.exists():
            together[kind] = load(other)
    chart = draw(together, path.with_name(f"{device}.png"))
    print(f"\nresults: {shown(path)}" + (f"\nchart:   {shown(chart)}" if chart else ""))


def draw(together: dict[str, Results], path: Path) -> Path | None:
    """The chart of one device; None, with a word about it, where it cannot be drawn."""
    try:
        from benchmarks import charts
    except ImportError as error:
        print(f"no chart: {error}; pip install 'da-ops[bench]'")
        return None
    return path if charts.draw(together, path) else None


def renew(folder: Path, paths: list[Path], check: bool) -> int:
    """Write the blocks of these pages, or say which are not as they would be written."""
    status = 0
    for path in paths:
        old, new = pages.renewed(path, folder)
        if not check:
            environment.write_atomically(path, new)
        elif new != old:
            print(
                f"benchmarks.report: {shown(path)}: the blocks between its markers are not what"
                f" {shown(folder)} generates; run {pages.COMMAND}",
                file=sys.stderr,
            )
            status = 1
    return status


def run(options: argparse.Namespace) -> int:
    if options.device:
        if not options.check:
            raise BenchmarkError("--device: expected together with --check, got it alone")
        try:
            return check_device(Path(options.results or environment.COMMITTED), options.device)
        except BenchmarkError as error:
            print(f"benchmarks.report: {error}", file=sys.stderr)
            return 1
    if options.check or options.write:
        folder = Path(options.results or environment.COMMITTED)
        status = renew(folder, options.page or pages.PAGES, options.check)
        if options.check:
            return status
    else:
        folder = Path(options.results or newest([environment.COMMITTED, environment.LOCAL]))
    devices = load_folder(folder)
    if not devices:
        raise BenchmarkError(f"{folder}: expected results files, got none; run make bench")
    for device, together in devices.items():
        for results in together.values():
            print(text(results))
        if chart := draw(together, folder / f"{device}.png"):
            print(f"\nresults: {shown(folder)}\nchart:   {shown(chart)}")
    return 0


def main(arguments: list[str] | None = None) -> int:
    kind = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        "python -m benchmarks.report", description=__doc__, formatter_class=kind
    )
    parser.add_argument("--results", help="folder of results files")
    parser.add_argument("--write", action="store_true", help="write the blocks of the pages")
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit 1 if they are old"
    )
    parser.add_argument(
        "--page", action="append", type=Path, help="in place of README.md and docs/benchmarks.md"
    )
    parser.add_argument(
        "--device", metavar="NAME", help="with --check: a GPU's name, part of it, its results file"
    )
    try:
        return run(parser.parse_args(arguments))
    except BenchmarkError as error:
        print(f"benchmarks.report: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
