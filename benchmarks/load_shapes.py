"""Float networks of the shapes that people ship, with random weights on a grid, as ONNX graphs.

Nothing is trained: what loading costs depends on the shapes of the weights, the operators that read
them and the entropy of the levels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import onnx
from ecqx_onnx_converters import GraphWeight, Matching
from onnx import TensorProto, helper, numpy_helper

from ecqx_onnx.tensors import QuantTensor, Scale

OPSET = 18
IR_VERSION = 8
MOST = 7  # |level| of 4 bits


class Network:
    """A graph under construction, and the levels of its weights.

    Attributes:
        nodes: of the graph, in their order.
        initializers: float32 parameters.
        weights: what each quantized weight consists of.
    """

    def __init__(self, step: float) -> None:
        """Begin an empty graph.

        Args:
            step: of all grids, in standard deviations of the Gaussian weights.
        """
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[TensorProto] = []
        self.weights: list[GraphWeight] = []
        self._step = step
        self._generator = np.random.default_rng(0)
        self._count = 0

    def add(self, operator: str, *inputs: str, **attributes: object) -> str:
        """Add a node of one output.

        Args:
            operator: of the standard domain.
            inputs: names of values.
            attributes: of the node.

        Returns:
            The name of its output.
        """
        self._count += 1
        output = f"v{self._count}"
        self.nodes.append(helper.make_node(operator, list(inputs), [output], **attributes))
        return output

    def add_constant(self, values: np.ndarray) -> str:
        """Add an initializer that stays as it is.

        Args:
            values: any type and shape.

        Returns:
            Its name.
        """
        self._count += 1
        name = f"c{self._count}"
        self.initializers.append(numpy_helper.from_array(values, name))
        return name

    def add_weight(self, *shape: int, axis: int = 0) -> str:
        """Add a weight of Gaussian numbers rounded to levels, with a step for each channel.

        Args:
            shape: of the weight.
            axis: of the channels.

        Returns:
            Its name.
        """
        self._count += 1
        name = f"w{self._count}"
        drawn = self._generator.standard_normal(shape, np.float32)
        levels = np.clip(np.rint(drawn / np.float32(self._step)), -MOST, MOST).astype(np.int8)
        fan_in = levels.size / shape[axis]
        size = [1] * len(shape)
        size[axis] = -1
        spread = self._generator.uniform(0.5, 1.5, shape[axis]).astype(np.float32)
        step = (spread * np.float32(self._step / fan_in**0.5)).reshape(size)
        tensor = QuantTensor(name, levels, Scale(step))
        self.weights.append(GraphWeight(name, tensor, (name,)))
        self.initializers.append(numpy_helper.from_array(levels * step, name))
        return name

    def add_norm(self, value: str, width: int) -> str:
        """Add a LayerNormalization over the last axis.

        Args:
            value: what it reads.
            width: of the last axis.

        Returns:
            The name of its output.
        """
        scale = self.add_constant(np.ones(width, np.float32))
        return self.add("LayerNormalization", value, scale)

    def add_linear(self, value: str, inputs: int, outputs: int) -> str:
        """Add a MatMul.

        Args:
            value: what it reads, [..., inputs].
            inputs: features that it reads.
            outputs: features that it makes.

        Returns:
            The name of its output.
        """
        return self.add("MatMul", value, self.add_weight(inputs, outputs, axis=1))

    def add_conv(self, value: str, inputs: int, outputs: int, size: int, stride: int = 1) -> str:
        """Add a square Conv with a bias, padded to keep the size at stride 1.

        Args:
            value: what it reads.
            inputs: channels that it reads.
            outputs: channels that it makes.
            size: of its window.
            stride: along both axes.

        Returns:
            The name of its output.
        """
        weight = self.add_weight(outputs, inputs, size, size)
        bias = self.add_constant(np.zeros(outputs, np.float32))
        pad = (size - 1) // 2
        return self.add("Conv", value, weight, bias, pads=[pad] * 4, strides=[stride] * 2)

    def finish(
        self, graph_input: onnx.ValueInfoProto, output: str, shape: tuple[int, ...]
    ) -> onnx.ModelProto:
        """Make the model.

        Args:
            graph_input: what it reads.
            output: name of what it gives.
            shape: of that.

        Returns:
            The float model.
        """
        result = helper.make_tensor_value_info(output, TensorProto.FLOAT, shape)
        graph = helper.make_graph(self.nodes, "g", [graph_input], [result], self.initializers)
        imports = [helper.make_opsetid("", OPSET)]
        return helper.make_model(graph, opset_imports=imports, ir_version=IR_VERSION)

    def match(self) -> Matching:
        """List the quantized weights.

        Returns:
            All of them, as the planner takes them.
        """
        return Matching(tuple(self.weights), ())


def make_resnet50(network: Network) -> onnx.ModelProto:
    """Build ResNet-50 (He et al. 2016), batch normalization folded: 25.5 million weights.

    Args:
        network: an empty one, which gets the nodes.

    Returns:
        The float model, for images of 64 x 64.
    """
    image = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 64, 64])
    value = network.add("Relu", network.add_conv("x", 3, 64, 7, 2))
    value = network.add("MaxPool", value, kernel_shape=[3, 3], strides=[2, 2], pads=[1] * 4)
    width = 64
    for stage, blocks in enumerate((3, 4, 6, 3)):
        inner = 64 << stage
        for block in range(blocks):
            stride = 2 if stage and not block else 1
            inside = network.add("Relu", network.add_conv(value, width, inner, 1))
            inside = network.add("Relu", network.add_conv(inside, inner, inner, 3, stride))
            inside = network.add_conv(inside, inner, 4 * inner, 1)
            if not block:
                value = network.add_conv(value, width, 4 * inner, 1, stride)
            value = network.add("Relu", network.add("Add", inside, value))
            width = 4 * inner
    value = network.add("Flatten", network.add("GlobalAveragePool", value))
    scores = network.add("Gemm", value, network.add_weight(1000, width), transB=1)
    return network.finish(image, scores, (1, 1000))


def make_vit(network: Network) -> onnx.ModelProto:
    """Build ViT-B/16 (Dosovitskiy et al. 2021), with one head: 86 million weights.

    Args:
        network: an empty one, which gets the nodes.

    Returns:
        The float model, for images of 64 x 64.
    """
    image = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 64, 64])
    width = 768
    weight = network.add_weight(width, 3, 16, 16)
    value = network.add("Conv", "x", weight, strides=[16, 16])
    value = network.add("Reshape", value, network.add_constant(np.array([1, width, 16])))
    value = network.add("Transpose", value, perm=[0, 2, 1])
    for _ in range(12):
        value = _add_transformer_layer(network, value, width, 4 * width)
    value = network.add("ReduceMean", value, network.add_constant(np.array([1])), keepdims=0)
    scores = network.add("Gemm", value, network.add_weight(1000, width), transB=1)
    return network.finish(image, scores, (1, 1000))


def make_minilm(network: Network) -> onnx.ModelProto:
    """Build MiniLM-L6 (Wang et al. 2020), with one head: 22.4 million weights.

    Args:
        network: an empty one, which gets the nodes.

    Returns:
        The float model, for 32 token ids.
    """
    ids = helper.make_tensor_value_info("x", TensorProto.INT64, [1, 32])
    width = 384
    value = network.add("Gather", network.add_weight(30522, width), "x")
    value = network.add_norm(value, width)
    for _ in range(6):
        value = _add_transformer_layer(network, value, width, 4 * width)
    return network.finish(ids, network.add_norm(value, width), (1, 32, width))


def _add_transformer_layer(network: Network, value: str, width: int, inner: int) -> str:
    """Attention of one head and two linear layers, each behind a normalization."""
    normed = network.add_norm(value, width)
    query, key, content = (network.add_linear(normed, width, width) for _ in range(3))
    turned = network.add("Transpose", key, perm=[0, 2, 1])
    shares = network.add("Softmax", network.add("MatMul", query, turned))
    mixed = network.add_linear(network.add("MatMul", shares, content), width, width)
    value = network.add("Add", value, mixed)
    hidden = network.add_linear(network.add_norm(value, width), width, inner)
    return network.add("Add", value, network.add_linear(network.add("Relu", hidden), inner, width))


NETWORKS: Mapping[str, Callable[[Network], onnx.ModelProto]] = {
    "resnet50": make_resnet50,
    "vit": make_vit,
    "minilm": make_minilm,
}
