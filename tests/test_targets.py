"""A row of the table of targets, a test: the file needs no more than the row states, loads there,
and says what PyTorch says."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from ecqx_onnx_converters.targets import INT4_TYPES, INT8_TYPES, OPSET_OF_TYPE, TARGETS
from typer.testing import CliRunner

from ecqx_onnx import api
from ecqx_onnx.cli import app
from ecqx_onnx.data.split import Arrays, Split
from ecqx_onnx.errors import EcqxError, FileError, InputError, ModelError, OptionError
from ecqx_onnx.preprocessing import Preprocessing
from ecqx_onnx.runtime.sessions import open_session
from ecqx_onnx.validation.devices import find_device

FORMS = [
    ("auto", "auto"),
    ("dense", "folded"),
    ("dense", "standard"),
    ("sparse", "folded"),
    ("packed", "folded"),
]


class Net(torch.nn.Module):
    """4D weights with BatchNorm, a matrix, one weight on three levels that are no multiples of a
    step."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(1, 4, 3, padding=1)
        self.norm = torch.nn.BatchNorm2d(4)
        self.codes = torch.nn.Conv2d(4, 4, 3)
        self.linear = torch.nn.Linear(4 * 36, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(torch.relu(self.codes(torch.relu(self.norm(self.conv(x))))).flatten(1))


def on_levels(net: torch.nn.Module) -> torch.nn.Module:
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if parameter.ndim > 1:
                levels = (parameter / 0.05).round().clamp(-7, 7)
                parameter.copy_(
                    torch.tensor([-0.31415, 0.0, 0.17320])[levels.sign().long() + 1]
                    if "codes" in name
                    else levels * 0.05
                )
    return net.eval()


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("targets") / "model.pt"
    api.save(on_levels(Net()), path, example=torch.zeros(2, 1, 8, 8))
    return path


def names(model: onnx.ModelProto) -> set[str]:
    return {node.op_type for part in (model.graph, *model.functions) for node in part.node}


@pytest.mark.parametrize(("storage", "form"), FORMS)
@pytest.mark.parametrize(
    "target", sorted(TARGETS.values(), key=lambda t: t.name), ids=lambda t: t.name
)
def test_a_file_needs_no_more_than_its_target_has(target, storage, form, checkpoint, tmp_path):
    out = tmp_path / f"out{target.suffix}"
    lacks = {"sparse": not target.sparse, "packed": not target.decoders}
    if (target.only and form not in ("auto", target.dequantize)) or lacks.get(storage):
        with pytest.raises(OptionError, match=target.name):
            api.convert(checkpoint, out, target=target.name, storage=storage, dequantize=form)
        assert not list(tmp_path.iterdir())
        return
    report = api.convert(checkpoint, out, target=target.name, storage=storage, dequantize=form)
    assert report.opset <= target.max_opset
    open_session(out)
    if target.suffix == ".ort":
        return
    model = onnx.load(out)
    assert (
        max(entry.version for entry in model.opset_import if not entry.domain) <= target.max_opset
    )
    stored = {tensor.data_type for tensor in model.graph.initializer}
    assert stored & set(OPSET_OF_TYPE) <= target.dense_types
    assert target.sparse or not model.graph.sparse_initializer
    assert api.validate(out, against=checkpoint, latency_runs=0).ok
    if target.one_sample:
        assert [
            value.type.tensor_type.shape.dim[0].dim_value
            for value in (*model.graph.input, *model.graph.output)
        ] == [1, 1]


@pytest.mark.parametrize(
    "target", sorted(TARGETS.values(), key=lambda t: t.name), ids=lambda t: t.name
)
def test_quantised_activations_load_too_or_are_refused(target, checkpoint, tmp_path):
    out = tmp_path / f"out{target.suffix}"
    x = np.random.default_rng(0).standard_normal((64, 1, 8, 8)).astype(np.float32)
    data = Split(Arrays("x", x), np.arange(64), np.zeros(64, np.int64), Preprocessing("array"))
    if target.no_integers:
        with pytest.raises(OptionError, match="cannot have int8 activations"):
            api.convert(checkpoint, out, target=target.name, activations="int8", calibration=data)
        assert not list(tmp_path.iterdir())
        return
    report = api.convert(checkpoint, out, target=target.name, activations="int8", calibration=data)
    assert report.kernels["Conv"] == 1  # the other one's weight is a codebook
    session = open_session(out)
    (got,) = session.run(None, {session.get_inputs()[0].name: x})
    with torch.no_grad():
        wanted = api.as_checkpoint(checkpoint).module()(torch.from_numpy(x)).numpy()
    assert (
        np.abs(got - wanted).max() < 0.05 * np.abs(wanted).max()
    )  # each of 3 layers rounds to 1/255 of its range


def test_old_onnxruntimes_get_eight_bits_and_opset_18(checkpoint, tmp_path):
    """That 1.17 really loads it is a slow test in test_runtimes.py, which installs it."""
    api.convert(checkpoint, tmp_path / "out.onnx", target="onnxruntime-1.17")
    model = onnx.load(tmp_path / "out.onnx")
    assert model.ir_version <= 9
    assert model.opset_import[0].version == 18


@pytest.mark.parametrize(
    ("storage", "form"),
    [
        pytest.param(*form, marks=[] if form[0] == "packed" else [pytest.mark.slow])
        for form in FORMS
    ],
)
def test_onnxruntime_web_says_the_same(storage, form, checkpoint, tmp_path):
    try:
        find_device("node")
    except InputError as error:
        pytest.skip(str(error))
    api.convert(
        checkpoint,
        tmp_path / "out.onnx",
        target="onnxruntime-web",
        storage=storage,
        dequantize=form,
    )
    table = api.validate_on(
        ["node"], tmp_path / "out.onnx", against=checkpoint, latency_runs=0, time_limit=120
    )
    assert table.ok, (table.failures, table.troubles)
    assert table.reports[0].runtime.startswith("onnxruntime-web")


def test_mobile_files_are_ort_files_of_eight_bits_with_the_operators_of_a_minimal_build(
    checkpoint, tmp_path
):
    report = api.convert(checkpoint, tmp_path / "out.ort", target="onnxruntime-mobile")
    session, reference = open_session(tmp_path / "out.ort"), api.as_checkpoint(checkpoint).module()
    x = np.random.default_rng(0).standard_normal((5, 1, 8, 8)).astype(np.float32)
    with torch.no_grad():
        expected = reference(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(
        session.run(None, {session.get_inputs()[0].name: x})[0], expected, rtol=0, atol=1e-4
    )
    assert "ecqx_onnx" in session.get_modelmeta().custom_metadata_map
    rows = {row.name: row for row in report.tensors}
    assert rows["linear.weight"].storage == "dense INT8"
    assert report.nbytes == (tmp_path / "out.ort").stat().st_size
    operators = (tmp_path / "out.required_operators_and_types.config").read_text()
    assert "DequantizeLinear" in operators
    assert str(tmp_path) not in operators
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "out.ort",
        "out.required_operators_and_types.config",
    ]


def test_an_ort_file_given_for_an_onnx_file_is_told_what_it_is(checkpoint, tmp_path):
    api.convert(checkpoint, tmp_path / "out.ort", target="onnxruntime-mobile")
    with pytest.raises(FileError, match="onnxruntime's own format"):
        api.validate(tmp_path / "out.ort", against=checkpoint)


def test_pack_refuses_ort_files_and_unpack_writes_them(checkpoint, tmp_path):
    from ecqx_onnx.verbs.pack import pack, unpack

    api.convert(checkpoint, tmp_path / "out.onnx")
    with pytest.raises(OptionError, match=r"pack writes \.onnx files"):
        pack(tmp_path / "out.onnx", tmp_path / "out.ort", target="onnxruntime-mobile")
    unpack(tmp_path / "out.onnx", tmp_path / "out.ort", target="onnxruntime-mobile")
    assert open_session(tmp_path / "out.ort").get_inputs()


def test_weights_that_lie_in_the_ort_file_as_floats_are_counted_and_named_so(checkpoint, tmp_path):
    report = api.convert(checkpoint, tmp_path / "out.ort", target="onnxruntime-mobile")
    row = next(row for row in report.tensors if row.name == "codes.weight")
    assert row.nbytes == 4 * 4 * 4 * 9
    assert any("codes.weight" in note for note in report.notes)


def test_four_bit_integers_which_ort_files_cannot_hold_give_no_file(
    checkpoint, tmp_path, monkeypatch
):
    able = dataclasses.replace(
        TARGETS["onnxruntime-mobile"], dense_types=INT8_TYPES | INT4_TYPES, max_opset=21
    )
    monkeypatch.setitem(TARGETS, "onnxruntime-mobile", able)
    with pytest.raises(ModelError, match=r"out\.ort was not written"):
        api.convert(checkpoint, tmp_path / "out.ort", target="onnxruntime-mobile")
    assert not list(tmp_path.iterdir())


def test_an_ort_file_that_does_not_load_back_is_not_written(checkpoint, tmp_path, monkeypatch):
    """The converter reports success for files that nobody can load."""
    from ecqx_onnx.delivery import ort_file
    from ecqx_onnx.runtime import mobile_tools

    real = mobile_tools.convert_to_ort

    def damaging(source, folder):
        real(source, folder)
        (folder / "out.ort").write_bytes((folder / "out.ort").read_bytes()[:200])

    monkeypatch.setattr(ort_file, "convert_to_ort", damaging)
    with pytest.raises(
        ModelError, match=r"out\.ort was not written: onnxruntime .* does not load it"
    ):
        api.convert(checkpoint, tmp_path / "out.ort", target="onnxruntime-mobile")
    assert not list(tmp_path.iterdir())


def test_an_ort_file_that_says_something_else_is_not_written(checkpoint, tmp_path, monkeypatch):
    from ecqx_onnx.runtime import sessions

    real = sessions.run
    counted = iter(range(10))
    monkeypatch.setattr(
        "ecqx_onnx.validation.checks.run",
        lambda *a: tuple(y + 0.01 * next(counted) for y in real(*a)),
    )
    with pytest.raises(ModelError, match="differ by"):
        api.convert(checkpoint, tmp_path / "out.ort", target="onnxruntime-mobile")
    assert not list(tmp_path.iterdir())


def test_names_of_files_and_formats_belong_together(checkpoint, tmp_path):
    with pytest.raises(OptionError, match=r"loads \.ort files; name it .*out\.ort"):
        api.convert(checkpoint, tmp_path / "out.onnx", target="onnxruntime-mobile")
    with pytest.raises(OptionError, match=r"loads \.onnx files"):
        api.convert(checkpoint, tmp_path / "out.ort")


@pytest.mark.parametrize(("target", "providers"), [("coreml", 2), ("nnapi", 1)])
def test_accelerators_take_the_whole_graph_and_the_checkers_verdict_is_shown(
    target, providers, checkpoint, tmp_path
):
    report = api.convert(checkpoint, tmp_path / "out.onnx", target=target)
    verdicts = [note for note in report.notes if note.startswith("usability checker")]
    assert len(verdicts) == providers
    assert all("YES" in note and "in 1 part(s)" in note for note in verdicts)
    result = CliRunner().invoke(
        app, ["convert", str(checkpoint), str(tmp_path / "cli.onnx"), "--target", target]
    )
    assert "usability checker" in result.stdout


def test_what_an_accelerator_lacks_is_named(tmp_path):
    torch.manual_seed(0)
    net = on_levels(
        torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Mish(), torch.nn.Linear(8, 3))
    )
    checkpoint = api.as_checkpoint(net, example=torch.zeros(2, 8))
    notes = api.convert(checkpoint, tmp_path / "out.onnx", target="nnapi").notes
    assert "YES" not in notes[0]
    assert "lacks ai.onnx:" in notes[0]


def test_generic_tools_get_standard_dequantizelinear(checkpoint, tmp_path):
    report = api.convert(checkpoint, tmp_path / "out.onnx", target="qdq")
    assert "DequantizeLinear" in names(onnx.load(tmp_path / "out.onnx"))
    assert {row.dequantization for row in report.tensors if row.name != "codes.weight"} == {
        "standard"
    }


def test_a_file_that_onnxruntime_does_not_load_is_not_written(checkpoint, tmp_path, monkeypatch):
    able = dataclasses.replace(
        TARGETS["onnxruntime"], max_opset=28
    )  # no kernel of 1.32 has DequantizeLinear of opset 28
    monkeypatch.setitem(TARGETS, "onnxruntime", able)
    monkeypatch.setattr("ecqx_onnx_converters.planning.planner.find_needed_opset", lambda entry: 28)
    with pytest.raises(EcqxError):
        api.convert(checkpoint, tmp_path / "out.onnx", dequantize="standard")
    assert not list(tmp_path.iterdir())


def test_the_command_lists_every_target_with_what_it_holds():
    listed = json.loads(CliRunner().invoke(app, ["targets", "--json"]).stdout)
    assert [entry["name"] for entry in listed] == list(TARGETS)
    assert {
        "runs_on",
        "file",
        "integers",
        "forms",
        "max_opset",
        "one_sample",
        "accelerators",
    } < set(listed[0])
    text = CliRunner().invoke(app, ["targets"]).stdout
    assert all(name in text for name in TARGETS)
    assert CliRunner().invoke(app, ["targets", "--quiet"]).stdout == ""
