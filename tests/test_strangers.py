"""Models as people bring them: several readers, several outputs, old and odd forms."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import TensorProto, helper

from ecqx_onnx.verbs.pack import pack, unpack
from tests.strangers import (
    FLOAT,
    assert_packed,
    assert_same_outputs,
    draw_grid,
    draw_levels,
    holds,
    make_model,
    run_file,
    save,
)

X = {"x": np.random.default_rng(1).standard_normal((3, 96)).astype(np.float32)}
BESIDE = {  # what reads the weight beside a product, and of which type and shape it is
    "nothing": ((), ()),
    "identity": ((helper.make_node("Identity", ["w"], ["z"]),), (("z", FLOAT, [96, 128]),)),
    "shape": ((helper.make_node("Shape", ["w"], ["z"]),), (("z", TensorProto.INT64, [2]),)),
    "norm": (
        (helper.make_node("ReduceL2", ["w"], ["z"], keepdims=0),),
        (("z", FLOAT, []),),
    ),
    "gather": (
        (helper.make_node("Gather", ["w", "i"], ["z"]),),
        (("z", FLOAT, [2, 128]),),
    ),
    "transposed": (
        (helper.make_node("Gemm", ["y", "w"], ["z"], transB=1),),
        (("z", FLOAT, ["n", 96]),),
    ),
}


@pytest.mark.parametrize("beside", BESIDE)
@pytest.mark.parametrize("listed", [True, False], ids=["output", "inner"])
def test_a_weight_that_is_an_output_or_has_a_reader_beside_comes_back_as_it_was(
    beside, listed, tmp_path
):
    nodes, outputs = BESIDE[beside]
    model = make_model(
        [helper.make_node("MatMul", ["x", "w"], ["y"]), *nodes],
        {"w": draw_grid((96, 128)), "i": np.array([5, 0])},
        inputs=[("x", FLOAT, ["n", 96])],
        outputs=[("y", FLOAT, ["n", 128]), *outputs, *([("w", FLOAT, [96, 128])] * listed)],
    )
    path = save(model, tmp_path / "model.onnx")
    report = pack(path, tmp_path / "packed.onnx")
    assert_packed(report, path, X)
    for target in ("qdq", "onnxruntime"):
        unpack(report.path, tmp_path / "dense.onnx", target=target, force=True)
        if listed:
            back = run_file(tmp_path / "dense.onnx", X)[-1]
            np.testing.assert_array_equal(back, draw_grid((96, 128)))
    unpack(report.path, tmp_path / "floats.onnx", floats=True)
    assert holds(tmp_path / "floats.onnx", draw_grid((96, 128)))


READERS = {  # how the second reader gets at integers that the first one dequantizes
    "product": (
        helper.make_node("DequantizeLinear", ["q", "s"], ["b"]),
        helper.make_node("MatMul", ["h", "b"], ["y"]),
    ),
    "another step": (
        helper.make_node("DequantizeLinear", ["q", "t"], ["b"]),
        helper.make_node("MatMul", ["h", "b"], ["y"]),
    ),
    "transposed": (
        helper.make_node("DequantizeLinear", ["q", "s"], ["b"]),
        helper.make_node("Transpose", ["b"], ["c"], perm=[1, 0]),
        helper.make_node("MatMul", ["h", "c"], ["y"]),
    ),
    "integers": (
        helper.make_node("Cast", ["q"], ["b"], to=FLOAT),
        helper.make_node("MatMul", ["h", "b"], ["y"]),
    ),
    "as a value": (helper.make_node("MatMul", ["h", "a"], ["y"]),),
}


@pytest.mark.parametrize("reader", READERS)
def test_integers_with_two_readers_are_stored_once(reader, tmp_path):
    model = make_model(
        [
            helper.make_node("DequantizeLinear", ["q", "s"], ["a"]),
            helper.make_node("MatMul", ["x", "a"], ["h"]),
            *READERS[reader],
        ],
        {"q": draw_levels((128, 128)), "s": np.float32(0.1), "t": np.float32(0.3)},
        inputs=[("x", FLOAT, ["n", 128])],
        outputs=[("y", FLOAT, ["n", 128])],
    )
    path = save(model, tmp_path / "model.onnx")
    feeds = {"x": np.resize(X["x"], (3, 128))}
    report = pack(path, tmp_path / "packed.onnx")
    assert_packed(report, path, feeds)
    assert report.nbytes < 0.5 * path.stat().st_size  # one set of integers, not two


def test_an_embedding_tied_to_the_head_is_stored_once(tmp_path):
    model = make_model(
        [
            helper.make_node("DequantizeLinear", ["q", "s"], ["a"]),
            helper.make_node("Gather", ["a", "i"], ["e"]),
            helper.make_node("DequantizeLinear", ["q", "s"], ["b"]),
            helper.make_node("Transpose", ["b"], ["c"], perm=[1, 0]),
            helper.make_node("MatMul", ["e", "c"], ["y"]),
        ],
        {"q": draw_levels((400, 96)), "s": np.float32(0.1)},
        inputs=[("i", TensorProto.INT64, ["n", 4])],
        outputs=[("y", FLOAT, ["n", 4, 400])],
    )
    path = save(model, tmp_path / "model.onnx")
    report = pack(path, tmp_path / "packed.onnx")
    assert_packed(report, path, {"i": np.arange(8).reshape(2, 4)})
    unpack(report.path, tmp_path / "dense.onnx")
    assert (tmp_path / "dense.onnx").stat().st_size < 1.1 * path.stat().st_size


@pytest.mark.parametrize("permutation", [None, (1, 0, 2), (0, 2, 1)])
def test_kernels_with_two_readers_are_stored_once_whatever_one_of_them_turns(permutation, tmp_path):
    turned = "b"
    nodes = [
        helper.make_node("DequantizeLinear", ["q", "s"], ["a"]),
        helper.make_node("Conv", ["x", "a"], ["h"], pads=[1, 1]),
        helper.make_node("DequantizeLinear", ["q", "s"], ["b"]),
    ]
    if permutation is not None:
        turned = "c"
        nodes.append(helper.make_node("Transpose", ["b"], ["c"], perm=permutation))
    nodes += [
        helper.make_node("ReduceSum", [turned, "axis"], ["d"], keepdims=0),
        helper.make_node("ReduceMax", ["d"], ["z"], keepdims=0),
        helper.make_node("Mul", ["h", "z"], ["y"]),
    ]
    model = make_model(
        nodes,
        {"q": draw_levels((48, 48, 3)), "s": np.float32(0.1), "axis": np.array([1])},
        inputs=[("x", FLOAT, ["n", 48, 9])],
        outputs=[("y", FLOAT, ["n", 48, 9])],
    )
    path = save(model, tmp_path / "model.onnx")
    report = pack(path, tmp_path / "packed.onnx")
    feeds = {"x": np.resize(X["x"], (2, 48, 9))}
    assert_same_outputs(path, report.path, feeds)
    assert report.written is not None
    assert report.nbytes < 0.6 * path.stat().st_size
