"""The table of weights that training has quantized."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from ecqx_onnx.rendering.fitted import Column, FittedTable
from ecqx_onnx.rendering.weights import ENTROPY, group_alike, name_group

COLUMNS = (
    Column("weight", "name"),
    Column("shape", right=True, drop=3),
    Column("bits", right=True, drop=2),
    Column("zeros", right=True),
    Column("plain ECQ", right=True, drop=1, meaning="zeros that it would have without relevances"),
    Column("entropy", right=True, meaning=ENTROPY),
    Column("relevance by", "prose", meaning="what tells how much an output depends on a weight"),
)


class Trained(Protocol):
    """How one weight was quantized; `quantization.report` has the values."""

    @property
    def name(self) -> str:
        """As the model has it."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its lengths."""

    @property
    def size(self) -> int:
        """Number of its entries."""

    @property
    def bits(self) -> int:
        """Of its levels."""

    @property
    def zeros(self) -> float:
        """Share in [0, 1]."""

    @property
    def ecq_zeros(self) -> float:
        """The share that ECQ without relevances would give it."""

    @property
    def entropy(self) -> float:
        """Of its levels, in bits a weight."""

    @property
    def rule(self) -> str:
        """What its relevances come from."""


def draw_trained_weights(rows: Sequence[Trained], title: str) -> FittedTable:
    """Draw how weights were quantized.

    Args:
        rows: one a weight; many are grouped by their names, as `inspect` groups them.
        title: the line above.

    Returns:
        What `rich` prints.
    """
    cells = []
    for group in group_alike(rows, key=lambda row: row.rule):
        size = max(1, sum(row.size for row in group))
        shapes = {"x".join(map(str, row.shape)) for row in group}
        zeros = sum(row.zeros * row.size for row in group) / size
        ecq_zeros = sum(row.ecq_zeros * row.size for row in group) / size
        entropy = sum(row.entropy * row.size for row in group) / size
        several = f" ({len(group)})" if len(group) > 1 else ""
        cells.append(
            (
                name_group([row.name for row in group]) + several,
                shapes.pop() if len(shapes) == 1 else f"{len(shapes)} shapes",
                ", ".join(sorted({str(row.bits) for row in group})),
                f"{zeros:.1%}",
                f"{ecq_zeros:.1%}",
                f"{entropy:.2f}",
                group[0].rule,
            )
        )
    return FittedTable(COLUMNS, cells, title=title)
