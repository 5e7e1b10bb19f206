"""int8 levels -> symbol_ids: (advance, value), which say how far the next level that isn't zero is, and what it is.

A tensor is walked from its last weight to its first, since a cursor that only moves down is an ONNX index as it is: it starts
behind the last weight, each unit moves it down by 1 to 128 weights, and its value is added there. What no unit names is zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

FURTHEST = 128  # weights that one unit can pass; advances are kept as int8, negated
RUNS = (1, 2, 4, 8, 16, 32, 64, 96, 128)  # advances that a unit of value 0 may have
NEAR = (
    8,
    16,
    32,
)  # pairs that advance no further have kinds of their own to begin with: of a large file the first
CONTEXTS = 3  # behind a negative level, a positive one, a run of zeros
SYMBOL_BITS = 50.0  # what a kind of unit must save. It costs 18, but is judged as if all others stayed: 50 give smaller files
NEVER = 1e9  # bits
ROUNDS = 4
MAX_SYMBOLS = 255  # a byte names one; 0 is no unit
HIGHEST = 122  # |value|: the nearest of each value and the runs must all find a name


@dataclass(frozen=True, eq=False)
class Alphabet:
    """The kinds of units in use: advances int [kinds] in [1, 128], values int [kinds] in [-128, 127].

    Where there are several contexts, the kinds of the first precede those of the second. sizes: kinds of each context; counts:
    int [kinds], how often each is used. places: int [n], what can be said, as context * pairs of a context + pair, see
    `walk_levels`;
    kind: int [n], of the unit that each begins with; rest: int [n], index of the place that is left to say then, or -1.
    """

    advances: np.ndarray
    values: np.ndarray
    sizes: tuple[int, ...]
    counts: np.ndarray
    places: np.ndarray
    symbol_id: np.ndarray
    rest: np.ndarray


def walk_levels(levels: np.ndarray, top: int) -> np.ndarray:
    """int8 levels in coding order -> int64 pairs (distance - 1) * (2 top + 1) + value + top: each level that isn't zero and its
    distance to the one before, behind a pair of distance 128 and value 0 for each 128 zeros between them."""
    flat = np.ascontiguousarray(levels).reshape(-1)
    where = np.flatnonzero(flat != 0)
    pair = np.diff(where, append=flat.size)
    pair -= 1  # zeros behind each level
    far = np.flatnonzero(pair >= FURTHEST)
    runs, pair[far] = np.divmod(pair[far], FURTHEST)
    pair *= 2 * top + 1
    pair += flat.take(where)
    pair += top
    if len(far):
        pair = np.insert(pair, np.repeat(far + 1, runs), find_whole_run(top))
    return pair[::-1]


def count_pairs(top: int) -> int:
    """Pairs of a context."""
    return FURTHEST * (2 * top + 1)


def find_whole_run(top: int) -> int:
    """The pair that says 128 zeros."""
    return count_pairs(top) - 1 - top


@cache
def find_contexts(top: int) -> np.ndarray:
    """Of what follows each pair: 0 behind a negative level, 1 behind a positive one, 2 behind a run of zeros."""
    return np.tile(np.repeat([0, 2, 1], [top, 1, top]), FURTHEST)


def add_contexts(pair: np.ndarray, top: int) -> np.ndarray:
    """See `walk_levels` -> pairs of all contexts: those of the first, of the second, of the third; the first pair is of the
    first."""
    encoded = pair.copy()
    encoded[1:] += (find_contexts(top) * count_pairs(top))[pair[:-1]]
    return encoded


def count_pairs_by_context(encoded: np.ndarray, top: int) -> np.ndarray:
    """How often each pair occurs in each context: [CONTEXTS, 128, 2 top + 1].

    The first pair is counted behind both signs, since what will precede it is not known.
    """
    counts = np.bincount(encoded, minlength=CONTEXTS * count_pairs(top))
    counts[encoded[:1] + count_pairs(top)] += 1
    return counts.reshape(CONTEXTS, FURTHEST, -1)


def count_room(contexts: int) -> int:
    """Kinds beside runs; of a context that nothing uses two leaves are fillers."""
    return MAX_SYMBOLS - 2 * contexts - contexts * len(RUNS)


def choose_alphabets(tallies: Sequence[np.ndarray], near: int = NEAR[0]) -> list[Alphabet]:
    """Of one stream, from the `count_pairs_by_context` of each tensor: an alphabet of one context, and one of all if all units
    find a name."""
    counts = np.sum(tallies, axis=0)
    made = [choose_alphabet(counts.sum(axis=0, keepdims=True), near)]
    values = np.count_nonzero(np.delete(counts.any(axis=(0, 1)), counts.shape[2] // 2))
    if CONTEXTS * values <= count_room(CONTEXTS):
        made.append(choose_alphabet(counts, near))
    return made


def choose_alphabet(counts: np.ndarray, near: int) -> Alphabet:
    """counts: how often each pair occurs, [contexts, 128, values], see `count_pairs_by_context`; near: one of NEAR.

    A pair gets a kind of its own if that saves more than UNIT_BITS; the others are said as runs of zeros and a nearer pair.
    Behind a run it is the last context. To begin with, far pairs are said so: else what is said behind runs would seem rare.
    """
    contexts, _, columns = counts.shape
    table, runs = counts.astype(np.float64), np.zeros((contexts, len(RUNS)))
    runs[:, -1] = table[:, -1, columns // 2]
    table[:, -1, columns // 2] = 0
    possible = table > 0
    possible[-1] |= np.maximum.accumulate(possible.max(axis=0)[::-1])[
        ::-1
    ]  # whatever runs may lead to
    context, row, column = np.nonzero(possible)
    table = table[possible]
    begin = int(context.searchsorted(contexts - 1))  # of the last context
    left = np.full(
        (FURTHEST + 1, columns), len(row)
    )  # by row and column, the place there in the last context
    left[row[begin:], column[begin:]] = np.arange(begin, len(row))
    behind_run = left[
        np.maximum(row - np.array(RUNS)[:, None], -1), column
    ]  # [runs, places]; len(row) where too long

    nearest = row == 0  # what all others can be said with
    longest = np.searchsorted(RUNS, row, side="right") - 1
    first = np.where(row < near, -1, longest)
    usage, run_usage = count_usage(table, context, first, behind_run, runs)
    member = (usage > 0) | nearest
    for _ in range(ROUNDS):
        total = np.log2(
            np.maximum(np.bincount(context, usage, contexts) + run_usage.sum(axis=1), 1)
        )
        often = np.where(member, usage, table)
        bits = total[context] - np.log2(np.maximum(often, 1))
        run_bits = total[:, None] - np.log2(np.maximum(run_usage, 1))
        apart, step = find_spelling(
            np.where(member, bits, NEVER), run_bits, context, behind_run, begin
        )
        gain = np.where(nearest, np.inf, often * (apart - bits) - SYMBOL_BITS)
        member = gain > 0
        if np.count_nonzero(member) > count_room(contexts):
            member[np.argsort(-gain, kind="stable")[count_room(contexts) :]] = False
        first = np.where(nearest | member & (bits <= apart), -1, step)
        usage, run_usage = count_usage(table, context, first, behind_run, runs)
    return make_alphabet(counts.shape, (context, row, column), first, behind_run, usage, run_usage)


def find_spelling(
    bits: np.ndarray, run_bits: np.ndarray, context: np.ndarray, behind_run: np.ndarray, begin: int
) -> tuple[np.ndarray, np.ndarray]:
    """bits: of each pair's own kind, NEVER where it has none. For each pair the fewest bits without that, NEVER or more where
    no run can precede it, and the first step to them, an index of RUNS. behind_run, begin: see `choose_alphabet`.

    Behind that step no run is counted on twice.
    """
    best = np.append(bits, NEVER)
    for own, there in zip(run_bits[-1, ::-1], behind_run[::-1, begin:], strict=True):
        best[begin:-1] = np.minimum(best[begin:-1], own + best[there])
    candidates = run_bits.T[:, context] + best[behind_run]
    return candidates.min(axis=0), candidates.argmin(axis=0)


def count_usage(
    table: np.ndarray,
    context: np.ndarray,
    first: np.ndarray,
    behind_run: np.ndarray,
    runs: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """How often each pair and each run is used as a kind of its own. table: how often each pair occurs; runs: whole ones beside;
    first: of each pair an index of RUNS, -1 where it has a kind of its own; behind_run: see `choose_alphabet`."""
    moved = np.flatnonzero((first >= 0) & (table > 0))
    usage, run_usage, amount = table.copy(), runs.copy(), table[moved]
    usage[moved] = 0
    while len(moved):  # each turn says one run of all pairs that have no kind of their own
        step = first[moved]
        run_usage += np.bincount(context[moved] * len(RUNS) + step, amount, runs.size).reshape(
            runs.shape
        )
        moved = behind_run[step, moved]
        named = first[moved] < 0
        usage += np.bincount(moved[named], amount[named], len(usage))
        moved, amount = moved[~named], amount[~named]
    return usage, run_usage


def make_alphabet(
    shape: tuple[int, ...],
    where: tuple[np.ndarray, np.ndarray, np.ndarray],
    first: np.ndarray,
    behind_run: np.ndarray,
    usage: np.ndarray,
    run_usage: np.ndarray,
) -> Alphabet:
    """Numbers the symbol_ids: in each context the pairs, then the runs. where: context, row and column in `shape` of each
    place."""
    context, row, column = where
    own = np.flatnonzero(usage)
    of, step = np.nonzero(run_usage)
    order = np.argsort(np.concatenate([context[own], of]), kind="stable")
    name = np.empty(len(order), np.int64)
    name[order] = np.arange(len(order))
    symbol_id, run_symbol_id = np.zeros(len(first), np.int64), np.zeros(run_usage.shape, np.int64)
    symbol_id[own] = name[: len(own)]
    run_symbol_id[of, step] = name[len(own) :]
    begun = np.where(first < 0, symbol_id, run_symbol_id[context, first])
    left = np.where(first < 0, -1, behind_run[first, np.arange(len(first))])
    whole = np.flatnonzero(run_usage[:, -1])  # contexts in which 128 zeros are said
    places = np.ravel_multi_index((*where,), shape)
    wholes = np.ravel_multi_index(
        (whole, np.full(len(whole), shape[1] - 1), np.full(len(whole), shape[2] // 2)), shape
    )
    return Alphabet(
        np.concatenate([row[own] + 1, np.array(RUNS)[step]])[order],
        np.concatenate([column[own] - shape[2] // 2, np.zeros(len(step), np.int64)])[order],
        tuple(np.bincount(np.concatenate([context[own], of]), minlength=shape[0]).tolist()),
        np.concatenate([usage[own], run_usage[of, step]])[order].astype(np.int64),
        np.concatenate([places, wholes]),
        np.concatenate([begun, run_symbol_id[whole, -1]]),
        np.concatenate([left, np.full(len(whole), -1)]),
    )


def list_spellings(alphabet: Alphabet, top: int) -> tuple[np.ndarray, np.ndarray]:
    """For each pair of all contexts the kinds that say it, in order: int [longest, pairs]; and how many these are.

    An alphabet of one context says those of all alike.
    """
    pairs = len(alphabet.sizes) * count_pairs(top)
    parts, lengths = list[np.ndarray](), np.zeros(pairs, np.int64)
    at, places = np.arange(len(alphabet.places)), alphabet.places
    while len(at):
        parts.append(np.zeros(pairs, np.int64))
        parts[-1][places] = alphabet.symbol_id[at]
        lengths[places] += 1
        on = np.flatnonzero(alphabet.rest[at] >= 0)
        at, places = alphabet.rest[at[on]], places[on]
    alike = CONTEXTS // len(alphabet.sizes)
    return np.tile(parts or [lengths], alike), np.tile(lengths, alike)


def spell_pairs(encoded: np.ndarray, spelling: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """encoded: pairs of all contexts; spelling, lengths: see `list_spellings`. -> the units that say them."""
    count = lengths[encoded]
    ends = np.cumsum(count)
    begins = ends - count
    symbols = np.empty(int(ends[-1]) if len(ends) else 0, spelling.dtype)
    symbols[begins] = spelling[0][encoded]
    longer = np.flatnonzero(count > 1)
    for place in range(1, len(spelling)):
        symbols[begins[longer] + place] = spelling[place][encoded[longer]]
        longer = longer[count[longer] > place + 1]
    return symbols
