"""(model.pt) -> report.html: one page without scripts or other files; every word from the checkpoint is escaped."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any

import numpy as np
from ecqx_onnx_converters.graph.outputs import check_output, replace_on_success
from rich.text import Text

from ecqx_onnx import __version__
from ecqx_onnx.checkpoint.insight import Insight, WeightInsight
from ecqx_onnx.inspection.inspection import InspectedTensor, inspect
from ecqx_onnx.reporting.charts import draw_curves, draw_histogram, draw_scatter
from ecqx_onnx.tensors import QuantTensor, total_entropy_bytes
from ecqx_onnx.validation.metrics import Proportion

if TYPE_CHECKING:
    from ecqx_onnx.checkpoint.checkpoint import Checkpoint


TEMPLATE = Path(__file__).parent / "page.html"
RULE_OF_NOTHING = "none (plain ECQ)"

EXPLAINED = (
    "Each point is a weight: how large it is, and how relevant layer-wise relevance propagation found it for the right answers "
    "(its share of the layer's largest, on a logarithmic axis). If magnitude were importance, the points would lie on a rising "
    "line, and the correlation would be near 1. ECQx spares small weights that are relevant and lets larger ones that are not "
    "fall to zero."
)
NO_RELEVANCES = (
    "This checkpoint holds no relevances, so nothing can be said about it: it was quantised without them (plain ECQ, or levels "
    "that were recognised), or written by a version that did not keep them. Train it with <code>ecqx-onnx quantize</code>."
)


@dataclass(frozen=True)
class Written:
    """The page that was written. relevances: how many of the weights have relevances to show."""

    path: Path
    nbytes: int
    weights: int
    relevances: int
    epochs: int

    def to_json(self) -> dict[str, Any]:
        return {
            "file": str(self.path),
            "bytes": self.nbytes,
            "weights": self.weights,
            "relevances": self.relevances,
            "epochs": self.epochs,
        }

    def render(self) -> Text:
        what = f"{self.weights} weights, {self.relevances} with relevances"
        return Text(
            f"{self.path}: {self.nbytes:,} bytes, {what}; open it in a browser", style="bold"
        )


def write_report(checkpoint_file: str | Path, out: str | Path, *, force: bool = False) -> Written:
    """FileError if the checkpoint is none, or the page is in the way or cannot be written."""
    out = Path(out)
    check_output(out, force=force, source=checkpoint_file)
    page, checkpoint = render_page(Path(checkpoint_file))
    with replace_on_success(out, force=force) as temporary:
        temporary.write_text(page, encoding="utf-8")
    insight = checkpoint.insight
    found = sum(bool(len(weight.relevances)) for weight in insight.weights) if insight else 0
    epochs = len(insight.history) if insight else 0
    return Written(out, len(page.encode()), len(checkpoint.tensors), found, epochs)


def render_page(path: Path) -> tuple[str, Checkpoint]:
    from ecqx_onnx.checkpoint.checkpoint import load

    checkpoint = load(path)
    rows = {row.name: row for row in inspect(path).tensors}
    seen = (
        {weight.name: weight for weight in checkpoint.insight.weights} if checkpoint.insight else {}
    )
    insight = checkpoint.insight
    some = any(len(weight.relevances) for weight in seen.values())
    values = {
        "title": escape(path.stem),
        "subtitle": escape(render_subtitle(checkpoint)),
        "facts": "".join(render_fact(*fact) for fact in list_facts(checkpoint)),
        "warnings": render_warnings(checkpoint),
        "curves": render_curves(insight) if insight and insight.history else "",
        "table": render_table(checkpoint.tensors, rows, seen),
        "kept_float": render_kept_float(checkpoint),
        "explanation": f"<p>{EXPLAINED if some else NO_RELEVANCES}</p>",
        "layers": "\n".join(
            render_layer(tensor, rows[tensor.name], seen.get(tensor.name))
            for tensor in checkpoint.tensors
        ),
        "recipe": "".join(
            f"<tr><td>{escape(str(k))}</td><td class='left'>{escape(str(v))}</td></tr>"
            for k, v in list_recipe(checkpoint)
        ),
        "footer": escape(
            f"{path.name}, {path.stat().st_size:,} bytes, read by ecqx-onnx {__version__}"
        ),
    }
    return Template(TEMPLATE.read_text(encoding="utf-8")).substitute(values), checkpoint


def render_subtitle(checkpoint: Checkpoint) -> str:
    weights = sum(tensor.size for tensor in checkpoint.tensors)
    data = checkpoint.insight.data if checkpoint.insight else ""
    data = data or str(checkpoint.recipe.get("data", ""))
    return f"{len(checkpoint.tensors)} quantised weight tensors, {weights:,} weights" + (
        f", trained on {data}" if data else ""
    )


def list_facts(checkpoint: Checkpoint) -> Iterable[tuple[str, str, str]]:
    """(what, value, note)"""
    tensors = checkpoint.tensors
    size = max(1, sum(tensor.size for tensor in tensors))
    zeros = sum(tensor.zeros * tensor.size for tensor in tensors) / size
    entropy, floats = total_entropy_bytes(tensors), 4 * size
    yield "Zeros", f"{100 * zeros:.1f} %", "of the quantised weights"
    yield "Entropy", f"{8 * entropy / size:.2f} bits", "a weight, zero order"
    yield (
        "Coded",
        f"{entropy:,} bytes",
        f"of {floats:,} as float32 ({floats / max(1, entropy):.1f}×), by an ideal code of single levels",
    )
    insight = checkpoint.insight
    if insight and insight.after:
        after = Proportion(insight.after["hits"], insight.after["total"])
        low, high = after.interval
        note = f"on the test split, {100 * low:.2f} to {100 * high:.2f} (95 %)"
        if insight.before:
            note += f"; float32: {100 * Proportion(insight.before['hits'], insight.before['total']).share:.2f} %"
        yield "Accuracy", f"{100 * after.share:.2f} %", note


def render_fact(what: str, value: str, note: str) -> str:
    return f'<div><dt>{escape(what)}</dt><dd>{escape(value)}</dd><dd class="note">{escape(note)}</dd></div>'


def render_warnings(checkpoint: Checkpoint) -> str:
    insight = checkpoint.insight
    found = [*(insight.warnings if insight else ()), *checkpoint.notes]
    found += [
        f"{entry.name} is not in the ONNX graph: {entry.reason}"
        for entry in checkpoint.matching.missing
    ]
    if insight and insight.approximated:
        crossed = ", ".join(insight.approximated)
        found.append(
            f"relevance crosses these operators by gradient times input, which need not conserve it: {crossed}"
        )
    if not found:
        return ""
    return f'<section class="warning"><h2>Warnings</h2><ul>{"".join(f"<li>{escape(text)}</li>" for text in found)}</ul></section>'


def render_curves(insight: Insight) -> str:
    def line(name: str) -> list[float | None]:
        return [row.get(name) for row in insight.history]

    best = insight.best_epoch
    held_out = any(value is not None for value in line("validation_accuracy"))
    accuracy: list[tuple[str, str, Sequence[float | None]]] = [
        ("training", "second", line("accuracy"))
    ]
    keys = '<span class="key second"></span>training samples, quantised as they are trained'
    if held_out:
        accuracy.insert(0, ("validation", "first", line("validation_accuracy")))
        keys = '<span class="key first"></span>validation split, which chooses the epoch' + keys
    marked = f"; the dotted line is epoch {best}, whose weights these are" if best else ""
    figures = (
        (draw_curves(accuracy, best=best, percent=True), f"Accuracy. {keys}{marked}"),
        (
            draw_curves([("zeros", "first", line("zeros"))], best=best, percent=True),
            "Share of zeros",
        ),
        (
            draw_curves([("entropy", "first", line("bits_per_weight"))], best=best, percent=False),
            "Entropy of the levels, bits a weight",
        ),
        (draw_curves([("loss", "first", line("loss"))], best=best, percent=False), "Training loss"),
    )
    shown = "".join(
        f"<figure><figcaption>{caption}</figcaption>{chart}</figure>" for chart, caption in figures
    )
    return f'<section><h2>Training</h2><div class="pair">{shown}</div></section>'


def render_table(
    tensors: Sequence[QuantTensor],
    rows: Mapping[str, InspectedTensor],
    seen: Mapping[str, WeightInsight],
) -> str:
    names = (
        "weight",
        "shape",
        "weights",
        "bits",
        "zeros",
        "plain ECQ's",
        "entropy",
        "correlation",
        "relevance by",
    )
    headings = [
        f'<th class="{"left" if name in ("weight", "relevance by") else ""}">{name}</th>'
        for name in names
    ]
    cells = ["<thead><tr>", *headings, "</tr></thead><tbody>"]
    for tensor in tensors:
        row, insight = rows[tensor.name], seen.get(tensor.name)
        filled = f'<rect width="{100 * row.zeros:.1f}" height="8"/>'
        bar = f'<span class="share"><svg viewBox="0 0 100 8" preserveAspectRatio="none" aria-hidden="true">{filled}</svg></span>'
        shape = " × ".join(map(str, row.shape))
        numbers = [shape, f"{tensor.size:,}", str(row.bits), f"{bar}{100 * row.zeros:.1f} %"]
        ecq = f"{100 * insight.ecq_zeros:.1f} %" if insight else "–"
        correlation = (
            "–"
            if insight is None or insight.correlation is None
            else f"{insight.correlation:.2f}".replace("-", "−")
        )
        numbers += [ecq, f"{row.entropy:.2f}", correlation]
        rule = escape(insight.rule) if insight else "–"
        cells.append(
            f"<tr><td>{escape(row.name)}</td>{''.join(f'<td>{cell}</td>' for cell in numbers)}<td class='left'>{rule}</td></tr>"
        )
    return "".join([*cells, "</tbody>"])


def render_kept_float(checkpoint: Checkpoint) -> str:
    left = [
        (name, reason)
        for name, reason in (checkpoint.insight.left_float if checkpoint.insight else ())
        if name in checkpoint.state
    ]
    count = sum(value.numel() for value in checkpoint.state.values() if value.is_floating_point())
    named = "; ".join(
        f"{name} ({reason})" for name, reason in left if reason != "bias, norm or scalar"
    )
    words = f"{count:,} parameters and buffers stay float" + (
        f": {named}" if named else " (biases, norms)"
    )
    return f'<p class="note">{escape(words)}.</p>' if count else ""


def render_layer(tensor: QuantTensor, row: InspectedTensor, seen: WeightInsight | None) -> str:
    levels, counts = np.unique(tensor.levels, return_counts=True)
    found = dict(zip(levels.tolist(), counts.tolist(), strict=True))
    low, high = tensor.range
    bars = [(level, found.get(level, 0)) for level in range(low, high + 1)]
    figures = [
        (
            draw_histogram(bars, tensor.size),
            'Levels. <span class="key grey"></span>zero <span class="key first"></span>others',
        )
    ]
    if seen is not None and len(seen.relevances):
        points = draw_scatter(
            seen.magnitudes.tolist(), seen.relevances.tolist(), seen.levels.tolist()
        )
        of = (
            f"{len(seen.magnitudes):,} of {tensor.size:,} weights"
            if len(seen.magnitudes) < tensor.size
            else f"all {tensor.size:,} weights"
        )
        said = (
            ""
            if seen.correlation is None
            else f"; correlation over all {seen.correlation:.2f}".replace("-", "−")
        )
        keys = 'Relevance. <span class="key grey"></span>quantised to zero <span class="key first"></span>kept'
        figures.append((points, f"{keys}; {of}{said}"))
    shown = "".join(
        f"<figure><figcaption>{caption}</figcaption>{chart}</figure>" for chart, caption in figures
    )
    note = f"{' × '.join(map(str, row.shape))}, {row.bits} bits, {100 * row.zeros:.1f} % zeros, {row.entropy:.2f} bits entropy"
    return f'<section><h3>{escape(row.name)}</h3><p class="note">{note}</p><div class="pair">{shown}</div></section>'


def list_recipe(checkpoint: Checkpoint) -> Iterable[tuple[str, Any]]:
    yield from sorted(checkpoint.recipe.items())
    if checkpoint.labels:
        yield (
            "labels",
            ", ".join(checkpoint.labels[:50]) + (" …" if len(checkpoint.labels) > 50 else ""),
        )
    yield "preprocessing", checkpoint.preprocessing.to_json()
