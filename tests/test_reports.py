"""Reports of the verbs show themselves in print, in a notebook, and in repr."""

from pathlib import Path

import pytest

import ecqx_onnx
from ecqx_onnx.cli.tables import TargetTable

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "tests/golden/mixed-qdq.onnx"


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """Of a file that is copied, as its weights are stored by us already."""
    return ecqx_onnx.pack(GOLDEN, tmp_path_factory.mktemp("packed") / "copied.onnx")


def test_a_report_prints_as_the_command_shows_it(report):
    assert "copied unchanged" in str(report)


def test_a_report_says_in_repr_what_was_done(report):
    assert repr(report).startswith("<PackReport ")
    assert "copied unchanged" in repr(report)
    assert len(repr(report)) < 400


def test_a_notebook_gets_html(report):
    assert report._repr_html_().startswith("<pre")


def test_what_was_written_is_printed_weight_by_weight(tmp_path):
    written = ecqx_onnx.unpack(GOLDEN, tmp_path / "dense.onnx")
    assert str(written).count(" zeros, ") == len(written.tensors) > 0
    assert f"{written.nbytes:,} bytes; opset" in str(written).splitlines()[-1]
    assert written._repr_html_().startswith("<pre>")


def test_the_targets_print_as_a_table():
    assert "onnxruntime" in str(TargetTable())


@pytest.mark.parametrize("package", ["ecqx_onnx", "converters/ecqx_onnx_converters"])
def test_both_packages_say_that_they_are_typed(package):
    assert (ROOT / package / "py.typed").is_file()
    name = package.rpartition("/")[2]
    assert f'"{name}" = ["py.typed"]' in (ROOT / "pyproject.toml").read_text()
