"""Things to detect, and things to be taken for them: anti-aliased drawings of one thing each.

Three kinds of classes. ``disc``, ``ring``, ``triangle``, ``star`` and ``cross`` are shapes, of any
colour and without a pattern. ``stripes``, ``dots`` and ``checks`` are squares with that pattern.
``redleaf`` and ``blueleaf`` are pointed ovals of that hue. No other thing is an object: plain
squares, green leaves, bars and scribbles are clutter.
"""

from __future__ import annotations

import colorsys
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from PIL import Image, ImageDraw

Rng: TypeAlias = np.random.Generator
Outline: TypeAlias = list[np.ndarray]  # polygons [N, 2]; a second one is a hole in the first

SHAPES = ("disc", "ring", "triangle", "star", "cross")
PATTERNS = ("stripes", "dots", "checks")
_HUES = {"redleaf": (-0.03, 0.05), "blueleaf": (0.54, 0.68), "greenleaf": (0.25, 0.4)}
LEAVES = ("redleaf", "blueleaf")
CLASSES = SHAPES + PATTERNS + LEAVES
CLUTTER = ("square", "greenleaf", "bar", "scribble")

_SUBPIXELS = 4  # a side of a pixel, for outlines
_CONTRAST = 70  # at least, between colours that have to be told apart, of 441 from black to white


@dataclass(frozen=True)
class Sprite:
    """A drawn thing."""

    colour: np.ndarray  # float32 [h, w, 3], 0 to 255
    alpha: np.ndarray  # float32 [h, w], 0 to 1


def draw(kind: str, side: float, ground: np.ndarray, rng: Rng) -> Sprite:
    """One of CLASSES or CLUTTER, turned at random.

    Args:
        side: of the longer side of its bounding box, in pixels.
        ground: colour behind it [3], 0 to 255, from which its own differ.
    """
    outline = _OUTLINES["leaf" if kind in _HUES else "square" if kind in PATTERNS else kind](rng)
    squeeze = np.diag([1, rng.uniform(0.75, 1)])
    matrix = _rotation(rng) @ squeeze @ _rotation(rng) if kind in SHAPES else _rotation(rng)
    placed = [polygon @ matrix.T for polygon in outline]
    low, high = placed[0].min(0), placed[0].max(0)
    scale = side / (high - low).max()
    alpha = _filled([(polygon - low) * scale for polygon in placed], (high - low) * scale)

    height, width = alpha.shape
    y, x = np.mgrid[:height, :width].astype(np.float32) + np.float32(0.5)
    # In its own coordinates a pattern goes along the axes, from -1 to 1.
    own = (np.stack([x, y], -1) / scale + low) @ np.linalg.inv(matrix).T
    colour = _paint(kind, own[..., 0], own[..., 1], scale, ground, rng)
    light = rng.uniform(-0.3, 0.3, 2)
    shade = 1 + light[0] * (x / width - 0.5) + light[1] * (y / height - 0.5)
    return Sprite(np.clip(colour * shade[..., None], 0, 255).astype(np.float32), alpha)


def _filled(polygons: Outline, extent: np.ndarray) -> np.ndarray:
    """How much of each pixel lies within, float32 [h, w]."""
    width, height = (max(1, math.ceil(e)) for e in extent)
    canvas = Image.new("L", (width * _SUBPIXELS, height * _SUBPIXELS))
    for polygon, level in zip(polygons, (255, 0)):
        ImageDraw.Draw(canvas).polygon((polygon * _SUBPIXELS).ravel().tolist(), fill=level)
    return np.asarray(canvas.reduce(_SUBPIXELS), np.float32) / 255


def _paint(
    kind: str, u: np.ndarray, v: np.ndarray, scale: float, ground: np.ndarray, rng: Rng
) -> np.ndarray:
    """Colours [h, w, 3] at coordinates ``u`` and ``v``, whose unit is ``scale`` pixels."""
    if kind in _HUES:
        hue = rng.uniform(*_HUES[kind]) % 1
        return _plain(_unlike([ground], lambda: _saturated(hue, rng)), u)

    def any_colour() -> np.ndarray:
        return rng.uniform(0, 255, 3)

    colour = _unlike([ground], any_colour)
    if kind not in PATTERNS:
        return _plain(colour, u)
    other = _unlike([ground, colour], any_colour)
    half_period = 2 / rng.integers(4, 7)
    a, b = (np.sin((w + 1) * math.pi / half_period) for w in (u, v))
    wave = {"stripes": a, "checks": a * b, "dots": (a * a * b * b) * 2 - 1}[kind]
    # The step from one colour to the other takes about one pixel.
    sharp = half_period * scale / math.pi
    mix = np.clip(0.5 + 0.5 * wave * sharp, 0, 1)[..., None]
    mixed: np.ndarray = colour + (other - colour) * mix
    return mixed


def _plain(colour: np.ndarray, like: np.ndarray) -> np.ndarray:
    return np.broadcast_to(colour, (*like.shape, 3))


def _saturated(hue: float, rng: Rng) -> np.ndarray:
    return np.multiply(colorsys.hsv_to_rgb(hue, rng.uniform(0.75, 1), rng.uniform(0.5, 1)), 255)


def _unlike(others: list[np.ndarray], propose: Callable[[], np.ndarray]) -> np.ndarray:
    """A colour that can be told from all ``others``, or the most distant of 30 proposals."""
    best, most = propose(), 0.0
    for _ in range(30):
        colour = propose()
        distance = min(float(np.linalg.norm(colour - other)) for other in others)
        if distance > _CONTRAST:
            return colour
        if distance > most:
            best, most = colour, distance
    return best


def _rotation(rng: Rng) -> np.ndarray:
    angle = rng.uniform(0, 2 * math.pi)
    return np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])


def _circle(radius: float, corners: int = 64) -> np.ndarray:
    angle = np.arange(corners) * (2 * math.pi / corners)
    return radius * np.stack([np.cos(angle), np.sin(angle)], 1)


def _ring(rng: Rng) -> Outline:
    return [_circle(1), _circle(rng.uniform(0.5, 0.7))]


def _star(rng: Rng) -> Outline:
    points = _circle(1, 10)
    points[1::2] *= rng.uniform(0.38, 0.48)
    return [points]


def _cross(rng: Rng) -> Outline:
    w = rng.uniform(0.22, 0.36)
    arm = np.array([[w, w], [w, 1], [-w, 1]])
    turn = np.array([[0, -1], [1, 0]])
    return [np.concatenate([arm @ np.linalg.matrix_power(turn, k).T for k in range(4)])]


def _leaf(rng: Rng) -> Outline:
    t = np.linspace(-1, 1, 24)
    edge = rng.uniform(0.35, 0.55) * (1 - t**2)
    return [np.concatenate([np.stack([t, edge], 1), np.stack([t, -edge], 1)[-2:0:-1]])]


def _bar(rng: Rng) -> Outline:
    return [_SQUARE * (1, rng.uniform(0.06, 0.14))]


def _scribble(rng: Rng) -> Outline:
    """A line of one width along a random wave."""
    t = np.linspace(-1, 1, 40)
    wave = sum(
        rng.uniform(-0.3, 0.3) * np.sin(k * math.pi * t + rng.uniform(0, 6)) for k in (1, 2, 3)
    )
    width = rng.uniform(0.05, 0.09)
    return [np.concatenate([np.stack([t, wave + width], 1), np.stack([t, wave - width], 1)[::-1]])]


_SQUARE = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]], float)
_OUTLINES: dict[str, Callable[[Rng], Outline]] = {
    "disc": lambda rng: [_circle(1)],
    "ring": _ring,
    "triangle": lambda rng: [_circle(1, 3)],
    "star": _star,
    "cross": _cross,
    "square": lambda rng: [_SQUARE],
    "leaf": _leaf,
    "bar": _bar,
    "scribble": _scribble,
}
