"""The parts of compression one by one: weights, vectors, moments, segments, allocation, bounds."""

import numpy as np
import onnx
import onnxruntime
import pytest
from ecqx_onnx_converters.graph.graph import FloatGraph
from onnx import TensorProto, helper, numpy_helper

from ecqx_onnx.compression.model.biases import corrected_bias, with_biases
from ecqx_onnx.compression.model.weights import Product, Window, find_weights
from ecqx_onnx.compression.rounding.moments import MomentKey, collect_moments, unique_keys
from ecqx_onnx.compression.rounding.ordered import Layers, round_at_once, round_in_order
from ecqx_onnx.compression.rounding.vectors import take_input_vectors
from ecqx_onnx.compression.search.allocation import LADDER, allocate, find_dial, measure_rate
from ecqx_onnx.compression.search.bounds import make_bounds, parse_bytes
from ecqx_onnx.errors import OptionError
from ecqx_onnx.runtime.runner import Runner
from ecqx_onnx.runtime.segments import Segments
from tests.oracles.error_feedback import best_allocation, windows_by_hand


def small_network(seed=0):
    """Conv, Relu, Conv in two groups, global mean, MatMul and Add, and a mask that is no weight."""
    generator = np.random.default_rng(seed)

    def array(name, *shape):
        values = generator.normal(size=shape) / np.sqrt(np.prod(shape[1:]) + 1)
        return numpy_helper.from_array(values.astype(np.float32), name)

    nodes = [
        helper.make_node("Conv", ["x", "w1", "b1"], ["c1"], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c1"], ["r1"]),
        helper.make_node("Conv", ["r1", "w2"], ["c2"], group=2, strides=[2, 2]),
        helper.make_node("Mul", ["c2", "mask"], ["m2"]),
        helper.make_node("Relu", ["m2"], ["r2"]),
        helper.make_node("GlobalAveragePool", ["r2"], ["p"]),
        helper.make_node("Flatten", ["p"], ["f"]),
        helper.make_node("MatMul", ["f", "w3"], ["d"]),
        helper.make_node("Add", ["d", "b3"], ["y"]),
    ]
    initializers = [
        array("w1", 8, 3, 3, 3), array("b1", 8), array("w2", 12, 4, 3, 3),
        array("mask", 1, 12, 1, 1), array("w3", 12, 6), array("b3", 6),
    ]  # fmt: skip
    graph = helper.make_graph(
        nodes,
        "small",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 3, 9, 9])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 6])],
        initializers,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    onnx.checker.check_model(model, full_check=True)
    return model


def small_layers(seed=0):
    graph = FloatGraph.from_model(small_network(seed))
    weights, passed = find_weights(graph)
    return Layers(*with_biases(graph, weights)[:1], weights, with_biases(graph, weights)[1]), passed


def images(count, seed=1):
    generator = np.random.default_rng(seed)
    return generator.normal(size=(count, 3, 9, 9)).astype(np.float32)


def test_weights_are_found_by_what_multiplies_with_them_and_a_mask_is_none():
    layers, passed = small_layers()
    assert [weight.name for weight in layers.weights] == ["w1", "w2", "w3"]
    assert [weight.groups for weight in layers.weights] == [1, 2, 1]
    assert {entry.name for entry in passed} == {"mask"}
    assert set(layers.biases) == {"w1", "w2", "w3"}


def test_matrices_of_every_layout_come_back_as_they_were():
    layers, _ = small_layers()
    for weight in layers.weights:
        values = layers.graph.weights[weight.name]
        assert np.array_equal(weight.from_matrices(weight.to_matrices(values)), values)


@pytest.mark.parametrize(
    ("strides", "pads", "dilations"),
    [
        ((1, 1), (0, 0, 0, 0), (1, 1)),
        ((2, 1), (1, 0, 1, 2), (1, 1)),
        ((1, 2), (2, 2, 2, 2), (2, 2)),
    ],
)
def test_windows_are_those_that_loops_find(strides, pads, dilations):
    image = np.random.default_rng(0).normal(size=(1, 2, 8, 7)).astype(np.float32)
    window = Window((3, 2), strides, pads, dilations)
    product = Product("Conv", "x", "y", "window", True, window)
    found = take_input_vectors(image, product)
    wanted = windows_by_hand(image[0], (3, 2), strides, pads, dilations)
    assert found[0] == pytest.approx(wanted)


def test_padded_tokens_are_left_out():
    x = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    mask = np.array([[True, True, False], [True, False, False]])
    product = Product("MatMul", "x", "y", "last", True)
    assert np.array_equal(take_input_vectors(x, product, mask=mask)[0], x[mask])


def test_moments_of_a_grouped_convolution_are_those_of_its_windows():
    layers, _ = small_layers()
    keys = unique_keys(layers.weights)
    runner = Runner(layers.graph, values=[key.product.value for key in keys])
    batches = [{"x": images(4)}, {"x": images(3, seed=2)}]
    found = collect_moments(runner, layers.weights, batches, samples=7)
    key = MomentKey.of(layers.weights[1])
    seen = [runner.run(batch, fetch=["r1"])[0] for batch in batches]
    rows = []
    for image in np.concatenate(seen):
        rows.append(windows_by_hand(image[4:], (3, 3), (2, 2), (0, 0, 0, 0), (1, 1)))
    second = np.concatenate(rows).astype(float)
    assert found[key].blocks[0][1] == pytest.approx(second.T @ second / len(second), rel=1e-4)
    centered = found[key].centered().blocks[0][1]
    assert centered == pytest.approx(np.cov(second.T, bias=True), abs=1e-4)


def test_a_run_in_pieces_is_the_run_at_once():
    layers, _ = small_layers()
    feeds = {"x": images(5)}
    whole = Runner(layers.graph, values=["r1", "f"]).run(feeds, fetch=["r1", "f"])
    segments = Segments(layers.graph, [feeds])
    segments.advance(2, {})
    assert segments.live[0]["r1"] == pytest.approx(whole[0])
    assert "x" not in segments.live[0]
    segments.advance(7, {})
    assert segments.live[0]["f"] == pytest.approx(whole[1], abs=1e-6)


def test_rounding_in_order_moves_the_outputs_less_than_rounding_at_once():
    layers, _ = small_layers()
    batches = [{"x": images(64)}]
    keys = unique_keys(layers.weights)
    values = [key.product.value for key in keys]
    runner = Runner(layers.graph, variable=layers.variable, values=values)
    moments = collect_moments(runner, layers.weights, batches, samples=64)
    steps = {w.name: np.float32(layers.matrices(w).std()) for w in layers.weights}
    expected = runner.run(batches[0])[0]
    errors = {}
    for name, model in (
        ("once", round_at_once(layers, steps, moments)),
        ("order", round_in_order(layers, steps, batches)),
    ):
        found = runner.run(batches[0], weights=model.changed)[0]
        errors[name] = float(((found - expected) ** 2).sum())
    assert errors["order"] < errors["once"]


def test_a_corrected_bias_gives_the_mean_output_back():
    generator = np.random.default_rng(0)
    x = generator.normal(size=(50, 6)) + 2
    before = generator.normal(size=(1, 4, 6)).astype(np.float32)
    after = before + 0.1
    mean = x.mean(axis=0)[None]
    bias = corrected_bias(np.zeros(4, np.float32), before, after, mean, mean)
    wanted = (x @ before[0].T).mean(axis=0)
    assert (x @ after[0].T + bias).mean(axis=0) == pytest.approx(wanted, rel=1e-5)


def test_an_allocation_is_as_good_as_the_best_of_a_grid_at_its_own_rate():
    generator = np.random.default_rng(0)
    curves, slopes = [], {}
    for index, size in enumerate((40, 200, 90)):
        values = generator.normal(size=(1, size // 10, 10)).astype(np.float32)
        curves.append(measure_rate(f"w{index}", values, np.ones((1, 1, 1), np.float32)))
        slopes[f"w{index}"] = float(generator.uniform(0.1, 30))
    # Only convex parts of the curves can be reached by one slope, so compare within a bit or two.
    dial = find_dial(curves, slopes, 2.0 * sum(curve.size for curve in curves))
    chosen = allocate(curves, slopes, dial)
    spent = sum(curve.bits_at(chosen[curve.name]) * curve.size for curve in curves)
    error = sum(slopes[name] * multiple**2 for name, multiple in chosen.items())
    rates = [[float(bits) * curve.size for bits in curve.bits[::2]] for curve in curves]
    errors = [[slopes[curve.name] * rung**2 for rung in LADDER[::2]] for curve in curves]
    _, least = best_allocation(rates, errors, spent)
    assert error <= 1.02 * least


def test_a_weight_that_moves_nothing_gets_the_coarsest_step():
    values = np.random.default_rng(0).normal(size=(1, 10, 10)).astype(np.float32)
    curves = [measure_rate(name, values, np.ones((1, 1, 1), np.float32)) for name in "ab"]
    chosen = allocate(curves, {"a": 1.0, "b": 0.0}, -6.0)
    assert chosen["b"] == pytest.approx(LADDER[-1])
    assert chosen["a"] < chosen["b"]


@pytest.mark.parametrize(
    ("text", "wanted"),
    [("70k", 70_000), ("1.5M", 1_500_000), ("64KiB", 65_536), ("1MiB", 1 << 20), ("123", 123)],
)
def test_sizes_are_read_as_people_write_them(text, wanted):
    assert parse_bytes(text) == wanted


@pytest.mark.parametrize(
    "bounds",
    [
        {"max_bytes": "0"}, {"max_bytes": "much"}, {"min_agreement": 0.98}, {"max_error": 2.0},
        {"max_drop": -1.0}, {"bits_per_weight": 0.0}, {"max_error": float("nan")},
    ],
)  # fmt: skip
def test_a_bound_that_makes_no_sense_is_refused(bounds):
    with pytest.raises(OptionError):
        make_bounds(**bounds)


def test_an_agreement_written_as_a_share_is_told_in_percent():
    with pytest.raises(OptionError, match="write 98"):
        make_bounds(min_agreement=0.98)


def outlier_network(sigmas):
    """Two layers of matrices, one entry of the second so many deviations away."""
    generator = np.random.default_rng(0)
    first = generator.normal(size=(96, 128)).astype(np.float32) / 10
    second = generator.normal(size=(128, 96)).astype(np.float32) / 10
    second[7, 5] = sigmas * second.std()
    nodes = [
        helper.make_node("MatMul", ["x", "w1"], ["h"]),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("MatMul", ["r", "w2"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "outlier",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 96])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 96])],
        [numpy_helper.from_array(first, "w1"), numpy_helper.from_array(second, "w2")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)


def test_a_weight_at_175_deviations_spoils_nothing_beside_it(tmp_path):
    """As in a sentence encoder's layers: never clipped, and no other channel pays for it."""
    from ecqx_onnx.verbs.compress import compress

    generator = np.random.default_rng(1)
    x = (generator.normal(size=(512, 96)) @ generator.normal(size=(96, 96))).astype(np.float32)
    outputs = {}
    for sigmas in (0.0, 175.0):
        onnx.save(outlier_network(sigmas), tmp_path / "float.onnx")
        out = tmp_path / f"{sigmas:g}.onnx"
        compress(tmp_path / "float.onnx", out, data=x, bits_per_weight=4.0)
        run = Runner(FloatGraph.load(tmp_path / "float.onnx")).run({"x": x[:64]})[0]
        found = onnxruntime.InferenceSession(out).run(None, {"x": x[:64]})[0]
        others = np.delete(found - run, 5, axis=1)
        outputs[sigmas] = np.linalg.norm(others) / np.linalg.norm(np.delete(run, 5, axis=1))
        channel = np.linalg.norm((found - run)[:, 5]) / np.linalg.norm(run[:, 5])
        assert channel < 0.1
    assert outputs[175.0] < 1.1 * outputs[0.0]
