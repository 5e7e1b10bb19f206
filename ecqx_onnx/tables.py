"""A report -> a table for a terminal, or plain values for JSON."""

from __future__ import annotations

from dataclasses import asdict
from functools import singledispatch
from typing import Any

from ecqx_onnx_converters.writer import WriteReport
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from ecqx_onnx.api import Quantized


@singledispatch
def as_table(report: Any) -> RenderableType:
    """What a person reads. Reports that know how to draw themselves do it with `render()`."""
    return report.render()


@singledispatch
def to_json(report: Any) -> Any:
    """What a program reads: dicts, lists, numbers, strings. Sizes in bytes, shares in [0, 1], entropy in bits per weight."""
    return report.to_json()


@as_table.register
def _(report: WriteReport) -> RenderableType:
    table = Table(title=str(report.path), title_justify="left", caption_justify="left")
    for heading in ("weight", "shape", "bits", "zeros", "entropy", "storage", "bytes", "fewer than float"):
        table.add_column(heading, justify="left" if heading in ("weight", "storage") else "right", overflow="fold")
    for row in report.tensors:
        floats = 4 * _count(row.shape)
        shape = "x".join(map(str, row.shape))
        name = ", ".join(row.sources) + (" (BatchNorm folded)" if row.rescaled else "")
        storage = f"{row.storage}, {row.dequantization}"
        cells = (f"{row.zeros:.1%}", f"{row.entropy:.2f}", storage, f"{row.nbytes:,}", f"{floats / max(1, row.nbytes):.1f}x")
        table.add_row(name, shape, str(row.bits), *cells)
    lines: list[RenderableType] = [table]
    lines += [Text(f"stays float: {kept.name} {list(kept.shape)}: {kept.reason}", style="yellow") for kept in report.kept]
    lines += [Text(f"not in the graph: {entry.name}: {entry.reason}", style="yellow") for entry in report.missing]
    if report.kernels:
        words = ", ".join(f"{count} {operator}" for operator, count in sorted(report.kernels.items()))
        lines.append(Text(f"on integers: {words}"))
    lines += [Text(f"on floats: {node.operator} {node.name}: {node.reason}", style="yellow") for node in report.stays]
    shapes = [*(row.shape for row in report.tensors), *(kept.shape for kept in report.kept)]
    floats = sum(4 * _count(shape) for shape in shapes)
    lines.append(
        Text(
            f"{report.path}: {report.nbytes:,} bytes, its weights {floats:,} as float32 ({floats / max(1, report.nbytes):.1f}x); "
            f"opset {report.opset}, for {report.target}",
            style="bold",
        )
    )
    return Group(*lines)


@to_json.register
def _(report: WriteReport) -> Any:
    return {
        "file": str(report.path),
        "bytes": report.nbytes,
        "opset": report.opset,
        "target": report.target,
        "tensors": [
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
            for row in report.tensors
        ],
        "float": [{"name": kept.name, "shape": list(kept.shape), "reason": kept.reason} for kept in report.kept],
        "missing": [{"name": entry.name, "reason": entry.reason} for entry in report.missing],
        "integer_nodes": dict(report.kernels),
        "float_nodes": [{"operator": node.operator, "name": node.name, "reason": node.reason} for node in report.stays],
    }


@as_table.register
def _(result: Quantized) -> RenderableType:
    table = Table(title=f"{result.path}, trained on {result.data}", title_justify="left")
    for heading in ("weight", "shape", "bits", "zeros", "plain ECQ's", "entropy", "relevance by"):
        table.add_column(heading, justify="left" if heading in ("weight", "relevance by") else "right", overflow="fold")
    for row in result.report.tensors:
        shares = (f"{row.zeros:.1%}", f"{row.ecq_zeros:.1%}", f"{row.entropy:.2f}")
        table.add_row(row.name, "x".join(map(str, row.shape)), str(row.bits), *shares, row.rule)
    lines: list[RenderableType] = [table]
    lines += [Text(f"warning: {warning}", style="yellow") for warning in result.report.warnings]
    lines += [Text(f"note: {note}", style="yellow") for note in result.notes]
    before = f"{result.before} before, " if result.before else ""
    lines.append(
        Text(
            f"{result.path}: test accuracy {before}{result.after} after; zeros {result.zeros:.1%}, "
            f"{result.bits_per_weight:.2f} bit per weight; best epoch {result.best_epoch}, chosen on the validation split",
            style="bold",
        )
    )
    return Group(*lines)


@to_json.register
def _(result: Quantized) -> Any:
    return {
        "file": str(result.path),
        "data": result.data,
        "accuracy_before": result.before.to_json() if result.before else None,
        "accuracy": result.after.to_json(),
        "zeros": result.zeros,
        "bits_per_weight": result.bits_per_weight,
        "best_epoch": result.best_epoch,
        "history": [asdict(record) for record in result.history],
        "tensors": [asdict(row) for row in result.report.tensors],
        "left_float": [{"name": name, "reason": reason} for name, reason in result.report.left_float],
        "warnings": list(result.report.warnings),
        "notes": list(result.notes),
    }


def _count(shape: tuple[int, ...]) -> int:
    count = 1
    for length in shape:
        count *= length
    return count
