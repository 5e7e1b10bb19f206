"""Keep what a report shows of a training: samples of weights and relevances, and the history.

It is kept in the checkpoint, a few kilobytes a weight. Of each weight up to PAIRS entries are kept:
|w| of the full-precision background, relevance R, and the level that the entry got; the
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
    """A sample of one weight's entries, with what they became.

    Attributes:
        name: of the weight.
        magnitudes: float16 [n], |w| of the full-precision background.
        relevances: float16 [n], R in [0, 1]; empty where there is none.
        levels: int8 [n].
        correlation: Pearson's, of |w| and R over the whole weight; None without relevances or where
            either is constant.
        rule: where its relevance comes from.
        ecq_zeros: share of zeros in [0, 1] that plain ECQ would give.
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
    """What a report shows of one training.

    Attributes:
        weights: a sample of each quantized weight.
        warnings: sentences from the training.
        approximated: names of modules whose relevance is approximated.
        left_float: (name, reason) of weights that stay float.
        history: one dict per epoch, as training.EpochRecord has them.
        best_epoch: counted from 0; None where none was chosen.
        before: test accuracy of the float model, as "hits" and "total".
        after: test accuracy of the quantized model, likewise.
        data: name of the data set.
    """

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
    """Sample what a report shows of a quantizer's weights.

    Args:
        quantizer: a Quantizer, usually after training.

    Returns:
        An insight without history. The same quantizer gives the same entries.
    """
    report = quantizer.report()
    relevances = quantizer.relevances()
    background = quantizer.background()
    weights = []
    for row, tensor in zip(report.tensors, quantizer.tensors(), strict=True):
        magnitude = np.abs(background[row.name].detach().cpu().float().numpy().reshape(-1))
        relevance = relevances.get(row.name)
        # The same entries each time, in the weight's order.
        chosen = np.sort(np.random.RandomState(0).permutation(magnitude.size)[:PAIRS])
        sampled = np.zeros(0, np.float16)
        correlation = None
        if relevance is not None:
            R = relevance.detach().cpu().float().numpy().reshape(-1)
            sampled = R[chosen].astype(np.float16)
            correlation = _compute_correlation(magnitude, R)
        weights.append(
            WeightInsight(
                name=row.name,
                magnitudes=np.minimum(magnitude[chosen], HIGHEST).astype(np.float16),
                relevances=sampled,
                levels=tensor.levels.reshape(-1)[chosen].astype(np.int8),
                correlation=correlation,
                rule=row.rule,
                ecq_zeros=row.ecq_zeros,
            )
        )
    return Insight(
        tuple(weights), report.warnings, tuple(report.approximated), tuple(report.left_float)
    )


def _compute_correlation(a: np.ndarray, b: np.ndarray) -> float | None:
    """Pearson's r = sum(a' b') / sqrt(sum(a'^2) sum(b'^2)), a' and b' without their means.

    None where either is constant.
    """
    a = a.astype(np.float64) - a.mean(dtype=np.float64)
    b = b.astype(np.float64) - b.mean(dtype=np.float64)
    length = float(np.sqrt((a * a).sum() * (b * b).sum()))
    return float((a * b).sum() / length) if length > 0 else None


def to_document(insight: Insight) -> tuple[str, np.ndarray]:
    """Turn an insight into what a checkpoint stores.

    Args:
        insight: of a training.

    Returns:
        (JSON, float16 [3, entries]): rows |w|, R, level; R is 0 where a weight has none.
    """
    facts: list[dict[str, Any]] = []
    columns: list[np.ndarray] = []
    for weight in insight.weights:
        count = len(weight.magnitudes)
        relevances = weight.relevances if len(weight.relevances) else np.zeros(count, np.float16)
        columns.append(np.stack([weight.magnitudes, relevances, weight.levels.astype(np.float16)]))
        entry = _Facts(
            name=weight.name,
            count=count,
            has_relevances=bool(len(weight.relevances)),
            correlation=weight.correlation,
            rule=weight.rule,
            ecq_zeros=weight.ecq_zeros,
        )
        facts.append(asdict(entry))
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
    """Read an insight back: the reverse of `to_document`.

    Args:
        text: its JSON.
        pairs: its array.

    Returns:
        The insight; texts in it are printable.

    Raises:
        ValueError: for what `to_document` does not write.
    """
    document = parse_json(text, most_bytes=MOST_BYTES, most_items=MOST_ITEMS, with_nan=True)
    document = _read_fields(document, ("weights", *_REST))
    if (
        pairs.dtype != np.float16
        or pairs.ndim != 2
        or len(pairs) != 3
        or pairs.shape[1] > MOST_PAIRS
    ):
        raise ValueError(f"the pairs of |w| and relevance are {pairs.dtype} {pairs.shape}")
    weights: list[WeightInsight] = []
    at = 0  # the first pair of the next weight
    for entry in _read_items(document["weights"]):
        facts = _read_facts(entry)
        weights.append(_read_weight(facts, pairs[:, at : at + facts.count]))
        at += facts.count
    if at != pairs.shape[1] or len(_read_items(document["history"])) > MOST_EPOCHS:
        raise ValueError("the pairs do not belong to the weights")
    best = document["best_epoch"]
    return Insight(
        weights=tuple(weights),
        warnings=tuple(map(_read_text, _read_items(document["warnings"]))),
        approximated=tuple(map(_read_text, _read_items(document["approximated"]))),
        left_float=tuple(map(_read_reason, _read_items(document["left_float"]))),
        history=tuple(map(_read_epoch, _read_items(document["history"]))),
        best_epoch=None if best is None else _read_count(best),
        before=_read_counts(document["before"]),
        after=_read_counts(document["after"]),
        data=_read_text(document["data"]),
    )


def _read_facts(entry: Any) -> _Facts:
    entry = _read_fields(entry, [field.name for field in fields(_Facts)])
    if type(entry["has_relevances"]) is not bool:
        raise ValueError(f"has_relevances is {entry['has_relevances']!r:.40}")
    correlation = entry["correlation"]
    return _Facts(
        name=_read_text(entry["name"]),
        count=_read_count(entry["count"]),
        has_relevances=entry["has_relevances"],
        correlation=None if correlation is None else _read_number(correlation),
        rule=_read_text(entry["rule"]),
        ecq_zeros=_read_number(entry["ecq_zeros"]),
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
    if len(_read_items(pair)) != 2:
        raise ValueError("a weight that stays float has no reason")
    return _read_text(pair[0]), _read_text(pair[1])


def _read_epoch(row: Any) -> dict[str, float | None]:
    """training.EpochRecord's numbers; what later versions add is read as well."""
    if type(row) is not dict or len(row) > MOST_FIGURES:
        raise ValueError("an epoch of the history is no object of some numbers")
    figures = {}
    for name, value in row.items():
        figures[_read_text(name)] = None if value is None else _read_number(value)
    return figures


def _read_fields(value: Any, names: Iterable[str]) -> dict[str, Any]:
    if type(value) is not dict:
        raise ValueError(f"{type(value).__name__} where an object should be")
    for name in names:
        if name not in value:
            raise ValueError(f"{name!r} is missing")
    return value


def _read_items(value: Any) -> list[Any]:
    if type(value) is not list:
        raise ValueError(f"{type(value).__name__} where a list should be")
    return value


def _read_text(value: Any) -> str:
    """Control characters and lone surrogates become escapes: the text is for people."""
    if type(value) is not str or len(value) > LONGEST_TEXT:
        raise ValueError(f"{value!r:.40} is no text of at most {LONGEST_TEXT} characters")
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in value)


def _read_number(value: Any) -> float:
    if type(value) not in (int, float) or (type(value) is int and abs(value) >= 2**63):
        raise ValueError(f"{value!r:.40} is no number")
    return float(value)


def _read_count(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 2**31:
        raise ValueError(f"{value!r:.40} is no count")
    return value


def _read_counts(value: Any) -> dict[str, int] | None:
    if value is None:
        return None
    value = _read_fields(value, ("hits", "total"))
    hits = _read_count(value["hits"])
    total = _read_count(value["total"])
    if not 0 <= hits <= total or total == 0:
        raise ValueError(f"{hits} of {total} is no accuracy")
    return {"hits": hits, "total": total}
