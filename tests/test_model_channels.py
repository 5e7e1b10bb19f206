"""Images and gray arrays come in the channels that the model takes, whatever the first file has."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import ecqx_onnx
from ecqx_onnx import api
from ecqx_onnx.data import Dataset, load_dataset
from ecqx_onnx.preprocessing import Preprocessing

QUICK = {"epochs": 0, "relevance": None, "bits": 4}


def mixed_folder(root):
    """Gray and RGB files of one size, two classes."""
    for number in range(12):
        folder = root / ("dark" if number % 2 else "light")
        folder.mkdir(parents=True, exist_ok=True)
        shape = (6, 6) if number % 3 else (6, 6, 3)
        Image.fromarray(np.full(shape, 20 * number, np.uint8)).save(folder / f"{number}.png")
    return str(root)


def test_a_folder_with_any_color_is_read_in_color_whatever_its_first_file_is(tmp_path):
    dataset = load_dataset(mixed_folder(tmp_path))
    assert dataset.test.source.sample_shape == (6, 6, 3)
    assert dataset.training.source.sample_shape == (6, 6, 3)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_folder_is_read_in_the_channels_of_the_model(tmp_path, channels):
    (tmp_path / "user.py").write_text(
        "from torch import nn\n\ndef network():\n"
        f"    return nn.Sequential(nn.Conv2d({channels}, 4, 3), nn.ReLU(), nn.Flatten(), "
        "nn.Linear(64, 2))\n"
    )
    data = mixed_folder(tmp_path / "data")
    api.quantize(f"{tmp_path / 'user.py'}:network", data=data, out=tmp_path / "m.pt", **QUICK)
    ecqx_onnx.convert(tmp_path / "m.pt", tmp_path / "m.onnx")
    report = ecqx_onnx.validate(
        tmp_path / "m.onnx", against=tmp_path / "m.pt", data=data, latency_runs=0
    )
    assert report.ok, report.failures
    deployed = ecqx_onnx.deploy(tmp_path / "m.onnx", tmp_path / "linux", to="linux", data=data)
    assert deployed.cases > 0


def test_a_foreign_file_without_preprocessing_gets_its_own_channels(tmp_path):
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 2))
    ecqx_onnx.save(
        ecqx_onnx.Quantizer(model, bits=4, relevance=None),
        tmp_path / "m.pt",
        example=torch.zeros(2, 1, 6, 6),
    )
    ecqx_onnx.convert(
        tmp_path / "m.pt",
        tmp_path / "m.onnx",
        activations="int8",
        calibration=mixed_folder(tmp_path / "data"),
    )
    report = ecqx_onnx.validate(
        tmp_path / "m.onnx", against=tmp_path / "m.pt", data=str(tmp_path / "data"), latency_runs=0
    )
    assert report.ok, report.failures


def gray_arrays(dtype):
    x = np.random.default_rng(0).integers(0, 256, (40, 6, 6)).astype(np.uint8)
    x = x if dtype == np.uint8 else (x / 255).astype(dtype)
    return {"x": x, "y": np.arange(40) % 2}


@pytest.mark.parametrize("dtype", [np.uint8, np.float32, np.float64])
def test_gray_floats_without_channels_are_trained_on_like_gray_bytes(tmp_path, dtype):
    np.savez(tmp_path / "data.npz", **gray_arrays(dtype))
    (tmp_path / "user.py").write_text(
        "from torch import nn\n\ndef network():\n"
        "    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 2))\n"
    )
    api.quantize(
        f"{tmp_path / 'user.py'}:network",
        data=str(tmp_path / "data.npz"),
        out=tmp_path / "m.pt",
        **QUICK,
    )
    ecqx_onnx.convert(tmp_path / "m.pt", tmp_path / "m.onnx")
    report = ecqx_onnx.validate(
        tmp_path / "m.onnx",
        against=tmp_path / "m.pt",
        data=str(tmp_path / "data.npz"),
        latency_runs=0,
    )
    assert report.ok, report.failures


def test_sequences_of_features_stay_as_they_are_for_a_model_that_takes_them():
    dataset = Dataset.from_arrays("a test", gray_arrays(np.float32))
    assert dataset.fitted((6, 6)) is not None
    assert dataset.fitted((6, 6)).test.source.sample_shape == (6, 6)
    assert dataset.fitted((1, 6, 6)).test.source.sample_shape == (1, 6, 6)


def test_bytes_without_channels_reach_a_model_of_sequences_without_them():
    dataset = Dataset.from_arrays("a test", gray_arrays(np.uint8)).fitted((6, 6))
    x, _ = next(dataset.test.batches(2))
    assert x.shape == (2, 6, 6)
    assert x.max() <= 1


def test_a_preprocessing_that_a_file_records_sets_the_size_of_images(tmp_path):
    given = load_dataset(mixed_folder(tmp_path))
    sized = given.with_preprocessing(Preprocessing("image", scale=255.0, image_shape=(4, 5, 3)))
    x, _ = next(sized.test.batches(2))
    assert x.shape[1:] == (3, 4, 5)
