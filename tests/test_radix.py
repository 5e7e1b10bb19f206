"""Several levels in a byte: exact back and forth in numpy and in onnxruntime, and refused when
damaged."""

import numpy as np
import onnx
import onnxruntime
import pytest
from ecqx_onnx_converters.storage import DOMAIN, Contents, radix
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from ecqx_onnx.errors import FileError


def model_of(stored, *, opset=18):
    """The stored levels as a model without inputs that gives them."""
    shape = next(entry.ints for entry in stored.nodes[0].attribute if entry.name == "s")
    output = helper.make_tensor_value_info("q", TensorProto.INT8, list(shape))
    graph = helper.make_graph(list(stored.nodes), "g", [], [output], list(stored.initializers))
    imports = [helper.make_opsetid("", opset), helper.make_opsetid(DOMAIN, 1)]
    return helper.make_model(
        graph, functions=list(stored.functions), opset_imports=imports, ir_version=8
    )


def session_of(model, level=onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL, path=None):
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = level
    options.log_severity_level = 3
    if path is not None:
        options.optimized_model_filepath = str(path)
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


@settings(deadline=None, max_examples=40)
@given(
    st.integers(-128, 127),
    st.integers(1, 256),
    st.lists(st.integers(1, 7), min_size=1, max_size=4),
    st.integers(0, 2**32 - 1),
)
def test_levels_come_back_from_numpy_and_from_onnxruntime(lowest, count, shape, seed):
    highest = min(127, lowest + count - 1)
    levels = np.random.default_rng(seed).integers(lowest, highest + 1, shape).astype(np.int8)
    stored = radix.encode(levels, "q")
    model = model_of(stored)
    onnx.checker.check_model(model)
    np.testing.assert_array_equal(radix.decode("q", Contents.of(model)), levels)
    np.testing.assert_array_equal(session_of(model).run(None, {})[0], levels)


def test_five_ternary_weights_share_a_byte():
    stored = radix.encode(np.array([-1, 0, 1, 1, 0, -1], np.int8), "q")
    assert stored.initializers[0].raw_data == bytes([0 + 3 * 1 + 9 * 2 + 27 * 2 + 81 * 1, 0])


def test_the_decoder_is_gone_after_loading(tmp_path):
    levels = np.random.default_rng(0).integers(-1, 2, (64, 64)).astype(np.int8)
    session_of(model_of(radix.encode(levels, "q")), path=tmp_path / "loaded.onnx")
    assert not onnx.load(tmp_path / "loaded.onnx").graph.node


@pytest.mark.parametrize(
    ("attribute", "values"),
    [
        ("s", [3, 4]),
        ("s", [-1, 6]),
        ("s", [1 << 40]),
        ("p", [1, 3, 9]),
        ("p", [0, 0, 0, 0, 0]),
        ("n", [1]),
        ("n", [3, 3]),
        ("l", [127]),
    ],
)
def test_digits_that_are_described_wrongly_are_refused(attribute, values):
    model = model_of(radix.encode(np.array([-1, 0, 1, 1, 0, -1], np.int8), "q"))
    for entry in model.graph.node[0].attribute:
        if entry.name == attribute:
            entry.ints[:] = values
    with pytest.raises(FileError, match="damaged"):
        radix.decode("q", Contents.of(model))


def test_truncated_digits_are_refused():
    model = model_of(radix.encode(np.zeros((5, 5), np.int8), "q"))
    model.graph.initializer[0].raw_data = model.graph.initializer[0].raw_data[:-1]
    with pytest.raises(FileError, match="bytes for"):
        radix.decode("q", Contents.of(model))
