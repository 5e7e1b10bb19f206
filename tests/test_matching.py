"""Where a QuantTensor sits in the graph: by name, by value, by rows, and up to a BatchNorm
factor."""

from __future__ import annotations

import numpy as np
import pytest
from ecqx_onnx_converters.matching.matching import BATCHNORM_ROUNDING, GraphWeight, match
from hypothesis import given
from hypothesis import strategies as st

from ecqx_onnx.tensors import Codebook, QuantTensor, Scale

RNG = np.random.default_rng(5)


def tensor(
    name: str, shape: tuple[int, ...], *, step: float | np.ndarray = 0.1, seed: int = 0
) -> QuantTensor:
    levels = np.random.default_rng(seed).integers(-7, 8, shape).astype(np.int8)
    return QuantTensor(name, levels, Scale(np.asarray(step, np.float32)))


def only(weights: dict[str, np.ndarray], *tensors: QuantTensor) -> GraphWeight:
    """The one weight that is found; it has the graph's values bit for bit, or to
    BATCHNORM_ROUNDING."""
    matching = match(weights, tensors)
    assert not matching.missing
    (weight,) = matching.found
    values = weights[weight.name]
    allowed = BATCHNORM_ROUNDING * np.abs(values) if weight.rescaled else 0
    assert (np.abs(weight.dequantize() - values) <= allowed).all()
    return weight


def test_a_kept_name_is_found_as_a_view_of_the_parameter():
    quantized = tensor("fc.weight", (4, 6))
    weight = only({"fc.weight": quantized.dequantize()}, quantized)
    assert np.shares_memory(weight.tensor.levels, quantized.levels)
    assert weight.sources == ("fc.weight",)


def test_a_lost_name_is_found_by_value_as_a_transposed_view():
    quantized = tensor("fc.weight", (4, 6), step=np.linspace(0.1, 0.2, 4).reshape(4, 1))
    weight = only({"val_3": quantized.dequantize().T}, quantized)
    assert np.shares_memory(weight.tensor.levels, quantized.levels)
    assert weight.tensor.meaning.step.shape == (1, 4)


def test_a_square_transposed_weight_under_its_own_name_is_found():
    quantized = tensor("fc.weight", (5, 5))
    weight = only({"fc.weight": quantized.dequantize().T.copy()}, quantized)
    np.testing.assert_array_equal(weight.tensor.levels, quantized.levels.T)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("per_channel", [False, True])
def test_a_factor_per_channel_goes_into_the_step(axis, per_channel):
    step = (
        RNG.uniform(0.05, 0.2, (6, 1, 1, 1)).astype(np.float32)
        if per_channel and axis == 0
        else np.float32(0.1)
    )
    quantized = tensor("conv.weight", (6, 5, 3, 3), step=step)
    shape = [1, 1, 1, 1]
    shape[axis] = quantized.shape[axis]
    factor = RNG.uniform(0.3, 3, shape).astype(np.float32)
    weight = only({"conv.weight": quantized.dequantize() * factor}, quantized)
    assert weight.rescaled
    assert weight.tensor.meaning.axis == axis
    np.testing.assert_array_equal(weight.tensor.levels, quantized.levels)


def test_a_factor_per_group_and_channel_of_a_transposed_conv_is_found():
    quantized = tensor("up.weight", (6, 4, 3, 3))
    factor = RNG.uniform(0.3, 3, (2, 1, 4, 1, 1)).astype(np.float32)
    values = (quantized.dequantize().reshape(2, 3, 4, 3, 3) * factor).reshape(6, 4, 3, 3)
    weight = only({"up.weight": values}, quantized)
    np.testing.assert_array_equal(weight.tensor.levels, quantized.levels)


def test_a_negative_factor_turns_the_levels_signs_and_keeps_the_step_positive():
    quantized = tensor("conv.weight", (3, 4, 2))
    factor = np.array([1.5, -2.0, 0.7], np.float32).reshape(3, 1, 1)
    weight = only({"conv.weight": quantized.dequantize() * factor}, quantized)
    np.testing.assert_array_equal(weight.tensor.levels[1], -quantized.levels[1])
    assert (weight.tensor.meaning.step > 0).all()


def test_a_factor_of_zero_makes_the_channels_levels_zero():
    quantized = tensor("conv.weight", (3, 4, 2))
    factor = np.array([1.5, 0.0, 0.7], np.float32).reshape(3, 1, 1)
    weight = only({"conv.weight": quantized.dequantize() * factor}, quantized)
    assert not weight.tensor.levels[1].any()
    assert (weight.tensor.meaning.step > 0).all()


def test_a_channel_of_zeros_keeps_any_step():
    quantized = tensor("conv.weight", (3, 4, 2))
    quantized.levels[1] = 0
    factor = np.array([1.5, 3.0, 0.7], np.float32).reshape(3, 1, 1)
    weight = only({"conv.weight": quantized.dequantize() * factor}, quantized)
    assert np.isfinite(weight.tensor.meaning.step).all()


def test_a_codebook_times_a_factor_keeps_codebook_and_factor():
    levels = RNG.integers(-1, 2, (6, 5, 3, 3)).astype(np.int8)
    quantized = QuantTensor("conv.weight", levels, Codebook(np.array([0, 0.3, -0.2], np.float32)))
    factor = RNG.uniform(-2, 2, (6, 1, 1, 1)).astype(np.float32)
    weight = only({"conv.weight": quantized.dequantize() * factor}, quantized)
    assert weight.factor.shape == (6, 1, 1, 1)
    np.testing.assert_array_equal(weight.tensor.levels, levels)


def test_values_slightly_off_the_grid_are_not_taken_for_rounding():
    quantized = tensor("conv.weight", (3, 4, 2))
    values = quantized.dequantize() * np.float32(1.3)
    values[0, 0, 0] *= np.float32(1 + 8 * BATCHNORM_ROUNDING)
    matching = match({"conv.weight": values}, [quantized])
    assert not matching.found
    assert "other values" in matching.missing[0].reason


@given(seed=st.integers(0, 1 << 30), rows=st.integers(1, 6), length=st.integers(1, 5))
def test_stacked_and_permuted_rows_are_found_by_value(seed, rows, length):
    generator = np.random.default_rng(seed)
    forward = tensor("ih", (rows, length), step=0.25, seed=seed)
    backward = tensor("ih_reverse", (rows, length), step=0.3, seed=seed + 1)
    order = generator.permutation(rows)
    values = np.stack([forward.dequantize()[order], backward.dequantize()[order]])
    matching = match({"val_7": values}, [forward, backward])
    (weight,) = matching.found
    np.testing.assert_array_equal(weight.dequantize(), values)


def test_directions_get_one_step_each():
    forward, backward = (
        tensor("ih", (6, 4), step=0.25, seed=1),
        tensor("ih_reverse", (6, 4), step=0.3, seed=2),
    )
    matching = match(
        {"val_7": np.stack([forward.dequantize(), backward.dequantize()])}, [forward, backward]
    )
    (weight,) = matching.found
    assert weight.sources == ("ih", "ih_reverse")
    np.testing.assert_array_equal(
        weight.tensor.meaning.step, np.float32([0.25, 0.3]).reshape(2, 1, 1)
    )


@pytest.mark.parametrize(
    "step", [0.1, np.linspace(0.1, 0.3, 12).reshape(12, 1), np.linspace(0.1, 0.3, 4).reshape(1, 4)]
)
def test_thirds_of_a_projection_are_found_transposed(step):
    projection = tensor("in_proj_weight", (12, 4), step=step)
    values = projection.dequantize()
    matching = match(
        {f"val_{i}": values[4 * i : 4 * i + 4].T.copy() for i in range(3)}, [projection]
    )
    assert [weight.sources for weight in matching.found] == [("in_proj_weight",)] * 3
    for i, weight in enumerate(matching.found):
        np.testing.assert_array_equal(weight.dequantize(), values[4 * i : 4 * i + 4].T)


def test_tied_weights_are_found_in_both_places_and_the_alias_is_not_missing():
    embedding = tensor("embedding.weight", (20, 8))
    alias = QuantTensor("output.weight", embedding.levels, embedding.meaning)
    matching = match(
        {"output.weight": embedding.dequantize(), "val_0": embedding.dequantize().T},
        [embedding, alias],
    )
    assert len(matching.found) == 2
    assert not matching.missing


def test_negative_zeros_equal_positive_ones():
    quantized = tensor("fc.weight", (4, 6))
    quantized.levels[0] = 0
    values = quantized.dequantize()
    values[0] = -0.0
    assert only({"val_1": values[::-1].copy()}, quantized).sources == ("fc.weight",)


def test_a_float_weight_and_an_absent_tensor_are_left_alone():
    quantized = tensor("fc.weight", (4, 6))
    matching = match({"other": RNG.normal(size=(4, 6)).astype(np.float32)}, [quantized])
    assert not matching.found
    assert [missing.name for missing in matching.missing] == ["fc.weight"]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite_are_not_found(bad):
    quantized = tensor("conv.weight", (3, 4, 2))
    values = quantized.dequantize()
    values[1, 1, 1] = bad
    assert not match({"conv.weight": values}, [quantized]).found


def test_many_layers_of_one_shape_are_told_apart():
    tensors = [tensor(f"layer{i}.weight", (32, 64), seed=i) for i in range(200)]
    matching = match(
        {f"val_{i}": part.dequantize().T for i, part in enumerate(reversed(tensors))}, tensors
    )
    assert [weight.sources[0] for weight in matching.found] == [
        part.name for part in reversed(tensors)
    ]
