"""The values that describe a packed stream: its context model, its parts, its codes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

import numpy as np

from ecqx_onnx_converters.storage.packed import huffman
from ecqx_onnx_converters.storage.packed.symbols import Alphabet


class Form(Enum):
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
    order: tuple[int, ...]
    entries: int

    @property
    def turned(self) -> bool:
        return self.order != tuple(range(len(self.shape)))


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
    form: Form
    parts: tuple[Part, ...]
    compact: bool

    @property
    def turns(self) -> np.ndarray | None:
        """By whose signs it is told where leaves lead."""
        return {Form.PLAIN: None, Form.STEADY: self.advances, Form.SIGNS: self.values}[self.form]

    @property
    def rest(self) -> int:
        """Entries behind those of the last part."""
        return self.payload.size * self.slots - sum(part.entries for part in self.parts)

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in (self.payload, self.bits, self.advances, self.values))


@dataclass(frozen=True, eq=False)
class Survey:
    """A tensor as a stream says it. said: see `contextual`."""

    shape: tuple[int, ...]
    order: tuple[int, ...]
    said: np.ndarray
    top: int


def top_of(tensors: Sequence[np.ndarray]) -> int:
    """The largest |level| of tensors in [-128, 127]."""
    return max(max(int(levels.max()), -int(levels.min())) for levels in tensors)


@dataclass(frozen=True, eq=False)
class Coding:
    """How a stream is said. alphabet: of all contexts for SIGNS, of one otherwise. shortest: bits that each word has at least.
    lengths: of each tree, see `huffman.word_lengths`. nbytes: of words and tables, ends of lanes aside."""

    form: Form
    alphabet: Alphabet
    shortest: int
    lengths: tuple[np.ndarray, ...]
    nbytes: int

    @classmethod
    def of(cls, form: Form, alphabet: Alphabet, shortest: int) -> Coding:
        counts = [alphabet.counts[kinds] for kinds in _kinds(form, alphabet)]
        lengths = tuple(huffman.word_lengths(own, shortest, alone=form is Form.PLAIN) for own in counts)
        words = sum(int((own * of[: len(own)]).sum()) for own, of in zip(counts, lengths, strict=True))
        leaves = sum(map(len, lengths))
        return cls(form, alphabet, shortest, lengths, (words + 2 * leaves - 2) // 8 + 2 * leaves + 4)

    @property
    def leaves(self) -> int:
        return sum(map(len, self.lengths))

    def code(self) -> huffman.Code:
        parts = list(zip(_kinds(self.form, self.alphabet), self.lengths, strict=True))
        return huffman.build(parts, [len(path) for _, path in self.form.value])


def _kinds(form: Form, alphabet: Alphabet) -> list[np.ndarray]:
    """Of each tree."""
    ends = np.cumsum(alphabet.sizes)
    begins = ends - alphabet.sizes
    return [np.arange(0 if of is None else begins[of], 0 if of is None else ends[of]) for of, _ in form.value]


def slots_of(shortest: int) -> int:
    return huffman.DIGIT // shortest
