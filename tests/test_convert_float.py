"""`convert` of a float .onnx, to bits or bits per weight, with data and without; grids that end."""

import subprocess
import sys

import numpy as np
import onnx
import onnxruntime
import pytest
from typer.testing import CliRunner

import ecqx_onnx
from ecqx_onnx.cli import app
from ecqx_onnx.compression.rounding.capped import fit_steps, outermost_level, round_to_cancel
from ecqx_onnx.compression.rounding.moments import Moments
from ecqx_onnx.compression.rounding.rounding import round_with_feedback
from ecqx_onnx.errors import DataError, ModelError, OptionError
from tests.test_compression_command import recurrent_data, recurrent_network
from tests.test_compression_parts import images, small_network


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("convert")
    onnx.save(small_network(), place / "float.onnx")
    np.savez(place / "data.npz", x=images(96))
    return place


def error_of(file, other, x):
    y, z = (onnxruntime.InferenceSession(path).run(None, {"x": x})[0] for path in (file, other))
    return np.linalg.norm(y - z) / np.linalg.norm(z)


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
def test_bits_keep_their_number_of_levels(folder, tmp_path, bits):
    out = tmp_path / "out.onnx"
    report = ecqx_onnx.convert(folder / "float.onnx", out, bits=bits)
    assert {row.name for row in report.tensors} == {"w1", "w2", "w3"}
    seen = ecqx_onnx.inspect(out)
    assert all(tensor.bits <= bits for tensor in seen.tensors)
    if bits == 8:
        assert error_of(out, folder / "float.onnx", images(50, seed=3)) < 0.02


def test_data_make_the_error_smaller(folder, tmp_path):
    errors = []
    for calibration in (None, folder / "data.npz"):
        out = tmp_path / "out.onnx"
        ecqx_onnx.convert(folder / "float.onnx", out, bits=3, calibration=calibration, force=True)
        errors.append(error_of(out, folder / "float.onnx", images(200, seed=3)))
    assert errors[1] < 0.8 * errors[0]


@pytest.mark.parametrize("calibrated", [False, True])
def test_bits_per_weight_are_not_passed_over(folder, tmp_path, calibrated):
    out = tmp_path / "out.onnx"
    report = ecqx_onnx.convert(
        folder / "float.onnx",
        out,
        bits_per_weight=8.0,
        calibration=folder / "data.npz" if calibrated else None,
    )
    coded = next(note for note in report.notes if "coded bits" in note)
    assert 5.0 < float(coded.split()[0]) <= 8.0
    assert ecqx_onnx.validate(
        out, against=folder / "float.onnx", data=folder / "data.npz", latency_runs=0
    ).ok


def test_a_network_of_pytorch_takes_bits_per_weight_and_data(tmp_path):
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.ReLU(), torch.nn.Linear(64, 8))
    x = torch.randn(96, 32)
    for options in ({"bits_per_weight": 5.0}, {"bits": 4}):
        report = ecqx_onnx.convert(
            module.eval(),
            tmp_path / "out.onnx",
            example=x[:2],
            calibration=x.numpy(),
            force=True,
            **options,
        )
        assert any(note.startswith("rounded by 96 samples") for note in report.notes)


def test_recurrent_networks_with_two_inputs_go_too(tmp_path):
    onnx.save(recurrent_network(), tmp_path / "float.onnx")
    out = tmp_path / "out.onnx"
    arrays = recurrent_data(64)
    ecqx_onnx.convert(tmp_path / "float.onnx", out, bits=5, calibration=arrays)
    y, z = (
        onnxruntime.InferenceSession(path).run(None, arrays)[0]
        for path in (tmp_path / "float.onnx", out)
    )
    assert np.linalg.norm(y - z) < 0.2 * np.linalg.norm(y)


def test_what_cannot_go_is_one_sentence(folder, tmp_path):
    model, out = folder / "float.onnx", tmp_path / "out.onnx"
    for options, error, words in (
        ({}, OptionError, "--bits 4"),
        ({"bits": 3, "bits_per_weight": 2.0}, OptionError, "one of them"),
        ({"bits": 3, "entropy_weight": 0.1}, OptionError, "PyTorch"),
        ({"bits": 3, "activations": "int8"}, OptionError, "PyTorch"),
        ({"bits": 9}, OptionError, "bits"),
        ({"bits_per_weight": 0.0}, OptionError, "bits_per_weight|bits-per-weight"),
        ({"bits_per_weight": 0.1}, OptionError, "fewest"),
        ({"bits": 3, "include": ["q*"]}, OptionError, "matches no weight"),
        ({"bits": 3, "exclude": ["*"]}, ModelError, "no weight to quantise"),
        ({"bits": 3, "calibration": images(8)}, DataError, "32"),
        ({"bits": 3, "calibration": images(64)[:, :2]}, DataError, "takes"),
        ({"bits": 3, "data": images(8)[:, :2]}, DataError, "takes"),
    ):
        with pytest.raises(error, match=words):
            ecqx_onnx.convert(model, out, **options)
        assert not out.exists()
    ecqx_onnx.convert(model, out, bits=4)
    with pytest.raises(ModelError, match="already"):
        ecqx_onnx.convert(out, tmp_path / "again.onnx", bits=4)


def test_the_command_says_how_far_the_result_is(folder, tmp_path):
    words = ["convert", str(folder / "float.onnx"), str(tmp_path / "out.onnx")]
    result = CliRunner().invoke(app, [*words, "--bits-per-weight", "9"])
    assert result.exit_code == 0, result.stderr
    assert "against the float model" in " ".join(result.stdout.split())
    assert CliRunner().invoke(app, [*words, "--force"]).exit_code == 2


def test_a_float_file_is_converted_without_torch(folder, tmp_path):
    code = (
        "import sys\nfrom ecqx_onnx.verbs.convert import convert\n"
        f"convert({str(folder / 'float.onnx')!r}, {str(tmp_path / 'o.onnx')!r}, bits=4)\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# Grids that end at a level


def random_matrices(rows, columns, seed=0):
    return np.random.default_rng(seed).normal(size=(1, rows, columns)).astype(np.float32)


def test_steps_by_least_squares_are_the_best_of_a_fine_search():
    matrices = random_matrices(3, 200)
    found = fit_steps(matrices, 3, by_row=True)
    for row, step in zip(matrices[0], found[0, :, 0], strict=True):
        tried = np.linspace(0.05, 1.2, 400)
        losses = [((row - np.clip(np.rint(row / s), -3, 3) * s) ** 2).sum() for s in tried]
        loss = ((row - np.clip(np.rint(row / step), -3, 3) * step) ** 2).sum()
        assert loss <= 1.05 * min(losses)


def test_errors_cancel_over_windows_and_rows_within_the_grid():
    matrices = random_matrices(6, 36) + 0.3
    highest = outermost_level(3)
    steps = (np.abs(matrices).max(axis=-1, keepdims=True) / highest).astype(np.float32)
    made = round_to_cancel(matrices, steps, highest, window=9)
    assert np.abs(made.levels).max() <= highest
    sums = (made.levels - matrices / steps).sum(axis=-1)
    assert np.abs(sums).max() <= 0.5 + 1e-6
    assert (np.abs(made.levels - matrices / steps) <= 1.0 + 1e-6).all()


def test_a_weight_beyond_the_grid_does_not_spoil_its_row():
    """What clipping loses is not pushed on: the other weights stay near theirs."""
    generator = np.random.default_rng(0)
    matrices = random_matrices(1, 64)
    matrices[0, 0, 5] = 60.0
    mixing = generator.normal(size=(64, 64))
    x = generator.normal(size=(4000, 64)) @ mixing
    hessian = x.T @ x / len(x)
    moments = Moments((hessian[None],), (0,), np.zeros((1, 64)), len(x))
    made = round_with_feedback(matrices, np.full((1, 1, 1), 0.8, np.float32), moments, capped=3)
    rest = np.delete(made.levels[0, 0] * 0.8 - matrices[0, 0], 5)
    assert made.levels[0, 0, 5] == 3
    assert np.sqrt((rest**2).mean()) < 1.5


@pytest.mark.parametrize(
    ("shape", "bits", "steps"),
    [
        ((8, 96), 4, 8),  # a matrix: one step for each output
        ((8, 96), 2, 8),
        ((8, 16, 3, 3), 3, 8),  # a convolution: up to three bits
        ((8, 16, 3, 3), 4, 1),
        ((8, 2, 3, 3), 3, 1),  # too few weights to pay for a step
        ((8, 2, 3, 3), 6, 8),
    ],
)
def test_a_channel_has_a_step_of_its_own_where_that_is_better(shape, bits, steps):
    torch = pytest.importorskip("torch")
    from ecqx_onnx.sources.post_training import _quantize_weight

    torch.manual_seed(0)
    weight = torch.randn(shape) * torch.logspace(-1, 1, 8).reshape(-1, *(1,) * (len(shape) - 1))
    made = _quantize_weight("w", weight, bits, 0.0, axis=0, is_summed=True)
    assert made.meaning.step.size == steps
    assert np.abs(made.levels).max() <= 2 ** (bits - 1) - 1
    picked = _quantize_weight("w", weight, bits, 0.0, axis=0, is_summed=False)
    assert picked.meaning.step.size == (8 if bits >= 6 else 1)
