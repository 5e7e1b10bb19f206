"""Models of 200 bytes that ask for ages or terabytes end in one sentence, soon."""

from __future__ import annotations

import time

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from ecqx_onnx.errors import FileError, ModelError
from ecqx_onnx.inputs import claimed_work
from ecqx_onnx.inputs.onnx_file import read_onnx
from ecqx_onnx.runtime import runner, sessions, watchdog
from ecqx_onnx.validation.stored.whole import check_file
from ecqx_onnx.verbs.deploy import deploy
from ecqx_onnx.verbs.pack import pack

STEPS = 2**62
HUGE = np.array([2**31, 2], np.int64)


def make_graph(nodes, constants, *, name="g"):
    """A graph float [1] -> float [1] whose initializers are these."""
    initializers = [
        numpy_helper.from_array(np.array(value), key) for key, value in constants.items()
    ]
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)]
    return helper.make_graph(nodes, name, inputs, outputs, initializers)


def write_model(path, nodes, constants):
    imports = [helper.make_opsetid("", 18)]
    model = helper.make_model(make_graph(nodes, constants), opset_imports=imports, ir_version=9)
    path.write_bytes(model.SerializeToString())
    return path


def make_loop(trips, *, condition=("Identity", "go"), inner=(), output="y"):
    """A loop that adds x once a step; `condition` computes whether it goes on."""
    operator, *arguments = condition
    nodes = [
        helper.make_node(operator, arguments, ["on"]),
        *inner,
        helper.make_node("Add", ["sum", "one"], ["next"]),
    ]
    body = helper.make_graph(
        nodes,
        "body",
        [
            helper.make_tensor_value_info("i", TensorProto.INT64, []),
            helper.make_tensor_value_info("go", TensorProto.BOOL, []),
            helper.make_tensor_value_info("sum", TensorProto.FLOAT, [1]),
        ],
        [
            helper.make_tensor_value_info("on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("next", TensorProto.FLOAT, [1]),
        ],
    )
    return helper.make_node("Loop", [trips, "true", "x"], [output], body=body)


def make_counting(path, steps):
    constants = {"n": np.int64(steps), "true": True, "one": np.ones(1, np.float32)}
    return write_model(path, [make_loop("n")], constants)


def make_endless(path):
    """Nothing in the file says how many steps: the trip count is computed."""
    constants = {"n": np.int64(STEPS // 2), "true": True, "one": np.ones(1, np.float32)}
    nodes = [helper.make_node("Add", ["n", "n"], ["trips"]), make_loop("trips")]
    return write_model(path, nodes, constants)


COMMANDS = {
    "validate": lambda path, out: check_file(path),
    "pack": lambda path, out: pack(path, out / "out.onnx"),
    "deploy": lambda path, out: deploy(path, out / "folder", to="linux"),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_loop_of_2_to_the_62_steps_is_refused_by(command, tmp_path):
    path = make_counting(tmp_path / "loop.onnx", STEPS)
    with pytest.raises(FileError, match=f"makes {STEPS} steps") as caught:
        COMMANDS[command](path, tmp_path)
    assert caught.value.exit_status == 2
    assert [part.name for part in tmp_path.iterdir()] == ["loop.onnx"]


def test_loops_inside_each_other_are_multiplied(tmp_path):
    constants = {"n": np.int64(10_000), "true": True, "one": np.ones(1, np.float32)}
    inner = make_loop("n", output="unused")
    path = write_model(tmp_path / "loops.onnx", [make_loop("n", inner=[inner])], constants)
    with pytest.raises(FileError, match="makes 100000000 steps"):
        read_onnx(path)


def test_a_loop_in_a_function_is_looked_at(tmp_path):
    path = make_counting(tmp_path / "loop.onnx", STEPS)
    model = onnx.load(path)
    constants = [
        helper.make_node("Constant", [], [tensor.name], value=tensor)
        for tensor in model.graph.initializer
    ]
    imports = [helper.make_opsetid("", 18)]
    function = helper.make_function(
        "own", "f", ["x"], ["y"], [*constants, *model.graph.node], imports
    )
    graph = make_graph([helper.make_node("f", ["x"], ["y"], domain="own")], {})
    imports = [*imports, helper.make_opsetid("own", 1)]
    whole = helper.make_model(graph, opset_imports=imports, functions=[function], ir_version=9)
    path.write_bytes(whole.SerializeToString())
    with pytest.raises(FileError, match=f"makes {STEPS} steps"):
        read_onnx(path)


def test_a_loop_that_a_condition_ends_is_a_while_and_runs(tmp_path):
    constants = {
        "n": np.int64(2**63 - 1),
        "true": True,
        "one": np.ones(1, np.float32),
        "last": np.int64(4),
    }
    loop = make_loop("n", condition=("Less", "i", "last"))
    path = write_model(tmp_path / "while.onnx", [loop], constants)
    session = sessions.open_session(read_onnx(path).path, threads=1)
    [result] = sessions.run(session, [np.zeros(1, np.float32)])
    assert result == 5


def test_a_loop_of_the_most_steps_passes(tmp_path):
    read_onnx(make_counting(tmp_path / "most.onnx", claimed_work.MOST_STEPS))
    with pytest.raises(FileError, match="steps"):
        read_onnx(make_counting(tmp_path / "more.onnx", claimed_work.MOST_STEPS + 1))


CLAIMS = {
    "ConstantOfShape": ("ConstantOfShape", ["shape"], {}),
    "ConstantOfShape, empty rows": ("ConstantOfShape", ["empty"], {}),
    "Expand": ("Expand", ["x", "shape"], {}),
    "Tile": ("Tile", ["x", "repeats"], {}),
    "OneHot": ("OneHot", ["place", "depth", "ends"], {}),
    "Range": ("Range", ["start", "limit", "step"], {}),
    "Range of floats": ("Range", ["low", "high", "tiny"], {}),
    "RandomNormal": ("RandomNormal", [], {"shape": [2**40]}),
    "HannWindow": ("HannWindow", ["depth"], {}),
}
CONSTANTS = {
    "shape": HUGE,
    "empty": np.array([STEPS, 0]),
    "repeats": np.array([2**40]),
    "place": np.array([0]),
    "depth": np.int64(2**40),
    "ends": np.array([0, 1], np.float32),
    "start": np.int64(2**40),
    "limit": np.int64(0),
    "step": np.int64(-1),
    "low": np.float32(0),
    "high": np.float32(1e30),
    "tiny": np.float32(1),
}


@pytest.mark.parametrize("claim", CLAIMS)
def test_a_tensor_of_terabytes_is_refused_from(claim, tmp_path):
    operator, inputs, attributes = CLAIMS[claim]
    node = helper.make_node(operator, inputs, ["y"], **attributes)
    path = write_model(tmp_path / "claim.onnx", [node], CONSTANTS)
    with pytest.raises(FileError, match=rf"'y' \({operator}\) makes a tensor of \d+ values"):
        read_onnx(path)


def test_a_claim_in_a_constant_node_is_refused_as_well(tmp_path):
    nodes = [
        helper.make_node("Constant", [], ["n"], value_ints=[2**40]),
        helper.make_node("ConstantOfShape", ["n"], ["y"]),
    ]
    with pytest.raises(FileError, match="makes a tensor of"):
        read_onnx(write_model(tmp_path / "claim.onnx", nodes, {}))


def test_ordinary_shapes_pass(tmp_path):
    constants = {"shape": np.array([2, -1, 8192, 8192]), "zero": np.array([0])}
    nodes = [
        helper.make_node("ConstantOfShape", ["zero"], ["none"]),
        helper.make_node("Expand", ["x", "shape"], ["y"]),
    ]
    read_onnx(write_model(tmp_path / "ordinary.onnx", nodes, constants))


@pytest.fixture
def little_time(monkeypatch):
    monkeypatch.setattr(watchdog, "LONGEST_RUN", 0.2)
    monkeypatch.setattr(watchdog, "PERIOD", 0.02)


@pytest.mark.usefixtures("little_time")
def test_a_loop_without_an_end_is_stopped(tmp_path, capfd):
    path = make_endless(tmp_path / "endless.onnx")
    session = sessions.open_session(path, threads=1)
    start = time.perf_counter()
    with pytest.raises(ModelError, match=r"took more than 0\.2 seconds and was stopped"):
        sessions.run(session, [np.zeros(1, np.float32)])
    with pytest.raises(ModelError, match="was stopped"):
        runner.run_session(session, ["y"], {"x": np.zeros(1, np.float32)})
    assert time.perf_counter() - start < 20
    assert capfd.readouterr().err == ""


@pytest.mark.usefixtures("little_time")
def test_a_command_that_runs_a_loop_without_an_end_ends_with_status_2(tmp_path):
    path = make_endless(tmp_path / "endless.onnx")
    with pytest.raises(ModelError, match="was stopped") as caught:
        deploy(path, tmp_path / "folder", to="linux")
    assert caught.value.exit_status == 2
    assert [part.name for part in tmp_path.iterdir()] == ["endless.onnx"]


def test_what_ends_in_time_is_not_stopped_and_the_thread_goes(monkeypatch):
    monkeypatch.setattr(watchdog, "PERIOD", 0.01)
    stopped = []
    with watchdog.limit_time("nothing", 100, lambda: stopped.append(1)):
        pass
    with pytest.raises(ZeroDivisionError), watchdog.limit_time("nothing", 100, list):
        raise ZeroDivisionError
    end = time.monotonic() + 10
    while watchdog._WATCHDOG._thread is not None and time.monotonic() < end:
        time.sleep(0.01)
    assert watchdog._WATCHDOG._thread is None
    assert not stopped
