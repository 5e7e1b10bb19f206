"""The table of weights that `convert`, `pack`, `inspect` and `quantize` share.

More than `MOST_ROWS` weights are grouped by their names with the numbers left out, so that the
blocks of a deep network are one row each; `show_all_rows` (--all) shows every one.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Protocol, TypeVar

from ecqx_onnx.rendering.fitted import Column, FittedTable

MOST_ROWS = 20
ENTROPY = "bits a weight that a code of its levels takes on average, at best"
STORED = "bits a weight in the file"

_all_rows: ContextVar[bool] = ContextVar("_all_rows", default=False)


@contextlib.contextmanager
def show_all_rows(wanted: bool) -> Iterator[None]:
    """Show every weight, however many there are.

    Args:
        wanted: False groups them when there are many.

    Yields:
        Nothing; tables that are drawn inside are meant.
    """
    token = _all_rows.set(wanted)
    try:
        yield
    finally:
        _all_rows.reset(token)


def shows_all_rows() -> bool:
    """Tell whether weights are not to be grouped.

    Returns:
        What `show_all_rows` was given; False outside.
    """
    return _all_rows.get()


@dataclass(frozen=True)
class WeightRow:
    """One weight, or several alike.

    Attributes:
        name: its names in the model, with ", " between them.
        shape: its lengths.
        bits: of its levels.
        zeros: share in [0, 1].
        entropy: of its levels, in bits a weight.
        storage: how its integers lie in the file.
        dequantization: how they become floats; "" if the file does not say.
        nbytes: of its integers in the file.
        reason: why they are stored so; "" if nobody chose.
    """

    name: str
    shape: tuple[int, ...]
    bits: int
    zeros: float
    entropy: float
    storage: str
    dequantization: str
    nbytes: int
    reason: str = ""

    @property
    def size(self) -> int:
        """Number of its entries."""
        return math.prod(self.shape)


def draw_weights(rows: Sequence[WeightRow], *, title: str = "") -> FittedTable:
    """Draw weights as a table.

    Args:
        rows: one a weight.
        title: the line above; "" for none.

    Returns:
        What `rich` prints.
    """
    grouped = group_alike(rows, key=lambda row: row.storage)
    several = any(len(group) > 1 for group in grouped)
    forms = {row.dequantization for row in rows}
    columns = [
        Column("weight", "name"),
        Column("shape", right=True, drop=7),
        Column("bits", right=True, drop=6),
        Column("zeros", right=True, drop=3),
        Column("entropy", right=True, drop=4, meaning=ENTROPY),
        Column("stored", right=True, drop=5, meaning=STORED),
        Column("storage"),
        Column("bytes", right=True),
        Column("smaller", right=True, meaning="than as float32"),
    ]
    if several:
        columns.insert(1, Column("weights", right=True))
    if len(forms) > 1:
        columns.append(Column("dequantized", drop=8))
    with_reason = any(row.reason for row in rows) and not several
    if with_reason:
        columns.append(Column("instead of", "prose", drop=2, meaning="bytes otherwise"))
    table = []
    for group in grouped:
        cells = _draw_group(group)
        if several:
            cells.insert(1, str(len(group)))
        if len(forms) > 1:
            cells.append(_join({row.dequantization for row in group}))
        if with_reason:
            cells.append(_shorten_reason(group[0]))
        table.append(cells)
    notes = ["* stands for numbers, --all shows every weight"] if several else []
    if len(forms) == 1 and forms != {""}:
        notes.append(f"all are dequantized {forms.pop()}")
    return FittedTable(columns, table, title=title, legend="; ".join(notes))


class Named(Protocol):
    """Whatever has a weight's name."""

    @property
    def name(self) -> str:
        """As the model has it."""


Row = TypeVar("Row", bound=Named)


def group_alike(rows: Sequence[Row], *, key: Callable[[Row], str]) -> list[list[Row]]:
    """Group weights whose names differ in numbers only.

    Args:
        rows: one a weight.
        key: what else weights of a group have in common.

    Returns:
        Each alone where there are few or `show_all_rows` asks for it; else the groups in the order
        of their first weights.
    """
    if len(rows) <= MOST_ROWS or shows_all_rows():
        return [[row] for row in rows]
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((_leave_out_numbers(row.name), key(row)), []).append(row)
    if len(groups) > MOST_ROWS:
        groups = {}
        for row in rows:
            last = re.split(r"[./]", _leave_out_numbers(row.name))[-1]
            groups.setdefault((f"*{last}", key(row)), []).append(row)
    return list(groups.values())


def name_group(names: Sequence[str]) -> str:
    """Name several weights at once.

    Args:
        names: of weights that belong together.

    Returns:
        The name of one; else what they share, with * for what differs.
    """
    if len(names) == 1:
        return names[0]
    without_numbers = {_leave_out_numbers(name) for name in names}
    if len(without_numbers) == 1:
        return without_numbers.pop()
    last = re.split(r"[./]", _leave_out_numbers(names[0]))[-1]
    return f"* {last}"


def _leave_out_numbers(name: str) -> str:
    return re.sub(r"\d+", "*", name)


def _draw_group(group: Sequence[WeightRow]) -> list[str]:
    size = max(1, sum(row.size for row in group))
    nbytes = sum(row.nbytes for row in group)
    shapes = {row.shape for row in group}
    zeros = sum(row.zeros * row.size for row in group) / size
    entropy = sum(row.entropy * row.size for row in group) / size
    shape = "x".join(map(str, group[0].shape)) if len(shapes) == 1 else f"{len(shapes)} shapes"
    return [
        name_group([row.name for row in group]),
        shape,
        _join({str(row.bits) for row in group}),
        f"{zeros:.1%}",
        f"{entropy:.2f}",
        f"{8 * nbytes / size:.2f}",
        group[0].storage,
        f"{nbytes:,}",
        f"{4 * size / nbytes:.1f}x" if nbytes else "",
    ]


def _join(values: set[str]) -> str:
    return ", ".join(sorted(values))


def _shorten_reason(row: WeightRow) -> str:
    """The next best, where that is the reason: the bytes of what was chosen have a column."""
    next_best = re.match(rf"\w[\w ]*? {row.nbytes} bytes, less than ([\w ]+?) (\d+)", row.reason)
    if next_best is None:
        return row.reason
    return f"{next_best[1]} {int(next_best[2]):,}"
