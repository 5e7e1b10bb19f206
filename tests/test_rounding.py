"""Rounding without training: errors cancel over each window and each output; outputs move less than
with the nearest levels."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from ecqx_onnx import api
from ecqx_onnx.quantization.levels.grid import Grid, choose_grid, fit_step
from ecqx_onnx.quantization.levels.rounding import round_to_cancel


def errors(weight, step, grid):
    """In steps."""
    return round_to_cancel(weight, step, grid).double() - weight.double() / step.double()


@given(
    st.integers(0, 2**16),
    st.integers(2, 8),
    st.sampled_from([(6, 5, 3, 3), (6, 1, 3, 3), (6, 30), (4, 7, 5)]),
    st.booleans(),
)
def test_errors_add_up_to_half_a_step_at_most(seed, bits, shape, per_channel):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).clamp(-2, 2)
    grid = choose_grid(weight, bits)
    step = fit_step(weight, grid, axis=0 if per_channel else None).clamp(
        min=2.5 / grid.highest
    )  # the ends are out of the way
    error = errors(weight, step, grid)
    assert error.abs().max() <= 1.5
    assert error.flatten(1).sum(1).abs().max() <= 0.5 + 1e-9


def test_each_window_is_balanced_before_the_whole_output():
    weight = torch.full((1, 2, 1, 10), 0.3)  # nearest: all 0, and six steps too few
    levels = round_to_cancel(weight, torch.ones(()), Grid(4, -7, 7))
    assert levels.sum((2, 3)).tolist() == [[3, 3]]


def test_the_second_nearest_level_goes_to_those_that_lose_least():
    levels = round_to_cancel(torch.tensor([[0.1, 0.45, 0.2, 0.3]]), torch.ones(()), Grid(4, -7, 7))
    assert levels.tolist() == [[0, 1, 0, 0]]


def test_levels_stay_on_the_grid():
    levels = round_to_cancel(torch.tensor([[0.4, 0.4, 0.4, 5.0]]), torch.ones(()), Grid(2, -1, 1))
    assert levels.min() >= -1
    assert levels.max() <= 1


def test_a_constant_image_says_nearly_what_it_said():
    """Oracle: inputs that are equal everywhere see nothing of a weight but its window's sum."""
    torch.manual_seed(0)
    conv = nn.Conv2d(8, 4, 3, bias=False).requires_grad_(False)
    x = torch.ones(1, 8, 3, 3)
    before = conv(x)
    checkpoint = api.as_checkpoint(conv, example=x, bits=4)
    step = float(checkpoint.tensors[0].meaning.step)
    assert (checkpoint.module()(x) - before).abs().max() <= 0.51 * step


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_outputs_move_less_than_with_the_nearest_levels(bits):
    torch.manual_seed(1)
    weight = torch.randn(16, 16, 3, 3) * 0.1
    x = F.avg_pool2d(torch.rand(8, 16, 16, 16), 3)  # smooth and positive, as activations are
    grid = choose_grid(weight, bits)
    step = fit_step(weight, grid)
    nearest = (weight / step).round().clamp(grid.lowest, grid.highest) * step
    cancelling = round_to_cancel(weight, step, grid) * step
    said, wanted = (F.conv2d(x, w) - F.conv2d(x, weight) for w in (cancelling, nearest))
    assert said.square().mean() < 0.3 * wanted.square().mean()
