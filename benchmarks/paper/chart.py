"""One picture of an ablation: each network's difference from plain, and how plain learns."""

from __future__ import annotations

import textwrap
from pathlib import Path
from statistics import mean
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from benchmarks import tables
from benchmarks.charts import FUSED_COLOURS, GRID, INK, PANEL_TITLE, QUIET, RIVAL_COLOURS, STYLE
from benchmarks.paper import report

MINE, PAPER = FUSED_COLOURS["contiguous"], RIVAL_COLOURS["compile"]

Results = dict[str, Any]


def difference_panel(axes: Axes, results: Results) -> None:
    """A line per network: seeds as dots, their mean and its interval, the paper's gain."""
    printed = {
        variant: value - rows[report.PLAIN]
        for _, backbone, rows in report.PAPER
        for variant, value in rows.items()
        if backbone == "resnet50" and variant != report.PLAIN
    }
    plain = report.maps(results, report.PLAIN)
    names = [name for name in (*printed, *report.BESIDE) if report.difference(results, name)]
    for y, name in enumerate(names):
        found, mine = report.difference(results, name), report.maps(results, name)
        assert found is not None
        if found.low is not None and found.high is not None:
            axes.plot([found.low, found.high], [y, y], color=MINE, linewidth=3, alpha=0.45)
        seeds = [mine[seed] - plain[seed] for seed in mine.keys() & plain.keys()]
        axes.plot(seeds, [y] * len(seeds), "o", color=QUIET, markersize=3.5)
        axes.plot([found.mean], [y], "o", color=MINE, markersize=8)
        if name in printed:
            axes.plot([printed[name]], [y], "D", color=PAPER, markersize=6, markerfacecolor="white")
    axes.axvline(0, color=INK, linewidth=1)
    axes.set_yticks(range(len(names)), [report.NAMES.get(name, name) for name in names])
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.tick_params(length=0)
    axes.grid(axis="x", color=GRID)
    axes.set_xlabel("points of mAP over the plain network")
    axes.set_title("Difference from plain", **PANEL_TITLE)


def curve_panel(axes: Axes, results: Results) -> None:
    """mAP of plain against steps, from the network that all start from: seeds thin, their mean
    thick."""
    before = results["pretraining"]
    start = [{"step": 0, **before}] if before else []
    curves = [start + r["curve"] for r in results["runs"] if r["variant"] == report.PLAIN]
    for curve in curves:
        axes.plot(*zip(*((p["step"], 100 * p["map_11"]) for p in curve)), color=QUIET, linewidth=1)
    if curves:
        steps = [point["step"] for point in curves[0]]
        means = [100 * mean(curve[i]["map_11"] for curve in curves) for i in range(len(steps))]
        axes.plot(steps, means, color=MINE, linewidth=2.5, marker="o", markersize=4)
    axes.set_xlim(0)
    axes.set_ylim(0)
    axes.tick_params(length=0)
    axes.grid(color=GRID)
    axes.set_xlabel("steps")
    axes.set_title("mAP of plain while it learns", **PANEL_TITLE)


def headline(results: Results) -> str:
    """The findings in words, what differs first."""
    findings: dict[str, list[str]] = {}
    named = [v for *_, rows in report.PAPER for v in rows if v != report.PLAIN]
    for name in dict.fromkeys([*named, *report.BESIDE]):
        if found := report.difference(results, name):
            findings.setdefault(found.finding, []).append(report.NAMES.get(name, name))
    same = findings.pop("no difference found", [])
    parts = [f"{finding} than plain: {', '.join(v)}" for finding, v in sorted(findings.items())]
    if same:
        others = f"the other {len(same)}" if parts else "any"
        parts.append(f"no difference from plain found for {others}")
    words = "; ".join(parts)
    return textwrap.fill(words[:1].upper() + words[1:], 96)


def draw(results: Results, path: Path) -> None:
    """Write the PNG."""
    with plt.rc_context(STYLE):
        figure, (left, right) = plt.subplots(
            1, 2, figsize=(11, 4.6), dpi=150, width_ratios=(1.7, 1), layout="constrained"
        )
        difference_panel(left, results)
        curve_panel(right, results)
        s = results["settings"]
        seeds = len({r["seed"] for r in results["runs"]})
        figure.suptitle(headline(results), x=0.01, ha="left", fontsize=13.5, fontweight="bold")
        note = (
            f"SSD{s['size']} on {s['backbone']}, generated images, {seeds} paired seeds. Dots: the"
            " seeds; bar: interval of their mean, 95% for all together; diamond: the paper's gain"
            f" on VOC with ResNet-50.\n{tables.device_line(results)}"
        )
        figure.supxlabel(note, x=0.01, ha="left", fontsize=8.5, color=QUIET)
        temporary = path.with_name(f".{path.name}.part")
        figure.savefig(temporary, format="png", facecolor="white", metadata={"Software": None})
        temporary.replace(path)
        plt.close(figure)
