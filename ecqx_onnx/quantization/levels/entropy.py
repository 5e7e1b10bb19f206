"""What choosing a level costs, λ I_k, from how often each level is the nearest.

P_k is the share of weights whose nearest level is k, I_k = -log2 P_k its information content in
bits, and λ = γ · δ · λ_max the weight of a bit against a squared error.  [ECQx; Thesis 4.12-4.15]
"""

from __future__ import annotations

import torch
from torch import Tensor

from ecqx_onnx.quantization.levels.grid import Grid


def estimate_probabilities(counts: Tensor, grid: Grid, *, zero_floor: float = 0.5) -> Tensor:
    """P_k from the nearest-neighbour counts [levels]: float64, sums to 1.

    P_0 is raised to zero_floor and the rest rescaled, so that zero is the cheapest symbol. A level
    that no weight is nearest to counts as half a weight: its cost stays finite and it still never
    wins against an occupied neighbor.

    Args:
        counts: int64 [levels], for how many weights each level is the nearest.
        grid: the levels.
        zero_floor: least P_0, in [0, 1]; 0 leaves it as counted.

    Returns:
        float64 [levels], P_k.
    """
    P = counts.double().clamp(min=0.5)
    P = P / P.sum()
    zero = torch.arange(grid.lowest, grid.highest + 1, device=P.device) == 0
    P_0 = P[-grid.lowest].clamp(min=zero_floor)
    return torch.where(zero, P_0, P * (1 - P_0) / (1 - P[-grid.lowest]))


def compute_information(P: Tensor) -> Tensor:
    """Compute I_k = -log2 P_k.

    Args:
        P: float64 [levels], probabilities above 0.

    Returns:
        float64 [levels], information content in bits.
    """
    return -P.log2()


def find_largest_lambda(rows: Tensor, step: Tensor, grid: Grid, information: Tensor) -> Tensor:
    """Find λ_max: the smallest λ at which the extreme weight of a side would rather be zero.

    Args:
        rows: float [channels, rest], the weights.
        step: float64 [channels, 1], Δ.
        grid: the levels.
        information: float64 [levels], I_k in bits.

    Returns:
        float64 [], over both sides; 0 where no side sets a limit.  [Thesis 4.12-4.14]
    """
    limits = []
    for extreme in (rows.amin(1, keepdim=True).double(), rows.amax(1, keepdim=True).double()):
        k = (extreme / step).round().clamp(grid.lowest, grid.highest)
        # λ = (e^2 - (e - w_e)^2) / (I_e - I_0)  [Thesis 4.14], with w_e = kΔ the outermost
        # centroid that is occupied
        gain = extreme.square() - (extreme - k * step).square()
        bits = information[(k - grid.lowest).long()] - information[-grid.lowest]
        ratio = torch.where((k != 0) & (bits > 0), gain / bits, -torch.inf)
        # With a step per channel a side is empty once every channel's extreme weight has gone.
        limit = ratio.max()
        limits.append(torch.where(limit > 0, limit, torch.inf))  # an empty side sets no limit
    smallest = torch.minimum(*limits)
    return torch.where(smallest.isinf(), torch.zeros_like(smallest), smallest)


def compute_size_factor(size: int, largest: int) -> float:
    """Compute δ = (n / n_max + 0.05) / 1.05: small tensors are spared.  [ECQx]

    Args:
        size: n, weights of the tensor.
        largest: n_max, weights of the largest quantized tensor.

    Returns:
        δ in (0, 1].
    """
    return (size / largest + 0.05) / 1.05
