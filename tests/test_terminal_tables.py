"""Tables at 80 and 120 columns are golden text; names stay whole; 40 columns give lines.

After a change that is meant:  UPDATE_GOLDEN=1 python -m pytest tests/test_terminal_tables.py
"""

from __future__ import annotations

import io
import os
from pathlib import Path

import pytest
from ecqx_onnx_converters.planning.plan import Kept
from ecqx_onnx_converters.serialization.report import WriteReport, WrittenTensor
from rich.console import Console

from ecqx_onnx.cli.tables import TargetTable, as_table
from ecqx_onnx.compression.result import CompressResult
from ecqx_onnx.compression.search.bounds import Bounds
from ecqx_onnx.compression.search.points import Point
from ecqx_onnx.compression.search.quality import OutputQuality, Quality
from ecqx_onnx.compression.verdict import Cost, Verdict
from ecqx_onnx.inspection.result import FloatWeight, InspectedTensor, Inspection
from ecqx_onnx.quantization.report import Report, TensorReport
from ecqx_onnx.rendering.fitted import Column, FittedTable, split_name, wrap_name
from ecqx_onnx.rendering.weights import MOST_ROWS, show_all_rows
from ecqx_onnx.runtime.latency import Latency
from ecqx_onnx.validation.equivalence import Equivalence
from ecqx_onnx.validation.outputs.metrics import Proportion
from ecqx_onnx.validation.report import Check, ValidationReport
from ecqx_onnx.verbs.reports import PackReport

GOLDEN = Path(__file__).parent / "golden/terminal"
WIDTHS = (80, 120)
NAMES = ("b1.c1.weight", "features.layer4.1.downsample.0.weight", "fc.weight")


def make_weight(name, *, nbytes=326, reason="packed 326 bytes, less than dense INT4 1217 bytes"):
    return WrittenTensor(
        name=name,
        sources=(name,),
        shape=(16, 6, 5, 5),
        bits=4,
        zeros=0.7917,
        entropy=1.453,
        storage="packed",
        dequantization="folded",
        nbytes=nbytes,
        rescaled=name == NAMES[0],
        reason=reason,
    )


def make_written(names=NAMES, path="out.onnx"):
    return WriteReport(
        path=Path(path),
        nbytes=9219,
        opset=18,
        target="onnxruntime",
        tensors=tuple(make_weight(name) for name in names),
        kept=(Kept("head.weight", (10, 84), "excluded by --exclude head.*"),),
        missing=(),
        notes=("preprocessing that the file records: image, values / 255",),
    )


def make_inspection(names=NAMES):
    rows = []
    for name in names:
        row = InspectedTensor(
            name, (name,), (16, 6, 5, 5), 4, 0.7917, 1.453, "packed", "folded", 326
        )
        rows.append(row)
    return Inspection(
        file="out.onnx",
        kind="ONNX model",
        nbytes=9219,
        facts=(("opset", "ai.onnx 18, qx 1"), ("inputs", "x float[N, 1, 28, 28]")),
        tensors=tuple(rows),
        floats=(FloatWeight("head.weight", (10, 84), 3360),),
        parts={"quantised integers": 5514, "functions": 1376, "graph structure": 2329},
        recipe={"bits": 4, "data": "mnist.npz"},
        preprocessing={"kind": "waveform", "spectrum": {"hop": 160, "mel_bands": 40}},
    )


def make_validation():
    checks = (
        Check("format", True, None, None, "onnx's checker accepts the file (opset 18)"),
        Check("optimisation", True, 1.19e-6, 1.37e-5, "outputs with all optimisations and none"),
        Check("weights", True, 5, 5, "all 5 quantised weights are PyTorch's bit for bit"),
        Check("outputs", False, 0.25, 1.37e-5, "the largest difference lies beyond the bound"),
        Check("accuracy", None, None, None, "the data have no labels"),
    )
    return ValidationReport(
        file="out.onnx",
        runtime="onnxruntime 1.32.0, CPUExecutionProvider",
        size=9219,
        samples=10000,
        checks=checks,
        load_seconds=0.0217,
        latency=Latency(3.6e-5, 3.6e-5, 1.0, 50),
        operators={"Conv": 2, "FusedGemm": 2, "Gemm": 1, "MaxPool": 2, "ReorderOutput": 2},
        notes=("nothing else was tried",),
    )


def make_pack():
    checks = (Check("outputs", True, 0.0, 1e-6, "the outputs are the original's"),)
    return PackReport(
        path=Path("packed.onnx"),
        original_bytes=103752,
        nbytes=11072,
        written=make_written(path="packed.onnx"),
        reason="",
        kept=(),
        notes=(),
        equivalence=Equivalence(checks, 1, 4, {}, {}),
    )


def make_point(bits, nbytes, error):
    outputs = (OutputQuality("logits", error, 0.01, 1 - error / 10, 17, 2 * error),)
    quality = Quality(outputs, Proportion(490, 500), None, None, 500)
    return Point(bits, nbytes, bits / 1000, quality, {})


def make_compress():
    points = tuple(make_point(1000.0 * n, 30000 + 10000 * n, 0.2 / n) for n in (2, 3, 4))
    verdict = Verdict(
        points[1].quality, Cost(246824, 0.01, 0.002, 64), Cost(60000, 0.03, 0.002, 64)
    )
    return CompressResult(
        path=Path("small.onnx"),
        source="model.onnx",
        bounds=Bounds(max_bytes=65000),
        points=points,
        chosen=points[1],
        verdict=verdict,
        misses=(),
        report=make_written(path="small.onnx"),
        entries=60000,
        notes=("labels were not needed",),
    )


def make_training_report(names=NAMES):
    rows = []
    for name in names:
        rows.append(TensorReport(name, (16, 6, 5, 5), 4, 0.79, 0.5, 1.45, 0.3, "EpsilonPlus", ()))
    return Report(tuple(rows), (), ())


REPORTS = {
    "convert": make_written,
    "inspect": make_inspection,
    "validate": make_validation,
    "pack": make_pack,
    "compress": make_compress,
    "quantize": make_training_report,
    "targets": TargetTable,
}


def draw(report, width):
    """Lines as a terminal of this width shows them."""
    console = Console(width=width, file=io.StringIO(), markup=False, emoji=False)
    console.print(as_table(report))
    return [line.rstrip() for line in console.file.getvalue().rstrip("\n").split("\n")]


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", REPORTS)
def test_a_table_is_drawn_as_the_golden_text_has_it(name, width):
    text = "\n".join(draw(REPORTS[name](), width)) + "\n"
    path = GOLDEN / f"{name}-{width}.txt"
    if os.environ.get("UPDATE_GOLDEN"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
    assert text == path.read_text(encoding="utf-8")


@pytest.mark.parametrize("width", [40, 60, 80, 100, 120, 200])
@pytest.mark.parametrize("name", REPORTS)
def test_no_line_is_wider_than_the_terminal(name, width):
    assert max(map(len, draw(REPORTS[name](), width))) <= width


@pytest.mark.parametrize("width", [60, 80, 120])
@pytest.mark.parametrize("name", ["convert", "inspect", "pack", "quantize"])
def test_no_name_is_broken_inside_a_word(name, width):
    lines = draw(REPORTS[name](), width)
    cells = [cell.strip() for line in lines for cell in line.split("│") if cell.strip()]
    parts = {part for weight in NAMES for part in split_name(weight)}
    for cell in cells:
        for word in ("weigh", "downsampl", "featur", "layer"):
            if cell.endswith(word) or (cell.startswith("t") and len(cell) < 3):
                assert cell in parts, cell
    joined = "".join(cells)
    for weight in NAMES:
        assert weight in joined or all(part in joined for part in split_name(weight))


def test_forty_columns_give_lines_and_no_frame():
    lines = draw(make_written(), 40)
    assert not any("│" in line for line in lines)
    assert "b1.c1.weight" in lines
    assert any("bytes 326" in line for line in lines)


def test_one_weight_has_the_same_bytes_in_convert_and_inspect(tmp_path):
    import ecqx_onnx

    root = Path(__file__).parents[1]
    out = tmp_path / "out.onnx"
    written = ecqx_onnx.convert(root / "models/lenet5_mnist_4bit.pt", out)
    seen = ecqx_onnx.inspect(out)
    assert [row.nbytes for row in written.tensors] == [row.nbytes for row in seen.tensors]


def test_many_weights_are_grouped_by_their_names():
    names = [f"layer{n // 4}.{n % 4}.conv{n % 2}.weight" for n in range(MOST_ROWS + 4)]
    lines = draw(make_written(names), 80)
    assert sum("layer*.*.conv*.weight" in line for line in lines) == 1
    assert any("│ 24 " in line.replace("      ", " ").replace("  ", " ") for line in lines)
    assert any("--all" in line for line in lines)
    assert len(draw(make_training_report(names), 80)) < 12
    few = draw(make_written(names[:MOST_ROWS]), 80)
    assert sum(".weight" in line for line in few) >= MOST_ROWS


def test_all_shows_every_weight():
    names = [f"layer{n}.weight" for n in range(MOST_ROWS + 4)]
    with show_all_rows(True):
        lines = draw(make_inspection(names), 80)
    assert sum("layer" in line for line in lines) == len(names)


def test_the_commands_that_list_weights_have_the_option_all():
    from typer.testing import CliRunner

    from ecqx_onnx.cli import app

    for command in ("quantize", "convert", "inspect", "pack", "unpack"):
        assert "--all" in CliRunner().invoke(app, [command, "--help"]).output
    assert "--all" not in CliRunner().invoke(app, ["validate", "--help"]).output


def test_columns_are_dropped_in_order_of_use():
    columns = (Column("a", "name"), Column("b" * 30, drop=1), Column("c" * 30, drop=2))
    table = FittedTable(columns, [("x", "y", "z")])
    lines = draw_table(table, 100)
    assert "b" * 30 in lines[1]
    assert "c" * 30 in lines[1]
    lines = draw_table(table, 70)
    assert "b" * 30 in lines[1]
    assert "c" * 30 not in lines[1]
    assert f"left out at this width: {'c' * 30}" in " ".join(lines)


def draw_table(table, width):
    console = Console(width=width, file=io.StringIO(), markup=False, emoji=False)
    console.print(table)
    return console.file.getvalue().split("\n")


@pytest.mark.parametrize("width", range(5, 40))
def test_a_wrapped_name_is_whole_and_no_line_too_long(width):
    name = "features.layer4.1.downsample.0.weight, classifier.weight"
    lines = wrap_name(name, width)
    assert "".join(lines).replace(" ", "") == name.replace(" ", "")
    assert max(map(len, lines)) <= width


def test_words_of_the_reports_are_explained_where_they_stand():
    text = " ".join(draw(make_inspection(), 120))
    assert "entropy: bits a weight" in text
    assert "stored: bits a weight in the file" in text
    assert "smaller: than as float32" in text
    assert "fewer than float" not in text
    text = " ".join(draw(make_training_report(), 120))
    assert "relevance by: what tells how much an output depends on a weight" in text


def test_lists_of_operators_hold_no_single_letters(tmp_path):
    import ecqx_onnx

    out = tmp_path / "out.onnx"
    root = Path(__file__).parents[1]
    ecqx_onnx.convert(root / "models/lenet5_mnist_4bit.pt", out)
    facts = dict(ecqx_onnx.inspect(out).facts)
    for name in ("nodes", "functions"):
        words = facts[name].replace(",", " ").split()
        assert not [word for word in words if len(word) == 1 and word.isalpha()], facts[name]
