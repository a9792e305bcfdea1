"""Grouped bars as SVG text. Knows numbers and names alone."""

from collections.abc import Mapping
from html import escape

COLOURS = ("#3b6ea5", "#e08a3c", "#5a9a68", "#a05195", "#7a7a7a")
HEIGHT, BAR, GAP, LEFT, TOP = 220, 26, 26, 56, 64  # pixels
LETTER = 6.2  # width of one, about


def bars(title: str, heights: Mapping[tuple[str, str], float]) -> str:
    """A plot of values by (place on the axis, colour), both in the order in which they first come."""
    places = list(dict.fromkeys(place for place, _ in heights))
    series = list(dict.fromkeys(name for _, name in heights))
    top = max([*heights.values(), 1e-9])
    lines = {place: _wrapped(place, max(12, int((len(series) * BAR + GAP) / LETTER))) for place in places}
    group = max(len(series) * BAR + GAP, 90)
    width = LEFT + group * len(places) + GAP
    height = TOP + HEIGHT + 20 + 14 * max(map(len, lines.values()))
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'font-family="sans-serif" font-size="11"><rect width="100%" height="100%" fill="white"/>',
        _text(12, 20, title, "start", 14),
    ]
    at = float(LEFT)
    for number, name in enumerate(series):
        parts.append(f'<rect x="{at:.0f}" y="34" width="10" height="10" fill="{COLOURS[number % len(COLOURS)]}"/>')
        parts.append(_text(at + 14, 43, name, "start"))
        at += 32 + LETTER * len(name)
    for step in range(5):
        value, y = top * step / 4, TOP + HEIGHT * (1 - step / 4)
        parts.append(f'<line x1="{LEFT}" x2="{width - 8}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/>')
        parts.append(_text(LEFT - 6, y + 4, _number(value), "end"))
    for column, place in enumerate(places):
        x = LEFT + column * group + (group - len(series) * BAR) / 2
        for number, name in enumerate(series):
            if (place, name) in heights:
                value = heights[place, name]
                size, left = HEIGHT * value / top, x + number * BAR
                colour = COLOURS[number % len(COLOURS)]
                y = TOP + HEIGHT - size
                parts.append(
                    f'<rect x="{left:.1f}" y="{y:.1f}" width="{BAR - 3}" height="{size:.1f}" fill="{colour}"/>'
                )
                parts.append(_text(left + BAR / 2 - 1, y - 3, _number(value), "middle", 9))
        for row, line in enumerate(lines[place]):
            parts.append(_text(LEFT + (column + 0.5) * group, TOP + HEIGHT + 16 + 14 * row, line, "middle"))
    return "\n".join([*parts, "</svg>"]) + "\n"


def _text(x: float, y: float, text: str, anchor: str, size: int = 11) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}">{escape(text)}</text>'


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _wrapped(text: str, width: int) -> list[str]:
    lines = [""]
    for word in text.split():
        if lines[-1] and len(lines[-1]) + len(word) >= width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return lines
