"""Plans in which order a large file is decoded, so that little is in memory at a time.

A runtime keeps all that it folds until its pass over the graph ends. So a large file is decoded in
stages, each of which waits for the pass before (`onnx_decoder.make_stages`). Enters: the tensors of
a file. Leaves: pieces of them, each with its stage.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

# Weights of a file that is decoded in several stages; fewer leave some megabytes behind at most,
# and a stage takes 300 bytes.
STAGED_FROM = 1 << 20
# onnxruntime repeats its passes ten times at most; the model's own graph needs some of them.
MOST_STAGES = 8
# A file has as many stages as the root of what decoding it leaves behind, in units of so many
# bytes, but no more than six, which leave some megabytes of nodes behind themselves, unless it is
# very large.
STAGE_BYTES = 1 << 22
USUAL_STAGES = 6
VERY_LARGE = 1 << 31
SLICED_FROM = 1 << 19  # weights of a tensor that several stages may share
# What decoding leaves behind, in bytes a weight, and so many more for each level that isn't zero;
# measured on Gaussian levels of 1.1 to 3.4 bits a weight.
SCRATCH_BYTES = 14
LEVEL_BYTES = 44
FLOAT_BYTES = 4  # of a weight once it is decoded
# Of those bytes, what making floats takes; and for a tensor in slices, which are joined before.
WHOLE_BYTES = 8
JOINED_BYTES = 9
# Weights that one call decodes at most, about, and into how many calls a large file is divided:
# beside what it leaves behind, an operator holds copies of what it reads while it works.
MOST_AT_ONCE = 1 << 20
PIECES = 64
LEAST_SHARE = 1 / 32  # of a tensor, that is worth a slice
LONG = 128  # indices of an axis that is long enough to be cut
ROUNDS = 40  # of a bisection


@dataclass(frozen=True)
class Piece:
    """What of a tensor is decoded by one call: all of it, or a slice along one axis.

    Attributes:
        tensor: Index of the tensor.
        axis: Along which it is cut.
        begin: The first index along the axis.
        end: Behind the last one.
        stage: Number of the stage, from 0 on.
    """

    tensor: int
    axis: int
    begin: int
    end: int
    stage: int


@dataclass(frozen=True)
class _Load:
    """What decoding a tensor takes.

    axis and rows: along what it can be cut, and how many indices that has; bytes: left behind.
    """

    weights: int
    axis: int
    rows: int
    bytes: float


def is_staged(tensors: Sequence[np.ndarray]) -> bool:
    """Tell whether a file is so large that it is decoded in several stages.

    Args:
        tensors: int8, all packed tensors of the file.

    Returns:
        Whether they have at least STAGED_FROM weights together.
    """
    return sum(levels.size for levels in tensors) >= STAGED_FROM


def plan_stages(tensors: Sequence[np.ndarray]) -> list[Piece]:
    """Divide the tensors of a file among the stages of its decoding.

    What a stage leaves behind is alive until it ends, what earlier ones have decoded for good: so
    stages shrink, and large tensors, which take most at once, come first.

    Args:
        tensors: int8, none of them empty.

    Returns:
        Pieces in the order of the tensors, and of their rows. A small file has one stage, and each
        tensor is one piece.
    """
    loads = [_estimate_load(levels) for levels in tensors]
    pieces, _ = _plan_loads(loads)
    if not is_staged(tensors):
        return pieces
    # Several calls for what is still large.
    most = max(MOST_AT_ONCE, sum(load.weights for load in loads) // PIECES)
    slices: list[Piece] = []
    for piece in pieces:
        slices.extend(_cut(piece, loads[piece.tensor], most))
    return sorted(slices, key=lambda piece: (piece.tensor, piece.begin))


def estimate_peak(tensors: Sequence[np.ndarray]) -> int:
    """Estimate what is alive at most while a file is decoded.

    Args:
        tensors: int8, all packed tensors of the file.

    Returns:
        Bytes, the float weights included; an allocator may hold half as much again.
    """
    _, peak = _plan_loads([_estimate_load(levels) for levels in tensors])
    return round(peak)


def _plan_loads(loads: Sequence[_Load]) -> tuple[list[Piece], float]:
    """Pieces for the stages, and the bytes alive at most; one stage for a small file."""
    weights = sum(load.weights for load in loads)
    total = sum(load.bytes for load in loads)
    best = [Piece(index, load.axis, 0, load.rows, 0) for index, load in enumerate(loads)]
    if weights < STAGED_FROM:
        return best, total
    # 1. How many stages.
    most = MOST_STAGES if total >= VERY_LARGE else USUAL_STAGES
    stages = min(most, max(2, round((total / STAGE_BYTES) ** 0.5)))
    # 2. The least bytes alive at a time for which so many are enough, by bisection.
    low = 0.0
    high = total + FLOAT_BYTES * weights
    for _ in range(ROUNDS):
        middle = (low + high) / 2
        filled = _fill_stages(loads, middle, stages)
        if filled is None:
            low = middle
        else:
            high = middle
            best = filled
    return best, high


def cut_piece(levels: np.ndarray, piece: Piece) -> np.ndarray:
    """Take a piece out of its tensor.

    Args:
        levels: The tensor.
        piece: What of it is wanted.

    Returns:
        A view of it.
    """
    if levels.ndim == 0:
        return levels
    where = [slice(None)] * levels.ndim
    where[piece.axis] = slice(piece.begin, piece.end)
    return levels[tuple(where)]


def _estimate_load(levels: np.ndarray) -> _Load:
    """Of a tensor, from how many of its levels are not zero."""
    axis = 0
    if levels.ndim and levels.shape[0] < LONG:
        axis = int(np.argmax(levels.shape))
    rows = levels.shape[axis] if levels.ndim else 1
    nbytes = SCRATCH_BYTES * levels.size + LEVEL_BYTES * int(np.count_nonzero(levels))
    return _Load(levels.size, axis, rows, nbytes)


def _fill_stages(loads: Sequence[_Load], limit: float, stages: int) -> list[Piece] | None:
    """Pieces for which no more than `limit` bytes are alive at a time, as estimated.

    None if that needs more stages.
    """
    pieces: list[Piece] = []
    stage = 0
    kept = 0.0  # bytes of what earlier stages have decoded
    added = 0.0  # bytes that will be kept of this one
    room = limit
    for index in sorted(range(len(loads)), key=lambda index: -loads[index].weights):
        load = loads[index]
        reading = load.bytes - WHOLE_BYTES * load.weights
        begin = 0
        while True:
            # 1. All that is left, if there is room for it and its floats.
            left = load.rows - begin
            making = JOINED_BYTES if begin else WHOLE_BYTES
            cost = reading * left / load.rows + making * load.weights
            if cost <= room:
                pieces.append(Piece(index, load.axis, begin, load.rows, stage))
                room -= cost
                added += FLOAT_BYTES * load.weights
                break
            # 2. Else as many rows as there is room for; their floats are made with the last.
            if load.weights >= SLICED_FROM:
                rows = min(int(room * load.rows / reading), left - 1)
                if rows >= LEAST_SHARE * load.rows:
                    pieces.append(Piece(index, load.axis, begin, begin + rows, stage))
                    begin += rows
                    added += load.weights * rows / load.rows
            # 3. Then the next stage.
            stage += 1
            kept += added
            added = 0.0
            room = limit - kept
            if stage == stages or room <= 0:
                return None
    return pieces


def _cut(piece: Piece, load: _Load, most: int) -> Iterator[Piece]:
    """A piece as slices of about equal length, none of them of much more than `most` weights."""
    length = piece.end - piece.begin
    weights = load.weights * length / load.rows
    slices = min(max(1, round(weights / most)), length)
    borders = [piece.begin + length * number // slices for number in range(slices + 1)]
    for begin, end in pairwise(borders):
        yield Piece(piece.tensor, piece.axis, begin, end, piece.stage)
