"""Choose the parameters of a packed file: codeword lengths, calls of the reader, stages."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ecqx_onnx_converters.storage.packed import huffman
from ecqx_onnx_converters.storage.packed.stream import Coding, SymbolSequence
from ecqx_onnx_converters.storage.packed.symbols import MAX_SYMBOLS

MOST_CALLS = 32  # of the function that reads 8 bytes of every lane; more would save little of a large file, and take time
CALL_BYTES = 35  # in the file
CUT_BYTES = 35  # of a Split that a stream of one tensor has for its rest
STAGED_FROM = (
    1 << 20
)  # weights of a file; fewer leave some megabytes behind at most, and the stage takes 150 bytes
COMPACT_BELOW = 1 << 15  # bytes of all streams, of a file that is decoded in one stage

LANE_BYTES = 0.6  # its end, and the bit before its first word; rather much, since a payload is there to be short


def choose_min_codeword_length(streams: list[Coding]) -> list[Coding]:
    """streams: of a file, with words of one bit or more. -> with one, two or four bits at least.

    More of these mean fewer entries to decode: they may cost two per mille.
    """
    made = {1: streams} | {
        shortest: [Coding.of(coding.context_model, coding.alphabet, shortest) for coding in streams]
        for shortest in (2, 4)
    }
    sizes = {
        shortest: sum(coding.nbytes for coding in streams)
        for shortest, streams in made.items()
        if all(coding.leaves <= MAX_SYMBOLS for coding in streams)
    }
    return made[
        max(shortest for shortest, size in sizes.items() if 0.998 * size <= min(sizes.values()))
    ]


def is_compact(sequences: Sequence[SymbolSequence], streams: Sequence[Coding]) -> bool:
    """See `Packed`. surveys, streams: of all tensors of a file."""
    small = sum(math.prod(sequence.shape) for sequence in sequences) < STAGED_FROM
    return small and sum(coding.nbytes for coding in streams) < COMPACT_BELOW


def choose_calls(size: int, streams: int) -> int:
    """How often the decoder calls the function that reads 8 bytes of every lane; a lane has as many bytes as they all read.

    size: bytes of all streams. Each call takes CALL_BYTES of the file, each lane wastes LANE_BYTES, and of the last one of a
    stream half is empty.
    """

    def cost(calls: int) -> float:
        lane = huffman.DIGIT * calls
        return CALL_BYTES * calls + LANE_BYTES * size / lane + streams * lane / 2

    return min(range(1, MOST_CALLS + 1), key=cost)
