"""Weights inside If and Loop: their inputs are handed out for the statistics."""

import numpy as np
import onnx
import onnxruntime
import pytest
from ecqx_onnx_converters.graph.graph import FloatGraph
from onnx import TensorProto, helper, numpy_helper

from ecqx_onnx.compression.model.exposed import expose_inputs
from ecqx_onnx.compression.model.weights import find_weights
from ecqx_onnx.compression.rounding.moments import MomentKey, collect_moments, unique_keys
from ecqx_onnx.runtime.runner import Runner
from ecqx_onnx.verbs.compress import compress

WIDTH = 16


def random_array(name, *shape, seed=0):
    values = np.random.default_rng([seed, len(name)]).normal(size=shape) / 4
    return numpy_helper.from_array(values.astype(np.float32), name)


def tensor(name, *shape):
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape or None)


def make_branch(name, weight):
    """Relu of x and a product with a weight of the main graph."""
    nodes = [
        helper.make_node("Abs", ["x"], [f"{name}_a"]),
        helper.make_node("MatMul", [f"{name}_a", weight], [f"{name}_y"]),
    ]
    return helper.make_graph(nodes, name, [], [tensor(f"{name}_y")])


def if_network():
    """One branch where the mean of x is positive, else the other; each has its own weight."""
    nodes = [
        helper.make_node("ReduceMean", ["x"], ["m"], keepdims=0),
        helper.make_node("Greater", ["m", "zero"], ["c"]),
        helper.make_node(
            "If",
            ["c"],
            ["y"],
            then_branch=make_branch("t", "wt"),
            else_branch=make_branch("e", "we"),
        ),
    ]
    initializers = [
        random_array("wt", WIDTH, WIDTH), random_array("we", WIDTH, WIDTH, seed=1),
        numpy_helper.from_array(np.float32(0), "zero"),
    ]  # fmt: skip
    graph = helper.make_graph(
        nodes, "if", [tensor("x", "N", WIDTH)], [tensor("y", "N", WIDTH)], initializers
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def loop_network(rounds=3):
    """The state is multiplied with a weight in each round, the last state is the output."""
    body = helper.make_graph(
        [
            helper.make_node("Identity", ["go"], ["go_on"]),
            helper.make_node("MatMul", ["state", "w"], ["product"]),
            helper.make_node("Tanh", ["product"], ["next"]),
        ],
        "body",
        [
            helper.make_tensor_value_info("i", TensorProto.INT64, []),
            helper.make_tensor_value_info("go", TensorProto.BOOL, []),
            tensor("state"),
        ],
        [helper.make_tensor_value_info("go_on", TensorProto.BOOL, []), tensor("next")],
    )
    graph = helper.make_graph(
        [helper.make_node("Loop", ["rounds", "true", "x"], ["y"], body=body)],
        "loop",
        [tensor("x", "N", WIDTH)],
        [tensor("y", "N", WIDTH)],
        [
            random_array("w", WIDTH, WIDTH),
            numpy_helper.from_array(np.array(rounds), "rounds"),
            numpy_helper.from_array(np.array(True), "true"),
        ],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def correlated(count, sign=1.0):
    generator = np.random.default_rng(5)
    mixing = generator.normal(size=(WIDTH, WIDTH))
    x = generator.normal(size=(count, WIDTH)) @ mixing + sign
    return x.astype(np.float32)


def learn(model, x):
    """Moments by weight, taken from batches of 8."""
    graph = FloatGraph.from_model(model)
    weights, _ = find_weights(graph)
    exposed = expose_inputs(graph, weights)
    values = [str(key.product.value) for key in unique_keys(exposed.weights)]
    runner = Runner(exposed.graph, values=values, variable=[weight.name for weight in weights])
    batches = [{"x": x[start : start + 8]} for start in range(0, len(x), 8)]
    moments = collect_moments(runner, exposed.weights, batches, samples=len(x))
    found = {}
    for weight in exposed.weights:
        key = MomentKey.of(weight)
        found[weight.name] = None if key is None else moments.get(key)
    return found


def test_the_input_of_a_branch_that_is_taken_is_seen_and_of_the_other_none():
    x = correlated(64, sign=9.0)
    found = learn(if_network(), x)
    inside = np.abs(x.astype(np.float64))
    assert found["wt"].blocks[0][0] == pytest.approx(inside.T @ inside / len(x), rel=1e-4)
    assert found["we"] is None


def test_every_round_of_a_loop_is_seen():
    x = correlated(16)
    weight = numpy_helper.to_array(loop_network().graph.initializer[0])
    states = [x.astype(np.float64)]
    for _ in range(2):
        states.append(np.tanh(states[-1] @ weight))
    seen = np.concatenate(states)
    found = learn(loop_network(), x)
    assert found["w"].count == len(seen)
    assert found["w"].blocks[0][0] == pytest.approx(seen.T @ seen / len(seen), rel=1e-3)


def test_a_branch_inside_a_branch_is_seen_too():
    outer = if_network()
    inner = next(node for node in outer.graph.node if node.op_type == "If")
    nested = helper.make_graph([helper.make_node("If", ["c"], ["n_y"])], "n", [], [tensor("n_y")])
    nested.node[0].attribute.extend(inner.attribute)
    other = make_branch("o", "we")
    node = helper.make_node("If", ["c"], ["y"], then_branch=nested, else_branch=other)
    outer.graph.node.remove(inner)
    outer.graph.node.append(node)
    onnx.checker.check_model(outer)
    x = correlated(32, sign=9.0)
    inside = np.abs(x.astype(np.float64))
    found = learn(outer, x)["wt"]
    assert found.blocks[0][0] == pytest.approx(inside.T @ inside / len(x), rel=1e-4)


@pytest.mark.parametrize("make", [if_network, loop_network])
def test_feedback_in_a_subgraph_makes_the_error_smaller(tmp_path, make, monkeypatch):
    onnx.save(make(), tmp_path / "float.onnx")
    errors = []
    for exposes in (True, False):
        if not exposes:
            from ecqx_onnx.compression.model.exposed import Exposed
            from ecqx_onnx.compression.search import points

            monkeypatch.setattr(points, "expose_inputs", lambda graph, ws: Exposed(graph, ws))
        result = compress(
            tmp_path / "float.onnx",
            tmp_path / "small.onnx",
            data={"x": correlated(512, sign=9.0 if make is if_network else 0.0)},
            bits_per_weight=8.0,
            force=True,
        )
        errors.append(result.verdict.quality.error)
    # A loop's state is a mixture that its own rounding changes: there it helps less.
    assert errors[0] < (0.9 if make is if_network else 1.02) * errors[1]
    onnx.checker.check_model(onnx.load(tmp_path / "small.onnx"))


def test_convert_takes_the_statistics_of_subgraphs_too(tmp_path):
    import ecqx_onnx

    onnx.save(if_network(), tmp_path / "float.onnx")
    x = correlated(256, sign=9.0)
    errors = []
    for calibration in ({"x": x}, None):
        out = tmp_path / "small.onnx"
        ecqx_onnx.convert(tmp_path / "float.onnx", out, bits=3, calibration=calibration, force=True)
        wanted = Runner(FloatGraph.load(tmp_path / "float.onnx")).run({"x": x[:64]})[0]
        found = onnxruntime.InferenceSession(out).run(None, {"x": x[:64]})[0]
        errors.append(np.linalg.norm(found - wanted))
    assert errors[0] < 0.9 * errors[1]


def test_branches_and_the_outer_graph_may_multiply_the_same_value(tmp_path):
    """The weights of a branch then stand in one stage with one that the outer graph reads."""

    def make_bare_branch(name, weight):
        node = helper.make_node("MatMul", ["x", weight], [f"{name}_y"])
        return helper.make_graph([node], name, [], [tensor(f"{name}_y")])

    nodes = [
        helper.make_node("MatMul", ["x", "outer"], ["a"]),
        helper.make_node("ReduceMean", ["x"], ["m"], keepdims=0),
        helper.make_node("Greater", ["m", "zero"], ["c"]),
        helper.make_node(
            "If",
            ["c"],
            ["b"],
            then_branch=make_bare_branch("t", "wt"),
            else_branch=make_bare_branch("e", "we"),
        ),
        helper.make_node("Add", ["a", "b"], ["y"]),
    ]
    weights = [random_array(name, WIDTH, WIDTH) for name in ("outer", "wt", "we")]
    initializers = [*weights, numpy_helper.from_array(np.float32(0), "zero")]
    graph = helper.make_graph(
        nodes, "both", [tensor("x", "N", WIDTH)], [tensor("y", "N", WIDTH)], initializers
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, tmp_path / "f.onnx")
    x = np.random.default_rng(0).normal(size=(64, WIDTH)).astype(np.float32)
    result = compress(tmp_path / "f.onnx", tmp_path / "o.onnx", data=x, bits_per_weight=4.0)
    assert result.ok
