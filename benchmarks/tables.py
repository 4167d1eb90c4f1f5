"""How results read: the rows, cells and lines that terminal and pages share."""

from __future__ import annotations

from itertools import product
from typing import Any, NamedTuple

from benchmarks import environment
from benchmarks.cases import LAUNCHES, REGIMES, TAILS
from benchmarks.checks import QUIET, accuracy_checks
from benchmarks.summary import AVERAGED, FUSED, PLAIN, TAIL, WHOLE, geomean, is_fused, select

VARIANTS = {"plain": "no attention", "eager": "eager", "compile": "torch.compile"}
NAMED_RIVALS = ("eager", "compile", PLAIN + "eager", PLAIN + "compile")  # that rows compare with

Results = dict[str, Any]


def shape_name(shape: list[int]) -> str:
    return "x".join(map(str, shape))


def name_of(variant: str) -> str:
    """A contender as a reader knows it: "fused (cpu)", "torch.compile", "eager"."""
    if variant.startswith(WHOLE):
        return f"whole network compiled, {name_of(variant.removeprefix(WHOLE))}"
    if variant.startswith(TAIL + FUSED):
        return f"fused tail ({variant.removeprefix(TAIL + FUSED)})"
    if variant.startswith(TAIL):
        return f"{name_of(variant.removeprefix(TAIL))}, fused tail"
    if variant.startswith(PLAIN):
        return f"{name_of(variant.removeprefix(PLAIN))} without attention"
    if variant.startswith(FUSED):
        return f"fused ({variant.removeprefix(FUSED)})"
    return VARIANTS.get(variant) or variant.replace("compile:", "torch.compile ")


def times(value: float | None) -> str:
    if value is None:
        return "-"
    return (
        f"{value:.2f}x" if value < 9.995 else f"{value:.1f}x" if value < 99.95 else f"{value:.0f}x"
    )


def ms(seconds: float) -> str:
    value = 1e3 * seconds
    size = abs(value)
    return f"{value:.1f}" if size >= 10 else f"{value:.2f}" if size >= 0.1 else f"{value:.4f}"


def mib(size: float) -> str:
    return f"{size / 2**20:.1f}" if abs(size) >= 2**20 / 10 else f"{size / 2**20:.4f}"


def device_line(results: Results) -> str:
    device, versions = results["device"], results["versions"]
    cores = f"{device['cores']} cores, {device['threads']} threads"
    libraries = [f"{name} {versions[name]}" for name in ("torch", "triton") if name in versions]
    where = f"{device['name']} ({cores}, {device['vector']})"
    if device["kind"] == "cuda":
        where = f"{device['name']} (sm {device['sm']}, CUDA {versions.get('cuda')})"
    libraries += [f"da_ops {versions['da_ops']}"] if "da_ops" in versions else []
    return ", ".join([where, *libraries, f"Python {versions['python']}", results["date"][:10]])


def stale(results: Results) -> str | None:
    """That these results do not speak for the sources as they are, or None."""
    if results["digest"] == environment.digest(results["device"]["kind"]):
        return None
    return f"measured with other kernel sources than today's ({results['digest'][:12]})"


def disturbed(results: Results) -> str | None:
    """That other programs ran beside this measurement, or None."""
    for check in select(results.get("summary", {}).get("checks", []), name=QUIET):
        if not check["passed"]:
            return f"other programs took {check['got']} of the cores meanwhile: measure again"
    return None


def ratio(record: Results, fused: str, layout: str, part: str, rival: str, basis: str) -> Any:
    """The median speed-up; "compile", with attention or without, is the fastest of its modes."""
    found = [
        s[basis]["median"]
        for s in select(record["speedups"], fused=fused, layout=layout, part=part)
        if f"{s['rival']}:".startswith(f"{rival}:") and basis in s
    ]
    return min(found, default=None)


def rows(results: Results) -> list[Results]:
    """One flat row per case and layout of each fused contender."""
    return [
        {
            **{k: record[k] for k in ("shape", "dtype", "role", "regime", "threads")},
            "launch": record.get("launch", "stream"),
            "fused": result["rival"],
            "layout": result["layout"],
            "parts": {
                part: {
                    "seconds": result["seconds"][part]["median"],
                    "floor": result["floor_percent"][part],
                    **{
                        f"{rival}_{basis}": ratio(
                            record, result["rival"], result["layout"], part, rival, basis
                        )
                        for rival in NAMED_RIVALS
                        for basis in ("same", "better")
                    },
                }
                for part in ("inference", "training", "backward")
            },
        }
        for record in results["cases"]
        for result in record["results"]
        if is_fused(result["rival"]) and "seconds" in result
    ]


def pair(part: Results, rival: str) -> str:
    """ "3.10x (2.60x)": against the rival in the same layout, and in its better one."""
    same, better = part[f"{rival}_same"], part[f"{rival}_better"]
    return times(same) if better is None else f"{times(same)} ({times(better)})"


ROLES = {
    "stage": "ResNet-50 stages",
    "ssd": "SSD300 maps",
    "single": "one image",
    "half": "half precision",
    "dtype": "other types",
    "batch": "other batch sizes",
    "overhead": "call overhead",
    "asked": "as asked",
    "tail": "tails of the ResNet-50 stages",
    "asked tail": "tail as asked",
}


class Section(NamedTuple):
    """A table with its title, of cases of one role."""

    role: str
    title: str
    header: list[str]
    table: list[list[str]]


def rivals_in(role: str) -> dict[str, str]:
    """What the rows of a role are compared with, and how a column's head calls it."""
    found = {"eager": "vs eager", "compile": "vs compile"}
    if role in TAILS:
        bare = {f"{PLAIN}{rival}": f"{head} without" for rival, head in found.items()}
        return {**found, **bare}
    return found


def header(role: str) -> list[str]:
    columns = ("ms", *rivals_in(role).values(), "of floor")
    return ["shape", "layout"] + [
        f"{part} {column}" for part in ("inference", "training") for column in columns
    ]


def cells(row: Results) -> list[str]:
    """A row of the table under its role's header."""
    shape = shape_name(row["shape"])
    shape += f" {row['dtype']}" if row["dtype"] != "float32" else ""
    shape += f", {row['threads']} thread(s)" if row["role"] == "single" else ""
    shape += "" if row["regime"] == "warm" else f", {row['regime']}"
    found = [shape, row["layout"]]
    for name in ("inference", "training"):
        part = row["parts"][name]
        found += [ms(part["seconds"]), *(pair(part, rival) for rival in rivals_in(row["role"]))]
        found.append(f"{part['floor']:.0f}%")
    return found


def mean_cells(table: list[Results], title: str) -> list[str]:
    """The geometric means of these rows' speed-ups, as a row under their header."""
    found = [title, ""]
    rivals = list(rivals_in(table[0]["role"]))
    for name in ("inference", "training"):
        part = {
            key: geomean(row["parts"][name][key] for row in table)
            if all(row["parts"][name][key] for row in table)
            else None
            for key in (f"{rival}_{basis}" for rival in rivals for basis in ("same", "better"))
        }
        found += ["", *(pair(part, rival) for rival in rivals), ""]
    return found


def sections(results: Results) -> list[Section]:
    """Titled tables of cells: the stages with their means first, then everything else."""
    found = []
    every = rows(results)
    for fused in dict.fromkeys(row["fused"] for row in every):
        mine = select(every, fused=fused)
        for (role, title), launch, regime in product(ROLES.items(), LAUNCHES, REGIMES):
            alike = select(mine, role=role, launch=launch, regime=regime)
            # A table of tails for each number of threads, for means are taken over each.
            for threads in dict.fromkeys(row["threads"] if role == "tail" else "" for row in alike):
                part = [row for row in alike if threads in ("", row["threads"])]
                table = [cells(row) for row in part]
                if role in AVERAGED or len(part) > 4:
                    table.append(mean_cells(part, "geometric mean"))
                notes = [title, *["cold"][: regime == "cold"], *["CUDA graph"][: launch == "graph"]]
                notes += [f"{threads} thread(s)"] if threads else []
                title_ = f"{name_of(fused)}: {', '.join(notes)}"
                found.append(Section(role, title_, header(role), table))
    return found


def plain_table(header: list[str], table: list[list[str]], left: int = 2) -> str:
    """Aligned columns, the first `left` of them to the left; long headers stand in two lines."""
    tops = [name.partition(" ")[::2] for name in header]
    head = [[top for top, _ in tops], [below for _, below in tops]]
    head = head if any(head[1]) else head[:1]
    widths = [max(len(line[i]) for line in [*head, *table]) for i in range(len(header))]
    lines = []
    for line in [*head, ["-" * width for width in widths], *table]:
        padded = [
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        lines.append("  ".join(padded).rstrip())
    return "\n".join(lines)


def markdown_table(header: list[str], table: list[list[str]], left: int = 2) -> str:
    align = ["---" if i < left else "---:" for i in range(len(header))]
    return "\n".join("| " + " | ".join(line) + " |" for line in [header, align, *table])


def case_line(record: Results) -> str:
    """One case in a line, for the run's progress."""
    regime = "" if record["regime"] == "warm" else f" {record['regime']}"
    regime += " graph" if record.get("launch") == "graph" else ""
    tail = ", tail" if record["role"] in TAILS else ""
    parts = [f"{shape_name(record['shape'])} {record['dtype']}{regime}{tail}"]
    for row in rows({"cases": [record]}):
        shown = []
        for name in ("inference", "training"):
            part = row["parts"][name]
            against = [
                f"{times(part[f'{rival}_same'])} {name_of(rival)}"
                for rival in NAMED_RIVALS
                if part[f"{rival}_same"] is not None
            ]
            shown.append(f"{name} {ms(part['seconds'])} ms ({', '.join(against) or 'alone'})")
        parts.append(f"{name_of(row['fused'])} {row['layout']}: {', '.join(shown)}")
    for result in record["results"]:
        if result["status"] != "ok":
            status = "FAILED" if result["status"] == "failed" else result["status"]
            parts.append(
                f"{name_of(result['rival'])} {result['layout']} {status}: {result['reason']}"
            )
        elif not is_fused(result["rival"]):
            median = {part: ms(value["median"]) for part, value in result["seconds"].items()}
            spent = f"inference {median['inference']} ms, training {median['training']} ms"
            parts.append(f"{name_of(result['rival'])} {result['layout']}: {spent}")
    return "\n    ".join(parts)


def memory_rows(results: Results) -> list[list[str]]:
    """Memory of a training step of the largest stage measured, and of the largest tail: rival,
    layout, peak, held (MiB)."""
    found = []
    for roles, what in ((("stage", "asked"), ""), (TAILS, "tail, ")):
        records = [r for r in results["cases"] if r["role"] in roles]
        largest: Results = max(records, key=lambda r: r["bytes"], default={"results": []})
        found += [
            [
                f"{what}{name_of(r['rival'])}, {shape_name(largest['shape'])}",
                r["layout"],
                mib(r["memory"]["peak"]),
                mib(r["memory"]["held"]),
            ]
            for r in largest["results"]
            if "memory" in r
        ]
    return found


MEMORY_HEADER = ["memory in training", "layout", "peak MiB", "held for backward, MiB"]
NETWORK_HEADER = [
    "training step",
    "layout",
    "step ms",
    "added ms",
    "added %",
    "peak MiB",
    "held for backward, MiB",
]
INFERENCE_HEADER = ["inference ms", "inference added %"]  # where that was measured, too
GRAPH_HEADER = ["training step, CUDA graph", *NETWORK_HEADER[1:5], *INFERENCE_HEADER]


def infers(results: Results) -> bool:
    return any("inference" in r for part in results["layouts"] for r in part["results"])


def network_header(results: Results) -> list[str]:
    return NETWORK_HEADER + (INFERENCE_HEADER if infers(results) else [])


def step_cells(r: Results) -> list[str]:
    """The time of a training step, and how much more it is than that without attention."""
    cost = r.get("cost")
    added = [ms(cost["median"]), f"{r['cost_percent']:.1f}"] if cost else ["-", "-"]
    return [ms(r["seconds"]["median"]), *added]


def inference_cells(r: Results) -> list[str]:
    """The same of inference, without the milliseconds added."""
    if not (inferred := r.get("inference")):
        return ["-", "-"]
    percent = inferred.get("cost_percent")
    return [ms(inferred["seconds"]["median"]), "-" if percent is None else f"{percent:.1f}"]


def network_rows(results: Results) -> list[list[str]]:
    found = []
    empty = ["-"] * (len(network_header(results)) - 2)
    for part in results["layouts"]:
        for r in part["results"]:
            if r["status"] != "ok":
                found.append([f"{name_of(r['variant'])} {r['status']}", part["layout"], *empty])
                continue
            memory = [mib(r["memory"][kind]) for kind in ("peak", "held")]
            found.append([name_of(r["variant"]), part["layout"], *step_cells(r), *memory])
            found[-1] += inference_cells(r) if infers(results) else []
    return found


def graph_rows(results: Results) -> list[list[str]]:
    """The same of those that were replayed as CUDA graphs."""
    return [
        [name_of(r["variant"]), part["layout"], *step_cells(graph), *inference_cells(graph)]
        for part in results["layouts"]
        for r in part["results"]
        if "seconds" in (graph := r.get("graph", {}))
    ]


def network_tables(results: Results) -> list[tuple[list[str], list[list[str]]]]:
    """Headers and rows: steps that are launched from Python, then replays, where there are some."""
    found = [(network_header(results), network_rows(results)), (GRAPH_HEADER, graph_rows(results))]
    return found if found[1][1] else found[:1]


def graph_lines(results: Results) -> list[str]:
    """Why there are no CUDA graphs of some networks: a line for each reason."""
    found: dict[str, list[str]] = {}
    for part in results["layouts"]:
        for r in part["results"]:
            if "reason" in (graph := r.get("graph", {})):
                why = f"{graph['status']}: {graph['reason']}"
                found.setdefault(why, []).append(f"{name_of(r['variant'])} {part['layout']}")
    return [f"CUDA graph of {', '.join(names)} {why}" for why, names in found.items()]


def network_title(results: Results) -> str:
    network = results["network"]
    return (
        f"{network['name']}, {network['layers']} attention layers, batch {network['batch']} of"
        f" {network['size']}x{network['size']} crops of photographs,"
        f" {network.get('amp') or 'float32'}"
    )


def loss_lines(results: Results) -> list[str]:
    """Every case in which the fused layer is slower than a rival."""
    lines = []
    for lost in results["summary"]["losses"]:
        where = " in its better layout" if lost["basis"] == "better" else ""
        threads = f" {lost['threads']} thread(s)" if lost["threads"] else ""
        graph = " CUDA graph" if lost.get("launch") == "graph" else ""
        ours = f"tail, {name_of(lost['fused'])}, " if lost.get("role") in TAILS else ""
        lines.append(
            f"{ours}{lost['part']}, {shape_name(lost['shape'])} {lost['dtype']} {lost['layout']}"
            f" {lost['regime']}{threads}{graph}: {times(lost['ratio'])}"
            f" of {name_of(lost['rival'])}{where}"
        )
    return lines


def check_lines(results: Results) -> list[list[str]]:
    """Each check; accuracy by what is promised now, whenever it was measured."""
    today = {c["name"]: c for c in accuracy_checks(results.get("cases", []))}
    checks = [today.get(c["name"], c) for c in results["summary"]["checks"]]
    words = {True: "met", False: "MISSED", None: "-"}
    return [[words[c["passed"]], c["name"], c["got"], c["expected"]] for c in checks]
