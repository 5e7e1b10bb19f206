"""Integers that runtimes' own operators read, whole bytes or several in one: packed, they say the
same in onnxruntime; unpacked, they are the same bytes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
from ecqx_onnx_converters import read_weights
from ecqx_onnx_converters.dequantization import integers
from ecqx_onnx_converters.matching import digits
from ecqx_onnx_converters.matching.matching import Integers
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from ecqx_onnx.errors import FileError
from ecqx_onnx.runtime.sessions import open_session, run
from ecqx_onnx.verbs.pack import PackReport, pack, unpack

MICROSOFT = "com.microsoft"
FLOAT = TensorProto.FLOAT


def skewed(shape: Sequence[int], bits: int, *, zeros: float = 0.6, seed: int = 0) -> np.ndarray:
    """Integers of few bits, most of them in the middle of their range."""
    generator = np.random.default_rng(seed)
    spread = generator.laplace(scale=0.4 * (1 << bits) / 8, size=shape)
    middle = 1 << (bits - 1)
    drawn = np.clip(np.rint(spread) + middle, 0, (1 << bits) - 1)
    return np.where(generator.random(shape) < zeros, middle, drawn).astype(np.uint8)


def join(digits: np.ndarray, bits: int) -> np.ndarray:
    """As bytes, by shifts: another way than the one that is tested."""
    parts = digits.reshape(*digits.shape[:-1], -1, 8 // bits)
    made = np.zeros(parts.shape[:-1], np.uint8)
    for place in range(8 // bits):
        made |= (parts[..., place] << (bits * place)).astype(np.uint8)
    return made


def make_model(
    nodes: Sequence[NodeProto],
    tensors: dict[str, np.ndarray | TensorProto],
    *,
    x: tuple[int, Sequence[int | str]],
    rank: int = 2,
) -> ModelProto:
    """rank: number of dimensions of the output."""
    values = []
    for name, value in tensors.items():
        made = numpy_helper.from_array(value, name) if isinstance(value, np.ndarray) else value
        values.append(made)
    graph = helper.make_graph(
        list(nodes),
        "g",
        [helper.make_tensor_value_info("x", *x)],
        [helper.make_tensor_value_info("y", FLOAT, [f"y{axis}" for axis in range(rank)])],
        values,
    )
    imports = [helper.make_opsetid("", 21), helper.make_opsetid(MICROSOFT, 1)]
    return helper.make_model(graph, opset_imports=imports, ir_version=10)


def matmul_nbits(bits: int, digits: np.ndarray | None = None, **attributes: int) -> ModelProto:
    """256 inputs, in blocks of 32."""
    if digits is None:
        digits = skewed((64, 8, 32), bits)
    outputs = len(digits)
    generator = np.random.default_rng(1)
    node = helper.make_node(
        "MatMulNBits",
        ["x", "b", "s"],
        ["y"],
        domain=MICROSOFT,
        K=256,
        N=outputs,
        bits=bits,
        block_size=32,
        **attributes,
    )
    scales = generator.random((outputs, 8), dtype=np.float32) + np.float32(0.5)
    tensors = {"b": join(digits, bits), "s": scales}
    return make_model([node], tensors, x=(FLOAT, ["n", 256]))


def gather_block_quantized() -> ModelProto:
    node = helper.make_node(
        "GatherBlockQuantized",
        ["b", "x", "s"],
        ["y"],
        domain=MICROSOFT,
        bits=4,
        block_size=32,
        gather_axis=0,
        quantize_axis=1,
    )
    scales = np.random.default_rng(1).random((300, 2), dtype=np.float32)
    tensors = {"b": join(skewed((300, 64), 4), 4), "s": scales}
    return make_model([node], tensors, x=(TensorProto.INT64, ["n"]))


def blocked(kind: int) -> ModelProto:
    """INT4 or UINT4 behind a DequantizeLinear of blocks."""
    digits = skewed((128, 128), 4).astype(np.int32)
    if kind == TensorProto.INT4:
        digits -= 8
    generator = np.random.default_rng(1)
    dtype = helper.tensor_dtype_to_np_dtype(kind)
    tensors: dict[str, np.ndarray | TensorProto] = {
        "b": numpy_helper.from_array(digits.astype(dtype), "b"),
        "s": generator.random((128, 4), dtype=np.float32),
    }
    nodes = [
        helper.make_node("DequantizeLinear", ["b", "s"], ["w"], axis=1, block_size=32),
        helper.make_node("Gemm", ["x", "w"], ["y"], transB=1),
    ]
    return make_model(nodes, tensors, x=(FLOAT, ["n", 128]))


def rounded(shape: Sequence[int], seed: int = 0) -> np.ndarray:
    """int8 up to 127, as most quantizers make them."""
    weights = np.random.default_rng(seed).laplace(size=shape)
    return np.rint(weights / np.abs(weights).max() * 127).astype(np.int8)


def dynamic_lstm() -> ModelProto:
    """One direction, 64 inputs, 32 units."""
    tensors = {
        "w": rounded((1, 64, 128)),
        "r": rounded((1, 32, 128), 1),
        "ws": np.full(1, 0.01, np.float32),
        "wz": np.zeros(1, np.int8),
    }
    inputs = ["x", "w", "r", "", "", "", "", "", "ws", "wz", "ws", "wz"]
    node = helper.make_node("DynamicQuantizeLSTM", inputs, ["y"], domain=MICROSOFT, hidden_size=32)
    return make_model([node], tensors, x=(FLOAT, [3, "n", 64]), rank=4)


def attention() -> ModelProto:
    """QAttention with uint8 weights around 131: 2 heads, 64 channels."""
    weights = (rounded((64, 192)).astype(np.int16) // 2 + 131).astype(np.uint8)
    tensors = {
        "w": weights,
        "b": np.zeros(192, np.float32),
        "xs": np.array(0.05, np.float32),
        "ws": np.array(0.01, np.float32),
        "xz": np.array(128, np.uint8),
        "wz": np.array(131, np.uint8),
    }
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "xs", "xz"], ["q"]),
        helper.make_node(
            "QAttention",
            ["q", "w", "b", "xs", "ws", "", "xz", "wz"],
            ["y"],
            domain=MICROSOFT,
            num_heads=2,
        ),
    ]
    return make_model(nodes, tensors, x=(FLOAT, [2, 5, 64]), rank=3)


def chain(*, sliced: bool = False) -> ModelProto:
    """Cast and Mul written out; or Slice behind the weight."""
    tensors = {"w": rounded((96, 96)), "s": np.array(0.01, np.float32)}
    nodes = [
        helper.make_node("Cast", ["w"], ["f"], to=FLOAT),
        helper.make_node("Mul", ["f", "s"], ["v"]),
    ]
    if sliced:
        tensors |= {"begin": np.array([16]), "end": np.array([64]), "axis": np.array([0])}
        nodes.append(helper.make_node("Slice", ["v", "begin", "end", "axis"], ["t"]))
    nodes.append(helper.make_node("Gemm", ["x", "t" if sliced else "v"], ["y"], transB=1))
    return make_model(nodes, tensors, x=(FLOAT, ["n", 96]))


MODELS = {
    "MatMulNBits of 4 bits": matmul_nbits(4),
    "MatMulNBits of 2 bits": matmul_nbits(2),
    "MatMulNBits of 8 bits": matmul_nbits(8),
    "GatherBlockQuantized": gather_block_quantized(),
    "INT4 in blocks": blocked(TensorProto.INT4),
    "UINT4 in blocks": blocked(TensorProto.UINT4),
    "DynamicQuantizeLSTM": dynamic_lstm(),
    "QAttention": attention(),
    "Cast and Mul": chain(),
    "Slice behind the weight": chain(sliced=True),
}


def pack_model(model: ModelProto, folder: Path) -> tuple[Path, PackReport]:
    onnx.save(model, folder / "original.onnx")
    return folder / "packed.onnx", pack(folder / "original.onnx", folder / "packed.onnx")


@pytest.mark.parametrize("name", MODELS)
def test_integers_of_every_operator_are_packed_and_come_back(name, tmp_path):
    path, report = pack_model(MODELS[name], tmp_path)
    assert report.written is not None, report.reason
    assert report.equivalence.ok
    assert "largest difference 0," in report.equivalence.checks[1].sentence
    assert report.nbytes < (tmp_path / "original.onnx").stat().st_size
    # Unpacked, the integers are those that were there.
    unpack(path, tmp_path / "dense.onnx")
    wanted = []
    for tensor in MODELS[name].graph.initializer:
        if len(tensor.dims) > 1 and tensor.data_type != FLOAT:
            wanted.append(numpy_helper.to_array(tensor))
    found = [numpy_helper.to_array(t) for t in onnx.load(tmp_path / "dense.onnx").graph.initializer]
    for values in wanted:
        same = [values.dtype == other.dtype and np.array_equal(values, other) for other in found]
        assert any(same)


def test_decoded_bytes_are_constant_once_the_model_is_loaded(tmp_path):
    path, _ = pack_model(MODELS["MatMulNBits of 4 bits"], tmp_path)
    x = np.random.default_rng(0).standard_normal((3, 256)).astype(np.float32)
    outputs = []
    for file in (tmp_path / "original.onnx", path):
        outputs.append(run(open_session(file, level="all"), [x])[0])
    np.testing.assert_array_equal(*outputs)


def test_what_is_near_its_entropy_already_is_left_and_the_reason_says_so(tmp_path):
    """Gaussian integers in blocks of 32, each rounded to its largest."""
    weights = np.random.default_rng(0).normal(size=(512, 8, 32))
    steps = np.abs(weights).max(axis=2, keepdims=True) / 7
    digits = (np.rint(weights / steps) + 8).astype(np.uint8)
    path, report = pack_model(matmul_nbits(4, digits), tmp_path)
    assert report.written is None
    (kept,) = (kept for kept in report.kept if kept.name == "b")
    assert re.search(r"9\d% of its 65,5\d\d bytes", kept.reason)
    assert "too little gain" in kept.reason
    assert path.read_bytes() == (tmp_path / "original.onnx").read_bytes()


def test_integers_whose_place_in_the_file_matters_are_left(tmp_path):
    _, report = pack_model(matmul_nbits(4, accuracy_level=4), tmp_path)
    assert report.written is None
    assert "accuracy_level 4" in report.reason


@pytest.mark.parametrize("bits", [2, 4])
def test_bytes_are_split_and_joined_as_shifts_do_it(bits):
    values = np.random.default_rng(0).integers(0, 256, (3, 5)).astype(np.uint8)
    split = digits.split_digits(values, bits)
    assert np.array_equal(join(split.astype(np.uint8), bits), values)
    form = Integers(TensorProto.UINT8, 0, bits)
    assert np.array_equal(digits.join_digits(split.astype(np.int8), form), values)
    with pytest.raises(FileError, match="fill no bytes"):
        digits.join_digits(split[..., 1:].astype(np.int8), form)


@pytest.mark.parametrize("fault", ["shape", "powers", "offset", "fewer", "type"])
def test_a_call_that_no_writer_makes_is_refused(fault):
    made = integers.make_integers(
        Integers(TensorProto.UINT8, 136, 4), 2, levels="l", output="o", constant="c"
    )
    constants = [numpy_helper.to_array(tensor) for tensor in made.initializers]
    assert integers.read_integers(made.node, constants, 2) == Integers(TensorProto.UINT8, 136, 4)
    if fault == "shape":
        constants[0] = constants[0][::-1]
    elif fault == "powers":
        constants[1] = constants[1] + 1
    elif fault == "offset":
        constants[2] = np.zeros(2, np.int32)
    elif fault == "fewer":
        constants.pop()
    else:
        made.node.attribute[0].i = FLOAT
    with pytest.raises(FileError, match="damaged"):
        integers.read_integers(made.node, constants, 2)


def test_levels_count_from_the_integer_that_occurs_most_often(tmp_path):
    path, _ = pack_model(MODELS["MatMulNBits of 4 bits"], tmp_path)
    stored = {item.weight.name: item.weight for item in read_weights(path)}["b"]
    assert stored.integers == Integers(TensorProto.UINT8, 0x88, 4)
    assert np.array_equal(stored.tensor.levels + 8, skewed((64, 8, 32), 4))
