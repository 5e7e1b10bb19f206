"""A compressed file against the float .onnx that it was made from: validate, devices, deploy."""

import numpy as np
import onnx
import onnxruntime
import pytest
from typer.testing import CliRunner

import ecqx_onnx
from ecqx_onnx.cli import app
from ecqx_onnx.errors import DataError, ModelError, OptionError
from ecqx_onnx.validation.references.float_distance import FloatBounds
from ecqx_onnx.verbs.compress import compress
from ecqx_onnx.verbs.validate import validate_on
from tests.test_compression_command import recurrent_data, recurrent_network
from tests.test_compression_parts import images, small_network


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A float file, one compressed to an error of about 0.2, and data without and with labels."""
    place = tmp_path_factory.mktemp("float")
    onnx.save(small_network(), place / "float.onnx")
    x = images(96)
    np.savez(place / "data.npz", x=x)
    compress(place / "float.onnx", place / "small.onnx", data=place / "data.npz", max_error=0.2)
    scores = onnxruntime.InferenceSession(place / "float.onnx").run(None, {"x": x})[0]
    np.savez(place / "labelled.npz", x=x, labels=scores.argmax(1))
    return place


def check_of(report):
    return next(check for check in report.checks if check.name == "float model")


def run_validate(folder, **options):
    options = {"data": folder / "data.npz", "against": folder / "float.onnx", **options}
    return ecqx_onnx.validate(folder / "small.onnx", latency_runs=0, **options)


def test_the_default_bound_decides_where_none_is_given(folder):
    report = run_validate(folder)
    check = check_of(report)
    assert check.limit == 0.05
    assert check.passed is (check.measured <= 0.05)
    assert report.ok is check.passed


def test_the_error_is_the_relative_error_of_the_outputs(folder):
    x = images(96)
    y, z = (
        onnxruntime.InferenceSession(folder / name).run(None, {"x": x})[0]
        for name in ("float.onnx", "small.onnx")
    )
    wanted = np.linalg.norm((y - z).astype(float)) / np.linalg.norm(y.astype(float))
    report = run_validate(folder, float_bounds=FloatBounds(max_error=0.5))
    assert report.ok
    assert check_of(report).measured == pytest.approx(wanted, rel=1e-5)
    assert not run_validate(folder, float_bounds=FloatBounds(max_error=0.9 * wanted)).ok


def test_labels_make_agreement_and_drop(folder):
    data = folder / "labelled.npz"
    report = run_validate(
        folder, data=data, float_bounds=FloatBounds(max_drop=100, min_agreement=2)
    )
    assert report.ok
    assert report.pytorch_accuracy.share == 1.0
    assert check_of(report).measured == pytest.approx(100 * report.agreement.share)
    strict = FloatBounds(max_drop=0, min_agreement=100)
    assert run_validate(folder, data=data, float_bounds=strict).ok is (report.agreement.share == 1)


def test_agreement_without_classes_is_no_pass(folder):
    report = run_validate(folder, float_bounds=FloatBounds(min_agreement=50))
    assert not report.ok
    assert "--max-error" in check_of(report).sentence


def test_without_data_random_inputs_are_compared(folder):
    report = run_validate(folder, data=None, float_bounds=FloatBounds(max_error=1.0))
    assert report.ok
    assert report.samples == 32


def test_numbers_in_the_file_are_shown_and_not_judged_by(folder, tmp_path):
    from ecqx_onnx_converters.serialization.metadata import METADATA_KEY, from_text, to_text

    proto = onnx.load(folder / "small.onnx")
    entry = next(prop for prop in proto.metadata_props if prop.key == METADATA_KEY)
    content = from_text(entry.value)
    content["recipe"]["float_error"] = 0.9
    entry.value = to_text(content)
    onnx.save(proto, tmp_path / "boasting.onnx")
    report = ecqx_onnx.validate(
        tmp_path / "boasting.onnx",
        against=folder / "float.onnx",
        data=folder / "data.npz",
        latency_runs=0,
    )
    assert check_of(report).limit == 0.05
    assert any("0.9" in note and "not judged" in note for note in report.notes)


def test_a_file_with_several_inputs_and_its_dict_of_arrays(tmp_path):
    onnx.save(recurrent_network(), tmp_path / "float.onnx")
    arrays = recurrent_data(200)
    compress(tmp_path / "float.onnx", tmp_path / "small.onnx", data=arrays, bits_per_weight=8)
    report = ecqx_onnx.validate(
        tmp_path / "small.onnx",
        against=tmp_path / "float.onnx",
        data=arrays,
        float_bounds=FloatBounds(max_error=0.5),
        latency_runs=0,
    )
    assert report.ok, report.failures
    assert report.samples == 200
    given = ecqx_onnx.validate(
        tmp_path / "small.onnx",
        against=tmp_path / "float.onnx",
        inputs=arrays,
        float_bounds=FloatBounds(max_error=0.5),
        latency_runs=0,
    )
    assert check_of(given).measured == pytest.approx(check_of(report).measured, rel=1e-4)


def test_someone_elses_quantised_file_is_compared_too(folder, tmp_path):
    from onnxruntime.quantization import QuantType, quantize_dynamic

    out = tmp_path / "int8.onnx"
    quantize_dynamic(folder / "float.onnx", out, weight_type=QuantType.QUInt8)
    report = ecqx_onnx.validate(
        out,
        against=folder / "float.onnx",
        data=folder / "data.npz",
        float_bounds=FloatBounds(max_error=0.2),
        latency_runs=0,
    )
    assert check_of(report).passed


def test_what_does_not_go_together_is_one_sentence(folder, tmp_path):
    with pytest.raises(OptionError, match="itself"):
        ecqx_onnx.validate(folder / "small.onnx", against=folder / "small.onnx")
    with pytest.raises(OptionError, match="leave --device out"):
        validate_on(["local"], folder / "small.onnx", against=folder / "small.onnx")
    with pytest.raises(OptionError, match="not float"):
        ecqx_onnx.validate(
            folder / "float.onnx",
            against=folder / "small.onnx",
            float_bounds=FloatBounds(max_error=0.1),
        )
    with pytest.raises(ModelError, match="needed here"):
        ecqx_onnx.deploy(
            folder / "small.onnx", tmp_path / "d", to="linux", against=folder / "small.onnx"
        )
    np.savez(tmp_path / "bad.npz", x=images(4)[:, :2])
    with pytest.raises(DataError):
        run_validate(folder, data=tmp_path / "bad.npz")


def test_the_command_ends_with_the_status_of_the_bounds(folder):
    words = ["validate", str(folder / "small.onnx"), "--against", str(folder / "float.onnx")]
    words += ["--data", str(folder / "data.npz")]
    runner = CliRunner()
    assert runner.invoke(app, [*words, "--max-error", "0.5"]).exit_code == 0
    failed = runner.invoke(app, [*words, "--max-error", "0.001"])
    assert failed.exit_code == 1
    assert "--max-error" in failed.stderr
    assert "PyTorch" not in failed.stdout
    assert runner.invoke(app, [*words, "--min-agreement", "0.9"]).exit_code == 2


def test_a_device_is_compared_with_the_float_file(folder):
    table = validate_on(
        ["local"],
        folder / "small.onnx",
        against=folder / "float.onnx",
        data=folder / "data.npz",
        float_bounds=FloatBounds(max_error=0.5),
        latency_runs=0,
    )
    assert table.ok, table.failures
    assert check_of(table.reports[0]).measured == pytest.approx(
        check_of(run_validate(folder, float_bounds=FloatBounds(max_error=0.5))).measured, rel=1e-3
    )


def test_a_compressed_file_is_deployed_once_it_agrees_with_the_float_file(folder, tmp_path):
    from ecqx_onnx.errors import CheckFailed

    labelled = tmp_path / "close.onnx"
    compress(folder / "float.onnx", labelled, data=folder / "data.npz", bits_per_weight=12)
    done = ecqx_onnx.deploy(
        labelled,
        tmp_path / "folder",
        to="linux",
        against=folder / "float.onnx",
        data=folder / "data.npz",
    )
    assert (tmp_path / "folder").is_dir()
    assert done.files
    onnx.save(small_network(seed=1), tmp_path / "other.onnx")
    with pytest.raises(CheckFailed, match="float model"):
        ecqx_onnx.deploy(
            labelled,
            tmp_path / "other",
            to="linux",
            against=tmp_path / "other.onnx",
            data=folder / "data.npz",
        )
    assert not (tmp_path / "other").exists()
