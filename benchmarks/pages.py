"""The generated blocks of README.md and docs/benchmarks.md."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from benchmarks import environment, tables
from benchmarks.environment import BenchmarkError
from benchmarks.files import KINDS, counted, doubts, faults, load_folder
from benchmarks.summary import FUSED, TAIL, select
from benchmarks.tables import Results

PAGES = [environment.ROOT / "README.md", environment.ROOT / "docs" / "benchmarks.md"]
COMMAND = "python -m benchmarks.report --write"
NO_GPU = "No GPU results are committed yet: `make gpu` tests and measures on a machine with a GPU."
TAIL_NOTE = (
    "batch norm, attention, shortcut and ReLU of a residual block; its rivals are the same modules"
    " with attention, and without"
)
NETWORK_NOTE = (
    "Fused tails: `fuse(net)`, which makes one operator of each other norm with a ReLU, too."
)


def markers(name: str) -> tuple[str, str]:
    """Between which a block stands."""
    return f"<!-- {name}:begin -->", f"<!-- {name}:end -->"


def marked(name: str, command: str, lines: list[str]) -> str:
    begin, end = markers(name)
    return "\n".join([begin, f"<!-- written by `{command}` -->", *lines, end])


def with_block(old: str, new: str, page: Path) -> str:
    """The page with the block between its markers, those of `new`, replaced."""
    begin, end = new.splitlines()[0], new.splitlines()[-1]
    if old.count(begin) != 1 or old.count(end) != 1 or old.index(begin) > old.index(end):
        raise BenchmarkError(
            f"{page}: expected one line {begin} and after it one line {end}; put them where the"
            " results shall stand"
        )
    return old[: old.index(begin)] + new + old[old.index(end) + len(end) :]


def read_page(page: Path) -> str:
    try:
        return page.read_text(encoding="utf-8")
    except OSError as error:
        raise BenchmarkError(f"{page}: expected a file to read, got {error}") from error


def renewed(page: Path, folder: Path) -> tuple[str, str]:
    """A page as it is, and with its blocks as the results of the folder make them."""
    old = new = read_page(page)
    there = [name for name in BLOCKS if markers(name)[0] in old]
    for name in there or ["benchmarks"]:
        new = with_block(new, BLOCKS[name](folder, page.resolve()), page)
    return old, new


def picture(words: str, path: Path, page: Path) -> str:
    return f"![{words}]({Path(os.path.relpath(path, page.parent)).as_posix()})"


# The block of README.md: a chart and geometric means.


def speed(folder: Path, page: Path) -> str:
    """Those of today's kernel sources; where there are none, all."""
    lines: list[str] = []
    devices = {d: together for d, together in counted(folder).items() if "op" in together}
    todays = {d: together for d, together in devices.items() if not tables.stale(together["op"])}
    for device, together in (todays or devices).items():
        results = together["op"]
        lines += ["", picture("speed-ups", folder / f"{device}.png", page), ""]
        lines += [tables.markdown_table(MEANS_HEADER, mean_rows(results), left=1)]
        lines += ["", f"{tables.device_line(results)}; float32."]
        network = together.get("network")
        if network and not doubts(network):
            lines += [network_line(network)]
        lines += [f"\n**Note: {doubt}.**" for doubt in doubts(results)]
    if todays and len(todays) < len(devices):
        names = (d["op"]["device"]["name"] for name, d in devices.items() if name not in todays)
        lines[-1] += f" With the kernels of before, in docs/benchmarks.md: {', '.join(names)}."
    return marked("speed", COMMAND, lines or ["", "No results yet: `make bench-full` measures."])


MEANS_HEADER = ["geometric means over the stages of ResNet-50", "inference", "training"]
SUBJECTS = {"stage": "layer", "tail": "tail"}


def mean_rows(results: Results) -> list[list[str]]:
    """The means over warm stages of what is fused, on most threads: a line a rival."""
    means = select(results["summary"]["means"], regime="warm", launch="stream")
    found = []
    for role, subject in SUBJECTS.items():
        mine = [m for m in select(means, role=role) if m["fused"].startswith(FUSED)]
        most = max((m["threads"] for m in mine if m["threads"]), default=None)
        if role == "tail":
            mine = select(mine, threads=most)
        for fused in dict.fromkeys(m["fused"] for m in mine):
            for rival in tables.rivals_in(role):
                cells = [
                    next(iter(select(mine, fused=fused, rival=rival, part=part)), {}).get("same")
                    for part in ("inference", "training")
                ]
                against = tables.name_of(rival).replace("attention", "the layer")
                found.append(
                    [f"{subject} against {against}", *(tables.times(cell) for cell in cells)]
                )
    return found


def network_line(results: Results) -> str:
    """The cost of the layer in a network, in percent of a training step without it: launched from
    Python, and replayed as a CUDA graph, where that was measured."""
    layouts = " and ".join(part["layout"] for part in results["layouts"])
    costs = network_costs(results, lambda r: r)
    said = f"A training step of {results['network']['name']} with the layer, {layouts}: {costs}."
    replayed = network_costs(results, lambda r: r.get("graph", {}))
    return f"{said} As a CUDA graph: {replayed}." if replayed else said


def network_costs(results: Results, launched: Callable[[Results], Results]) -> str:
    """The percentages of each variant with the layer, one for each layout."""
    found: dict[str, list[str]] = {}
    for part in results["layouts"]:
        for r in part["results"]:
            if "cost_percent" in launched(r) and "plain" not in r["variant"]:
                found.setdefault(tables.name_of(r["variant"]), []).append(
                    f"{launched(r)['cost_percent']:+.1f}%"
                )
    return ", ".join(f"{name} {' and '.join(cells)}" for name, cells in found.items())


# The block of docs/benchmarks.md: everything.


def every_table(folder: Path, page: Path) -> str:
    lines: list[str] = []
    devices = load_folder(folder)
    if not devices:
        lines += ["", "No results yet: `make bench-full` measures them."]
    for device, together in counted(folder).items():
        lines += device_lines(together, picture("speed-ups", folder / f"{device}.png", page))
    gpus = [together["gpu"] for together in devices.values() if "gpu" in together]
    lines += [
        f"\nResults of {gpu['device']['name']} are left out: {'; '.join(found)}."
        for gpu in gpus
        if (found := faults(gpu))
    ]
    lines += [] if gpus else ["", NO_GPU]
    return marked("benchmarks", COMMAND, lines)


def device_lines(together: dict[str, Results], chart: str) -> list[str]:
    first = next(iter(together.values()))
    lines = ["", f"## {first['device']['name']}", "", chart]
    if "op" in together:
        results = together["op"]
        lines += ["", "### One layer, one tail", ""]
        lines += [f"{tables.device_line(results)}. `{results['command']}`"]
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
        if more := [section for section in sections if section not in shown]:
            inside = [line for section in more for line in section_lines(section)]
            lines += details("All other shapes", inside)
        if lost := tables.loss_lines(results):
            title = f"Slower than a rival in {len(lost)} comparison(s)"
            lines += details(title, ["", *(f"- {line}" for line in lost)])
        else:
            lines += ["", "Slower than a rival: nowhere."]
    if "network" in together:
        results = together["network"]
        source = f"{tables.device_line(results)}. `{results['command']}`"
        lines += ["", "### A network", "", f"{tables.network_title(results)}. {source}"]
        if any(r["variant"].startswith(TAIL) for p in results["layouts"] for r in p["results"]):
            lines += ["", NETWORK_NOTE]
        lines += [f"\n**Note: {doubt}.**" for doubt in doubts(results)]
        for head, rows in tables.network_tables(results):
            lines += ["", tables.markdown_table(head, rows)]
        if without := tables.graph_lines(results):
            lines += ["", *(f"- {line}" for line in without)]
    if "gpu" in together:
        rows = part_rows(together["gpu"])
        lines += ["", "`make gpu`:", "", tables.markdown_table(PART_HEADER, rows)]
    measured = [together[kind] for kind in KINDS if kind in together]
    checks = [line for results in measured for line in tables.check_lines(results)]
    lines += ["", "### What was expected"]
    return [*lines, "", tables.markdown_table(CHECK_HEADER, checks, left=4)]


def section_lines(section: tables.Section) -> list[str]:
    table = tables.markdown_table(section.header, section.table)
    return ["", f"**{section.title}**", "", table]


def details(title: str, lines: list[str]) -> list[str]:
    return ["", f"<details><summary>{title}</summary>", *lines, "", "</details>"]


PART_HEADER = ["part", "result", "passed", "failed", "skipped", "of", "seconds"]
CHECK_HEADER = ["target", "what", "found", "expected"]


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


BLOCKS: dict[str, Callable[[Path, Path], str]] = {"speed": speed, "benchmarks": every_table}
