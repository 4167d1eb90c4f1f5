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
from benchmarks.summary import FUSED, geomean, select

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

Results = dict[str, Any]


def compile_speedup(record: Results, layout: str, part: str) -> float | None:
    """The fastest compiled rival against eager, both in this layout, by their medians."""
    medians = {
        r["rival"]: r["seconds"][part]["median"]
        for r in select(record["results"], layout=layout)
        if "seconds" in r
    }
    compiled = [value for name, value in medians.items() if name.startswith("compile")]
    return medians["eager"] / min(compiled) if compiled and "eager" in medians else None


def speedup_panel(axes: Axes, records: list[Results], fused: str, part: str) -> None:
    """Grouped bars, one group per shape and one bar per layout, with compile's mark on each."""
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
            value = tables.ratio(record, fused, layout, part, "eager", "same")
            if value is None:
                continue
            mark = compile_speedup(record, layout, part)
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
            label = f" {tables.times(value)}"
            axes.text(max(value, mark or 0), y, label, va="center", fontsize=9, color=INK)
    axes.axvline(1, color=INK, linewidth=1)
    axes.set_xlim(0, longest * 1.14)
    axes.set_ylim(len(records) - 0.5, -0.5)
    axes.set_yticks(range(len(records)))
    axes.tick_params(length=0)
    axes.grid(axis="x", color=GRID)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}x")
    axes.set_xlabel("times as fast as eager PyTorch")


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
        ticks.append((y, f"{tables.name_of(r['variant'])}, {layout}"))
        fused = r["variant"].startswith(FUSED)
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
        "added to a training step by the attention layers, ms (line: 10th to 90th percentile)"
    )
    net = results["network"]
    what = f"batch {net['batch']} of {net['size']}x{net['size']} photographs"
    axes.set_title(f"In {net['name']}: {net['layers']} layers, {what}", **PANEL_TITLE)


def finding(results: Results, fused: str, records: list[Results]) -> tuple[str, str]:
    """Title and subtitle in words, from the data."""

    def speeds(part: str) -> str:
        found = []
        for rival, name in (("eager", "eager PyTorch"), ("compile", "torch.compile")):
            values = [
                tables.ratio(record, fused, r["layout"], part, rival, "same")
                for record in records
                for r in select(record["results"], rival=fused, status="ok")
            ]
            if values and None not in values:
                found.append(f"{tables.times(geomean(values))} as fast as {name}")
        return ", ".join(found)

    training, inference = speeds("training"), speeds("inference")
    title = f"The fused layer trains {training}" if training else "The fused layer's speed"
    first, count = records[0], len(records)
    threads = f", {first['threads']} thread(s)" if first["threads"] else ""
    over = f"Geometric means over {count} shape(s), {first['dtype']}{threads}"
    quick = " (quick run)" if results["preset"] == "quick" else ""
    return title, (f"Inference: {inference}. " if inference else "") + over + quick


def stages(results: Results) -> tuple[str, list[Results]]:
    """The first fused contender and the cases to show: the stages, else what was asked for."""
    warm = [
        r for r in select(results["cases"], regime="warm") if r.get("launch", "stream") == "stream"
    ]
    asked = select(warm, role="asked", dtype="float32")
    chosen = select(warm, role="stage") or asked or results["cases"]
    for record in chosen:
        for ratio in record["speedups"]:
            name = str(ratio["fused"])
            return name, [r for r in chosen if select(r["speedups"], fused=name)]
    return "", []


def draw(together: dict[str, Results], path: Path) -> bool:
    """Write the PNG; False where the results hold nothing to draw."""
    fused, records = stages(together["op"]) if "op" in together else ("", [])
    network = together.get("network", {"layouts": []})
    bars = [r for part in network["layouts"] for r in part["results"] if "cost" in r]
    if not records and not bars:
        return False
    # Inches from the top: title, legend, panels, footer.
    width, left, gap = 11.0, 1.6, 0.25
    speed_height = 0.6 * len(records) if records else 0.0
    cost_height = 0.34 * len(bars) + 0.25 if bars else 0.0
    speed_top = 1.55
    cost_top = speed_top + speed_height + 1.15 if records else 1.0
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
        if records:
            title, subtitle = finding(together["op"], fused, records)
            each = (width - left - gap - 0.3) / 2
            for column, part in enumerate(("inference", "training")):
                axes = panel(left + column * (each + gap), speed_top, each, speed_height)
                speedup_panel(axes, records, fused, part)
                axes.set_title(PARTS[part], **PANEL_TITLE)
                names = [tables.shape_name(r["shape"]) for r in records]
                axes.set_yticklabels([] if column else names)
            legend(figure, records, fused, (0.17 / width, 1 - 0.92 / height))
        if bars:
            indent = left + 0.85
            network_panel(panel(indent, cost_top, width - indent - 0.3, cost_height), network)
        write(0.35, title, fontsize=14.5, fontweight="bold")
        write(0.68, subtitle, fontsize=10, color=QUIET)
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
