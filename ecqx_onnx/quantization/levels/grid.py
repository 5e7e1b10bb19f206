"""The grid of a tensor: the integer levels that it may take, and the step Δ between their values.

Level k stands for kΔ. The levels are symmetric (the paper's 2^b - 1 of them), asymmetric (2^b, the
spare one on the heavier side) or, for a tensor without negative weights, 0 .. 2^b - 1. The step is
one number per tensor or one per output channel.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ecqx_onnx.errors import OptionError
from ecqx_onnx.options.quantizer import Levels, StepRule

PERCENTILE = 0.999  # of |W| lands on the outermost level [ECQx]: outliers do not stretch the grid
FIT_CANDIDATES = (
    40  # starting points of the least-squares fit, in (0, 1] of the step that reaches max |W|
)
FIT_REFINEMENTS = 3


@dataclass(frozen=True)
class Grid:
    """The levels lowest .. highest of one tensor. lowest <= 0 < highest, both fit int8."""

    bits: int
    lowest: int
    highest: int

    def levels(self, like: Tensor) -> Tensor:
        """List the levels.

        Args:
            like: any tensor on the device wanted.

        Returns:
            float64 [highest - lowest + 1], ascending.
        """
        return torch.arange(self.lowest, self.highest + 1, dtype=torch.float64, device=like.device)


def choose_grid(weight: Tensor, bits: int, *, levels: Levels = "symmetric") -> Grid:
    """Choose the grid of a tensor by its smallest entry and, if asymmetric, by its mean.

    Args:
        weight: float, any shape.
        bits: 2 to 8.
        levels: "symmetric", or "asymmetric" for one more on the heavier side.

    Returns:
        The grid; levels from 0 where no weight is negative.

    Raises:
        OptionError: bits outside 2 to 8.
    """
    if not 2 <= bits <= 8:
        raise OptionError(
            f"{bits} bits per weight is outside what the levels can hold: "
            "choose 2 to 8 (the paper uses 2 to 5)"
        )
    if weight.numel() and bool((weight >= 0).all()) and bool((weight > 0).any()):
        return Grid(bits, 0, min(2**bits - 1, 127))  # 127: levels are stored as int8
    side = 2 ** (bits - 1) - 1
    if levels == "symmetric" or bits == 8:
        return Grid(bits, -side, side)
    heavier_side_is_positive = weight.numel() > 0 and bool(weight.double().mean() > 0)
    return Grid(bits, -side, side + 1) if heavier_side_is_positive else Grid(bits, -side - 1, side)


def to_channel_rows(tensor: Tensor, axis: int | None) -> Tensor:
    """Lay a tensor out as one row per step.

    Args:
        tensor: any shape.
        axis: of the channels; None for one row in all.

    Returns:
        [channels, rest], a view where the layout allows.
    """
    if axis is None:
        return tensor.reshape(1, -1)
    return tensor.movedim(axis, 0).reshape(tensor.shape[axis], -1)


def from_channel_rows(rows: Tensor, shape: torch.Size, axis: int | None) -> Tensor:
    """Undo `to_channel_rows`.

    Args:
        rows: [channels, rest].
        shape: of the tensor that they came from.
        axis: as given there.

    Returns:
        A tensor of this shape.
    """
    if axis is None:
        return rows.reshape(shape)
    moved = (shape[axis], *shape[:axis], *shape[axis + 1 :])
    return rows.reshape(moved).movedim(0, axis)


def fit_step(
    weight: Tensor, grid: Grid, *, axis: int | None = None, rule: StepRule = "auto"
) -> Tensor:
    """Fit Δ to a tensor.

    percentile: 99.9th percentile of |W| / highest level [ECQx]. At 2 bit that puts Δ near max |W|
    and nearly every weight at zero, so `auto` takes it from 4 bit upwards and least_squares, the Δ
    of smallest Σ(W - kΔ)^2, below. A row without any non-zero weight gets step 1: all its levels
    are zero and the step must be positive.

    Args:
        weight: float, any shape.
        grid: its levels.
        axis: of the channels that get a step each; None for one step.
        rule: how to fit.

    Returns:
        float32, shape () for axis None, else keepdims-shaped with one step per index of that axis.
    """
    rows = to_channel_rows(weight.detach(), axis).float()
    if rule == "percentile" or (rule == "auto" and grid.bits >= 4):
        step = _fit_percentile_step(rows, grid)
    else:
        step = _fit_least_squares_step(rows, grid)
    step = torch.where(step > 0, step, torch.ones_like(step)).clamp(
        min=torch.finfo(torch.float32).tiny
    )
    if axis is None:
        return step.reshape(())
    return step.reshape([-1 if dim == axis % weight.ndim else 1 for dim in range(weight.ndim)])


def _fit_percentile_step(rows: Tensor, grid: Grid) -> Tensor:
    magnitude = rows.abs()
    rank = math.ceil(
        PERCENTILE * rows.shape[1]
    )  # nearest rank; kthvalue has no size limit, torch.quantile has
    reach = magnitude.kthvalue(rank, dim=1).values
    return torch.where(reach > 0, reach, magnitude.amax(dim=1)) / max(grid.highest, -grid.lowest)


def _fit_least_squares_step(rows: Tensor, grid: Grid) -> Tensor:
    # Σ(W - kΔ)^2 has many local minima in Δ: start from each of a row of steps, then let k and Δ
    # follow each other.
    reach = rows.abs().amax(dim=1, keepdim=True) / max(grid.highest, -grid.lowest)
    best_step, best_error = reach, torch.full_like(reach, torch.inf)
    for candidate in range(1, FIT_CANDIDATES + 1):
        step = reach * (candidate / FIT_CANDIDATES)
        step, error = _refine_step(rows, step, grid)
        better = error < best_error
        best_step = torch.where(better, step, best_step)
        best_error = torch.where(better, error, best_error)
    return best_step.reshape(-1)


def _refine_step(rows: Tensor, step: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    tiny = torch.finfo(torch.float32).tiny
    for _ in range(FIT_REFINEMENTS):
        k = (rows / step.clamp(min=tiny)).round().clamp(grid.lowest, grid.highest)
        # for fixed levels the best step is Δ = <W, k> / <k, k>
        fitted = (rows * k).sum(1, keepdim=True) / (k * k).sum(1, keepdim=True).clamp(min=1)
        step = torch.where(fitted > 0, fitted, step)
    k = (rows / step.clamp(min=tiny)).round().clamp(grid.lowest, grid.highest)
    return step, (rows - k * step).square().sum(1, keepdim=True)
