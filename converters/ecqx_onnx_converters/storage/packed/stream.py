"""Symbols with their contexts -> bits, and back: range asymmetric numeral systems (rANS), many lanes in step.

Lane j codes symbols j, j + lanes, ... of a round. All lanes take one step together and share one stream of bits. A lane's
state x lies in [2**16, 2**17). Decoding one step:
    slot = x mod 4096; symbol = the one whose interval [start, start + frequency) holds slot
    x = frequency * (x div 4096) + slot - start, then doubled, and a bit of the stream added, until it is at least 2**16
Lanes beyond the end of a round idle, which changes nothing. The encoder runs backwards, since a state is a stack; what a
lane starts from is free, so that 16 raw bits hide there.   [Duda, arXiv:1311.2540; interleaving: Giesen, arXiv:1402.3392]
"""

from __future__ import annotations

import numpy as np

from ecqx_onnx_converters.storage.packed.model import SLOTS

STATE_BITS = 16
LOW = 1 << STATE_BITS


def bits_of(values: np.ndarray, lengths: np.ndarray | int) -> np.ndarray:
    """The lowest `lengths` bits of each value, high bit first, end to end: uint8 0 or 1."""
    lengths = np.broadcast_to(np.asarray(lengths, np.int64), values.shape)
    ends = np.cumsum(lengths)
    bits = np.zeros(int(ends[-1]) if len(ends) else 0, np.uint8)
    for i in range(int(lengths.max(initial=0))):
        long = lengths > i
        bits[ends[long] - 1 - i] = (values[long] >> i) & 1
    return bits


def fields(bits: np.ndarray, width: int) -> np.ndarray:
    """Bits -> int64 values of `width` bits each, high bit first."""
    return bits.reshape(-1, width).astype(np.int64) @ (1 << np.arange(width - 1, -1, -1))


def encode(frequency: np.ndarray, start: np.ndarray, *, states: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Frequency and start of each symbol, int64 [rounds, steps * lanes], and the lanes' last states -> (first states, bits)."""
    state = states.astype(np.int64)
    frequency, start = frequency.reshape(-1, len(state)), start.reshape(-1, len(state))
    values, lengths = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    for f, begin in zip(frequency[::-1], start[::-1], strict=True):
        shift = 13 - np.frexp(f.astype(np.float32))[1].astype(np.int64)  # 12 - floor(log2(f))
        length = shift - ((state >> shift) < 16 * f)
        values.append(state & ((1 << length) - 1))
        lengths.append(length)
        state >>= length
        quotient = state // f
        state = (quotient << 12) + (state - quotient * f) + begin
    return state, bits_of(np.concatenate(values[::-1]), np.concatenate(lengths[::-1]))


class Decoder:
    """Takes the steps of one stream in order. Bits beyond its end read as 0: position > end tells."""

    def __init__(self, states: np.ndarray, bits: np.ndarray):
        """states: int64 [lanes]; bits: uint8, 0 or 1."""
        self.state = states
        self.bits = np.concatenate([bits, np.zeros(16, np.uint8)])
        self.position, self.end = 0, len(bits)

    def round(self, context: np.ndarray, tables: tuple[np.ndarray, np.ndarray, np.ndarray]) -> np.ndarray:
        """Contexts [steps * lanes] -> symbols [steps * lanes]."""
        return np.concatenate([np.zeros(0, np.int64), *(self.step(row, tables) for row in context.reshape(-1, len(self.state)))])

    def step(self, context: np.ndarray, tables: tuple[np.ndarray, np.ndarray, np.ndarray]) -> np.ndarray:
        symbol, frequency, remainder = tables
        index = (self.state & (SLOTS - 1)) + context * SLOTS
        x = frequency[index] * (self.state >> 12) + remainder[index]
        length = STATE_BITS + 1 - np.frexp(x.astype(np.float32))[1].astype(np.int64)
        begin = self.position + np.cumsum(length) - length
        for i in range(int(length.max(initial=0))):
            more = length > i
            x[more] = x[more] << 1 | self.bits[np.minimum(begin[more] + i, len(self.bits) - 1)]
        self.position += int(length.sum())
        self.state = x
        return symbol[index]
