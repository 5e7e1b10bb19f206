"""A report -> a table for a terminal, or plain values for JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from functools import singledispatch
from typing import Any

from ecqx_onnx_converters.serialization.report import WriteReport
from ecqx_onnx_converters.targets import INT2_TYPES, INT4_TYPES, INT8_TYPES, TARGETS, Target
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from ecqx_onnx.verbs.pack import PackReport
from ecqx_onnx.verbs.quantize import Quantized


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
    for heading in (
        "weight",
        "shape",
        "bits",
        "zeros",
        "entropy",
        "storage",
        "bytes",
        "fewer than float",
    ):
        table.add_column(
            heading,
            justify="left" if heading in ("weight", "storage") else "right",
            overflow="fold",
        )
    for row in report.tensors:
        floats = 4 * count_weights(row.shape)
        shape = "x".join(map(str, row.shape))
        name = ", ".join(row.sources) + (" (BatchNorm folded)" if row.rescaled else "")
        storage = f"{row.storage}, {row.dequantization}"
        cells = (
            f"{row.zeros:.1%}",
            f"{row.entropy:.2f}",
            storage,
            f"{row.nbytes:,}",
            f"{floats / max(1, row.nbytes):.1f}x",
        )
        table.add_row(name, shape, str(row.bits), *cells)
    lines: list[RenderableType] = [table]
    lines += [
        Text(f"stays float: {kept.name} {list(kept.shape)}: {kept.reason}", style="yellow")
        for kept in report.kept
    ]
    lines += [
        Text(f"not in the graph: {entry.name}: {entry.reason}", style="yellow")
        for entry in report.missing
    ]
    lines += [Text(note) for note in report.notes]
    if report.kernels:
        words = ", ".join(
            f"{count} {operator}" for operator, count in sorted(report.kernels.items())
        )
        lines.append(Text(f"on integers: {words}"))
    lines += [
        Text(f"on floats: {node.operator} {node.name}: {node.reason}", style="yellow")
        for node in report.stays
    ]
    shapes = [*(row.shape for row in report.tensors), *(kept.shape for kept in report.kept)]
    floats = sum(4 * count_weights(shape) for shape in shapes)
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
        "float": [
            {"name": kept.name, "shape": list(kept.shape), "reason": kept.reason}
            for kept in report.kept
        ],
        "missing": [{"name": entry.name, "reason": entry.reason} for entry in report.missing],
        "notes": list(report.notes),
        "integer_nodes": dict(report.kernels),
        "float_nodes": [
            {"operator": node.operator, "name": node.name, "reason": node.reason}
            for node in report.stays
        ],
    }


@dataclass(frozen=True)
class TargetTable:
    """What `ecqx-onnx targets` shows."""

    targets: tuple[Target, ...] = tuple(TARGETS.values())


@as_table.register
def _(shown: TargetTable) -> RenderableType:
    table = Table(show_lines=True)
    for heading in ("target", "runs on", "a file holds"):
        table.add_column(heading, overflow="fold", no_wrap=heading == "target")
    for target in shown.targets:
        sample = ", one sample at a time" if target.one_sample else ""
        holds = f"{target.suffix}{sample}, opset up to {target.max_opset}; {list_types(target)}; {', '.join(list_forms(target))}"
        table.add_row(target.name, target.runs_on, holds)
    return table


@to_json.register
def _(shown: TargetTable) -> Any:
    return [
        {
            "name": target.name,
            "runs_on": target.runs_on,
            "file": target.suffix,
            "one_sample": target.one_sample,
            "max_opset": target.max_opset,
            "integers": list_types(target).split(", "),
            "forms": list_forms(target),
            "accelerators": list(target.accelerators),
        }
        for target in shown.targets
    ]


def list_types(target: Target) -> str:
    widths = ((INT8_TYPES, "INT8"), (INT4_TYPES, "INT4"), (INT2_TYPES, "INT2"))
    return ", ".join(name for types, name in widths if types <= target.dense_types)


def list_forms(target: Target) -> list[str]:
    """Storages and dequantisations; the default one first."""
    other = "folded" if target.dequantize == "standard" else "standard"
    forms = [target.dequantize] + ([] if target.only else [other])
    return forms + ["sparse"] * target.sparse + ["packed"] * target.decoders


@as_table.register
def _(result: Quantized) -> RenderableType:
    table = Table(title=f"{result.path}, trained on {result.data}", title_justify="left")
    for heading in ("weight", "shape", "bits", "zeros", "plain ECQ's", "entropy", "relevance by"):
        table.add_column(
            heading,
            justify="left" if heading in ("weight", "relevance by") else "right",
            overflow="fold",
        )
    for row in result.report.tensors:
        shares = (f"{row.zeros:.1%}", f"{row.ecq_zeros:.1%}", f"{row.entropy:.2f}")
        table.add_row(row.name, "x".join(map(str, row.shape)), str(row.bits), *shares, row.rule)
    lines: list[RenderableType] = [table]
    lines += [Text(f"warning: {warning}", style="yellow") for warning in result.report.warnings]
    lines += [Text(f"note: {note}", style="yellow") for note in result.notes]
    before = f"{result.before} before, " if result.before else ""
    after = f"{result.after} after" + (
        " with 8-bit activations" if result.activations == "int8" else ""
    )
    lines.append(
        Text(
            f"{result.path}: test accuracy {before}{after}; zeros {result.zeros:.1%}, "
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
        "activations": result.activations,
        "zeros": result.zeros,
        "bits_per_weight": result.bits_per_weight,
        "best_epoch": result.best_epoch,
        "history": [asdict(record) for record in result.history],
        "tensors": [asdict(row) for row in result.report.tensors],
        "left_float": [
            {"name": name, "reason": reason} for name, reason in result.report.left_float
        ],
        "warnings": list(result.report.warnings),
        "notes": list(result.notes),
    }


def count_weights(shape: tuple[int, ...]) -> int:
    count = 1
    for length in shape:
        count *= length
    return count


@to_json.register
def _(report: PackReport) -> dict[str, Any]:
    return {
        "file": str(report.path),
        "original_bytes": report.original_bytes,
        "bytes": report.nbytes,
        "packed": report.written is not None,
        "reason": report.reason,
        "tensors": to_json(report.written)["tensors"] if report.written else [],
        "opset": report.written.opset if report.written else None,
        "kept": [
            {"name": kept.name, "shape": list(kept.shape), "reason": kept.reason}
            for kept in report.kept
        ],
        "notes": list(report.notes),
        "checks": [check.to_json() for check in report.equivalence.checks]
        if report.equivalence
        else [],
    }


@as_table.register
def _(report: PackReport) -> RenderableType:
    lines: list[RenderableType] = (
        [as_table(replace(report.written, kept=report.kept))] if report.written else []
    )
    if report.written is None:
        lines += [
            Text(f"stays: {kept.name} {list(kept.shape)}: {kept.reason}", style="yellow")
            for kept in report.kept
        ]
    lines += [Text(f"note: {note}", style="yellow") for note in report.notes]
    if report.equivalence is not None:
        lines.append(report.equivalence.render())
    ratio = report.original_bytes / max(1, report.nbytes)
    text = f"{report.original_bytes:,} bytes before, {report.nbytes:,} after ({ratio:.2f}x)"
    if report.written is None:
        text = f"copied unchanged, {report.nbytes:,} bytes: {report.reason}"
    lines.append(Text(f"{report.path}: {text}", style="bold"))
    return Group(*lines)
