"""Tables, charts and the README block, from results files and from nothing else.

python -m benchmarks.report                      tables and charts of the newest results
python -m benchmarks.report --readme README.md   and the block of the committed ones
python -m benchmarks.report --check              exit 1 if the block is not what they generate
python -m benchmarks.report --check --device NAME
                                 exit 1 unless `make gpu` passed there, with today's kernel sources:
                                 H100, H200, any part of a GPU's name, or its results file
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from benchmarks import environment, tables
from benchmarks.cases import TAILS
from benchmarks.environment import BenchmarkError
from benchmarks.tables import Results

BEGIN, END = "<!-- benchmarks:begin -->", "<!-- benchmarks:end -->"
KINDS = ("op", "network")
ABLATION = "ablation"  # whose block benchmarks.paper.ablation writes
NO_GPU = "No GPU results are committed yet: `make gpu` tests and measures on a machine with a GPU."
TAIL_NOTE = (
    "batch norm, attention, shortcut and ReLU of a residual block; its rivals are the same modules"
    " with attention, and without"
)
PART_HEADER = ["part", "result", "passed", "failed", "skipped", "of", "seconds"]
CHECK_HEADER = ["target", "what", "found", "expected"]


def load(path: Path) -> Results:
    """One results file."""
    return environment.read_results(path, *KINDS, "gpu")


def load_folder(folder: Path) -> dict[str, dict[str, Results]]:
    """All results of a folder by device: {"amd-epyc": {"op": ..., "network": ...}}. Those of `make
    gpu` are {"nvidia-h200": {"gpu": ..., "op": ..., "network": ...}}."""
    found: dict[str, dict[str, Results]] = {}
    for kind in KINDS:
        for path in sorted(folder.glob(f"*-{kind}.json")):
            found.setdefault(path.name.removesuffix(f"-{kind}.json"), {})[kind] = load(path)
    for path in sorted(folder.glob("*.json")):
        if not path.stem.endswith(tuple(f"-{kind}" for kind in (*KINDS, ABLATION))):
            gpu = load(path)
            found[path.stem] = {"gpu": gpu, **{kind: gpu[kind] for kind in KINDS if kind in gpu}}
    return dict(sorted(found.items()))


def faults(gpu: Results) -> list[str]:
    """Why the results of a GPU do not count, if they do not. A part that was cut counts as what it
    did until then."""
    parts = {part["name"]: part for part in gpu.get("parts", [])}
    found = []
    for name in environment.GPU_PARTS:
        part = parts.get(name)
        if part is None:
            found.append(f"part {name!r} was not run")
        elif part["status"] == "skipped":
            found.append(f"part {name!r} was skipped" + (f" ({n})" if (n := part["note"]) else ""))
        elif part["status"] == "failed" or part["failed"]:
            found.append(f"part {name!r} failed")
        elif not part["passed"]:
            found.append(f"part {name!r} was cut before anything passed")
    found += [f"no results of {kind!r}" for kind in KINDS if kind not in gpu]
    return found + ([doubt] if (doubt := tables.stale(gpu)) else [])


def named(folder: Path, wanted: str) -> dict[str, Results]:
    """The results of GPUs of this name, or with it in theirs, or the file of this name."""
    path = Path(wanted)
    if path.suffix == ".json":
        results = load(path)
        if results["kind"] != "gpu":
            raise BenchmarkError(
                f"{path}: expected results of make gpu, got those of {results['kind']!r}"
            )
        return {shown(path): results}
    devices = load_folder(folder)
    gpus = {name: together["gpu"] for name, together in devices.items() if "gpu" in together}
    exact = {name: gpu for name, gpu in gpus.items() if name == environment.slug(wanted)}
    found = exact or {n: gpu for n, gpu in gpus.items() if environment.slug(wanted) in n}
    if not found:
        there = f"there are those of {', '.join(gpus)}" if gpus else "there are those of no GPU"
        raise BenchmarkError(
            f"{shown(folder)} has no results of a GPU named {wanted!r}, {there}: run make gpu on"
            " that machine, or name a results file of it"
        )
    return found


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


def doubts(results: Results) -> list[str]:
    """What speaks against these results."""
    return [doubt for doubt in (tables.stale(results), tables.disturbed(results)) if doubt]


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
            lines.append(f"  ({TAIL_NOTE})")
        if memory := tables.memory_rows(results):
            lines += ["", tables.plain_table(tables.MEMORY_HEADER, memory)]
        lost = tables.loss_lines(results)
        lines += ["", "Slower than a rival: " + ("nowhere" if not lost else f"{len(lost)} case(s)")]
        lines += [f"  {line}" for line in lost]
        if left_out := results.get("left_out"):
            lines += ["", "Not measured, for want of time: " + ", ".join(left_out)]
    else:
        lines += [
            "",
            tables.network_title(results),
            tables.plain_table(tables.network_header(results), tables.network_rows(results)),
        ]
    lines += ["", tables.plain_table(CHECK_HEADER, tables.check_lines(results), left=4)]
    return "\n".join(lines)


def part_rows(gpu: Results) -> list[list[str]]:
    return [
        [
            *(part["name"], part["status"]),
            *(str(part[key]) for key in ("passed", "failed", "skipped")),
            str(part["of"] or "-"),
            f"{part['seconds']:.0f}",
        ]
        for part in gpu["parts"]
    ]


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


def shown(path: Path) -> str:
    """A path as short as it can be named from here."""
    try:
        return str(path.resolve().relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def draw(together: dict[str, Results], path: Path) -> Path | None:
    """The chart of one device; None, with a word about it, where it cannot be drawn."""
    try:
        from benchmarks import charts
    except ImportError as error:
        print(f"no chart: {error}; pip install 'da-ops[bench]'")
        return None
    return path if charts.draw(together, path) else None


def block(folder: Path, readme: Path) -> str:
    """The README's text between the markers, markers included."""
    lines = [BEGIN, "<!-- written by `python -m benchmarks.report --readme README.md` -->"]
    devices = load_folder(folder)
    if not devices:
        lines += ["", "No results yet: `make bench-full` measures them."]
    gpus = [together["gpu"] for together in devices.values() if "gpu" in together]
    for device, together in devices.items():
        # Times of a GPU count if its results were also tested, and all went well.
        on_gpu = any(r["device"]["kind"] == "cuda" for r in together.values())
        if on_gpu and ("gpu" not in together or faults(together["gpu"])):
            continue
        lines += device_block(together, os.path.relpath(folder / f"{device}.png", readme.parent))
    lines += [
        f"\nResults of {gpu['device']['name']} are left out: {'; '.join(found)}."
        for gpu in gpus
        if (found := faults(gpu))
    ]
    lines += [] if gpus else ["", NO_GPU]
    return "\n".join([*lines, END])


def device_block(together: dict[str, Results], chart: str) -> list[str]:
    first = next(iter(together.values()))
    lines = ["", f"### {first['device']['name']}", "", f"![speed-ups]({Path(chart).as_posix()})"]
    if "op" in together:
        results = together["op"]
        lines += ["", f"One layer. {tables.device_line(results)}. `{results['command']}`"]
        lines += [f"\n**Note: {doubt}.**" for doubt in doubts(results)]
        lines += ["", "In brackets: against the rival in the layout that suits it better."]
        sections = tables.sections(results)
        lines += [] if sections else ["", "No fused backend was measured."]
        shown = [s for i, s in enumerate(sections) if i == 0 or s.role == "tail"]
        lines += [f"\nTail: {TAIL_NOTE}."] if len(shown) > 1 else []
        for section in shown:
            lines += section_lines(section)
        if memory := tables.memory_rows(results):
            lines += ["", tables.markdown_table(tables.MEMORY_HEADER, memory)]
        lost = tables.loss_lines(results)
        lines += ["", f"Slower than a rival: {'; '.join(lost) if lost else 'nowhere'}."]
        if more := [section for section in sections if section not in shown]:
            lines += ["", "<details><summary>All other shapes</summary>"]
            for section in more:
                lines += section_lines(section)
            lines += ["", "</details>"]
    if "network" in together:
        results = together["network"]
        source = f"{tables.device_line(results)}. `{results['command']}`"
        lines += ["", f"{tables.network_title(results)}. {source}"]
        lines += [f"\n**Note: {doubt}.**" for doubt in doubts(results)]
        head, rows = tables.network_header(results), tables.network_rows(results)
        lines += ["", tables.markdown_table(head, rows)]
    if "gpu" in together:
        rows = part_rows(together["gpu"])
        lines += ["", "`make gpu`:", "", tables.markdown_table(PART_HEADER, rows)]
    measured = [together[kind] for kind in KINDS if kind in together]
    checks = [line for results in measured for line in tables.check_lines(results)]
    return [*lines, "", tables.markdown_table(CHECK_HEADER, checks, left=4)]


def section_lines(section: tables.Section) -> list[str]:
    table = tables.markdown_table(section.header, section.table)
    return ["", f"**{section.title}**", "", table]


def with_block(old: str, new: str, readme: Path) -> str:
    """The README with the block between its markers, those of `new`, replaced."""
    begin, end = new.splitlines()[0], new.splitlines()[-1]
    if old.count(begin) != 1 or old.count(end) != 1 or old.index(begin) > old.index(end):
        raise BenchmarkError(
            f"{readme}: expected one line {begin} and after it one line {end}; put them where the"
            " results shall stand"
        )
    return old[: old.index(begin)] + new + old[old.index(end) + len(end) :]


def newest(folders: list[Path]) -> Path:
    """The folder with the latest results."""
    dates = {
        folder: max(
            (r["date"] for t in load_folder(folder).values() for r in t.values()), default=""
        )
        for folder in folders
    }
    return max(folders, key=lambda folder: dates[folder])


def run(options: argparse.Namespace) -> int:
    if options.device:
        if not options.check:
            raise BenchmarkError("--device: expected together with --check, got it alone")
        try:
            return check_device(Path(options.results or environment.COMMITTED), options.device)
        except BenchmarkError as error:
            print(f"benchmarks.report: {error}", file=sys.stderr)
            return 1
    readme = Path(options.readme or environment.ROOT / "README.md")
    if options.check or options.readme:
        folder = Path(options.results or environment.COMMITTED)
        try:
            old = readme.read_text(encoding="utf-8")
        except OSError as error:
            raise BenchmarkError(f"{readme}: expected a file to read, got {error}") from error
        new = with_block(old, block(folder, readme.resolve()), readme)
        if options.check:
            if new != old:
                print(
                    f"benchmarks.report: {readme}: the block between the benchmark markers is not"
                    f" what {shown(folder)} generates; run"
                    f" python -m benchmarks.report --readme {readme}",
                    file=sys.stderr,
                )
            return int(new != old)
        environment.write_atomically(readme, new)
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
    parser.add_argument("--readme", help="file whose block is to be written (or checked)")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if it is old")
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
