"""Puts compressed weights back into the PyTorch network that they came from, as a checkpoint.

Compression works on the exported graph: there BatchNormalization has gone into the weights, and
matrices lie as ONNX wants them. Training goes on in PyTorch. To bring each level to its parameter,
the network is exported a second time with numbered entries instead of weights: wherever a number
turns up in the graph, the parameter's entry of that number belongs.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ecqx_onnx.checkpoint.checkpoint import Checkpoint
from ecqx_onnx.checkpoint.export import export_float_graph
from ecqx_onnx.compression.model.biases import with_biases
from ecqx_onnx.compression.model.constants import apply_moves
from ecqx_onnx.compression.model.float_model import fold_into_weights
from ecqx_onnx.compression.model.weights import Weight
from ecqx_onnx.compression.rounding.ordered import Layers, RoundedModel
from ecqx_onnx.compression.rounding.rounding import Rounded
from ecqx_onnx.errors import ModelError
from ecqx_onnx.inputs.program.program import load_program
from ecqx_onnx.preprocessing.preprocessing import Preprocessing
from ecqx_onnx.sources.to_checkpoint import rebuild
from ecqx_onnx.tensors import QuantTensor, Scale

FIRST_NUMBER = 0x10000000  # as bits of a float32: from here on all are finite and normal
MOST_NUMBERS = 0x7F000000 - FIRST_NUMBER
NOTHING = 1.2e-38  # far below the last digit of a number
FOLDING = 1e-4  # relative: what folding BatchNormalization may have rounded
State = dict[str, torch.Tensor]


@dataclass(frozen=True)
class _Numbered:
    """Entries `first` and following are those of this parameter."""

    name: str
    first: int
    size: int


class _Origins:
    """Which entry of which parameter each entry of an initializer is."""

    def __init__(
        self,
        program: torch.export.ExportedProgram,
        state: State,
        layers: Layers,
        *,
        all_biases: bool = False,
    ) -> None:
        marked, self._parameters = _number_entries(state, all_biases=all_biases)
        program.state_dict.update(marked)
        graph = apply_moves(export_float_graph(program))
        program.state_dict.update(state)
        self._weights = graph.weights
        folded, _ = fold_into_weights(graph)
        present = [weight for weight in layers.weights if weight.name in folded.weights]
        biased, self._bias_of = with_biases(folded, present)
        self._biases: Mapping[str, np.ndarray] = biased.weights

    def of_weight(self, name: str) -> list[tuple[_Numbered, np.ndarray, np.ndarray]]:
        """(parameter, its entries, entries of the initializer, both flat) for each parameter."""
        return self._look_up(self._weights.get(name))

    def by_name(self, name: str) -> list[tuple[_Numbered, np.ndarray, np.ndarray]]:
        """The same for a weight that keeps name and layout, though not its values: the exporter
        itself has multiplied BatchNormalization into it."""
        if name not in self._weights:
            return []
        size = self._weights[name].size
        same = [part for part in self._parameters if part.name == name and part.size == size]
        return [(part, np.arange(size), np.arange(size)) for part in same]

    def of_bias(self, weight: str) -> list[tuple[_Numbered, np.ndarray, np.ndarray]]:
        """The same for the bias of a weight, after folding."""
        return self._look_up(self._biases.get(self._bias_of.get(weight, "")))

    def _look_up(self, values: np.ndarray | None) -> list[tuple[_Numbered, np.ndarray, np.ndarray]]:
        if values is None or values.dtype != np.float32:
            return []
        bits = np.ascontiguousarray(values).reshape(-1).view(np.uint32).astype(np.int64)
        numbers = bits - FIRST_NUMBER
        found = []
        seen = 0
        for parameter in self._parameters:
            inside = (numbers >= parameter.first) & (numbers < parameter.first + parameter.size)
            places = np.nonzero(inside)[0]
            if places.size:
                found.append((parameter, numbers[places] - parameter.first, places))
                seen += places.size
        return found if seen == numbers.size else []


def _number_entries(state: State, *, all_biases: bool) -> tuple[State, list[_Numbered]]:
    """The state with numbers instead of weights, and neutral BatchNormalization around them.

    Biases have numbers where BatchNormalization adds them, and with all_biases everywhere: then
    those of a layer and of a normalization behind it would be summed, and neither be found.

    With a mean of nearly 0, variance and factor of nearly 1, a folded bias is what
    BatchNormalization adds: its numbers come through. No two tensors are equal, as the exporter
    would join them.
    """
    normalized = {
        name.removesuffix("running_var") for name in state if name.endswith("running_var")
    }
    neutral = {f"{prefix}running_var" for prefix in normalized}
    neutral |= {f"{prefix}weight" for prefix in normalized}
    marked: State = {}
    parameters: list[_Numbered] = []
    by_place: dict[int, torch.Tensor] = {}
    total = 0
    for name, value in state.items():
        if value.dtype != torch.float32 or not value.numel():
            continue
        is_added = name.endswith(".bias") and name.removesuffix("bias") in normalized
        is_added = is_added or (all_biases and "bias" in name.rpartition(".")[2])
        if value.ndim < 2 and not is_added:
            base = 1.0 if name in neutral else NOTHING
            filling = torch.full_like(value, base * (1 + 1e-3 * len(marked)))
            marked[name] = _make_like(value, filling)
            continue
        known = by_place.get(value.data_ptr())
        if known is not None and known.shape == value.shape:  # tied
            marked[name] = known
            continue
        if total + value.numel() > MOST_NUMBERS:
            raise ModelError("the network is too large for --checkpoint: leave it out")
        bits = np.arange(total, total + value.numel(), dtype=np.uint32) + np.uint32(FIRST_NUMBER)
        numbers = torch.from_numpy(bits.view(np.float32).reshape(tuple(value.shape)))
        marked[name] = by_place[value.data_ptr()] = _make_like(value, numbers)
        parameters.append(_Numbered(name, total, value.numel()))
        total += value.numel()
    return marked, parameters


def _make_like(old: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """The values as a Parameter where the old ones are one."""
    if isinstance(old, torch.nn.Parameter):
        return torch.nn.Parameter(values, requires_grad=False)
    return values


def make_checkpoint(
    source: Checkpoint,
    layers: Layers,
    model: RoundedModel,
    *,
    recipe: Mapping[str, Any],
    preprocessing: Preprocessing | None,
    labels: Sequence[str] = (),
) -> Checkpoint:
    """Make the checkpoint of a compressed PyTorch network, which training can go on from.

    Args:
        source: the float network, none of its weights quantized.
        layers: its graph, as it was compressed.
        model: the rounded weights and corrected biases.
        recipe: how it was made; plain JSON values.
        preprocessing: of raw samples; None if nothing is known.
        labels: names of the classes.

    Returns:
        A checkpoint whose tensors have the levels and steps of the compressed file, the steps
        divided by what BatchNormalization had multiplied. Its notes say which weights and
        corrections have no parameter to go to.

    Raises:
        ModelError: no weight can be brought back.
    """
    program = load_program(source.program, "the float network's program", weights_are_blank=True)
    state = _fill_program(program, source)
    origins = _Origins(program, state, layers)
    places = _Places(state)
    lost = []
    for weight in layers.weights:
        rounded = model.rounded.get(weight.name)
        if rounded is not None and not places.put(layers, weight, rounded, origins):
            lost.append(weight.name)
    tensors = places.tensors(lost)
    if not tensors:
        raise ModelError(
            "no compressed weight is a parameter of the PyTorch network as it stands: leave"
            " --checkpoint out"
        )
    uncorrected = _correct_biases(state, layers, model, origins, model.rounded)
    if uncorrected:
        every = _Origins(program, state, layers, all_biases=True)
        uncorrected = _correct_biases(state, layers, model, every, uncorrected)
    notes = list(source.notes)
    if lost:
        notes.append(f"{len(lost)} weights stay float in the checkpoint ({lost[0]} first)")
    if uncorrected:
        notes.append(
            f"the checkpoint has no bias that could take up the mean error of {len(uncorrected)}"
            f" weights ({uncorrected[0]} first), as the file has"
        )
    program.state_dict.update(state)
    return rebuild(
        program,
        tensors,
        tuple(notes),
        recipe=dict(recipe),
        preprocessing=preprocessing,
        labels=tuple(labels),
    )


def _fill_program(program: torch.export.ExportedProgram, source: Checkpoint) -> State:
    """The program's state with the float network's values; tied entries stay one tensor."""
    made: dict[int, torch.Tensor] = {}
    state: State = {}
    for name, blank in program.state_dict.items():
        value = source.state[name]
        place = value.data_ptr()
        known = made.get(place)
        if known is None or not value.numel() or known.shape != value.shape:
            known = made[place] = _make_like(blank, value.detach())
        state[name] = known
    program.state_dict.update(state)
    return state


class _Places:
    """Levels and steps by parameter, filled weight by weight."""

    def __init__(self, state: State) -> None:
        self._state = state
        self._levels: dict[str, np.ndarray] = {}
        self._steps: dict[str, np.ndarray] = {}

    def put(self, layers: Layers, weight: Weight, rounded: Rounded, origins: _Origins) -> bool:
        """Bring one weight's levels to its parameters; False where they can't be."""
        for found in (origins.of_weight(weight.name), origins.by_name(weight.name)):
            if found and self._put_at(found, layers, weight, rounded):
                return True
        return False

    def _put_at(
        self,
        found: list[tuple[_Numbered, np.ndarray, np.ndarray]],
        layers: Layers,
        weight: Weight,
        rounded: Rounded,
    ) -> bool:
        if any(self._is_taken(part.name, entries) for part, entries, _ in found):
            return False
        before = layers.matrices(weight)
        origin = np.empty(before.size, np.float32)
        for part, entries, places in found:
            origin[places] = self._state[part.name].detach().numpy().reshape(-1)[entries]
        factors = _find_factors(before, weight.to_matrices(origin.reshape(weight.shape)))
        if factors is None:
            return False
        levels = rounded.levels * np.sign(factors).astype(np.int8)
        steps = np.broadcast_to(rounded.steps / np.abs(factors), levels.shape)
        flat_levels = weight.from_matrices(levels).reshape(-1)
        flat_steps = weight.from_matrices(steps).reshape(-1)
        for part, entries, places in found:
            if part.name not in self._levels:
                self._levels[part.name] = np.zeros(part.size, np.int8)
                self._steps[part.name] = np.zeros(part.size, np.float32)
            self._levels[part.name][entries] = flat_levels[places]
            self._steps[part.name][entries] = flat_steps[places]
        return True

    def _is_taken(self, name: str, entries: np.ndarray) -> bool:
        steps = self._steps.get(name)
        return steps is not None and bool(steps[entries].any())

    def tensors(self, lost: list[str]) -> tuple[QuantTensor, ...]:
        """The parameters that are full, in the state's order; `lost` gets the others."""
        found = []
        for name, value in self._state.items():
            if name not in self._levels:
                continue
            shape = tuple(value.shape)
            step = _join_steps(self._steps[name].reshape(shape))
            if step is None:
                lost.append(name)
            else:
                found.append(QuantTensor(name, self._levels[name].reshape(shape), Scale(step)))
        return tuple(found)


def _find_factors(after: np.ndarray, before: np.ndarray) -> np.ndarray | None:
    """float32 [groups, rows, 1] with after = factor · before, 1 for rows of zeros; None if none."""
    one, other = before.astype(np.float64), after.astype(np.float64)
    square = (one * one).sum(axis=-1, keepdims=True)
    product = (one * other).sum(axis=-1, keepdims=True)
    factors = np.divide(product, square, out=np.ones_like(square), where=square > 0)
    size = np.abs(other).max(axis=-1, keepdims=True)
    if (np.abs(factors * one - other) > FOLDING * size + np.finfo(np.float32).tiny).any():
        return None
    factors[factors == 0] = 1.0  # a channel that BatchNormalization multiplies with 0
    return factors.astype(np.float32)


def _join_steps(steps: np.ndarray) -> np.ndarray | None:
    """One step, or one along an axis; None where they are not full, or vary along two."""
    if not (steps > 0).all():
        return None
    for axis in range(steps.ndim):
        first = np.take(steps, [0], axis=axis)
        if (steps == first).all():
            steps = first
    if steps.size == 1:
        return steps.reshape(())
    return np.ascontiguousarray(steps) if max(steps.shape) == steps.size else None


def _correct_biases(
    state: State,
    layers: Layers,
    model: RoundedModel,
    origins: _Origins,
    names: Collection[str],
) -> list[str]:
    """Add the corrections of these weights to the state's biases; those whose one is lost."""
    lost = []
    for name, bias in layers.biases.items():
        if name not in names or bias not in model.changed:
            continue
        before = layers.graph.weights[bias]
        change = model.changed[bias] - before
        own = state.get(bias)
        if own is not None and np.array_equal(own.detach().numpy(), before):
            state[bias] = _make_like(own, own.detach() + torch.from_numpy(change))
            continue
        found = origins.of_bias(name)
        if not found:
            lost.append(name)
        for part, entries, places in found:
            added = np.zeros(part.size, np.float32)
            np.add.at(added, entries, change.reshape(-1)[places])
            old = state[part.name]
            new = old.detach() + torch.from_numpy(added.reshape(tuple(old.shape)))
            state[part.name] = _make_like(old, new)
    return lost
