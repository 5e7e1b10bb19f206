"""A float .onnx file in the place of PyTorch's model, for files that are compared with it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ecqx_onnx_converters.graph.uses import list_operators

from ecqx_onnx.errors import CheckFailed, DataError, ModelError
from ecqx_onnx.inputs.onnx_file import OnnxFile
from ecqx_onnx.runtime.sessions import fit_inputs, open_session, run

INTEGERS = (  # operators whose weights are integers already
    "QuantizeLinear", "DequantizeLinear", "QLinearConv", "QLinearMatMul", "MatMulInteger",
    "ConvInteger", "MatMulNBits", "DynamicQuantizeMatMul", "QGemm", "Quant",
    "DynamicQuantizeLSTM", "QAttention", "GatherBlockQuantized",
)  # fmt: skip


def find_integer_operator(file: OnnxFile) -> str | None:
    """Find out whether a file's weights are integers.

    Args:
        file: any .onnx file.

    Returns:
        The operator that says so, "ecqx-onnx" for a file of ours, or None for a float model.
    """
    if file.metadata.get("tensors"):
        return "ecqx-onnx"
    operators = list_operators(file.proto.graph)
    for function in file.proto.functions:
        operators.update(node.op_type for node in function.node)
    return next((name for name in INTEGERS if name in operators), None)


class OnnxReference:
    """The float model in onnxruntime, in the place of PyTorch's."""

    def __init__(self, path: Path) -> None:
        """Load the model.

        Args:
            path: of the float .onnx file.

        Raises:
            ModelError: onnxruntime does not load it.
        """
        self.path = path
        try:
            self._session = open_session(path)
        except CheckFailed as error:
            raise ModelError(f"{path}: there is nothing to compare with: {error}") from error

    @property
    def inputs(self) -> list[Any]:
        """The inputs, as onnxruntime describes them (name, shape, type)."""
        return list(self._session.get_inputs())

    def run(self, inputs: Sequence[np.ndarray]) -> tuple[np.ndarray, ...]:
        """Run one batch.

        Args:
            inputs: in the order of the graph's.

        Returns:
            The outputs, in the order of the graph's.

        Raises:
            DataError: it does not take them.
        """
        try:
            return tuple(run(self._session, fit_inputs(self._session, inputs)))
        except CheckFailed as error:
            raise DataError(f"{self.path} does not run on the data: {error}") from error
