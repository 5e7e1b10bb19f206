"""int8 levels -> units: (advance, value), which say how far the next level that isn't zero is, and what it is.

A tensor is walked from its last weight to its first, since a cursor that only moves down is an ONNX index as it is: it starts
behind the last weight, each unit moves it down by 1 to 128 weights, and its value is added there. What no unit names is zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

FURTHEST = 128  # weights that one unit can pass; advances are kept as int8, negated
RUNS = tuple(1 << power for power in range(8))  # advances that a unit of value 0 may have
LEVELS = 256
UNIT_BITS = 40.0  # what a kind of unit must save. It costs 18, but is judged as if all others stayed: 40 give smaller files
NEVER = 1e9  # bits
FIT = [np.array(RUNS[: row.bit_length()], int) for row in range(FURTHEST)]  # runs that a pair of advance row + 1 can begin with
ROUNDS = 4
MAX_KINDS = 255  # a byte names one; 0 is no unit
HIGHEST = 122  # |value|: the nearest of each value and the runs must all find a name


@dataclass(frozen=True, eq=False)
class Alphabet:
    """The kinds of units in use: advances int [kinds] in [1, 128], values int [kinds] in [-128, 127].

    Where there are two contexts, the kinds of the first precede those of the second. sizes: kinds of each context.
    spelling: int [contexts, 128 * 256, longest], for each (advance - 1) * 256 + value + 128 the kinds that say it, -1 where there
    are none. counts: int [kinds], how often each is used.
    """

    advances: np.ndarray
    values: np.ndarray
    sizes: tuple[int, ...]
    spelling: np.ndarray
    counts: np.ndarray


def walk(levels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """int8 levels in coding order -> distance of each level that isn't zero to the one before (int64, >= 1), and the levels."""
    reverse = np.ascontiguousarray(levels).reshape(-1)[::-1]
    where = np.flatnonzero(reverse)
    return np.diff(where, prepend=-1), reverse[where]


def pairs(distances: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """-> (whole runs of 128 zeros before, (rest - 1) * 256 + value + 128) of each level that isn't zero."""
    zeros = distances - 1  # a power of two divides ten times faster by a shift
    return zeros >> FURTHEST.bit_length() - 1, (zeros & FURTHEST - 1) * LEVELS + values + 128


def behind(pair: np.ndarray, first: int) -> np.ndarray:
    """Context of each pair, and of what follows: 0 behind a positive level, 1 behind a negative one. int [n + 1]."""
    return np.concatenate([[first], pair & 255 < 128])


def tally(runs: np.ndarray, pair: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What `pairs` gave -> counts of pairs [2, 128 * 256] and of whole runs [2] by context, which is 1 behind a run of zeros.

    The first pair is counted in both, since what will precede it is not known.
    """
    context, late = behind(pair, 1)[:-1], runs > 0
    context, late = (np.concatenate([of[:1], of]) for of in (context, late))
    context[:1] = 0
    counts = np.bincount(np.append(pair[:1], pair) + (context | late) * (FURTHEST * LEVELS), minlength=2 * FURTHEST * LEVELS)
    first = np.bincount(context[late], minlength=2)
    first[1] += int((runs[runs > 0] - 1).sum())
    return counts.reshape(2, -1), first


def room(contexts: int) -> int:
    """Kinds beside runs; two leaves of a context that nothing uses are fillers."""
    return MAX_KINDS - 2 - contexts * len(RUNS)


def choose_alphabets(tallies: Sequence[tuple[np.ndarray, np.ndarray]]) -> list[Alphabet]:
    """Of one stream, from the `tally` of each tensor: an alphabet of one context, and one of two if all units find a name."""
    counts, runs = (np.sum(of, axis=0) for of in zip(*tallies, strict=True))
    made = [choose_alphabet(counts.sum(axis=0, keepdims=True), runs.sum(keepdims=True))]
    if 2 * np.count_nonzero(counts.reshape(-1, LEVELS).any(axis=0)) <= room(2):
        made.append(choose_alphabet(counts, runs))
    return made


def choose_alphabet(counts: np.ndarray, runs: np.ndarray) -> Alphabet:
    """counts: how often each pair occurs, [contexts, 128 * 256]; runs: of 128 zeros beside, [contexts].

    A pair gets a kind of its own if that saves more than UNIT_BITS; the others are said as runs of zeros and a nearer pair.
    Behind a run it is the last context.
    """
    present = np.flatnonzero(counts.reshape(-1, LEVELS).any(axis=0))
    if not len(present):
        none = np.zeros(0, np.int64)
        return Alphabet(none, none, (0,) * len(counts), np.zeros((*counts.shape, 1), np.int64), none)
    used = np.flatnonzero(counts.reshape(-1, FURTHEST, LEVELS).any(axis=(0, 2)))
    table = counts.reshape(-1, FURTHEST, LEVELS)[:, : used[-1] + 1, present].astype(np.float64)  # [context, advance - 1, value]
    needed = np.asarray((table > 0).any(axis=1))  # the nearest of each value, which all others can be said with
    needed[-1] = True
    member = table > 0
    member[:, 0] |= needed
    usage, run_usage = table.copy(), np.ones((len(table), len(RUNS)))
    for _ in range(ROUNDS):
        total = np.log2(np.maximum(usage.sum(axis=(1, 2)) + run_usage.sum(axis=1), 1))
        often = np.where(member, usage, table)
        bits = total[:, None, None] - np.log2(np.maximum(often, 1))
        run_bits = total[:, None] - np.log2(np.maximum(run_usage, 1))
        apart, step = _spell(np.where(member, bits, NEVER), run_bits)
        gain = often * (apart - bits) - UNIT_BITS
        gain[:, 0][needed] = np.inf
        worth = np.argsort(-gain, axis=None, kind="stable")[: room(len(table))]
        member = np.zeros(gain.size, bool)
        member[worth] = True
        member = member.reshape(gain.shape) & (gain > 0)
        first = np.where(member & (bits <= apart), -1, step)
        first[:, 0] = -1
        usage, run_usage = _count(table, first, runs)
    return _alphabet(present - 128, member & (usage > 0), first, usage, run_usage)


def _spell(bits: np.ndarray, run_bits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """bits: of each pair's own kind, NEVER where it has none. For each pair the fewest bits without that, NEVER in row 0, and the
    first step to them, an index of RUNS. [contexts, 128, values] each."""
    best = bits[-1].copy()  # in the context behind a run
    for row in range(1, len(best)):
        fit = FIT[row]
        np.minimum(best[row], (run_bits[-1, : len(fit), None] + best[row - fit]).min(axis=0), out=best[row])
    ways = np.full((len(RUNS), *bits.shape), NEVER)
    for run, way, own in zip(RUNS, ways, run_bits.T, strict=True):
        way[:, run:] = own[:, None, None] + best[:-run]
    apart = ways.min(axis=0)
    return apart, ways.argmin(axis=0)


def _count(table: np.ndarray, first: np.ndarray, runs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How often each pair and each run is used as a kind of its own. first: each pair's step, -1 where it has such a kind."""
    usage, run_usage = table.copy(), np.zeros((len(table), len(RUNS)))
    run_usage[:, -1] = runs
    while True:  # each turn says one run of all pairs that have no kind of their own
        context, rows, columns = moved = np.nonzero((first >= 0) & (usage > 0))
        if not len(rows):
            return usage, run_usage
        amount, step = usage[moved], first[moved]
        usage[moved] = 0
        np.add.at(run_usage, (context, step), amount)
        np.add.at(usage[-1], (rows - np.array(RUNS)[step], columns), amount)


def _alphabet(present: np.ndarray, member: np.ndarray, first: np.ndarray, usage: np.ndarray, run_usage: np.ndarray) -> Alphabet:
    """Numbers the kinds: in each context the pairs, then the runs. present: the values."""
    kind, run_kind = np.full(member.shape, -1), np.full(run_usage.shape, -1)
    advances, values, counts, sizes, done = [], [], [], [], 0
    for context, (own, own_runs) in enumerate(zip(member, run_usage > 0, strict=True)):
        rows, columns = np.nonzero(own)
        size = len(rows) + int(own_runs.sum())
        kind[context][own] = done + np.arange(len(rows))
        run_kind[context][own_runs] = done + np.arange(len(rows), size)
        advances += [rows + 1, np.array(RUNS)[own_runs]]
        values += [present[columns], np.zeros(size - len(rows), np.int64)]
        counts += [usage[context][own], run_usage[context][own_runs]]
        sizes.append(size)
        done += size
    spelling = _spellings(first, kind, run_kind)
    full = np.full((len(member), FURTHEST, LEVELS, spelling.shape[-1]), -1, np.int16)
    full[:, : member.shape[1], present + 128] = spelling
    spelling = full.reshape(len(member), FURTHEST * LEVELS, -1)
    all_advances, all_values, all_counts = (np.concatenate(of) for of in (advances, values, counts))
    return Alphabet(all_advances, all_values, tuple(sizes), spelling, all_counts.astype(np.int64))


def _spellings(first: np.ndarray, kind: np.ndarray, run_kind: np.ndarray) -> np.ndarray:
    """[contexts, 128, values, longest]: the kinds that say each pair, in order, -1 behind them."""
    axes = np.indices(first.shape)
    context, rows, columns = axes[0], axes[1], axes[2]
    done, parts = np.zeros(first.shape, bool), []
    while not done.all():
        step = first[context, rows, columns]
        own = (step < 0) & ~done
        parts.append(np.where(done, -1, np.where(own, kind[context, rows, columns], run_kind[context, step])))
        rows = np.where(step < 0, rows, rows - np.array(RUNS)[step])
        context = np.where(step < 0, context, len(first) - 1)
        done |= own
    return np.stack(parts, axis=-1)


def kinds_of(runs: np.ndarray, pair: np.ndarray, context: np.ndarray, alphabet: Alphabet) -> np.ndarray:
    """What `pairs` gave, and the context of each (0 where there is but one) -> the kinds of the units that say it, in order."""
    after = len(alphabet.sizes) - 1
    spelled = alphabet.spelling[np.where(runs > 0, after, context), pair]
    if not runs.any():
        return spelled[spelled >= 0]
    lengths = (spelled >= 0).sum(axis=1) + runs
    owner = np.repeat(np.arange(len(pair)), lengths)
    place = np.arange(len(owner)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    long_run = np.full(after + 1, -1)
    found = np.flatnonzero((alphabet.advances == FURTHEST) & (alphabet.values == 0))
    long_run[np.searchsorted(np.cumsum(alphabet.sizes), found, side="right")] = found
    which = np.where(place == 0, context[owner], after)
    return np.where(place < runs[owner], long_run[which], spelled[owner, np.maximum(place - runs[owner], 0)])
