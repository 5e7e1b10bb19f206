"""(float graph, matching, target) -> Plan: which storage and which dequantisation each weight gets, with the reason in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ecqx_onnx.errors import OptionError
from ecqx_onnx.tensors import Codebook, QuantTensor
from ecqx_onnx_converters.consumers import StandardForm, Use, find_uses, standard_form
from ecqx_onnx_converters.dequantization import why_not_standard
from ecqx_onnx_converters.graph import FloatGraph, value_names
from ecqx_onnx_converters.matching import GraphWeight, Matching, Missing
from ecqx_onnx_converters.names import NameMaker
from ecqx_onnx_converters.opsets import why_not_opset
from ecqx_onnx_converters.storage import Refusal, Stored
from ecqx_onnx_converters.storage.registry import STORAGES
from ecqx_onnx_converters.targets import OPSET_OF_TYPE, Target, find_target

DEQUANTIZATIONS = ("auto", "standard", "folded")
STEPS_UP = (11, 13, 18, 21, 25)  # opsets that bring something a written file may need


@dataclass(frozen=True, eq=False)
class Entry:
    """What one weight of the graph becomes.

    stored: its integers; tied weights share one.
    permutation: of the stored levels, to get the graph's layout; None where they have it already.
    form: how DequantizeLinear feeds the consumers; None for the folded function.
    """

    weight: GraphWeight
    stored: Stored
    permutation: tuple[int, ...] | None
    form: StandardForm | None
    reason: str

    @property
    def dequantization(self) -> str:
        return "folded" if self.form is None else "standard"


@dataclass(frozen=True)
class Kept:
    """A weight that stays float, and why."""

    name: str
    shape: tuple[int, ...]
    reason: str


@dataclass(frozen=True, eq=False)
class Plan:
    graph: FloatGraph
    target: Target
    opset: int
    entries: tuple[Entry, ...]
    kept: tuple[Kept, ...]
    missing: tuple[Missing, ...]


def make_plan(
    graph: FloatGraph,
    matching: Matching,
    *,
    target: str = "onnxruntime",
    storage: str = "auto",
    dequantize: str = "auto",
    opset: int | None = None,
) -> Plan:
    """storage: "auto" (fewest bytes per tensor) or a name from STORAGES. dequantize: "auto" (the target's own), "standard" or
    "folded". opset: highest to write; by default whatever the target has. OptionError for what can't be had at all; what a single
    weight can't have is replaced, and its entry says why."""
    if storage not in ("auto", *STORAGES):
        raise OptionError(f"there is no storage '{storage}'; choose auto or one of {', '.join(STORAGES)}")
    if dequantize not in DEQUANTIZATIONS:
        raise OptionError(f"there is no dequantisation '{dequantize}'; choose one of {', '.join(DEQUANTIZATIONS)}")
    able = _able(graph, find_target(target), opset)
    form = able.dequantize if dequantize == "auto" else dequantize
    uses, names = find_uses(graph.proto.graph), NameMaker(value_names(graph.proto.graph))
    entries: list[Entry] = []
    kept: list[Kept] = []
    for members in _tied(matching.found):
        planned = _plan_tied(members, able, storage, form, uses, names)
        if isinstance(planned, Refusal):
            kept.extend(Kept(member.name, member.tensor.shape, planned.reason) for member in members)
        else:
            entries.extend(planned)
    if storage != "auto" and entries and all(entry.stored.storage != storage for entry in entries):
        raise OptionError(
            f"storage '{storage}' can't be had for any weight: layer '{entries[0].weight.name}': {entries[0].reason}"
        )
    quantised = {entry.weight.name for entry in entries} | {left.name for left in kept}
    for name, values in graph.weights.items():
        if name not in quantised and values.dtype == np.float32 and values.ndim >= 2:
            kept.append(Kept(name, values.shape, "no quantised tensor has its name or values"))
    needed = max((_needs(entry) for entry in entries), default=0)
    order = {name: index for index, name in enumerate(graph.weights)}
    entries.sort(key=lambda entry: order[entry.weight.name])
    return Plan(graph, able, max(graph.opset, needed), tuple(entries), tuple(kept), matching.missing)


def _able(graph: FloatGraph, target: Target, opset: int | None) -> Target:
    """The target, less what this graph can't use: opsets, and their types, that would change the graph's meaning."""
    ceiling = target.max_opset if opset is None else opset
    if ceiling > target.max_opset:
        raise OptionError(
            f"target '{target.name}' has opsets up to {target.max_opset}, not {opset}: use --opset {target.max_opset}"
        )
    if graph.opset > ceiling:
        raise OptionError(
            f"the graph has opset {graph.opset}, and {ceiling} is asked for: export it with opset {ceiling}, or raise --opset"
        )
    reach = graph.opset
    for step in (step for step in STEPS_UP if graph.opset < step <= ceiling):
        if why_not_opset(graph.proto, step) is not None:
            break
        reach = step
    types = frozenset(kind for kind in target.dense_types if OPSET_OF_TYPE[kind] <= reach)
    return replace(target, max_opset=reach, dense_types=types)


def _tied(found: Sequence[GraphWeight]) -> list[list[GraphWeight]]:
    """Weights grouped by the memory that their levels are views of: copies of one parameter, transposed or not."""
    groups: dict[tuple, list[GraphWeight]] = {}
    for weight in found:
        levels = weight.tensor.levels
        layout = tuple(sorted(zip(levels.strides, levels.shape, strict=True)))
        groups.setdefault((levels.__array_interface__["data"][0], layout), []).append(weight)
    return list(groups.values())


def _plan_tied(
    members: Sequence[GraphWeight],
    target: Target,
    storage: str,
    dequantize: str,
    uses: Mapping[str, Sequence[Use]],
    names: NameMaker,
) -> list[Entry] | Refusal:
    forms = [_form(member, dequantize, uses.get(member.name, []), target) for member in members]
    wanted = [
        _transposed(member.tensor) if _is_turned(form) else member.tensor for member, form in zip(members, forms, strict=True)
    ]
    # One set of integers, in the layout that the first member wants; another member may want it transposed.
    levels = wanted[0].levels
    stored, reason = _cheapest(levels, names("q"), target, storage)
    if stored is None:
        return Refusal(reason)
    entries = []
    for member, form, tensor in zip(members, forms, wanted, strict=True):
        permutation = None if tensor.levels.strides == levels.strides and tensor.shape == levels.shape else (1, 0)
        if permutation and form is not None and not isinstance(form, Refusal):
            form = Refusal("it is stored once with its tied twin, in the other layout")
        why = reason
        if isinstance(form, Refusal):
            why += f"; folded, since {form.reason}"
            permutation = (
                None if member.tensor.levels.strides == levels.strides and member.tensor.shape == levels.shape else (1, 0)
            )
        standard = form if isinstance(form, StandardForm) else None
        entries.append(Entry(member, stored, permutation, standard, why))
    return entries


def _is_turned(form: StandardForm | Refusal | None) -> bool:
    return isinstance(form, StandardForm) and form.transposed


def _transposed(tensor: QuantTensor) -> QuantTensor:
    return tensor.transpose((1, 0))


def _form(weight: GraphWeight, dequantize: str, uses: Sequence[Use], target: Target) -> StandardForm | Refusal | None:
    """None where the folded function is wanted anyway."""
    if dequantize == "folded":
        return None
    if target.max_opset < 13:
        return Refusal("DequantizeLinear along an axis needs opset 13, which the graph can't be raised to")
    return why_not_standard(weight.tensor) or standard_form(weight.tensor, uses)


def _cheapest(levels: np.ndarray, name: str, target: Target, storage: str) -> tuple[Stored | None, str]:
    """The storage of fewest bytes among those allowed, dense where none of them can; and why."""
    allowed = list(STORAGES) if storage == "auto" else [storage]
    results = {label: STORAGES[label].encode(levels, name, target) for label in allowed}
    stored = [result for result in results.values() if isinstance(result, Stored)]
    refused = [f"{label}: {result.reason}" for label, result in results.items() if isinstance(result, Refusal)]
    if not stored and storage != "dense":
        fallback, why = _cheapest(levels, name, target, "dense")
        return fallback, "; ".join([*refused, why])
    if not stored:
        return None, "; ".join(refused)
    best = min(stored, key=lambda result: result.nbytes)
    others = [f"{result.label} {result.nbytes}" for result in stored if result is not best]
    return best, f"{best.label} {best.nbytes} bytes" + (f", less than {', '.join(others)}" if others else "")


def _needs(entry: Entry) -> int:
    """The first opset that has all that the entry uses."""
    needed = [entry.stored.opset]
    if isinstance(entry.weight.tensor.meaning, Codebook):
        needed.append(11)  # Gather with negative indices
    if entry.form is not None:
        needed.append(13)
    return max(needed)
