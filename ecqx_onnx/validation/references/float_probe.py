"""The distance of a quantized model from its float model while `convert --bits` makes it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from ecqx_onnx.data import Split
from ecqx_onnx.errors import InputError
from ecqx_onnx.preprocessing.preprocessing import Preprocessing
from ecqx_onnx.runtime.random_values import draw_values
from ecqx_onnx.tensors import QuantTensor
from ecqx_onnx.validation.outputs.metrics import Proportion, is_classification, measure_accuracy
from ecqx_onnx.validation.references.float_distance import (
    FloatBounds,
    LayerError,
    OutputDistance,
    add_distances,
    judge_distance,
    measure_output,
    measure_weight,
)
from ecqx_onnx.validation.report import Check

if TYPE_CHECKING:
    import torch


MOST_SAMPLES = 256
BATCH = 32
RANDOM_SETS = 8
FREE = 2
MOST_SECONDS = 5.0  # for all weights, each quantized alone


class FloatProbe:
    """Runs the float model before its weights are rounded, and the quantised one after, on the same
    inputs."""

    def __init__(self, split: Split | None, bounds: FloatBounds) -> None:
        """split: data to run on; None: random inputs, and that is said."""
        self._split = None if split is None else split.take(MOST_SAMPLES)
        self._bounds = bounds
        self._layers: list[LayerError] = []
        self._movements: list[LayerError] = []
        self._tensors: tuple[QuantTensor, ...] = ()
        self._sets: list[tuple[tuple[np.ndarray, ...], np.ndarray | None]] = []
        self._names: tuple[str, ...] = ()
        self._float: list[tuple[np.ndarray, ...]] = []
        self.trouble: str | None = "there is no example input to run them on"
        self.error: float | None = None  # the largest relative error of an output

    def see_weights(
        self, state: Mapping[str, torch.Tensor], tensors: Sequence[QuantTensor]
    ) -> None:
        """Measure the weights' errors.

        Args:
            state: The float model's, with the weights that `tensors` stand for still as they were.
            tensors: Their quantized form.
        """
        self._layers = []  # of an earlier attempt
        self._tensors = tuple(tensors)
        for tensor in tensors:
            weight = state[tensor.name].detach().cpu().float().numpy()
            self._layers.append(measure_weight(tensor.name, tensor.dequantize(), weight))

    def see_float(
        self,
        model: torch.nn.Module,
        example: object,
        preprocessing: Preprocessing | None,
        *,
        names: Sequence[str] = (),
    ) -> None:
        """Run the float model, before its weights are rounded.

        Args:
            model: The float model.
            example: As the model is traced with; tensors, in any nest.
            preprocessing: What the data go through, or None for their own.
            names: Of the example's tensors, where known: masks are drawn as such.
        """

        import torch
        from torch.utils._pytree import tree_leaves

        from ecqx_onnx.validation.references.pytorch_outputs import run_reference

        leaves = [leaf for leaf in tree_leaves(example) if isinstance(leaf, torch.Tensor)]
        if not leaves:
            return
        try:
            self._names = tuple(names) if len(names) == len(leaves) else ("",) * len(leaves)
            self._sets = list(self._make_inputs(leaves, preprocessing))
            self._float = [run_reference(model, inputs) for inputs, _ in self._sets]
            self._movements = list(self._measure_movements(model))
        except InputError as error:
            self.trouble = str(error)
            return
        self.trouble = None

    def _measure_movements(self, model: torch.nn.Module) -> Iterator[LayerError]:
        """How far each weight, quantized alone, moves the outputs on the first set of inputs; the
        weights of the largest errors first, until MOST_SECONDS are over."""
        import torch

        from ecqx_onnx.validation.references.pytorch_outputs import run_reference

        inputs = self._sets[0][0]
        parameters = dict(model.named_parameters())
        end = time.perf_counter() + MOST_SECONDS
        errors = {layer.name: layer.error for layer in self._layers}
        for tensor in sorted(self._tensors, key=lambda tensor: -errors[tensor.name]):
            own = parameters.get(tensor.name)
            if own is None or tuple(own.shape) != tensor.shape:
                continue
            if time.perf_counter() > end:
                return
            values = torch.from_numpy(tensor.dequantize()).to(own.device, own.dtype)
            found = run_reference(model, inputs, replaced={tensor.name: values})
            pairs = zip(found, self._float[0], strict=True)
            moved = [measure_output(tensor.name, *pair).error for pair in pairs]
            yield LayerError(tensor.name, max(moved, default=0.0))

    def judge(self, model: torch.nn.Module, *, class_names: bool) -> Check:
        """Run the quantized model on the same inputs and compare.

        Args:
            model: The quantized one.
            class_names: Whether its classes have names.

        Returns:
            The check "float model"; passed is None if nothing ran.
        """
        if self.trouble is None:
            try:
                return self._judge(model, class_names=class_names)
            except InputError as error:
                self.trouble = str(error)
        return Check(
            "float model",
            None,
            None,
            None,
            f"how far this is from the float model is not known: {self.trouble}",
        )

    def _judge(self, model: torch.nn.Module, *, class_names: bool) -> Check:
        from ecqx_onnx.validation.references.pytorch_outputs import run_reference

        distances: tuple[OutputDistance, ...] = ()
        right, float_right = Proportion(0, 0), Proportion(0, 0)
        samples = 0
        for (inputs, labels), exact in zip(self._sets, self._float, strict=True):
            found = run_reference(model, inputs)
            names = [str(place) for place in range(len(exact))]
            pairs = zip(names, found, exact, strict=True)
            distances = add_distances(distances, [measure_output(*pair) for pair in pairs])
            samples += len(inputs[0]) if inputs[0].ndim else 1
            if labels is not None and exact and is_classification(exact[0]):
                right += measure_accuracy(found[0], labels)
                float_right += measure_accuracy(exact[0], labels)
        self.error = max((distance.error for distance in distances), default=None)
        if self._split is None:
            on = f"{samples} random inputs"
        else:
            on = f"{samples} samples of {self._split.source.name}"
        return judge_distance(
            distances,
            self._bounds,
            on=on,
            scores=class_names or bool(right),
            layers=self._layers,
            movements=self._movements,
            accuracies=(right, float_right) if right else None,
        )

    def _make_inputs(
        self, leaves: Sequence[torch.Tensor], preprocessing: Preprocessing | None
    ) -> Iterator[tuple[tuple[np.ndarray, ...], np.ndarray | None]]:
        if self._split is None:
            for seed in range(RANDOM_SETS):
                generator = np.random.default_rng(seed)
                pairs = zip(self._names, leaves, strict=True)
                yield tuple(_draw_random(*pair, generator) for pair in pairs), None
            return
        if preprocessing is None:
            split = self._split
        else:
            split = self._split.with_preprocessing(preprocessing)
        for x, y in split.fitted(tuple(leaves[0].shape[1:])).batches(BATCH):
            yield (x,), y


def example_of(program: torch.export.ExportedProgram) -> tuple[torch.Tensor, ...]:
    """Make an example input for a program.

    Args:
        program: As torch.export writes it.

    Returns:
        Zeros as the program takes them; a free length is FREE.
    """

    import torch

    inputs = set(program.graph_signature.user_inputs)
    values = [
        node.meta.get("val")
        for node in program.graph.nodes
        if node.op == "placeholder" and node.name in inputs
    ]
    tensors = [value for value in values if isinstance(value, torch.Tensor)]
    zeros = []
    for tensor in tensors:
        shape = [length if isinstance(length, int) else FREE for length in tensor.shape]
        zeros.append(torch.zeros(shape, dtype=tensor.dtype))
    return tuple(zeros)


def _draw_random(name: str, leaf: torch.Tensor, generator: np.random.Generator) -> np.ndarray:
    """As a validation without data draws them."""

    import torch

    dtype = np.dtype(np.float32)  # numpy has no bfloat16
    if not leaf.is_floating_point():
        dtype = torch.empty(0, dtype=leaf.dtype).numpy().dtype
    values = draw_values(name, dtype, tuple(leaf.shape), generator)
    return torch.from_numpy(values).to(leaf.dtype).numpy()
