"""The report's page: what a checkpoint holds and how it was trained, as HTML in one file.

The page has no scripts and needs no other file; every word from the checkpoint is escaped.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from ecqx_onnx_converters.graph.outputs import check_output, replace_on_success
from rich.text import Text

from ecqx_onnx import __version__
from ecqx_onnx.checkpoint.insight import Insight, WeightInsight
from ecqx_onnx.errors import FileError, InputError
from ecqx_onnx.inspection.inspection import inspect
from ecqx_onnx.inspection.result import InspectedTensor
from ecqx_onnx.rendering.web_page import (
    frame_table,
    render_commands,
    render_details,
    render_facts,
    render_page,
)
from ecqx_onnx.reporting.charts import draw_curves, draw_histogram, draw_scatter
from ecqx_onnx.tensors import QuantTensor, total_entropy_bytes
from ecqx_onnx.validation.outputs.metrics import Proportion

if TYPE_CHECKING:
    from ecqx_onnx.checkpoint.checkpoint import Checkpoint


EXPLAINED = (
    "Each point is a weight: how large it is, and how relevant layer-wise relevance propagation "
    "found it for the right answers (its share of the layer's largest, on a logarithmic axis). If "
    "magnitude were importance, the points would lie on a rising line, and the correlation would "
    "be near 1. ECQx spares small weights that are relevant and lets larger ones that are not fall "
    "to zero."
)
NO_RELEVANCES = (
    "This checkpoint holds no relevances, so nothing can be said about it: it was quantised "
    "without them (plain ECQ, or levels that were recognised), or written by a version that did "
    "not keep them. Train it with <code>ecqx-onnx quantize</code>."
)
HEADINGS = (  # of the table of weights, and whether the column holds text
    ("weight", True),
    ("shape", False),
    ("weights", False),
    ("bits", False),
    ("zeros", False),
    ("plain ECQ's", False),
    ("entropy", False),
    ("correlation", False),
    ("relevance by", True),
)
NOTHING = "–"
LABELS_SHOWN = 50
NO_NEWS = "bias, norm or scalar"  # why most values stay float; not worth a line each


@dataclass(frozen=True)
class Written:
    """The page that was written.

    Attributes:
        path: of the page.
        nbytes: its size.
        weights: quantized weight tensors in the checkpoint.
        relevances: how many of them have relevances to show.
        epochs: of the training that it shows; 0 where none is known.
    """

    path: Path
    nbytes: int
    weights: int
    relevances: int
    epochs: int

    def to_json(self) -> dict[str, Any]:
        """List the figures as `--json` prints them.

        Returns:
            Values that JSON can hold, by name.
        """
        return {
            "file": str(self.path),
            "bytes": self.nbytes,
            "weights": self.weights,
            "relevances": self.relevances,
            "epochs": self.epochs,
        }

    def render(self) -> Text:
        """Draw one line that says what was written.

        Returns:
            What rich prints.
        """
        what = f"{self.weights} weights, {self.relevances} with relevances"
        return Text(
            f"{self.path}: {self.nbytes:,} bytes, {what}; open it in a browser", style="bold"
        )


def write_report(
    checkpoint_file: str | Path,
    out: str | Path,
    *,
    onnx_file: str | Path | None = None,
    force: bool = False,
) -> Written:
    """Write a page about a checkpoint.

    Args:
        checkpoint_file: model.pt of `quantize`, `compress` or `save`.
        out: the page to write, such as report.html.
        onnx_file: what was converted from it, whose size is shown; by default the file of the same
            name beside it, if there is one with these weights.
        force: replace a file that is there.

    Returns:
        What was written.

    Raises:
        FileError: if the checkpoint is none, `onnx_file` is of another one, or the page is in the
            way or cannot be written.

    Example:
        >>> write_report("model.pt", "report.html")
    """
    out = Path(out)
    check_output(out, force=force, source=checkpoint_file)
    given = None if onnx_file is None else Path(onnx_file)
    page, checkpoint = _render_page(Path(checkpoint_file), given)
    with replace_on_success(out, force=force) as temporary:
        temporary.write_text(page, encoding="utf-8")
    relevances = 0
    epochs = 0
    if checkpoint.insight:
        relevances = sum(bool(len(weight.relevances)) for weight in checkpoint.insight.weights)
        epochs = len(checkpoint.insight.history)
    return Written(out, len(page.encode()), len(checkpoint.tensors), relevances, epochs)


def _render_page(path: Path, given: Path | None) -> tuple[str, Checkpoint]:
    """The page of a checkpoint's file, and the checkpoint."""
    from ecqx_onnx.checkpoint.checkpoint import load

    checkpoint = load(path)
    onnx_file = _find_onnx(path, [tensor.name for tensor in checkpoint.tensors], given)
    insight = checkpoint.insight
    rows = {row.name: row for row in inspect(path).tensors}
    seen: dict[str, WeightInsight] = {}
    if insight:
        seen = {weight.name: weight for weight in insight.weights}
    some = any(len(weight.relevances) for weight in seen.values())
    layers = [
        _render_layer(tensor, rows[tensor.name], seen.get(tensor.name))
        for tensor in checkpoint.tensors
    ]
    weights = _render_table(checkpoint.tensors, rows, seen)
    body = [
        render_facts(_list_facts(checkpoint, onnx_file)),
        _render_warnings(checkpoint),
        _render_curves(insight) if insight and insight.history else "",
        f"<section><h2>Weights</h2>{frame_table(weights, 'weights')}",
        f"{_render_kept_float(checkpoint)}</section>",
        "<section><h2>Is magnitude importance?</h2>",
        f"<p>{EXPLAINED if some else NO_RELEVANCES}</p></section>",
        f'<div class="layers">{"".join(layers)}</div>',
        render_commands("Next", _list_commands(path, onnx_file)),
        _render_recipe(checkpoint),
    ]
    page = render_page(
        title=path.stem,
        subtitle=_render_subtitle(checkpoint),
        body="\n".join(part for part in body if part),
        footer=f"{path.name}, {path.stat().st_size:,} bytes, read by ecqx-onnx {__version__}",
    )
    return page, checkpoint


def _find_onnx(checkpoint_file: Path, names: Sequence[str], given: Path | None) -> Path | None:
    """The .onnx file of a checkpoint: the one that is given, or one beside it that holds the same.

    Raises:
        FileError: if the file that is given holds other weights.
    """
    candidate = given or checkpoint_file.with_suffix(".onnx")
    if given is None and not candidate.is_file():
        return None
    try:
        found = {row.name for row in inspect(candidate).tensors}
    except InputError:
        if given is not None:
            raise
        return None
    if found == set(names):
        return candidate
    if given is None:
        return None
    raise FileError(
        f"{given}: holds other weights than {checkpoint_file}; give the file that was converted "
        "from it"
    )


def _list_commands(path: Path, onnx_file: Path | None) -> list[str]:
    """What to type next: convert where that is not done, validate, deploy."""
    model = shlex.quote(path.name)
    out = shlex.quote(onnx_file.name if onnx_file else path.with_suffix(".onnx").name)
    folder = shlex.quote(f"{path.stem}_web")
    commands = [
        f"ecqx-onnx validate {out} --against {model} --data DATA",
        f"ecqx-onnx deploy {out} --to web {folder} --against {model} --data DATA --serve",
    ]
    if onnx_file is None:
        commands.insert(0, f"ecqx-onnx convert {model} {out}")
    return commands


def _render_subtitle(checkpoint: Checkpoint) -> str:
    weights = sum(tensor.size for tensor in checkpoint.tensors)
    data = checkpoint.insight.data if checkpoint.insight else ""
    data = data or str(checkpoint.recipe.get("data", ""))
    words = f"{len(checkpoint.tensors)} quantised weight tensors, {weights:,} weights"
    if data:
        words += f", trained on {data}"
    return words


def _list_facts(checkpoint: Checkpoint, onnx_file: Path | None) -> Iterator[tuple[str, str, str]]:
    """(what, value, note)"""
    tensors = checkpoint.tensors
    size = max(1, sum(tensor.size for tensor in tensors))
    zeros = sum(tensor.zeros * tensor.size for tensor in tensors) / size
    entropy = total_entropy_bytes(tensors)
    floats = 4 * size
    yield "Zeros", f"{100 * zeros:.1f} %", "of the quantised weights"
    yield "Entropy", f"{8 * entropy / size:.2f} bits", "a weight, zero order"
    note = (
        f"of {floats:,} as float32 ({floats / max(1, entropy):.1f}×), by an ideal code of "
        "single levels"
    )
    yield "Coded", f"{entropy:,} bytes", note
    if onnx_file is None:
        yield "File", NOTHING, "no .onnx file beside it yet: convert writes one"
    else:
        nbytes = onnx_file.stat().st_size
        note = f"{onnx_file.name}, all of it: {floats / max(1, nbytes):.1f}× smaller than float32"
        yield "File", f"{nbytes:,} bytes", note
    insight = checkpoint.insight
    if insight and insight.after:
        after = Proportion(insight.after["hits"], insight.after["total"])
        low, high = after.interval
        note = f"on the test split, {100 * low:.2f} to {100 * high:.2f} (95 %)"
        if insight.before:
            before = Proportion(insight.before["hits"], insight.before["total"])
            note += f"; float32: {100 * before.share:.2f} %"
        yield "Accuracy", f"{100 * after.share:.2f} %", note


def _render_warnings(checkpoint: Checkpoint) -> str:
    insight = checkpoint.insight
    found = [*(insight.warnings if insight else ()), *checkpoint.notes]
    found += [
        f"{entry.name} is not in the ONNX graph: {entry.reason}"
        for entry in checkpoint.matching.missing
    ]
    if insight and insight.approximated:
        crossed = ", ".join(insight.approximated)
        found.append(
            "relevance crosses these operators by gradient times input, which need not conserve "
            f"it: {crossed}"
        )
    if not found:
        return ""
    items = "".join(f"<li>{escape(text)}</li>" for text in found)
    return f'<section class="warning"><h2>Warnings</h2><ul>{items}</ul></section>'


def _render_curves(insight: Insight) -> str:
    """What each epoch of the training gave."""

    def get_values(name: str) -> list[float | None]:
        return [row.get(name) for row in insight.history]

    def draw_one(label: str, name: str, *, percent: bool = False) -> str:
        return draw_curves([(label, "first", get_values(name))], best=best, percent=percent)

    best = insight.best_epoch
    validation = get_values("validation_accuracy")
    accuracy: list[tuple[str, str, Sequence[float | None]]] = [
        ("training", "second", get_values("accuracy"))
    ]
    caption = '<span class="key second"></span>training samples, quantised as they are trained'
    if any(value is not None for value in validation):
        accuracy.insert(0, ("validation", "first", validation))
        first = '<span class="key first"></span>validation split, which chooses the epoch'
        caption = first + caption
    if best:
        caption += f"; the dotted line is epoch {best}, whose weights these are"
    figures = [
        (draw_curves(accuracy, best=best, percent=True), f"Accuracy. {caption}"),
    ]
    more = [
        (draw_one("zeros", "zeros", percent=True), "Share of zeros"),
        (draw_one("entropy", "bits_per_weight"), "Entropy of the levels, bits a weight"),
        (draw_one("loss", "loss"), "Training loss"),
    ]
    rest = render_details("<span>zeros, entropy and loss</span>", _render_figures(more))
    return f"<section><h2>Training</h2>{_render_figures(figures)}{rest}</section>"


def _render_figures(figures: Sequence[tuple[str, str]]) -> str:
    """(chart, caption) of each, side by side where the page is wide enough."""
    parts = []
    for chart, caption in figures:
        parts.append(f"<figure><figcaption>{caption}</figcaption>{chart}</figure>")
    return f'<div class="pair">{"".join(parts)}</div>'


def _render_table(
    tensors: Sequence[QuantTensor],
    rows: Mapping[str, InspectedTensor],
    seen: Mapping[str, WeightInsight],
) -> str:
    """A row of figures for each weight tensor."""
    parts = ["<thead><tr>"]
    for name, is_text in HEADINGS:
        kind = ' class="left"' if is_text else ""
        parts.append(f'<th scope="col"{kind}>{name}</th>')
    parts.append("</tr></thead><tbody>")
    for tensor in tensors:
        row = rows[tensor.name]
        insight = seen.get(tensor.name)
        cells = [
            " × ".join(map(str, row.shape)),
            f"{tensor.size:,}",
            str(row.bits),
            f"{_draw_bar(row.zeros)}{100 * row.zeros:.1f} %",
            f"{100 * insight.ecq_zeros:.1f} %" if insight else NOTHING,
            f"{row.entropy:.2f}",
            _show_correlation(insight) or NOTHING,
        ]
        rule = escape(insight.rule) if insight else NOTHING
        parts.append(f"<tr><td>{escape(row.name)}</td>")
        parts += [f"<td>{cell}</td>" for cell in cells]
        parts.append(f"<td class='left'>{rule}</td></tr>")
    parts.append("</tbody>")
    return "".join(parts)


def _draw_bar(share: float) -> str:
    """A bar as long as the share, from 0 to 1."""
    bar = f'<rect width="{100 * share:.1f}" height="8"/>'
    frame = '<svg viewBox="0 0 100 8" preserveAspectRatio="none" aria-hidden="true">'
    return f'<span class="share">{frame}{bar}</svg></span>'


def _show_correlation(insight: WeightInsight | None) -> str:
    """The correlation of magnitude and relevance with a true minus sign; "" where unknown."""
    if insight is None or insight.correlation is None:
        return ""
    return f"{insight.correlation:.2f}".replace("-", "−")


def _render_kept_float(checkpoint: Checkpoint) -> str:
    """How much of the model is not quantized, and why."""
    count = 0
    for value in checkpoint.state.values():
        if value.is_floating_point():
            count += value.numel()
    if not count:
        return ""
    left_float = checkpoint.insight.left_float if checkpoint.insight else ()
    named = "; ".join(
        f"{name} ({reason})"
        for name, reason in left_float
        if name in checkpoint.state and reason != NO_NEWS
    )
    words = f"{count:,} parameters and buffers stay float"
    words += f": {named}" if named else " (biases, norms)"
    return f'<p class="note">{escape(words)}.</p>'


def _render_layer(tensor: QuantTensor, row: InspectedTensor, seen: WeightInsight | None) -> str:
    """The histogram of a weight's levels, and its relevances where they are known."""
    levels, counts = np.unique(tensor.levels, return_counts=True)
    found = dict(zip(levels.tolist(), counts.tolist(), strict=True))
    low, high = tensor.range
    bars = [(level, found.get(level, 0)) for level in range(low, high + 1)]
    keys = 'Levels. <span class="key grey"></span>zero <span class="key first"></span>others'
    figures = [(draw_histogram(bars, tensor.size), keys)]
    if seen is not None and len(seen.relevances):
        figures.append(_draw_relevances(tensor, seen))
    shape = " × ".join(map(str, row.shape))
    zeros = f"{100 * row.zeros:.1f} % zeros"
    note = f"{shape}, {row.bits} bits, {zeros}, {row.entropy:.2f} bits entropy"
    heading = f'<h3>{escape(row.name)}</h3><span class="note">{note}</span>'
    return f"<section>{render_details(heading, _render_figures(figures))}</section>"


def _draw_relevances(tensor: QuantTensor, seen: WeightInsight) -> tuple[str, str]:
    """(chart, caption) of a weight's relevances against its magnitudes."""
    chart = draw_scatter(seen.magnitudes.tolist(), seen.relevances.tolist(), seen.levels.tolist())
    caption = (
        'Relevance. <span class="key grey"></span>quantised to zero '
        '<span class="key first"></span>kept'
    )
    shown = len(seen.magnitudes)
    if shown < tensor.size:
        caption += f"; {shown:,} of {tensor.size:,} weights"
    else:
        caption += f"; all {tensor.size:,} weights"
    correlation = _show_correlation(seen)
    if correlation:
        caption += f"; correlation over all {correlation}"
    return chart, caption


def _render_recipe(checkpoint: Checkpoint) -> str:
    parts = []
    for name, value in _list_recipe(checkpoint):
        cells = f"<td>{escape(name)}</td><td class='left'>{escape(str(value))}</td>"
        parts.append(f"<tr>{cells}</tr>")
    table = frame_table(f"<tbody>{''.join(parts)}</tbody>", "recipe")
    return f"<section>{render_details('<h2>Recipe</h2>', table)}</section>"


def _list_recipe(checkpoint: Checkpoint) -> Iterator[tuple[str, Any]]:
    for name, value in sorted(checkpoint.recipe.items()):
        yield str(name), value
    if checkpoint.labels:
        labels = ", ".join(checkpoint.labels[:LABELS_SHOWN])
        if len(checkpoint.labels) > LABELS_SHOWN:
            labels += " …"
        yield "labels", labels
    yield "preprocessing", checkpoint.preprocessing.to_json()
