"""Error feedback against brute force; steps that no weight leaves; matrices that can't be
inverted."""

import numpy as np
import pytest

from ecqx_onnx.compression.rounding.moments import Moments
from ecqx_onnx.compression.rounding.rounding import (
    HIGHEST,
    corrected_target,
    factorize,
    round_nearest,
    round_with_feedback,
)
from tests.oracles.error_feedback import best_levels, feed_errors_one_by_one, layer_error


def moments_of(inputs):
    hessian = inputs.T.astype(float) @ inputs / len(inputs)
    return Moments((hessian[None],), (0,), inputs.mean(axis=0)[None].astype(float), len(inputs))


def correlated(generator, count, length):
    mixing = generator.normal(size=(length, length)) + np.eye(length)
    return (generator.normal(size=(count, length)) @ mixing).astype(np.float32)


@pytest.mark.parametrize("seed", range(8))
def test_feedback_on_three_weights_is_nearly_as_good_as_the_best_of_all_levels(seed):
    generator = np.random.default_rng(seed)
    inputs = correlated(generator, 200, 3)
    row = generator.normal(size=(1, 1, 3)).astype(np.float32)
    step, moments = np.float32(0.7), moments_of(inputs)
    found = round_with_feedback(row, step, moments, dampening=1e-6)
    nearest = round_nearest(row, step)
    _, least = best_levels(row[0, 0], float(step), moments.blocks[0][0])
    mine = layer_error(row[0], found.values[0], inputs)
    theirs = layer_error(row[0], nearest.values[0], inputs)
    assert least - 1e-6 <= mine <= max(theirs, 4 * least + 1e-6)


@pytest.mark.parametrize("seed", range(4))
def test_the_cholesky_form_gives_the_levels_of_the_derivation_column_by_column(seed):
    generator = np.random.default_rng(seed)
    inputs = correlated(generator, 300, 9)
    row = generator.normal(size=9).astype(np.float32)
    moments = moments_of(inputs)
    found = round_with_feedback(row[None, None], np.float32(0.4), moments, dampening=1e-9)
    order = np.argsort(-np.diag(moments.blocks[0][0]), kind="stable")
    hessian = moments.blocks[0][0][np.ix_(order, order)]
    wanted = feed_errors_one_by_one(row[order], 0.4, hessian)
    assert np.array_equal(found.levels[0, 0][order], wanted)


def test_the_loss_is_the_mean_square_that_outputs_move_by():
    generator = np.random.default_rng(1)
    inputs = correlated(generator, 500, 16)
    weights = generator.normal(size=(1, 5, 16)).astype(np.float32)
    found = round_with_feedback(weights, np.float32(0.5), moments_of(inputs), dampening=1e-9)
    assert found.loss == pytest.approx(layer_error(weights[0], found.values[0], inputs), rel=1e-3)


def test_feedback_beats_the_nearest_levels_by_far_where_inputs_are_correlated():
    generator = np.random.default_rng(2)
    inputs = correlated(generator, 2000, 40)
    weights = generator.normal(size=(1, 20, 40)).astype(np.float32)
    fed = round_with_feedback(weights, np.float32(1.0), moments_of(inputs))
    nearest = round_nearest(weights, np.float32(1.0))
    mine = layer_error(weights[0], fed.values[0], inputs)
    assert mine < 0.6 * layer_error(weights[0], nearest.values[0], inputs)


def test_an_outlier_widens_its_row_and_is_never_clipped():
    generator = np.random.default_rng(3)
    weights = generator.normal(size=(1, 4, 64)).astype(np.float32)
    weights[0, 2, 5] = 175.0
    inputs = correlated(generator, 400, 64)
    found = round_with_feedback(weights, np.float32(0.3), moments_of(inputs))
    assert np.abs(found.levels).max() <= HIGHEST
    assert found.steps[0, 2, 0] > 1.0
    assert found.steps[0, 1, 0] == np.float32(0.3)
    assert abs(found.values[0, 2, 5] - 175.0) < 10 * found.steps[0, 2, 0]
    assert any("wider step" in note for note in found.notes)


@pytest.mark.parametrize("kind", ["dead", "constant", "few", "zero"])
def test_moments_that_cannot_be_inverted_are_dampened_not_a_crash(kind):
    generator = np.random.default_rng(4)
    inputs = correlated(generator, 100, 12)
    if kind == "dead":
        inputs[:, 3] = 0
    elif kind == "constant":
        inputs[:, 3] = 2.0
    elif kind == "few":
        inputs = inputs[:3]
    else:
        inputs[:] = 0
    weights = generator.normal(size=(1, 3, 12)).astype(np.float32)
    found = round_with_feedback(weights, np.float32(0.5), moments_of(inputs))
    assert np.isfinite(found.values).all()
    assert np.isfinite(found.loss)


def test_a_matrix_with_a_negative_eigenvalue_gets_more_dampening_and_says_so():
    matrix = np.array([[1.0, 2.0], [2.0, 1.0]])
    factor, _, note = factorize(matrix, 0.01)
    assert np.isfinite(factor).all()
    assert "dampening" in note


def test_blocks_of_a_long_input_are_rounded_as_inputs_of_their_own():
    generator = np.random.default_rng(5)
    first, second = correlated(generator, 300, 6), correlated(generator, 300, 4)
    weights = generator.normal(size=(1, 3, 10)).astype(np.float32)
    one, other = moments_of(first), moments_of(second)
    mean = np.concatenate([one.mean, other.mean], axis=1)
    both = Moments((one.blocks[0], other.blocks[0]), (0, 6), mean, 300)
    found = round_with_feedback(weights, np.float32(0.5), both)
    left = round_with_feedback(weights[:, :, :6], np.float32(0.5), one)
    right = round_with_feedback(weights[:, :, 6:], np.float32(0.5), other)
    assert np.array_equal(found.levels, np.concatenate([left.levels, right.levels], axis=2))


def test_the_corrected_target_is_the_least_squares_solution():
    generator = np.random.default_rng(6)
    before = correlated(generator, 400, 8)
    after = before + 0.3 * generator.normal(size=before.shape).astype(np.float32)
    weights = generator.normal(size=(1, 5, 8)).astype(np.float32)
    cross = Moments((before.T.astype(float) @ after / 400,), (0,), np.zeros((1, 8)), 400)
    cross = Moments((cross.blocks[0][None],), (0,), cross.mean, 400)
    target = corrected_target(weights, moments_of(after), cross, dampening=1e-12)
    wanted, *_ = np.linalg.lstsq(after.astype(float), before @ weights[0].T, rcond=None)
    assert target[0] == pytest.approx(wanted.T, abs=1e-4)
