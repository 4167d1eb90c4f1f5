"""A small canvas for the pictures: shapes in, SVG out, the same bytes for the same calls."""

from __future__ import annotations

from xml.sax.saxutils import escape

INK, QUIET, LINE, PAPER = "#1f2933", "#5d6977", "#c3cad3", "#ffffff"
BLUE, SKY, PALE = "#0f6f8c", "#a9d3de", "#cfe6ec"
ORANGE, GREY, SAND = "#e58a2b", "#e9edf1", "#fbe7cf"
FONT = "-apple-system, 'Segoe UI', Helvetica, Arial, sans-serif"


class Picture:
    """Boxes, texts and arrows on white, in pixels from the upper left corner."""

    def __init__(self, width: int, height: int, title: str) -> None:
        self._lines = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
            f'width="{width}" height="{height}" role="img" font-family="{escape(FONT)}">',
            f"<title>{escape(title)}</title>",
            '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" '
            f'markerHeight="7" orient="auto"><path d="M0 0 8 4 0 8z" fill="{QUIET}"/></marker>'
            "</defs>",
            f'<rect width="{width}" height="{height}" fill="{PAPER}"/>',
        ]

    def box(
        self, x: float, y: float, width: float, height: float, *, fill: str = PAPER,
        stroke: str = LINE, radius: float = 4,
    ) -> None:  # fmt: skip
        self._lines.append(
            f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="{radius:g}" '
            f'fill="{fill}" stroke="{stroke}"/>'
        )

    def text(
        self, x: float, y: float, words: str, *, size: float = 13, colour: str = INK,
        anchor: str = "start", bold: bool = False,
    ) -> None:  # fmt: skip
        weight = ' font-weight="600"' if bold else ""
        self._lines.append(
            f'<text x="{x:g}" y="{y:g}" font-size="{size:g}" fill="{colour}" '
            f'text-anchor="{anchor}"{weight}>{escape(words)}</text>'
        )

    def heading(self, y: float, words: str) -> None:
        self.text(20, y, words, size=15, bold=True)

    def notes(self, y: float, *lines: str) -> None:
        """Quiet lines of text from here on downwards."""
        for row, words in enumerate(lines):
            self.text(20, y + 17 * row, words, size=12, colour=QUIET)

    def label(
        self, x: float, y: float, width: float, height: float, lines: list[str], *,
        fill: str = PAPER, stroke: str = LINE, size: float = 13, colour: str = INK,
    ) -> None:  # fmt: skip
        """A box with lines of text in its middle, the first one in bold if there are several."""
        self.box(x, y, width, height, fill=fill, stroke=stroke)
        step = size + 4
        top = y + height / 2 - step * (len(lines) - 1) / 2 + size * 0.35
        for row, words in enumerate(lines):
            bold = len(lines) > 1 and row == 0
            small = size if row == 0 else size - 1
            self.text(
                x + width / 2, top + row * step, words,
                size=small, colour=colour, anchor="middle", bold=bold,
            )  # fmt: skip

    def line(
        self, points: list[tuple[float, float]], *, tip: bool = False, colour: str = QUIET,
        dashed: bool = False,
    ) -> None:  # fmt: skip
        path = " ".join(f"{x:g},{y:g}" for x, y in points)
        more = ' marker-end="url(#tip)"' if tip else ""
        more += ' stroke-dasharray="4 3"' if dashed else ""
        self._lines.append(
            f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.5"{more}/>'
        )

    def arrow(self, x: float, y: float, to_x: float, to_y: float, *, dashed: bool = False) -> None:
        self.line([(x, y), (to_x, to_y)], tip=True, dashed=dashed)

    def render(self) -> str:
        return "\n".join([*self._lines, "</svg>", ""])
