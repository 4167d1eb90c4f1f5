"""One picture per device: speed-up of the layer per shape, and what it costs in a network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from benchmarks import tables
from benchmarks.cases import TAILS
from benchmarks.summary import FUSED, PLAIN, TAIL, geomean, select

INK, QUIET, GRID = "#1f2933", "#6b7785", "#e4e8ed"
FUSED_COLOURS = {"contiguous": "#0f6f8c", "channels_last": "#6fb7c9"}
RIVAL_COLOURS = {"eager": "#b8c0ca", "compile": "#e58a2b", "whole": "#b5651d"}
STYLE: Any = {
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": QUIET,
    "axes.edgecolor": GRID,
    "xtick.color": QUIET,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.axisbelow": True,
}

PANEL_TITLE: Any = {"loc": "left", "fontsize": 11, "fontweight": "bold", "pad": 8}
PARTS = {"inference": "Inference (forward)", "training": "Training (forward and backward)"}
TAIL_PARTS = {
    "inference": "Norm, attention, shortcut, ReLU: inference",
    "training": "The same: training",
}

Results = dict[str, Any]


def compile_speedup(record: Results, layout: str, part: str, prefix: str = "") -> float | None:
    """The fastest compiled rival against eager, both in this layout, by their medians; PLAIN as
    prefix: both without attention."""
    medians = {
        r["rival"]: r["seconds"][part]["median"]
        for r in select(record["results"], layout=layout)
        if "seconds" in r
    }
    compiled = [value for name, value in medians.items() if name.startswith(f"{prefix}compile")]
    eager = medians.get(f"{prefix}eager")
    return eager / min(compiled) if compiled and eager is not None else None


def speedup_panel(
    axes: Axes, records: list[Results], fused: str, part: str, prefix: str = ""
) -> None:
    """Grouped bars, one group per shape and one bar per layout, with compile's mark on each. PLAIN
    as prefix: against what has no attention."""
    layouts = [
        name
        for name in FUSED_COLOURS
        if any(select(record["speedups"], fused=fused, layout=name) for record in records)
    ]
    height = 0.76 / max(1, len(layouts))
    longest = 1.0
    for row, record in enumerate(records):
        for slot, layout in enumerate(layouts):
            y = row + (slot - (len(layouts) - 1) / 2) * height
            value = tables.ratio(record, fused, layout, part, f"{prefix}eager", "same")
            if value is None:
                continue
            mark = compile_speedup(record, layout, part, prefix)
            axes.barh(y, value, height * 0.9, color=FUSED_COLOURS[layout])
            longest = max(longest, value, mark or 0)
            if mark is not None:
                axes.plot(
                    [mark] * 2,
                    [y - height * 0.45, y + height * 0.45],
                    color=RIVAL_COLOURS["compile"],
                    linewidth=3,
                    solid_capstyle="butt",
                )
            # At the right edge, where a figure is no mark's.
            place = axes.get_yaxis_transform()
            label = tables.times(value)
            axes.text(1, y, label, transform=place, ha="right", va="center", fontsize=9, color=INK)
    axes.axvline(1, color=INK, linewidth=1)
    axes.set_xlim(0, longest * 1.14)
    axes.set_ylim(len(records) - 0.5, -0.5)
    axes.set_yticks(range(len(records)))
    axes.tick_params(length=0)
    axes.grid(axis="x", color=GRID)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}x")
    without = ",\nwhich are both without attention" if prefix else ""
    axes.set_xlabel(f"times as fast as eager PyTorch; marks: torch.compile{without}")


def bar_label(result: Results, part: Results) -> str:
    return f"{tables.name_of(result['variant'])}, {part['layout']}"


def network_panel(axes: Axes, results: Results) -> None:
    """What each variant adds to a training step over the network without attention, in ms."""
    rows = [
        (part["layout"], plain["seconds"]["median"], r)
        for part in results["layouts"]
        for plain in select(part["results"], variant="plain")
        for r in part["results"]
        if "cost" in r
    ]
    longest = max((1e3 * r["cost"]["median"] for *_, r in rows), default=1.0)
    ticks, gap, last = [], 0.0, ""
    for index, (layout, plain_seconds, r) in enumerate(rows):
        gap += 0.5 if last and layout != last else 0
        last = layout
        y = index + gap
        ticks.append((y, bar_label(r, {"layout": layout})))
        fused = r["variant"].startswith((FUSED, TAIL))
        name = r["variant"].split(":")[0]
        colour = FUSED_COLOURS[layout] if fused else RIVAL_COLOURS[name]
        cost = 1e3 * r["cost"]["median"]
        low, high = (1e3 * r["cost"][key] for key in ("p10", "p90"))
        axes.barh(y, cost, 0.74, color=colour)
        axes.plot([low, high], [y, y], color=QUIET, linewidth=1)
        longest = max(longest, high)
        axes.text(
            max(cost, high, 0),
            y,
            f"  {cost:.0f} ms, {r['cost_percent']:+.1f}% of {1e3 * plain_seconds:.0f} ms",
            va="center",
            fontsize=9,
            color=INK,
        )
    axes.axvline(0, color=INK, linewidth=1)
    axes.set_yticks([y for y, _ in ticks], [label for _, label in ticks])
    axes.invert_yaxis()
    axes.tick_params(length=0)
    axes.grid(axis="x", color=GRID)
    low_end = min([0.0, *(1e3 * r["cost"]["p10"] for *_, r in rows)])
    axes.set_xlim(low_end * 1.1, longest + 0.4 * (longest - low_end))
    axes.set_xlabel(
        "added to a training step without attention, ms (line: 10th to 90th percentile)"
    )
    net = results["network"]
    what = f"batch {net['batch']} of {net['size']}x{net['size']} photographs"
    axes.set_title(f"In {net['name']}: {net['layers']} layers, {what}", **PANEL_TITLE)


def mean_speed(records: list[Results], fused: str, part: str, rival: str) -> float | None:
    """The geometric mean over these cases in all layouts; None if a case lacks it."""
    values = [
        tables.ratio(record, fused, r["layout"], part, rival, "same")
        for record in records
        for r in select(record["results"], rival=fused, status="ok")
    ]
    return geomean(values) if values and None not in values else None


def tail_finding(fused: str, records: list[Results]) -> str:
    """What fused tails do to a network without attention, in words, from the data; empty where that
    was not measured."""
    speeds = [mean_speed(records, fused, p, f"{PLAIN}eager") for p in ("training", "inference")]
    if None in speeds:
        return ""
    training, inference = map(tables.times, speeds)
    return (
        f"Fused tails with attention train {training}, infer {inference} as fast as eager PyTorch's"
        " without"
    )


def finding(results: Results, fused: str, records: list[Results]) -> tuple[str, str]:
    """Title and subtitle in words, from the data."""

    def speeds(part: str) -> str:
        found = []
        for rival, name in (("eager", "eager PyTorch"), ("compile", "torch.compile")):
            if (mean := mean_speed(records, fused, part, rival)) is not None:
                found.append(f"{tables.times(mean)} as fast as {name}")
        return ", ".join(found)

    training, inference = speeds("training"), speeds("inference")
    title = f"The fused layer trains {training}" if training else "The fused layer's speed"
    first, count = records[0], len(records)
    threads = f", {first['threads']} thread(s)" if first["threads"] else ""
    over = f"Geometric means over {count} shape(s), {first['dtype']}{threads}"
    quick = " (quick run)" if results["preset"] == "quick" else ""
    return title, (f"Inference: {inference}. " if inference else "") + over + quick


def warm(results: Results) -> list[Results]:
    """The cases that were measured warm, with calls launched one by one."""
    found = select(results["cases"], regime="warm")
    return [r for r in found if r.get("launch", "stream") == "stream"]


def tails(results: Results) -> tuple[str, list[Results]]:
    """The first fused contender and the tails to show: those of the stages, else what was asked
    for, of the first one's dtype and with as many threads."""
    cases = select(warm(results), role="tail") or select(warm(results), role="asked tail")
    for first in cases:
        for name in (str(ratio["fused"]) for ratio in first["speedups"]):
            if name.startswith(FUSED):
                alike = select(cases, dtype=first["dtype"], threads=first["threads"])
                return name, [r for r in alike if select(r["speedups"], fused=name)]
    return "", []


def stages(results: Results) -> tuple[str, list[Results]]:
    """The first fused contender and the cases to show: the stages, else what was asked for."""
    asked = select(warm(results), role="asked", dtype="float32")
    layers = [r for r in results["cases"] if r["role"] not in TAILS]
    chosen = select(warm(results), role="stage") or asked or layers
    for record in chosen:
        for ratio in record["speedups"]:
            name = str(ratio["fused"])
            return name, [r for r in chosen if select(r["speedups"], fused=name)]
    return "", []


def draw(together: dict[str, Results], path: Path) -> bool:
    """Write the PNG; False where the results hold nothing to draw."""
    fused, records = stages(together["op"]) if "op" in together else ("", [])
    tail, tailed = tails(together["op"]) if "op" in together else ("", [])
    network = together.get("network", {"layouts": []})
    bars = [r for part in network["layouts"] for r in part["results"] if "cost" in r]
    if not records and not tailed and not bars:
        return False
    # Inches from the top: title, legend, panels, footer.
    width, left, gap = 11.0, 1.6, 0.25
    rows = [  # of two panels: contender, cases, what precedes the rivals' names, titles
        (fused, records, "", PARTS),
        (tail, tailed, PLAIN, TAIL_PARTS),
    ]
    rows = [row for row in rows if row[1]]
    tops, cost_top = [], 1.55 if rows else 1.0
    for _, cases, *_ in rows:
        tops.append(cost_top)
        cost_top += 0.6 * len(cases) + 1.15
    cost_height = 0.34 * len(bars) + 0.25 if bars else 0.0
    words = footer(together)
    foot = 0.4 + 0.15 * words.count("\n")
    height = cost_top + cost_height + (0.6 if bars else -0.55) + foot
    with plt.rc_context(STYLE):
        figure = plt.figure(figsize=(width, height), dpi=150)

        def panel(x: float, y: float, wide: float, high: float) -> Axes:
            box = (x / width, 1 - (y + high) / height, wide / width, high / height)
            return figure.add_axes(box)

        def write(y: float, words: str, **style: Any) -> None:
            figure.text(0.25 / width, 1 - y / height, words, va="center", **style)

        title, subtitle = "What the attention layers cost in training", ""
        each = (width - left - gap - 0.3) / 2
        for (name, cases, prefix, titles), top in zip(rows, tops, strict=True):
            for column, part in enumerate(("inference", "training")):
                axes = panel(left + column * (each + gap), top, each, 0.6 * len(cases))
                speedup_panel(axes, cases, name, part, prefix)
                axes.set_title(titles[part], **PANEL_TITLE)
                names = [tables.shape_name(r["shape"]) for r in cases]
                axes.set_yticklabels([] if column else names)
        if rows:
            legend(figure, rows[0][1], rows[0][0], (0.17 / width, 1 - 0.92 / height))
        if records:
            title, subtitle = finding(together["op"], fused, records)
        if tailed and (found := tail_finding(tail, tailed)):
            title, subtitle = found, f"{title}.\n{subtitle}" if records else ""
        if bars:
            labels = [bar_label(r, part) for part in network["layouts"] for r in part["results"]]
            indent = max(left + 0.85, 0.25 + 0.075 * max(map(len, labels)))  # inches a letter
            network_panel(panel(indent, cost_top, width - indent - 0.3, cost_height), network)
        write(0.35, title, fontsize=14.5, fontweight="bold")
        write(0.7, subtitle, fontsize=10, color=QUIET)
        write(height - foot / 2 - 0.03, words, fontsize=8.5, color=QUIET)
        temporary = path.with_name(f".{path.name}.part")
        figure.savefig(temporary, format="png", facecolor="white", metadata={"Software": None})
        temporary.replace(path)
        plt.close(figure)
    return True


def footer(together: dict[str, Results]) -> str:
    """Device, versions and date; below it what speaks against these results, if anything."""
    first = next(iter(together.values()))
    doubts = ["not of today's kernel sources" for r in together.values() if tables.stale(r)]
    doubts += [doubt for doubt in map(tables.disturbed, together.values()) if doubt]
    return "\n".join([tables.device_line(first), *dict.fromkeys(doubts)])


def legend(figure: Figure, records: list[Results], fused: str, corner: tuple[float, float]) -> None:
    present = {r["layout"] for record in records for r in select(record["speedups"], fused=fused)}
    handles: list[Any] = [
        Patch(color=colour, label=f"{tables.name_of(fused)}, {layout}")
        for layout, colour in FUSED_COLOURS.items()
        if layout in present
    ]
    if any(r["rival"].startswith("compile") for record in records for r in record["results"]):
        mark: Any = {"color": RIVAL_COLOURS["compile"], "linewidth": 3}
        handles.append(Line2D([], [], label="torch.compile, same layout", **mark))
    handles.append(Line2D([], [], color=INK, linewidth=1, label="eager PyTorch"))
    figure.legend(
        handles=handles,
        loc="upper left",
        bbox_to_anchor=corner,
        ncols=4,
        frameon=False,
        fontsize=9,
        handlelength=1.4,
        borderaxespad=0,
    )
