"""PyTorch's exported graph as a side of the comparison: each node's value can be read by name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ecqx_onnx.validation.bisection.taps import Tap

# ATen's operators as ONNX calls them.
OPERATORS = {
    "conv1d": "Conv",
    "conv2d": "Conv",
    "conv3d": "Conv",
    "convolution": "Conv",
    "linear": "Gemm",
    "addmm": "Gemm",
    "matmul": "MatMul",
    "mm": "MatMul",
    "bmm": "MatMul",
    "batch_norm": "BatchNormalization",
    "layer_norm": "LayerNormalization",
    "relu": "Relu",
    "relu_": "Relu",
    "leaky_relu": "LeakyRelu",
    "sigmoid": "Sigmoid",
    "tanh": "Tanh",
    "gelu": "Gelu",
    "softmax": "Softmax",
    "max_pool1d": "MaxPool",
    "max_pool2d": "MaxPool",
    "avg_pool2d": "AveragePool",
    "add": "Add",
    "add_": "Add",
    "mul": "Mul",
    "sub": "Sub",
    "cat": "Concat",
    "mean": "ReduceMean",
    "view": "Reshape",
    "reshape": "Reshape",
    "flatten": "Reshape",
    "permute": "Transpose",
    "transpose": "Transpose",
    "embedding": "Gather",
}


class TorchSide:
    """An exported program.

    Args:
        module: as `torch.export` gives it; any torch.fx.GraphModule.
    """

    def __init__(self, module: torch.fx.GraphModule) -> None:
        self._module = module
        taps = []
        for node in module.graph.nodes:
            if node.op != "call_function":
                continue
            name = str(node.target).split(".")[-2 if "." in str(node.target) else 0]
            if name in OPERATORS:
                taps.append(Tap(OPERATORS[name], node.name, _describe_node(node)))
        self.taps = tuple(taps)

    def read(self, tap: Tap, inputs: Sequence[np.ndarray]) -> np.ndarray:
        """Compute one tensor; see `taps.Side.read`.

        Args:
            tap: one of `taps`.
            inputs: of the model.

        Returns:
            The tensor.

        Raises:
            LookupError: if the graph has no such node.
        """
        interpreter = _Reader(self._module, tap.key)
        tensors = [torch.from_numpy(array) for array in inputs]
        with torch.no_grad():
            try:
                interpreter.run(*tensors)
            except _Found as found:
                return found.value.detach().cpu().numpy()
        raise LookupError(f"the graph has no {tap.key}")


class _Found(Exception):  # noqa: N818 - it carries a value out of the interpreter
    def __init__(self, value: torch.Tensor) -> None:
        super().__init__()
        self.value = value


class _Reader(torch.fx.Interpreter):
    """Runs a graph up to one node."""

    def __init__(self, module: torch.fx.GraphModule, key: str) -> None:
        super().__init__(module)
        self.extra_traceback = False
        self._key = key

    def run_node(self, n: torch.fx.Node) -> Any:
        value = super().run_node(n)
        if n.name == self._key:
            raise _Found(value)
        return value


def _describe_node(node: torch.fx.Node) -> str:
    """The node's name, with its weight's behind it."""
    constants = [other for other in node.all_input_nodes if other.op == "get_attr"]
    weights = [str(constant.target) for constant in constants]
    named = [name for name in weights if name.endswith("weight")]
    return f"{node.name} ({named[0]})" if named else node.name
