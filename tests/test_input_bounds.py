"""Random inputs of .onnx models: ids within the tables that they index, lengths that agree."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from ecqx_onnx.inputs.index_bounds import find_index_bounds
from ecqx_onnx.runtime.sessions import make_synthetic_inputs, open_session
from ecqx_onnx.validation.equivalence import compare_models
from ecqx_onnx.verbs.pack import pack
from ecqx_onnx.verbs.validate import validate
from tests.strangers import FLOAT, draw_grid, draw_levels, make_model, save

INT = TensorProto.INT64
IDS = [("i", INT, ["n", "t"])]
OUT = [("y", FLOAT, None)]
TABLE = draw_grid((300, 32))


def look_up(*nodes: onnx.NodeProto, **tensors: np.ndarray) -> onnx.ModelProto:
    return make_model(nodes, {"w": TABLE, **tensors}, inputs=IDS, outputs=OUT)


GATHER = helper.make_node("Gather", ["w", "i"], ["y"])
MODELS = {
    "at once": (look_up(GATHER), 300),
    "through shapes and types": (
        look_up(
            helper.make_node("Cast", ["i"], ["a"], to=TensorProto.INT32),
            helper.make_node("Reshape", ["a", "flat"], ["b"]),
            helper.make_node("Unsqueeze", ["b", "axis"], ["c"]),
            helper.make_node("Gather", ["w", "c"], ["y"]),
            flat=np.array([-1]),
            axis=np.array([0]),
        ),
        300,
    ),
    "with an offset": (
        look_up(
            helper.make_node("Add", ["i", "two"], ["a"]),
            helper.make_node("Gather", ["w", "a"], ["y"]),
            two=np.array(2),
        ),
        298,
    ),
    "two tables": (
        look_up(
            helper.make_node("Gather", ["w", "i"], ["a"]),
            helper.make_node("Gather", ["v", "i"], ["b"]),
            helper.make_node("Add", ["a", "b"], ["y"]),
            v=TABLE[:77],
        ),
        77,
    ),
    "a transposed table": (
        look_up(
            helper.make_node("Transpose", ["u"], ["v"], perm=[1, 0]),
            helper.make_node("Gather", ["v", "i"], ["y"]),
            u=np.ascontiguousarray(TABLE.T),
        ),
        300,
    ),
    "columns": (
        look_up(helper.make_node("Gather", ["w", "i"], ["y"], axis=1)),
        32,
    ),
    "integers": (
        look_up(
            helper.make_node("DequantizeLinear", ["q", "s"], ["v"]),
            helper.make_node("Gather", ["v", "i"], ["y"]),
            q=draw_levels((120, 32)),
            s=np.float32(0.1),
        ),
        120,
    ),
    "classes": (
        look_up(
            helper.make_node("OneHot", ["i", "depth", "values"], ["y"]),
            depth=np.array(9),
            values=np.array([0, 1], np.float32),
        ),
        9,
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_ids_stay_below_the_rows_of_the_table_and_reach_them_all(name, tmp_path):
    model, rows = MODELS[name]
    assert find_index_bounds(model) == {"i": rows}
    session = open_session(save(model, tmp_path / "m.onnx"))
    bounds = find_index_bounds(model)
    (ids,) = make_synthetic_inputs(session, batch=64, free=64, bounds=bounds)
    assert ids.min() == 0
    assert ids.max() == rows - 1


def test_a_table_that_a_function_of_ours_decodes_has_its_rows_too(tmp_path):
    for form in ("folded", "standard"):
        path = save(MODELS["at once"][0], tmp_path / "m.onnx")
        pack(path, tmp_path / "p.onnx", dequantize=form, force=True)
        assert find_index_bounds(onnx.load(tmp_path / "p.onnx")) == {"i": 300}


def test_an_input_that_indexes_nothing_has_no_bound():
    model = make_model(
        [helper.make_node("Cast", ["i"], ["y"], to=FLOAT)], {}, inputs=IDS, outputs=OUT
    )
    assert find_index_bounds(model) == {}


def test_a_row_that_was_changed_is_found_without_data(tmp_path):
    path = save(MODELS["at once"][0], tmp_path / "m.onnx")
    changed = TABLE.copy()
    changed[40:300] += 1
    other = save(look_up(GATHER, w=changed), tmp_path / "changed.onnx")
    assert not compare_models(path, other).ok
    report = validate(other, against=path, latency_runs=0)
    assert "as written" in [check.name for check in report.failures]


def test_lengths_are_those_of_the_sequences_they_count(tmp_path):
    model = make_model(
        [
            helper.make_node("Gather", ["w", "x"], ["a"]),
            helper.make_node(
                "ReverseSequence", ["a", "x_lengths"], ["y"], batch_axis=0, time_axis=1
            ),
        ],
        {"w": TABLE},
        inputs=[("x", INT, ["n", "t"]), ("x_lengths", INT, ["n"])],
        outputs=OUT,
    )
    path = save(model, tmp_path / "m.onnx")
    ids, lengths = make_synthetic_inputs(open_session(path), batch=3, free=7)
    assert ids.shape == (3, 7)
    np.testing.assert_array_equal(lengths, [7, 7, 7])
    report = pack(path, tmp_path / "p.onnx")
    assert "bit for bit" in report.equivalence.checks[0].sentence


def test_axes_of_one_name_and_sums_of_names_agree(tmp_path):
    names = {
        "input_ids": ["batch", "sequence"],
        "attention_mask": ["batch", "past + sequence"],
        "past_keys": ["batch", 2, "past", 4],
        "state": [2, "batch", 5],
    }
    kinds = {"input_ids": INT, "attention_mask": INT}
    model = make_model(
        [
            helper.make_node("Cast", ["attention_mask"], ["a"], to=FLOAT),
            helper.make_node("ReduceSum", ["a"], ["b"], keepdims=0),
            helper.make_node("ReduceSum", ["past_keys"], ["c"], keepdims=0),
            helper.make_node("ReduceSum", ["state"], ["d"], keepdims=0),
            helper.make_node("Gather", ["w", "input_ids"], ["e"]),
            helper.make_node("Sum", ["b", "c", "d", "e"], ["y"]),
        ],
        {"w": TABLE},
        inputs=[(name, kinds.get(name, FLOAT), shape) for name, shape in names.items()],
        outputs=OUT,
    )
    session = open_session(save(model, tmp_path / "m.onnx"))
    ids, mask, keys, state = make_synthetic_inputs(session, batch=3, free=6)
    assert ids.shape == (3, 6)
    assert mask.shape == (3, 12)
    assert keys.shape == (3, 2, 6, 4)
    assert state.shape == (2, 3, 5)
    assert set(np.unique(mask)) <= {0, 1}
    assert mask[:, 0].all()  # rows are padded at their ends, and none is hidden


def test_positions_count(tmp_path):
    model = make_model(
        [helper.make_node("Gather", ["w", "position_ids"], ["y"])],
        {"w": TABLE},
        inputs=[("position_ids", INT, ["n", "t"])],
        outputs=OUT,
    )
    session = open_session(save(model, tmp_path / "m.onnx"))
    bounds = find_index_bounds(model)
    (ids,) = make_synthetic_inputs(session, batch=2, free=5, bounds=bounds)
    np.testing.assert_array_equal(ids, [[0, 1, 2, 3, 4]] * 2)


def test_text_and_unsigned_inputs_are_fed(tmp_path):
    model = make_model(
        [
            helper.make_node("LabelEncoder", ["s"], ["a"], domain="ai.onnx.ml",
                             keys_strings=["1", "2"], values_floats=[0.5, 0.7]),
            helper.make_node("Cast", ["u"], ["b"], to=FLOAT),
            helper.make_node("Add", ["a", "b"], ["c"]),
            helper.make_node("MatMul", ["c", "w"], ["y"]),
        ],
        {"w": draw_grid((64, 64))},
        inputs=[("s", TensorProto.STRING, ["n", 64]), ("u", TensorProto.UINT32, ["n", 64])],
        outputs=OUT,
        domains={"ai.onnx.ml": 2},
    )  # fmt: skip
    path = save(model, tmp_path / "m.onnx")
    report = pack(path, tmp_path / "p.onnx")
    assert report.written is not None
    assert "bit for bit" in report.equivalence.checks[0].sentence
    assert numpy_helper.to_array(model.graph.initializer[0]).size
