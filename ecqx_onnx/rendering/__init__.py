"""What a report needs to show itself: on a terminal, in `print`, and in a notebook.

A report has `render()`, which says what `rich` draws, and inherits the rest from `Shown`.
"""

from __future__ import annotations

import io

from rich.console import Console, RenderableType

WIDTH = 100  # columns of a report that is printed or shown in a notebook
HTML_FRAME = '<pre style="white-space: pre; line-height: 1.2">{code}</pre>'


class Shown:
    """A report that `print` shows as a table, and a notebook as HTML.

    Example:
        class Timing(Shown):
            def render(self) -> RenderableType:
                return Text("2 ms")

        print(Timing())
    """

    def render(self) -> RenderableType:
        """Draw the report.

        Returns:
            What `rich` prints: a table, a text, a group of these.

        Raises:
            NotImplementedError: in a report that says neither this nor anything else.
        """
        raise NotImplementedError(f"{type(self).__name__} does not say how it is drawn")

    def __str__(self) -> str:
        return to_text(self.render())

    def _repr_html_(self) -> str:
        """For a notebook."""
        return to_html(self.render())


def to_text(drawing: RenderableType) -> str:
    """Draw as plain text.

    Args:
        drawing: what a report's `render()` returns.

    Returns:
        Lines of at most `WIDTH` characters, without colors or escape sequences.
    """
    return _record(drawing).export_text().rstrip("\n")


def to_html(drawing: RenderableType) -> str:
    """Draw as HTML.

    Args:
        drawing: what a report's `render()` returns.

    Returns:
        One <pre> element; text is escaped, and colors are in its own styles.
    """
    return _record(drawing).export_html(inline_styles=True, code_format=HTML_FRAME)


def _record(drawing: RenderableType) -> Console:
    console = Console(width=WIDTH, record=True, file=io.StringIO(), markup=False, emoji=False)
    console.print(drawing)
    return console
