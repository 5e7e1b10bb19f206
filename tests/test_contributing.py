"""CONTRIBUTING.md names files, rooms and functions that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.fuzz.worker import find_readers

ROOT = Path(__file__).parents[1]
CONVERTERS = ROOT / "converters" / "ecqx_onnx_converters"
TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", TEXT, re.MULTILINE | re.DOTALL))
WAY = re.findall(r"^\d+\. (.+)$", SECTIONS["The way of a weight, from checkpoint to file"], re.M)
PATHS = sorted(set(re.findall(r"`((?:\w+/)+(?:\w+\.(?:py|md))?|\w+\.py)`", TEXT)))
PLACES = (ROOT, ROOT / "ecqx_onnx", CONVERTERS, ROOT / "ecqx_onnx" / "validation")


def test_the_way_of_a_weight_has_ten_lines_that_name_a_file_each():
    assert len(WAY) == 10
    for line in WAY:
        first = re.search(r"`([^`]+)`", line)
        assert first, line
        assert (ROOT / first[1]).is_file(), line


@pytest.mark.parametrize("path", PATHS)
def test_what_it_names_exists(path):
    if path == "utils.py":  # which nobody is to add
        return
    known = any((place / path).exists() for place in PLACES)
    assert known or list(CONVERTERS.rglob(path)) or list((ROOT / "ecqx_onnx").rglob(path))


def test_every_room_stands_in_it():
    rooms = [path.parent for path in (ROOT / "ecqx_onnx").glob("*/__init__.py")]
    rooms += [path.parent for path in CONVERTERS.glob("*/__init__.py")]
    missing = [room.name for room in rooms if f"`{room.name}/`" not in TEXT]
    assert not missing


def test_what_it_says_of_adding_things_is_true():
    text = SECTIONS["How to add"]
    storage = (CONVERTERS / "storage" / "__init__.py").read_text(encoding="utf-8")
    for name in ("encode", "decode", "stored_bytes"):
        assert f"`{name}`" in text
        assert f"    def {name}(" in storage
    for file in ("planning/planner.py", "serialization/reading.py"):
        assert "storage.registry import" in (CONVERTERS / file).read_text(encoding="utf-8")
    assert "def choose_cheapest(" in (CONVERTERS / "planning/planner.py").read_text("utf-8")
    for reader in find_readers().values():
        assert all(hasattr(reader, name) for name in ("NAME", "make_seeds", "read"))


def test_no_line_is_wider_than_100_columns_outside_tables():
    wide = [line for line in TEXT.splitlines() if len(line) > 100 and not line.startswith("|")]
    assert not wide
