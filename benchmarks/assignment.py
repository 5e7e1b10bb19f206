"""How much faster is one ECQx assignment than the straightforward way, and in how much memory?

    python benchmarks/assignment.py

The straightforward way is kept here: the cost of every level for every weight in one [2^b, n]
tensor, and up to 50 trial exponents, found by bisection, until the share of zeros is in the band,
each a pass over the table. How many it tries depends on how far the relevances would move the zeros
on their own, so there are three cases: hardly, some way, far. Both ways take the same weights,
relevances and band in one process and take turns; times are the least of all runs, in CPU seconds
with one thread (other work on the machine then counts little) and by the clock with more; memory is
the peak of what torch's allocator hands out beyond the inputs.
"""

from __future__ import annotations

import argparse
import math
import time
from functools import partial

import torch
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile

from ecqx_onnx.options.quantizer import Band
from ecqx_onnx.quantization.levels.assignment import assign
from ecqx_onnx.quantization.levels.entropy import (
    compute_information,
    estimate_probabilities,
    find_largest_lambda,
)
from ecqx_onnx.quantization.levels.grid import Grid, choose_grid, fit_step

STRENGTH, BAND, RHO = 0.3, Band(0.02, 0.02), 2.0


def assign_straightforwardly(weight, relevance, step, grid: Grid, *, trials: int = 50):
    """The same assignment by its definition. (levels, how many exponents were tried)."""
    flat, levels = weight.reshape(-1), grid.levels(weight)
    distance = (flat[None] - (levels * step).to(weight.dtype)[:, None]).square()
    counts = torch.bincount(distance.argmin(0), minlength=len(levels))
    information = compute_information(estimate_probabilities(counts, grid))
    scale = STRENGTH * find_largest_lambda(
        flat[None], step.double().reshape(1, 1), grid, information
    )
    cost = distance + (scale * information).to(weight.dtype)[:, None]
    zero = -grid.lowest
    s = float((cost.argmin(0) == zero).float().mean())
    R = relevance.reshape(-1)
    beta = min(1.0, math.log(1 / RHO) / math.log(float(R.mean())))
    low, high = 0.0, 1.0
    tried = 0
    while tried < trials:
        tried += 1
        table = cost.clone()
        table[zero] *= RHO * R**beta
        index = table.argmin(0)
        zeros = float((index == zero).float().mean())
        if s - BAND.keep <= zeros <= s + BAND.prune:
            break
        low, high = (beta, high) if zeros < s else (low, beta)
        beta = (low + high) / 2
    return (index + grid.lowest).reshape(weight.shape), tried


def make_inputs(size: int, bits: int, tail: float = 3.0, channels: int | None = None):
    """tail: how unevenly relevance is spread; the more, the more weights does the neutral exponent
    send to zero.

    channels: as many rows, each with a step of its own."""
    generator = torch.Generator().manual_seed(size + bits)
    weight = torch.randn(size, generator=generator) * 0.05
    # Relevances are heavy-tailed: most weights matter little, few very much. Here they also grow
    # with the weight, as r_w does.
    relevance = torch.randn(size, generator=generator).abs().pow(tail) * weight.abs()
    grid, shape = (
        choose_grid(weight, bits),
        (-1,) if channels is None else (channels, size // channels),
    )
    weight, relevance = weight.reshape(shape), (relevance / relevance.amax()).reshape(shape)
    return weight, relevance, fit_step(weight, grid, axis=None if channels is None else 0), grid


def assign_ours(weight, relevance, step, grid: Grid):
    return assign(
        weight,
        step,
        grid,
        axis=0 if step.ndim else None,
        strength=STRENGTH,
        relevance=relevance,
        band=BAND,
        rho=RHO,
    )


def measure_least_seconds(functions, repeats: int) -> list[float]:
    """The functions take turns, so that a busy machine slows all alike."""
    now = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    least = [math.inf] * len(functions)
    for _ in range(repeats):
        for i, function in enumerate(functions):
            start = now()
            function()
            least[i] = min(least[i], now() - start)
    return least


def measure_peak_bytes(function) -> int:
    """Most bytes allocated at one time during the call, beyond what was there before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        function()
    total = peak = 0
    for event in record.profiler.kineto_results.events():
        if event.name() == "[memory]":
            total += event.nbytes()
            peak = max(peak, total)
    return peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", type=int, default=2_400_000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--threads", type=int, default=1, help="1: no thread waits for another on a busy machine"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    size, console = arguments.size, Console()

    table = Table(
        title=(
            f"{size:,} weights, 4 bit, {arguments.threads} thread(s); memory in units of the "
            "weights' size"
        )
    )
    for heading in (
        "case",
        "straightforward, s",
        "trials",
        "memory",
        "ours, s",
        "memory",
        "ratio",
        "levels differ",
    ):
        table.add_column(heading, justify="right")
    for name, tail in (("hardly", 1.0), ("some way", 4.0), ("far", 6.0)):
        case = make_inputs(size, 4, tail)
        run_ours = partial(assign_ours, *case)
        run_straightforward = partial(assign_straightforwardly, *case)
        fast, slow = measure_least_seconds([run_ours, run_straightforward], arguments.repeats)
        found, (expected, trials) = run_ours(), run_straightforward()
        memory = [measure_peak_bytes(run) / (4 * size) for run in (run_straightforward, run_ours)]
        differing = float((found.levels != expected).float().mean())
        table.add_row(
            *(
                name,
                f"{slow:.3f}",
                str(trials),
                f"{memory[0]:.1f}",
                f"{fast:.4f}",
                f"{memory[1]:.1f}",
            ),
            *(f"{slow / fast:.0f}x", f"{differing:.2%}"),
        )
    console.print(table)

    growth = Table(title="how it grows")
    for heading in ("", "seconds", "against 4 bit, full size"):
        growth.add_column(heading, justify="right")
    cases = {f"{bits} bit": make_inputs(size, bits) for bits in (2, 3, 4, 5)} | {
        f"4 bit, 1/{k} of the size": make_inputs(size // k, 4) for k in (4, 16)
    }
    cases["4 bit, 1024 channels"] = make_inputs(size // 1024 * 1024, 4, channels=1024)
    times = dict(
        zip(
            cases,
            measure_least_seconds(
                [partial(assign_ours, *case) for case in cases.values()], arguments.repeats
            ),
            strict=True,
        )
    )
    for name, seconds in times.items():
        growth.add_row(name, f"{seconds:.4f}", f"{seconds / times['4 bit']:.2f}x")
    console.print(growth)


if __name__ == "__main__":
    main()
