"""What an ablation found, in words and tables, beside what the paper prints."""

from __future__ import annotations

from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

from scipy import stats

from benchmarks import environment, tables
from benchmarks.pages import marked, picture

MODULE = "benchmarks.paper.ablation"
PLAIN = "plain"
CONFIDENCE = 0.95  # of all intervals of a report together
COMMAND = f"python -m {MODULE} --write"
NAMES = {
    "DA": "DA (spatial, then channel)",
    "DA, channel first": "DA (channel, then spatial)",
    "DA, parallel": "DA (parallel)",
}
# mAP in percent as the paper prints it, SSD300 on VOC: table, backbone, rows.
PAPER: list[tuple[str, str, dict[str, float]]] = [
    (
        "I",
        "resnet50",
        {PLAIN: 75.9, "DA, channel first": 76.8, "DA": 77.0, "DA, parallel": 76.6},
    ),
    ("II", "resnet18", {PLAIN: 72.6, "SE": 72.9, "DA": 73.1}),
    ("II", "resnet50", {PLAIN: 75.9, "SE": 76.5, "DA": 77.0}),
    ("III", "resnet50", {PLAIN: 75.9, "SGE": 76.3, "ECA": 76.8, "DA": 77.0}),
]
# Rivals that the paper names and has no figures of.
BESIDE = ("FCA", "STN")
HEADER = ["network", "mAP", "over plain", "95% interval", "finding", "paper", "paper over plain"]

Results = dict[str, Any]


class Difference(NamedTuple):
    """Of a variant from plain over paired seeds, in points of mAP; the interval is Student's, with
    Bonferroni's correction for how many variants are compared."""

    mean: float
    low: float | None  # None with a single seed
    high: float | None

    @property
    def finding(self) -> str:
        if self.low is None or self.high is None:
            return "one seed: no interval"
        if self.low <= 0 <= self.high:
            return "no difference found"
        return "better" if self.low > 0 else "worse"


def read(path: Path) -> Results:
    """A results file of the ablation."""
    return environment.read_results(path, "ablation")


def maps(results: Results, variant: str) -> dict[int, float]:
    """mAP (11 points) in percent by seed."""
    return {r["seed"]: 100 * r["map_11"] for r in results["runs"] if r["variant"] == variant}


def difference(results: Results, variant: str) -> Difference | None:
    """From plain, over the seeds that both were run with; None if there is none."""
    plain, mine = maps(results, PLAIN), maps(results, variant)
    pairs = [mine[seed] - plain[seed] for seed in sorted(mine.keys() & plain.keys())]
    compared = {run["variant"] for run in results["runs"]} - {PLAIN}
    return paired(pairs, len(compared)) if pairs else None


def paired(differences: list[float], compared: int = 1) -> Difference:
    """Mean, and its interval as one of so many that hold together with 95% confidence."""
    centre, n = mean(differences), len(differences)
    if n == 1:
        return Difference(centre, None, None)
    tail = (1 - CONFIDENCE) / 2 / compared
    half = float(stats.t.isf(tail, n - 1)) * stdev(differences) / n**0.5
    return Difference(centre, centre - half, centre + half)


def sections(results: Results) -> list[tuple[str, list[list[str]]]]:
    """A title and rows for each of the paper's tables, beside the paper's figures of the same
    backbone where it has them, else of ResNet-50; then for the rivals that have none, if any ran.
    """
    mine = results["settings"]["backbone"]
    found = []
    for table in ("I", "II", "III"):
        printed = {backbone: rows for name, backbone, rows in PAPER if name == table}
        backbone = mine if mine in printed else "resnet50"
        title = f"Table {table} in miniature ({mine}; paper: SSD300 on {backbone}, VOC)"
        found.append((title, [row(results, v, printed[backbone]) for v in printed[backbone]]))
    if any(maps(results, variant) for variant in BESIDE):
        title = f"Beside the tables ({mine}; the paper has no figures of these rivals)"
        found.append((title, [row(results, v, {}) for v in (PLAIN, *BESIDE, "DA")]))
    return found


def row(results: Results, variant: str, paper: dict[str, float]) -> list[str]:
    values = list(maps(results, variant).values())
    name, cells = NAMES.get(variant, variant), ["-", "-", "-", "not run"]
    if values:
        cells[0] = f"{mean(values):.1f}"
    if variant == PLAIN:
        cells[3] = ""
        return [name, *cells, *([f"{paper[variant]:.1f}", "-"] if paper else ["", ""])]
    if (found := difference(results, variant)) is not None:
        cells[1], cells[3] = f"{found.mean:+.1f}", found.finding
        if found.low is not None:
            cells[2] = f"{found.low:+.1f} to {found.high:+.1f}"
    if not paper:
        return [name, *cells, "", ""]
    return [name, *cells, f"{paper[variant]:.1f}", f"{paper[variant] - paper[PLAIN]:+.1f}"]


def description(results: Results) -> str:
    """What was run, in a sentence or three."""
    s, seeds = results["settings"], sorted({r["seed"] for r in results["runs"]})
    start = "from random weights"
    if before := results["pretraining"]:
        start = (
            f"all from one plain network (mAP {100 * before['map_11']:.1f} after"
            f" {s['pretraining']} steps, {before['seconds'] / 60:.0f} minutes), with layers that"
            " change nothing at first"
        )
    return (
        f"SSD{s['size']} on {s['backbone']}, {start}, {s['steps']} steps of"
        f" {s['batch_size']} of {s['train']} generated images, tested on {s['test']} others; seeds"
        f" {', '.join(map(str, seeds))}, the same for every network; {results['seconds'] / 60:.0f}"
        f" minutes. mAP of 11 points.{set_back(results)} Intervals are of the mean difference from"
        " plain over paired seeds, all together with 95% confidence (Student's t, Bonferroni's"
        " correction), and hold for this data set: they say nothing of VOC."
    )


def set_back(results: Results) -> str:
    """Why plain is below the network it started from, where it is."""
    before, after = results["pretraining"], maps(results, PLAIN).values()
    if not before or not after or mean(after) >= 100 * before["map_11"]:
        return ""
    return (
        " Every run starts with a higher rate again, for the new layers to learn; what that costs"
        " at first, so few steps do not win back, in the plain network either."
    )


def incomplete(results: Results) -> list[str]:
    """Variants that fewer seeds were run with than the preset asks for."""
    wanted = results["settings"]["seeds"]
    names = dict.fromkeys([PLAIN, *(v for *_, rows in PAPER for v in rows)])
    return [name for name in names if len(maps(results, name)) < wanted]


def curve_rows(results: Results) -> list[list[str]]:
    """mAP of plain on the way, mean over seeds."""
    points: dict[int, list[float]] = {}
    for r in results["runs"]:
        for point in r["curve"] if r["variant"] == PLAIN else ():
            points.setdefault(point["step"], []).append(100 * point["map_11"])
    return [[str(step), f"{mean(values):.1f}"] for step, values in sorted(points.items())]


def doubts(results: Results) -> list[str]:
    """What speaks against these results."""
    missing = incomplete(results)
    return [f"not finished: {', '.join(missing)}; go on with --resume"] if missing else []


def text(results: Results) -> str:
    """What the terminal shows."""
    lines = ["", tables.device_line(results), description(results)]
    lines += [f"NOTE: {doubt}" for doubt in doubts(results)]
    for title, rows in sections(results):
        lines += ["", title, tables.plain_table(HEADER, rows)]
    lines += ["", "plain while it learns", tables.plain_table(["step", "mAP"], curve_rows(results))]
    return "\n".join(lines)


def block(folder: Path, page: Path) -> str:
    """The page's text between the markers, markers included."""
    lines: list[str] = []
    paths = sorted(folder.glob("*-ablation.json"))
    if not paths:
        lines += ["", "No results yet: `make ablation` measures them."]
    for path in paths:
        results = read(path)
        chart = path.with_suffix(".png")
        lines += ["", picture("differences from the plain network", chart, page), ""]
        again = f"python -m {MODULE} --preset {results['preset']}"
        lines += [f"{description(results)} {tables.device_line(results)}. `{again}`"]
        lines += [f"\n**Note: {doubt}.**" for doubt in doubts(results)]
        for title, rows in sections(results):
            lines += ["", f"**{title}**", "", tables.markdown_table(HEADER, rows)]
    return marked("ablation", COMMAND, lines)


def draw(results: Results, path: Path) -> Path | None:
    """The chart; None, with a word about it, where it cannot be drawn."""
    try:
        from benchmarks.paper import chart
    except ImportError as error:
        print(f"no chart: {error}; pip install 'da-ops[bench]'")
        return None
    chart.draw(results, path)
    return path
