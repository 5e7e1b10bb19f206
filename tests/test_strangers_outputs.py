"""Outputs as people's models have them: text, sequences, maps, none at all, another each time."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from ecqx_onnx.errors import CheckFailed, ModelError
from ecqx_onnx.validation.equivalence import compare_models
from ecqx_onnx.verbs.pack import pack
from ecqx_onnx.verbs.validate import validate
from tests.strangers import FLOAT, draw_grid, make_model, save

W = draw_grid((128, 128))
LABELS = {"keys_floats": [0.0, 1.0], "values_strings": ["a", "b"]}
OTHERS = {"z": np.float32(0), "o": np.array([0]), "u": np.array([2]), "k": np.array([1])}
ML = "ai.onnx.ml"
CASES = {
    "text": ([helper.make_node("LabelEncoder", ["t"], ["y"], domain=ML, **LABELS)], 8),
    "bools": ([helper.make_node("Greater", ["t", "z"], ["y"])], TensorProto.BOOL),
    "classes": ([helper.make_node("ArgMax", ["t"], ["y"], axis=1)], TensorProto.INT64),
    "float16": ([helper.make_node("Cast", ["t"], ["y"], to=10)], TensorProto.FLOAT16),
    "nothing": ([helper.make_node("Slice", ["t", "o", "o"], ["y"])], FLOAT),
    "no numbers": ([helper.make_node("Sqrt", ["t"], ["y"])], FLOAT),
    "a sequence": ([helper.make_node("SplitToSequence", ["t"], ["y"], axis=0)], None),
    "maps": (
        [
            helper.make_node("Slice", ["t", "o", "u", "k"], ["q"]),
            helper.make_node("ZipMap", ["q"], ["y"], domain=ML, classlabels_strings=["b", "a"]),
        ],
        None,
    ),
    "noise": (
        [
            helper.make_node("RandomNormalLike", ["t"], ["r"]),
            helper.make_node("RandomUniformLike", ["t"], ["s"]),
            helper.make_node("Sum", ["t", "r", "s"], ["y"]),
        ],
        FLOAT,
    ),
}
SAME = ("nothing", "text")  # nothing is 0 or 1 there, whatever the weight


def make_case(name: str, *, weight: np.ndarray = W) -> onnx.ModelProto:
    nodes, kind = CASES[name]
    model = make_model(
        [helper.make_node("MatMul", ["x", "w"], ["t"]), *nodes],
        {"w": weight, **OTHERS},
        inputs=[("x", FLOAT, ["n", 128])],
        outputs=[] if kind is None else [("y", kind, None)],
        domains={ML: 2},
    )
    if kind is None:
        model.graph.output.add().name = "y"
    return model


@pytest.mark.parametrize("name", CASES)
def test_outputs_of_every_kind_are_compared(name, tmp_path):
    path = save(make_case(name), tmp_path / "m.onnx")
    report = pack(path, tmp_path / "p.onnx")
    assert report.written is not None
    assert "bit for bit" in report.equivalence.checks[0].sentence
    result = validate(tmp_path / "p.onnx", against=path, latency_runs=2)
    assert result.ok, result.failures


@pytest.mark.parametrize("name", [name for name in CASES if name not in SAME])
def test_another_weight_shows_in_outputs_of_every_kind(name, tmp_path):
    path = save(make_case(name), tmp_path / "m.onnx")
    other = save(make_case(name, weight=-W), tmp_path / "other.onnx")
    assert not compare_models(path, other).ok


def test_an_output_that_numpy_has_not_is_refused_in_words(tmp_path):
    model = make_case("float16")
    model.graph.node[1].attribute[0].i = TensorProto.BFLOAT16
    model.graph.output[0].type.tensor_type.elem_type = TensorProto.BFLOAT16
    path = save(model, tmp_path / "m.onnx")
    with pytest.raises((ModelError, CheckFailed), match="bfloat16"):
        pack(path, tmp_path / "p.onnx")
    assert pack(path, tmp_path / "p.onnx", check=False).written is not None
