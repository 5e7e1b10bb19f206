"""A table that fits the terminal: columns are dropped in order of use, names stay whole.

Eighty columns are the width that tables are designed for. On terminals narrower than `NARROWEST`,
or where even the columns that stay do not fit, every row becomes a few lines.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

NARROWEST = 60  # columns of a terminal; below, rows are lines
SEPARATORS = "./:_-"  # a long name continues on the next line behind one of these
FRAME = 3  # columns of padding and rule that each column of the table adds
LONGEST_NAME = 26  # columns of a name that stays on one line
LEAST_PROSE = 18  # columns of sentences
Kind = Literal["word", "name", "prose"]


@dataclass(frozen=True)
class Column:
    """One column.

    Attributes:
        heading: its title; in lines, what stands before the value.
        kind: "word" is never broken, "name" behind a separator only, "prose" between words.
        right: whether values are aligned to the right, as numbers are.
        drop: 0 stays; of the others the one with the largest number goes first.
        meaning: what a reader may not know of it, for the line below the table.
    """

    heading: str
    kind: Kind = "word"
    right: bool = False
    drop: int = 0
    meaning: str = ""


class FittedTable:
    """Rows under headings, drawn as wide as the terminal is.

    Args:
        columns: from the left to the right.
        rows: one text for each column; `rich.text.Text` where it has a color.
        title: the line above; "" for none.
        legend: a line below, after what the columns that are shown mean; "" for none.
        mentions: whether a line says which columns are left out.
        ruled: whether there is a rule between rows.
    """

    def __init__(
        self,
        columns: Sequence[Column],
        rows: Sequence[Sequence[str | Text]],
        *,
        title: str = "",
        legend: str = "",
        mentions: bool = True,
        ruled: bool = False,
    ) -> None:
        self.columns = tuple(columns)
        self.rows = tuple(tuple(row) for row in rows)
        self.title = title
        self.legend = legend
        self.mentions = mentions
        self.ruled = ruled

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width = options.max_width
        shown = self._choose_columns(width)
        if shown is None:
            shown = list(range(len(self.columns)))
            yield from self._draw_lines(width)
        else:
            yield self._draw_table(shown, width)
            left_out = [c.heading for n, c in enumerate(self.columns) if n not in shown]
            if left_out and self.mentions:
                words = ", ".join(left_out)
                yield Text(f"left out at this width: {words} (--json has all)", style="dim")
        meanings = []
        for number in shown:
            column = self.columns[number]
            if column.meaning:
                meanings.append(f"{column.heading}: {column.meaning}")
        legend = "; ".join(filter(None, [*meanings, self.legend]))
        if legend:
            yield Text(legend, style="dim")

    def _choose_columns(self, width: int) -> list[int] | None:
        """Numbers of the columns that fit; None where rows are to be lines."""
        if width < NARROWEST:
            return None
        shown = list(range(len(self.columns)))
        while sum(self._find_least(number) + FRAME for number in shown) + 1 > width:
            droppable = [number for number in shown if self.columns[number].drop]
            if not droppable:
                return None
            shown.remove(max(droppable, key=lambda number: self.columns[number].drop))
        return shown

    def _list_cells(self, number: int) -> list[str]:
        cells = [str(row[number]) for row in self.rows]
        return [self.columns[number].heading, *cells]

    def _find_least(self, number: int) -> int:
        """Columns that a column of the table needs."""
        cells = self._list_cells(number)
        natural = max(map(len, cells))
        kind = self.columns[number].kind
        if kind == "word":
            return natural
        if kind == "prose":
            return min(natural, LEAST_PROSE)
        longest = LONGEST_NAME
        for cell in cells:
            longest = max(longest, *map(len, split_name(cell)))
        return min(natural, longest)

    def _draw_table(self, shown: Sequence[int], width: int) -> Table:
        widths = {number: self._find_least(number) for number in shown}
        rest = width - 1 - sum(size + FRAME for size in widths.values())
        natural = {number: max(map(len, self._list_cells(number))) for number in shown}
        for kind in ("name", "prose"):
            growing = [number for number in shown if self.columns[number].kind == kind]
            while rest > 0 and growing:
                poorest = max(growing, key=lambda number: natural[number] / widths[number])
                if natural[poorest] <= widths[poorest]:
                    break
                widths[poorest] += 1
                rest -= 1
        title = Text(self.title) if self.title else None
        table = Table(title=title, title_justify="left", show_lines=self.ruled)
        for number in shown:
            column = self.columns[number]
            justify: Any = "right" if column.right else "left"
            table.add_column(
                column.heading,
                justify=justify,
                width=widths[number],
                overflow="fold",
                no_wrap=column.kind == "word",
            )
        for row in self.rows:
            table.add_row(*(self._draw_cell(row[number], number, widths) for number in shown))
        return table

    def _draw_cell(self, cell: str | Text, number: int, widths: dict[int, int]) -> Text:
        text = cell if isinstance(cell, Text) else Text(cell)
        if self.columns[number].kind != "name" or len(text) <= widths[number]:
            return text
        return Text("\n".join(wrap_name(text.plain, widths[number])), style=text.style)

    def _draw_lines(self, width: int) -> RenderResult:
        if self.title:
            yield Text(self.title, style="italic")
        for row in self.rows:
            cells = list(row)
            has_mark = not self.columns[0].heading  # such as "ok", which stands before the name
            style = cells[0].style if isinstance(cells[0], Text) else "bold"
            name = " ".join(map(str, cells[: 1 + has_mark]))
            for line in wrap_name(name, width):
                yield Text(line, style=style)
            facts: list[str] = []
            for column, cell in list(zip(self.columns, cells, strict=True))[1 + has_mark :]:
                if str(cell):
                    is_sentence = column.kind == "prose" and len(str(cell)) > LEAST_PROSE
                    facts.append(str(cell) if is_sentence else f"{column.heading} {cell}".strip())
            # Sentences have commas of their own.
            for fact in facts if self._has_prose() else [", ".join(facts)]:
                for line in textwrap.wrap(fact, max(10, width - 2)):
                    yield Text(f"  {line}")

    def _has_prose(self) -> bool:
        return any(column.kind == "prose" for column in self.columns)


class FactTable:
    """What is known of one thing: a name and a value on each line.

    Args:
        facts: (name, value) of each; those without a value are left out.
        title: the line above; "" for none.
    """

    def __init__(self, facts: Sequence[tuple[str, str]], *, title: str = "") -> None:
        self.facts = tuple(fact for fact in facts if fact[1])
        self.title = title

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width = options.max_width
        if width < NARROWEST:
            if self.title:
                yield Text(self.title, style="italic")
            for name, value in self.facts:
                for line in textwrap.wrap(f"{name}: {value}", width, subsequent_indent="  "):
                    yield Text(line)
            return
        title = Text(self.title) if self.title else None
        table = Table(title=title, title_justify="left", show_header=False)
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold")
        for name, value in self.facts:
            table.add_row(Text(name), Text(value))
        yield table


def split_name(name: str) -> list[str]:
    """Split a name behind its separators.

    Args:
        name: such as "layer1.conv.weight".

    Returns:
        Parts that give the name again when joined: "layer1.", "conv.", "weight".
    """
    parts = [""]
    for character in name:
        parts[-1] += character
        if character in SEPARATORS or character == " ":
            parts.append("")
    return [part for part in parts if part] or [""]


def wrap_name(name: str, width: int) -> list[str]:
    """Lay out a name in lines that end behind a separator.

    Args:
        name: the name; names with ", " between them count as one.
        width: columns of a line; a part that is longer is broken at its end.

    Returns:
        The lines.
    """
    lines = [""]
    for part in split_name(name):
        if lines[-1] and len(lines[-1]) + len(part.rstrip()) > width:
            lines.append("")
        lines[-1] += part
        while len(lines[-1].rstrip()) > width:
            lines[-1:] = [lines[-1][:width], lines[-1][width:]]
    return [line.rstrip() for line in lines]
