"""The pictures of these pages, from the schedule, the plans and PyTorch's own operations."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from da_ops import _plan
from da_ops.backends.base import Plan, TailKind
from da_ops.backends.eager import count_formula
from da_ops.backends.schedule import SCHEDULES, Pass
from da_ops.backends.tail import Walks, direction, floor, layer_walks, plain_plan, tail_walks

from .svg import BLUE, GREY, ORANGE, PALE, QUIET, SAND, SKY, Picture

ORDER = "spatial_channel"
SHAPE, DEVICE = (64, 256, 56, 56), "sm_90"  # the call that the pages take as their example


def counts() -> dict[str, list[tuple[str, int, int]]]:
    """The bars of the first picture: name, passes forward, passes backward."""

    def passes(walks: Walks) -> tuple[int, int]:
        forward, backward = (direction(way, cached=0).moved for way in walks)
        return forward, backward

    def cached(kind: TailKind | None) -> tuple[int, int]:
        return floor(kind)["forward"], floor(kind)["backward"]

    def plain(plan: Plan) -> tuple[int, int]:
        return plan.forward.moved, plan.backward.moved

    tail = TailKind("training")
    return {
        "The layer": [
            ("plain PyTorch", *plain(count_formula(ORDER, "affine"))),
            ("portable launches", *passes(layer_walks(ORDER))),
            ("image on chip, or in cache", *cached(None)),
        ],
        "Norm, attention, shortcut, ReLU": [
            ("plain PyTorch", *plain(plain_plan(ORDER, "affine", tail))),
            ("plain, no attention", *plain(plain_plan("none", "affine", tail))),
            ("portable launches", *passes(tail_walks(ORDER, tail))),
            ("image in cache", *cached(tail)),
        ],
    }


# Pictures


def operator() -> Picture:
    """The operator, and what a training step of it moves."""
    p = Picture(880, 452, "The operator and its passes over memory")
    p.heading(30, "The operator")
    y, h = 60, 56
    p.label(20, y + 60, 54, h, ["x"], fill=GREY)
    p.label(104, y, 92, h, ["mean", "channels"], fill=PALE)
    p.label(222, y - 16, 118, 38, ["3x3"], fill=PALE)
    p.label(222, y + 32, 118, 38, ["3x3, dilated by 3"], fill=PALE, size=12)
    p.label(366, y, 92, h, ["1x1", "sigmoid"], fill=PALE)
    p.label(396, y + 70, 36, 36, ["×"], size=18)
    p.label(496, y, 92, h, ["mean", "pixels"], fill=SAND)
    p.label(614, y, 118, h, ["weight, bias", "sigmoid"], fill=SAND)
    p.label(655, y + 70, 36, 36, ["×"], size=18)
    p.label(806, y + 60, 54, h, ["y"], fill=GREY)
    middle = y + 28
    p.line([(74, y + 78), (90, y + 78), (90, middle), (102, middle)], tip=True)
    p.line([(196, middle), (209, middle), (209, y + 3), (220, y + 3)], tip=True)
    p.line([(196, middle), (209, middle), (209, y + 51), (220, y + 51)], tip=True)
    p.line([(340, y + 3), (353, y + 3), (353, middle), (364, middle)], tip=True)
    p.line([(340, y + 51), (353, y + 51), (353, middle)])
    p.arrow(414, y + h, 414, y + 68)
    p.arrow(74, y + 88, 394, y + 88)
    p.line([(480, y + 88), (480, middle), (494, middle)], tip=True)
    p.arrow(432, y + 88, 653, y + 88)
    p.arrow(588, middle, 612, middle)
    p.arrow(673, y + h, 673, y + 68)
    p.arrow(691, y + 88, 804, y + 88)
    p.text(250, y + 122, "spatial mask: 20 weights", size=12, colour=BLUE)
    p.text(560, y + 122, "channel mask: 2 for each channel", size=12, colour="#a65c0c")

    p.heading(222, "Full-size tensors read and written in a training step")
    shown = counts()
    scale = 560 / max(sum(passes) for rows in shown.values() for _, *passes in rows)
    y = 242
    for title, rows in shown.items():
        p.text(20, y + 13, title, size=12, colour=QUIET)
        y += 22
        for name, forward, backward in rows:
            dark, pale = DULL if name.startswith("plain") else OURS
            p.text(200, y + 12, name, size=12, anchor="end")
            p.box(210, y, forward * scale, 15, fill=dark, radius=0)
            p.box(210 + forward * scale, y, backward * scale, 15, fill=pale, radius=0)
            words = f"{forward} + {backward} = {forward + backward}"
            p.text(218 + (forward + backward) * scale, y + 12, words, size=12)
            y += 20
        y += 4
    p.text(860, 442, "forward + backward", size=11, colour=QUIET, anchor="end")
    return p


OURS, DULL = (BLUE, "#6fb7c9"), ("#b8c0ca", "#dde2e8")  # bars forward and backward


def passes() -> Picture:
    """The schedule of the default order, with the maps that are made between its passes."""
    p = Picture(880, 276, "The passes of the default order")
    for row, (way, steps) in enumerate(zip(("forward", "backward"), SCHEDULES[ORDER])):
        y = 44 + row * 120
        p.heading(y + 34, way)
        for column, step in enumerate(steps):
            x = 120 + column * 262
            p.label(x, y + 6, 148, 46, [step.name], fill=SAND if step.writes else PALE)
            p.text(x + 74, y - 4, f"reads {', '.join(step.reads)}", size=12, anchor="middle")
            p.text(x + 74, y + 70, result(step), size=12, colour=QUIET, anchor="middle")
            if maps := made(way, step):
                p.arrow(x + 148, y + 29, x + 172, y + 29)
                p.label(x + 174, y + 9, 62, 40, [maps], size=12, fill=GREY)
                p.arrow(x + 236, y + 29, x + 260, y + 29)
    p.notes(
        262,
        "Blue passes add up; sand-coloured ones write. What is made between them is small: a value "
        "a pixel, or a channel, of each image.",
    )
    return p


def result(step: Pass) -> str:
    """The result of a pass."""
    if step.writes:
        return f"writes {step.writes[0]}"
    axes = (("by pixel", step.sums.pixels), ("by channel", step.sums.channels))
    return f"sums of {' '.join(step.reads)}, {' and '.join(name for name, there in axes if there)}"


def made(way: str, step: Pass) -> str:
    """The maps that follow from a pass."""
    by_pixel, by_channel = ("s", "c") if way == "forward" else ("dm/C", "dg/P")
    names = ((by_pixel, step.complete.pixels), (by_channel, step.complete.channels))
    return " and ".join(name for name, there in names if there)


def rows() -> Picture:
    """How vectors of eight lie over rows of 49 pixels in half precision."""
    vector, cols = 8, 49
    period = vector // math.gcd(cols, vector)
    p = Picture(880, 304, "Vectors of 16 bytes over rows of 49 elements")
    p.heading(28, f"7x7 pixels in half precision: rows of {cols} elements, vectors of {vector}")
    scale = 720 / (math.ceil((cols + vector - 1) / vector) * vector)
    for row in range(period):
        y = 46 + row * 26
        start = row * cols
        first = at = start // vector * vector
        p.text(108, y + 14, f"row {row}, phase {row % period}", size=12, anchor="end")
        while at < start + cols:
            p.box(120 + (at - first) * scale, y, vector * scale, 20, radius=0)
            begin, end = max(at, start), min(at + vector, start + cols)
            left, width = 120 + (begin - first) * scale, (end - begin) * scale
            p.box(left, y + 3, width, 14, fill=(SKY, PALE)[row % 2], stroke="none", radius=0)
            at += vector
    p.notes(
        276,
        f"After {period} rows, a super-row, vectors begin alike again: the period is {period}. A "
        "thread keeps to one phase, so where its row begins in",
        "its vectors never changes. Rows of whole vectors, as of 56x56 pixels, have the period 1.",
    )
    return p


def example(wish: str) -> dict[str, Any]:
    """The plan of the pages' example on a typical GPU: "portable", or one launch."""
    return _plan.cuda(SHAPE, False, "float16", ORDER, "affine", int(DEVICE[3:]), 0, wish=wish)


def tiles() -> Picture:
    """The tiles of an image and the waves of their blocks."""
    plan = example("portable")
    waves = next(step for step in plan["forward"] if step["reads"])["waves"]
    images, channels, pixels = SHAPE[0], SHAPE[1], SHAPE[2] * SHAPE[3]
    high, wide = (int(part.split()[0]) for part in plan["tile"].split(" x "))
    across, down = math.ceil(pixels / wide), math.ceil(channels / high)
    assert across * down == plan["tiles_an_image"]
    p = Picture(880, 250, "Tiles and waves")
    p.heading(
        28,
        f"{channels} channels x {pixels} pixels of an image in {across * down} tiles of up to "
        f"{plan['tile']}",
    )
    for row in range(down):
        top, bottom = (60 * min(i * high, channels) / channels for i in (row, row + 1))
        for column in range(across):
            left, right = (840 * min(i * wide, pixels) / pixels for i in (column, column + 1))
            fill = (SKY, PALE)[(row + column) % 2]
            p.box(20 + left, 42 + top, right - left, bottom - top, fill=fill, radius=0)
    p.heading(
        140,
        f"{images} images, {waves['blocks']} blocks, {waves['slots']} at once: {waves['waves']} "
        f"waves, {waves['efficiency']:.0%} of the slots' time is work",
    )
    scale = 840 / (waves["waves"] * waves["slots"])
    p.box(20, 154, 840, 34, fill=GREY, radius=0)
    for wave in range(waves["waves"]):
        before = wave * waves["slots"]
        blocks = min(waves["slots"], waves["blocks"] - before)
        p.box(20 + before * scale, 154, blocks * scale, 34, fill=(SKY, PALE)[wave % 2], radius=0)
    p.notes(
        216,
        f"{DEVICE}, {plan['multiprocessors']} multiprocessors. The plan chooses tiles so that "
        "blocks fill whole waves: one block more than fits would",
        "cost another wave.",
    )
    return p


def team() -> Picture:
    """The blocks that keep an image on the chip."""
    chip = example("cluster:16")["one_launch_forward"]
    blocks = chip["blocks_an_image"]
    channels = SHAPE[1] // blocks
    p = Picture(880, 330, "The blocks of a team")
    p.heading(28, f"One image, {blocks} blocks: each keeps {channels} channels in shared memory")
    for column, block in enumerate((0, 1, 2, blocks - 1)):
        x, first = 20 + column * 216, block * channels
        p.box(x, 44, 192, 150, stroke=QUIET)
        p.text(x + 12, 64, f"block {block}", size=13, bold=True)
        own = f"x: channels {first} to {first + channels - 1}"
        p.label(x + 12, 74, 168, 40, [own], fill=PALE, size=12)
        p.label(x + 12, 122, 168, 26, ["sums over them, by pixel"], fill=GREY, size=12)
        p.label(x + 12, 156, 168, 26, ["the spatial mask, all of it"], fill=SAND, size=12)
        p.line([(x + 96, 196), (x + 96, 216)], colour=ORANGE)
    p.text(649, 130, "...", size=16, anchor="middle")
    p.line([(116, 216), (764, 216)], colour=ORANGE)
    p.text(
        440,
        234,
        f"exchange: each block adds up all blocks' sums of its slice, 1/{blocks} of the pixels, "
        "makes the mask there, and hands it to the others",
        size=12,
        anchor="middle",
    )
    p.notes(
        268,
        "The channel mask needs no exchange here: a block has all pixels of its channels. In "
        "channels_last it is the other way round.",
        "Then y = x s c is written from shared memory, while the next image comes in. x was read "
        f"once: {chip['x_kept']:.0%} of it fits.",
    )
    shape = "x".join(map(str, SHAPE))
    p.text(
        20,
        316,
        f"{shape} in half precision on {DEVICE}: a {chip['barrier']} of {blocks} blocks an image, "
        f"{chip['images_at_once']} images at once",
        size=12,
    )
    return p


PICTURES: dict[str, Callable[[], Picture]] = {
    f"{draw.__name__}.svg": draw for draw in (operator, passes, rows, tiles, team)
}
