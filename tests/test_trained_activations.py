"""Activations that training rounds to 8 bits: at the places where the int8 file rounds them, with
the same ranges."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ecqx_onnx import Quantizer, api
from ecqx_onnx.checkpoint import load, save
from ecqx_onnx.data import Dataset
from ecqx_onnx.errors import FileError, OptionError
from ecqx_onnx.inputs.onnx_file import read_onnx
from ecqx_onnx.preprocessing import Preprocessing
from ecqx_onnx.quantization import train
from ecqx_onnx.runtime.sessions import open_session, run
from tests.test_activations import CASES, IMAGE, Net, conv

NORMED = {
    "BatchNorm and Relu": (
        Net(lambda x, a, n, b: b(F.relu(n(a(x)))), a=conv(), n=nn.BatchNorm2d(8), b=conv(8, 4)),
        IMAGE,
        {"QLinearConv": 2},
        1,
    ),
    "BatchNorm in front": (
        Net(lambda x, n, a: F.relu(a(n(x))), n=nn.BatchNorm2d(3), a=conv()),
        IMAGE,
        {"QLinearConv": 1},
        1,
    ),
    "residual block": (
        Net(
            lambda x, a, n, b, m, c: c(F.relu(m(b(F.relu(n(a(x))))) + x[:, :1]).mean((2, 3))),
            a=conv(),
            n=nn.BatchNorm2d(8),
            b=conv(8, 8),
            m=nn.BatchNorm2d(8),
            c=nn.Linear(8, 5),
        ),
        IMAGE,
        {"QLinearConv": 2, "QLinearAdd": 1, "QGemm": 1},
        1,
    ),
    "in-place operators": (
        Net(
            lambda x, a, b, c: c(
                F.relu(b(F.relu(a(x), inplace=True)).add_(x[:, :1]), inplace=True)
            ),
            a=conv(),
            b=conv(8, 8),
            c=conv(8, 4),
        ),
        IMAGE,
        {"QLinearConv": 3, "QLinearAdd": 1},
        1,
    ),
    "dropout": (
        Net(
            lambda x, a, d, b: b(d(a(x).mean((2, 3)))),
            a=conv(),
            d=nn.Dropout(0.5),
            b=nn.Linear(8, 5),
        ),
        IMAGE,
        {"QLinearConv": 1, "QGemm": 1},
        1,
    ),
    "SiLU": (
        Net(lambda x, a, b: b(F.silu(a(x))), a=conv(), b=conv(8, 4)),
        IMAGE,
        {"QLinearConv": 2, "QLinearSigmoid": 1},
        1,
    ),
}


# A Relu or Clip that is no part of a kernel works on the bytes before it in the file, and has a
# range of its own in training.
OTHER_GRID = ("clip above zero", "residual", "Relu of a value that is read elsewhere")


def trained(name):
    """A Quantizer that has seen one batch in training, and that batch."""
    model, shape, *_ = {**CASES, **NORMED}[name]
    model = copy.deepcopy(model)  # the cases are other tests', too
    torch.manual_seed(1)
    for layer in model.layers.values():
        if hasattr(layer, "reset_parameters"):
            layer.reset_parameters()
    x = torch.randn(shape)
    # 7 bits: of 8, processors without VNNI saturate sums (docs/integer-kernels.md).
    quantizer = Quantizer(
        model.train(), bits=7, entropy_weight=0.0, relevance=None, activations="int8"
    )
    model(x)
    for _ in range(2 if any(isinstance(m, nn.BatchNorm2d) for m in model.modules()) else 0):
        model(x)
    model.eval()
    return quantizer, x


@pytest.mark.parametrize("name", [*CASES, *NORMED])
def test_training_rounds_where_the_file_does(name, tmp_path):
    quantizer, x = trained(name)
    checkpoint = api.as_checkpoint(quantizer, example=x)
    api.convert(checkpoint, tmp_path / "out.onnx", activations="int8")
    with torch.no_grad():
        rounded = quantizer.model(x).numpy()
        with quantizer.activations.on(attached=False):
            plain = quantizer.model(x).numpy()
    (said,) = run(open_session(tmp_path / "out.onnx"), (x.numpy(),))
    moved = np.abs(rounded - plain).mean()
    assert moved > 0
    # The same integers but for sums within float32's rounding of a half, and averages, which
    # kernels round their own way.
    assert np.abs(said - rounded).mean() < (0.6 if name in OTHER_GRID else 0.2) * moved


def small():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 3)
    )


def arrays():
    generator = np.random.default_rng(0)
    y = np.arange(96) % 3
    x = generator.standard_normal((96, 1, 8, 8)).astype(np.float32) + y[:, None, None, None]
    return {"x_train": x[:64], "y_train": y[:64], "x_test": x[64:], "y_test": y[64:]}


def dataset():
    return Dataset.from_arrays("three", arrays(), preprocessing=Preprocessing("array"))


def test_a_checkpoint_keeps_the_ranges_and_convert_takes_them(tmp_path):
    trained = train(small(), dataset(), epochs=2, bits=4, relevance=None, activations="int8")
    x, _ = next(dataset().test.batches(32))
    api.save(trained.quantizer, tmp_path / "model.pt", example=torch.from_numpy(x))
    report = api.convert(tmp_path / "model.pt", tmp_path / "out.onnx", activations="int8")
    assert "ranges of activations: those that training ended with" in report.notes
    assert read_onnx(tmp_path / "out.onnx").metadata["activations"] == {
        "type": "uint8",
        "calibration": "trained",
    }
    with torch.no_grad():
        expected = trained.quantizer.model(torch.from_numpy(x)).numpy()
    (said,) = run(open_session(tmp_path / "out.onnx"), (x,))
    assert (said.argmax(1) == expected.argmax(1)).all()
    report = api.convert(
        tmp_path / "model.pt", tmp_path / "again.onnx", activations="int8", calibration=dataset()
    )
    assert "ranges of activations: calibrated on the data given" in report.notes


def test_ranges_that_no_training_ends_with_are_refused(tmp_path):
    quantizer = train(
        small(), dataset(), epochs=1, bits=4, relevance=None, activations="int8"
    ).quantizer
    checkpoint = api.as_checkpoint(quantizer, example=torch.zeros(2, 1, 8, 8))
    for bounds in ((0.0, math.inf), (1.0, 0.0), (math.nan, 1.0)):
        save(replace(checkpoint, ranges={"x": bounds}), tmp_path / "model.pt", force=True)
        with pytest.raises(FileError, match="the range of 'x'"):
            load(tmp_path / "model.pt")
    entry = checkpoint.graph.proto.graph.input[0].name
    rest = {name: bounds for name, bounds in checkpoint.ranges.items() if name != entry}
    with pytest.raises(
        OptionError,
        match=rf"no range for 1 of the \d activations, '{entry}' the first: .* add --calibration",
    ):
        api.convert(replace(checkpoint, ranges=rest), tmp_path / "out.onnx", activations="int8")


def test_a_weight_only_file_of_such_a_training_has_float_activations(tmp_path):
    quantizer = train(
        small(), dataset(), epochs=1, bits=4, relevance=None, activations="int8"
    ).quantizer
    checkpoint = api.as_checkpoint(quantizer, example=torch.zeros(2, 1, 8, 8))
    api.convert(checkpoint, tmp_path / "out.onnx")
    x, _ = next(dataset().test.batches(32))
    (said,) = run(open_session(tmp_path / "out.onnx"), (x,))
    with torch.no_grad(), quantizer.activations.on(attached=False):
        expected = quantizer.model(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(said, expected, atol=1e-5)
    np.testing.assert_allclose(
        checkpoint.module()(torch.from_numpy(x)).numpy(), expected, atol=1e-5
    )


def test_gradients_pass_inside_the_range_and_stop_outside():
    layer = nn.Linear(1, 1, bias=False)
    quantizer = Quantizer(layer, bits=8, entropy_weight=0.0, relevance=None, activations="int8")
    layer(torch.tensor([[-1.0], [1.0]]))
    layer.eval()
    x = torch.tensor([[0.4], [3.0], [-3.0]], requires_grad=True)
    layer(x).sum().backward()
    assert (x.grad[0] == layer.weight[0]).all()
    assert (x.grad[1:] == 0).all()
    assert quantizer.activations.bounds() == {"input of weight": (-1.0, 1.0)}


def test_ranges_are_moving_averages_of_training_batches_only():
    layer = nn.Linear(1, 1, bias=False)
    quantizer = Quantizer(layer, bits=8, relevance=None, activations="int8")
    layer(torch.tensor([[-1.0], [1.0]]))
    layer(torch.tensor([[-2.0], [3.0]]))
    expected = (0.99 * -1 + 0.01 * -2, 0.99 * 1 + 0.01 * 3)
    assert quantizer.activations.bounds()["input of weight"] == pytest.approx(expected)
    layer.eval()(torch.tensor([[-100.0]]))
    assert quantizer.activations.bounds()["input of weight"] == pytest.approx(expected)


def test_a_resumed_training_goes_on_with_its_ranges(tmp_path):
    options = {"bits": 4, "relevance": None, "activations": "int8"}
    whole = train(small(), dataset(), epochs=2, **options)
    state = tmp_path / "state"

    class StoppedError(Exception):
        pass

    def stop(at):
        if at.epoch == 2:
            raise StoppedError

    with pytest.raises(StoppedError):
        train(small(), dataset(), epochs=2, state_file=state, progress=stop, **options)
    resumed = train(small(), dataset(), epochs=2, state_file=state, resume=True, **options)
    assert resumed.quantizer.activations.bounds() == whole.quantizer.activations.bounds()


def test_a_detached_model_has_float_activations_and_no_hooks():
    model = small().eval()
    x = torch.randn(2, 1, 8, 8)
    quantizer = Quantizer(model, bits=4, relevance=None, activations="int8")
    model.train()(x)
    rounded = model.eval()(x)
    quantizer.detach()
    assert not torch.equal(model(x), rounded)
    assert not model._forward_hooks
    assert not model._forward_pre_hooks


def test_an_exception_in_the_forward_leaves_no_mode_behind():
    model = small()
    quantizer = Quantizer(model, bits=4, relevance=None, activations="int8")
    with pytest.raises(RuntimeError):
        model(torch.randn(2, 3, 8, 8))
    assert not quantizer.activations._modes
    assert torch.overrides._get_current_function_mode() is None


def test_what_cannot_be_trained_for_is_refused():
    with pytest.raises(OptionError, match="0 epochs train nothing"):
        train(small(), dataset(), epochs=0, relevance=None, activations="int8")
    with pytest.raises(OptionError, match="compiled"):
        Quantizer(torch.compile(small()), relevance=None, activations="int8")
    with pytest.raises(OptionError, match="activations 'int4' is unknown"):
        Quantizer(small(), activations="int4")
