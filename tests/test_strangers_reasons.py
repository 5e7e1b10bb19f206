"""Why a model was copied unchanged: the reason is true, and names what is there."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from ecqx_onnx.verbs.pack import pack
from ecqx_onnx.verbs.validate import validate
from tests.strangers import FLOAT, draw_levels, make_model, save

ENDS = {"inputs": [("x", FLOAT, ["n", 32])], "outputs": [("y", FLOAT, ["n", 32])]}
FLOATS = np.random.default_rng(0).standard_normal((32, 32)).astype(np.float32)


def plain(kind: int, operators: list[onnx.NodeProto]) -> onnx.ModelProto:
    model = make_model([*operators, helper.make_node("MatMul", ["x", "v"], ["y"])], {}, **ENDS)
    dtype = helper.tensor_dtype_to_np_dtype(kind)
    model.graph.initializer.append(numpy_helper.from_array(FLOATS.astype(dtype), "w"))
    return model


def in_a_branch() -> onnx.ModelProto:
    branch = helper.make_graph(
        [
            helper.make_node("Cast", ["w"], ["v"], to=FLOAT),
            helper.make_node("MatMul", ["x", "v"], ["z"]),
        ],
        "branch",
        [],
        [helper.make_tensor_value_info("z", FLOAT, None)],
        [numpy_helper.from_array(FLOATS.astype(np.float16), "w")],
    )
    node = helper.make_node("If", ["c"], ["y"], then_branch=branch, else_branch=branch)
    return make_model([node], {"c": np.array(True)}, **ENDS)


def in_a_function() -> onnx.ModelProto:
    value = numpy_helper.from_array(FLOATS, "value")
    body = [
        helper.make_node("Constant", [], ["v"], value=value),
        helper.make_node("MatMul", ["i", "v"], ["o"]),
    ]
    model = make_model(
        [helper.make_node("F", ["x"], ["y"], domain="m")], {}, domains={"m": 1}, **ENDS
    )
    imports = [helper.make_opsetid("", 21)]
    model.functions.append(helper.make_function("m", "F", ["i"], ["o"], body, imports))
    return model


def sparse() -> onnx.ModelProto:
    levels = draw_levels((32, 32)).reshape(-1).astype(np.float32)
    places = np.flatnonzero(levels)
    model = make_model([helper.make_node("MatMul", ["x", "w"], ["y"])], {}, **ENDS)
    tensor = helper.make_sparse_tensor(
        numpy_helper.from_array(levels[places], "w"), numpy_helper.from_array(places), [32, 32]
    )
    model.graph.sparse_initializer.append(tensor)
    return model


CAST = [helper.make_node("Cast", ["w"], ["v"], to=FLOAT)]
CASES = {
    "float16": (lambda: plain(TensorProto.FLOAT16, CAST), "w: it is FLOAT16"),
    "bfloat16": (lambda: plain(TensorProto.BFLOAT16, CAST), "w: it is BFLOAT16"),
    "double": (lambda: plain(TensorProto.DOUBLE, CAST), "w: it is DOUBLE"),
    "float8": (lambda: plain(TensorProto.FLOAT8E4M3FN, CAST), "w: it is FLOAT8E4M3FN"),
    "int64": (lambda: plain(TensorProto.INT64, CAST), "w: it is INT64"),
    "branch": (in_a_branch, "w: it is FLOAT16"),
    "function": (in_a_function, "m.F.v: it lies in a function"),
    "sparse": (sparse, "w: it is stored as a sparse tensor"),
}


@pytest.mark.parametrize("name", CASES)
def test_the_reason_names_the_weight_that_is_there(name, tmp_path):
    make, words = CASES[name]
    path = save(make(), tmp_path / "model.onnx")
    report = pack(path, tmp_path / "copy.onnx")
    assert report.written is None
    assert words in report.reason
    assert validate(tmp_path / "copy.onnx", against=path).ok


def test_a_model_without_weights_is_said_to_have_none(tmp_path):
    path = save(
        make_model([helper.make_node("Relu", ["x"], ["y"])], {}, **ENDS), tmp_path / "m.onnx"
    )
    report = pack(path, tmp_path / "copy.onnx")
    assert report.reason.startswith("it has no weight of two or more dimensions")
