"""The values that describe a packed stream: its context model, its parts, its codes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

import numpy as np

from ecqx_onnx_converters.storage.packed import huffman
from ecqx_onnx_converters.storage.packed.symbols import Alphabet


class ContextModel(Enum):
    """The trees of a stream from left to right, each as the context that it is for and the bits that lead to it from the root.

    Reading goes on behind a word at the root (PLAIN); or by the sign of a number of each leaf, at inner node 2 where it is
    negative, 3 where it is 0, 4 where it is positive: of its value (SIGNS) or, so that there is just one context, of its negated
    advance (STEADY). A file has either PLAIN streams or the other two.
    """

    PLAIN = ((0, ""),)
    STEADY = ((None, "0"), (0, "1"))
    SIGNS = ((2, "00"), (1, "01"), (0, "1"))


@dataclass(frozen=True)
class Part:
    """One tensor. order: the axes in which it is coded, outermost first; entries: how many of the stream are its own."""

    shape: tuple[int, ...]
    permutation: tuple[int, ...]
    entries: int

    @property
    def permuted(self) -> bool:
        return self.permutation != tuple(range(len(self.shape)))


@dataclass(frozen=True, eq=False)
class Packed:
    """payload: uint8 [bytes of a lane, lanes]; every lane begins with a whole code word.

    bits: uint8, the tree, filled up with ones, as 8 rows: the high bits of all bytes, then the next. advances: int8 [kinds + 1],
    negated, and values: int8 [kinds + 1], of the leaves in order; both begin with 0 for no unit, and where there are contexts end
    with 0 for each one that fills up the tree. slots: entries of a byte, 2, 4 or 8. compact: functions of few bytes decode it,
    which need more memory for each bit, and 8 slots.
    """

    payload: np.ndarray
    bits: np.ndarray
    advances: np.ndarray
    values: np.ndarray
    slots: int
    context_model: ContextModel
    parts: tuple[Part, ...]
    compact: bool

    @property
    def context_signs(self) -> np.ndarray | None:
        """By whose signs it is told where leaves lead."""
        return {
            ContextModel.PLAIN: None,
            ContextModel.STEADY: self.advances,
            ContextModel.SIGNS: self.values,
        }[self.context_model]

    @property
    def rest(self) -> int:
        """Entries behind those of the last part."""
        return self.payload.size * self.slots - sum(part.entries for part in self.parts)

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in (self.payload, self.bits, self.advances, self.values))


@dataclass(frozen=True, eq=False)
class SymbolSequence:
    """A tensor as a stream says it. encoded: see `contextual`."""

    shape: tuple[int, ...]
    permutation: tuple[int, ...]
    encoded: np.ndarray
    top: int


def find_top(tensors: Sequence[np.ndarray]) -> int:
    """The largest |level| of tensors in [-128, 127]."""
    return max(max(int(levels.max()), -int(levels.min())) for levels in tensors)


@dataclass(frozen=True, eq=False)
class Coding:
    """How a stream is said. alphabet: of all contexts for SIGNS, of one otherwise. shortest: bits that each word has at least.
    lengths: of each tree, see `huffman.compute_codeword_lengths`. nbytes: of words and tables, ends of lanes aside."""

    context_model: ContextModel
    alphabet: Alphabet
    shortest: int
    lengths: tuple[np.ndarray, ...]
    nbytes: int

    @classmethod
    def of(cls, context_model: ContextModel, alphabet: Alphabet, shortest: int) -> Coding:
        counts = [
            alphabet.counts[symbol_ids] for symbol_ids in list_symbol_ids(context_model, alphabet)
        ]
        lengths = tuple(
            huffman.compute_codeword_lengths(
                own, shortest, alone=context_model is ContextModel.PLAIN
            )
            for own in counts
        )
        codewords = sum(
            int((own * of[: len(own)]).sum()) for own, of in zip(counts, lengths, strict=True)
        )
        leaves = sum(map(len, lengths))
        return cls(
            context_model,
            alphabet,
            shortest,
            lengths,
            (codewords + 2 * leaves - 2) // 8 + 2 * leaves + 4,
        )

    @property
    def leaves(self) -> int:
        return sum(map(len, self.lengths))

    def code(self) -> huffman.Code:
        parts = list(
            zip(list_symbol_ids(self.context_model, self.alphabet), self.lengths, strict=True)
        )
        return huffman.build_code(parts, [len(path) for _, path in self.context_model.value])


def list_symbol_ids(context_model: ContextModel, alphabet: Alphabet) -> list[np.ndarray]:
    """Of each tree."""
    ends = np.cumsum(alphabet.sizes)
    begins = ends - alphabet.sizes
    return [
        np.arange(0 if of is None else begins[of], 0 if of is None else ends[of])
        for of, _ in context_model.value
    ]


def count_slots(shortest: int) -> int:
    return huffman.DIGIT // shortest
