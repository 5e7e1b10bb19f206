"""int8 levels -> units: (advance, value), which say how far the next level that isn't zero is, and what it is.

A tensor is walked from its last weight to its first, since a cursor that only moves down is an ONNX index as it is: it starts
behind the last weight, each unit moves it down by 1 to 128 weights, and its value is added there. What no unit names is zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

FURTHEST = 128  # weights that one unit can pass; advances are kept as int8, negated
RUNS = (1, 2, 4, 8, 16, 32, 64, 96, 128)  # advances that a unit of value 0 may have
NEAR = 8  # pairs that advance no further have kinds of their own to begin with
CONTEXTS = 3  # behind a negative level, a positive one, a run of zeros
UNIT_BITS = 60.0  # what a kind of unit must save. It costs 18, but is judged as if all others stayed: 60 give smaller files
NEVER = 1e9  # bits
ROUNDS = 4
MAX_KINDS = 255  # a byte names one; 0 is no unit
HIGHEST = 122  # |value|: the nearest of each value and the runs must all find a name


@dataclass(frozen=True, eq=False)
class Alphabet:
    """The kinds of units in use: advances int [kinds] in [1, 128], values int [kinds] in [-128, 127].

    Where there are several contexts, the kinds of the first precede those of the second. sizes: kinds of each context; counts:
    int [kinds], how often each is used. first: int [contexts, 128, 2 top + 1], for each advance - 1 and value + top the run that
    a pair begins with, an index of RUNS, or -1 where it is a kind of its own, that in `kind`. run_kind: [contexts, RUNS].
    """

    advances: np.ndarray
    values: np.ndarray
    sizes: tuple[int, ...]
    counts: np.ndarray
    first: np.ndarray
    kind: np.ndarray
    run_kind: np.ndarray


def walk(levels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """int8 levels in coding order -> distance of each level that isn't zero to the one before (int64, >= 1), and the levels."""
    reverse = np.ascontiguousarray(levels).reshape(-1)[::-1]
    where = np.flatnonzero(reverse)
    return np.diff(where, prepend=-1), reverse[where]


def pairs(distances: np.ndarray, values: np.ndarray, top: int) -> tuple[np.ndarray, np.ndarray]:
    """-> (whole runs of 128 zeros before, (rest - 1) * (2 top + 1) + value + top) of each level that isn't zero."""
    zeros = distances - 1  # a power of two divides ten times faster by a shift
    return zeros >> FURTHEST.bit_length() - 1, (zeros & FURTHEST - 1) * (2 * top + 1) + values + top


def behind(positive: np.ndarray, first: int) -> np.ndarray:
    """Context of each level, unless runs come before it, and of what follows: 0 behind a negative one, 1 behind a positive."""
    return np.concatenate([[first], positive])


def tally(runs: np.ndarray, pair: np.ndarray, positive: np.ndarray, top: int) -> tuple[np.ndarray, np.ndarray]:
    """What `pairs` gave -> counts of pairs [CONTEXTS, 128, 2 top + 1] and of whole runs [CONTEXTS], by context.

    The first pair is counted behind both signs, since what will precede it is not known.
    """
    shape = (CONTEXTS, FURTHEST, 2 * top + 1)
    context = np.concatenate([np.ones(len(pair[:1]), np.int64), behind(positive, 0)[:-1]])
    runs, pair = (np.concatenate([of[:1], of]) for of in (runs, pair))
    whole = np.zeros(CONTEXTS, np.int64)
    if runs.any():
        late = runs > 0
        whole = np.bincount(context[late], minlength=CONTEXTS)
        whole[-1] += int((runs[late] - 1).sum())
        context[late] = CONTEXTS - 1
    counts = np.bincount(pair + context * (shape[1] * shape[2]), minlength=shape[0] * shape[1] * shape[2])
    return counts.reshape(shape), whole


def room(contexts: int) -> int:
    """Kinds beside runs; of a context that nothing uses two leaves are fillers."""
    return MAX_KINDS - 2 * contexts - contexts * len(RUNS)


def choose_alphabets(tallies: Sequence[tuple[np.ndarray, np.ndarray]]) -> list[Alphabet]:
    """Of one stream, from the `tally` of each tensor: an alphabet of one context, and one of all if all units find a name."""
    counts, runs = (np.sum(of, axis=0) for of in zip(*tallies, strict=True))
    made = [choose_alphabet(counts.sum(axis=0, keepdims=True), runs.sum(keepdims=True))]
    if CONTEXTS * np.count_nonzero(counts.any(axis=(0, 1))) <= room(CONTEXTS):
        made.append(choose_alphabet(counts, runs))
    return made


def choose_alphabet(counts: np.ndarray, runs: np.ndarray) -> Alphabet:
    """counts: how often each pair occurs, see `tally`; runs: of 128 zeros beside, [contexts].

    A pair gets a kind of its own if that saves more than UNIT_BITS; the others are said as runs of zeros and a nearer pair.
    Behind a run it is the last context. To begin with, far pairs are said so: else what is said behind runs would seem rare.
    """
    used = np.flatnonzero(counts.any(axis=(0, 2)))
    if not len(used):
        none, nowhere = np.zeros(0, np.int64), np.full(counts.shape, -1)
        return Alphabet(none, none, (0,) * len(counts), none, nowhere, nowhere, np.full((len(counts), len(RUNS)), -1))
    table = counts[:, : used[-1] + 1].astype(np.float64)
    needed = np.asarray((table > 0).any(axis=1))  # the nearest of each value, which all others can be said with
    needed[-1] = needed.any(axis=0)
    rows = np.arange(table.shape[1])
    longest = np.where(rows < NEAR, -1, np.searchsorted(RUNS, rows, side="right") - 1)
    usage, run_usage = _count(table, np.broadcast_to(longest[:, None], table.shape), runs)
    member = usage > 0
    member[:, 0] |= needed
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
        first[:, 0] = first[:, :, ~needed[-1]] = -1
        usage, run_usage = _count(table, first, runs)
    return _alphabet(member & (usage > 0), first, usage, run_usage)


def _spell(bits: np.ndarray, run_bits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """bits: of each pair's own kind, NEVER where it has none. For each pair the fewest bits without that, NEVER in row 0, and the
    first step to them, an index of RUNS. [contexts, 128, values] each.

    Behind that step no run is counted on twice.
    """
    best = bits[-1].copy()  # in the context behind a run
    for run, own in zip(reversed(RUNS), run_bits[-1, ::-1], strict=True):
        best[run:] = np.minimum(best[run:], own + best[:-run])
    apart, step = np.full(bits.shape, NEVER), np.zeros(bits.shape, np.intp)
    for index, (run, own) in enumerate(zip(RUNS, run_bits.T, strict=True)):
        way = own[:, None, None] + best[:-run]
        better = way < apart[:, run:]
        apart[:, run:][better] = way[better]
        step[:, run:][better] = index
    return apart, step


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


def _alphabet(member: np.ndarray, first: np.ndarray, usage: np.ndarray, run_usage: np.ndarray) -> Alphabet:
    """Numbers the kinds: in each context the pairs, then the runs."""
    kind, run_kind = np.full(member.shape, -1), np.full(run_usage.shape, -1)
    advances, values, counts, sizes, done = [], [], [], [], 0
    for context, (own, own_runs) in enumerate(zip(member, run_usage > 0, strict=True)):
        rows, columns = np.nonzero(own)
        size = len(rows) + int(own_runs.sum())
        kind[context][own] = done + np.arange(len(rows))
        run_kind[context][own_runs] = done + np.arange(len(rows), size)
        advances += [rows + 1, np.array(RUNS)[own_runs]]
        values += [columns - member.shape[2] // 2, np.zeros(size - len(rows), np.int64)]
        counts += [usage[context][own], run_usage[context][own_runs]]
        sizes.append(size)
        done += size
    all_advances, all_values, all_counts = (np.concatenate(of) for of in (advances, values, counts))
    return Alphabet(all_advances, all_values, tuple(sizes), all_counts.astype(np.int64), first, kind, run_kind)


def spellings(alphabet: Alphabet) -> tuple[np.ndarray, np.ndarray]:
    """For each pair the kinds that say it, in order, -1 behind them: int [contexts, pairs, longest]; and how many these are."""
    context, rows, columns = (axis.reshape(len(alphabet.first), -1) for axis in np.indices(alphabet.first.shape))
    done, parts = np.zeros(rows.shape, bool), []
    while not done.all():
        step = alphabet.first[context, rows, columns]
        own = (step < 0) & ~done
        parts.append(np.where(done, -1, np.where(own, alphabet.kind[context, rows, columns], alphabet.run_kind[context, step])))
        rows = np.where(step < 0, rows, rows - np.array(RUNS)[step])
        context = np.where(step < 0, context, len(alphabet.first) - 1)
        done |= own
    return np.stack(parts, axis=-1), (np.array(parts) >= 0).sum(axis=0)


def kinds_of(
    runs: np.ndarray, pair: np.ndarray, context: np.ndarray, alphabet: Alphabet, said: tuple[np.ndarray, np.ndarray]
) -> np.ndarray:
    """What `pairs` gave, and the context of each (0 where there is but one) -> the kinds of the units that say it, in order.

    said: the alphabet's `spellings`.
    """
    spelling, lengths = said
    after = len(alphabet.sizes) - 1
    at = (np.where(runs > 0, after, context) if runs.any() else context) * spelling.shape[1] + pair
    count = lengths.reshape(-1)[at] + runs
    ends = np.cumsum(count)
    kinds = np.empty(int(ends[-1]) if len(ends) else 0, np.int64)
    begins = ends - count
    late = np.flatnonzero(runs)
    if len(late):  # whole runs, all but the first behind another
        long_run = alphabet.run_kind[:, -1]
        owner = np.repeat(late, runs[late])
        place = np.arange(len(owner)) - np.repeat(np.cumsum(runs[late]) - runs[late], runs[late])
        kinds[begins[owner] + place] = np.where(place == 0, long_run[context[owner]], long_run[after])
        begins = begins + runs
    flat = spelling.reshape(-1, spelling.shape[2])
    kinds[begins] = flat[at, 0]
    rest = np.arange(len(at))
    for place in range(1, flat.shape[1]):
        rest = rest[lengths.reshape(-1)[at[rest]] > place]
        kinds[begins[rest] + place] = flat[at[rest], place]
    return kinds
