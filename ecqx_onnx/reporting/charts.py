"""Charts as inline SVG text: histograms, scatter plots and curves.

Colors are classes of the page's style, so that charts follow light and dark.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from ecqx_onnx.rendering.axes import choose_ticks, label_ticks

# Pixels around the plotted area.
LEFT = 46  # at least
CHARACTER = 6.2  # pixels of width in the labels' size
RIGHT = 10
TOP = 10
BOTTOM = 34
LOWEST_RELEVANCE = 1e-4  # below, points lie on the axis
MOST_LABELS = 10  # epochs named below a curve
LABEL_WIDTH = 18  # pixels that a level's number takes
BAR = 0.76  # of the place between two levels


@dataclass(frozen=True)
class _Area:
    """The size of a chart and of its plotted area, in pixels."""

    width: int
    height: int
    left: int = LEFT

    @property
    def inner(self) -> int:
        return self.width - self.left - RIGHT

    @property
    def tall(self) -> int:
        return self.height - TOP - BOTTOM

    def draw_grid_line(self, y: float, *, text: str) -> str:
        """A horizontal line at y, with its value at the left."""
        line = f'<path class="grid" d="M{self.left} {y:.1f}h{self.inner}"/>'
        return line + _draw_text(self.left - 6, y + 4, text, "end")

    def draw_tick(self, x: float, text: str) -> str:
        """A value below the axis, at x."""
        return _draw_text(x, self.height - BOTTOM + 15, text, "middle")

    def draw_axis_name(self, name: str) -> str:
        return _draw_text(self.left + self.inner / 2, self.height - 3, name, "middle")

    def wrap(self, parts: Sequence[str], description: str) -> str:
        """The whole chart; screen readers read the description."""
        return (
            f'<svg viewBox="0 0 {self.width} {self.height}" role="img" '
            f'aria-label="{escape(description)}">{"".join(parts)}</svg>'
        )


def draw_histogram(
    counts: Sequence[tuple[int, int]], total: int, *, width: int = 340, height: int = 210
) -> str:
    """Draw how many weights each level has; the zero level stands out.

    Args:
        counts: (level, how many weights have it), levels rising.
        total: how many weights there are; bars are shares of them.
        width: of the chart, in pixels.
        height: likewise.

    Returns:
        One <svg> element.
    """
    highest = max((count for _, count in counts), default=1) / max(1, total)
    ticks = choose_ticks(100 * highest)
    labels = [f"{label} %" for label in label_ticks(ticks)]
    area = _Area(width, height, _find_left(labels))
    slot = area.inner / max(1, len(counts))
    parts = []
    for tick, label in zip(ticks, labels, strict=True):
        up = tick / (100 * highest) if highest else 0.0
        parts.append(area.draw_grid_line(TOP + area.tall * (1 - up), text=label))
    every = math.ceil(len(counts) * LABEL_WIDTH / area.inner)
    for i, (level, count) in enumerate(counts):
        share = count / max(1, total)
        size = area.tall * share / highest if highest else 0
        kind = "zero" if level == 0 else "bar"
        x = area.left + slot * (i + (1 - BAR) / 2)
        y = TOP + area.tall - size
        words = f"level {level}: {count:,} weights, {100 * share:.2f} %"
        place = f'x="{x:.1f}" y="{y:.1f}" width="{slot * BAR:.1f}" height="{size:.1f}"'
        parts.append(f'<rect class="{kind}" {place}><title>{words}</title></rect>')
        if i % every == 0 or level == 0:
            parts.append(area.draw_tick(area.left + (i + 0.5) * slot, str(level).replace("-", "−")))
    parts.append(area.draw_axis_name("level"))
    return area.wrap(parts, "share of the weights on each level")


def draw_scatter(
    magnitudes: Sequence[float],
    relevances: Sequence[float],
    levels: Sequence[int],
    *,
    width: int = 340,
    height: int = 210,
) -> str:
    """Draw weights by magnitude and relevance; those on the zero level are hollow, others filled.

    Args:
        magnitudes: |w| of each weight, to the right.
        relevances: of each weight, shares of the largest, upwards on a logarithmic axis.
        levels: of each weight.
        width: of the chart, in pixels.
        height: likewise.

    Returns:
        One <svg> element.
    """
    area = _Area(width, height)
    most = max(magnitudes, default=0) or 1.0
    decades = -math.log10(LOWEST_RELEVANCE)
    # A path for all points of a kind, as thousands of elements would make pages slow.
    points: dict[str, list[str]] = {"pruned": [], "kept": []}
    for magnitude, relevance, level in zip(magnitudes, relevances, levels, strict=True):
        up = 1 + math.log10(max(relevance, LOWEST_RELEVANCE)) / decades
        x = LEFT + area.inner * magnitude / most
        y = TOP + area.tall * (1 - min(1.0, up))
        points["kept" if level else "pruned"].append(f"M{x:.1f} {y:.1f}h0")
    parts = []
    for decade in range(int(decades), -1, -1):
        y = TOP + area.tall * (decade / decades)
        parts.append(f'<path class="grid" d="M{LEFT} {y:.1f}h{area.inner}"/>')
        power = _write_power(decade)
        if decade == int(decades):
            power = f"≤ {power}"
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{power}</text>')
    ticks = choose_ticks(most)
    for value, label in zip(ticks, label_ticks(ticks), strict=True):
        parts.append(area.draw_tick(LEFT + area.inner * value / most, label))
    parts.append(area.draw_axis_name("magnitude |w|"))
    for kind, path in points.items():
        if path:
            parts.append(f'<path class="{kind}" d="{"".join(path)}"/>')
    return area.wrap(parts, "relevance against magnitude")


def _write_power(decade: int) -> str:
    """10 to the power of -decade, with a raised exponent; 1 for 0."""
    if decade == 0:
        return "1"
    return f'10<tspan dy="-4" font-size="8">−{decade}</tspan>'


def draw_curves(
    series: Sequence[tuple[str, str, Sequence[float | None]]],
    *,
    best: int | None,
    percent: bool,
    width: int = 440,
    height: int = 230,
) -> str:
    """Draw values by epoch.

    Args:
        series: (name, class of the page's style, one value an epoch); None, NaN and infinity are
            left out.
        best: the epoch, from 1, that a line marks; None for no line.
        percent: whether values are shares in [0, 1], written in %.
        width: of the chart, in pixels.
        height: likewise.

    Returns:
        One <svg> element.
    """
    epochs = max((len(line) for _, _, line in series), default=0)
    low, high = _find_range(series, percent)
    factor = 100 if percent else 1
    ticks = choose_ticks(factor * high, factor * low)
    labels = label_ticks(ticks)
    if percent:
        labels = [f"{label} %" for label in labels]
    area = _Area(width, height, _find_left(labels))

    def place_epoch(epoch: int) -> float:
        if epochs <= 1:
            return area.left + area.inner * 0.5
        return area.left + area.inner * ((epoch - 1) / (epochs - 1))

    def place_value(value: float) -> float:
        return TOP + area.tall * (high - value) / (high - low)

    parts = []
    for tick, label in zip(ticks, labels, strict=True):
        if low <= tick / factor <= high:
            parts.append(area.draw_grid_line(place_value(tick / factor), text=label))
    every = max(1, math.ceil(epochs / MOST_LABELS))
    for epoch in range(1, epochs + 1):
        if epoch % every == 0 or epoch == 1:
            parts.append(area.draw_tick(place_epoch(epoch), str(epoch)))
    parts.append(area.draw_axis_name("epoch"))
    if best:
        line = f'<path class="best" d="M{place_epoch(best):.1f} {TOP}v{area.tall}">'
        parts.append(f"{line}<title>best epoch: {best}</title></path>")
    for name, kind, values in series:
        corners = []
        dots = []
        for epoch, value in enumerate(values, 1):
            if value is None or not math.isfinite(value):
                continue
            x = place_epoch(epoch)
            y = place_value(value)
            corners.append(f"{x:.1f} {y:.1f}")
            shown = f"{100 * value:.2f} %" if percent else f"{value:.4g}"
            title = f"<title>{escape(name)}, epoch {epoch}: {shown}</title>"
            dot = f'<circle class="dot {kind}" cx="{x:.1f}" cy="{y:.1f}" r="2.5">'
            dots.append(f"{dot}{title}</circle>")
        if corners:
            parts.append(f'<path class="line {kind}" d="M{"L".join(corners)}"/>')
        parts += dots
    names = ", ".join(name for name, _, _ in series)
    return area.wrap(parts, f"{names} by epoch")


def _find_range(
    series: Sequence[tuple[str, str, Sequence[float | None]]], percent: bool
) -> tuple[float, float]:
    """(low, high) of the finite values, with some room around them; shares stay in [0, 1]."""
    values: list[float] = []
    for _, _, line in series:
        values += [value for value in line if value is not None and math.isfinite(value)]
    low = min(values, default=0.0)
    high = max(values, default=1.0)
    room = 0.05 * (high - low)
    if room == 0:
        room = 0.01 if percent else 0.1
    low -= room
    high += room
    if percent:
        return max(0.0, low), min(1.0, high)
    return low, high


def _find_left(labels: Sequence[str]) -> int:
    """Room for the labels of the lines at the left, in pixels."""
    longest = max(map(len, labels), default=0)
    return max(LEFT, math.ceil(CHARACTER * longest) + 12)


def _draw_text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
