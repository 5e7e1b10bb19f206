"""Metrics against slow oracles and published values."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ecqx_onnx.errors import DataError
from ecqx_onnx.validation.outputs.metrics import (
    Proportion,
    find_largest_difference,
    is_classification,
    measure_accuracy,
    measure_agreement,
)


@pytest.mark.parametrize(
    ("hits", "total", "low", "high"),
    # Newcombe, "Two-sided confidence intervals for the single proportion", Statistics in Medicine
    # 1998, table I, method 3.
    [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_the_interval_is_newcombes_published_one(hits, total, low, high):
    assert Proportion(hits, total).interval == pytest.approx((low, high), abs=5e-5)


@given(
    st.integers(1, 10_000).flatmap(lambda total: st.tuples(st.integers(0, total), st.just(total)))
)
def test_the_interval_ends_are_where_a_score_test_just_accepts(hits_of_total):
    hits, total = hits_of_total
    share = hits / total
    for end in Proportion(hits, total).interval:
        if 0 < end < 1:  # |p - end| = z·sqrt(end (1 - end) / n), what the Wilson interval solves
            assert abs(share - end) == pytest.approx(
                1.959963984540054 * math.sqrt(end * (1 - end) / total), rel=1e-6, abs=1e-12
            )


def test_proportions_of_batches_add_up():
    assert Proportion(3, 4) + Proportion(1, 6) == Proportion(4, 10)


def test_accuracy_counts_right_classes():
    scores = np.array([[0, 1], [2, 1], [0, 3]], np.float32)
    assert measure_accuracy(scores, np.array([1, 1, 1])) == Proportion(2, 3)


@pytest.mark.parametrize("label", [-1, 2])
def test_a_label_that_is_no_class_is_refused(label):
    with pytest.raises(DataError, match=f"label {label} is out of range"):
        measure_accuracy(np.zeros((1, 2), np.float32), np.array([label]))


def test_the_margin_of_a_disagreement_is_the_first_models_lead():
    first = np.array([[1.0, 0.0], [0.50, 0.49], [0.0, 9.0]], np.float32)
    second = np.array([[2.0, 0.0], [0.49, 0.50], [0.0, 1.0]], np.float32)
    found = measure_agreement(first, second)
    assert found.same == Proportion(2, 3)
    assert found.margin == pytest.approx(0.01, abs=1e-6)
    assert (found + measure_agreement(first[:1], second[:1])).same == Proportion(3, 4)


def test_a_disagreement_over_nan_is_never_a_tie():
    first, second = np.array([[np.nan, 1.0]], np.float32), np.array([[0.0, 1.0]], np.float32)
    assert measure_agreement(first, second).margin == math.inf


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ([1.0, 2.0], [1.5, 2.0], 0.5),
        ([np.nan, 1.0], [np.nan, 1.0], 0.0),
        ([np.nan], [1.0], math.inf),
        ([np.inf], [np.inf], 0.0),
        ([np.inf], [-np.inf], math.inf),
        ([1.0, 2.0], [1.0], math.inf),
        ([], [], 0.0),
    ],
)
def test_the_largest_difference_treats_what_is_no_number_with_care(first, second, expected):
    assert (
        find_largest_difference(np.array(first, np.float32), np.array(second, np.float32))
        == expected
    )


def test_scores_of_two_or_more_classes_are_a_classification():
    assert is_classification(np.zeros((3, 2), np.float32))
    assert not is_classification(np.zeros((3, 1), np.float32))
    assert not is_classification(np.zeros((3, 2), np.int64))
    assert not is_classification(np.zeros((3, 2, 2), np.float32))
