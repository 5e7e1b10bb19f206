"""(a Quantizer after training, its history) -> what a report needs of it: kept in the checkpoint, a few kilobytes a weight.

Of each weight up to PAIRS entries are kept: |w| of the full-precision background, relevance R, and the level that it got; the
correlation of |w| and R is over all entries.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

PAIRS = 400
HIGHEST = np.float32(np.finfo(np.float16).max)
MOST_PAIRS = 100_000  # of a file, over all weights: ours has PAIRS a weight
MOST_EPOCHS = 100_000


@dataclass(frozen=True, eq=False)
class WeightInsight:
    """magnitudes, relevances: float16 [n], |w| and R in [0, 1]; levels: int8 [n]. relevances is empty where there is none.

    correlation: Pearson's, of |w| and R over the whole weight; None without relevances or where either is constant.
    rule: where its relevance comes from. ecq_zeros: share of zeros that plain ECQ would give.
    """

    name: str
    magnitudes: np.ndarray
    relevances: np.ndarray
    levels: np.ndarray
    correlation: float | None
    rule: str
    ecq_zeros: float


@dataclass(frozen=True, eq=False)
class Insight:
    """history: one dict per epoch, as training.EpochRecord has them. accuracies: test accuracy {hits, total} before and after."""

    weights: tuple[WeightInsight, ...]
    warnings: tuple[str, ...] = ()
    approximated: tuple[str, ...] = ()
    left_float: tuple[tuple[str, str], ...] = ()
    history: tuple[Mapping[str, Any], ...] = ()
    best_epoch: int | None = None
    before: Mapping[str, int] | None = None
    after: Mapping[str, int] | None = None
    data: str = ""


@dataclass(frozen=True)
class _Facts:
    """What of a WeightInsight is no array; count: how many pairs it has."""

    name: str
    count: int
    has_relevances: bool
    correlation: float | None
    rule: str
    ecq_zeros: float


def observe(quantizer: Any) -> Insight:
    """quantizer: a Quantizer. Same quantizer, same pairs."""
    report, relevances, background = quantizer.report(), quantizer.relevances(), quantizer.background()
    weights = []
    for row, tensor in zip(report.tensors, quantizer.tensors(), strict=True):
        magnitude = np.abs(background[row.name].detach().cpu().float().numpy().reshape(-1))
        relevance = relevances.get(row.name)
        chosen = np.sort(np.random.RandomState(0).permutation(magnitude.size)[:PAIRS])
        R = None if relevance is None else relevance.detach().cpu().float().numpy().reshape(-1)
        weights.append(
            WeightInsight(
                row.name,
                np.minimum(magnitude[chosen], HIGHEST).astype(np.float16),
                np.zeros(0, np.float16) if R is None else R[chosen].astype(np.float16),
                tensor.levels.reshape(-1)[chosen].astype(np.int8),
                None if R is None else _correlation(magnitude, R),
                row.rule,
                row.ecq_zeros,
            )
        )
    return Insight(tuple(weights), report.warnings, tuple(report.approximated), tuple(report.left_float))


def _correlation(a: np.ndarray, b: np.ndarray) -> float | None:
    a, b = a.astype(np.float64) - a.mean(dtype=np.float64), b.astype(np.float64) - b.mean(dtype=np.float64)
    length = float(np.sqrt((a * a).sum() * (b * b).sum()))
    return float((a * b).sum() / length) if length > 0 else None


def to_document(insight: Insight) -> tuple[str, np.ndarray]:
    """(JSON, float16 [3, pairs]): rows |w|, R, level; R is 0 where a weight has none."""
    facts, columns = [], []
    for weight in insight.weights:
        count = len(weight.magnitudes)
        relevances = weight.relevances if len(weight.relevances) else np.zeros(count, np.float16)
        columns.append(np.stack([weight.magnitudes, relevances, weight.levels.astype(np.float16)]))
        has = bool(len(weight.relevances))
        facts.append(asdict(_Facts(weight.name, count, has, weight.correlation, weight.rule, weight.ecq_zeros)))
    rest = {name: getattr(insight, name) for name in _REST}
    pairs = np.concatenate([np.zeros((3, 0), np.float16), *columns], axis=1)
    return json.dumps({"weights": facts, **rest}, sort_keys=True), pairs


_REST = ("warnings", "approximated", "left_float", "history", "best_epoch", "before", "after", "data")


def from_document(text: str, pairs: np.ndarray) -> Insight:
    """The reverse. ValueError, TypeError or KeyError for what `to_document` does not write."""
    document = json.loads(text)
    if pairs.dtype != np.float16 or pairs.ndim != 2 or len(pairs) != 3 or pairs.shape[1] > MOST_PAIRS:
        raise ValueError(f"the pairs of |w| and relevance are {pairs.dtype} {pairs.shape}")
    weights, at = [], 0
    for entry in document["weights"]:
        facts = _Facts(**entry)
        magnitudes, relevances, levels = pairs[:, at : at + facts.count]
        at += facts.count
        if not np.isfinite(pairs[:, at - facts.count : at]).all() or np.abs(levels).max(initial=0) > 127:
            raise ValueError(f"the pairs of {facts.name!r} are no finite numbers and levels")
        found = relevances if facts.has_relevances else relevances[:0]
        correlation = None if facts.correlation is None else float(facts.correlation)
        weights.append(
            WeightInsight(
                str(facts.name), magnitudes, found, levels.astype(np.int8), correlation, str(facts.rule), float(facts.ecq_zeros)
            )
        )
    if at != pairs.shape[1] or len(document["history"]) > MOST_EPOCHS:
        raise ValueError("the pairs do not belong to the weights")
    history = tuple({key: None if value is None else float(value) for key, value in row.items()} for row in document["history"])
    return Insight(
        tuple(weights),
        tuple(map(str, document["warnings"])),
        tuple(map(str, document["approximated"])),
        tuple((str(name), str(reason)) for name, reason in document["left_float"]),
        history,
        None if document["best_epoch"] is None else int(document["best_epoch"]),
        _counts(document["before"]),
        _counts(document["after"]),
        str(document["data"]),
    )


def _counts(value: Any) -> dict[str, int] | None:
    if value is None:
        return None
    hits, total = int(value["hits"]), int(value["total"])
    if not 0 <= hits <= total or total == 0:
        raise ValueError(f"{hits} of {total} is no accuracy")
    return {"hits": hits, "total": total}
