"""Reports show themselves: as text for `print`, as HTML for a notebook."""

from dataclasses import dataclass

import pytest
from rich.table import Table

from ecqx_onnx.rendering import Shown


@dataclass(frozen=True)
class Counts(Shown):
    name: str

    def render(self):
        table = Table(title=self.name)
        table.add_column("weight")
        table.add_row(self.name)
        return table


def test_a_report_is_printed_as_its_table():
    lines = str(Counts("fc.weight")).splitlines()
    assert any("fc.weight" in line for line in lines)
    assert "\x1b" not in str(Counts("fc.weight"))
    assert max(map(len, lines)) <= 100


def test_a_notebook_gets_html_in_which_nothing_of_the_report_is_markup():
    page = Counts("<script>")._repr_html_()
    assert page.startswith("<pre")
    assert "<script>" not in page
    assert "&lt;script&gt;" in page


def test_markup_of_the_terminal_is_shown_as_it_is_written():
    assert "[bold]w[/bold]" in str(Counts("[bold]w[/bold]"))


def test_a_report_without_a_drawing_says_so():
    with pytest.raises(NotImplementedError, match="Shown"):
        str(Shown())


def test_repr_stays_the_one_of_the_dataclass():
    assert repr(Counts("w")) == "Counts(name='w')"
