"""Spells pairs with the symbols of an alphabet, by a table of all pairs."""

from __future__ import annotations

import numpy as np

from ecqx_onnx_converters.storage.packed.alphabets.alphabet import Alphabet
from ecqx_onnx_converters.storage.packed.symbols import CONTEXTS, count_pairs


def list_spellings(alphabet: Alphabet, top: int) -> tuple[np.ndarray, np.ndarray]:
    """List the symbols that spell each pair, as a table for `spell_pairs`.

    Args:
        alphabet: Of one context, which spells the pairs of all alike, or of all contexts.
        top: The largest |level| of the file.

    Returns:
        Symbol ids in their order, int [longest, pairs of all contexts]; and how many these are, int
        [pairs of all contexts], 0 for what cannot occur.
    """
    pairs = len(alphabet.sizes) * count_pairs(top)
    rows = list[np.ndarray]()
    lengths = np.zeros(pairs, np.int64)
    # Each turn notes one symbol of every pair, and goes on with those of which something remains.
    at = np.arange(len(alphabet.places))
    places = alphabet.places
    while len(at):
        rows.append(np.zeros(pairs, np.int64))
        rows[-1][places] = alphabet.symbol_id[at]
        lengths[places] += 1
        unfinished = np.flatnonzero(alphabet.rest[at] >= 0)
        at = alphabet.rest[at[unfinished]]
        places = places[unfinished]
    alike = CONTEXTS // len(alphabet.sizes)
    return np.tile(rows or [lengths], alike), np.tile(lengths, alike)


def spell_pairs(encoded: np.ndarray, spelling: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Spell pairs with symbols.

    Args:
        encoded: int [n], pairs of all contexts.
        spelling: [longest, pairs], any integers that stand for the symbols of `list_spellings`.
        lengths: int [pairs], see `list_spellings`.

    Returns:
        spelling's dtype [sum of the lengths of all pairs].
    """
    count = lengths[encoded]
    ends = np.cumsum(count)
    begins = ends - count
    symbols = np.empty(int(ends[-1]) if len(ends) else 0, spelling.dtype)
    symbols[begins] = spelling[0][encoded]
    # The few pairs of several symbols, one symbol a turn.
    longer = np.flatnonzero(count > 1)
    for place in range(1, len(spelling)):
        symbols[begins[longer] + place] = spelling[place][encoded[longer]]
        longer = longer[count[longer] > place + 1]
    return symbols
