"""Writes a result as one HTML page that needs nothing else, with a table and the curve drawn."""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from ecqx_onnx_converters.graph.outputs import replace_on_success

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ecqx_onnx.compression.search.bounds import Bounds
    from ecqx_onnx.compression.search.points import Point

WIDTH, HEIGHT, EDGE = 560, 260, 44
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 46em; margin: 2em auto; padding: 0 1em; }
table { border-collapse: collapse; margin: 1em 0; }
td, th { padding: .25em .8em; border-bottom: 1px solid #ccc; text-align: right; }
td:first-child, th:first-child { text-align: left; }
.missed { color: #b00; }
"""


class Shown(Protocol):
    """What the page shows of a result."""

    @property
    def source(self) -> str:
        """Name of the float model."""

    @property
    def bounds(self) -> Bounds:
        """What the file must keep to."""

    @property
    def points(self) -> Sequence[Point]:
        """Every point that was tried."""

    @property
    def chosen(self) -> Point:
        """The point that the file is."""

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
    rows = "".join(_row(row) for row in result._rows())
    head = "<tr><th></th><th>float</th><th>compressed</th></tr>"
    misses = "".join(f'<p class="missed">missed: {escape(miss)}</p>' for miss in result.misses)
    notes = "".join(f"<li>{escape(note)}</li>" for note in result.notes)
    points = "".join(_point_row(result, index) for index in range(len(result.points)))
    columns = "<tr><th>bytes</th><th>bits a weight</th><th>error</th><th>agreement</th></tr>"
    body = (
        f"<h2>{escape(result._headline())}</h2>{misses}<table>{head}{rows}</table>"
        f"<p>Wanted: {escape(result.bounds.words)}.</p>{_chart(result)}"
        f"<table>{columns}{points}</table><ul>{notes}</ul><p>{escape(result.advice)}</p>"
    )
    if not whole:
        return body
    title = escape(f"compress {result.source}")
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>'
        f"<style>{STYLE}</style><body>{body}</body></html>"
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


def _row(row: tuple[str, str, str]) -> str:
    cells = "".join(f"<td>{escape(cell)}</td>" for cell in row)
    return f"<tr>{cells}</tr>"


def _point_row(result: Shown, index: int) -> str:
    point = result.points[index]
    agreement = point.quality.agreement
    share = "" if agreement is None else f"{100 * agreement.share:.2f} %"
    cells = (f"{point.nbytes:,}", f"{point.bits_per_weight:.3f}", f"{point.quality.error:.4f}")
    return "<tr>" + "".join(f"<td>{cell}</td>" for cell in (*cells, share)) + "</tr>"


def _chart(result: Shown) -> str:
    """Bytes to the right, error upwards; the chosen point filled."""
    points = sorted(result.points, key=lambda point: point.nbytes)
    most = max(point.nbytes for point in points)
    worst = max(max(point.quality.error for point in points), 1e-9)
    marks, line = [], []
    for point in points:
        x = EDGE + (WIDTH - 2 * EDGE) * point.nbytes / most
        y = HEIGHT - EDGE - (HEIGHT - 2 * EDGE) * point.quality.error / worst
        line.append(f"{x:.1f},{y:.1f}")
        fill = "#06c" if point.bits == result.chosen.bits else "#fff"
        marks.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{fill}" stroke="#06c"/>')
    bottom = HEIGHT - EDGE
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" role="img"'
        f' aria-label="error against bytes"><path d="M{EDGE},{EDGE}V{bottom}H{WIDTH - EDGE}"'
        f' fill="none" stroke="#888"/><polyline points="{" ".join(line)}" fill="none"'
        f' stroke="#06c"/>{"".join(marks)}<text x="{WIDTH - EDGE}" y="{bottom + 18}"'
        f' text-anchor="end" font-size="12">{most:,} bytes</text><text x="{EDGE}"'
        f' y="{EDGE - 8}" font-size="12">error {worst:.3f}</text></svg>'
    )
