"""Writes a result as one HTML page that needs nothing else, with a table and the curve drawn."""

from __future__ import annotations

import math
import shlex
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from ecqx_onnx_converters.graph.outputs import replace_on_success

from ecqx_onnx import __version__
from ecqx_onnx.rendering.axes import choose_ticks, label_ticks
from ecqx_onnx.rendering.web_page import (
    frame_table,
    render_commands,
    render_details,
    render_facts,
    render_page,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from ecqx_onnx_converters import WriteReport

    from ecqx_onnx.compression.search.bounds import Bounds
    from ecqx_onnx.compression.search.points import Point
    from ecqx_onnx.compression.verdict import Verdict

WIDTH, HEIGHT = 440, 250
LEFT, RIGHT, TOP, BOTTOM = 68, 16, 14, 42  # pixels around the plotted area
GRID = 'fill="none" stroke="currentColor" stroke-opacity=".18"'
DRAWN = 'stroke="#2f8f7c" stroke-width="2"'


class Shown(Protocol):
    """What the page shows of a result."""

    @property
    def source(self) -> str:
        """Name of the float model."""

    @property
    def bounds(self) -> Bounds:
        """What the file must keep to."""

    @property
    def path(self) -> Path | None:
        """The file that was written."""

    @property
    def report(self) -> WriteReport:
        """What lies in the file."""

    @property
    def entries(self) -> int:
        """Number of quantized weights."""

    @property
    def verdict(self) -> Verdict:
        """What the file does on samples that nothing has seen."""

    @property
    def points(self) -> Sequence[Point]:
        """Every point that was tried."""

    @property
    def chosen(self) -> Point:
        """The point that the file is."""

    @property
    def ok(self) -> bool:
        """Whether all bounds hold."""

    @property
    def misses(self) -> Sequence[str]:
        """The bounds that it misses, a clause each."""

    @property
    def notes(self) -> Sequence[str]:
        """What had to be done besides, a sentence each."""

    @property
    def advice(self) -> str:
        """What the user can do next."""

    def _rows(self) -> list[tuple[str, str, str]]: ...
    def _headline(self) -> str: ...


def as_html(result: Shown, *, whole: bool = True) -> str:
    """Make the page of a result.

    Args:
        result: what is shown.
        whole: False gives only the page's body, for a notebook.

    Returns:
        HTML with styles and drawing inside, without links to anything.
    """
    body = [
        render_facts(_list_facts(result)),
        _render_misses(result),
        _render_section("Float and compressed", _render_verdict(result)),
        _render_section(
            "Error against bytes", f"<figure>{_draw_chart(result)}</figure>{_render_points(result)}"
        ),
        _render_notes(result),
        _render_next(result),
    ]
    text = "\n".join(part for part in body if part)
    if not whole:
        return f"<h2>{escape(result._headline())}</h2>{text}"
    return render_page(
        title=Path(result.source).stem,
        subtitle=result._headline(),
        body=text,
        footer=f"compressed from {result.source} by ecqx-onnx {__version__}",
    )


def write_page(result: Shown, path: Path, *, force: bool = False) -> None:
    """Write the page of a result; it takes its place once it is whole.

    Args:
        result: what is shown.
        path: of the page.
        force: replace a file that is there.

    Raises:
        FileError: something is in the way, or it can't be written.
    """
    with replace_on_success(path, force=force) as draft:
        draft.write_text(as_html(result), encoding="utf-8")


def _list_facts(result: Shown) -> Iterator[tuple[str, str, str]]:
    """(what, value, note): the file beside what its weights take in it."""
    before, after = result.verdict.before.nbytes, result.report.nbytes
    coded = math.ceil(result.chosen.bits_per_weight * result.entries / 8)
    yield "File", f"{after:,} bytes", f"{before / max(1, after):.1f}× smaller than {before:,}"
    note = f"{result.chosen.bits_per_weight:.2f} bits for each of {result.entries:,} weights"
    yield "Coded", f"{coded:,} bytes", note
    quality = result.verdict.quality
    if quality.agreement is not None:
        note = f"of {quality.agreement.total:,} new samples get the float model's class"
        yield "Agreement", f"{100 * quality.agreement.share:.2f} %", note
    else:
        yield "Error", f"{quality.error:.4f}", f"of the outputs, on {quality.samples} new samples"
    before_ms, after_ms = 1e3 * result.verdict.before.latency, 1e3 * result.verdict.after.latency
    yield "Latency", f"{after_ms:.2f} ms", f"float: {before_ms:.2f} ms, the same samples"


def _render_section(heading: str, body: str) -> str:
    return f"<section><h2>{heading}</h2>{body}</section>"


def _render_misses(result: Shown) -> str:
    if not result.misses:
        return ""
    items = "".join(f'<p class="missed">missed: {escape(miss)}</p>' for miss in result.misses)
    return f'<section class="warning">{items}</section>'


def _render_verdict(result: Shown) -> str:
    """The table of float beside compressed."""
    parts = ["<thead><tr><td></td>"]
    parts += [f'<th scope="col">{name}</th>' for name in ("float", "compressed")]
    parts.append("</tr></thead><tbody>")
    for name, before, after in result._rows():
        cells = "".join(f'<td class="wrap">{escape(text)}</td>' for text in (before, after))
        parts.append(f'<tr><th scope="row" class="left">{escape(name)}</th>{cells}</tr>')
    parts.append("</tbody>")
    return frame_table("".join(parts), "float and compressed")


def _render_points(result: Shown) -> str:
    """The table of all points that were tried, finest first; a phone shows it closed."""
    columns = ("bytes", "bits a weight", "error", "agreement")
    parts = ["<thead><tr>", *(f'<th scope="col">{name}</th>' for name in columns), "</tr></thead>"]
    parts.append("<tbody>")
    for point in sorted(result.points, key=lambda point: -point.nbytes):
        agreement = point.quality.agreement
        share = "" if agreement is None else f"{100 * agreement.share:.2f} %"
        kind = ' class="chosen"' if point.bits == result.chosen.bits else ""
        cells = (f"{point.bits_per_weight:.3f}", f"{point.quality.error:.4f}", share)
        parts.append(f'<tr{kind}><th scope="row">{point.nbytes:,}</th>')
        parts += [f"<td>{cell}</td>" for cell in cells]
        parts.append("</tr>")
    parts.append("</tbody>")
    table = frame_table("".join(parts), "points that were tried")
    words = escape(f"{len(result.points)} points tried; wanted: {result.bounds.words}")
    return render_details(f"<span>{words}</span>", table)


def _render_notes(result: Shown) -> str:
    if not result.notes:
        return ""
    items = "".join(f"<li>{escape(note)}</li>" for note in result.notes)
    return _render_section("Notes", f"<ul>{items}</ul>")


def _render_next(result: Shown) -> str:
    """The commands that follow; what would help where nothing was written or a bound was missed."""
    if not result.ok or result.path is None:
        return _render_section("Next", f"<p>{escape(result.advice)}</p>")
    out = shlex.quote(str(result.path))
    source = shlex.quote(result.source)
    folder = shlex.quote(f"{result.path.stem}_web")
    commands = [
        f"ecqx-onnx validate {out} --against {source} --data DATA",
        f"ecqx-onnx deploy {out} --to web {folder} --data DATA --serve",
    ]
    return render_commands("Next", commands)


def _draw_chart(result: Shown) -> str:
    """Bytes to the right, error upwards; the chosen point filled.

    Its colors do not depend on a style sheet, as a notebook shows it without one.
    """
    points = sorted(result.points, key=lambda point: point.nbytes)
    most = max(point.nbytes for point in points)
    worst = max(max(point.quality.error for point in points), 1e-9)
    wide, tall = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM

    def place(nbytes: float, error: float) -> tuple[float, float]:
        return LEFT + wide * nbytes / most, TOP + tall * (1 - error / worst)

    parts = []
    ticks = choose_ticks(worst)
    for tick, label in zip(ticks, label_ticks(ticks), strict=True):
        _, y = place(0, tick)
        parts.append(f'<path d="M{LEFT} {y:.1f}h{wide}" {GRID}/>')
        parts.append(_draw_text(LEFT - 8, y + 4, label, "end"))
    unit, suffix = 1.0, "bytes"
    if most >= 1e3:
        unit, suffix = 1e3, "kB"
    if most >= 1e6:
        unit, suffix = 1e6, "MB"
    ticks = choose_ticks(most / unit)
    for tick, label in zip(ticks, label_ticks(ticks), strict=True):
        x, _ = place(tick * unit, 0)
        parts.append(_draw_text(x, HEIGHT - BOTTOM + 16, label, "middle"))
    parts.append(_draw_text(LEFT + wide / 2, HEIGHT - 6, f"{suffix} of the file", "middle"))
    parts.append(_draw_text(4, TOP + 4, "error", "start"))
    line = []
    marks = []
    for point in points:
        x, y = place(point.nbytes, point.quality.error)
        line.append(f"{x:.1f},{y:.1f}")
        fill = "#2f8f7c" if point.bits == result.chosen.bits else "none"
        words = f"{point.nbytes:,} bytes, error {point.quality.error:.4f}"
        circle = f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{fill}" {DRAWN}>'
        marks.append(f"{circle}<title>{words}</title></circle>")
    parts.append(f'<polyline points="{" ".join(line)}" fill="none" {DRAWN}/>')
    label = f"error against bytes, {len(points)} points; the filled one was chosen"
    opening = (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" role="img" aria-label="{label}">'
    )
    return opening + "".join(parts) + "".join(marks) + "</svg>"


def _draw_text(x: float, y: float, text: str, anchor: str) -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"'
    return f'<text {place} font-size="11" fill="currentColor">{escape(text)}</text>'
