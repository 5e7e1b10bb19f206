"""(weights, step, cost of each level, relevances) -> the level of each weight.

    ECQ    k*(w) = argmin_k (w - kΔ)^2 + λ I_k                                     [ECQx, sec. 4; Thesis 4.4]
    ECQx   the cost of k = 0 is multiplied by f(R) = ρ R^β                         [ECQx, sec. 4]

The grid is uniform, so (w - kΔ)^2 + λ I_k = w^2 + [k^2 Δ^2 + λ I_k - 2kΔ·w]: the bracket is a line in w, and the winner changes
only where two lines cross. Those at most 2^b - 1 boundaries are found once; each weight then asks between which two it lies.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ecqx_onnx.quantization.entropy import cluster_probabilities, information_content, largest_lambda
from ecqx_onnx.quantization.grid import Grid, channel_rows, from_channel_rows

TINY = 1e-30  # keeps quotients and logarithms finite in float32
BISECTIONS = 24
EDGE = 1e-3  # share of weights: how near to the band's edge the bisection stops
LEAST_RELEVANCE = 1e-12  # R = 0 counts as this, so that weights without any relevance fall in order of what falling costs


@dataclass(frozen=True)
class Band:
    """How far relevances may move the share of zeros away from plain ECQ's s: it stays in [s - keep, s + prune]."""

    keep: float = 0.1
    prune: float = 0.1


@dataclass(frozen=True, eq=False)
class Assignment:
    """The level of each weight and how it came about.

    levels: int8, the weight's shape. zeros: share of zeros. ecq_zeros: what plain ECQ gives. beta: the exponent used; None
    without relevances. in_band: False when no β in [0, 1] reaches the band and the nearest was kept.
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
    relevance: Tensor | None = None,
    band: Band = Band(),
    rho: float = 2.0,
    zero_floor: float = 0.5,
) -> Assignment:
    """One pass of ECQ or, with relevances, ECQx over one tensor.

    weight: float [...]; step: float32, () or keepdims-shaped along axis; strength: γ·δ, the share of λ_max that λ takes;
    relevance: R in [0, 1], the weight's shape and dtype.
    """
    rows, step_rows = channel_rows(weight, axis).contiguous(), step.double().reshape(-1, 1)
    levels = grid.levels(weight)
    nearest = (rows / step_rows.to(rows.dtype)).round_().clamp_(grid.lowest, grid.highest).sub_(grid.lowest).to(torch.uint8)
    counts = torch.bincount(nearest.view(-1), minlength=len(levels))
    information = information_content(cluster_probabilities(counts, grid, zero_floor=zero_floor))
    cost = strength * largest_lambda(rows, step_rows, grid, information) * information
    if relevance is None:
        chosen = (cheapest(rows, step_rows, levels, cost) + grid.lowest).to(torch.int8)
        zeros = _share(chosen == 0)
        return Assignment(from_channel_rows(chosen, weight.shape, axis), zeros, zeros)

    R = channel_rows(relevance, axis)
    others = levels != 0
    index = cheapest(rows, step_rows, levels[others], cost[others])  # the best level other than zero
    exponent, ecq_zeros = critical_exponents(rows, R, step_rows, levels[others], cost[others], cost[-grid.lowest], index, rho)
    beta, in_band = choose_exponent(exponent, R, ecq_zeros, band=band, rho=rho)
    chosen = _looked_up(levels[others].to(torch.int8), index).mul_(exponent > beta)
    return Assignment(from_channel_rows(chosen, weight.shape, axis), _share(chosen == 0), ecq_zeros, beta, in_band)


def cheapest(rows: Tensor, step: Tensor, levels: Tensor, cost: Tensor) -> Tensor:
    """argmin_k (w - kΔ)^2 + c_k as an index into levels, int32 [channels, rest]; a tie goes to the lower level.

    rows: float [channels, rest]; step: float64 [channels, 1]; levels, cost: float64 [levels], levels ascending.
    """
    return count_below(boundaries(step, levels, cost, rows.dtype), rows)


def count_below(sorted_rows: Tensor, rows: Tensor) -> Tensor:
    """How many of its row's sorted entries lie below each value: torch.searchsorted, without its branches and 3 times faster.

    sorted_rows: [channels, m]; rows: [channels, rest]; int32 [channels, rest].
    """
    channels, m = sorted_rows.shape
    width = 1 << m.bit_length()
    table = sorted_rows.new_full((channels, width), torch.inf)
    table[:, :m] = sorted_rows
    offsets = torch.arange(0, channels * width, width, dtype=torch.int32, device=rows.device)[:, None]
    index = torch.zeros(rows.shape, dtype=torch.int32, device=rows.device).add_(offsets)
    half, middle, above = width // 2, torch.empty_like(rows), torch.empty_like(rows, dtype=torch.bool)
    while half:  # binary search, all weights in step: is the middle of what is left below w?
        torch.index_select(table.view(-1)[half - 1 :], 0, index.view(-1), out=middle.view(-1))
        index.add_(torch.lt(middle, rows, out=above), alpha=half)
        half //= 2
    return index.sub_(offsets)


def boundaries(step: Tensor, levels: Tensor, cost: Tensor, dtype: torch.dtype) -> Tensor:
    """[channels, levels - 1], ascending: the largest w for which the winner is still among the levels 0 .. i.

    The levels 0 .. i hold the winner at w if one of them, j, beats every m > i there, that is w <= min_m w_jm. A level that
    never wins makes two boundaries coincide.
    """
    i, j, step = levels[:, None], levels[None, :], step[:, :, None]
    # i and j > i cost the same at w_ij = (i + j)Δ/2 + (c_j - c_i) / (2Δ(j - i))
    crossing = step * (i + j) / 2 + (cost[None, :] - cost[:, None]) / (2 * step * (j - i))
    crossing = crossing.masked_fill(j <= i, torch.inf)
    beats_all_above = crossing.flip(-1).cummin(-1).values.flip(-1)[:, :-1, 1:]
    exact = beats_all_above.masked_fill((j <= i)[:-1, 1:], -torch.inf).amax(-2)
    # Rounded down to the weights' own precision: w <= boundary then says the same in float32 as in float64.
    rounded = exact.to(dtype)
    return torch.where(rounded.double() > exact, torch.nextafter(rounded, torch.full_like(rounded, -torch.inf)), rounded)


def critical_exponents(
    rows: Tensor, R: Tensor, step: Tensor, levels: Tensor, cost: Tensor, zero_cost: Tensor, index: Tensor, rho: float
) -> tuple[Tensor, float]:
    """The smallest β at which each weight falls to zero, and plain ECQ's share of zeros.

    Zero wins  <=>  ρ R^β · (w^2 + c_0) <= (w - kΔ)^2 + c_k  <=>  β >= log(ρ (w^2 + c_0) / ((w - kΔ)^2 + c_k)) / -log R.
    """
    away = _looked_up(levels.to(rows.dtype), index).mul_(step.to(rows.dtype)).sub_(rows).square_()
    away.add_(_looked_up(cost.to(rows.dtype), index))
    zero = rows.square().add_(zero_cost.to(rows.dtype))
    ecq_zeros = _share(zero <= away)
    exponent = zero.mul_(rho).div_(away.clamp_(min=TINY)).clamp_(min=TINY).log_()
    return exponent.div_(away.copy_(R).clamp_(min=LEAST_RELEVANCE).log_().neg_().clamp_(min=TINY)), ecq_zeros


def choose_exponent(exponent: Tensor, R: Tensor, ecq_zeros: float, *, band: Band, rho: float) -> tuple[float, bool]:
    """(β, whether the band is met): the neutral β_0, moved no further than the band asks.

    The share of zeros at β is the share of critical exponents <= β: each trial is one comparison.
    """
    # neutral point ρ·(mean R)^β = 1  [ECQx]
    mean = min(max(float(R.mean()), LEAST_RELEVANCE), 1 - 1e-6)
    beta = min(1.0, math.log(1 / rho) / math.log(mean))
    size = exponent.numel()
    fewest, most = math.ceil((ecq_zeros - band.keep) * size), math.floor((ecq_zeros + band.prune) * size)
    zeros = int(torch.count_nonzero(exponent <= beta))
    if fewest <= zeros <= most:
        return beta, True
    # Zeros grow with β: bisect between β_0 and the end on the band's side, and take the side of the edge that lies in the band.
    outside, inside = beta, 1.0 if zeros < fewest else 0.0
    zeros = int(torch.count_nonzero(exponent <= inside))
    if (inside == 1.0 and zeros < fewest) or (inside == 0.0 and zeros > most):
        return inside, False
    for _ in range(BISECTIONS):
        if fewest <= zeros <= most and min(zeros - fewest, most - zeros) <= size * EDGE:
            break
        middle = (outside + inside) / 2
        zeros_there = int(torch.count_nonzero(exponent <= middle))
        if (inside > outside and zeros_there >= fewest) or (inside < outside and zeros_there <= most):
            inside, zeros = middle, zeros_there
        else:
            outside = middle
    return inside, fewest <= zeros <= most


def _share(mask: Tensor) -> float:
    return int(torch.count_nonzero(mask)) / max(1, mask.numel())


def _looked_up(table: Tensor, index: Tensor) -> Tensor:
    return table.index_select(0, index.view(-1)).view_as(index)
