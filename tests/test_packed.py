"""The packed codec: every tensor comes back exactly, by numpy and by onnxruntime, and damage is
told."""

import dataclasses
import subprocess
import sys
from itertools import zip_longest
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from ecqx_onnx_converters.refusal import Refusal
from ecqx_onnx_converters.storage import DOMAIN, Contents
from ecqx_onnx_converters.storage import packed as packed_module
from ecqx_onnx_converters.storage.packed import (
    bitstream,
    choices,
    huffman,
    reference_decoder,
    stages,
    symbols,
)
from ecqx_onnx_converters.storage.packed import stream as stream_module
from ecqx_onnx_converters.storage.packed.alphabets import alphabet, corrections
from ecqx_onnx_converters.targets import find_target
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper
from onnx.reference import ReferenceEvaluator

from ecqx_onnx.errors import FileError

TARGET = find_target("onnxruntime")
LARGE = 1 << 20  # bytes


def levels(shape, *, zeros=0.6, top=7, seed=0, signed=True):
    generator = np.random.default_rng(seed)
    magnitude = np.minimum(generator.geometric(0.4, shape), top) * (
        generator.random(shape) >= zeros
    )
    return np.asarray(magnitude * generator.choice([-1, 1], shape) if signed else magnitude).astype(
        np.int8
    )


def small_net(seed=0):
    return [
        levels(shape, seed=seed + i)
        for i, shape in enumerate([(8, 3, 3, 3), (16, 8, 3, 3), (16, 16, 3, 3), (10, 16)])
    ]


def pack(tensors, orders=None, form=None):
    """As one stream.

    orders: see `stream.Part.permutation`; form: the context model, by default the one that takes
    fewest bytes.
    """
    top = stream_module.find_top(tensors)
    sequences = []
    for tensor, order in zip_longest(tensors, orders or []):
        order = order or tuple(range(tensor.ndim))
        pairs = symbols.walk_levels(tensor.transpose(order), top)
        encoded = symbols.add_contexts(pairs, top)
        sequences.append(stream_module.SymbolSequence(tensor.shape, order, encoded, top))
    tallies = [symbols.count_pairs_by_context(sequence.encoded, top) for sequence in sequences]
    alphabets = alphabet.choose_alphabets(tallies)
    models = [stream_module.ContextModel.PLAIN, stream_module.ContextModel.SIGNS]
    models = models[: len(alphabets)] if form is None else [form]
    codings = []
    for model in models:
        own = alphabets[model is stream_module.ContextModel.SIGNS]
        coding = stream_module.Coding.of(model, own, shortest=1)
        codings += choices.choose_min_codeword_length([coding])
    coding = min(codings, key=lambda coding: coding.nbytes)
    lane_bytes = huffman.DIGIT * choices.choose_calls(coding.nbytes, 1)
    return bitstream.write_stream(sequences, coding, lane_bytes, compact=False)


def decoder_model(tensors, opset=18):
    """A model without inputs whose outputs are the tensors, packed."""
    stored = packed_module.encode_all(
        [(f"w{i}", tensor) for i, tensor in enumerate(tensors)], TARGET
    )
    outputs = [
        helper.make_tensor_value_info(f"w{i}", onnx.TensorProto.INT8, t.shape)
        for i, t in enumerate(tensors)
    ]
    nodes, initializers = (
        [part for one in stored for part in getattr(one, kind)]
        for kind in ("nodes", "initializers")
    )
    graph = helper.make_graph(nodes, "g", [], outputs, initializers)
    imports = [helper.make_opsetid("", opset), helper.make_opsetid(DOMAIN, 1)]
    return helper.make_model(
        graph, functions=list(stored[0].functions), opset_imports=imports, ir_version=8
    )


def run(model, *, optimized=True, keep=None):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    level = onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = (
        level.ORT_ENABLE_BASIC if optimized else level.ORT_DISABLE_ALL
    )
    if keep:
        options.optimized_model_filepath = str(keep)
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return session.run(None, {})


def read(model, count):
    contents = Contents.of(model)
    return [packed_module.decode(f"w{i}", contents) for i in range(count)]


def assert_same(got, expected):
    assert len(got) == len(expected)
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == np.int8
        assert a.shape == b.shape
        assert np.array_equal(a, b)


shapes = st.lists(st.integers(1, 9), min_size=0, max_size=4).map(tuple)


@settings(deadline=None, max_examples=100)
@given(
    shapes=st.lists(shapes, min_size=1, max_size=4),
    zeros=st.floats(0, 1),
    top=st.integers(1, 127),
    seed=st.integers(0, 99),
    signed=st.booleans(),
    turned=st.booleans(),
    form=st.sampled_from([None, *stream_module.ContextModel]),
)
def test_any_tensors_come_back_from_numpy(shapes, zeros, top, seed, signed, turned, form):
    top = min(top, 37) if form is stream_module.ContextModel.SIGNS else top
    tensors = [
        levels(shape, zeros=zeros, top=top, seed=seed + i, signed=signed)
        for i, shape in enumerate(shapes)
    ]
    orders = [tuple(range(t.ndim))[::-1] for t in tensors] if turned else None
    assert_same(reference_decoder.unpack_stream(pack(tensors, orders, form)), tensors)


@settings(deadline=None, max_examples=50)
@given(
    size=st.integers(1, 2000),
    zeros=st.floats(0, 1),
    top=st.integers(1, 127),
    seed=st.integers(0, 99),
)
def test_pairs_and_their_contexts_are_those_of_a_slow_walk(size, zeros, top, seed):
    tensor = levels((size,), zeros=zeros, top=top, seed=seed)
    expected, context, cursor, columns = [], 0, size, 2 * top + 1
    for place in reversed(range(size)):
        while tensor[place] and cursor - place > 128:
            expected.append(context * 128 * columns + 127 * columns + top)
            context, cursor = 2, cursor - 128
        if tensor[place]:
            expected.append(
                context * 128 * columns + (cursor - place - 1) * columns + int(tensor[place]) + top
            )
            context, cursor = int(tensor[place] > 0), place
    said = symbols.add_contexts(symbols.walk_levels(tensor, top), top)
    assert said.tolist() == expected
    counts = np.bincount(
        [*expected, *(pair + 128 * columns for pair in expected[:1])], minlength=3 * 128 * columns
    )
    assert np.array_equal(symbols.count_pairs_by_context(said, top).reshape(-1), counts)


@pytest.mark.parametrize("form", stream_module.ContextModel)
def test_where_a_stream_has_lanes_enough_nothing_is_left_over_behind_it(form):
    """So that its last tensor's entries need not be cut off. Behind the last word are ones that end
    none."""
    for seed in range(20):
        sparse = np.sign(levels((120, 90 + seed), zeros=0.9, seed=seed))
        made = pack([levels((7, 5)), sparse], form=form)
        assert len(made.payload.T) > 20
        assert sum(part.entries for part in made.parts) == made.payload.size * made.slots
        assert_same(reference_decoder.unpack_stream(made), [levels((7, 5)), sparse])
    few = pack([levels((7, 5))], form=form)
    assert few.parts[0].entries < few.payload.size * few.slots


def test_74_levels_and_runs_of_zeros_have_three_contexts():
    sparse = np.zeros((75, 300), np.int8)
    sparse[np.arange(75), 7] = np.arange(-37, 38)
    assert_same(
        reference_decoder.unpack_stream(pack([sparse], form=stream_module.ContextModel.SIGNS)),
        [sparse],
    )


@pytest.mark.parametrize(
    "form", [stream_module.ContextModel.PLAIN, stream_module.ContextModel.SIGNS]
)
def test_a_stream_is_the_same_written_in_blocks(form, monkeypatch):
    tensors = [
        levels((50, 60), zeros=0.3),
        np.zeros((4, 5), np.int8),
        levels((700,), zeros=0.97, seed=1),
    ]
    whole = pack(tensors, form=form)
    assert len(whole.payload.T) > 9
    monkeypatch.setattr(bitstream, "BLOCK", 200)
    parts = pack(tensors, form=form)
    assert_same(reference_decoder.unpack_stream(parts), tensors)
    assert np.array_equal(parts.payload, whole.payload)
    assert parts.parts == whole.parts


@settings(deadline=None, max_examples=15)
@given(
    zeros=st.floats(0, 1),
    top=st.integers(1, 127),
    seed=st.integers(0, 99),
    shape=st.lists(st.integers(1, 20), max_size=3),
    compact=st.booleans(),
)
def test_any_tensor_comes_back_from_onnxruntime(zeros, top, seed, shape, compact):
    tensor = levels(tuple(shape), zeros=zeros, top=top, seed=seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(choices, "COMPACT_BELOW", LARGE if compact else 0)
        model = decoder_model([tensor])
    assert_same(run(model), [tensor])


def far_apart():
    """Distances beyond 128, to the first weight and to the last one."""
    sparse = np.zeros(5000, np.int8)
    sparse[[0, 1, 129, 130, 259, 1000, 1128, 4999]] = [1, -1, 2, -2, 3, -3, 1, 1]
    return sparse


def smooth(shape, seed=0):
    """Neighbours mostly of one sign, as in a filter of images."""
    signs = np.sign(
        np.convolve(
            np.random.default_rng(seed).normal(size=int(np.prod(shape))), np.ones(25), "same"
        )
    )
    return np.abs(levels(shape, zeros=0.5, top=5, seed=seed)) * signs.reshape(shape).astype(np.int8)


def uniform(shape, seed=1):
    """All of int8."""
    return np.random.default_rng(seed).integers(-128, 128, shape).astype(np.int8)


def gaussian(shape, seed=0):
    """Each row rounded so that its largest is 127 or -127, as most quantizers do."""
    rows = np.random.default_rng(seed).normal(size=shape)
    axes = tuple(range(1, len(shape)))
    return np.rint(rows / np.abs(rows).max(axis=axes, keepdims=True) * 127).astype(np.int8)


CASES = {
    "a net": small_net(),
    "one weight": [np.array([3], np.int8)],
    "no dimension": [np.array(-5, np.int8)],
    "all zero": [np.zeros((6, 5, 3, 3), np.int8)],
    "all zero beside another": [
        np.zeros((4, 5), np.int8),
        levels((4, 5)),
        np.zeros((4, 5), np.int8),
    ],
    "every level": [np.arange(-122, 123).astype(np.int8).reshape(35, 7), levels((3, 2, 5, 5))],
    "no zero": [levels((12, 70), zeros=0, top=1)],
    "unsigned": [levels((12, 7), signed=False, top=15)],
    "depthwise": [levels((24, 1, 3, 3))],
    "far apart": [far_apart(), far_apart()[::-1].copy()],
    "columns alike": [(levels((1, 60), zeros=0.5, top=1) * np.ones((80, 1))).astype(np.int8)],
    "signs alike": [smooth((150, 90)), smooth((120, 80), 1)],
    "two streams": [smooth((200, 150)), levels((100, 60), zeros=0.1, top=100)],
    "two streams, one without signs": [
        smooth((200, 150)),
        levels((150, 90), zeros=0.05, top=4),
        np.zeros((3, 4), np.int8),
    ],
    "many kinds": [np.random.default_rng(1).integers(-122, 123, (300, 100)).astype(np.int8)],
    "all of int8": [uniform((300, 100)), np.arange(-128, 128).astype(np.int8).reshape(16, 16)],
    "int8's ends": [np.array([[127, 0, -128, -127], [0, 0, 127, 0]], np.int8)],
    "maximum absolute": [gaussian((300, 100)), gaussian((64, 3, 3, 3), 1)],
    "all of int8, beside signs": [uniform((300, 100)), smooth((200, 150))],
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("optimized", [False, True])
@pytest.mark.parametrize("compact", [False, True])
def test_onnxruntime_decodes_what_numpy_decodes(name, optimized, compact, monkeypatch):
    monkeypatch.setattr(choices, "COMPACT_BELOW", LARGE if compact else 0)
    model = decoder_model(CASES[name])
    assert {len(node.input) for node in model.graph.node if node.op_type == "D"} <= (
        {10, 11} if compact else {11, 12}
    )
    onnx.checker.check_model(model, full_check=True)
    assert_same(read(model, len(CASES[name])), CASES[name])
    assert_same(run(model, optimized=optimized), CASES[name])


@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize(
    "name", ["a net", "one weight", "no dimension", "two streams, one without signs"]
)
def test_the_decoder_is_standard_onnx(name, compact, monkeypatch):
    """By onnx's own evaluator, which is stricter than onnxruntime."""
    monkeypatch.setattr(choices, "COMPACT_BELOW", LARGE if compact else 0)
    assert_same(ReferenceEvaluator(decoder_model(CASES[name])).run(None, {}), CASES[name])


def test_a_tensor_whose_columns_are_alike_is_coded_by_columns():
    nodes = decoder_model(CASES["columns alike"]).graph.node
    assert [node.op_type for node in nodes] == ["D", "Levels", "Transpose"]


def streams_of(name):
    return [
        (made.context_model, len(members))
        for members, made in packed_module.pack_all(CASES[name])[0]
    ]


def test_levels_whose_signs_repeat_are_coded_by_context_and_unlike_tensors_apart():
    signs, steady, plain = (
        stream_module.ContextModel.SIGNS,
        stream_module.ContextModel.STEADY,
        stream_module.ContextModel.PLAIN,
    )
    assert streams_of("signs alike") == [(signs, 2)]
    assert streams_of("two streams, one without signs") == [(signs, 2), (steady, 1)]
    assert streams_of("two streams") == [(signs, 1), (steady, 1)]
    assert streams_of("a net") == [(plain, 4)]
    assert (
        pack(CASES["signs alike"], form=signs).nbytes
        < 0.95 * pack(CASES["signs alike"], form=plain).nbytes
    )


@pytest.mark.parametrize("threshold", [0, choices.COMPACT_BELOW])
def test_no_decoder_node_is_left_after_loading(threshold, monkeypatch, tmp_path):
    monkeypatch.setattr(choices, "COMPACT_BELOW", threshold)
    run(decoder_model(small_net()), keep=tmp_path / "folded.onnx")
    assert not onnx.load(tmp_path / "folded.onnx").graph.node


def test_a_small_file_has_a_decoder_of_fewer_bytes_a_large_one_of_less_memory(monkeypatch):
    sizes, decoded = {}, {}
    for threshold in (0, choices.COMPACT_BELOW):
        monkeypatch.setattr(choices, "COMPACT_BELOW", threshold)
        model = decoder_model(small_net())
        sizes[threshold] = model.ByteSize()
        inferred = onnx.shape_inference.infer_shapes(model)
        decoded[threshold] = next(
            v.type.tensor_type.elem_type for v in inferred.graph.value_info if v.name.endswith("_e")
        )
    assert sizes[0] - sizes[choices.COMPACT_BELOW] > 100
    assert list(decoded.values()) == [onnx.TensorProto.UINT8, onnx.TensorProto.INT32]


@pytest.fixture
def staged(monkeypatch):
    """Files of any size are decoded in as many stages as there are, large tensors in slices."""
    monkeypatch.setattr(stages, "STAGED_FROM", 1)
    monkeypatch.setattr(stages, "STAGE_BYTES", 1)
    monkeypatch.setattr(stages, "SLICED_FROM", 1 << 10)
    monkeypatch.setattr(stages, "MOST_AT_ONCE", 1 << 10)


STAGED_NETS = {
    "a net": small_net(),
    "one tensor": [levels((301, 7, 3), zeros=0.3, seed=1)],
    "one row": [levels((1, 9000), zeros=0.3, seed=2)],
    "a large one": [levels((5, 4)), levels((400, 30), zeros=0.5, seed=3), levels((90,), seed=4)],
    "zeros": [np.zeros((200, 40), np.int8), levels((60, 50), seed=5)],
    "alike": [smooth((90, 90)), smooth((80, 80)), levels((70, 70), zeros=0.05, top=4)],
    "all of int8": [np.arange(-128, 128, dtype=np.int8).repeat(40).reshape(80, 128)],
}


@pytest.mark.parametrize("optimized", [False, True])
@pytest.mark.parametrize("name", STAGED_NETS)
def test_a_large_file_is_decoded_in_stages_and_folds_to_nothing_as_well(
    name, optimized, staged, tmp_path
):
    tensors = STAGED_NETS[name]
    model = decoder_model(tensors)
    onnx.checker.check_model(model, full_check=True)
    assert 1 <= [node.op_type for node in model.graph.node].count("Scan") < stages.MOST_STAGES
    assert_same(read(model, len(tensors)), tensors)
    assert_same(run(model, optimized=optimized, keep=tmp_path / "folded.onnx"), tensors)
    if optimized:
        assert not onnx.load(tmp_path / "folded.onnx").graph.node


def test_stages_are_for_large_files():
    assert "Scan" not in {node.op_type for node in decoder_model(small_net()).graph.node}
    assert "Scan" in {
        node.op_type for node in decoder_model([np.zeros(stages.STAGED_FROM, np.int8)]).graph.node
    }


@settings(deadline=None, max_examples=100)
@given(
    st.lists(
        st.tuples(st.integers(1, 3000), st.integers(1, 3000), st.sampled_from([0.0, 0.5, 1.0])),
        min_size=1,
        max_size=12,
    )
)
def test_stages_cover_every_weight_once(shapes):
    tensors = []
    for rows, columns, share in shapes:
        tensor = np.zeros((rows, columns), np.int8)
        tensor[: round(rows * share)] = 1
        tensors.append(tensor)
    pieces = stages.plan_stages(tensors)
    covered = [np.zeros(tensor.shape, np.int8) for tensor in tensors]
    for piece in pieces:
        stages.cut_piece(covered[piece.tensor], piece)[...] += 1
    assert all((cover == 1).all() for cover in covered)
    assert {piece.stage for piece in pieces} == set(range(1 + max(p.stage for p in pieces)))
    assert max(piece.stage for piece in pieces) < stages.MOST_STAGES
    order = [(piece.tensor, piece.begin) for piece in pieces]
    assert order == sorted(order)


def test_slices_that_do_not_fit_are_refused(staged):
    (tensor,) = STAGED_NETS["one tensor"]
    for change in ("shape", "axis", "nested"):
        model = decoder_model([tensor])
        join = next(node for node in model.graph.node if node.op_type == "Concat")
        if change == "shape":
            join.input[0], join.input[1] = join.input[1], "nothing"
        elif change == "axis":
            join.attribute[0].i = 7
        else:
            join.input[0] = join.output[0]
        with pytest.raises((FileError, KeyError)):
            read(model, 1)


@pytest.mark.slow
def test_a_tensor_of_more_than_2_to_the_31_unpacked_bits_comes_back():
    """2.4e9 bits as int8 and at the two ends of it: every index is below the number of weights, and
    int32 holds that."""
    size = 300_000_000
    tensor = np.zeros(size, np.int8)
    generator = np.random.default_rng(0)
    places = np.unique(
        np.concatenate([[0, 1, size - 2, size - 1], generator.integers(0, size, 300_000)])
    )
    tensor[places] = generator.choice([-3, -1, 1, 2], len(places))
    assert tensor.size * 8 > 2**31
    model = decoder_model([tensor])
    (found,) = read(model, 1)
    assert np.array_equal(found, tensor)
    del found
    (found,) = run(model)
    assert np.array_equal(found, tensor)


@pytest.mark.slow
@pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="peak memory is read from Linux's /proc"
)
def test_stages_need_less_memory_at_load(monkeypatch, tmp_path):
    """Peak of a fresh process, over its peak before: 20 layers of 0.2 M weights, each behind a Cast
    as `convert` puts it."""
    peaks = {}
    for name, threshold in (("one", 1 << 40), ("several", 1)):
        monkeypatch.setattr(stages, "STAGED_FROM", threshold)
        model = decoder_model([levels((200, 1000), zeros=0.8, seed=i) for i in range(40)])
        for i in range(40):
            model.graph.node.append(
                helper.make_node("Cast", [f"w{i}"], [f"f{i}"], to=onnx.TensorProto.FLOAT)
            )
            model.graph.node.append(helper.make_node("Neg", [f"f{i}"], [f"g{i}"]))
            model.graph.output[i].CopyFrom(
                helper.make_tensor_value_info(f"g{i}", onnx.TensorProto.FLOAT, (200, 1000))
            )
        onnx.save(model, tmp_path / "m.onnx")
        code = (
            "import onnxruntime as ort, sys; "
            "peak = lambda: int(next(l for l in open('/proc/self/status') if "
            "l.startswith('VmHWM')).split()[1]); "
            "before = peak(); o = ort.SessionOptions(); o.log_severity_level = 3; "
            "s = ort.InferenceSession(sys.argv[1], o, providers=['CPUExecutionProvider']); "
            "print(peak() - before)"
        )
        command = [sys.executable, "-c", code, str(tmp_path / "m.onnx")]
        peaks[name] = min(
            int(subprocess.run(command, capture_output=True, check=True).stdout) for _ in range(3)
        )
    assert peaks["several"] < 0.6 * peaks["one"], peaks


def test_only_operators_of_opset_18_without_control_flow_are_used():
    used = {
        node.op_type
        for f in decoder_model(small_net()).functions
        for node in f.node
        if not node.domain
    }
    assert not used & {"Loop", "Scan", "If", "NonZero", "Compress", "DequantizeLinear"}
    assert all(onnx.defs.get_schema(op, 18, "").since_version <= 18 for op in used)


@pytest.mark.parametrize("opset", [19, 21, 25])
def test_the_decoder_runs_at_later_opsets(opset):
    model = decoder_model(small_net(), opset)
    for function in model.functions:
        function.opset_import[0].version = opset
    assert_same(run(model), small_net())


def test_the_same_levels_give_the_same_bytes():
    one, two = (decoder_model(small_net()).SerializeToString(deterministic=True) for _ in range(2))
    assert one == two


@pytest.mark.parametrize(
    ("name", "count", "slots", "form"),
    [
        ("2", 40, 2, stream_module.ContextModel.PLAIN),
        ("4", 5, 4, stream_module.ContextModel.PLAIN),
        ("8", 1, 8, stream_module.ContextModel.PLAIN),
        ("signs", 10, 8, stream_module.ContextModel.SIGNS),
    ],
)
def test_golden_bytes_stand(name, count, slots, form):
    """Shortest words of 4, 2 and 1 bits; three contexts."""
    tensor = (
        (np.arange(8 * 4 * 9) * 7919 % 97 % (count + 1) - count // 3)
        .astype(np.int8)
        .reshape(8, 4, 3, 3)
    )
    made = pack([tensor], form=form)
    assert made.slots == slots
    arrays = (made.payload, made.bits, made.advances, made.values)
    written = " ".join(array.tobytes().hex() for array in arrays) + f" {made.parts[0].entries}"
    assert written == (Path(__file__).parent / "golden" / f"packed_{name}.hex").read_text().strip()


def test_golden_bytes_of_corrections_stand():
    """All of int8, the highest and the lowest once, the others up to four times."""
    values = np.arange(-128, 128)
    tensor = np.repeat(values, 1 + (128 - np.abs(values)) // 40).astype(np.int8)[None]
    made = pack([tensor])
    assert made.has_corrections
    assert_same(reference_decoder.unpack_stream(made), [tensor])
    arrays = (made.payload, made.bits, made.advances, made.values)
    written = " ".join(array.tobytes().hex() for array in arrays) + f" {made.parts[0].entries}"
    golden = Path(__file__).parent / "golden" / "packed_corrections.hex"
    assert written == golden.read_text().strip()


def test_a_stream_written_by_hand_is_read():
    """Words 0: one down, value 1; 10: two down, value -1; 11: four zeros. From the last level on: 1
    0 -1 0 0 0 0 1 0."""
    tree_bits = np.array([1, 0, 1, 1] + [1] * 4)
    payload = np.packbits([0, 1, 0, 1, 1, 0, 1, 1])[
        None
    ]  # and one more run that no tensor has a share in
    stream = reference_decoder.decode(payload, tree_bits, 8, None)
    assert stream.tolist() == [1, 0, 2, 0, 3, 1, 0, 3]
    found = reference_decoder.place_levels(
        stream[:6], np.array([0, -1, -2, -4], np.int8), np.array([0, 1, -1, 0], np.int8), 9
    )
    assert found.tolist() == [0, 1, 0, 0, 0, 0, -1, 0, 1]


def test_a_stream_of_three_contexts_written_by_hand_is_read():
    """0 says one down, 1, and 1 one down, -1, behind a positive level. Behind a negative one 0 says
    a zero, and 1 one down, 2; behind a zero 0 says one down, -1, and 1 two down, 1."""
    tree_bits = np.array(
        [0, 0, 0, 0, *[1] * 6, *[1] * 6]
    )  # the root, its two children, two of the first, six leaves
    values = np.array(
        [0, 0, 2, -1, 1, 1, -1] + [0] * 6, np.int8
    )  # behind negative, zero, positive; what fills up the tree
    assert reference_decoder.find_next_nodes(values).tolist() == [3, 3, 4, 2, 4, 4, 2] + [3] * 6
    payload = np.packbits(
        [[0, 1, 0, 1, 1, 0, 0, 1], [1, 0, 1, 1, 1, 1, 1, 1]], axis=1
    ).T  # each lane: the context, then words
    stream = reference_decoder.decode(
        payload, tree_bits, 8, reference_decoder.find_next_nodes(values)
    )
    assert stream.tolist() == [0, 0, 5, 6, 2, 5, 5, 6, 0, 1, 4, 6, 2, 6, 2, 6]
    with pytest.raises(FileError, match="contexts"):
        reference_decoder.decode(
            payload, tree_bits, 8, reference_decoder.find_next_nodes(values[:-1])
        )
    with pytest.raises(FileError, match="contexts"):
        reference_decoder.decode(
            payload,
            np.array([1, 0, 1, 1] + [1] * 4),
            8,
            reference_decoder.find_next_nodes(np.ones(8, np.int8)),
        )


@pytest.mark.parametrize("version", [2, 3, 4])
def test_files_of_all_formats_are_read_and_the_last_is_written(version):
    """2: two contexts, and payloads whose lanes are rows. 3: bits of the tree in the order of
    bytes. 4: compact."""
    tensors = [smooth((90, 90)), levels((100, 90), zeros=0.05, top=4)]
    model = onnx.load(Path(__file__).parent / "golden" / f"packed-format-{version}.onnx")
    assert_same(read(model, 2), tensors)
    assert_same(run(model), tensors)
    assert (list(decoder_model(tensors).functions) == list(model.functions)) == (version == 4)


def test_files_that_were_decoded_in_two_stages_are_read_as_ever():
    """Their floats waited for the levels, and all levels were decoded at once."""
    tensors = [smooth((90, 90)), levels((100, 90), zeros=0.05, top=4)]
    model = onnx.load(Path(__file__).parent / "golden" / "packed-two-stages.onnx")
    assert [node.op_type for node in model.graph.node].count("Scan") == 1
    assert_same(read(model, 2), tensors)
    assert_same(run(model), tensors)


def test_the_tree_lies_bit_by_bit():
    bits = np.array([1, 0, 1, 1, 0, 0, 0, 1, 1, 1, 0, 1, 1, 1, 1, 1])
    packed = bitstream.pack_tree(bits)
    assert [format(byte, "08b") for byte in packed] == [
        "11001011",
        "01011111",
    ]  # what is at even places, and at odd ones
    assert reference_decoder.unpack_tree(packed).tolist() == bits.tolist()


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(1, 10**6), min_size=1, max_size=255), st.sampled_from([1, 2, 4]))
def test_the_tree_is_a_shortest_prefix_code_with_no_word_too_short(counts, shortest):
    code = huffman.build_code(
        [
            (
                np.arange(len(counts)),
                huffman.compute_codeword_lengths(np.array(counts), shortest, alone=True),
            )
        ]
    )
    assert code.lengths.min() >= shortest
    assert sum(2.0**-length for length in code.lengths) == 1
    words = [
        format(word, f"0{length}b") for word, length in zip(code.codes, code.lengths, strict=True)
    ]
    assert not any(one != two and two.startswith(one) for one in words for two in words)
    if len(counts) > 2**shortest:
        total = sum(counts)
        entropy = -sum(count * np.log2(count / total) for count in counts)
        bits = sum(
            counts[symbol] * length
            for symbol, length in zip(code.symbol_ids, code.lengths, strict=True)
            if symbol >= 0
        )
        assert bits < entropy + total + shortest * total * (max(counts) > total / 2**shortest)


@pytest.mark.parametrize(
    "form", [stream_module.ContextModel.STEADY, stream_module.ContextModel.SIGNS]
)
def test_each_context_has_a_prefix_code_of_its_own_below_the_path_to_it(form):
    none = (np.zeros(0, np.int64), np.zeros(0, np.int64))
    parts = [
        none,
        (np.array([3, 4, 5]), np.array([5, 9, 1])),
        (np.array([0, 1]), np.array([4, 4])),
    ][-len(form.value) :]
    paths = [path for _, path in form.value]
    made = [
        (own, huffman.compute_codeword_lengths(counts, 2, alone=False)) for own, counts in parts
    ]
    code = huffman.build_code(made, [len(path) for path in paths])
    words = [
        paths[t] + format(c, f"0{n}b")
        for t, c, n in zip(code.trees, code.codes, code.lengths, strict=True)
    ]
    assert words == leaves_of(code.bits)
    for place, (ids, _) in enumerate(parts):
        own = code.trees == place
        assert code.lengths[own].min() >= (2 if len(ids) else 1)
        assert sum(2.0**-length for length in code.lengths[own]) == 1
        fillers = max(0, (4 if len(ids) else 2) - len(ids))
        assert sorted(code.symbol_ids[own].tolist()) == [-1] * fillers + ids.tolist()


def leaves_of(bits):
    """The words of a tree, in the order of its leaves."""
    nodes, words, place = [""], [], 0
    while place < len(nodes):
        for child in "01":
            (words if bits[2 * place + int(child)] else nodes).append(nodes[place] + child)
        place += 1
    return words


def entropy(tensor):
    shares = np.unique(tensor, return_counts=True)[1] / tensor.size
    return float(-(shares * np.log2(shares)).sum() * tensor.size / 8)


@pytest.mark.parametrize(("zeros", "top"), [(0.5, 1), (0.2, 7)])
def test_the_payload_is_near_the_entropy(zeros, top):
    tensor = levels((400, 500), zeros=zeros, top=top)
    assert pack([tensor]).nbytes < 1.02 * entropy(tensor)


@pytest.mark.parametrize("target", ["qdq", "onnxruntime-mobile"])
def test_a_target_without_decoders_is_refused(target):
    result = packed_module.encode(levels((9, 9)), "w", find_target(target))
    assert isinstance(result, Refusal)
    assert target in result.reason


def test_what_cannot_be_packed_is_refused_with_the_reason():
    assert "0 weights" in packed_module.encode(np.zeros((0, 3), np.int8), "w", TARGET).reason


def initializer(model, place):
    """payload, tree, constants …, advances, values, sizes, shapes …"""
    return model.graph.initializer[place]


@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize("name", ["a net", "two streams, one without signs"])
def test_damaged_files_never_crash_and_never_pass_for_whole(name, compact, monkeypatch):
    """Each byte of each array changed or cut: an error, or other levels (which the CRC tells), or a
    byte that says nothing."""
    monkeypatch.setattr(choices, "COMPACT_BELOW", LARGE if compact else 0)
    tensors = CASES[name]
    whole = decoder_model(tensors)
    generator = np.random.default_rng(0)
    refused = 0
    for trial in range(300):
        model = onnx.ModelProto()
        model.CopyFrom(whole)
        tensor = initializer(model, trial % len(whole.graph.initializer))
        if listed := tensor.int64_data or tensor.int32_data:
            listed[generator.integers(len(listed))] ^= 1 << int(
                generator.integers(62 if tensor.int64_data else 31)
            )
        else:
            data = bytearray(tensor.raw_data)
            if trial % 5:
                data[generator.integers(len(data))] ^= 1 << generator.integers(8)
            else:
                del data[generator.integers(len(data)) :]
            tensor.raw_data = bytes(data)
        try:
            read(model, len(tensors))
        except FileError:
            refused += 1
    assert refused > 100


def test_sizes_that_the_payload_does_not_back_are_refused_before_anything_is_allocated():
    model = decoder_model([levels((9, 9))])
    shape = model.graph.initializer[-1]
    shape.int64_data[:] = [1 << 20, 1 << 20]
    with pytest.raises(FileError, match="damaged"):
        read(model, 1)


def test_lanes_that_the_decoder_cannot_read_are_refused():
    model = decoder_model(small_net())
    payload = initializer(model, 0)
    payload.dims[:] = [payload.dims[0] // 2, payload.dims[1] * 2]
    with pytest.raises(FileError, match="payload"):
        read(model, 4)


@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize("name", ["a net", "signs alike"])
def test_onnxruntime_survives_damaged_payloads(name, compact, monkeypatch):
    monkeypatch.setattr(choices, "COMPACT_BELOW", LARGE if compact else 0)
    tensors = CASES[name]
    whole = decoder_model(tensors)
    generator = np.random.default_rng(1)
    for _ in range(40):
        model = onnx.ModelProto()
        model.CopyFrom(whole)
        payload = initializer(model, 0)
        data = bytearray(payload.raw_data)
        data[generator.integers(len(data))] ^= 1 << generator.integers(8)
        payload.raw_data = bytes(data)
        try:
            expected = read(model, len(tensors))
        except FileError:
            continue  # a cursor that leaves its tensor; onnxruntime says so as well, or wraps
        assert_same(run(model), expected)


def test_a_part_may_be_asked_for_alone():
    made = pack(small_net())
    for part, tensor in zip(
        reference_decoder.unpack_stream(dataclasses.replace(made, parts=made.parts[:2])),
        small_net(),
        strict=False,
    ):
        assert np.array_equal(part, tensor)


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 999), missing=st.integers(0, 12), alike=st.booleans())
def test_corrected_values_are_few_rare_and_next_to_a_value_that_has_a_symbol(seed, missing, alike):
    counts = np.random.default_rng(seed).integers(1, 2 if alike else 1000, 257)
    counts[256] = 0  # int8 ends at 127
    values = 255
    chosen = corrections.choose_corrected(counts, values - missing).tolist()
    signs = len({value > 0 for value in chosen})
    assert len(chosen) == (missing + signs if missing else 0)
    for value in chosen:
        assert corrections.find_neighbor(value) == value - np.sign(value)
        assert corrections.find_neighbor(value) != 0
        assert corrections.find_neighbor(value) not in chosen
    merged = corrections.merge_corrected(counts, np.array(chosen, int))
    assert merged.sum() == counts.sum()
    assert not merged[[value + 128 for value in chosen]].any()
    assert np.count_nonzero(merged) == 256 - len(chosen)


def test_levels_of_244_values_need_no_correction_and_one_more_does():
    values = np.delete(np.arange(-128, 128), 128).astype(np.int8)
    few = np.repeat(values[6:-5], 3).reshape(-1, 6)
    assert not pack([few]).has_corrections
    assert pack([np.append(few, values[:1])]).has_corrections
    assert not corrections.needs_corrections([few, few], alphabet.MOST_VALUES)
    assert corrections.needs_corrections([few, values[:1]], alphabet.MOST_VALUES)


def test_a_correction_written_by_hand_is_read_and_one_that_leads_nowhere_is_refused():
    advances = np.array([0, -1, 0, 0], np.int8)
    values = np.array([0, 126, 1, -1], np.int8)

    def place(entries):
        return reference_decoder.place_levels(np.array(entries, np.uint8), advances, values, 3)

    assert place([1, 2, 1, 0, 3, 3, 1]).tolist() == [126, 124, 127]
    for entries in ([2, 1], [1, 2, 2], [3]):
        with pytest.raises(FileError, match="correction"):
            place(entries)


def test_levels_near_a_gaussian_up_to_127_take_no_more_than_their_entropy_and_2_percent():
    tensor = gaussian((300, 300))
    assert pack([tensor]).nbytes < 1.02 * entropy(tensor)
