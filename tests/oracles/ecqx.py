"""ECQ and ECQx written slowly from the paper: one weight and one level at a time, in float64 or
exact fractions.

Nothing here imports the package: an oracle that shares code with what it checks checks nothing.
"""

from __future__ import annotations

import math
from fractions import Fraction


def nearest_level(w, step, levels):
    """The level whose value is nearest to w; a tie goes to the lower level."""
    return min(levels, key=lambda k: (abs(Fraction(w) - k * Fraction(step)), k))


def probabilities(weights, steps, levels, zero_floor=0.5):
    """P_k: how often level k is nearest; an empty level counts half a weight, P_0 is floored and
    the rest rescaled."""
    counts = dict.fromkeys(levels, 0.0)
    for w, step in zip(weights, steps, strict=True):
        counts[nearest_level(w, step, levels)] += 1
    counts = {k: max(count, 0.5) for k, count in counts.items()}
    total = sum(counts.values())
    P = {k: count / total for k, count in counts.items()}
    P_0 = max(P[0], zero_floor)
    rest = sum(P[k] for k in levels if k != 0)
    return {k: P_0 if k == 0 else P[k] / rest * (1 - P_0) for k in levels}


def information(P):
    """I_k = -log2 P_k."""
    return {k: -math.log2(p) for k, p in P.items()}


def lambda_max(weights, step, levels, info):
    """One step for the whole tensor: min over both sides of (e^2 - (e - w_e)^2) / (I_e - I_0)."""
    limits = []
    for side in (-1, 1):
        occupied = [k for k in (nearest_level(w, step, levels) for w in weights) if k * side > 0]
        if not occupied:
            continue
        e = max(weights, key=lambda w: w * side)
        k = max(occupied, key=abs)
        gain = e * e - (e - k * step) ** 2
        if info[k] > info[0] and gain > 0:
            limits.append(gain / (info[k] - info[0]))
    return min(limits, default=0.0)


def brute_force_level(w, step, costs):
    """argmin_k (w - kΔ)^2 + c_k in exact arithmetic; costs: {level: c_k}; a tie goes to the lower
    level."""
    return min(
        costs, key=lambda k: ((Fraction(w) - k * Fraction(step)) ** 2 + Fraction(costs[k]), k)
    )


def ecq(weights, step, levels, strength):
    """Levels of plain ECQ; λ = strength · λ_max."""
    info = information(probabilities(weights, [step] * len(weights), levels))
    lam = strength * lambda_max(weights, step, levels, info)
    return [brute_force_level(w, step, {k: lam * info[k] for k in levels}) for w in weights]


def ecqx_costs(w, R, step, costs, rho, beta):
    """{level: cost}, zero's multiplied by f(R) = ρ R^β; R = 0 counts as 1e-12."""
    R = max(R, 1e-12)
    return {
        k: (rho * R**beta * (w * w + c) if k == 0 else (w - k * step) ** 2 + c)
        for k, c in costs.items()
    }


def ecqx_levels(weights, relevances, step, costs, rho, beta):
    """Levels of ECQx for a given β; zero wins a tie."""
    chosen = []
    for w, R in zip(weights, relevances, strict=True):
        total = ecqx_costs(w, R, step, costs, rho, beta)
        best = min((k for k in total if k != 0), key=lambda k: (total[k], k))
        chosen.append(0 if total[0] <= total[best] else best)
    return chosen


def neutral_beta(relevances, rho):
    """ρ·(mean R)^β = 1."""
    return math.log(1 / rho) / math.log(sum(relevances) / len(relevances))
