"""Places inside a computation where a tensor can be read: of an .onnx file, or of PyTorch's graph.

Each reading is one run with that tensor as a further output, so that the runtime may optimize all
that lies before it as it does without.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from onnx import ModelProto, ValueInfoProto

from ecqx_onnx.errors import ModelError
from ecqx_onnx.inputs.onnx_file import OnnxFile
from ecqx_onnx.runtime.sessions import Level, fit_inputs, open_session, run

MOST_BYTES = 2**31 - 1  # of a model that is given to the runtime as bytes
BATCH_NORM = "BatchNormalization"


@dataclass(frozen=True)
class Tap:
    """A tensor inside.

    Attributes:
        operator: ONNX's name of what makes it.
        key: by which the side finds it.
        name: for the report.
    """

    operator: str
    key: str
    name: str


class Side(Protocol):
    """One of two computations."""

    @property
    def taps(self) -> Sequence[Tap]:
        """The tensors, in the order in which they are computed."""

    def read(self, tap: Tap, inputs: Sequence[np.ndarray]) -> np.ndarray:
        """Compute one tensor.

        Args:
            tap: one of `taps`.
            inputs: of the model.

        Returns:
            The tensor.
        """


class OnnxSide:
    """An .onnx file in onnxruntime.

    Args:
        file: the file.
        level: of the graph optimizations.
    """

    def __init__(self, file: OnnxFile, level: Level) -> None:
        self._model: ModelProto = file.with_data()
        if self._model.ByteSize() > MOST_BYTES:
            raise ModelError(f"{file.path}: --bisect takes models of less than 2 GiB only")
        self._level: Level = level
        self.taps = tuple(_list_taps(self._model))

    def read(self, tap: Tap, inputs: Sequence[np.ndarray]) -> np.ndarray:
        """Compute one tensor; see `Side.read`.

        Args:
            tap: one of `taps`.
            inputs: of the model.

        Returns:
            The tensor.
        """
        model = ModelProto()
        model.CopyFrom(self._model)
        outputs = [value.name for value in model.graph.output]
        if tap.key not in outputs:
            model.graph.output.append(ValueInfoProto(name=tap.key))
            outputs.append(tap.key)
        session = open_session(model.SerializeToString(), level=self._level)
        found = run(session, fit_inputs(session, list(inputs)))
        return found[outputs.index(tap.key)]


def _list_taps(model: ModelProto) -> list[Tap]:
    """What is computed from the inputs; what is computed from constants only is folded."""
    constants = {tensor.name for tensor in model.graph.initializer}
    live = {value.name for value in model.graph.input} - constants
    taps = []
    for node in model.graph.node:
        if not live.intersection(node.input):
            continue
        live.update(node.output)
        label = f" ({node.name})" if node.name and node.name != node.output[0] else ""
        taps.append(Tap(node.op_type, node.output[0], f"{node.output[0]}{label}"))
    return taps


def align(first: Sequence[Tap], second: Sequence[Tap]) -> list[tuple[Tap, Tap]]:
    """Find out which tensors of two graphs of one model are the same, by order and operators.

    Args:
        first: of one graph, in its order.
        second: of another one, in which a BatchNormalization may stand behind a product that it has
            been folded into in the first.

    Returns:
        The pairs, in order.
    """
    operators = ([tap.operator for tap in first], [tap.operator for tap in second])
    blocks = difflib.SequenceMatcher(None, *operators, autojunk=False).get_matching_blocks()
    matched = {}
    for block in blocks:
        for step in range(block.size):
            matched[block.a + step] = block.b + step
    taken = set(matched.values())
    pairs = []
    for one, other in matched.items():
        folded = other + 1
        is_norm = folded < len(second) and second[folded].operator == BATCH_NORM
        if is_norm and folded not in taken and first[one].operator != BATCH_NORM:
            other = folded
        pairs.append((first[one], second[other]))
    return pairs


def as_float(array: Any) -> np.ndarray:
    """Widen for sums.

    Args:
        array: numbers of any type.

    Returns:
        float64 [N].
    """
    return np.asarray(array, np.float64).reshape(-1)
