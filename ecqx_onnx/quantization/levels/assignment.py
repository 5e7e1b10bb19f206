"""Assignment of levels by ECQ and ECQx: each weight gets the level of least cost.

    ECQ    k*(w) = argmin_k (w - kΔ)^2 + c_k,   c_k = λ I_k      [ECQx, sec. 4; Thesis 4.4]
    ECQx   the cost of k = 0 is multiplied by f(R) = ρ R^β       [ECQx, sec. 4]

Δ is the step, R a weight's relevance, I_k = -log2 P_k the information content of level k, and
λ = γ·δ·λ_max what a bit costs: γ is the user's choice, δ spares small tensors, and at λ_max the
outermost weight of a side becomes zero (entropy.py). With k the best level other than zero, and
since log R < 0,

    zero wins  <=>  ρ R^β · (w^2 + c_0) <= (w - kΔ)^2 + c_k
               <=>  β >= log(((w - kΔ)^2 + c_k) / (ρ (w^2 + c_0))) / log R

The right side is a weight's critical exponent. One pass over the weights finds all of them; the
zeros at any β are the critical exponents up to β. So choosing the one β of the tensor, for a share
of zeros inside the band (options/quantizer.Band), takes some more passes that only compare and
count, BISECTIONS + 2 at most. Everything runs in blocks that fit a core's cache; only levels and
critical exponents are kept for all weights.

[ECQx]: Becking et al. 2022, arXiv 2109.04236. [Thesis]: Becking's master thesis of 2020, on ECQ.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ecqx_onnx.options.quantizer import Band
from ecqx_onnx.quantization.levels.entropy import (
    compute_information,
    estimate_probabilities,
    find_largest_lambda,
)
from ecqx_onnx.quantization.levels.envelope import Envelope, split_into_blocks
from ecqx_onnx.quantization.levels.grid import Grid, from_channel_rows, to_channel_rows

TINY = 1e-30  # keeps quotients and logarithms finite in float32
# R = 0 counts as this. R = 0 itself would give the same critical exponent, 0, to all such weights;
# with 1e-12 they become zero one after the other, those first for which zero is cheapest.
LEAST_RELEVANCE = 1e-12
MOST_MEAN_RELEVANCE = 1 - 1e-6  # a mean of 1 counts as this: its logarithm, a divisor, is not zero
BISECTIONS = 24
EDGE = 1e-3  # share of weights: how near to the band's edge the bisection stops


@dataclass(frozen=True, eq=False)
class Assignment:
    """The level of each weight and how it came about.

    Attributes:
        levels: int8, the weight's shape.
        zeros: share of zeros, in [0, 1].
        ecq_zeros: the share that plain ECQ gives.
        beta: the exponent used; None without relevances.
        in_band: False when no β in [0, 1] gives a share of zeros inside the band: its end is out of
            reach, or the share jumps over the band, many weights having the same critical exponent.
            β is then the end of [0, 1] on the band's side, or where the jump is.
    """

    levels: Tensor
    zeros: float
    ecq_zeros: float
    beta: float | None = None
    in_band: bool = True


def assign(
    weight: Tensor,
    step: Tensor,
    grid: Grid,
    *,
    axis: int | None = None,
    strength: float = 0.0,
    price: float | None = None,
    relevance: Tensor | None = None,
    band: Band = Band(),
    rho: float = 2.0,
    zero_floor: float = 0.5,
) -> Assignment:
    """Run one pass of ECQ or, with relevances, ECQx over one tensor.

    Args:
        weight: float32 or float64, any shape: the background weights W.
        step: float32, () or keepdims-shaped along axis: Δ.
        grid: the levels to choose from.
        axis: the axis of the output channels, if each has its own Δ; None for one Δ.
        strength: γ·δ: λ is this share of λ_max. Exactly one of strength and price counts: price,
            if it is given.
        price: λ itself, as an absolute number; None for a share of λ_max.
        relevance: R in [0, 1], the weight's shape and dtype; None for plain ECQ.
        band: how far relevances may move the share of zeros.
        rho: ρ of f(R) = ρ R^β, above 1.
        zero_floor: P_0 is at least this, in [0, 1].

    Returns:
        The levels and how they came about.
    """
    # 1. c_k = λ I_k, from how often each level is the nearest.
    rows, step_rows = to_channel_rows(weight, axis).contiguous(), step.double().reshape(-1, 1)
    levels = grid.levels(weight)
    information = compute_information(
        estimate_probabilities(_count_nearest(rows, step_rows, grid), grid, zero_floor=zero_floor)
    )
    if price is None:
        costs = strength * find_largest_lambda(rows, step_rows, grid, information) * information
    else:
        costs = price * information
    chosen = torch.empty(rows.shape, dtype=torch.int8, device=rows.device)
    # 2. Without relevances the cheapest level wins.
    if relevance is None:
        envelope = Envelope(step_rows, levels, costs, rows.dtype)
        level_at = levels.to(rows.dtype)[envelope.winners]  # winners are indices into levels
        for block in split_into_blocks(rows):
            chosen[block] = level_at.index_select(
                0, envelope.places(rows[block], block[0])
            ).view_as(rows[block])
        share = 1 - int(torch.count_nonzero(chosen)) / max(1, chosen.numel())
        return Assignment(from_channel_rows(chosen, weight.shape, axis), share, share)

    # 3. With them: the exponent at which each weight becomes zero, then the one β for all.
    R = to_channel_rows(relevance, axis)
    others = levels != 0
    zero_cost = costs[-grid.lowest]  # levels begin at grid.lowest: this is the index of level 0
    exponent = torch.empty_like(rows)
    ecq_zero_count = find_critical_exponents(
        rows, R, step_rows, levels[others], costs[others], zero_cost, rho, exponent, chosen
    )
    beta, in_band, zero_count = _choose_exponent(
        exponent, _find_neutral_exponent(R, rho), ecq_zero_count, band
    )
    for block in split_into_blocks(rows):
        chosen[block].mul_(exponent[block] > beta)
    size = max(1, chosen.numel())
    return Assignment(
        from_channel_rows(chosen, weight.shape, axis),
        zeros=zero_count / size,
        ecq_zeros=ecq_zero_count / size,
        beta=beta,
        in_band=in_band,
    )


def _count_nearest(rows: Tensor, step: Tensor, grid: Grid) -> Tensor:
    """For how many weights each level is the nearest: int64 [levels]."""
    counts, step = torch.zeros(256, dtype=torch.int64, device=rows.device), step.to(rows.dtype)
    for block in split_into_blocks(rows):
        nearest = (
            (rows[block] / step[block[0]]).round_().clamp_(grid.lowest, grid.highest).to(torch.int8)
        )
        counts += torch.bincount(nearest.view(-1).view(torch.uint8), minlength=256)
    # int8 seen as uint8: byte 256 + k holds level k < 0. Rolled, the counts begin at grid.lowest.
    return counts.roll(-grid.lowest)[: grid.highest - grid.lowest + 1]


def find_critical_exponents(
    rows: Tensor,
    R: Tensor,
    step: Tensor,
    levels: Tensor,
    cost: Tensor,
    zero_cost: Tensor,
    rho: float,
    exponent: Tensor,
    chosen: Tensor,
) -> int:
    """Find the smallest β at which each weight falls to zero.

    Args:
        rows: float32 or float64 [channels, rest], the weights.
        R: their relevances in [0, 1], of the same shape and dtype.
        step: float64 [channels, 1], Δ.
        levels: float64 [levels - 1], those other than zero, ascending.
        cost: float64 [levels - 1], c_k = λ I_k of each of them.
        zero_cost: float64 [], c_0 = λ I_0.
        rho: ρ of f(R) = ρ R^β.
        exponent: [channels, rest] in the weights' dtype, filled with the critical exponents.
        chosen: int8 [channels, rest], filled with the level that a weight has where β is below its
            critical exponent.

    Returns:
        How many zeros plain ECQ gives.
    """
    envelope = Envelope(step, levels, cost, rows.dtype)
    step = step.to(rows.dtype)
    zero_cost = zero_cost.to(rows.dtype)
    # winners are indices into levels, one for each place that a weight can lie at.
    level_at = levels.to(rows.dtype)[envelope.winners]
    cost_at = cost.to(rows.dtype)[envelope.winners]
    ecq_zeros = 0
    for block in split_into_blocks(rows):
        w, place = rows[block], envelope.places(rows[block], block[0])
        level = level_at.index_select(0, place).view_as(w)
        chosen[block] = level
        # In place, so that a block needs no more memory: (kΔ - w)^2 + c_k is made where `level`
        # was, of which `chosen` has a copy by now, and the logarithm where that cost was.
        cost_of_other = (
            level.mul_(step[block[0]])
            .sub_(w)
            .square_()
            .add_(cost_at.index_select(0, place).view_as(w))
        )
        cost_of_zero = w.square().add_(zero_cost)
        ecq_zeros += _count_up_to(cost_of_zero, cost_of_other)
        weighted = cost_of_zero.mul_(rho).clamp_(min=TINY)
        ratio = cost_of_other.div_(weighted).clamp_(min=TINY).log_()
        torch.div(
            ratio, R[block].clamp(min=LEAST_RELEVANCE).log_().clamp_(max=-TINY), out=exponent[block]
        )
    return ecq_zeros


def _find_neutral_exponent(R: Tensor, rho: float) -> float:
    """β_0 in [0, 1] of the neutral point ρ·(mean R)^β = 1.  [ECQx]"""
    mean = min(max(float(R.mean()), LEAST_RELEVANCE), MOST_MEAN_RELEVANCE)
    return min(1.0, math.log(1 / rho) / math.log(mean))


def _choose_exponent(
    exponent: Tensor, neutral: float, ecq_zeros: int, band: Band
) -> tuple[float, bool, int]:
    """(β, whether the band is met, how many zeros).

    β is the neutral β_0, moved no further than the band asks.
    """
    beta, size = neutral, exponent.numel()
    fewest = math.ceil(ecq_zeros - band.keep * size)
    most = math.floor(ecq_zeros + band.prune * size)
    zeros = _count_zeros_at(exponent, beta)
    if fewest <= zeros <= most:
        return beta, True, zeros
    # Zeros grow with β: bisect between β_0 and the end on the band's side, and take the side of
    # the edge that lies in the band.
    grows = zeros < fewest
    outside, inside = beta, 1.0 if grows else 0.0
    zeros = _count_zeros_at(exponent, inside)
    if zeros < fewest if grows else zeros > most:
        return inside, False, zeros
    for _ in range(BISECTIONS):
        beyond = zeros - fewest if grows else most - zeros  # of the edge that β_0 is outside of
        if fewest <= zeros <= most and beyond <= size * EDGE:
            break
        middle = (outside + inside) / 2
        zeros_there = _count_zeros_at(exponent, middle)
        if zeros_there >= fewest if grows else zeros_there <= most:
            inside, zeros = middle, zeros_there
        else:
            outside = middle
    return inside, fewest <= zeros <= most, zeros


def _count_zeros_at(exponent: Tensor, beta: float) -> int:
    return sum(_count_up_to(exponent[block], beta) for block in split_into_blocks(exponent))


def _count_up_to(values: Tensor, limit: Tensor | float) -> int:
    """How many values are <= limit, for less than 2^24 of them.

    A float sum of ones is exact then, and faster than counting bools.
    """
    return int(torch.le(values, limit, out=torch.empty_like(values)).sum())
