"""More than sixty architectures are converted, validated and trained for a step; slow."""

from __future__ import annotations

import pytest

from tests.architectures.catalogue import ENTRIES
from tests.architectures.trial import Row, try_entry, write_table

LIBRARIES = ("timm", "transformers")


def test_there_are_more_than_sixty_and_each_has_its_own_name():
    names = [entry.name for entry in ENTRIES]
    assert len(set(names)) == len(names) > 60


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """Rows as they come; in the end they are written as a table, and shown with -s."""
    rows: list[Row] = []
    yield rows
    path = tmp_path_factory.getbasetemp() / "architectures.md"
    path.write_text(write_table(rows) + "\n")
    print(f"\n{path}\n{path.read_text()}")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of libraries that are not ours
@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
def test_an_architecture_is_converted_validated_and_trained_for_a_step(entry, tmp_path, table):
    library = entry.family.partition(",")[0]
    if library in LIBRARIES:
        pytest.importorskip(library, reason=f"{library} comes with the extra 'architectures'")
    row = try_entry(entry, tmp_path)
    table.append(row)
    if entry.refused is not None:
        assert row.trouble
        assert all(entry.refused in trouble for trouble in row.trouble)
        return
    assert row.trouble == ()
    assert row.weights
