"""The packed codec: every tensor comes back exactly, by numpy and by onnxruntime, and damage is told."""

import dataclasses
import zlib
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from ecqx_onnx_converters.storage import packed as packed_codec
from ecqx_onnx_converters.storage.packed import Packed, functions, nodes, pack, unpack
from ecqx_onnx_converters.storage.packed.model import LOG_SIZE, SLOTS, quantise_frequencies, slot_tables
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper

from ecqx_onnx.errors import FileError


def levels(shape, *, zeros=0.6, top=7, seed=0, signed=True):
    generator = np.random.default_rng(seed)
    magnitude = np.minimum(generator.geometric(0.4, shape), top) * (generator.random(shape) >= zeros)
    return (magnitude * generator.choice([-1, 1], shape) if signed else magnitude).astype(np.int8)


def small_net(seed=0):
    return [levels(shape, seed=seed + i) for i, shape in enumerate([(8, 3, 3, 3), (16, 8, 3, 3), (16, 16, 3, 3), (10, 16)])]


def decoder_model(*groups: tuple[Packed, list[np.ndarray]]) -> onnx.ModelProto:
    made, initializers, outputs = [], [], []
    for g, (packed, tensors) in enumerate(groups):
        names = [f"w{g}_{i}" for i in range(len(tensors))]
        more = nodes(packed, names, prefix=f"p{g}")
        made += more[0]
        initializers += more[1]
        outputs += [helper.make_tensor_value_info(n, onnx.TensorProto.INT8, t.shape) for n, t in zip(names, tensors, strict=True)]
    graph = helper.make_graph(made, "g", [], outputs, initializers)
    imports = [helper.make_opsetid("", 18), helper.make_opsetid(packed_codec.DOMAIN, 1)]
    return helper.make_model(graph, functions=functions([packed for packed, _ in groups]), opset_imports=imports, ir_version=8)


def run(model: onnx.ModelProto, *, optimised: bool, keep=None):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    level = onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = level.ORT_ENABLE_BASIC if optimised else level.ORT_DISABLE_ALL
    if keep:
        options.optimized_model_filepath = str(keep)
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, {})


def assert_same(got, expected):
    assert len(got) == len(expected)
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == np.int8
        assert a.shape == b.shape
        assert np.array_equal(a, b)


shapes = st.lists(st.integers(0, 9), min_size=0, max_size=4).map(tuple)


@settings(deadline=None, max_examples=60)
@given(
    shapes=st.lists(shapes, min_size=0, max_size=4), zeros=st.floats(0, 1), top=st.integers(1, 127), seed=st.integers(0, 99),
    contexts=st.sampled_from([1, 2, 16]), width=st.integers(1, 3), lanes=st.sampled_from([None, 1, 7]), signed=st.booleans(),
)  # fmt: skip
def test_any_tensors_come_back_from_numpy(shapes, zeros, top, seed, contexts, width, lanes, signed):
    tensors = [levels(shape, zeros=zeros, top=top, seed=seed + i, signed=signed) for i, shape in enumerate(shapes)]
    assert_same(unpack(pack(tensors, contexts=contexts, width=width, lanes=lanes)), tensors)


CASES = {
    "a net": small_net(),
    "one weight": [np.array([3], np.int8)],
    "no dimension": [np.array(-5, np.int8)],
    "empty": [np.zeros((0, 3), np.int8), levels((4, 5))],
    "all zero": [np.zeros((6, 5, 3, 3), np.int8)],
    "every int8": [np.arange(-128, 128).astype(np.int8).reshape(16, 16), levels((3, 2, 5, 5))],
    "unsigned": [levels((12, 7), signed=False, top=15)],
    "depthwise": [levels((24, 1, 3, 3))],
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("contexts", [1, 16])
@pytest.mark.parametrize("optimised", [False, True])
def test_onnxruntime_decodes_what_numpy_decodes(name, contexts, optimised):
    packed = pack(CASES[name], contexts=contexts)
    assert_same(unpack(packed), CASES[name])
    assert_same(run(decoder_model((packed, CASES[name])), optimised=optimised), CASES[name])


def test_wide_symbols_and_several_groups_share_one_file():
    first, second = small_net(), [levels((33, 40), top=1, seed=5)]
    model = decoder_model((pack(first), first), (pack(second, contexts=1, width=4), second))
    onnx.checker.check_model(model, full_check=True)
    assert_same(run(model, optimised=True), first + second)


def test_no_decoder_node_is_left_after_loading(tmp_path):
    tensors = small_net()
    run(decoder_model((pack(tensors), tensors)), optimised=True, keep=tmp_path / "folded.onnx")
    assert not onnx.load(tmp_path / "folded.onnx").graph.node


def test_only_operators_of_opset_18_without_control_flow_are_used():
    tensors = small_net()
    used = {node.op_type for f in decoder_model((pack(tensors), tensors)).functions for node in f.node if not node.domain}
    assert not used & {"Loop", "Scan", "If", "NonZero", "Compress", "DequantizeLinear"}
    assert all(onnx.defs.get_schema(op, 18, "").since_version <= 18 for op in used)


def test_the_same_levels_give_the_same_bytes():
    one, two = pack(small_net()), pack(small_net())
    assert one.payload.tobytes() == two.payload.tobytes()
    assert [f.SerializeToString(deterministic=True) for f in functions([one])] == [
        f.SerializeToString(deterministic=True) for f in functions([two])
    ]


@pytest.mark.parametrize("contexts", [1, 16])
def test_golden_bytes_stand(contexts):
    packed = pack([(np.arange(8 * 4 * 9) * 7919 % 29 % 5 - 2).astype(np.int8).reshape(8, 4, 3, 3)], contexts=contexts)
    arrays = (packed.payload, packed.states, packed.frequencies, packed.thresholds, packed.dictionary)
    written = " ".join(array.astype(array.dtype.newbyteorder("<")).tobytes().hex() or "-" for array in arrays)
    assert written == (Path(__file__).parent / "golden" / f"packed_{contexts}.hex").read_text().strip()


def test_contexts_are_used_only_where_they_pay_for_their_functions():
    assert packed_codec.pack_smallest(small_net()).contexts == 1


def test_contexts_and_raw_signs_keep_dense_columns_below_the_entropy():
    generator = np.random.default_rng(3)
    density = np.repeat([0.05, 0.9], 200)
    wavy = ((generator.random((300, 400)) < density) * generator.choice([-1, 1], (300, 400))).astype(np.int8)
    shares = np.bincount(wavy.reshape(-1) + 1) / wavy.size
    entropy = -(shares * np.log2(shares)).sum() * wavy.size / 8
    assert pack([wavy]).nbytes < 0.85 * entropy
    assert pack([wavy], contexts=1).nbytes < 1.02 * entropy


def test_frequencies_fill_the_slots_and_keep_rare_symbols():
    counts = np.array([[10**9, 1, 0, 3], [0, 0, 0, 0], [5, 0, 0, 0], [1, 1, 1, 1]])
    frequencies = quantise_frequencies(counts)
    assert (frequencies.sum(axis=1) == SLOTS).all()
    assert (frequencies[counts > 0] > 0).all()
    assert (frequencies < SLOTS).all()
    symbol, frequency, remainder = slot_tables(frequencies)
    assert (remainder < frequency).all()
    assert (remainder >= 0).all()
    assert symbol[0] == 0


def test_no_float_logarithm_can_build_another_table():
    exact = 8 * np.log2(np.arange(LOG_SIZE) + 8.0) - 24 + 1 / 1024
    distance = np.abs(exact - np.round(exact))
    assert distance.min() > 64 * 8 * np.finfo(np.float32).eps  # a float32 logarithm errs by a few units of 88


def test_damaged_payloads_never_crash():
    tensors = small_net()
    whole = pack(tensors)
    check = [zlib.crc32(t.tobytes()) for t in tensors]
    generator = np.random.default_rng(0)
    for trial in range(150):
        field = ["payload", "states", "frequencies", "thresholds", "dictionary"][trial % 5]
        array = getattr(whole, field).copy()
        if trial % 3 == 0:
            array = array[: generator.integers(0, len(array))]
        else:
            array.view(np.uint8).reshape(-1)[generator.integers(0, array.nbytes)] ^= 1 << generator.integers(0, 8)
        try:
            got = unpack(dataclasses.replace(whole, **{field: array}))
        except FileError:
            continue
        same = [zlib.crc32(t.tobytes()) for t in got] == check
        assert same == all(np.array_equal(a, b) for a, b in zip(got, tensors, strict=True))


def test_sizes_that_the_payload_does_not_back_are_refused():
    whole = pack(small_net())
    huge = dataclasses.replace(whole.views[0], shape=(1 << 20, 1 << 20), rows=1 << 20, columns=1 << 20)
    for lie in ({"views": (huge,)}, {"rounds": 1 << 40}, {"gain": 0}, {"frequencies": whole.frequencies + np.uint16(1)}):
        with pytest.raises(FileError, match="damaged"):
            unpack(dataclasses.replace(whole, **lie))
