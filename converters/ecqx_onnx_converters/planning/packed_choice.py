"""Choose which weights of a file are stored packed, by the bytes of the whole file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from google.protobuf.message import Message

from ecqx_onnx.tensors import Scale
from ecqx_onnx_converters.planning.plan import Entry
from ecqx_onnx_converters.refusal import Refusal
from ecqx_onnx_converters.storage import Stored
from ecqx_onnx_converters.storage.packed.alphabets.alphabet import MOST_VALUES
from ecqx_onnx_converters.storage.packed.alphabets.corrections import needs_corrections
from ecqx_onnx_converters.storage.packed.clusters import encode_all
from ecqx_onnx_converters.storage.packed.onnx_decoder import TENSOR
from ecqx_onnx_converters.targets import Target

CALL_BYTES = 30  # of a second call, which a packed weight needs unless its call is fused
FUNCTION_BYTES = 70  # of a second function, for the weights of the file that are not packed


# Weights of a file from which on `auto` weighs what decoding costs at load; below, it takes less
# than 20 ms.
WEIGHED_FROM = 1 << 18
# Of the whole file, that packing must save then. Gaussian levels of 4 bits take 3.3 to 3.9 bits
# packed. They save 17 % of a ResNet-50, which then loads in 6 times the float model's time and 1.3
# times its memory, and 12 to 14 % of a MiniLM, in 10 times and 2.6 times (`make bench-load`).
LEAST_SAVING = 0.15


def choose_fused(entries: Sequence[Entry]) -> str | None:
    """The function that can decode and dequantize all packed weights at once.

    Args:
        entries: weights of one file, packed or not.

    Returns:
        A key of FUSED (dequantization/fused.py); None if there is none that all packed weights can
        have, if tied weights share packed levels, or if no weight is packed.
    """
    packed = [entry for entry in entries if entry.stored.storage == "packed"]
    functions = {_classify_entry(entry) for entry in packed}
    if functions == {"V", "W"} or (functions == {"V"} and _may_have_corrections(packed)):
        functions = {"W"}  # it takes single steps as well, and multiplies whole levels
    distinct_levels = {entry.stored.levels for entry in packed}
    if len(functions) != 1 or len(distinct_levels) != len(packed):
        return None
    return functions.pop()


def _compute_saving(entries: Sequence[Entry]) -> int:
    """Bytes that fused calls save in a file of these entries, some of them packed."""
    if choose_fused(entries) is None:
        return 0
    packed = sum(entry.stored.storage == "packed" for entry in entries)
    saving = CALL_BYTES * packed
    if packed < len(entries):
        saving -= FUNCTION_BYTES
    return saving


def _may_have_corrections(packed: Sequence[Entry]) -> bool:
    """Whether a level may be a sum of two values, which V's products of values and step are not."""
    levels = [entry.weight.tensor.levels for entry in packed]
    return needs_corrections(levels, MOST_VALUES)


def _classify_entry(entry: Entry) -> str | None:
    """The key of FUSED of the function that a packed weight can have; None if there is none."""
    weight = entry.weight
    if entry.form is not None or entry.permutation is not None or weight.integers is not None:
        return None
    calls = [node for node in entry.stored.nodes if node.op_type == TENSOR]
    if len(calls) > 1 or len(calls[0].input) != 4:
        return None
    if isinstance(weight.tensor.meaning, Scale):
        step = weight.tensor.meaning.step
        return "V" if step.ndim == 0 and 0 < step < np.inf else "W"
    return "B" if weight.factor is None else "F"


def pack_entries(
    entries: Sequence[Entry],
    target: Target,
    *,
    always: bool,
    weigh: bool = False,
    other_bytes: int = 0,
) -> tuple[list[Entry], str]:
    """Packs those weights that make the file smallest.

    Packed weights share streams, and their decoder is written once: whether one weight gains
    depends on the others. Candidates are all weights, those of them that are smaller packed, those
    of these that still are ... and none.

    Args:
        entries: weights of one file, each stored alone.
        target: the runtime that is to read the file.
        always: pack every weight that can be packed, whatever it costs.
        weigh: pack none of a file of WEIGHED_FROM weights or more that saves less than
            LEAST_SAVING of it.
        other_bytes: what the file holds beside these weights.

    Returns:
        The entries in their order, the packed ones with their new storage; the reason of each says
        what was compared. And a sentence about what was weighed, or "".
    """
    # 1. Tied weights share one set of integers, which is encoded once.
    first = dict[str, Entry]()
    for entry in entries:
        first.setdefault(entry.stored.levels, entry)
    plain = {name: entry.stored for name, entry in first.items()}
    remaining = {name: _permute_levels(entry) for name, entry in first.items()}

    # 2. Encode together what still gains, until every weight of a candidate does.
    encoded = dict[str, Stored | Refusal]()
    candidates: list[dict[str, Stored]] = []
    if not always:
        candidates.append({})
    while remaining:
        results = encode_all(list(remaining.items()), target)
        encoded.update(zip(remaining, results, strict=True))
        packed: dict[str, Stored] = {}
        for name in remaining:
            result = encoded[name]
            if isinstance(result, Stored):
                packed[name] = result
        candidates.append(packed)
        smaller_packed = {
            name for name, stored in packed.items() if stored.nbytes < plain[name].nbytes
        }
        if always or len(smaller_packed) == len(packed):
            break
        remaining = {name: levels for name, levels in remaining.items() if name in smaller_packed}
    if not candidates:
        return list(entries), ""

    # 3. The candidate of fewest bytes; the earlier one where two have as many.
    def entries_with(packed: dict[str, Stored]) -> list[Entry]:
        chosen = []
        for entry in entries:
            name = entry.stored.levels
            chosen.append(_pack_entry(entry, packed.get(name), encoded[name], always=always))
        return chosen

    def count_file_bytes(packed: dict[str, Stored]) -> int:
        total = _count_bytes([*(plain | packed).values()])
        if packed:
            total -= _compute_saving(entries_with(packed))
        return total

    sizes = [count_file_bytes(packed) for packed in candidates]
    least = min(sizes)
    best = candidates[sizes.index(least)]
    # 4. Is it worth the load?
    weights = sum(_permute_levels(first[name]).size for name in best)
    # A file of empty tensors alone has no bytes.
    saving = (sizes[0] - least) / max(1, sizes[0] + other_bytes)
    if not weigh or weights < WEIGHED_FROM or saving >= LEAST_SAVING:
        return entries_with(best), ""
    sentence = (
        f"packed weights would save {saving:.1%} of the file, less than the {LEAST_SAVING:.1%} that"
        f" decoding {weights / 1e6:.1f} million weights at every load is held to be worth: none is"
        " packed; --prefer disk takes the fewest bytes"
    )
    return entries_with({}), sentence


def _pack_entry(
    entry: Entry, stored: Stored | None, encoded: Stored | Refusal, *, always: bool
) -> Entry:
    """The entry with `stored`, or as it is where that is None; the reason tells of the attempt."""
    if stored is not None:
        return replace(
            entry, stored=stored, reason=f"packed {stored.nbytes} bytes, less than {entry.reason}"
        )
    if isinstance(encoded, Stored):
        return replace(entry, reason=f"{entry.reason}; packed {encoded.nbytes} and its decoder")
    if not always:
        return entry
    return replace(entry, reason=f"packed: {encoded.reason}; {entry.reason}")


def _permute_levels(entry: Entry) -> np.ndarray:
    """int8: the entry's levels in the layout in which they are stored."""
    levels = entry.weight.tensor.levels
    permuted = entry.permutation is not None
    if entry.form is not None and entry.form.transposed:
        permuted = True
    return levels.T if permuted else levels


def _count_bytes(stored: Sequence[Stored]) -> int:
    """Bytes of weights in a file, functions counted once."""
    parts: list[Message] = []
    functions: dict[tuple[str, str], Message] = {}
    for one in stored:
        parts += [*one.initializers, *one.sparse_initializers, *one.nodes]
        for function in one.functions:
            functions[function.domain, function.name] = function
    parts += functions.values()
    return sum(part.ByteSize() for part in parts)
