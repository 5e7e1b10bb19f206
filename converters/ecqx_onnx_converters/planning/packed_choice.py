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
from ecqx_onnx_converters.storage.packed.encoder import encode_all
from ecqx_onnx_converters.storage.packed.onnx_decoder import TENSOR
from ecqx_onnx_converters.targets import Target

CALL_BYTES, FUNCTION_BYTES = (
    30,
    70,
)  # of a second call, and of a second function, for weights that are not packed


def choose_fused(entries: Sequence[Entry]) -> str | None:
    """Which of FUSED all packed weights among these can have; None if there is none."""
    packed = [entry for entry in entries if entry.stored.storage == "packed"]
    kinds = {_classify_entry(entry) for entry in packed}
    if kinds == {"V", "W"}:
        kinds = {"W"}
    alone = len({entry.stored.levels for entry in packed}) == len(packed)
    return kinds.pop() if len(kinds) == 1 and alone else None


def _compute_saving(entries: Sequence[Entry]) -> int:
    """Bytes that fused calls save in a file of these entries, some of them packed."""
    if choose_fused(entries) is None:
        return 0
    packed = sum(entry.stored.storage == "packed" for entry in entries)
    return CALL_BYTES * packed - (FUNCTION_BYTES if packed < len(entries) else 0)


def _classify_entry(entry: Entry) -> str | None:
    weight, calls = entry.weight, [node for node in entry.stored.nodes if node.op_type == TENSOR]
    if (
        entry.form is not None
        or entry.permutation is not None
        or weight.integers is not None
        or len(calls[0].input) != 4
    ):
        return None
    if isinstance(weight.tensor.meaning, Scale):
        step = weight.tensor.meaning.step
        return "V" if step.ndim == 0 and 0 < step < np.inf else "W"
    return "B" if weight.factor is None else "F"


def pack_entries(entries: Sequence[Entry], target: Target, *, always: bool) -> list[Entry]:
    """The entries with those weights packed that make the file smallest; or, always, all that can
    be.

    Packed weights share streams, and their decoder is written once. Tried are all weights, those of
    them that are smaller packed, those of these that still are ... and none.
    """
    first = dict[str, Entry]()  # tied weights are stored once
    for entry in entries:
        first.setdefault(entry.stored.levels, entry)
    chosen = {name: permute_levels(entry) for name, entry in first.items()}
    plain, tried = (
        {name: entry.stored for name, entry in first.items()},
        dict[str, Stored | Refusal](),
    )
    ways: list[dict[str, Stored]] = [] if always else [{}]

    def made(together: dict[str, Stored]) -> list[Entry]:
        levels = ((entry, entry.stored.levels) for entry in entries)
        return [
            _pack_entry(entry, together.get(name), tried[name], always=always)
            for entry, name in levels
        ]

    def size(together: dict[str, Stored]) -> int:
        return count_bytes([*(plain | together).values()]) - (
            _compute_saving(made(together)) if together else 0
        )

    while chosen:
        tried.update(zip(chosen, encode_all(list(chosen.items()), target), strict=True))
        ways.append({name: stored for name in chosen if isinstance(stored := tried[name], Stored)})
        better = {name for name, stored in ways[-1].items() if stored.nbytes < plain[name].nbytes}
        if always or len(better) == len(ways[-1]):
            break
        chosen = {name: levels for name, levels in chosen.items() if name in better}
    return made(min(ways, key=size)) if ways else list(entries)


def _pack_entry(
    entry: Entry, stored: Stored | None, tried: Stored | Refusal, *, always: bool
) -> Entry:
    if stored is not None:
        return replace(
            entry, stored=stored, reason=f"packed {stored.nbytes} bytes, less than {entry.reason}"
        )
    if isinstance(tried, Refusal):
        return replace(entry, reason=f"packed: {tried.reason}; {entry.reason}") if always else entry
    return replace(entry, reason=f"{entry.reason}; packed {tried.nbytes} and its decoder")


def permute_levels(entry: Entry) -> np.ndarray:
    turned = entry.permutation is not None or (entry.form is not None and entry.form.transposed)
    return entry.weight.tensor.levels.T if turned else entry.weight.tensor.levels


def count_bytes(stored: Sequence[Stored]) -> int:
    """Of weights in a file, functions counted once."""
    parts: list[Message] = []
    for one in stored:
        parts += [*one.initializers, *one.sparse_initializers, *one.nodes]
    functions = {(part.domain, part.name): part for one in stored for part in one.functions}
    return sum(part.ByteSize() for part in (*parts, *functions.values()))
