"""Channels that are small beside the others: made large in front of a depthwise convolution, for
nothing."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from ecqx_onnx_converters.passes.batchnorm import fold_batchnorms
from ecqx_onnx_converters.passes.equalization import equalize, find_places
from ecqx_onnx_converters.passes.work import Work
from torch import nn

from ecqx_onnx import api
from ecqx_onnx.checkpoint import float_model
from ecqx_onnx.data import Dataset
from ecqx_onnx.preprocessing import Preprocessing
from ecqx_onnx.runtime.calibration import measure_channel_peaks
from ecqx_onnx.runtime.sessions import open_session, run


class Separable(nn.Module):
    """A 1x1 convolution whose channels differ by up to 2^9 in size, and a depthwise one that takes
    the difference out again."""

    def __init__(self, between=F.relu, multiplier=1) -> None:
        super().__init__()
        self.between = between
        self.point = nn.Conv2d(3, 8, 1)
        self.norm = nn.BatchNorm2d(8)
        self.depth = nn.Conv2d(8, 8 * multiplier, 3, groups=8, bias=multiplier == 1)
        self.behind = nn.BatchNorm2d(8 * multiplier, eps=1e-12)
        with torch.no_grad():
            self.norm.weight *= 2.0 ** -torch.arange(8)
            self.norm.bias.copy_(0.3 * self.norm.weight)

    def forward(self, x):
        return self.behind(self.depth(self.between(self.norm(self.point(x)))))


def prepared(**options):
    torch.manual_seed(0)
    model, x = Separable(**options), torch.randn(32, 3, 8, 8)
    with torch.no_grad():
        for _ in range(200):  # until the statistics are those of the data
            model.train()(x)
    data = Dataset.from_arrays(
        "x", {"x": x.numpy(), "y": np.arange(32) % 3}, preprocessing=Preprocessing("array")
    )
    # 7 bits: of 8, processors without VNNI saturate sums (docs/integer-kernels.md).
    return api.as_checkpoint(model.eval(), example=x, bits=7), x, data


def noise(path, checkpoint, x):
    """Root mean square, of each output channel's own size."""
    with torch.no_grad():
        expected = checkpoint.module()(x).numpy()
    (said,) = run(open_session(path), (x.numpy(),))
    return np.sqrt(np.square(said - expected).mean((0, 2, 3)) / np.square(expected).mean((0, 2, 3)))


@pytest.mark.parametrize("multiplier", [1, 2])
def test_a_small_channel_keeps_its_precision(multiplier, tmp_path):
    checkpoint, x, data = prepared(multiplier=multiplier)
    api.convert(checkpoint, tmp_path / "out.onnx", activations="int8", calibration=data)
    # Without factors the last channel has two of the 256 values, and is off by more than half of
    # its size.
    assert noise(tmp_path / "out.onnx", checkpoint, x).max() < 0.05


def test_the_network_is_the_same_bit_for_bit():
    checkpoint, x, _ = prepared()
    work = fold_batchnorms(Work(checkpoint.graph, checkpoint.matching))
    places = find_places(work)
    peaks = measure_channel_peaks(
        float_model.restore_float_weights(work), [place.value for place in places], [x.numpy()]
    )
    changed = equalize(work, places, peaks)
    assert len(places) == 1
    for before, after in zip(work.matching.found, changed.matching.found, strict=True):
        np.testing.assert_array_equal(before.tensor.levels, after.tensor.levels)
        ratio = after.tensor.meaning.step / before.tensor.meaning.step
        assert ratio.max() >= 64 or ratio.min() <= 1 / 64
        np.testing.assert_array_equal(np.frexp(ratio)[0], 0.5)  # powers of two
    outputs = []
    for each in (work, changed):
        model = float_model.restore_float_weights(each).to_model()
        outputs += run(open_session(model.SerializeToString()), (x.numpy(),))[:1]
    np.testing.assert_array_equal(*outputs)


def test_validation_finds_pytorchs_integers(tmp_path):
    checkpoint, _, data = prepared()
    api.convert(checkpoint, tmp_path / "out.onnx", activations="int8", calibration=data)
    report = api.validate(tmp_path / "out.onnx", against=checkpoint, latency_runs=0)
    assert {check.name: check for check in report.checks}["weights"].passed


@pytest.mark.parametrize(
    "between", [F.relu6, lambda x: F.relu(x) + x, lambda x: F.max_pool2d(F.relu(x), 2)]
)
def test_nothing_is_equalised_across_other_operators(between):
    checkpoint, _, _ = prepared(between=between)
    work = fold_batchnorms(Work(checkpoint.graph, checkpoint.matching))
    assert find_places(work) == ()
