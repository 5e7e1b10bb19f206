"""int8 levels -> units: (advance, value), which say how far the next level that isn't zero is, and what it is.

A tensor is walked from its last weight to its first, since a cursor that only moves down is an ONNX index as it is: it starts
behind the last weight, each unit moves it down by 1 to 128 weights, and its value is added there. What no unit names is zero.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

FURTHEST = 128  # weights that one unit can pass; advances are kept as int8, negated
RUNS = tuple(1 << power for power in range(8))  # advances that a unit of value 0 may have
LEVELS = 256
UNIT_BITS = 18.0  # what one more kind of unit costs in the file: its advance, its value, its two bits of the tree
ROUNDS = 4
MAX_KINDS = 255  # a byte names one; 0 is no unit
HIGHEST = 123  # |value|: the nearest of each value and the runs must all find a name


@dataclass(frozen=True, eq=False)
class Alphabet:
    """The kinds of units in use: advances int [kinds] in [1, 128], values int [kinds] in [-128, 127].

    spelling: int [128 * 256, longest], for each (advance - 1) * 256 + value + 128 the kinds that say it, -1 where there are none.
    """

    advances: np.ndarray
    values: np.ndarray
    spelling: np.ndarray


def walk(levels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """int8 levels in coding order -> distance of each level that isn't zero to the one before (int64, >= 1), and the levels."""
    reverse = np.ascontiguousarray(levels).reshape(-1)[::-1]
    where = np.flatnonzero(reverse)
    return np.diff(where, prepend=-1), reverse[where]


def pairs(distances: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """-> (whole runs of 128 zeros before, (rest - 1) * 256 + value + 128) of each level that isn't zero."""
    runs, rest = np.divmod(distances - 1, FURTHEST)
    return runs, rest * LEVELS + values + 128


def choose_alphabet(counts: np.ndarray, runs: int) -> Alphabet:
    """counts: how often each pair occurs, [128 * 256]; runs: of 128 zeros beside.

    A pair gets a kind of its own if that saves more than UNIT_BITS; the others are said as runs of zeros and a nearer pair.
    """
    present = np.flatnonzero(counts.reshape(FURTHEST, LEVELS).any(axis=0))
    table = counts.reshape(FURTHEST, LEVELS)[:, present].astype(np.float64)  # [advance - 1, value]
    member = table > 0
    member[0] = True
    usage, run_usage = table.copy(), np.ones(len(RUNS))
    for _ in range(ROUNDS):
        total = usage.sum() + run_usage.sum()
        bits, run_bits = (-np.log2(np.maximum(part, 1) / total) for part in (np.where(member, usage, table), run_usage))
        apart, first = _spell(member, bits, run_bits)
        gain = np.where(member, usage, table) * (apart - bits) - UNIT_BITS
        gain[0] = np.inf  # the nearest of each value, which all others can be said with
        worth = np.argsort(-gain, axis=None, kind="stable")[: MAX_KINDS - len(RUNS)]
        member = np.zeros(gain.size, bool)
        member[worth] = True
        member = member.reshape(gain.shape) & (gain > 0)
        _, first = _spell(member, bits, run_bits)
        usage, run_usage = _count(table, first, runs)
    member &= usage > 0
    used_runs = np.flatnonzero(run_usage)
    advances, columns = np.nonzero(member)
    kind = np.full(member.shape, -1)
    kind[member] = np.arange(len(advances))
    run_kind = np.full(len(RUNS), -1)
    run_kind[used_runs] = len(advances) + np.arange(len(used_runs))
    spelling = _spellings(first, kind, run_kind)
    full = np.full((FURTHEST, LEVELS, spelling.shape[-1]), -1)
    full[:, present] = spelling
    return Alphabet(
        np.concatenate([advances + 1, np.array(RUNS)[used_runs]]),
        np.concatenate([present[columns] - 128, np.zeros(len(used_runs), np.int64)]),
        full.reshape(FURTHEST * LEVELS, -1),
    )


def _spell(member: np.ndarray, bits: np.ndarray, run_bits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each pair: fewest bits without a kind of its own; the best first step, -1 a kind of its own, else an index of RUNS.

    Row 0 is always a kind of its own. [128, values] each.
    """
    best, apart, first = np.empty_like(bits), np.empty_like(bits), np.full(bits.shape, -1)
    best[0] = apart[0] = bits[0]
    for row in range(1, len(bits)):
        runs = np.array(RUNS[: row.bit_length()])  # those that fit
        ways = run_bits[: len(runs), None] + best[row - runs]
        step = ways.argmin(axis=0)
        apart[row] = np.take_along_axis(ways, step[None], axis=0)[0]
        own = member[row] & (bits[row] <= apart[row])
        best[row] = np.where(own, bits[row], apart[row])
        first[row] = np.where(own, -1, step)
    return apart, first


def _count(table: np.ndarray, first: np.ndarray, runs: int) -> tuple[np.ndarray, np.ndarray]:
    """How often each pair and each run is used as a kind of its own."""
    usage, run_usage = table.copy(), np.zeros(len(RUNS))
    run_usage[-1] = runs
    for row in range(len(table) - 1, 0, -1):
        moved = np.flatnonzero((first[row] >= 0) & (usage[row] > 0))
        if len(moved):
            amount, step = usage[row, moved], first[row, moved]
            np.add.at(run_usage, step, amount)
            np.add.at(usage, (row - np.array(RUNS)[step], moved), amount)
            usage[row, moved] = 0
    return usage, run_usage


def _spellings(first: np.ndarray, kind: np.ndarray, run_kind: np.ndarray) -> np.ndarray:
    """[128, values, longest]: the kinds that say each pair, in order, -1 behind them."""
    rows = np.broadcast_to(np.arange(len(first))[:, None], first.shape).copy()
    columns = np.broadcast_to(np.arange(first.shape[1]), first.shape)
    done, parts = np.zeros(first.shape, bool), []
    while not done.all():
        step = first[rows, columns]
        own = (step < 0) & ~done
        parts.append(np.where(done, -1, np.where(own, kind[rows, columns], run_kind[step])))
        rows = np.where(step < 0, rows, rows - np.array(RUNS)[step])
        done |= own
    return np.stack(parts, axis=-1)


def kinds_of(runs: np.ndarray, pair: np.ndarray, alphabet: Alphabet) -> np.ndarray:
    """What `pairs` gave -> the kinds of the units that say it, in order."""
    spelled = alphabet.spelling[pair]
    lengths = (spelled >= 0).sum(axis=1) + runs
    if lengths.size and lengths.max() == 1:
        return spelled[:, 0]
    owner = np.repeat(np.arange(len(pair)), lengths)
    place = np.arange(len(owner)) - np.repeat(np.cumsum(lengths) - lengths, lengths) - runs[owner]
    long_run = np.flatnonzero((alphabet.advances == FURTHEST) & (alphabet.values == 0))
    return np.where(place < 0, long_run[-1] if len(long_run) else -1, spelled[owner, np.maximum(place, 0)])
