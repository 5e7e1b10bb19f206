"""Calibration data and options that cannot be used: one sentence, exit status 2, no file. And data
at the edge of what can be."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from ecqx_onnx import api
from ecqx_onnx.cli import app
from ecqx_onnx.data import Dataset
from ecqx_onnx.errors import DataError, ModelError
from ecqx_onnx.preprocessing import Preprocessing
from ecqx_onnx.runtime.calibration import calibrate_ranges
from ecqx_onnx.runtime.sessions import open_session, run
from tests.conversions import float_graph, quantize_model


def net() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)).eval()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    torch.manual_seed(0)
    model = net()
    quantize_model(model)
    path = tmp_path_factory.mktemp("calibration") / "model.pt"
    api.save(model, path, example=torch.zeros(2, 1, 8, 8), preprocessing=Preprocessing("array"))
    return path


def data(path, x):
    np.savez(
        path,
        x_train=x,
        y_train=np.arange(len(x)) % 3,
        x_test=x[:1],
        y_test=np.zeros(len(x[:1]), np.int64),
    )
    return path


def images(count=8, channels=1, seed=0):
    return np.random.default_rng(seed).standard_normal((count, channels, 8, 8)).astype(np.float32)


def refused(checkpoint, tmp_path, *arguments):
    out = tmp_path / "out.onnx"
    result = CliRunner().invoke(app, ["convert", str(checkpoint), str(out), *map(str, arguments)])
    assert result.exit_code == 2, (result.output, result.stderr, result.exception)
    assert not out.exists()
    message = result.stderr.strip()
    assert message.startswith("error: ")
    assert "\n" not in message
    return message


INT8 = ("--activations", "int8")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--activations", "int4"), "no activations of type 'int4'"),
        (INT8, "add --calibration DATA"),
        (("--calibration", "x.npz"), "calibration data are for --activations int8"),
        ((*INT8, "--calibration", "missing.npz"), "there is no file missing.npz"),
        (
            (*INT8, "--calibration", "x.npz", "--calibration-method", "guess"),
            "no calibration method 'guess'; choose one of minmax",
        ),
        (
            (*INT8, "--calibration", "x.npz", "--target", "coreml"),
            "target 'coreml' cannot have int8 activations",
        ),
        (
            (*INT8, "--calibration", "x.npz", "--target", "nnapi"),
            "target 'nnapi' cannot have int8 activations",
        ),
    ],
)
def test_options_that_do_not_go_together_are_refused(checkpoint, tmp_path, arguments, words):
    assert words in refused(checkpoint, tmp_path, *arguments)


def test_data_without_a_sample_are_refused(checkpoint, tmp_path):
    path = data(tmp_path / "empty.npz", images(0))
    assert "is empty" in refused(checkpoint, tmp_path, *INT8, "--calibration", path)


@pytest.mark.parametrize(("channels", "shape"), [(3, "[8, 3, 8, 8]")])
def test_data_of_another_shape_are_refused(checkpoint, tmp_path, channels, shape):
    path = data(tmp_path / "shape.npz", images(8, channels))
    message = refused(checkpoint, tmp_path, *INT8, "--calibration", path)
    assert (
        "the model takes inputs of shape ['any', " in message
    )  # not torch's name for a free length
    assert "calibrate on data as the model was trained on" in message
    assert shape in message


@pytest.mark.parametrize("method", ["minmax", "percentile", "entropy"])
def test_data_of_a_single_value_are_refused(checkpoint, tmp_path, method):
    path = data(tmp_path / "blank.npz", np.zeros((100, 1, 8, 8), np.float32))
    message = refused(
        checkpoint, tmp_path, *INT8, "--calibration", path, "--calibration-method", method
    )
    assert "x_train in blank.npz" in message
    assert "nothing but the value 0 in the 100 samples" in message


def test_blank_images_are_refused_whatever_normalisation_makes_of_them(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)).eval()
    quantize_model(model)
    preprocessing = Preprocessing("image", scale=255.0, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.2))
    api.save(
        model, tmp_path / "model.pt", example=torch.zeros(2, 3, 8, 8), preprocessing=preprocessing
    )
    path = data(tmp_path / "white.npz", np.full((8, 8, 8, 3), 255, np.uint8))
    assert "nothing but the value 255" in refused(
        tmp_path / "model.pt", tmp_path, *INT8, "--calibration", path
    )


def test_one_other_value_among_many_is_enough(checkpoint, tmp_path):
    x = np.zeros((100, 1, 8, 8), np.float32)
    x[99, 0, 7, 7] = 1  # in the last batch
    dataset = Dataset.from_arrays("x", {"x_test": x, "y_test": np.zeros(100, np.int64)})
    api.convert(checkpoint, tmp_path / "out.onnx", activations="int8", calibration=dataset)


def test_data_that_hold_no_numbers_are_refused(checkpoint, tmp_path):
    x = images()
    x[3, 0, 2, 2] = np.nan
    assert "NaN" in refused(
        checkpoint, tmp_path, *INT8, "--calibration", data(tmp_path / "nan.npz", x)
    )


@pytest.mark.parametrize("method", ["minmax", "percentile", "entropy"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_an_activation_that_is_no_number_is_named(method, value):
    """onnxruntime's own calibrators skip NaN."""

    class Root(nn.Module):
        def forward(self, x):
            return torch.sqrt(x)

    graph = float_graph(Root().eval(), [torch.ones(2, 4)])
    x = np.array([[1, 4, 9, 16], [1, 1, 1, -1 if np.isnan(value) else np.inf]], np.float32)
    with pytest.raises(
        ModelError, match="activation 'output' holds NaN or infinity on the calibration data"
    ):
        calibrate_ranges(graph, ["output"], [x], method=method)


@pytest.mark.parametrize("method", ["minmax", "percentile", "entropy"])
def test_activations_that_are_always_zero_convert(method, tmp_path):
    torch.manual_seed(0)
    model = net()
    with torch.no_grad():
        model[0].bias.fill_(-100.0)  # Relu lets nothing through
    quantize_model(model)
    dataset = Dataset.from_arrays(
        "x", {"x": images(), "y": np.arange(8) % 3}, preprocessing=Preprocessing("array")
    )
    checkpoint = api.as_checkpoint(model, example=torch.zeros(2, 1, 8, 8))
    api.convert(
        checkpoint,
        tmp_path / "out.onnx",
        activations="int8",
        calibration=dataset,
        calibration_method=method,
    )
    outputs = run(open_session(tmp_path / "out.onnx"), (images(),))[0]
    with torch.no_grad():
        np.testing.assert_allclose(outputs, model(torch.from_numpy(images())).numpy(), atol=1e-2)


def test_no_batch_at_all_is_an_error():
    graph = float_graph(net(), [torch.zeros(2, 1, 8, 8)])
    with pytest.raises(DataError, match="hold no sample"):
        calibrate_ranges(graph, [graph.proto.graph.input[0].name], [])


@pytest.mark.parametrize("method", ["minmax", "percentile", "entropy"])
def test_batches_are_merged_into_the_ranges_of_the_whole(method):
    graph = float_graph(net(), [torch.zeros(2, 1, 8, 8)])
    parts = [images(4, seed=seed) * scale for seed, scale in enumerate((3, 1, 2))]
    whole = np.concatenate(parts)
    name = graph.proto.graph.input[0].name
    found = calibrate_ranges(graph, [name], parts, method=method)[name]
    if method == "minmax":
        assert found == (whole.min(), whole.max())
    else:  # from a histogram
        assert -np.abs(whole).max() * 1.1 <= found[0] < 0 < found[1] <= np.abs(whole).max() * 1.1


def test_memory_does_not_grow_with_the_data():
    """What the calibrators keep between batches is the same after one batch and after twenty."""
    import tracemalloc

    graph = float_graph(net(), [torch.zeros(2, 1, 8, 8)])
    peaks = []
    for count in (2, 40):
        tracemalloc.start()
        calibrate_ranges(
            graph,
            [graph.proto.graph.input[0].name],
            (images(256, seed=seed) for seed in range(count)),
            method="percentile",
        )
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + 256 * 64 * 4  # less than one batch more
