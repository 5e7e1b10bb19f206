"""Our files read back, other people's and damaged ones handled."""

from __future__ import annotations

import base64
import json
import zlib

import numpy as np
import pytest
from ecqx_onnx_converters import FloatGraph, build, make_plan, match, read_weights
from ecqx_onnx_converters.serialization.metadata import (
    DICTIONARY,
    FORMAT,
    METADATA_KEY,
    from_text,
    to_text,
)
from ecqx_onnx_converters.serialization.reading import read_metadata
from onnx import ModelProto, TensorProto, helper, numpy_helper

from ecqx_onnx.errors import FileError
from tests.onnx_graphs import model_of, product, quantized
from tests.test_writer import GOLDEN, mixed_plan


def written(**options) -> ModelProto:
    return build(mixed_plan(**options)).to_model()


def test_packed_weights_of_the_format_before_are_read():
    """One stream, no contexts; metadata of format 3."""
    model = ModelProto.FromString((GOLDEN / "packed-format-1.onnx").read_bytes())
    assert read_metadata(model)["format"] == 3
    for entry, weight in zip(
        mixed_plan(storage="packed").entries, read_weights(model), strict=True
    ):
        assert weight.crc_ok
        np.testing.assert_array_equal(weight.weight.tensor.levels, entry.weight.tensor.levels)


def initializer(model: ModelProto, *, dequantized: int, position: int) -> TensorProto:
    """What the dequantisation of the n-th weight reads at an input: 0 are the levels, 1 the step or
    codebook."""
    name = model.graph.node[dequantized].input[position]
    return next(tensor for tensor in model.graph.initializer if tensor.name == name)


@pytest.mark.parametrize(
    "options", [{}, {"target": "qdq"}, {"target": "onnxruntime-1.17"}, {"dequantize": "standard"}]
)
def test_every_weight_comes_back_bit_for_bit(options):
    plan = mixed_plan(**options)
    stored = read_weights(build(plan).to_model())
    assert [weight.weight.name for weight in stored] == ["a", "b", "c"]
    for entry, weight in zip(plan.entries, stored, strict=True):
        assert weight.crc_ok
        assert (
            0 <= entry.stored.nbytes - weight.nbytes <= 4
        )  # names are shortened when the file is finished
        np.testing.assert_array_equal(weight.weight.tensor.levels, entry.weight.tensor.levels)
        np.testing.assert_array_equal(weight.weight.dequantize(), entry.weight.dequantize())


@pytest.mark.parametrize("step", [np.float32(0.1), np.linspace(0.1, 0.3, 8).reshape(1, 8)])
def test_an_embedding_of_gathered_integers_comes_back(step):
    table = quantized("w", (20, 8), step=step)
    node = helper.make_node("Gather", ["w", "x"], ["y"])
    inputs = {"x": (TensorProto.INT64, ["n"])}
    graph = FloatGraph.from_model(
        model_of([node], {"w": table.dequantize()}, inputs=inputs, output_shape=["n", 8])
    )
    (stored,) = read_weights(
        build(make_plan(graph, match(graph.weights, [table]), dequantize="standard")).to_model()
    )
    np.testing.assert_array_equal(stored.weight.dequantize(), table.dequantize())


def test_a_file_of_someone_else_has_no_weights_of_ours():
    assert read_weights(product("Gemm", quantized("w", (3, 4)), transB=1)) == ()


@pytest.mark.parametrize("index", [0, 1])
def test_a_flipped_bit_shows_in_the_checksum(index):
    model = written()
    tensor = initializer(model, dequantized=index, position=0)
    tensor.raw_data = bytes([tensor.raw_data[0] ^ 1]) + tensor.raw_data[1:]
    assert [weight.crc_ok for weight in read_weights(model)] == [
        place != index for place in range(3)
    ]


def with_record(place: int, value: object) -> ModelProto:
    """The mixed model with one field of its first tensor's record changed."""
    model = written()
    entry = next(entry for entry in model.metadata_props if entry.key == METADATA_KEY)
    content = from_text(entry.value)
    record = content["tensors"][0]
    record.extend([0] * (place + 1 - len(record)))
    record[place] = value
    entry.value = json.dumps(content)
    return model


NAME, CRC, VALUE, LEVELS, LAYOUT, STORAGE, SOURCES = range(7)


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (NAME, 5),
        (SOURCES, 5),
        (SOURCES, [5]),
        (LAYOUT, 3),
        (STORAGE, 5),
        (STORAGE, "zip"),
        (STORAGE, "sparse"),
        (CRC, "x"),
        (CRC, None),
        (LEVELS, "nothing"),
        (LEVELS, "x"),
        (LEVELS, ""),
        (LEVELS, []),
        (VALUE, "other"),
        (VALUE, "y"),
        (VALUE, None),
    ],
)
def test_a_record_that_lies_is_refused(place, value):
    with pytest.raises(FileError):
        read_weights(with_record(place, value))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "no base 85",
        "c",
        "[]",
        "null",
        "5",
        '{"format":3}',
        '{"format":5,"tensors":null}',
        '{"format":2,"tensors":[]}',
        '{"format":3,"tensors":[[]]}',
        '{"format":3,"tensors":[7]}',
        '{"format":3,"tensors":""}',
        '{"format":3,"tensors":"no base 85"}',
        '{"format":3,"tensors":"c"}',
        '{"format":3,"tensors":{}}',
        '{"format":3,"tensors":[["w",0,"b","a",0,0,0,0]]}',
        "[" * 100000,
    ],
)
def test_metadata_that_is_no_metadata_is_refused(text):
    model = written()
    next(entry for entry in model.metadata_props if entry.key == METADATA_KEY).value = text
    with pytest.raises(FileError):
        read_weights(model)


@pytest.mark.parametrize(
    ("index", "values"),
    [
        (1, np.ones((3, 5), np.float32)),
        (1, np.ones((2, 8, 8), np.float32)),
        (1, np.ones((1, 8), np.float64)),
        (0, np.ones((1,), np.float32)),  # a codebook shorter than its levels
    ],
)
def test_constants_that_do_not_fit_the_levels_are_refused(index, values):
    model = written()
    tensor = initializer(model, dequantized=index, position=1)
    tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    with pytest.raises(FileError):
        read_weights(model)


def test_a_file_that_a_simplifier_has_folded_is_recognised():
    model = written()
    model.graph.initializer.remove(initializer(model, dequantized=1, position=0))
    with pytest.raises(FileError, match="simplify it before"):
        read_weights(model)


def test_metadata_is_read_back():
    model = build(mixed_plan(), metadata={"labels": ["cat", "dog"]}).to_model()
    assert read_metadata(model)["labels"] == ["cat", "dog"]
    assert read_metadata(ModelProto()) == {}


CONTENT = {
    "format": FORMAT,
    "recipe": {"bits": 4, "ä": [1.5, None]},
    "tensors": [["layer.weight", 4000000000, "v"]],
}


def test_metadata_is_deflated_and_comes_back():
    assert from_text(to_text(CONTENT)) == CONTENT
    assert len(to_text(CONTENT)) < len(json.dumps(CONTENT))
    assert from_text(json.dumps(CONTENT)) == CONTENT


def test_metadata_of_the_format_before_is_read():
    """JSON as it is, or with its list of tensors alone deflated."""
    records = CONTENT["tensors"]
    text = base64.b85encode(zlib.compress(json.dumps(records).encode(), wbits=-15)).decode()
    for tensors in (records, text):
        assert from_text(json.dumps({"format": 4, "tensors": tensors})) == {
            "format": 4,
            "tensors": records,
        }


def test_the_dictionary_is_part_of_the_format():
    """Files are read with the one that they were written with: another one needs another format."""
    assert (FORMAT, zlib.crc32(DICTIONARY)) == (5, 1305473240)


@pytest.mark.parametrize(
    "inflated",
    [b"[" * 100000, b"5", b"[" + b" " * (1 << 27) + b"]"],
    ids=["deep", "number", "huge"],
)
@pytest.mark.parametrize("old", [False, True])
def test_deflated_text_that_is_none_is_refused(inflated, old):
    text = base64.b85encode(zlib.compress(inflated, 9, wbits=-15)).decode()
    model = written()
    entry = next(entry for entry in model.metadata_props if entry.key == METADATA_KEY)
    entry.value = json.dumps({"format": 4, "tensors": text}) if old else text
    with pytest.raises(FileError):
        read_weights(model)
