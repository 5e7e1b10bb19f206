"""Levels -> initializers -> levels, and the exact bytes in between."""

from __future__ import annotations

from dataclasses import replace

import hypothesis.extra.numpy as arrays
import numpy as np
import pytest
from ecqx_onnx_converters.storage import Contents, Stored
from ecqx_onnx_converters.storage.dense import pack_bits
from ecqx_onnx_converters.storage.registry import STORAGES
from ecqx_onnx_converters.targets import TARGETS
from hypothesis import given
from hypothesis import strategies as st
from onnx import ModelProto, SparseTensorProto, TensorProto, numpy_helper

from ecqx_onnx.errors import FileError

TARGET = TARGETS["onnxruntime"]
LEVELS = st.sampled_from([(-2, 1), (0, 3), (-8, 7), (0, 15), (-128, 127), (0, 0)]).flatmap(
    lambda bounds: arrays.arrays(
        np.int8,
        arrays.array_shapes(min_dims=1, max_dims=4, min_side=0),
        elements=st.integers(*bounds),
    )
)


def contents(stored: Stored) -> Contents:
    model = ModelProto()
    model.graph.initializer.extend(stored.initializers)
    model.graph.sparse_initializer.extend(stored.sparse_initializers)
    model.graph.node.extend(stored.nodes)
    return Contents.of(model)


@pytest.mark.parametrize("storage", ["dense", "sparse"])
@given(levels=LEVELS)
def test_levels_come_back_as_they_went_in(storage, levels):
    stored = STORAGES[storage].encode(levels, "q", TARGET)
    assert isinstance(stored, Stored)
    assert stored.nbytes == STORAGES[storage].stored_bytes("q", contents(stored))
    decoded = STORAGES[storage].decode("q", contents(stored))
    assert decoded.dtype == np.int8
    np.testing.assert_array_equal(decoded, levels)


@given(levels=LEVELS)
def test_onnx_reads_dense_levels_as_we_do(levels):
    stored = STORAGES["dense"].encode(levels, "q", replace(TARGET, decoders=False))  # no digits
    np.testing.assert_array_equal(
        numpy_helper.to_array(stored.initializers[0]).astype(np.int8), levels
    )


@pytest.mark.parametrize(
    ("levels", "kind", "raw"),
    [
        ([1, -2, 0, 1, -1], TensorProto.INT2, "4903"),  # 01 | 10 << 2 | 00 << 4 | 01 << 6; 11
        ([3, 0, 2, 1], TensorProto.UINT2, "63"),
        ([1, -8, 7], TensorProto.INT4, "8107"),
        ([15, 0, 4], TensorProto.UINT4, "0f04"),
        ([1, -128, 127], TensorProto.INT8, "01807f"),
    ],
)
def test_dense_bytes_are_those_of_the_specification(levels, kind, raw):
    tensor = STORAGES["dense"].encode(np.array(levels, np.int8), "q", TARGET).initializers[0]
    assert tensor.data_type == kind
    assert tensor.raw_data.hex() == raw


def test_sparse_bytes_are_levels_and_positions():
    levels = np.zeros((3, 100), np.int8)
    levels[0, 2], levels[2, 1] = -3, 5
    sparse = STORAGES["sparse"].encode(levels, "q", TARGET).sparse_initializers[0]
    assert sparse.values.raw_data.hex() == "fd05"
    assert np.frombuffer(sparse.indices.raw_data, "<i8").tolist() == [2, 201]
    assert list(sparse.dims) == [3, 100]


def test_a_transposed_view_is_stored_row_major():
    levels = np.arange(6, dtype=np.int8).reshape(2, 3).T
    assert pack_bits(levels, 8) == bytes([0, 3, 1, 4, 2, 5])


def test_older_runtimes_get_bytes():
    stored = STORAGES["dense"].encode(np.array([1, -1], np.int8), "q", TARGETS["onnxruntime-1.17"])
    assert stored.initializers[0].data_type == TensorProto.INT8


def lying(**changes) -> ModelProto:
    model = ModelProto()
    declared = {
        "name": "q",
        "data_type": TensorProto.INT4,
        "dims": [2, 3],
        "raw_data": b"123",
    } | changes
    model.graph.initializer.append(TensorProto(**declared))
    return model


@pytest.mark.parametrize(
    "changes",
    [
        {"dims": [2, 30]},
        {"dims": [-2, -3]},
        {"dims": [1 << 40]},
        {"dims": [1 << 62, 1 << 62]},
        {"data_type": TensorProto.FLOAT},
        {"data_type": 99},
        {"raw_data": b""},
    ],
)
def test_lying_dense_tensors_are_refused(changes):
    with pytest.raises(FileError, match="damaged"):
        STORAGES["dense"].decode("q", Contents.of(lying(**changes)))


@pytest.mark.parametrize(
    ("positions", "dims"),
    [
        ([0, 6], [6]),
        ([-1, 2], [6]),
        ([3, 2], [6]),
        ([2, 2], [6]),
        ([1], [6]),
        ([0, 1], [1 << 60]),
        ([0, 1], [-6]),
    ],
)
def test_lying_sparse_tensors_are_refused(positions, dims):
    sparse = SparseTensorProto(dims=dims)
    sparse.values.name, sparse.values.raw_data = "q", b"\x01\x02"
    sparse.indices.raw_data = np.array(positions, "<i8").tobytes()
    model = ModelProto()
    model.graph.sparse_initializer.append(sparse)
    with pytest.raises(FileError, match="damaged"):
        STORAGES["sparse"].decode("q", Contents.of(model))
