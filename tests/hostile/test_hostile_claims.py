"""Small .onnx files that claim too much or nonsense: every command that opens one ends in words,
soon, in little memory."""

from __future__ import annotations

import base64
import json
import os
import resource
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from ecqx_onnx_converters import FloatGraph, make_plan, match, write
from ecqx_onnx_converters.serialization.metadata import DICTIONARY, METADATA_KEY, from_text
from onnx import (
    AttributeProto,
    ModelProto,
    NodeProto,
    SparseTensorProto,
    TensorProto,
    helper,
    numpy_helper,
)

from ecqx_onnx.errors import EcqxError, FileError, OptionError
from ecqx_onnx.inputs.onnx_file import read_onnx
from ecqx_onnx.preprocessing import Preprocessing
from tests.fuzz.commands import run_command
from tests.onnx_torch_pairs import edit, make_pair

SECONDS = 20  # of all commands on one file, on a machine that others use as well
MEMORY = 1 << 30  # bytes that they may add

LEVELS, STEP, BIAS = "0.weight.levels", "0.weight.step", "0.bias"


def peak() -> int:
    """Bytes that this process has had resident at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def end_in_words(path: Path, *commands: str) -> list[str]:
    """What each command said; an assertion if one ended in anything but a result or a sentence,
    late, or in much memory."""
    began, before, said = time.monotonic(), peak(), []
    out = path.with_suffix(".out.onnx")
    for command in commands or ("inspect", "validate", "pack", "unpack"):
        output = {
            "pack": [out, "--force"],
            "unpack": [out, "--force"],
            "deploy": [path.parent / "web", "--to", "linux"],
        }
        try:
            said.append(
                run_command(
                    command,
                    path,
                    *output.get(command, []),
                    *(["--json"] if command != "deploy" else []),
                )
            )
        except EcqxError as error:
            said.append(str(error))
    assert all(len(sentence) < 700 for sentence in said if sentence.startswith("error"))
    assert time.monotonic() - began < SECONDS
    assert peak() - before < MEMORY
    return said


def foreign() -> ModelProto:
    return make_pair(decoding="standard").model


def ours(tmp_path: Path) -> ModelProto:
    """What the converter makes of the pair."""
    pair = make_pair(decoding="float")
    graph = FloatGraph.from_model(pair.model)
    write(
        make_plan(graph, match(graph.weights, pair.tensors)),
        tmp_path / "ours.onnx",
        metadata={"version": "0"},
    )
    return onnx.load(tmp_path / "ours.onnx")


def saved(model: ModelProto, folder: Path) -> Path:
    path = folder / "hostile.onnx"
    path.write_bytes(model.SerializeToString())
    return path


# ---- what a graph claims ----


def calls_twice(depth: int, name: str = "f") -> Callable[[ModelProto], None]:
    """Functions that each call the next one twice: 2^depth nodes."""

    def change(model: ModelProto) -> None:
        for index in range(depth):
            inner = ("Neg", "") if index == depth - 1 else (f"{name}{index + 1}", "mine")
            nodes = [
                helper.make_node(inner[0], ["a"], ["b"], domain=inner[1]),
                helper.make_node(inner[0], ["b"], ["c"], domain=inner[1]),
            ]
            imports = [helper.make_opsetid("", 21), helper.make_opsetid("mine", 1)]
            model.functions.append(
                helper.make_function("mine", f"{name}{index}", ["a"], ["c"], nodes, imports)
            )
        call(model, f"{name}0")

    return change


def call(model: ModelProto, function: str) -> None:
    """Between the last node and the output."""
    model.graph.node[-1].output[0] = "before"
    model.graph.node.append(helper.make_node(function, ["before"], ["y"], domain="mine"))
    model.opset_import.append(helper.make_opsetid("mine", 1))


def calls_itself(model: ModelProto) -> None:
    nodes = [helper.make_node("f", ["a"], ["b"], domain="mine")]
    imports = [helper.make_opsetid("mine", 1)]
    model.functions.append(helper.make_function("mine", "f", ["a"], ["b"], nodes, imports))
    call(model, "f")


def calls_in_a_circle(model: ModelProto) -> None:
    for index in range(3):
        nodes = [helper.make_node(f"f{(index + 1) % 3}", ["a"], ["b"], domain="mine")]
        imports = [helper.make_opsetid("mine", 1)]
        model.functions.append(
            helper.make_function("mine", f"f{index}", ["a"], ["b"], nodes, imports)
        )
    call(model, "f0")


def calls_in_a_long_chain(model: ModelProto) -> None:
    for index in range(5000):
        inner, domain = ("Neg", "") if index == 4999 else (f"f{index + 1}", "mine")
        nodes = [helper.make_node(inner, ["a"], ["b"], domain=domain)]
        imports = [helper.make_opsetid("", 21), helper.make_opsetid("mine", 1)]
        model.functions.append(
            helper.make_function("mine", f"f{index}", ["a"], ["b"], nodes, imports)
        )
    call(model, "f0")


def function_twice(model: ModelProto) -> None:
    calls_twice(1)(model)
    model.functions.append(model.functions[0])


def long_name(model: ModelProto) -> None:
    edit(model, BIAS).name = "n" * 1_000_000
    for node in model.graph.node:
        node.input[:] = ["n" * 1_000_000 if name == BIAS else name for name in node.input]


def long_operator(model: ModelProto) -> None:
    model.graph.node[0].op_type = "n" * 1_000_000


def long_label_of_a_dimension(model: ModelProto) -> None:
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_param = "n" * 1_000_000


def wild_type_of_a_tensor(model: ModelProto) -> None:
    edit(model, LEVELS).data_type = 2**31 - 1


def wild_type_of_an_input(model: ModelProto) -> None:
    model.graph.input[0].type.tensor_type.elem_type = 2**31 - 1


def wild_type_of_a_cast(model: ModelProto) -> None:
    model.graph.node[-1].output[0] = "before"
    model.graph.node.append(helper.make_node("Cast", ["before"], ["y"], to=2**31 - 1))


def undefined_type_of_a_constant(model: ModelProto) -> None:
    node = helper.make_node("Constant", [], ["k"])
    node.attribute.add(
        name="value", type=AttributeProto.TENSOR, t=TensorProto(dims=[2], raw_data=b"12")
    )
    model.graph.node.insert(0, node)


def deep_branches(model: ModelProto) -> None:
    """As deep as protobuf lets a message be."""
    inner = helper.make_graph(
        [helper.make_node("Neg", ["x"], ["b"])],
        "g",
        [],
        [helper.make_tensor_value_info("b", 1, None)],
    )
    for _ in range(30):
        node = (
            helper.make_node("If", ["t"], ["b"], then_branch=inner, else_branch=inner)
            if _ < 3
            else NodeProto()
        )
        if not node.op_type:
            node = NodeProto(op_type="If", input=["t"], output=["b"])
            node.attribute.add(name="then_branch", type=AttributeProto.GRAPH, g=inner)
        inner = helper.make_graph([node], "g", [], [helper.make_tensor_value_info("b", 1, None)])
    model.graph.initializer.append(numpy_helper.from_array(np.array(True), "t"))
    model.graph.node.extend(inner.node)


def terabytes_without_data(model: ModelProto) -> None:
    edit(model, BIAS).CopyFrom(
        TensorProto(name=BIAS, data_type=TensorProto.FLOAT, dims=[2**20, 2**22])
    )


def terabytes_of_a_constant(model: ModelProto) -> None:
    node = helper.make_node("Constant", [], ["k"])
    tensor = TensorProto(dims=[2**62, 4], data_type=TensorProto.INT8)
    node.attribute.add(name="value", type=AttributeProto.TENSOR, t=tensor)
    model.graph.node.insert(0, node)


def terabytes_of_an_input(model: ModelProto) -> None:
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 2**40


def many_dimensions(model: ModelProto) -> None:
    edit(model, BIAS).dims[:] = [1] * 100 + [16]


def sparse(model: ModelProto, dims: list[int], positions: list[int]) -> None:
    model.graph.initializer.remove(edit(model, LEVELS))
    values = TensorProto(
        name=LEVELS,
        data_type=TensorProto.INT8,
        dims=[len(positions)],
        raw_data=bytes(len(positions)),
    )
    model.graph.sparse_initializer.append(
        SparseTensorProto(
            values=values, indices=numpy_helper.from_array(np.array(positions, np.int64)), dims=dims
        )
    )


def sparse_of_terabytes(model: ModelProto) -> None:
    sparse(model, [2**20, 2**21], [0, 1])


def sparse_of_two_gigabytes(model: ModelProto) -> None:
    sparse(model, [2**10, 2**21], [0, 1])


def sparse_at_wild_positions(model: ModelProto) -> None:
    sparse(model, [16, 8], [-(2**63), 2**63 - 1])


def sparse_of_negative_dims(model: ModelProto) -> None:
    sparse(model, [-16, -8], [0, 1])


def sparse_without_dims(model: ModelProto) -> None:
    sparse(model, [], [0, 1])


def same_name_twice(model: ModelProto) -> None:
    model.graph.initializer.append(edit(model, BIAS))


def same_value_twice(model: ModelProto) -> None:
    model.graph.node.append(model.graph.node[0])


def circle(model: ModelProto) -> None:
    model.graph.node[0].input[0] = model.graph.node[-1].output[0]


def no_nodes(model: ModelProto) -> None:
    del model.graph.node[:]


def no_inputs_of_nodes(model: ModelProto) -> None:
    for node in model.graph.node:
        del node.input[:]


def no_outputs_of_nodes(model: ModelProto) -> None:
    for node in model.graph.node:
        del node.output[:]


def no_names(model: ModelProto) -> None:
    for node in model.graph.node:
        node.input[:] = [""] * len(node.input)
        node.output[:] = [""] * len(node.output)


def no_attributes(model: ModelProto) -> None:
    model.graph.node.append(helper.make_node("Constant", [], ["k"]))
    model.graph.node.append(helper.make_node("Cast", ["k"], ["l"]))


def attribute_of_another_type(model: ModelProto) -> None:
    node = next(node for node in model.graph.node if node.op_type == "Gemm")
    node.attribute[0].CopyFrom(helper.make_attribute("transB", "yes"))


def wild_opset(model: ModelProto) -> None:
    model.opset_import[0].version = 2**62


def negative_opset(model: ModelProto) -> None:
    model.opset_import[0].version = -5


def opset_beyond_an_int(model: ModelProto) -> None:
    model.opset_import[0].version = 2**31


def unknown_type_of_an_inner_value(model: ModelProto) -> None:
    model.graph.value_info.add(name="h0").type.tensor_type.elem_type = 32767
    last = np.ones(5, np.float32)
    for name in ("scale", "shift", "mean", "variance"):
        model.graph.initializer.append(numpy_helper.from_array(last, name))
    model.graph.node[-1].output[0] = "before"
    names = ["before", "scale", "shift", "mean", "variance"]
    model.graph.node.append(helper.make_node("BatchNormalization", names, ["y"]))


def zero_points_for_no_scales(model: ModelProto) -> None:
    model.graph.initializer.append(numpy_helper.from_array(np.zeros((16, 8), np.int8), "zeros"))
    next(node for node in model.graph.node if node.op_type == "DequantizeLinear").input.append(
        "zeros"
    )


def bounds_that_are_empty(model: ModelProto) -> None:
    """Of a Clip between QuantizeLinear and DequantizeLinear."""
    node = next(node for node in model.graph.node if node.op_type == "DequantizeLinear")
    values = {
        "floats": np.ones((16, 8), np.float32),
        "none": np.zeros(0, np.int8),
        "zero": np.int8(0),
    }
    for name, value in values.items():
        model.graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))
    model.graph.node.insert(0, helper.make_node("Clip", ["integers", "none", "none"], ["clipped"]))
    model.graph.node.insert(
        0, helper.make_node("QuantizeLinear", ["floats", STEP, "zero"], ["integers"])
    )
    node.input[0] = "clipped"


def undefined_input_in_an_old_opset(model: ModelProto) -> None:
    model.opset_import[0].version = 11
    model.graph.node.append(helper.make_node("Relu", ["nowhere"], ["unread"]))


def attribute_that_is_no_text(model: ModelProto) -> None:
    unknown_type_of_an_inner_value(model)
    del model.graph.value_info[:]
    model.graph.node[0].attribute.append(helper.make_attribute("note", b"\xff\xfe"))


def control_characters(model: ModelProto) -> None:
    name = "\x1b[31m\x07[/x]\r\n\u202e"
    edit(model, BIAS).name = name
    for node in model.graph.node:
        node.input[:] = [name if each == BIAS else each for each in node.input]
    model.graph.node[0].op_type = name
    model.producer_name = name


GRAPHS = {
    "functions that call twice, 14 deep": calls_twice(14),
    "functions that call twice, 60 deep": calls_twice(60),
    "a function that calls itself": calls_itself,
    "functions that call in a circle": calls_in_a_circle,
    "functions in a chain of 5000": calls_in_a_long_chain,
    "two functions of one name": function_twice,
    "a name of 1 MB": long_name,
    "an operator of 1 MB": long_operator,
    "a dimension's name of 1 MB": long_label_of_a_dimension,
    "a tensor of type 2^31-1": wild_type_of_a_tensor,
    "an input of type 2^31-1": wild_type_of_an_input,
    "a cast to type 2^31-1": wild_type_of_a_cast,
    "a constant of no type": undefined_type_of_a_constant,
    "branches 30 deep": deep_branches,
    "terabytes without data": terabytes_without_data,
    "terabytes of a constant": terabytes_of_a_constant,
    "terabytes of an input": terabytes_of_an_input,
    "a hundred dimensions": many_dimensions,
    "a sparse tensor of terabytes": sparse_of_terabytes,
    "a sparse tensor of 2 GB": sparse_of_two_gigabytes,
    "sparse positions far outside": sparse_at_wild_positions,
    "a sparse tensor of negative dims": sparse_of_negative_dims,
    "a sparse tensor without dims": sparse_without_dims,
    "two tensors of one name": same_name_twice,
    "two values of one name": same_value_twice,
    "a circle": circle,
    "no nodes": no_nodes,
    "nodes without inputs": no_inputs_of_nodes,
    "nodes without outputs": no_outputs_of_nodes,
    "empty names": no_names,
    "operators without their attributes": no_attributes,
    "an attribute of another type": attribute_of_another_type,
    "opset 2^62": wild_opset,
    "a negative opset": negative_opset,
    "opset 2^31": opset_beyond_an_int,
    "a value of type 32767": unknown_type_of_an_inner_value,
    "more zero points than scales": zero_points_for_no_scales,
    "empty bounds": bounds_that_are_empty,
    "an undefined input and an old opset": undefined_input_in_an_old_opset,
    "an attribute that is no text": attribute_that_is_no_text,
    "control characters in names": control_characters,
}


@pytest.mark.parametrize("name", GRAPHS)
def test_a_graph_that_claims_too_much_ends_in_words(name, tmp_path):
    model = foreign()
    GRAPHS[name](model)
    end_in_words(saved(model, tmp_path))


OF_OURS = [
    "a name of 1 MB",
    "two tensors of one name",
    "empty names",
    "nodes without outputs",
    "a circle",
]


@pytest.mark.parametrize("name", OF_OURS)
def test_so_does_one_of_ours(name, tmp_path):
    model = ours(tmp_path)
    for tensor in model.graph.initializer:
        if list(tensor.dims) == [16]:
            old, tensor.name = tensor.name, BIAS
            for node in model.graph.node:
                node.input[:] = [BIAS if each == old else each for each in node.input]
    GRAPHS[name](model)
    end_in_words(saved(model, tmp_path))


def test_text_that_is_no_utf8_is_refused(tmp_path):
    model = foreign()
    edit(model, BIAS).name = "QQQQ"
    content = model.SerializeToString()
    for wrong in (b"\xff\xfe\xff\xfe", b"\xed\xa0\x80Q", b"\xc0\x80QQ"):
        path = tmp_path / "hostile.onnx"
        path.write_bytes(content.replace(b"QQQQ", wrong))
        assert all("no text" in said for said in end_in_words(path))


# ---- external data ----


def external(model: ModelProto, **entries: str) -> None:
    tensor = edit(model, LEVELS)
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in {"location": "data.bin", "offset": "0", "length": "128", **entries}.items():
        tensor.external_data.add(key=key, value=value)


@pytest.mark.parametrize(
    "entries",
    [
        {"location": "a\0b"},
        {"location": "n" * 300},
        {"location": "n" * 100_000},
        {"location": "a/" * 3000 + "b"},
        {"location": "data.bin/inside"},
        {"location": "/dev/zero"},
        {"location": "C:\\data.bin"},
        {"location": "//server/share"},
        {"location": "~/.bashrc"},
        {"location": "../" * 40 + "etc/passwd"},
        {"location": "folder"},
        {"location": "pipe"},
        {"location": "link"},
        {"location": "loop"},
        {"offset": "9" * 5000},
        {"length": "9" * 5000},
        {"length": "-128"},
        {"offset": "\u0663"},
    ],
    ids=lambda entries: f"{next(iter(entries))} {next(iter(entries.values()))[:12]!r}",
)
def test_external_data_that_are_not_there_end_in_words(entries, tmp_path):
    model = foreign()
    external(model, **entries)
    (tmp_path / "data.bin").write_bytes(bytes(100))
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("/etc/passwd")
    (tmp_path / "loop").symlink_to("loop")
    said = end_in_words(saved(model, tmp_path))
    assert all(
        LEVELS in sentence or "name of" in sentence or "external" in sentence for sentence in said
    ), said


@pytest.mark.parametrize("kind", [0, 99, 2**31 - 1, TensorProto.STRING])
def test_external_data_of_no_type_end_in_words(kind, tmp_path):
    model = foreign()
    external(model)
    edit(model, LEVELS).data_type = kind
    (tmp_path / "data.bin").write_bytes(bytes(128))
    end_in_words(saved(model, tmp_path))


def test_external_data_without_a_length_are_as_long_as_their_shape_says(tmp_path):
    model = foreign()
    external(model)
    del edit(model, LEVELS).external_data[2]
    (tmp_path / "data.bin").write_bytes(bytes(1000))
    assert json.loads(end_in_words(saved(model, tmp_path))[1])["ok"]
    assert len(edit(read_onnx(tmp_path / "hostile.onnx").with_data(), LEVELS).raw_data) == 128


# ---- metadata ----


def deflated(content: bytes, dictionary: bytes = DICTIONARY) -> str:
    packer = zlib.compressobj(9, wbits=-15, zdict=dictionary)
    return base64.b85encode(packer.compress(content) + packer.flush()).decode()


TEXTS = {
    "64 MB of zeros": deflated(b'{"format":5,"tensors":[' + b"0," * (1 << 25) + b"0]}"),
    "a list of tensors of 64 MB": json.dumps(
        {"format": 4, "tensors": deflated(b"[" + b"[]," * (1 << 24) + b"[]]", b"")}
    ),
    "brackets 900 deep": deflated(
        b'{"format":5,"tensors":[],"recipe":{"a":' + b"[" * 900 + b"]" * 900 + b"}}"
    ),
    "brackets 100,000 deep": deflated(b"[" * 100_000),
    "half a character": deflated(b'{"format":5,"tensors":[],"labels":["\\ud800"]}'),
    "half a character as a key": deflated(b'{"format":5,"tensors":[],"recipe":{"\\udfff":1}}'),
    "labels that are a number": deflated(b'{"format":5,"tensors":[],"labels":7}'),
    "labels that are lists": deflated(b'{"format":5,"tensors":[],"labels":[[],{}]}'),
    "a recipe that is a list": deflated(b'{"format":5,"tensors":[],"recipe":[1]}'),
    "a preprocessing that is a number": deflated(b'{"format":5,"tensors":[],"preprocessing":1}'),
    "activations that are a number": deflated(b'{"format":5,"tensors":[],"activations":1e999}'),
    "floats that are a list": deflated(b'{"format":5,"tensors":[],"floats":[]}'),
    "a number of 5000 digits": deflated(
        b'{"format":5,"tensors":[],"recipe":{"a":' + b"9" * 5000 + b"}}"
    ),
    "a format that is a list": deflated(b'{"format":[5],"tensors":[]}'),
    "a stream that never ends": deflated(b'{"format":5,"tensors":[]}')[:-5],
    "bytes behind the stream": deflated(b'{"format":5,"tensors":[]}') + "00000",
    "no base 85": "\x00\x7f\u00e9" * 50,
    "text that begins like JSON": "{" * 70_000,
}


@pytest.mark.parametrize("name", TEXTS)
def test_metadata_beyond_the_limits_are_refused_in_words(name, tmp_path):
    model = foreign()
    model.metadata_props.add(key=METADATA_KEY, value=TEXTS[name])
    said = end_in_words(saved(model, tmp_path))
    assert all("metadata" in sentence for sentence in said), said


@pytest.mark.parametrize(
    "record",
    [
        ["n" * 1_000_000, 1, "w"],
        ["w", -1, "w"],
        ["w", 2**70, "w"],
        ["w", True, "w"],
        ["w", 1, "no such value"],
        ["w", 1, "w", "w", 1, "sparse", ["a"] * 1000],
        ["w", 1, "w", "w", 9],
        ["w", 1, "w", 0, 0, "no such storage"],
        ["w"],
        [],
        {},
        7,
        ["w", 1, "x", "x", 2],
        ["w", 1, "y", "x", 0],
    ],
    ids=lambda record: str(record)[:40],
)
def test_records_of_weights_that_are_not_there_end_in_words(record, tmp_path):
    model = ours(tmp_path)
    entry = next(entry for entry in model.metadata_props if entry.key == METADATA_KEY)
    content = from_text(entry.value)
    entry.value = json.dumps({**content, "tensors": [record, *content["tensors"]]})
    end_in_words(saved(model, tmp_path))


@pytest.mark.parametrize("samples", [2**31 - 1, 2**62, 0, -1, True, "9", [1]])
def test_a_preprocessing_of_too_many_samples_is_refused(samples, tmp_path):
    settings = {"version": 1, "kind": "waveform", "samples": samples}
    with pytest.raises(FileError, match="samples"):
        Preprocessing.from_json(json.dumps(settings))
    model = foreign()
    content = {"format": 5, "tensors": [], "preprocessing": settings}
    model.metadata_props.add(key=METADATA_KEY, value=json.dumps(content))
    (said,) = end_in_words(saved(model, tmp_path), "deploy")
    assert "samples" in said


def test_what_a_preprocessing_makes_in_memory_is_bounded():
    with pytest.raises(OptionError, match="image_shape"):
        Preprocessing("image", image_shape=(16_384, 16_384, 3))
    with pytest.raises(FileError, match="mean"):
        Preprocessing.from_json(json.dumps({"version": 1, "kind": "array", "mean": [0] * 20_000}))
