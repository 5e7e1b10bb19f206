"""How a file of ours is stored (`WriteReport`), as a table and as JSON."""

from __future__ import annotations

import math
from typing import Any

from ecqx_onnx_converters.serialization.report import WriteReport
from rich.console import Group, RenderableType
from rich.text import Text

from ecqx_onnx.rendering.fitted import FittedTable
from ecqx_onnx.rendering.weights import WeightRow, draw_weights


def render_write_report(report: WriteReport) -> RenderableType:
    """Draw what was written.

    Args:
        report: of `convert`, `pack` or `unpack`.

    Returns:
        A table of the weights, what stays float, notes, and a line that sums it up.
    """
    lines: list[RenderableType] = [_draw_weights(report)]
    rescaled = [row for row in report.tensors if row.rescaled]
    if rescaled:
        lines.append(Text(f"BatchNorm is folded into {len(rescaled)} of these", style="dim"))
    for kept in report.kept:
        sentence = f"stays float: {kept.name} {list(kept.shape)}: {kept.reason}"
        lines.append(Text(sentence, style="yellow"))
    for entry in report.missing:
        lines.append(Text(f"not in the graph: {entry.name}: {entry.reason}", style="yellow"))
    for note in report.notes:
        lines.append(Text(note))
    if report.kernels:
        counts = sorted(report.kernels.items())
        words = ", ".join(f"{count} {operator}" for operator, count in counts)
        lines.append(Text(f"on integers: {words}"))
    for node in report.stays:
        sentence = f"on floats: {node.operator} {node.name}: {node.reason}"
        lines.append(Text(sentence, style="yellow"))
    lines.append(Text(_summarize(report), style="bold"))
    return Group(*lines)


def write_report_to_json(report: WriteReport) -> dict[str, Any]:
    """Write what was written as plain values.

    Args:
        report: of `convert`, `pack` or `unpack`.

    Returns:
        Dicts, lists, numbers, texts. Sizes in bytes, shares in [0, 1], entropy in bits per weight.
    """
    tensors = []
    for row in report.tensors:
        tensors.append(
            {
                "name": row.name,
                "sources": list(row.sources),
                "shape": list(row.shape),
                "bits": row.bits,
                "zeros": row.zeros,
                "entropy": row.entropy,
                "storage": row.storage,
                "dequantization": row.dequantization,
                "bytes": row.nbytes,
                "batchnorm_folded": row.rescaled,
                "reason": row.reason,
            }
        )
    floats = []
    for kept in report.kept:
        floats.append({"name": kept.name, "shape": list(kept.shape), "reason": kept.reason})
    float_nodes = []
    for node in report.stays:
        float_nodes.append({"operator": node.operator, "name": node.name, "reason": node.reason})
    return {
        "file": str(report.path),
        "bytes": report.nbytes,
        "wire_bytes": report.wire_bytes,
        "opset": report.opset,
        "target": report.target,
        "tensors": tensors,
        "float": floats,
        "missing": [{"name": entry.name, "reason": entry.reason} for entry in report.missing],
        "notes": list(report.notes),
        "integer_nodes": dict(report.kernels),
        "float_nodes": float_nodes,
    }


def _draw_weights(report: WriteReport) -> FittedTable:
    rows = []
    for row in report.tensors:
        rows.append(
            WeightRow(
                name=", ".join(row.sources),
                shape=row.shape,
                bits=row.bits,
                zeros=row.zeros,
                entropy=row.entropy,
                storage=row.storage,
                dequantization=row.dequantization,
                nbytes=row.nbytes,
                reason=row.reason,
            )
        )
    return draw_weights(rows, title=str(report.path))


def _summarize(report: WriteReport) -> str:
    shapes = [*(row.shape for row in report.tensors), *(kept.shape for kept in report.kept)]
    float_bytes = 4 * sum(math.prod(shape) for shape in shapes)
    return (
        f"{report.path}: {report.nbytes:,} bytes, its weights {float_bytes:,} as float32"
        f" ({float_bytes / max(1, report.nbytes):.1f}x); opset {report.opset}, for {report.target}"
    )
