"""Every command says how raw data reach the model and who decided it; what is probably wrong is
said, too."""

import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import ecqx_onnx
from ecqx_onnx import api
from ecqx_onnx.errors import ModelError, OptionError
from ecqx_onnx.preprocessing import Preprocessing
from ecqx_onnx.sources.loading import load_factory
from ecqx_onnx.validation.outputs.plausibility import (
    Confusion,
    InputRange,
    doubt_accuracy,
    doubt_range,
)

PAGE = Path(__file__).parents[1] / "docs/training-loop.md"


@pytest.fixture(scope="module")
def digits():
    """uint8 [1797, 8, 8], 0 to 240, and their classes."""
    from sklearn.datasets import load_digits

    found = load_digits()
    return (found.images * 15).astype(np.uint8), found.target.astype(np.int64)


@pytest.fixture
def digits_file(digits, tmp_path):
    x, y = digits
    np.savez(
        tmp_path / "data.npz", x_train=x[:1400], y_train=y[:1400], x_test=x[1400:], y_test=y[1400:]
    )
    return tmp_path / "data.npz"


def linear():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))


def trained_linear(digits, preprocessing, *, epochs=20):
    x, y = digits
    model, inputs = linear(), torch.from_numpy(preprocessing.apply(x[:1400]))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(epochs * 4):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs), torch.from_numpy(y[:1400])).backward()
        optimizer.step()
    return model


# docs/training-loop.md


def test_the_documented_training_loop_runs_as_printed(digits, digits_file, monkeypatch):
    text = PAGE.read_text(encoding="utf-8")
    printed = next(
        block
        for block in re.findall(r"```python\n(.*?)```", text, re.S)
        if "quantizer.step" in block
    )
    monkeypatch.chdir(digits_file.parent)
    x, y = digits
    normalized = (torch.from_numpy(x[:1400, None]).float() / 255 - 0.13) / 0.31
    given = torch.utils.data.TensorDataset(normalized, torch.from_numpy(y[:1400]))
    model = linear()
    names = {
        "model": model,
        "loader": torch.utils.data.DataLoader(given, batch_size=20, shuffle=True),
        "optimizer": torch.optim.Adam(model.parameters(), lr=0.003),
        "loss_function": nn.functional.cross_entropy,
    }
    exec(printed, names)
    report = names["report"]
    assert report.ok, report.failures
    assert report.onnx_accuracy.share > 0.75
    assert any(
        "values / 255, minus 0.13, divided by 0.31 (recorded in out.onnx)" in note
        for note in report.notes
    )


def test_a_loop_that_saves_no_preprocessing_is_validated_as_the_datas_type_asks_and_told(
    digits, digits_file
):
    folder = digits_file.parent
    model = trained_linear(digits, Preprocessing("image", scale=255.0))
    quantizer = ecqx_onnx.Quantizer(model, bits=5, relevance=None)
    checkpoint = ecqx_onnx.save(quantizer, folder / "model.pt", example=torch.zeros(2, 1, 8, 8))
    assert not checkpoint.preprocessing_known
    assert not ecqx_onnx.load(folder / "model.pt").preprocessing_known
    written = ecqx_onnx.convert(folder / "model.pt", folder / "out.onnx")
    assert any("records no preprocessing" in note for note in written.notes)
    report = ecqx_onnx.validate(
        folder / "out.onnx", against=folder / "model.pt", data=str(digits_file), latency_runs=0
    )
    assert report.onnx_accuracy.share > 0.7
    assert any("values / 255" in note and "out.onnx records none" in note for note in report.notes)


def test_raw_pixels_into_a_model_that_saw_smaller_ones_are_told_with_the_reason(digits, tmp_path):
    x, y = digits
    preprocessing = Preprocessing("array", mean=(100.0,), std=(0.01,))
    model = trained_linear(digits, Preprocessing("image", scale=255.0), epochs=1)
    ecqx_onnx.save(
        ecqx_onnx.Quantizer(model, bits=4, relevance=None),
        tmp_path / "model.pt",
        example=torch.zeros(2, 8, 8),
        preprocessing=preprocessing,
    )
    ecqx_onnx.convert(tmp_path / "model.pt", tmp_path / "out.onnx")
    np.savez(tmp_path / "raw.npz", x=x.astype(np.float32), y=np.roll(y, 3))
    report = ecqx_onnx.validate(
        tmp_path / "out.onnx",
        against=tmp_path / "model.pt",
        data=str(tmp_path / "raw.npz"),
        latency_runs=0,
    )
    assert any("no better than guessing" in note and "scale=255.0" in note for note in report.notes)


# Plausibility


def test_permuted_labels_are_told_from_a_model_that_knows_nothing():
    labels = np.arange(200) % 4
    permuted = Confusion.count(labels, (labels + 1) % 4, 4)
    (sentence,) = doubt_accuracy(permuted, who="the float model")
    assert "what the data call 0 it calls 1" in sentence
    swapped = Confusion.count(labels, np.array([0, 1, 3, 2])[labels], 4)
    assert "what the data call 2 it calls 3" in doubt_accuracy(swapped, who="it")[0]
    guessing = Confusion.count(labels, np.zeros(200, np.int64), 4)
    (sentence,) = doubt_accuracy(guessing, who="the float model", recorded=False)
    assert "no better than guessing (25.0 %)" in sentence
    assert "no preprocessing is recorded" in sentence


def test_a_good_model_raises_no_doubt_and_a_handful_of_samples_neither():
    labels = np.arange(200) % 4
    answers = np.where(np.arange(200) % 5 == 0, (labels + 1) % 4, labels)
    assert doubt_accuracy(Confusion.count(labels, answers, 4), who="it") == ()
    assert doubt_accuracy(Confusion.count(labels[:8], 3 - labels[:8], 4), who="it") == ()
    assert doubt_accuracy(None, who="it") == ()


@pytest.mark.parametrize(
    ("inputs", "told"), [((0, 255), "cut off"), ((0, 1), None), ((0, 0.004), "few of its levels")]
)
def test_inputs_far_from_the_calibrated_range_are_told(inputs, told):
    found = doubt_range(InputRange(*inputs), (0.0, 1.0))
    assert (told is None) == (found == ())
    assert told is None or told in found[0]


def test_raw_pixels_into_integer_kernels_calibrated_on_0_to_1_are_told(digits, tmp_path):
    x, y = digits
    model = trained_linear(digits, Preprocessing("image", scale=255.0), epochs=2)
    quantizer = ecqx_onnx.Quantizer(model, bits=4, relevance=None)
    ecqx_onnx.save(quantizer, tmp_path / "model.pt", example=torch.zeros(2, 64))
    flat = {"x": x.reshape(-1, 64).astype(np.float32), "y": y}
    np.savez(tmp_path / "small.npz", x=flat["x"] / 255, y=y)
    np.savez(tmp_path / "raw.npz", **flat)
    ecqx_onnx.convert(
        tmp_path / "model.pt",
        tmp_path / "out.onnx",
        activations="int8",
        calibration=str(tmp_path / "small.npz"),
    )
    report = ecqx_onnx.validate(
        tmp_path / "out.onnx",
        against=tmp_path / "model.pt",
        data=str(tmp_path / "raw.npz"),
        latency_runs=0,
    )
    assert any("calibrated on inputs from 0 to 0.9" in note for note in report.notes)


# FILE.py


@pytest.fixture(autouse=True)
def _forget_imported_file():
    yield
    sys.modules.pop("elsewhere", None)


def written(tmp_path, text, *, other=""):
    (tmp_path / "elsewhere.py").write_text(
        other or "import torch\n\ndef network():\n    return torch.nn.Linear(3, 2)\n"
    )
    (tmp_path / "user.py").write_text(text)
    return f"{tmp_path / 'user.py'}:network"


def test_input_shape_and_preprocessing_beside_an_imported_factory_are_found(tmp_path):
    spec = written(
        tmp_path,
        "from ecqx_onnx import Preprocessing\nfrom elsewhere import network\n"
        "INPUT_SHAPE = (3,)\nPREPROCESSING = Preprocessing('array', scale=2.0)\n",
    )
    loaded = load_factory(spec)
    assert loaded.input_shape == (3,)
    assert loaded.preprocessing == Preprocessing("array", scale=2.0)


def test_those_of_the_imported_file_hold_where_the_users_own_has_none(tmp_path):
    other = "import torch\nINPUT_SHAPE = (3,)\n\ndef network():\n    return torch.nn.Linear(3, 2)\n"
    assert load_factory(
        written(tmp_path, "from elsewhere import network\n", other=other)
    ).input_shape == (3,)


@pytest.mark.parametrize(
    "line", ["INPUT_SHAPE = 3", "INPUT_SHAPE = ('a',)", "PREPROCESSING = {'scale': 255}"]
)
def test_names_that_hold_something_else_are_refused(tmp_path, line):
    with pytest.raises(ModelError, match=line.split()[0]):
        load_factory(written(tmp_path, f"from elsewhere import network\n{line}\n"))


# quantize


QUICK = {"epochs": 0, "relevance": None, "bits": 4}


def factory_file(tmp_path, extra=""):
    text = "from torch import nn\nfrom ecqx_onnx import Preprocessing\n" + extra
    text += (
        "\ndef network():\n    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), "
        "nn.Linear(32, 10))\n"
    )
    (tmp_path / "user.py").write_text(text)
    return f"{tmp_path / 'user.py'}:network"


def test_quantize_says_that_it_estimated_the_normalisation_and_that_it_starts_from_scratch(
    digits_file, tmp_path
):
    result = api.quantize(
        factory_file(tmp_path), data=str(digits_file), out=tmp_path / "m.pt", **QUICK
    )
    assert any(
        "estimated from the training samples" in note and "minus 0.2" in note
        for note in result.notes
    )
    assert any("no --weights" in note for note in result.notes)


def test_quantize_names_the_file_whose_preprocessing_it_uses(digits, digits_file, tmp_path):
    preprocessing = Preprocessing("image", scale=255.0)
    torch.save(trained_linear(digits, preprocessing).state_dict(), tmp_path / "float.pt")
    spec = factory_file(tmp_path, "PREPROCESSING = Preprocessing('image', scale=255.0)\n")
    given = {"data": str(digits_file), "weights": tmp_path / "float.pt"}
    result = api.quantize(spec, out=tmp_path / "m.pt", **given, **QUICK)
    assert any("values / 255 (PREPROCESSING of user.py)" in note for note in result.notes)
    assert not any("--weights" in note or "guessing" in note for note in result.notes)


def test_quantize_says_that_the_float_model_is_no_better_than_guessing(digits_file, tmp_path):
    torch.save(linear().state_dict(), tmp_path / "float.pt")
    given = {"data": str(digits_file), "weights": tmp_path / "float.pt"}
    result = api.quantize(factory_file(tmp_path), out=tmp_path / "m.pt", **given, **QUICK)
    assert any("the float model is right for" in note for note in result.notes)


@pytest.mark.parametrize(("given", "missing"), [("mean", "--std"), ("std", "--mean")])
def test_a_mean_without_a_standard_deviation_is_refused_and_the_reverse(
    digits_file, tmp_path, given, missing
):
    with pytest.raises(OptionError, match=missing):
        api.quantize(
            factory_file(tmp_path),
            data=str(digits_file),
            out=tmp_path / "m.pt",
            **{given: (0.5,)},
            **QUICK,
        )


def test_mean_and_std_replace_those_of_the_file_and_leave_its_scale(digits_file, tmp_path):
    spec = factory_file(
        tmp_path, "PREPROCESSING = Preprocessing('image', scale=240.0, mean=(0.1,), std=(0.2,))\n"
    )
    api.quantize(
        spec, data=str(digits_file), out=tmp_path / "m.pt", mean=(0.5,), std=(0.25,), **QUICK
    )
    expected = Preprocessing("image", scale=240.0, mean=(0.5,), std=(0.25,))
    assert ecqx_onnx.load(tmp_path / "m.pt").preprocessing == expected
