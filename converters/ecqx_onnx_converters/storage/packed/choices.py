"""Chooses the parameters of a packed file: codeword lengths, length of a lane, compactness."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ecqx_onnx_converters.storage.packed import huffman, stages
from ecqx_onnx_converters.storage.packed.alphabets.alphabet import MAX_SYMBOLS
from ecqx_onnx_converters.storage.packed.stream import Coding, SymbolSequence

# Calls of the function that reads 8 bytes of every lane; more would save little of a large file,
# and take time.
MOST_CALLS = 32
CALL_BYTES = 35  # of one call in the file
CUT_BYTES = 35  # of a Split that a stream of one tensor has for what is left over
# Of a file of several stages, each of which has all these calls: fewer, since a runtime looks at
# every node in each of its passes, and a graph of fewer nodes loads faster.
STAGED_CALLS = 4
COMPACT_BELOW = 1 << 15  # bytes of all streams, of a file that is decoded in one stage

# Of a lane's end, and the bit before its first codeword; rather much, since a payload is there to
# be short.
LANE_BYTES = 0.6
LONGER_FROM = 0.998  # a larger payload by this share is accepted for longer codewords


def choose_min_codeword_length(streams: list[Coding]) -> list[Coding]:
    """Choose whether a codeword has 1, 2 or 4 bits at least.

    Longer means fewer decoder outputs per byte, and so less time and memory at load; up to 0.2 %
    more payload is accepted for that.

    Args:
        streams: All streams of a file, with codewords of one bit or more.

    Returns:
        The streams with the chosen length.
    """
    candidates = {1: streams}
    for shortest in (2, 4):
        candidates[shortest] = [
            Coding.of(coding.context_model, coding.alphabet, shortest) for coding in streams
        ]
    sizes = {}
    for shortest, codings in candidates.items():
        if all(coding.leaves <= MAX_SYMBOLS for coding in codings):  # fillers are leaves, too
            sizes[shortest] = sum(coding.nbytes for coding in codings)
    smallest = min(sizes.values())
    accepted = [shortest for shortest, size in sizes.items() if LONGER_FROM * size <= smallest]
    return candidates[max(accepted)]


def is_compact(sequences: Sequence[SymbolSequence], streams: Sequence[Coding]) -> bool:
    """Tell whether a file is so small that its decoder shall be, rather than thrifty with memory.

    Args:
        sequences: All tensors of the file.
        streams: All streams of the file.

    Returns:
        See `Packed.compact`.
    """
    weights = sum(math.prod(sequence.shape) for sequence in sequences)
    return weights < stages.STAGED_FROM and sum(coding.nbytes for coding in streams) < COMPACT_BELOW


def choose_calls(size: int, streams: int, *, staged: bool = False) -> int:
    """Choose how often the decoder calls the function that reads 8 bytes of every lane.

    A lane has as many bytes as all calls read. Each call takes CALL_BYTES of the file, each lane
    wastes LANE_BYTES, and of the last lane of a stream half is empty.

    Args:
        size: Bytes of all streams.
        streams: How many there are.
        staged: Whether the file is decoded in several stages.

    Returns:
        In [1, MOST_CALLS], or in [1, STAGED_CALLS].
    """

    def estimate_cost(calls: int) -> float:
        lane = huffman.DIGIT * calls
        return CALL_BYTES * calls + LANE_BYTES * size / lane + streams * lane / 2

    most = STAGED_CALLS if staged else MOST_CALLS
    return min(range(1, most + 1), key=estimate_cost)
