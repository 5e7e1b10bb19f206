"""The values that describe a packed stream: its context model, tensors, code and arrays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

import numpy as np

from ecqx_onnx_converters.storage.packed import huffman
from ecqx_onnx_converters.storage.packed.alphabets.alphabet import Alphabet


class ContextModel(Enum):
    """The trees of a stream from left to right: the context of each and its path from the root.

    Behind a codeword, reading goes on at the root (PLAIN); or by the sign of a number of each leaf,
    at inner node 2 where it is negative, 3 where it is 0, 4 where it is positive: of its value
    (SIGNS) or, so that there is just one context, of its negated advance (STEADY; of -1 where some
    advances are 0). A file has either PLAIN streams or the other two.
    """

    PLAIN = ((0, ""),)
    STEADY = ((None, "0"), (0, "1"))
    SIGNS = ((2, "00"), (1, "01"), (0, "1"))


@dataclass(frozen=True)
class Part:
    """One tensor of a stream.

    Attributes:
        shape: The weight's own.
        permutation: The axes in the order in which they are coded, outermost first.
        entries: How many of the stream's entries are the tensor's.
    """

    shape: tuple[int, ...]
    permutation: tuple[int, ...]
    entries: int

    @property
    def permuted(self) -> bool:
        """Whether the tensor is coded in another order than its own."""
        return self.permutation != tuple(range(len(self.shape)))


@dataclass(frozen=True, eq=False)
class Packed:
    """A stream as the arrays that lie in the file.

    Attributes:
        payload: uint8 [bytes of a lane, lanes]; every lane begins with a whole codeword.
        bits: uint8, the tree, filled up with ones, as 8 rows: the high bits of all bytes, then the
            next.
        advances: int8 [leaves + 1], negated, in the order of the leaves; begins with 0 for no
            symbol, and where there are contexts ends with 0 for each one that fills up the tree.
        values: int8 [leaves + 1], likewise; those of advance 0 are corrections.
        slots: Entries of a byte: 2, 4 or 8.
        context_model: Where reading goes on behind a leaf.
        parts: The tensors in the order of the stream.
        compact: Whether functions of few bytes decode it, which need more memory for each bit, and
            8 slots.
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
        """The numbers of the leaves by whose signs reading goes on; None where it does not."""
        if self.context_model is ContextModel.PLAIN:
            return None
        if self.context_model is ContextModel.SIGNS:
            return self.values
        if self.has_corrections:
            return np.full(len(self.advances), -1, np.int8)
        return self.advances

    @property
    def has_corrections(self) -> bool:
        """Whether a symbol adds to the weight where the one before it has led."""
        return bool(((self.advances == 0) & (self.values != 0)).any())

    @property
    def rest(self) -> int:
        """Entries behind those of the last tensor."""
        return self.payload.size * self.slots - sum(part.entries for part in self.parts)

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(array.nbytes for array in (self.payload, self.bits, self.advances, self.values))


@dataclass(frozen=True, eq=False)
class SymbolSequence:
    """One tensor, ready to be coded.

    Attributes:
        shape: The weight's own.
        permutation: The axes in the order in which they are coded, outermost first.
        encoded: int64, pairs of all contexts, see `symbols.add_contexts`.
        top: The largest |level| of the file.
    """

    shape: tuple[int, ...]
    permutation: tuple[int, ...]
    encoded: np.ndarray
    top: int


def find_top(tensors: Sequence[np.ndarray]) -> int:
    """Find the largest |level| of a file.

    Args:
        tensors: int8, none of them empty.

    Returns:
        In [0, 128].
    """
    top = 0
    for levels in tensors:
        top = max(top, int(levels.max()), -int(levels.min()))
    return top


@dataclass(frozen=True, eq=False)
class Coding:
    """How a stream is coded.

    Attributes:
        context_model: Its trees.
        alphabet: Its symbols: of all contexts for SIGNS, of one otherwise.
        shortest: Bits that each codeword has at least.
        lengths: Of each tree, in bits, see `huffman.compute_codeword_lengths`.
        nbytes: Of codewords and tables, ends of lanes aside.
    """

    context_model: ContextModel
    alphabet: Alphabet
    shortest: int
    lengths: tuple[np.ndarray, ...]
    nbytes: int

    @classmethod
    def of(cls, context_model: ContextModel, alphabet: Alphabet, shortest: int) -> Coding:
        """Compute codeword lengths, and what they make of a stream.

        Args:
            context_model: The trees.
            alphabet: Of all contexts for SIGNS, of one otherwise.
            shortest: Bits that each codeword shall have at least: 1, 2 or 4.

        Returns:
            The coding.
        """
        alone = context_model is ContextModel.PLAIN
        lengths = []
        codeword_bits = 0
        for symbol_ids in list_symbol_ids(context_model, alphabet):
            counts = alphabet.counts[symbol_ids]
            own = huffman.compute_codeword_lengths(counts, shortest, alone=alone)
            codeword_bits += int((counts * own[: len(counts)]).sum())  # fillers are never used
            lengths.append(own)
        # A tree of n leaves takes 2 n - 2 bits; each leaf an advance and a value, and so does none.
        leaves = sum(len(own) for own in lengths)
        nbytes = (codeword_bits + 2 * leaves - 2) // 8 + 2 * leaves + 4
        return cls(context_model, alphabet, shortest, tuple(lengths), nbytes)

    @property
    def leaves(self) -> int:
        """Of all trees, fillers included."""
        return sum(len(own) for own in self.lengths)

    def build_code(self) -> huffman.Code:
        """Build the prefix code.

        Returns:
            Codewords and trees.
        """
        symbol_ids = list_symbol_ids(self.context_model, self.alphabet)
        parts = list(zip(symbol_ids, self.lengths, strict=True))
        return huffman.build_code(parts, [len(path) for _, path in self.context_model.value])


def list_symbol_ids(context_model: ContextModel, alphabet: Alphabet) -> list[np.ndarray]:
    """List the symbols of each tree.

    Args:
        context_model: The trees.
        alphabet: The symbols, numbered context by context.

    Returns:
        Ascending symbol ids of each tree, from left to right.
    """
    ends = np.cumsum(alphabet.sizes)
    begins = ends - alphabet.sizes
    found = []
    for context, _ in context_model.value:
        if context is None:
            found.append(np.arange(0))
        else:
            found.append(np.arange(begins[context], ends[context]))
    return found


def count_slots(shortest: int) -> int:
    """Count the entries of a byte.

    Args:
        shortest: Bits of the shortest codeword: 1, 2 or 4.

    Returns:
        8, 4 or 2: how many parts of a byte may each end one codeword.
    """
    return huffman.DIGIT // shortest
