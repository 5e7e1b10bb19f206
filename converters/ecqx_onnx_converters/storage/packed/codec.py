"""int8 levels of some tensors -> Packed (bytes and a few numbers), and back: encoder and reference decoder, numpy only.

docs/packed-format.md specifies the bits; decoder.py writes the same decoder as ONNX nodes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from ecqx_onnx.errors import FileError
from ecqx_onnx_converters.storage.packed.model import (
    SCORES,
    SLOTS,
    View,
    levels_of,
    mass_of,
    quantise_frequencies,
    scores,
    slot_tables,
    symbols_of,
    view_of,
)
from ecqx_onnx_converters.storage.packed.stream import LOW, STATE_BITS, Decoder, bits_of, encode, fields

MAX_WEIGHTS = 1 << 33
CONTEXT_BYTES = 4200  # what the functions for contexts add to a file
CONTEXT_WEIGHTS = 2_000_000  # a runtime keeps about 450 bytes a weight while it folds contexts away, 170 without them
GUARD = (2, 1)  # zero bytes before and after the bits, so that the decoder's 16-bit windows need no edge


@dataclass(frozen=True, eq=False)
class Packed:
    """The levels of several tensors in one stream: small tensors share its lanes and statistics.

    views: one a tensor.
    rounds: symbols of each kernel; with contexts, one round of all tensors is coded at once, without, all symbols are.
    payload: uint8; 2 zero bytes, the stream's bits and the signs', 1 zero byte.
    states: uint16 [lanes], the lanes' first states less 2**16.
    frequencies: uint16 [contexts, symbols], each row sums to 4096.
    thresholds: uint8 [contexts - 1], ascending: a score's context is the number of thresholds at or below it.
    dictionary: int8 [symbols, width]: the levels that a symbol stands for.
    signs: the dictionary holds magnitudes, and each non-zero level's sign is one raw bit.
    gain: scales masses to the logarithm's range.
    """

    views: tuple[View, ...]
    rounds: int
    payload: np.ndarray
    states: np.ndarray
    frequencies: np.ndarray
    thresholds: np.ndarray
    dictionary: np.ndarray
    signs: bool
    gain: int

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays; the container around them adds names and numbers."""
        return sum(array.nbytes for array in (self.payload, self.states, self.frequencies, self.thresholds, self.dictionary))

    @property
    def lanes(self) -> int:
        return len(self.states)

    @property
    def contexts(self) -> int:
        return len(self.frequencies)

    @property
    def width(self) -> int:
        return int(self.dictionary.shape[1])

    @property
    def kernels(self) -> int:
        return sum(view.kernels for view in self.views)

    @property
    def steps(self) -> int:
        """Steps of a round; without contexts, of everything."""
        return -(-self.kernels * (1 if self.contexts > 1 else self.rounds) // self.lanes)


def pack_smallest(tensors: Sequence[np.ndarray]) -> Packed:
    """int8 arrays -> the Packed whose arrays and decoder together take the fewest bytes. Large sets get no contexts: memory."""
    plain = pack(tensors, contexts=1)
    if sum(levels.size for levels in tensors) > CONTEXT_WEIGHTS:
        return plain
    rich = pack(tensors)
    return rich if rich.nbytes + CONTEXT_BYTES < plain.nbytes else plain


def pack(
    tensors: Sequence[np.ndarray], *, contexts: int = 16, rounds: int | None = None, width: int = 1, lanes: int | None = None
) -> Packed:
    """int8 arrays of any shape -> Packed. Deterministic."""
    rounds = rounds or _common_taps(tensors)
    histogram = sum((np.bincount(levels.reshape(-1).view(np.uint8), minlength=256) for levels in tensors), np.zeros(256, int))
    count = np.roll(histogram, 128)  # of levels -128 .. 127
    signs = width == 1 and _signs_are_noise(count)
    alphabet = np.flatnonzero(count + (np.arange(256) == 128)) - 128
    if signs:
        alphabet = np.unique(np.abs(alphabet))
    if len(alphabet) < 2:
        alphabet = np.array([0, 1])
    while len(alphabet) ** width > 256:
        width -= 1
    dictionary = alphabet[np.indices((len(alphabet),) * width).reshape(width, -1).T].astype(np.int8)
    masses = mass_of(dictionary)
    digit = np.zeros(256, np.int64)
    digit[alphabet & 255] = np.arange(len(alphabet))
    if signs:
        digit[-alphabet & 255] = np.arange(len(alphabet))

    views, symbols, ordered = [], [np.zeros((rounds, 0), np.int64)], [np.zeros((rounds, 0), np.int8)]
    for levels in tensors:
        view = view_of(levels.shape, rounds, width) if levels.size else View(levels.shape, 0, 0, False)
        cut = symbols_of(levels, view, rounds, width)
        symbol = digit[cut.view(np.uint8)] @ len(alphabet) ** np.arange(width - 1, -1, -1)
        views.append(replace(view, mean=int(np.clip(round(16 * float(masses[symbol].mean())), 1, 4095)) if symbol.size else 1))
        symbols.append(symbol)
        ordered.append(cut[..., 0])
    symbol = np.concatenate(symbols, axis=1)
    raw = np.zeros(0, np.uint8)
    if signs:
        levels_in_order = np.concatenate(ordered, axis=1).reshape(-1)
        raw = (levels_in_order[levels_in_order != 0] < 0).astype(np.uint8)

    mass = masses[symbol]
    gain = int(np.clip(round(8 / max(1e-9, float(mass.mean()))), 1, 4096)) if mass.size else 1
    if contexts == 1 or not mass.size:
        contexts, score = 1, np.zeros((1, symbol.size), np.int64)
    else:
        score = np.stack(list(scores(mass, views, gain)))
    symbol = symbol.reshape(score.shape)
    joint = np.bincount((score * len(dictionary) + symbol).reshape(-1), minlength=SCORES * len(dictionary)).reshape(SCORES, -1)
    thresholds = _thresholds(joint.sum(axis=1), contexts)
    table = np.searchsorted(thresholds, np.arange(SCORES), side="right")
    counts = np.zeros((contexts, len(dictionary)), np.int64)
    np.add.at(counts, table, joint)
    frequencies = quantise_frequencies(counts)
    starts = np.cumsum(frequencies, axis=1) - frequencies
    context = table[score]

    lanes = lanes or _lanes(symbol.size, len(raw))
    lanes = max(1, -(-symbol.shape[1] // max(1, -(-symbol.shape[1] // lanes))))  # as full a last step as can be
    idle = -symbol.shape[1] % lanes  # coded as the first context's likeliest symbol
    symbol = np.pad(symbol, ((0, 0), (0, idle)), constant_values=int(np.argmax(frequencies[0])))
    context = np.pad(context, ((0, 0), (0, idle)))
    hidden = np.zeros(lanes * STATE_BITS, np.uint8)
    hidden[: len(raw)] = raw[: len(hidden)]
    states, stream = encode(frequencies[context, symbol], starts[context, symbol], states=fields(hidden, STATE_BITS) + LOW)
    bits = np.packbits(np.concatenate([stream, raw[len(hidden) :]]))
    return Packed(
        tuple(views), rounds, np.pad(bits, GUARD), (states - LOW).astype(np.uint16), frequencies.astype(np.uint16),
        thresholds.astype(np.uint8), dictionary, signs, gain,
    )  # fmt: skip


def _common_taps(tensors: Sequence[np.ndarray]) -> int:
    """The kernel size that most weights have, if any kernel is small; else 12 rounds."""
    weights: dict[int, int] = {}
    for levels in tensors:
        taps = math.prod(levels.shape[2:])
        if levels.ndim > 2 and 2 <= taps <= 32:
            weights[taps] = weights.get(taps, 0) + levels.size
    best = max(weights, key=lambda taps: weights[taps], default=0)
    return best if best and 2 * weights[best] >= sum(levels.size for levels in tensors) else 12


def _signs_are_noise(count: np.ndarray) -> bool:
    """Counts of levels -128 .. 127 -> whether raw signs cost less than what they save: the 16 bits of each of many lanes."""
    positive, negative = count[129:].astype(np.float64), count[127:0:-1].astype(np.float64)
    total = positive + negative
    share = np.divide(positive, total, out=np.full(127, 0.5), where=total > 0)
    entropy = -(share * np.log2(np.maximum(share, 1e-300)) + (1 - share) * np.log2(np.maximum(1 - share, 1e-300)))
    loss = float((total * (1 - entropy)).sum())
    return bool(count[0] == 0 and total.sum() > 0 and loss <= STATE_BITS * min(_lanes(count.sum(), 0), total.sum() // STATE_BITS))


def _lanes(symbols: int, raw: int) -> int:
    """As many lanes as the raw bits fill: these cost half a bit each. Without, so few that their 16 bits weigh little."""
    few = -(-symbols // max(16, min(512, math.isqrt(symbols))))
    return int(max(1, min(raw // STATE_BITS, symbols // 64), few if not raw else symbols // 1024))


def _thresholds(population: np.ndarray, contexts: int) -> np.ndarray:
    """How many symbols have each score -> contexts - 1 ascending scores that part them into equal shares."""
    share = np.cumsum(population) / max(1, population.sum())
    return np.searchsorted(share, np.arange(1, contexts) / contexts, side="right")


def unpack(packed: Packed) -> list[np.ndarray]:
    """Packed -> the int8 levels of each tensor. FileError for damage that shows; the caller checks each tensor's CRC32."""
    _check(packed)
    bits = np.unpackbits(packed.payload[GUARD[0] : -GUARD[1]])
    tables = slot_tables(packed.frequencies.astype(np.int64))
    masses = mass_of(packed.dictionary)
    decoder = Decoder(packed.states.astype(np.int64) + LOW, bits)
    if packed.contexts == 1:
        context = np.zeros(packed.steps * packed.lanes, np.int64)
        symbol = decoder.round(context, tables)[: packed.kernels * packed.rounds].reshape(packed.rounds, packed.kernels)
    else:
        table = (packed.thresholds[None] <= np.arange(SCORES)[:, None]).sum(axis=1)
        symbol = np.zeros((packed.rounds, packed.kernels), np.int64)
        mass = np.zeros(symbol.shape, np.int64)
        idle = packed.steps * packed.lanes - packed.kernels
        for t, score in enumerate(scores(mass, packed.views, packed.gain)):
            symbol[t] = decoder.round(np.pad(table[score], (0, idle)), tables)[: packed.kernels]
            mass[t] = masses[symbol[t]]
    levels = packed.dictionary[symbol]
    if packed.signs:
        raw = np.concatenate([bits_of(decoder.state - LOW, STATE_BITS), decoder.bits[decoder.position : decoder.end]])
        nonzero = np.flatnonzero(levels)
        if len(nonzero) > len(raw):
            raise FileError("packed weights are damaged: they end before the last sign; get the file again")
        levels.reshape(-1)[nonzero] *= 1 - 2 * raw[: len(nonzero)].astype(np.int8)
    if decoder.position > decoder.end:
        raise FileError("packed weights are damaged: they end too early; get the file again")
    ends = np.cumsum([0, *(view.kernels for view in packed.views)])
    return [levels_of(levels[:, ends[i] : ends[i + 1]], view) for i, view in enumerate(packed.views)]


def _check(packed: Packed) -> None:
    """FileError unless every size is plausible: nothing is allocated from a number that the payload does not back."""
    typed = [
        (packed.payload, np.uint8, 1), (packed.states, np.uint16, 1), (packed.frequencies, np.uint16, 2),
        (packed.thresholds, np.uint8, 1), (packed.dictionary, np.int8, 2),
    ]  # fmt: skip
    fits = (
        all(array.dtype == dtype and array.ndim == ndim for array, dtype, ndim in typed)
        and packed.payload.size >= sum(GUARD) and packed.lanes >= 1 and 1 <= packed.contexts <= SCORES
        and packed.thresholds.size == packed.contexts - 1
        and 2 <= len(packed.dictionary) == packed.frequencies.shape[1] <= 256 and packed.width >= 1
        and not (packed.signs and packed.width > 1)
        and 1 <= packed.gain <= 4096 and packed.rounds >= 1
        and all(min(view.rows, view.columns, *view.shape) >= 0 and 1 <= view.mean <= 4095 for view in packed.views)
        and all(view.weights <= view.kernels * packed.rounds * packed.width for view in packed.views)
        and bool((packed.frequencies.sum(axis=1, dtype=np.int64) == SLOTS).all())
    )  # fmt: skip
    symbols = packed.kernels * packed.rounds
    # A symbol takes log2(4096 / 4095) bits at least, so that only so many can come from these bits.
    if not fits or symbols > 2840 * (8 * packed.payload.size + 16 * packed.lanes) or symbols * packed.width > MAX_WEIGHTS:
        raise FileError("packed weights are damaged: their sizes contradict each other; get the file again")
