"""Numbers -> inline SVG, as text. Colours are classes of the page's style, so that charts follow light and dark."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from html import escape

LEFT, RIGHT, TOP, BOTTOM = 46, 10, 10, 34  # pixels around the plotted area
LOWEST_RELEVANCE = 1e-4  # below, points lie on the axis


def draw_histogram(
    counts: Sequence[tuple[int, int]], total: int, *, width: int = 340, height: int = 210
) -> str:
    """counts: (level, how many weights have it), levels rising. Bars are shares of all; the zero level stands out."""
    inner, tall = width - LEFT - RIGHT, height - TOP - BOTTOM
    highest = max((count for _, count in counts), default=1) / max(1, total)
    slot = inner / max(1, len(counts))
    parts = [
        draw_grid(choose_ticks(highest), highest, inner, tall, lambda share: f"{100 * share:g} %")
    ]
    every = math.ceil(len(counts) * 18 / inner)
    for i, (level, count) in enumerate(counts):
        share = count / max(1, total)
        size = tall * share / highest if highest else 0
        kind = "zero" if level == 0 else "bar"
        x, y = LEFT + i * slot + slot * 0.12, TOP + tall - size
        words = f"level {level}: {count:,} weights, {100 * share:.2f} %"
        place = f'x="{x:.1f}" y="{y:.1f}" width="{slot * 0.76:.1f}" height="{size:.1f}"'
        parts.append(f'<rect class="{kind}" {place}><title>{words}</title></rect>')
        if i % every == 0 or level == 0:
            parts.append(
                draw_text(
                    LEFT + (i + 0.5) * slot,
                    height - BOTTOM + 15,
                    str(level).replace("-", "−"),
                    "middle",
                )
            )
    parts.append(draw_text(LEFT + inner / 2, height - 3, "level", "middle"))
    return wrap_svg(width, height, parts, "share of the weights on each level")


def draw_scatter(
    magnitudes: Sequence[float],
    relevances: Sequence[float],
    levels: Sequence[int],
    *,
    width: int = 340,
    height: int = 210,
) -> str:
    """|w| to the right, relevance upwards on a logarithmic axis; weights on the zero level are hollow grey, others filled."""
    inner, tall = width - LEFT - RIGHT, height - TOP - BOTTOM
    most = max(magnitudes, default=0) or 1.0
    decades = -math.log10(LOWEST_RELEVANCE)
    points: dict[str, list[str]] = {"pruned": [], "kept": []}
    for magnitude, relevance, level in zip(magnitudes, relevances, levels, strict=True):
        up = 1 + math.log10(max(relevance, LOWEST_RELEVANCE)) / decades
        x, y = LEFT + inner * magnitude / most, TOP + tall * (1 - min(1.0, up))
        points["kept" if level else "pruned"].append(f"M{x:.1f} {y:.1f}h0")
    parts = []
    for exponent in range(-int(decades), 1):
        y = TOP + tall * (-exponent / decades)
        least = "≤ " if exponent == -int(decades) else ""
        power = "" if exponent == 0 else f'0<tspan dy="-4" font-size="8">−{-exponent}</tspan>'
        parts.append(f'<path class="grid" d="M{LEFT} {y:.1f}h{inner}"/>')
        parts.append(
            f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{least}1{power}</text>'
        )
    for value in choose_ticks(most):
        parts.append(
            draw_text(LEFT + inner * value / most, height - BOTTOM + 15, f"{value:.3g}", "middle")
        )
    parts.append(draw_text(LEFT + inner / 2, height - 3, "magnitude |w|", "middle"))
    parts += [
        f'<path class="{kind}" d="{"".join(path)}"/>' for kind, path in points.items() if path
    ]
    return wrap_svg(width, height, parts, "relevance against magnitude")


def draw_curves(
    series: Sequence[tuple[str, str, Sequence[float | None]]],
    *,
    best: int | None,
    percent: bool,
    width: int = 440,
    height: int = 230,
) -> str:
    """series: (name, class, one value an epoch). best: the epoch, from 1, that a line marks. percent: values in [0, 1]."""
    values = [
        value
        for _, _, line in series
        for value in line
        if value is not None and math.isfinite(value)
    ]
    epochs = max((len(line) for _, _, line in series), default=0)
    inner, tall = width - LEFT - RIGHT, height - TOP - BOTTOM
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    room = 0.05 * (high - low) or (0.01 if percent else 0.1)
    low, high = low - room, high + room
    if percent:
        low, high = max(0.0, low), min(1.0, high)
    ticks = [value for value in choose_ticks(high, low) if low <= value <= high]

    def x(epoch: int) -> float:
        return LEFT + inner * ((epoch - 1) / (epochs - 1) if epochs > 1 else 0.5)

    def y(value: float) -> float:
        return TOP + tall * (high - value) / (high - low)

    parts = []
    for tick in ticks:
        parts.append(f'<path class="grid" d="M{LEFT} {y(tick):.1f}h{inner}"/>')
        parts.append(
            draw_text(
                LEFT - 6, y(tick) + 4, f"{100 * tick:.4g} %" if percent else f"{tick:.3g}", "end"
            )
        )
    every = max(1, math.ceil(epochs / 10))
    for epoch in range(1, epochs + 1):
        if epoch % every == 0 or epoch == 1:
            parts.append(draw_text(x(epoch), height - BOTTOM + 15, str(epoch), "middle"))
    parts.append(draw_text(LEFT + inner / 2, height - 3, "epoch", "middle"))
    if best:
        parts.append(
            f'<path class="best" d="M{x(best):.1f} {TOP}v{tall}"><title>best epoch: {best}</title></path>'
        )
    for name, kind, line in series:
        at = [
            (x(i + 1), y(value), value)
            for i, value in enumerate(line)
            if value is not None and math.isfinite(value)
        ]
        if at:
            parts.append(
                f'<path class="line {kind}" d="M{"L".join(f"{a:.1f} {b:.1f}" for a, b, _ in at)}"/>'
            )
        for i, (a, b, value) in enumerate(at):
            shown = f"{100 * value:.2f} %" if percent else f"{value:.4g}"
            words = f"{escape(name)}, epoch {i + 1}: {shown}"
            parts.append(
                f'<circle class="dot {kind}" cx="{a:.1f}" cy="{b:.1f}" r="2.5"><title>{words}</title></circle>'
            )
    return wrap_svg(width, height, parts, ", ".join(name for name, _, _ in series) + " by epoch")


def draw_grid(
    ticks: Sequence[float], highest: float, inner: float, tall: float, show: Callable[[float], str]
) -> str:
    lines = []
    for tick in ticks:
        y = TOP + tall * (1 - tick / highest) if highest else TOP + tall
        lines.append(
            f'<path class="grid" d="M{LEFT} {y:.1f}h{inner:.0f}"/>'
            + draw_text(LEFT - 6, y + 4, show(tick), "end")
        )
    return "".join(lines)


def choose_ticks(high: float, low: float = 0.0) -> list[float]:
    """Three to six round numbers from low to high."""
    span = high - low
    if not (span > 0 and math.isfinite(span)):
        return [low]
    step = 10 ** math.floor(math.log10(span / 4))
    step *= next(factor for factor in (1, 2, 2.5, 5, 10) if span / (step * factor) <= 5)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def draw_text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def wrap_svg(width: int, height: int, parts: Sequence[str], words: str) -> str:
    return f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(words)}">{"".join(parts)}</svg>'
