"""Grids and steps: what levels there are, and where Δ comes from."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ecqx_onnx.errors import OptionError
from ecqx_onnx.quantization.levels.entropy import (
    compute_information,
    compute_size_factor,
    estimate_probabilities,
    find_largest_lambda,
)
from ecqx_onnx.quantization.levels.grid import (
    Grid,
    choose_grid,
    fit_step,
    from_channel_rows,
    to_channel_rows,
)
from tests.oracles import ecqx as oracle

torch.set_num_threads(1)  # tiny tensors: more threads only wait for each other


@pytest.mark.parametrize(
    ("bits", "lowest", "highest"),
    [(2, -1, 1), (3, -3, 3), (4, -7, 7), (5, -15, 15), (8, -127, 127)],
)
def test_symmetric_levels_are_the_papers(bits, lowest, highest):
    assert choose_grid(torch.tensor([-1.0, 2.0]), bits) == Grid(bits, lowest, highest)


def test_the_spare_level_goes_to_the_heavier_side():
    assert choose_grid(torch.tensor([-1.0, 2.0]), 3, levels="asymmetric") == Grid(3, -3, 4)
    assert choose_grid(torch.tensor([-2.0, 1.0]), 3, levels="asymmetric") == Grid(3, -4, 3)


def test_a_tensor_without_negative_weights_gets_levels_from_zero_up_and_an_all_zero_one_does_not():
    assert choose_grid(torch.tensor([0.0, 2.0]), 3) == Grid(3, 0, 7)
    assert choose_grid(torch.tensor([0.0, 2.0]), 8) == Grid(8, 0, 127)
    assert choose_grid(torch.zeros(3), 3) == Grid(3, -3, 3)


@pytest.mark.parametrize("bits", [0, 1, 9])
def test_bits_out_of_range_are_refused(bits):
    with pytest.raises(OptionError, match="2 to 8"):
        choose_grid(torch.ones(2), bits)


def test_percentile_step_is_the_999th_of_1000_magnitudes():
    weight = torch.arange(1, 1001).float() * torch.tensor([1.0, -1.0]).repeat(500)
    assert float(fit_step(weight, Grid(4, -7, 7))) == pytest.approx(999 / 7)


@pytest.mark.parametrize("bits", [2, 3])
def test_least_squares_step_is_within_a_percent_of_an_exhaustive_search(bits):
    weight = torch.randn(3000, generator=torch.Generator().manual_seed(bits))
    grid = choose_grid(weight, bits)

    def error(step):
        levels = np.clip(np.round(weight.numpy() / step), grid.lowest, grid.highest)
        return float(((weight.numpy() - levels * step) ** 2).sum())

    best = min(error(step) for step in np.linspace(0.02, 4, 2000))
    assert error(float(fit_step(weight, grid))) <= best * 1.01


def test_two_bits_by_percentile_zero_nearly_everything_and_the_fit_does_not():
    weight, grid = (
        torch.randn(20_000, generator=torch.Generator().manual_seed(0)) ** 3,
        Grid(2, -1, 1),
    )
    zeros = {
        rule: float(((weight / fit_step(weight, grid, rule=rule)).round() == 0).float().mean())
        for rule in ("percentile", "least_squares")
    }
    assert zeros["percentile"] > 0.98
    assert zeros["least_squares"] < 0.94


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("bits", [2, 4])
def test_a_step_per_channel_is_each_channels_own(axis, bits):
    weight = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(1))
    grid = Grid(bits, 1 - 2 ** (bits - 1), 2 ** (bits - 1) - 1)
    step = fit_step(weight, grid, axis=axis)
    assert step.shape == tuple(weight.shape[axis] if dim == axis else 1 for dim in range(3))
    for channel in range(weight.shape[axis]):
        alone = fit_step(weight.select(axis, channel), grid)
        assert float(step.reshape(-1)[channel]) == pytest.approx(float(alone), rel=1e-6)


@pytest.mark.parametrize(
    "weight", [torch.zeros(4, 4), torch.full((2, 2), 1e-45), torch.tensor([[0.0, 5.0], [0.0, 0.0]])]
)
@pytest.mark.parametrize("bits", [2, 4])
def test_steps_are_positive_and_finite_whatever_the_weights(weight, bits):
    for axis in (None, 0):
        step = fit_step(weight, choose_grid(weight, bits), axis=axis)
        assert bool((step > 0).all())
        assert bool(step.isfinite().all())


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.data())
def test_channel_rows_come_back_as_they_were(shape, data):
    axis = data.draw(st.sampled_from([None, *range(len(shape))]))
    tensor = torch.arange(int(np.prod(shape))).reshape(shape)
    assert torch.equal(from_channel_rows(to_channel_rows(tensor, axis), tensor.shape, axis), tensor)


@settings(deadline=None, max_examples=50)
@given(
    st.lists(st.integers(0, 50), min_size=7, max_size=7).filter(any),
    st.sampled_from([0.0, 0.5, 0.9]),
)
def test_cluster_probabilities_are_the_oracles(counts, floor):
    grid, levels = Grid(3, -3, 3), range(-3, 4)
    weights = [float(k) for k, count in zip(levels, counts, strict=True) for _ in range(count)]
    expected = oracle.probabilities(weights, [1.0] * len(weights), levels, floor)
    found = estimate_probabilities(torch.tensor(counts), grid, zero_floor=floor)
    np.testing.assert_allclose(found.numpy(), list(expected.values()), rtol=1e-12)


def test_lambda_max_is_the_oracles():
    weights = torch.randn(200, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    for candidate in (weights, weights.abs(), -weights.abs(), weights * 0.01):
        grid = Grid(3, -3, 3)
        info = oracle.information(
            oracle.probabilities(candidate.tolist(), [0.5] * 200, range(-3, 4))
        )
        expected = oracle.lambda_max(candidate.tolist(), 0.5, range(-3, 4), info)
        information = torch.tensor(list(info.values()), dtype=torch.float64)
        found = find_largest_lambda(
            candidate[None], torch.tensor([[0.5]], dtype=torch.float64), grid, information
        )
        assert float(found) == pytest.approx(expected, rel=1e-12)


def test_information_is_minus_log2_and_small_tensors_are_spared():
    assert compute_information(torch.tensor([0.5, 0.25, 0.125])).tolist() == [1, 2, 3]
    assert compute_size_factor(10, 10) == 1
    assert compute_size_factor(0, 10) == pytest.approx(0.05 / 1.05)
