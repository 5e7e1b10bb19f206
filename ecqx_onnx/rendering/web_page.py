"""Pages of HTML that need no other file and no script: reports of `report` and `compress`.

Every text is escaped here, but for what is named as markup.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from string import Template

TEMPLATE = Path(__file__).parent / "page.html"


def render_page(*, title: str, subtitle: str, body: str, footer: str) -> str:
    """Make a whole page.

    Args:
        title: its heading and name.
        subtitle: one line below the heading.
        body: markup, sections.
        footer: one line at the end.

    Returns:
        The HTML document.
    """
    values = {
        "title": escape(title),
        "subtitle": escape(subtitle),
        "body": body,
        "footer": escape(footer),
    }
    return Template(TEMPLATE.read_text(encoding="utf-8")).substitute(values)


def render_facts(facts: Iterable[tuple[str, str, str]]) -> str:
    """Make a section of a few large figures.

    Args:
        facts: (what it is, its value, a note) of each.

    Returns:
        Markup.
    """
    parts = ['<section aria-label="In short"><dl class="facts">']
    for what, value, note in facts:
        parts.append(f"<div><dt>{escape(what)}</dt><dd>{escape(value)}</dd>")
        parts.append(f'<dd class="note">{escape(note)}</dd></div>')
    parts.append("</dl></section>")
    return "".join(parts)


def frame_table(table: str, label: str) -> str:
    """Put a table into a frame that scrolls where the table is wider, by keyboard, too.

    Args:
        table: markup of the rows.
        label: what it is a table of.

    Returns:
        Markup.
    """
    opening = f'<div class="wide" tabindex="0" role="region" aria-label="{escape(label)}">'
    return f"{opening}<table>{table}</table></div>"


def render_commands(heading: str, commands: Sequence[str]) -> str:
    """Make a section of commands to type next.

    Args:
        heading: of the section.
        commands: a line each.

    Returns:
        Markup.
    """
    lines = "".join(f'<pre tabindex="0">{escape(command)}</pre>' for command in commands)
    return f"<section><h2>{escape(heading)}</h2>{lines}</section>"


def render_details(summary: str, body: str, *, is_open: bool = False) -> str:
    """Make a part that a phone shows closed, so that the page stays short there.

    Args:
        summary: markup of what is seen of it when it is closed.
        body: markup of the rest.
        is_open: whether it begins open.

    Returns:
        Markup.
    """
    state = " open" if is_open else ""
    return f"<details{state}><summary>{summary}</summary>{body}</details>"
