"""Draw any report as a table for a terminal, or write it as plain values for JSON.

Reports know how to draw themselves; here stand those that cannot: what the converters, which know
no `rich`, return, and the list of targets.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import singledispatch
from typing import Any

from ecqx_onnx_converters.serialization.report import WriteReport
from ecqx_onnx_converters.targets import INT2_TYPES, INT4_TYPES, INT8_TYPES, TARGETS, Target
from rich.console import RenderableType

from ecqx_onnx.rendering import Shown
from ecqx_onnx.rendering.fitted import Column, FittedTable
from ecqx_onnx.rendering.write_report import render_write_report, write_report_to_json


@singledispatch
def as_table(report: Any) -> RenderableType:
    """Draw what a person reads.

    Args:
        report: of any verb.

    Returns:
        What `rich` prints.
    """
    drawing: RenderableType = report.render()
    return drawing


@singledispatch
def to_json(report: Any) -> Any:
    """Write what a program reads.

    Args:
        report: of any verb.

    Returns:
        Dicts, lists, numbers, texts. Sizes in bytes, shares in [0, 1], entropy in bits per weight.
    """
    return report.to_json()


as_table.register(WriteReport, render_write_report)
to_json.register(WriteReport, write_report_to_json)


@dataclass(frozen=True)
class TargetTable(Shown):
    """What `ecqx-onnx targets` shows: the runtimes that files are written for."""

    targets: tuple[Target, ...] = tuple(TARGETS.values())

    def render(self) -> RenderableType:
        """Draw the targets.

        Returns:
            A table with a row for each.
        """
        columns = (Column("target"), Column("runs on", "prose"), Column("a file holds", "prose"))
        rows = []
        for target in self.targets:
            rows.append((target.name, target.runs_on, _describe_file(target)))
        return FittedTable(columns, rows, ruled=True)

    def to_json(self) -> list[dict[str, Any]]:
        """Write the targets as plain values.

        Returns:
            A dict for each.
        """
        rows = []
        for target in self.targets:
            rows.append(
                {
                    "name": target.name,
                    "runs_on": target.runs_on,
                    "file": target.suffix,
                    "one_sample": target.one_sample,
                    "max_opset": target.max_opset,
                    "integers": _list_types(target),
                    "forms": _list_forms(target),
                    "accelerators": list(target.accelerators),
                }
            )
        return rows


def _describe_file(target: Target) -> str:
    sample = ", one sample at a time" if target.one_sample else ""
    types = ", ".join(_list_types(target))
    forms = ", ".join(_list_forms(target))
    return f"{target.suffix}{sample}, opset up to {target.max_opset}; {types}; {forms}"


def _list_types(target: Target) -> list[str]:
    """Integer types that a file of this target may hold, widest first."""
    widths = ((INT8_TYPES, "INT8"), (INT4_TYPES, "INT4"), (INT2_TYPES, "INT2"))
    return [name for types, name in widths if types <= target.dense_types]


def _list_forms(target: Target) -> list[str]:
    """Storages and dequantizations; the default one first."""
    forms = [target.dequantize]
    if not target.only:
        forms.append("folded" if target.dequantize == "standard" else "standard")
    if target.sparse:
        forms.append("sparse")
    if target.decoders:
        forms.append("packed")
    return forms
