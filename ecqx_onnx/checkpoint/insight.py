"""(a Quantizer after training, its history) -> what a report needs of it: kept in the checkpoint, a few kilobytes a weight.

Of each weight up to PAIRS entries are kept: |w| of the full-precision background, relevance R, and the level that it got; the
correlation of |w| and R is over all entries.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np

from ecqx_onnx.inputs.bounded_json import parse_json

PAIRS = 400
HIGHEST = np.float32(np.finfo(np.float16).max)
MOST_PAIRS = 100_000  # of a file, over all weights: ours has PAIRS a weight
MOST_EPOCHS = 100_000
MOST_FIGURES = 100  # of one epoch
MOST_BYTES = 64 * 1024 * 1024  # of the JSON; an epoch takes some 200
MOST_ITEMS = 2_000_000
LONGEST_TEXT = 10_000


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
    report, relevances, background = (
        quantizer.report(),
        quantizer.relevances(),
        quantizer.background(),
    )
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
                None if R is None else compute_correlation(magnitude, R),
                row.rule,
                row.ecq_zeros,
            )
        )
    return Insight(
        tuple(weights), report.warnings, tuple(report.approximated), tuple(report.left_float)
    )


def compute_correlation(a: np.ndarray, b: np.ndarray) -> float | None:
    a, b = (
        a.astype(np.float64) - a.mean(dtype=np.float64),
        b.astype(np.float64) - b.mean(dtype=np.float64),
    )
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
        facts.append(
            asdict(
                _Facts(weight.name, count, has, weight.correlation, weight.rule, weight.ecq_zeros)
            )
        )
    rest = {name: getattr(insight, name) for name in _REST}
    pairs = np.concatenate([np.zeros((3, 0), np.float16), *columns], axis=1)
    return json.dumps({"weights": facts, **rest}, sort_keys=True), pairs


_REST = (
    "warnings",
    "approximated",
    "left_float",
    "history",
    "best_epoch",
    "before",
    "after",
    "data",
)


def from_document(text: str, pairs: np.ndarray) -> Insight:
    """The reverse of `to_document`.

    Args:
        text: its JSON.
        pairs: its array.

    Raises:
        ValueError: for what `to_document` does not write.
    """
    document = parse_json(text, most_bytes=MOST_BYTES, most_items=MOST_ITEMS, with_nan=True)
    document = read_fields(document, ("weights", *_REST))
    if (
        pairs.dtype != np.float16
        or pairs.ndim != 2
        or len(pairs) != 3
        or pairs.shape[1] > MOST_PAIRS
    ):
        raise ValueError(f"the pairs of |w| and relevance are {pairs.dtype} {pairs.shape}")
    weights, at = [], 0
    for entry in read_items(document["weights"]):
        facts = _read_facts(entry)
        weights.append(_read_weight(facts, pairs[:, at : at + facts.count]))
        at += facts.count
    if at != pairs.shape[1] or len(read_items(document["history"])) > MOST_EPOCHS:
        raise ValueError("the pairs do not belong to the weights")
    best = document["best_epoch"]
    return Insight(
        tuple(weights),
        tuple(read_text(warning) for warning in read_items(document["warnings"])),
        tuple(read_text(name) for name in read_items(document["approximated"])),
        tuple(_read_reason(pair) for pair in read_items(document["left_float"])),
        tuple(_read_epoch(row) for row in read_items(document["history"])),
        None if best is None else _count(best),
        read_counts(document["before"]),
        read_counts(document["after"]),
        read_text(document["data"]),
    )


def _read_facts(entry: Any) -> _Facts:
    entry = read_fields(entry, [field.name for field in fields(_Facts)])
    if type(entry["has_relevances"]) is not bool:
        raise ValueError(f"has_relevances is {entry['has_relevances']!r:.40}")
    correlation = entry["correlation"]
    return _Facts(
        name=read_text(entry["name"]),
        count=_count(entry["count"]),
        has_relevances=entry["has_relevances"],
        correlation=None if correlation is None else _number(correlation),
        rule=read_text(entry["rule"]),
        ecq_zeros=_number(entry["ecq_zeros"]),
    )


def _read_weight(facts: _Facts, pairs: np.ndarray) -> WeightInsight:
    if pairs.shape[1] != facts.count:
        raise ValueError("the pairs do not belong to the weights")
    magnitudes, relevances, levels = pairs
    if not np.isfinite(pairs).all() or np.abs(levels).max(initial=0) > 127:
        raise ValueError(f"the pairs of {facts.name!r} are no finite numbers and levels")
    return WeightInsight(
        facts.name,
        magnitudes,
        relevances if facts.has_relevances else relevances[:0],
        levels.astype(np.int8),
        facts.correlation,
        facts.rule,
        facts.ecq_zeros,
    )


def _read_reason(pair: Any) -> tuple[str, str]:
    if len(read_items(pair)) != 2:
        raise ValueError("a weight that stays float has no reason")
    return read_text(pair[0]), read_text(pair[1])


def _read_epoch(row: Any) -> dict[str, float | None]:
    """training.EpochRecord's numbers; what later versions add is read as well."""
    if type(row) is not dict or len(row) > MOST_FIGURES:
        raise ValueError("an epoch of the history is no object of some numbers")
    return {
        read_text(name): None if value is None else _number(value) for name, value in row.items()
    }


def read_fields(value: Any, names: Iterable[str]) -> dict[str, Any]:
    if type(value) is not dict:
        raise ValueError(f"{type(value).__name__} where an object should be")
    for name in names:
        if name not in value:
            raise ValueError(f"{name!r} is missing")
    return value


def read_items(value: Any) -> list[Any]:
    if type(value) is not list:
        raise ValueError(f"{type(value).__name__} where a list should be")
    return value


def read_text(value: Any) -> str:
    """Control characters and lone surrogates become escapes: the text is for people."""
    if type(value) is not str or len(value) > LONGEST_TEXT:
        raise ValueError(f"{value!r:.40} is no text of at most {LONGEST_TEXT} characters")
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in value)


def _number(value: Any) -> float:
    if type(value) not in (int, float) or (type(value) is int and abs(value) >= 2**63):
        raise ValueError(f"{value!r:.40} is no number")
    return float(value)


def _count(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 2**31:
        raise ValueError(f"{value!r:.40} is no count")
    return value


def read_counts(value: Any) -> dict[str, int] | None:
    if value is None:
        return None
    value = read_fields(value, ("hits", "total"))
    hits, total = _count(value["hits"]), _count(value["total"])
    if not 0 <= hits <= total or total == 0:
        raise ValueError(f"{hits} of {total} is no accuracy")
    return {"hits": hits, "total": total}
