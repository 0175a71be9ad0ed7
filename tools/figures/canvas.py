"""Small SVG canvas with named colours that follow the reader's light or dark setting."""

from __future__ import annotations

import html

# name: (light, dark). Text on `page` and on every fill has a contrast of at least 4.5.
COLOURS = {
    "page": ("#ffffff", "#1b1d22"),
    "ink": ("#1c1b19", "#e9e6df"),
    "soft": ("#5b5a57", "#aeb0b6"),
    "line": ("#b9b6ae", "#565a63"),
    "none": ("#ebe8e1", "#383c45"),
    "prefix": ("#c9cbd1", "#555b68"),
    "old": ("#9cc3ee", "#2f5d92"),
    "new": ("#f2b24c", "#a8680a"),
    "mark": ("#c2410c", "#fb923c"),
}


class Canvas:
    """SVG picture, built up shape by shape.

    Args:
        width: Width of the picture, in pixels.
        height: Height of the picture, in pixels.
        title: Description for readers who cannot see the picture.
    """

    def __init__(self, width: int, height: int, title: str):
        self._size = (width, height)
        self._title = title
        self._shapes: list[str] = []

    def rect(
        self, x: float, y: float, width: float, height: float, fill: str, *, stroke: str = ""
    ) -> None:
        """Add a rectangle with slightly rounded corners."""
        radius = 2 if min(width, height) < 16 else 5
        line = f' stroke="var(--{stroke})"' if stroke else ""
        self._shapes.append(
            f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="{radius}" '
            f'fill="var(--{fill})"{line}/>'
        )

    def text(
        self,
        x: float,
        y: float,
        text: str,
        *,
        size: float = 13,
        anchor: str = "start",
        fill: str = "ink",
        bold: bool = False,
    ) -> None:
        """Add a line of text; y is its baseline."""
        weight = ' font-weight="600"' if bold else ""
        self._shapes.append(
            f'<text x="{x:g}" y="{y:g}" font-size="{size:g}" text-anchor="{anchor}" '
            f'fill="var(--{fill})"{weight}>{html.escape(text)}</text>'
        )

    def line(
        self, x1: float, y1: float, x2: float, y2: float, *, stroke: str = "line", width: float = 1
    ) -> None:
        """Add a straight line."""
        self._shapes.append(
            f'<path d="M{x1:g} {y1:g}L{x2:g} {y2:g}" stroke="var(--{stroke})" '
            f'stroke-width="{width:g}" fill="none"/>'
        )

    def arrow(self, *points: tuple[float, float], stroke: str = "soft") -> None:
        """Add a bent line with an arrowhead at its last point."""
        path = "L".join(f"{x:g} {y:g}" for x, y in points)
        self._shapes.append(
            f'<path d="M{path}" stroke="var(--{stroke})" stroke-width="1.5" fill="none" '
            'marker-end="url(#head)"/>'
        )

    def render(self) -> str:
        """Return the picture as an SVG document."""
        width, height = self._size
        light = " ".join(f"--{name}: {pair[0]};" for name, pair in COLOURS.items())
        dark = " ".join(f"--{name}: {pair[1]};" for name, pair in COLOURS.items())
        shapes = "\n".join(self._shapes)
        return f"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" \
width="{width}" height="{height}" role="img" aria-labelledby="title" \
font-family="system-ui, sans-serif">
<title id="title">{html.escape(self._title)}</title>
<style>
:root {{ {light} }}
@media (prefers-color-scheme: dark) {{ :root {{ {dark} }} }}
</style>
<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" \
orient="auto"><path d="M0 0L8 4L0 8z" fill="var(--soft)"/></marker></defs>
<rect width="{width}" height="{height}" rx="8" fill="var(--page)"/>
{shapes}
</svg>
"""
