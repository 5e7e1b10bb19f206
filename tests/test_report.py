"""The report's page shows the checkpoint's own numbers, escapes every word, and needs nothing but
itself."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from ecqx_onnx import Quantizer, api
from ecqx_onnx.checkpoint import load, save
from ecqx_onnx.checkpoint.insight import PAIRS, from_document, observe, to_document
from ecqx_onnx.cli import app
from ecqx_onnx.data import Dataset
from ecqx_onnx.errors import FileError
from ecqx_onnx.inspection import inspect
from ecqx_onnx.quantization import train
from ecqx_onnx.rendering.axes import choose_ticks, label_ticks
from ecqx_onnx.reporting import write_report
from ecqx_onnx.reporting.charts import draw_curves, draw_histogram, draw_scatter
from ecqx_onnx.validation.outputs.metrics import Proportion

MODELS = Path(__file__).parents[1] / "models"
HOSTILE = "<script>alert('$title')</script>&\"https://example.org/x.js\""


class Tags(HTMLParser):
    """The elements of a page, and what it links to."""

    def __init__(self):
        super().__init__()
        self.names, self.links = set(), []

    def handle_starttag(self, tag, attributes):
        self.names.add(tag)
        self.links += [
            value
            for name, value in attributes
            if name in ("href", "src", "xlink:href", "data", "action")
        ]
        assert not any(name.startswith("on") for name, _ in attributes)


def a_net():
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Flatten(), torch.nn.Linear(36, 20), torch.nn.ReLU(), torch.nn.Linear(20, 3)
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(model.pt of a short training, the Training)"""
    generator = np.random.default_rng(0)
    x = generator.standard_normal((80, 6, 6)).astype(np.float32)
    y = generator.integers(0, 3, 80)
    data = Dataset.from_arrays(
        "made-up", {"x_train": x[:60], "y_train": y[:60], "x_test": x[60:], "y_test": y[60:]}
    )
    training = train(a_net(), data, epochs=3, batch_size=20, refresh_every=1, entropy_weight=0.2)
    checkpoint = api.as_checkpoint(
        training.quantizer, example=torch.zeros(2, 6, 6), recipe={"data": "made-up"}
    )
    checkpoint = api.with_history(
        checkpoint, training, before=Proportion(7, 20), after=Proportion(8, 20), data="made-up"
    )
    path = tmp_path_factory.mktemp("trained") / "model.pt"
    save(checkpoint, path)
    return path, training


def page_of(path, tmp_path):
    write_report(path, tmp_path / "report.html", force=True)
    return (tmp_path / "report.html").read_text(encoding="utf-8")


def cells(page):
    table = re.search(r"<h2>Weights</h2>.*?</table>", page, re.S)[0]
    rows = re.findall(r"<tr>(<td.*?)</tr>", table)
    return [
        [unescape(re.sub(r"<[^>]+>", "", cell)) for cell in re.findall(r"<td[^>]*>(.*?)</td>", row)]
        for row in rows
    ]


def test_the_numbers_on_the_page_are_those_of_inspect(trained, tmp_path):
    path, training = trained
    page, found = page_of(path, tmp_path), inspect(path)
    rows = cells(page)
    assert len(rows) == len(found.tensors) == 2
    for row, tensor, of_training in zip(
        rows, found.tensors, training.quantizer.report().tensors, strict=True
    ):
        assert row[0] == tensor.name
        assert row[1] == " × ".join(map(str, tensor.shape))
        assert int(row[2].replace(",", "")) == np.prod(tensor.shape)
        assert row[3] == str(tensor.bits)
        assert row[4] == f"{100 * tensor.zeros:.1f} %"
        assert row[5] == f"{100 * of_training.ecq_zeros:.1f} %"
        assert row[6] == f"{tensor.entropy:.2f}"
        assert row[8] == of_training.rule
    zeros = sum(t.zeros * np.prod(t.shape) for t in found.tensors) / sum(
        np.prod(t.shape) for t in found.tensors
    )
    assert f"<dd>{100 * zeros:.1f} %</dd>" in page
    assert "<dd>40.00 %</dd>" in page
    assert "float32: 35.00 %" in page


def test_every_level_has_a_bar_of_its_share(trained, tmp_path):
    path, _ = trained
    page = page_of(path, tmp_path)
    for tensor in load(path).tensors:
        levels, counts = np.unique(tensor.levels, return_counts=True)
        for level, count in zip(levels, counts, strict=True):
            assert f"level {level}: {count:,} weights, {100 * count / tensor.size:.2f} %" in page


def test_the_pairs_are_the_quantizers_own_and_the_correlation_is_numpys(trained):
    path, training = trained
    insight = load(path).insight
    background, relevances = training.quantizer.background(), training.quantizer.relevances()
    for weight, tensor in zip(insight.weights, training.quantizer.tensors(), strict=True):
        magnitude = background[weight.name].abs().numpy().reshape(-1)
        R = relevances[weight.name].numpy().reshape(-1)
        assert len(weight.magnitudes) == len(weight.relevances) == min(PAIRS, magnitude.size)
        assert weight.correlation == pytest.approx(np.corrcoef(magnitude, R)[0, 1])
        known = {
            (m, r, int(k))
            for m, r, k in zip(
                magnitude.astype(np.float16),
                R.astype(np.float16),
                tensor.levels.reshape(-1),
                strict=True,
            )
        }
        assert {
            (m, r, int(k))
            for m, r, k in zip(weight.magnitudes, weight.relevances, weight.levels, strict=True)
        } <= known


def test_the_scatter_draws_every_pair_where_it_belongs():
    chart = draw_scatter([0.0, 1.0, 2.0], [1e-9, 0.01, 1.0], [0, 3, -1])
    assert re.search(r'class="pruned" d="M46.0 176.0h0"', chart)
    assert re.search(r'class="kept" d="M188.0 93.0h0M330.0 10.0h0"', chart)


def test_the_training_curves_show_every_epoch_and_the_chosen_one(trained, tmp_path):
    path, training = trained
    page = page_of(path, tmp_path)
    for record in training.history:
        assert f"validation, epoch {record.epoch}: {100 * record.validation_accuracy:.2f} %" in page
        assert f"entropy, epoch {record.epoch}: {record.bits_per_weight:.4g}" in page
    assert f"best epoch: {training.best_epoch}" in page


def test_every_word_of_the_checkpoint_is_escaped(trained, tmp_path):
    checkpoint = load(trained[0])
    insight = checkpoint.insight
    insight = replace(
        insight,
        weights=tuple(
            replace(weight, name=HOSTILE + weight.name, rule=HOSTILE) for weight in insight.weights
        ),
        warnings=(HOSTILE,),
        approximated=(HOSTILE,),
        left_float=((HOSTILE, HOSTILE), *((name, HOSTILE) for name in checkpoint.state)),
        data=HOSTILE,
    )
    hostile = replace(
        checkpoint,
        tensors=tuple(replace(tensor, name=HOSTILE + tensor.name) for tensor in checkpoint.tensors),
        labels=(HOSTILE,),
        recipe={HOSTILE: HOSTILE},
        notes=(HOSTILE,),
        insight=insight,
    )
    folder = tmp_path / "<b>"
    folder.mkdir()
    save(hostile, folder / "<i>$facts.pt")
    page = page_of(folder / "<i>$facts.pt", tmp_path)
    assert "<script" not in page
    assert "<i>" not in page
    assert page.count("&lt;script&gt;") > 10
    seen = Tags()
    seen.feed(page)
    assert seen.names.isdisjoint({"script", "i", "b", "img", "iframe", "object", "a"})
    assert seen.links == ["data:,"]


def test_the_page_needs_no_other_file_and_no_script(trained, tmp_path):
    page = page_of(trained[0], tmp_path)
    assert "http:" not in page
    assert "https:" not in page
    assert "<script" not in page
    assert "@import" not in page
    assert "url(" not in page
    assert "default-src 'none'" in page


def test_a_checkpoint_without_relevances_says_so(tmp_path):
    net = a_net()
    plain = Quantizer(net, relevance=None)
    api.save(plain, tmp_path / "plain.pt", example=torch.zeros(2, 6, 6))
    page = page_of(tmp_path / "plain.pt", tmp_path)
    assert "holds no relevances" in page
    assert "magnitude |w|" not in page
    api.save(
        api.as_checkpoint(a_net(), example=torch.zeros(2, 6, 6), bits=3), tmp_path / "assigned.pt"
    )
    assert load(tmp_path / "assigned.pt").insight is None
    assert "holds no relevances" in page_of(tmp_path / "assigned.pt", tmp_path)


def test_files_of_before_the_report_still_load(tmp_path):
    page = page_of(MODELS / "lenet5_mnist_4bit.pt", tmp_path)
    assert "conv1.weight" in page
    assert "<h2>Training</h2>" not in page


def test_what_is_kept_survives_the_file(trained):
    insight = load(trained[0]).insight
    again = from_document(*to_document(insight))
    assert to_document(again)[0] == to_document(insight)[0]
    np.testing.assert_array_equal(to_document(again)[1], to_document(insight)[1])
    assert again.before == {"hits": 7, "total": 20}


def test_a_large_weight_is_sampled_and_the_same_each_time():
    quantizer = Quantizer(torch.nn.Sequential(torch.nn.Linear(100, 100)), relevance=None)
    first, second = observe(quantizer), observe(quantizer)
    assert len(first.weights[0].magnitudes) == PAIRS
    np.testing.assert_array_equal(first.weights[0].magnitudes, second.weights[0].magnitudes)
    assert len(first.weights[0].relevances) == 0
    assert first.weights[0].correlation is None


@pytest.mark.parametrize(
    "damage",
    [
        lambda facts, pairs: (facts, pairs[:2]),
        lambda facts, pairs: (facts, pairs[:, 1:]),
        lambda facts, pairs: (facts, torch.full_like(pairs, float("nan"))),
        lambda facts, pairs: (facts, pairs.float()),
        lambda facts, pairs: (facts, torch.zeros(3, 200_000, dtype=torch.float16)),
        lambda facts, pairs: (facts.replace('"count"', '"number"'), pairs),
        lambda facts, pairs: (facts.replace('"hits": 7', '"hits": 700'), pairs),
        lambda facts, pairs: ("[]", pairs),
        lambda facts, pairs: ("{", pairs),
    ],
)
def test_damaged_insight_is_refused_in_one_sentence(damage, trained, tmp_path):
    document = torch.load(trained[0], weights_only=True)
    facts, pairs = damage(document["insight"]["facts"], document["insight"]["pairs"])
    torch.save({**document, "insight": {"facts": facts, "pairs": pairs}}, tmp_path / "damaged.pt")
    with pytest.raises(FileError, match="damaged or incomplete"):
        write_report(tmp_path / "damaged.pt", tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


def test_charts_of_nothing_and_of_one_value_are_charts():
    assert draw_histogram([], 0).startswith("<svg")
    assert draw_histogram([(0, 5)], 5).count("<rect") == 1
    assert draw_scatter([], [], []).startswith("<svg")
    assert draw_curves([("a", "first", [0.5])], best=1, percent=True).count("<circle") == 1
    assert (
        draw_curves(
            [("a", "first", [None, float("nan"), 2.0, 2.0])], best=None, percent=False
        ).count("<circle")
        == 2
    )


def test_a_curve_names_the_epoch_of_each_value_where_others_have_none():
    page = draw_curves([("a", "first", [None, 0.5, None, 0.25])], best=None, percent=False)
    assert re.findall(r"<title>(.*?)</title>", page) == ["a, epoch 2: 0.5", "a, epoch 4: 0.25"]


def test_the_command_line_writes_the_page_and_refuses_in_one_sentence(trained, tmp_path):
    runner = CliRunner()
    out = tmp_path / "report.html"
    done = runner.invoke(app, ["report", str(trained[0]), "-o", str(out)])
    assert done.exit_code == 0, done.output
    assert "2 with relevances" in " ".join(done.stdout.split())
    assert runner.invoke(app, ["report", str(trained[0]), "-o", str(out)]).exit_code == 2
    (tmp_path / "no.pt").write_bytes(b"x")
    refused = runner.invoke(
        app, ["report", str(tmp_path / "no.pt"), "-o", str(tmp_path / "other.html")]
    )
    assert refused.exit_code == 2
    assert "no.pt" in refused.stderr
    assert not (tmp_path / "other.html").exists()
    assert (
        runner.invoke(
            app, ["report", str(trained[0]), "-o", str(tmp_path / "none" / "r.html")]
        ).exit_code
        == 2
    )


@pytest.mark.parametrize(
    ("low", "high"),
    [(0, 1), (97.81, 97.84), (2.0001, 2.0004), (-3, 12), (0, 1e-7), (1e9, 1e9 + 3), (0, 250_000)],
)
def test_no_two_lines_of_an_axis_have_the_same_label_and_each_tells_its_value(low, high):
    ticks = choose_ticks(high, low)
    labels = label_ticks(ticks)
    assert len(set(labels)) == len(ticks) >= 3
    step = ticks[1] - ticks[0]
    assert all(abs(float(a) - b) <= 0.01 * step for a, b in zip(labels, ticks, strict=True))


def test_a_curve_that_hardly_moves_has_an_axis_of_differing_labels():
    chart = draw_curves([("a", "first", [0.97812, 0.97815])], best=None, percent=True)
    labels = re.findall(r">([\d.]+ %)</text>", chart)
    assert len(set(labels)) == len(labels) >= 3
    level = draw_curves([("a", "first", [0.5, 0.5])], best=None, percent=False)
    assert len(re.findall(r'class="grid"', level)) >= 1


def test_the_size_of_the_onnx_file_stands_beside_the_coded_size(trained, tmp_path):
    shutil.copy(trained[0], tmp_path / "net.pt")
    page = page_of(tmp_path / "net.pt", tmp_path)
    assert "<dt>File</dt><dd>–</dd>" in page
    assert "ecqx-onnx convert net.pt net.onnx" in page
    api.convert(tmp_path / "net.pt", tmp_path / "net.onnx")
    size = f"<dt>File</dt><dd>{(tmp_path / 'net.onnx').stat().st_size:,} bytes</dd>"
    page = page_of(tmp_path / "net.pt", tmp_path)
    assert size in page
    assert page.index("<dt>Coded</dt>") < page.index(size)
    assert "ecqx-onnx convert" not in page
    assert "ecqx-onnx validate net.onnx --against net.pt --data DATA" in page
    # A file of the same name from another model says nothing of this one.
    (tmp_path / "net.onnx").rename(tmp_path / "mine.onnx")
    shutil.copy(MODELS / "lenet5_mnist_4bit.pt", tmp_path / "other.pt")
    api.convert(tmp_path / "other.pt", tmp_path / "net.onnx")
    assert "<dt>File</dt><dd>–</dd>" in page_of(tmp_path / "net.pt", tmp_path)
    with pytest.raises(FileError, match="holds other weights"):
        write_report(tmp_path / "net.pt", tmp_path / "no.html", onnx_file=tmp_path / "net.onnx")
    write_report(tmp_path / "net.pt", tmp_path / "yes.html", onnx_file=tmp_path / "mine.onnx")
    assert size in (tmp_path / "yes.html").read_text(encoding="utf-8")
