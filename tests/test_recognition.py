"""Weights that are already on few values are kept exactly; others are refused with a reason."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ecqx_onnx.recognition.recognition import NotRecognized, recognize
from ecqx_onnx.tensors import Codebook, QuantTensor, Scale


def recognized(weight):
    tensor = recognize("w", weight)
    assert isinstance(tensor, QuantTensor), tensor
    np.testing.assert_array_equal(tensor.dequantize(), weight)
    return tensor


def test_a_uniform_grid_becomes_integers_and_one_step():
    levels = np.random.default_rng(0).integers(-7, 8, (16, 9)).astype(np.float32)
    tensor = recognized(levels * np.float32(0.0123))
    assert isinstance(tensor.meaning, Scale)
    assert tensor.meaning.step.shape == ()
    assert tensor.range == (-7, 7)


@pytest.mark.parametrize("axis", [0, 1])
def test_one_step_per_channel_is_found_along_the_output_axis_of_convs_and_transposed_convs(axis):
    rng = np.random.default_rng(1)
    levels = rng.integers(-127, 128, (64, 48, 3, 3)).astype(np.float32)
    shape = [1, 1, 1, 1]
    shape[axis] = levels.shape[axis]
    tensor = recognized(levels * rng.uniform(0.001, 0.1, shape).astype(np.float32))
    assert tensor.meaning.axis == axis


def test_all_zero_channels_and_all_zero_tensors_are_kept():
    weight = np.random.default_rng(2).integers(-3, 4, (300, 40)).astype(
        np.float32
    ) * np.random.default_rng(3).uniform(0.1, 1, (300, 1)).astype(np.float32)
    weight[7] = 0
    recognized(weight)
    assert recognized(np.zeros((4, 4), np.float32)).zeros == 1.0


def test_ternary_weights_with_two_different_centroids_become_a_codebook_whose_entry_zero_is_zero():
    a, b = np.float32(0.0613), np.float32(0.0871)
    weight = np.array([-a, 0, b], np.float32)[
        np.random.default_rng(4).integers(0, 3, (16, 16, 3, 3))
    ]
    tensor = recognized(weight)
    assert isinstance(tensor.meaning, Codebook)
    assert tensor.meaning.values.tolist() == [0.0, b, -a]
    assert set(np.unique(tensor.levels)) == {-1, 0, 1}


@given(st.integers(2, 256), st.integers(0, 2**32 - 1))
def test_any_table_of_at_most_256_values_is_kept_exactly(count, seed):
    rng = np.random.default_rng(seed)
    values = rng.normal(size=count).astype(np.float32)
    recognized(values[rng.integers(0, count, (8, 2048))])


def test_minus_zero_is_the_zero_cluster():
    weight = np.array([[0.0, -0.0, 0.5, -0.5]] * 8, np.float32)
    assert recognized(weight).zeros == 0.5


@pytest.mark.parametrize(
    ("weight", "why"),
    [
        (np.random.default_rng(5).normal(size=(64, 64)).astype(np.float32), "more than 256 values"),
        (np.array([[np.nan, 1.0]], np.float32), "NaN"),
        (np.zeros((0, 3), np.float32), "empty"),
        (np.ones(10, np.float32), "vector"),
        (np.random.default_rng(6).normal(size=(64, 1)).astype(np.float32), "next to nothing"),
    ],
)
def test_other_weights_stay_float_with_a_reason(weight, why):
    refusal = recognize("w", weight)
    assert isinstance(refusal, NotRecognized)
    assert why in refusal.reason


def test_the_smallest_change_of_one_weight_breaks_the_grid():
    weight = np.random.default_rng(7).integers(-7, 8, (600, 600)).astype(np.float32) * np.float32(
        0.01
    )
    rng = np.random.default_rng(8)
    weight += np.where(
        rng.random(weight.shape) < 0.01, rng.normal(size=weight.shape) * 1e-4, 0
    ).astype(np.float32)
    assert isinstance(recognize("w", weight), NotRecognized)
