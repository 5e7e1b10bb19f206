"""(float graph, matching, target) -> Plan: which storage and which dequantisation each weight gets,
with the reason in words."""

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
from ecqx_onnx_converters.planning.packed_choice import pack_entries
from ecqx_onnx_converters.planning.plan import Entry, Kept, Plan
from ecqx_onnx_converters.refusal import Refusal
from ecqx_onnx_converters.storage import Stored
from ecqx_onnx_converters.storage.registry import STORAGES
from ecqx_onnx_converters.targets import INT8_TYPES, OPSET_OF_TYPE, Target, find_target

DEQUANTIZATIONS = ("auto", "standard", "folded")
STEPS_UP = (10, 11, 12, 13, 18, 21, 25)  # opsets that bring something a written file may need


def check_forms(storage: str, dequantize: str) -> None:
    """OptionError for names that there are none of."""
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
) -> Plan:
    """storage: "auto" (fewest bytes in the file) or a name from STORAGES. dequantize: "auto" (the
    target's own), "standard" or "folded". opset: highest to write; by default whatever the target
    has. integer: weights whose consumers all are integer kernels, which need DequantizeLinear in
    any case. OptionError for what can't be had at all; what a single weight can't have is replaced,
    and its entry says why."""
    check_forms(storage, dequantize)
    able = _limit_target(graph, find_target(target), opset)
    form = able.dequantize if dequantize == "auto" else dequantize
    if form != able.dequantize and able.only:
        raise OptionError(
            f"target '{target}' cannot have --dequantize {form}: {able.only}; leave it at "
            f"{able.dequantize}"
        )
    uses, names = find_uses(graph.proto.graph), NameMaker(list_value_names(graph.proto.graph))
    entries: list[Entry] = []
    kept: list[Kept] = []
    for members in _group_tied(matching.found):
        planned = _plan_tied(members, able, storage, form, uses, names, integer)
        if isinstance(planned, Refusal):
            kept.extend(
                Kept(member.name, member.tensor.shape, planned.reason) for member in members
            )
        else:
            entries.extend(planned)
    order = {
        weight.name: index for index, weight in enumerate(matching.found)
    }  # a checkpoint's graph has them taken out
    entries.sort(key=lambda entry: order[entry.weight.name])
    if storage in ("auto", "packed"):
        entries = pack_entries(entries, able, always=storage == "packed")
    if storage != "auto" and entries and all(entry.stored.storage != storage for entry in entries):
        raise OptionError(
            f"storage '{storage}' can't be had for any weight (leave --storage at auto): layer "
            f"'{entries[0].weight.name}':"
            f" {entries[0].reason}"
        )
    quantized = {entry.weight.name for entry in entries} | {left.name for left in kept}
    for name, values in graph.weights.items():
        if name not in quantized and values.dtype in (np.float32, np.float16) and values.ndim >= 2:
            kept.append(Kept(name, values.shape, explain_float(name, uses.get(name, []))))
    needed = max((find_needed_opset(entry) for entry in entries), default=0)
    return Plan(
        graph, able, max(graph.opset, needed), tuple(entries), tuple(kept), matching.missing
    )


def explain_float(name: str, uses: Sequence[Use]) -> str:
    biases = {"LSTM": 3, "GRU": 3, "RNN": 3, "Gemm": 2, "Conv": 2, "ConvTranspose": 2}
    if uses and all(biases.get(use.node.op_type) == use.position for use in uses):
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
    for step in (step for step in STEPS_UP if graph.opset < step <= ceiling):
        if refuse_opset(graph.proto, step) is not None:
            break
        reach = step
    types = frozenset(kind for kind in target.dense_types if OPSET_OF_TYPE[kind] <= reach)
    return replace(target, max_opset=reach, dense_types=types)


def _group_tied(found: Sequence[GraphWeight]) -> list[list[GraphWeight]]:
    """Weights grouped by their levels: those of one parameter that are equal, as they are or
    transposed, are stored once."""
    groups: list[list[GraphWeight]] = []
    for weight in found:
        twins = (group for group in groups if group[0].sources == weight.sources)
        group = next((group for group in twins if _are_tied(group[0], weight)), None)
        if group is None:
            groups.append([weight])
        else:
            group.append(weight)
    return groups


def _are_tied(one: GraphWeight, other: GraphWeight) -> bool:
    levels, twin = one.tensor.levels, other.tensor.levels
    return np.array_equal(levels, twin) or (twin.ndim == 2 and np.array_equal(levels, twin.T))


def _plan_tied(
    members: Sequence[GraphWeight],
    target: Target,
    storage: str,
    dequantize: str,
    uses: Mapping[str, Sequence[Use]],
    names: NameMaker,
    integer: Collection[str],
) -> list[Entry] | Refusal:
    """One set of integers, in the layout that the first member wants, for all."""
    forms = [
        StandardForm(transposed=False, dense=True, integer=True)
        if member.name in integer
        else _choose_form(member, dequantize, uses.get(member.name, []), target)
        for member in members
    ]
    pairs = ((form, uses.get(member.name, [])) for form, member in zip(forms, members, strict=True))
    standard = [(form, consumers) for form, consumers in pairs if isinstance(form, StandardForm)]
    cast = any(
        form.integer or any(use.node.op_type == "Gather" for use in consumers)
        for form, consumers in standard
    )
    if (
        not target.decoders and cast
    ):  # narrow types would need a Cast, which is a decoder (and in onnxruntime as of 1.23)
        target = replace(target, dense_types=target.dense_types & INT8_TYPES)
    levels = permute_levels(members[0], forms[0])
    stored, reason = choose_cheapest(levels, names("q"), target, storage)
    if stored is None:
        return Refusal(reason)
    entries = []
    for member, form in zip(members, forms, strict=True):
        if isinstance(form, StandardForm) and not np.array_equal(
            permute_levels(member, form), levels
        ):
            form = Refusal("it is stored once with its tied twin, in the other layout")
        why = f"{reason}; folded, since {form.reason}" if isinstance(form, Refusal) else reason
        if isinstance(form, StandardForm):
            entries.append(Entry(member, stored, None, form, why))
        else:
            permutation = None if np.array_equal(member.tensor.levels, levels) else (1, 0)
            entries.append(Entry(member, stored, permutation, None, why))
    return entries


def permute_levels(weight: GraphWeight, form: StandardForm | Refusal | None) -> np.ndarray:
    """The levels in the layout that the weight's dequantisation reads."""
    return (
        weight.tensor.levels.T
        if isinstance(form, StandardForm) and form.transposed
        else weight.tensor.levels
    )


def _choose_form(
    weight: GraphWeight, dequantize: str, uses: Sequence[Use], target: Target
) -> StandardForm | Refusal | None:
    """None where the folded function is wanted anyway, or integers."""
    if dequantize == "folded" or weight.integers is not None:
        return None
    refusal = refuse_standard(weight.tensor)
    if refusal is not None:
        return refusal
    if target.max_opset < _find_standard_opset(weight):
        return Refusal(
            f"DequantizeLinear needs opset {_find_standard_opset(weight)}, which the graph can't be "
            "raised to"
        )
    return find_standard_form(weight.tensor, uses)


def _find_standard_opset(weight: GraphWeight) -> int:
    """10 for one step, 13 for one per index of an axis."""
    return (
        13
        if isinstance(weight.tensor.meaning, Scale) and weight.tensor.meaning.axis is not None
        else 10
    )


def choose_cheapest(
    levels: np.ndarray, name: str, target: Target, storage: str
) -> tuple[Stored | None, str]:
    """The storage of fewest bytes among those allowed that store each weight alone, dense where
    none of them can; and why."""
    allowed = {"auto": ["dense", "sparse"], "packed": ["dense"]}.get(storage, [storage])
    results = {label: STORAGES[label].encode(levels, name, target) for label in allowed}
    stored = [result for result in results.values() if isinstance(result, Stored)]
    refused = [
        f"{label}: {result.reason}"
        for label, result in results.items()
        if isinstance(result, Refusal)
    ]
    if not stored and storage != "dense":
        fallback, why = choose_cheapest(levels, name, target, "dense")
        return fallback, "; ".join([*refused, why])
    if not stored:
        return None, "; ".join(refused)
    best = min(stored, key=lambda result: result.nbytes)
    others = [f"{result.label} {result.nbytes}" for result in stored if result is not best]
    return best, f"{best.label} {best.nbytes} bytes" + (
        f", less than {', '.join(others)}" if others else ""
    )


def find_needed_opset(entry: Entry) -> int:
    """The first opset that has all that the entry uses."""
    needed = [entry.stored.opset]
    if entry.weight.integers is not None:
        needed.append(OPSET_OF_TYPE[entry.weight.integers.type])
    if isinstance(entry.weight.tensor.meaning, Codebook):
        needed.append(11)  # Gather with negative indices
    if entry.form is not None:
        needed.append(_find_standard_opset(entry.weight))
    return max(needed)
