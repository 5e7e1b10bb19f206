"""Decide which storage and which dequantization each weight of a float graph gets, and say why.

A float graph, the levels found for its weights and a target enter; a Plan leaves.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

import numpy as np

from ecqx_onnx.errors import OptionError
from ecqx_onnx.tensors import Codebook, Scale
from ecqx_onnx_converters.dequantization.dequantization import refuse_standard
from ecqx_onnx_converters.dequantization.standard import StandardForm, find_standard_form
from ecqx_onnx_converters.graph.graph import FloatGraph, list_value_names
from ecqx_onnx_converters.graph.names import NameMaker
from ecqx_onnx_converters.graph.opsets import refuse_opset
from ecqx_onnx_converters.graph.uses import Use, find_uses
from ecqx_onnx_converters.matching.matching import GraphWeight, Matching
from ecqx_onnx_converters.planning.load_cost import describe_load
from ecqx_onnx_converters.planning.packed_choice import pack_entries
from ecqx_onnx_converters.planning.plan import Entry, Kept, Plan
from ecqx_onnx_converters.refusal import Refusal
from ecqx_onnx_converters.storage import Stored
from ecqx_onnx_converters.storage.registry import STORAGES
from ecqx_onnx_converters.targets import INT8_TYPES, OPSET_OF_TYPE, Target, find_target

PREFERENCES = ("auto", "disk", "load")
DEQUANTIZATIONS = ("auto", "standard", "folded")
STEPS_UP = (10, 11, 12, 13, 18, 21, 25)  # opsets that bring something a written file may need
# Operator -> position of its bias.
BIAS_POSITIONS = {"LSTM": 3, "GRU": 3, "RNN": 3, "Gemm": 2, "Conv": 2, "ConvTranspose": 2}


def check_forms(storage: str, dequantize: str) -> None:
    """Refuses names of a storage or a dequantization that do not exist.

    Args:
        storage: "auto" or a name from STORAGES.
        dequantize: a name from DEQUANTIZATIONS.

    Raises:
        OptionError: there is no such storage or dequantization.
    """
    if storage not in ("auto", *STORAGES):
        raise OptionError(
            f"there is no storage '{storage}'; choose auto or one of {', '.join(STORAGES)}"
        )
    if dequantize not in DEQUANTIZATIONS:
        raise OptionError(
            f"there is no dequantisation '{dequantize}'; choose one of {', '.join(DEQUANTIZATIONS)}"
        )


def make_plan(
    graph: FloatGraph,
    matching: Matching,
    *,
    target: str = "onnxruntime",
    storage: str = "auto",
    dequantize: str = "auto",
    opset: int | None = None,
    integer: Collection[str] = (),
    prefer: str = "auto",
) -> Plan:
    """Plans how each weight of a graph is stored and dequantized.

    What a single weight can't have is replaced, and its entry says why.

    Args:
        graph: the float graph.
        matching: the levels found for its weights.
        target: name of the runtime that is to read the file.
        storage: "auto", as `prefer` says, or a name from STORAGES.
        dequantize: "auto" (the target's own), "standard" or "folded".
        opset: highest to write; None for the highest of the target.
        integer: names of weights whose consumers all are integer kernels, which need
            DequantizeLinear in any case.
        prefer: with storage "auto": "disk" for the fewest bytes in the file, "load" for nothing
            that is decoded at load, "auto" for the fewest bytes where they are worth decoding.

    Returns:
        The plan; its entries are in the order of `matching.found`.

    Raises:
        OptionError: a name is unknown, the target has no such opset or dequantization, or no weight
            at all can have the storage.
    """
    # 1. What the target can do for this graph.
    check_forms(storage, dequantize)
    able = _limit_target(graph, find_target(target), opset)
    form = able.dequantize if dequantize == "auto" else dequantize
    check_preference(prefer, storage)
    if prefer == "load":
        able = replace(able, decoders=False)
    if form != able.dequantize and able.only:
        raise OptionError(
            f"target '{target}' cannot have --dequantize {form}: {able.only}; leave it at "
            f"{able.dequantize}"
        )

    # 2. Each weight alone; tied weights together.
    uses = find_uses(graph.proto.graph)
    outputs = {value.name for value in graph.proto.graph.output}
    names = NameMaker(list_value_names(graph.proto.graph))
    entries: list[Entry] = []
    kept: list[Kept] = []
    for members in _group_tied(matching.found):
        planned = _plan_tied(members, able, storage, form, uses, outputs, names, integer)
        if not isinstance(planned, Refusal):
            entries.extend(planned)
            continue
        for member in members:
            kept.append(Kept(member.name, member.tensor.shape, planned.reason))
    # In the order of the matching: a checkpoint's graph has the weights taken out.
    position = {weight.name: index for index, weight in enumerate(matching.found)}
    entries.sort(key=lambda entry: position[entry.weight.name])

    # 3. Packed weights share streams: they are chosen together.
    weighed = ""
    if storage in ("auto", "packed") and prefer != "load":
        entries, weighed = pack_entries(
            entries,
            able,
            always=storage == "packed",
            weigh=storage == prefer == "auto",
            other_bytes=_count_other_bytes(graph, entries),
        )
    if storage != "auto" and entries and all(entry.stored.storage != storage for entry in entries):
        raise OptionError(
            f"storage '{storage}' can't be had for any weight (leave --storage at auto): layer "
            f"'{entries[0].weight.name}': {entries[0].reason}"
        )

    # 4. The other float weights stay float.
    planned_names = {entry.weight.name for entry in entries} | {left.name for left in kept}
    for name, values in graph.weights.items():
        is_weight = values.dtype in (np.float32, np.float16) and values.ndim >= 2
        if is_weight and name not in planned_names:
            kept.append(Kept(name, values.shape, _explain_float(uses.get(name, []))))
    needed = max((find_needed_opset(entry) for entry in entries), default=0)
    levels = {}
    for entry in entries:
        if entry.stored.storage == "packed":
            levels[entry.stored.levels] = entry.weight.tensor.levels
    return Plan(
        graph=graph,
        target=able,
        opset=max(graph.opset, needed),
        entries=tuple(entries),
        kept=tuple(kept),
        missing=matching.missing,
        notes=(weighed,) if weighed else describe_load([*levels.values()]),
    )


def check_preference(prefer: str, storage: str) -> None:
    """Refuses a preference that there is not, or that a storage leaves no choice.

    Args:
        prefer: a name from PREFERENCES.
        storage: "auto" or a name from STORAGES.

    Raises:
        OptionError: there is no such preference, or the storage is not "auto".
    """
    if prefer not in PREFERENCES:
        raise OptionError(f"nothing prefers '{prefer}'; choose one of {', '.join(PREFERENCES)}")
    if prefer != "auto" and storage != "auto":
        raise OptionError(
            f"--prefer {prefer} chooses among storages, and --storage {storage} is one; leave one"
            " of them out"
        )


def _count_other_bytes(graph: FloatGraph, entries: Sequence[Entry]) -> int:
    """What the file holds beside its quantized weights."""
    quantized = {entry.weight.name for entry in entries}
    floats = 0
    for name, values in graph.weights.items():
        if name not in quantized:
            floats += values.nbytes
    return floats + sum(node.ByteSize() for node in graph.proto.graph.node)


def _explain_float(uses: Sequence[Use]) -> str:
    """Why a weight that no QuantTensor was found for stays float."""
    if uses and all(BIAS_POSITIONS.get(use.node.op_type) == use.position for use in uses):
        return "biases stay float"
    return "no quantised tensor has its name or values"


def _limit_target(graph: FloatGraph, target: Target, opset: int | None) -> Target:
    """The target, less what this graph can't use: opsets, and their types, that would change the
    graph's meaning."""
    ceiling = target.max_opset if opset is None else opset
    if ceiling > target.max_opset:
        raise OptionError(
            f"target '{target.name}' has opsets up to {target.max_opset}, not {opset}: use --opset "
            f"{target.max_opset}"
        )
    if graph.opset > ceiling:
        raise OptionError(
            f"the graph has opset {graph.opset}, and {ceiling} is asked for: export it with opset "
            f"{ceiling}, or raise --opset"
        )
    reach = graph.opset
    for opset_step in STEPS_UP:
        if not graph.opset < opset_step <= ceiling:
            continue
        if refuse_opset(graph.proto, opset_step) is not None:
            break
        reach = opset_step
    types = frozenset(kind for kind in target.dense_types if OPSET_OF_TYPE[kind] <= reach)
    return replace(target, max_opset=reach, dense_types=types)


def _group_tied(found: Sequence[GraphWeight]) -> list[list[GraphWeight]]:
    """Weights grouped by their levels: those of one parameter that are equal, as they are or
    transposed, are stored once."""
    groups: list[list[GraphWeight]] = []
    for weight in found:
        for group in groups:
            if group[0].sources == weight.sources and _are_tied(group[0], weight):
                group.append(weight)
                break
        else:
            groups.append([weight])
    return groups


def _are_tied(one: GraphWeight, other: GraphWeight) -> bool:
    """Whether the levels are equal, as they are or transposed."""
    levels = one.tensor.levels
    others = other.tensor.levels
    if np.array_equal(levels, others):
        return True
    return others.ndim == 2 and np.array_equal(levels, others.T)


def _plan_tied(
    members: Sequence[GraphWeight],
    target: Target,
    storage: str,
    dequantize: str,
    uses: Mapping[str, Sequence[Use]],
    outputs: Collection[str],
    names: NameMaker,
    integer: Collection[str],
) -> list[Entry] | Refusal:
    """One set of integers, in the layout that the first member wants, for all."""
    # 1. How each member is dequantized, and whether narrow integers would need a Cast for it.
    forms: list[StandardForm | Refusal | None] = []
    needs_cast = False
    for member in members:
        consumers = uses.get(member.name, [])
        form: StandardForm | Refusal | None
        if member.name in integer:
            form = StandardForm(transposed=False, dense=True, integer=True)
        else:
            is_output = member.name in outputs
            form = _choose_form(member, dequantize, consumers, target, is_output=is_output)
        forms.append(form)
        if isinstance(form, StandardForm):
            gathered = any(use.node.op_type == "Gather" for use in consumers)
            needs_cast = needs_cast or form.integer or gathered
    # A Cast is a decoder (and in onnxruntime as of 1.23).
    if needs_cast and not target.decoders:
        target = replace(target, dense_types=target.dense_types & INT8_TYPES)

    # 2. One storage for all.
    levels = _permute_levels(members[0], forms[0])
    stored, reason = choose_cheapest(levels, names("q"), target, storage)
    if stored is None:
        return Refusal(reason)

    # 3. DequantizeLinear where that layout is the one it reads, else the folded function.
    entries = []
    for member, form in zip(members, forms, strict=True):
        if isinstance(form, StandardForm):
            if np.array_equal(_permute_levels(member, form), levels):
                entries.append(Entry(member, stored, None, form, reason))
                continue
            form = Refusal("it is stored once with its tied twin, in the other layout")
        why = reason
        if form is not None:
            why = f"{reason}; folded, since {form.reason}"
        permutation = None if np.array_equal(member.tensor.levels, levels) else (1, 0)
        entries.append(Entry(member, stored, permutation, None, why))
    return entries


def _permute_levels(weight: GraphWeight, form: StandardForm | Refusal | None) -> np.ndarray:
    """int8: the levels in the layout that the weight's dequantization reads."""
    if isinstance(form, StandardForm) and form.transposed:
        return weight.tensor.levels.T
    return weight.tensor.levels


def _choose_form(
    weight: GraphWeight,
    dequantize: str,
    uses: Sequence[Use],
    target: Target,
    *,
    is_output: bool,
) -> StandardForm | Refusal | None:
    """None where the folded function is wanted anyway, or integers."""
    if dequantize == "folded" or weight.integers is not None:
        return None
    refusal = refuse_standard(weight.tensor)
    if refusal is not None:
        return refusal
    opset = _find_standard_opset(weight)
    if target.max_opset < opset:
        return Refusal(f"DequantizeLinear needs opset {opset}, which the graph can't be raised to")
    return find_standard_form(weight.tensor, uses, is_output=is_output)


def _find_standard_opset(weight: GraphWeight) -> int:
    """10 for one step, 13 for one per index of an axis."""
    meaning = weight.tensor.meaning
    if isinstance(meaning, Scale) and meaning.axis is not None:
        return 13
    return 10


def choose_cheapest(
    levels: np.ndarray, name: str, target: Target, storage: str
) -> tuple[Stored | None, str]:
    """The storage of fewest bytes for one weight alone, and why.

    Args:
        levels: int8, in the layout in which they are stored.
        name: for the initializers and nodes of the storage.
        target: the runtime that is to read the file.
        storage: "auto" (dense or sparse), "packed" (dense, until all weights are chosen together)
            or another name from STORAGES.

    Returns:
        The storage, dense where none of those allowed can hold the levels, or None where dense
        can't either; and the reason in words.
    """
    allowed = {"auto": ["dense", "sparse"], "packed": ["dense"]}.get(storage, [storage])
    stored: list[Stored] = []
    refused: list[str] = []
    for label in allowed:
        result = STORAGES[label].encode(levels, name, target)
        if isinstance(result, Stored):
            stored.append(result)
        else:
            refused.append(f"{label}: {result.reason}")
    if not stored and storage != "dense":
        fallback, why = choose_cheapest(levels, name, target, "dense")
        return fallback, "; ".join([*refused, why])
    if not stored:
        return None, "; ".join(refused)
    best = min(stored, key=lambda result: result.nbytes)
    others = [f"{result.label} {result.nbytes}" for result in stored if result is not best]
    reason = f"{best.label} {best.nbytes} bytes"
    if others:
        reason += f", less than {', '.join(others)}"
    return best, reason


def find_needed_opset(entry: Entry) -> int:
    """The first opset that has all that an entry uses.

    Args:
        entry: a weight's storage and dequantization.

    Returns:
        The version of the standard operators.
    """
    needed = [entry.stored.opset]
    if entry.weight.integers is not None:
        needed.append(OPSET_OF_TYPE[entry.weight.integers.type])
    if isinstance(entry.weight.tensor.meaning, Codebook):
        needed.append(11)  # Gather with negative indices
    if entry.form is not None:
        needed.append(_find_standard_opset(entry.weight))
    return max(needed)
