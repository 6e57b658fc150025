"""The curves of a fine-tuning run as one SVG: training loss, and below it the figure that chose the preset."""

from collections.abc import Mapping, Sequence
from typing import Any
from xml.sax.saxutils import escape

WIDTH, HEIGHT, MARGIN = 640, 220, 48  # of one panel, in pixels

Points = Sequence[tuple[float, float]]


def curves(log: Sequence[Mapping[str, Any]], evaluations: Sequence[Mapping[str, Any]], metric: str) -> str:
    """The SVG of a run's log and evaluations, as report.json has them."""
    panels = [("loss", [(entry["step"], entry["loss"]) for entry in log])]
    if evaluations:
        panels.append((metric, [(entry["step"], entry[metric]) for entry in evaluations]))
    last = max(step for _, points in panels for step, _ in points)
    height = HEIGHT * len(panels)
    drawn = "".join(_panel(name, points, last, HEIGHT * index) for index, (name, points) in enumerate(panels))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
        f'font-family="sans-serif" font-size="12"><rect width="100%" height="100%" fill="white"/>{drawn}</svg>\n'
    )


def _panel(name: str, points: Points, last_step: float, top: float) -> str:
    values = [value for _, value in points]
    low, high = min(values), max(values)
    left, right, bottom = MARGIN, WIDTH - MARGIN / 2, top + HEIGHT - MARGIN / 2

    def place(step: float, value: float) -> tuple[float, float]:
        share = (value - low) / (high - low) if high > low else 0.5
        return left + (right - left) * step / last_step, bottom - (HEIGHT - MARGIN) * share

    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in points))
    dots = "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2"/>' for x, y in (place(*point) for point in points[-1:]))
    labels = "".join(
        f'<text x="{left - 4}" y="{place(0, value)[1] + 4:.1f}" text-anchor="end">{value:.4g}</text>'
        for value in sorted({low, high})
    )
    axes = f'<path d="M{left} {bottom - HEIGHT + MARGIN:.1f}V{bottom:.1f}H{right:.1f}" fill="none" stroke="#999"/>'
    end = f'<text x="{right:.1f}" y="{bottom + 14:.1f}" text-anchor="end">step {last_step:g}</text>'
    title = f'<text x="{left}" y="{top + 16:.1f}" font-weight="bold">{escape(name)}</text>'
    line = f'<polyline points="{path}" fill="none" stroke="#1f77b4"/>'
    return f'<g fill="#333">{title}{axes}{labels}{end}{line}{dots}</g>'
