"""Chooses the symbols of a stream, and spells every pair with them.

A byte names a symbol, so that a stream has at most 255. A pair that is frequent enough is a symbol
of its own; any other is spelled as runs of zeros (symbols of value 0) and a nearer pair that is
one. Enters: how often each pair occurs (symbols.py). Leaves: an `Alphabet`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ecqx_onnx_converters.storage.packed.alphabets.corrections import (
    choose_corrected,
    find_neighbor,
    merge_corrected,
)
from ecqx_onnx_converters.storage.packed.symbols import CONTEXTS, FURTHEST

RUNS = (1, 2, 4, 8, 16, 32, 64, 96, 128)  # advances that a symbol of value 0 may have
# Pairs that advance no further are symbols of their own to begin with: of a large file the first.
NEAR = (8, 16, 32)
# What a symbol of its own must save. It costs 18, but is judged as if all others stayed: 50 give
# smaller files.
SYMBOL_BITS = 50.0
NEVER = 1e9  # bits of what is not possible
ROUNDS = 4  # of choosing symbols by the bits that they took the round before
MAX_SYMBOLS = 255  # a byte names one; 0 is no symbol


@dataclass(frozen=True, eq=False)
class Alphabet:
    """The symbols of a stream, numbered by symbol id, and how each pair begins with one of them.

    Where there are several contexts, the symbols of the first precede those of the second.

    Attributes:
        advances: int [symbols] in [0, 128]; 0 for corrections.
        values: int [symbols] in [-128, 127].
        sizes: Number of symbols of each context.
        counts: int [symbols], how often each is used.
        places: int [n], pairs of all contexts: those that can be spelled.
        symbol_id: int [n or more], the first symbol of each; last, of corrections, which are no
            pairs.
        rest: int [n or more], the index in `symbol_id` of what remains once that symbol is emitted;
            -1 if nothing does.
    """

    advances: np.ndarray
    values: np.ndarray
    sizes: tuple[int, ...]
    counts: np.ndarray
    places: np.ndarray
    symbol_id: np.ndarray
    rest: np.ndarray


def choose_alphabets(tallies: Sequence[np.ndarray], near: int = NEAR[0]) -> list[Alphabet]:
    """Choose the symbols of one stream.

    Args:
        tallies: Of each tensor int [CONTEXTS, 128, values], see `count_pairs_by_context`.
        near: One of NEAR.

    Returns:
        An alphabet of one context; and one of all contexts, if all symbols that it needs find an
        id.
    """
    counts = np.sum(tallies, axis=0)
    alphabets = [_choose_single_context(counts.sum(axis=0, keepdims=True), near)]
    occurring = counts.any(axis=(0, 1))
    zero = counts.shape[2] // 2
    values = np.count_nonzero(np.delete(occurring, zero))
    if CONTEXTS * values <= _count_room(CONTEXTS):
        alphabets.append(_choose_alphabet(counts, near, _count_room(CONTEXTS)))
    return alphabets


def _count_room(contexts: int) -> int:
    """Symbols beside the runs; of a context that nothing uses, two leaves are fillers."""
    return MAX_SYMBOLS - 2 * contexts - contexts * len(RUNS)


MOST_VALUES = _count_room(1)  # of a stream without corrections


def _choose_single_context(counts: np.ndarray, near: int) -> Alphabet:
    """The alphabet of one context, int [1, 128, values], with corrections where they are needed."""
    by_value = counts.sum(axis=(0, 1))
    by_value[len(by_value) // 2] = 0
    corrected = choose_corrected(by_value, MOST_VALUES)
    if not len(corrected):
        return _choose_alphabet(counts, near, MOST_VALUES)
    room = MOST_VALUES - len(np.unique(np.sign(corrected)))
    merged = _choose_alphabet(merge_corrected(counts, corrected), near, room)
    return _add_corrections(merged, corrected, by_value)


def _add_corrections(alphabet: Alphabet, corrected: np.ndarray, by_value: np.ndarray) -> Alphabet:
    """The alphabet of one context, with spellings for all pairs of corrected values.

    corrected: see `choose_corrected`; by_value: int [2 top + 1], how often each value occurs.
    """
    columns = len(by_value)
    top = columns // 2
    advances = alphabet.places // columns
    values = alphabet.places % columns - top
    # 1. A symbol for each sign, behind all others.
    signs, sign_of = np.unique(np.sign(corrected), return_inverse=True)
    counts = np.bincount(sign_of, by_value[corrected + top]).astype(np.int64)
    # 2. Each pair of a corrected value is spelled as its neighbor's, and ends with that symbol.
    pairs = len(alphabet.places)
    likes = [np.flatnonzero(values == find_neighbor(value)) for value in corrected.tolist()]
    end = pairs + sum(len(like) for like in likes)
    places = [alphabet.places]
    symbol_ids = [alphabet.symbol_id]
    rests = [alphabet.rest]
    begin = pairs
    for value, sign, like in zip(corrected, sign_of, likes, strict=True):
        copy_of = np.full(pairs, -1)
        copy_of[like] = begin + np.arange(len(like))
        rest = alphabet.rest[like]
        places.append(advances[like] * columns + value + top)
        symbol_ids.append(alphabet.symbol_id[like])
        rests.append(np.where(rest < 0, end + sign, copy_of[rest]))
        begin += len(like)
    symbols = len(alphabet.counts)
    symbol_ids.append(symbols + np.arange(len(signs)))
    rests.append(np.full(len(signs), -1))
    return Alphabet(
        advances=np.append(alphabet.advances, np.zeros(len(signs), np.int64)),
        values=np.append(alphabet.values, signs),
        sizes=(symbols + len(signs),),
        counts=np.append(alphabet.counts, counts),
        places=np.concatenate(places),
        symbol_id=np.concatenate(symbol_ids),
        rest=np.concatenate(rests),
    )


def _choose_alphabet(counts: np.ndarray, near: int, room: int) -> Alphabet:
    """One alphabet, from how often each pair occurs: int [contexts, 128, values].

    room: for how many pairs there are symbols.

    A pair gets a symbol of its own if that saves more than SYMBOL_BITS; the others are spelled as
    runs of zeros and a nearer pair. Behind a run it is the last context. To begin with, far pairs
    are spelled so: else what follows runs would seem rare.
    """
    contexts, _, columns = counts.shape
    # 1. Whole runs of 128 zeros are counted apart from the pairs that end in a level.
    table = counts.astype(np.float64)
    runs = np.zeros((contexts, len(RUNS)))
    runs[:, -1] = table[:, -1, columns // 2]
    table[:, -1, columns // 2] = 0
    # 2. The pairs that occur, and those that remain behind a run: all nearer ones, last context.
    possible = table > 0
    anywhere = possible.max(axis=0)
    possible[-1] |= np.maximum.accumulate(anywhere[::-1])[::-1]
    context, row, column = np.nonzero(possible)
    table = table[possible]
    # 3. For each run and each pair the pair that remains; len(row) where the run is too long.
    begin = int(context.searchsorted(contexts - 1))  # of the last context
    left = np.full((FURTHEST + 1, columns), len(row))
    left[row[begin:], column[begin:]] = np.arange(begin, len(row))
    behind_run = left[np.maximum(row - np.array(RUNS)[:, None], -1), column]  # [runs, pairs]
    # 4. The first spelling: near pairs are symbols, far ones begin with the longest run that fits.
    nearest = row == 0  # what all others can be spelled with
    longest = np.searchsorted(RUNS, row, side="right") - 1
    first = np.where(row < near, -1, longest)
    usage, run_usage = _count_usage(table, context, first, behind_run, runs)
    member = (usage > 0) | nearest
    for _ in range(ROUNDS):
        # 5. Information content of each symbol, -log2 of its share in its context.
        used = np.bincount(context, usage, contexts) + run_usage.sum(axis=1)
        total = np.log2(np.maximum(used, 1))
        often = np.where(member, usage, table)
        bits = total[context] - np.log2(np.maximum(often, 1))
        run_bits = total[:, None] - np.log2(np.maximum(run_usage, 1))
        # 6. Symbols stay or become what saves enough against the best spelling without them.
        own_bits = np.where(member, bits, NEVER)
        apart, step = _find_spelling(own_bits, run_bits, context, behind_run, begin)
        gain = np.where(nearest, np.inf, often * (apart - bits) - SYMBOL_BITS)
        member = gain > 0
        if np.count_nonzero(member) > room:
            least = np.argsort(-gain, kind="stable")[room:]
            member[least] = False
        # 7. Everything is spelled anew with these.
        first = np.where(nearest | member & (bits <= apart), -1, step)
        usage, run_usage = _count_usage(table, context, first, behind_run, runs)
    return _make_alphabet(counts.shape, (context, row, column), first, behind_run, usage, run_usage)


def _find_spelling(
    bits: np.ndarray, run_bits: np.ndarray, context: np.ndarray, behind_run: np.ndarray, begin: int
) -> tuple[np.ndarray, np.ndarray]:
    """The cheapest spelling of each pair that begins with a run.

    bits: of each pair's own symbol, NEVER where it has none; behind_run, begin: see
    `_choose_alphabet`. Gives the bits, NEVER or more where no run can precede the pair, and the
    first run, an index of RUNS. Behind that run, runs are considered from the longest to the
    shortest, each once.
    """
    best = np.append(bits, NEVER)
    for own, there in zip(run_bits[-1, ::-1], behind_run[::-1, begin:], strict=True):
        best[begin:-1] = np.minimum(best[begin:-1], own + best[there])
    candidates = run_bits.T[:, context] + best[behind_run]
    return candidates.min(axis=0), candidates.argmin(axis=0)


def _count_usage(
    table: np.ndarray,
    context: np.ndarray,
    first: np.ndarray,
    behind_run: np.ndarray,
    runs: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """How often each pair and each run is emitted as a symbol.

    table: how often each pair occurs; runs: whole runs beside; first: of each pair an index of
    RUNS, -1 where it is a symbol of its own; behind_run: see `_choose_alphabet`.
    """
    moved = np.flatnonzero((first >= 0) & (table > 0))
    amount = table[moved]
    usage = table.copy()
    usage[moved] = 0
    run_usage = runs.copy()
    while len(moved):  # each turn emits one run of all pairs that are no symbols of their own
        step = first[moved]
        emitted = np.bincount(context[moved] * len(RUNS) + step, amount, runs.size)
        run_usage += emitted.reshape(runs.shape)
        moved = behind_run[step, moved]
        named = first[moved] < 0
        usage += np.bincount(moved[named], amount[named], len(usage))
        moved = moved[~named]
        amount = amount[~named]
    return usage, run_usage


def _make_alphabet(
    shape: tuple[int, ...],
    where: tuple[np.ndarray, np.ndarray, np.ndarray],
    first: np.ndarray,
    behind_run: np.ndarray,
    usage: np.ndarray,
    run_usage: np.ndarray,
) -> Alphabet:
    """Numbers the symbols: in each context the pairs, then the runs.

    where: context, row and column in `shape` of each pair.
    """
    context, row, column = where
    zero = shape[2] // 2  # the column of value 0
    # 1. Symbols are the pairs and runs that are used, in the order of their contexts.
    own = np.flatnonzero(usage)
    run_context, run = np.nonzero(run_usage)
    symbol_context = np.concatenate([context[own], run_context])
    order = np.argsort(symbol_context, kind="stable")
    advances = np.concatenate([row[own] + 1, np.array(RUNS)[run]])
    values = np.concatenate([column[own] - zero, np.zeros(len(run), np.int64)])
    counts = np.concatenate([usage[own], run_usage[run_context, run]])
    sizes = np.bincount(symbol_context, minlength=shape[0])
    # 2. Ids: the position in that order.
    ids = np.empty(len(order), np.int64)
    ids[order] = np.arange(len(order))
    symbol_id = np.zeros(len(first), np.int64)
    symbol_id[own] = ids[: len(own)]
    run_symbol_id = np.zeros(run_usage.shape, np.int64)
    run_symbol_id[run_context, run] = ids[len(own) :]
    # 3. The first symbol of each pair, and the pair that remains behind it.
    begun = np.where(first < 0, symbol_id, run_symbol_id[context, first])
    left = np.where(first < 0, -1, behind_run[first, np.arange(len(first))])
    places = np.ravel_multi_index((*where,), shape)
    # 4. Whole runs of 128 zeros are pairs too, and leave nothing.
    whole = np.flatnonzero(run_usage[:, -1])
    last_row = np.full(len(whole), shape[1] - 1)
    middle = np.full(len(whole), zero)
    wholes = np.ravel_multi_index((whole, last_row, middle), shape)
    return Alphabet(
        advances=advances[order],
        values=values[order],
        sizes=tuple(sizes.tolist()),
        counts=counts[order].astype(np.int64),
        places=np.concatenate([places, wholes]),
        symbol_id=np.concatenate([begun, run_symbol_id[whole, -1]]),
        rest=np.concatenate([left, np.full(len(whole), -1)]),
    )
