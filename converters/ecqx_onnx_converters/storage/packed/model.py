"""Integer levels -> the probability model that encoder, reference decoder and ONNX decoder share: symbols, contexts, tables.

A tensor is seen as [rows, columns, rounds]; one round of all tensors is coded at once. What earlier rounds said about the
same kernel, row and column is a symbol's context. Integers only: every machine must compute the same context.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

VERSION = 1
SLOTS = 4096  # the frequencies of one context sum to this
LOG_SIZE = 2048
MASS_LIMIT = 15  # a level adds at most this much to the sums that contexts look at
KERNEL_PRIOR, LINE_PRIOR = 3, 20  # in half symbols: what the tensor's mean weighs against the sums
# floor(8 log2(j + 8)) - 24; the 1/1024 keeps every value off the next step, so that any float logarithm builds this table.
LOG_TABLE = np.floor(8 * np.log2(np.arange(LOG_SIZE) + 8.0) - 24 + 1 / 1024).astype(np.int64)
SCORES = 3 * int(LOG_TABLE[-1]) + 1


@dataclass(frozen=True)
class View:
    """How a tensor of `shape` is cut into symbols: [rows, columns] kernels, each with `rounds` symbols of `width` levels.

    kernels_first: memory order [rows, columns, rounds, width] (a conv kernel's taps are the rounds), else
    [rows, rounds, width, columns] (groups of output channels are).
    mean: 16 times the mean mass of a symbol, in [1, 4095].
    """

    shape: tuple[int, ...]
    rows: int
    columns: int
    kernels_first: bool
    mean: int = 1

    @property
    def weights(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def kernels(self) -> int:
        return self.rows * self.columns


def view_of(shape: tuple[int, ...], rounds: int, width: int) -> View:
    """The view of a tensor with at least one weight."""
    size = int(np.prod(shape, dtype=np.int64))
    if width == 1 and len(shape) > 2 and size == shape[0] * shape[1] * rounds:
        return View(shape, rows=shape[0], columns=shape[1], kernels_first=True)
    height = shape[0] if len(shape) > 1 else min(size, rounds * width)
    return View(shape, rows=-(-height // (rounds * width)), columns=-(-size // height), kernels_first=False)


def symbols_of(levels: np.ndarray, view: View, rounds: int, width: int) -> np.ndarray:
    """int8 levels -> int8 [rounds, kernels, width], padded with level 0."""
    flat = np.zeros(view.kernels * rounds * width, np.int8)
    flat[: levels.size] = levels.reshape(-1)
    if view.kernels_first:
        return flat.reshape(view.kernels, rounds, width).transpose(1, 0, 2)
    cube = flat.reshape(view.rows, rounds, width, view.columns).transpose(1, 0, 3, 2)
    return cube.reshape(rounds, view.kernels, width)


def levels_of(symbols: np.ndarray, view: View) -> np.ndarray:
    """int8 [rounds, kernels, width] -> int8 levels of view.shape."""
    if view.kernels_first:
        cube = symbols.transpose(1, 0, 2)
    else:
        rounds, _, width = symbols.shape
        cube = symbols.reshape(rounds, view.rows, view.columns, width).transpose(1, 0, 3, 2)
    return cube.reshape(-1)[: view.weights].reshape(view.shape)


def scores(mass: np.ndarray, views: Sequence[View], gain: int) -> Iterator[np.ndarray]:
    """mass of the symbols, int64 [rounds, kernels of all views] -> for each round, their scores in [0, SCORES) [kernels].

    The decoder fills `mass` as it goes: the scores of a round read the rounds before it only.
    score = log of the mean mass of the kernel + of its row + of its column, each drawn towards the tensor's mean.
    """
    kernel = mass.shape[1]
    line, length, mean, base = [np.arange(kernel)], [np.ones(kernel, np.int64)], [], kernel
    rows, columns = [], []
    for view in views:
        rows.append(base + np.repeat(np.arange(view.rows), view.columns))
        base += view.rows
        mean.append(np.full(view.kernels, view.mean))
    for view in views:
        columns.append(base + np.tile(np.arange(view.columns), view.rows))
        base += view.columns
    line = np.stack([np.arange(kernel), np.concatenate(rows), np.concatenate(columns)])
    length = np.stack(
        [
            np.ones(kernel, np.int64),
            np.concatenate([np.full(view.kernels, view.columns) for view in views]),
            np.concatenate([np.full(view.kernels, view.rows) for view in views]),
        ]
    )
    prior = np.array([[KERNEL_PRIOR], [LINE_PRIOR], [LINE_PRIOR]])
    offset = prior * np.concatenate(mean) * gain
    sums = np.zeros(base, np.int64)
    for t in range(len(mass)):
        if t:
            for lines in line:
                sums += np.bincount(lines, weights=mass[t - 1], minlength=base).astype(np.int64)
        ratio = (32 * gain * sums[line] + offset) // (2 * t * length + prior)
        yield LOG_TABLE[np.minimum(ratio, LOG_SIZE - 1)].sum(axis=0)


def mass_of(dictionary: np.ndarray) -> np.ndarray:
    """int8 [symbols, width] -> int64 [symbols]: how much a symbol adds to the sums that contexts look at."""
    return np.minimum(np.abs(dictionary.astype(np.int64)), MASS_LIMIT).sum(axis=1)


def slot_tables(frequencies: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Frequencies [contexts, symbols] -> (symbol, its frequency, slot - its start) of every slot, each [contexts * SLOTS]."""
    contexts, symbols = frequencies.shape
    starts = np.cumsum(frequencies, axis=1) - frequencies
    symbol = np.repeat(np.tile(np.arange(symbols), contexts), frequencies.reshape(-1))
    context, slot = np.divmod(np.arange(contexts * SLOTS), SLOTS)
    return symbol, frequencies[context, symbol], slot - starts[context, symbol]


def quantise_frequencies(counts: np.ndarray) -> np.ndarray:
    """Counts [contexts, symbols >= 2] -> frequencies: rows sum to SLOTS, what occurs has at least 1, nothing has SLOTS."""
    rows = []
    for row in counts.astype(np.float64):
        if np.count_nonzero(row) < 2:  # 12 bits hold at most SLOTS - 1
            row = row + np.eye(len(row))[:2].sum(axis=0) * 1e-9
        share = row * (SLOTS / row.sum())
        frequency = np.maximum(np.floor(share), row > 0).astype(np.int64)
        excess = int(frequency.sum()) - SLOTS
        if excess < 0:
            frequency[np.argsort(frequency - share, kind="stable")[:-excess]] += 1
        for _ in range(excess):
            frequency[np.argmax(frequency)] -= 1
        rows.append(frequency)
    return np.array(rows, np.int64)
