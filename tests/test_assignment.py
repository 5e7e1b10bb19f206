"""Assignment against the slow oracle: exact lower envelope, relevance on the zero cluster, the
band."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ecqx_onnx.options.quantizer import Band
from ecqx_onnx.quantization.levels import envelope
from ecqx_onnx.quantization.levels.assignment import _choose_exponent, assign
from ecqx_onnx.quantization.levels.envelope import find_boundaries, find_cheapest
from ecqx_onnx.quantization.levels.grid import Grid
from tests.oracles import ecqx as oracle

torch.set_num_threads(1)  # tiny tensors: more threads only wait for each other

SYMMETRIC = {bits: Grid(bits, 1 - 2 ** (bits - 1), 2 ** (bits - 1) - 1) for bits in (2, 3, 4, 5)}


def dyadic(numerators, bits):
    """Numbers with few binary digits: on them float64 arithmetic is exact and ties really occur."""
    return st.integers(-numerators, numerators).map(lambda n: n / 2**bits)


@settings(deadline=None, max_examples=150)
@given(
    st.lists(dyadic(200, 5), min_size=1, max_size=60),
    st.integers(1, 64).map(lambda n: n / 32),
    st.sampled_from([2, 3, 4, 5]),
    st.data(),
)
def test_lower_envelope_is_brute_force_over_all_levels_bit_for_bit_ties_included(
    weights, step, bits, data
):
    levels = list(range(SYMMETRIC[bits].lowest, SYMMETRIC[bits].highest + 1))
    costs = [abs(data.draw(dyadic(40, 4))) for _ in levels]
    expected = [
        oracle.brute_force_level(w, step, dict(zip(levels, costs, strict=True))) for w in weights
    ]
    for dtype in (torch.float64, torch.float32):
        index = find_cheapest(
            torch.tensor([weights], dtype=dtype),
            torch.tensor([[step]], dtype=torch.float64),
            torch.tensor(levels, dtype=torch.float64),
            torch.tensor(costs, dtype=torch.float64),
        )
        assert [levels[i] for i in index[0]] == expected


@pytest.mark.parametrize("bits", [2, 3, 4, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_lower_envelope_is_argmin_of_the_cost_table_on_ordinary_weights(bits, dtype):
    generator = torch.Generator().manual_seed(bits)
    rows = torch.randn(3, 20_000, generator=generator, dtype=dtype)
    step = torch.tensor([[0.21], [0.4], [0.07]], dtype=torch.float64)
    levels = SYMMETRIC[bits].levels(rows)
    cost = torch.rand(len(levels), generator=generator, dtype=torch.float64) * 0.2
    table = (rows.double()[None] - levels[:, None, None] * step).square() + cost[:, None, None]
    assert torch.equal(find_cheapest(rows, step, levels, cost), table.argmin(0))


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from([2, 3, 4, 5, 8]),
    st.sampled_from([0.0, 1e-3, 0.02, 1.0, 50.0]),
    st.integers(0, 10**6),
    st.integers(1, 9),
)
def test_looking_up_by_cells_is_counting_the_boundaries_below_each_weight(
    bits, spread, seed, channels
):
    """Dear levels never win and their boundaries coincide; a great spread of costs puts many
    boundaries into one cell."""
    generator = torch.Generator().manual_seed(seed)
    levels = Grid(bits, 1 - 2 ** (bits - 1), 2 ** (bits - 1) - 1).levels(torch.zeros(1))
    step = torch.rand(channels, 1, generator=generator).double() + 0.01
    cost = torch.rand(len(levels), generator=generator, dtype=torch.float64).pow(4) * spread
    bounds = find_boundaries(step, levels, cost, torch.float32)
    beside = [
        torch.nextafter(bounds, torch.full_like(bounds, side)) for side in (-torch.inf, torch.inf)
    ]
    rows = torch.cat(
        [torch.randn(channels, 50, generator=generator), bounds, *beside, 1e30 * bounds.sign()], 1
    )
    below = (rows[:, :, None] > bounds[:, None, :]).sum(-1)
    assert torch.equal(find_cheapest(rows, step, levels, cost), below)


def test_blocks_cover_every_weight_once_in_order(monkeypatch):
    monkeypatch.setattr(envelope, "BLOCK", 7)
    for shape in ((1, 20), (1, 7), (3, 20), (9, 3), (4, 1), (1, 1), (2, 7)):
        rows = torch.arange(shape[0] * shape[1]).reshape(shape)
        assert torch.equal(
            torch.cat([rows[block].reshape(-1) for block in envelope.split_into_blocks(rows)]),
            rows.reshape(-1),
        )
        assert all(
            rows[block].is_contiguous() and rows[block].numel() <= 7
            for block in envelope.split_into_blocks(rows)
        )


@pytest.mark.parametrize("axis", [None, 0, 1])
def test_the_size_of_a_block_changes_nothing(monkeypatch, axis):
    generator = torch.Generator().manual_seed(11)
    weights, relevance = (
        torch.randn(6, 50, generator=generator),
        torch.rand(6, 50, generator=generator) ** 3,
    )
    step = {None: torch.tensor(0.3), 0: torch.rand(6, 1) + 0.1, 1: torch.rand(1, 50) + 0.1}[axis]
    found = []
    for size in (1 << 17, 64, 7):
        monkeypatch.setattr(envelope, "BLOCK", size)
        for R in (None, relevance / relevance.max()):
            found.append(
                assign(
                    weights,
                    step,
                    SYMMETRIC[4],
                    axis=axis,
                    strength=0.3,
                    relevance=R,
                    band=Band(0.02, 0.02),
                )
            )
    for plain, relevant in zip(found[2::2], found[3::2], strict=True):
        assert torch.equal(plain.levels, found[0].levels)
        assert torch.equal(relevant.levels, found[1].levels)
        assert (relevant.beta, relevant.zeros, relevant.ecq_zeros) == (
            found[1].beta,
            found[1].zeros,
            found[1].ecq_zeros,
        )
    assert found[1].ecq_zeros == pytest.approx(found[0].zeros, abs=1e-9)


def test_boundaries_of_levels_that_never_win_coincide():
    levels = torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64)
    cost = torch.tensor([0.0, 100.0, 0.0], dtype=torch.float64)
    found = find_boundaries(torch.tensor([[1.0]], dtype=torch.float64), levels, cost, torch.float64)
    assert found.tolist() == [[0.0, 0.0]]


@pytest.mark.parametrize("strength", [0.0, 0.1, 0.5, 1.0])
def test_ecq_levels_are_the_oracles(strength):
    weights = torch.randn(400, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    for bits, step in ((2, 0.8), (3, 0.6), (4, 0.37)):
        grid = SYMMETRIC[bits]
        levels = list(range(grid.lowest, grid.highest + 1))
        expected = oracle.ecq(weights.tolist(), float(np.float32(step)), levels, strength)
        found = assign(weights, torch.tensor(step), grid, strength=strength)
        assert found.levels.tolist() == expected
        assert found.levels.dtype == torch.int8


def test_non_negative_levels_and_weights_without_a_side_are_the_oracles():
    weights = torch.rand(300, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    found = assign(weights, torch.tensor(0.125), Grid(3, 0, 7), strength=0.7)
    assert found.levels.tolist() == oracle.ecq(weights.tolist(), 0.125, list(range(8)), 0.7)


def test_zeros_grow_with_the_entropy_weight():
    weights = torch.randn(5000, generator=torch.Generator().manual_seed(5))
    zeros = [
        assign(weights, torch.tensor(0.3), SYMMETRIC[4], strength=s).zeros
        for s in (0.0, 0.1, 0.3, 0.6, 1.0)
    ]
    assert zeros == sorted(zeros)
    assert zeros[-1] > zeros[0] + 0.2


@pytest.mark.parametrize("beta_band", [(0.05, 0.05), (1.0, 1.0), (0.0, 0.2), (0.2, 0.0)])
@pytest.mark.parametrize("bits", [2, 4])
def test_ecqx_levels_are_the_oracles_at_the_beta_it_reports(beta_band, bits):
    generator = torch.Generator().manual_seed(6)
    weights = torch.randn(500, generator=generator, dtype=torch.float64) * 0.5
    relevance = torch.rand(500, generator=generator, dtype=torch.float64) ** 4
    relevance /= relevance.max()
    relevance[:5] = 0
    grid, step, strength = SYMMETRIC[bits], 0.3, 0.3
    levels = list(range(grid.lowest, grid.highest + 1))
    step32 = float(np.float32(step))
    keep, prune = beta_band
    found = assign(
        weights,
        torch.tensor(step),
        grid,
        strength=strength,
        relevance=relevance,
        band=Band(keep, prune),
    )

    info = oracle.information(oracle.probabilities(weights.tolist(), [step32] * 500, levels))
    lam = strength * oracle.lambda_max(weights.tolist(), step32, levels, info)
    costs = {k: lam * info[k] for k in levels}
    expected = oracle.ecqx_levels(
        weights.tolist(), relevance.tolist(), step32, costs, 2.0, found.beta
    )
    # At the band's edge one weight decides β, so its own tie is settled by the last bit of a
    # logarithm.
    assert sum(a != b for a, b in zip(found.levels.tolist(), expected, strict=True)) <= 1
    if found.in_band:
        assert found.ecq_zeros - keep - 1e-9 <= found.zeros <= found.ecq_zeros + prune + 1e-9


def test_beta_is_neutral_when_the_band_allows_it():
    generator = torch.Generator().manual_seed(7)
    weights, relevance = (
        torch.randn(2000, generator=generator),
        torch.rand(2000, generator=generator),
    )
    relevance /= relevance.max()
    found = assign(
        weights,
        torch.tensor(0.3),
        SYMMETRIC[4],
        strength=0.2,
        relevance=relevance,
        band=Band(1.0, 1.0),
    )
    assert found.beta == pytest.approx(
        min(1, oracle.neutral_beta(relevance.double().tolist(), 2.0)), rel=1e-6
    )


def test_a_band_of_width_zero_keeps_plain_ecqs_share_of_zeros():
    generator = torch.Generator().manual_seed(8)
    weights, relevance = (
        torch.randn(4000, generator=generator),
        torch.rand(4000, generator=generator) ** 6,
    )
    relevance /= relevance.max()
    found = assign(
        weights,
        torch.tensor(0.4),
        SYMMETRIC[4],
        strength=0.3,
        relevance=relevance,
        band=Band(0.0, 0.0),
    )
    assert found.in_band
    assert abs(found.zeros - found.ecq_zeros) <= 1 / 4000
    plain = assign(weights, torch.tensor(0.4), SYMMETRIC[4], strength=0.3)
    assert not torch.equal(found.levels, plain.levels)  # the same number of zeros, at other places


def test_irrelevant_weight_falls_to_zero_first_and_relevant_one_regrows():
    weights = torch.full((100,), 0.6)
    weights[50:] = 0.05
    relevance = torch.full((100,), 0.3)
    relevance[0], relevance[99] = 1e-6, 1.0
    found = assign(
        weights,
        torch.tensor(1.0),
        SYMMETRIC[2],
        strength=0.0,
        relevance=relevance,
        band=Band(1.0, 1.0),
    )
    assert found.levels[0] == 0
    assert found.levels[1] == 1
    weights[99] = (
        # nearest level is zero, but it matters: 2·0.16 > 0.36 no, so it stays; at 0.45 it regrows
        0.4
    )
    weights[98] = 0.45
    relevance[98] = 1.0
    found = assign(
        weights,
        torch.tensor(1.0),
        SYMMETRIC[2],
        strength=0.0,
        relevance=relevance,
        band=Band(1.0, 1.0),
    )
    assert found.levels[99] == 0
    assert found.levels[98] == 1


def test_a_step_per_channel_is_each_channel_against_its_own_step():
    weights = torch.randn(4, 3, 5, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    step = torch.tensor([0.2, 0.5, 0.3, 0.9]).reshape(4, 1, 1)
    found = assign(weights, step, SYMMETRIC[3], axis=0, strength=0.0).levels
    for channel in range(4):
        alone = assign(weights[channel], step[channel, 0, 0], SYMMETRIC[3], strength=0.0).levels
        assert torch.equal(found[channel], alone)
    transposed = assign(
        weights.movedim(0, 1), step.movedim(0, 1), SYMMETRIC[3], axis=1, strength=0.0
    ).levels
    assert torch.equal(transposed, found.movedim(0, 1))


def test_all_zero_weights_stay_zero():
    for relevance in (None, torch.rand(2, 8)):
        found = assign(
            torch.zeros(2, 8), torch.tensor(1.0), SYMMETRIC[4], strength=0.5, relevance=relevance
        )
        assert found.zeros == 1.0
        assert not math.isnan(found.beta or 0.0)


def test_boundaries_round_down_so_that_float32_decides_as_float64_does():
    """Boundaries that float32 cannot hold, and the two float32 weights on either side of each."""
    levels, generator = SYMMETRIC[4].levels(torch.zeros(1)), torch.Generator().manual_seed(10)
    for _ in range(20):
        step = torch.rand(1, 1, generator=generator).double() + 0.1
        cost = torch.rand(15, generator=generator, dtype=torch.float64) * 0.01
        exact = find_boundaries(step, levels, cost, torch.float64)
        below = find_boundaries(step, levels, cost, torch.float32)
        assert bool((below.double() <= exact).all())
        assert bool(
            (torch.nextafter(below, torch.full_like(below, torch.inf)).double() > exact).all()
        )


def test_beta_moves_no_further_than_to_the_edge_that_it_is_outside_of():
    """Where the far end of the band is as near to a bisection's end, it must not be taken."""
    places = np.linspace(0, 1, 20_000)
    exponents = np.interp(places, [0, 0.3, 0.4, 0.5995, 1], [0, 0.2, 0.4, 1.0, 5.0])
    exponent = torch.from_numpy(exponents.astype(np.float32)).reshape(1, -1)
    band = Band(keep=0.1, prune=0.1)
    beta, in_band, zeros = _choose_exponent(exponent, 0.2, 10_000, band)
    assert in_band
    assert beta == pytest.approx(0.4, abs=0.01)
    assert zeros == pytest.approx(8_000, abs=100)
