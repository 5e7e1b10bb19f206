"""What `auto` weighs: bytes against loading, and what `--prefer` says of it."""

import sys
import zlib

import numpy as np
import onnx
import pytest
from ecqx_onnx_converters import FloatGraph, GraphWeight, Matching, make_plan, write
from ecqx_onnx_converters.storage.packed import stages
from onnx import TensorProto, helper, numpy_helper

import ecqx_onnx
from ecqx_onnx.errors import OptionError
from ecqx_onnx.inspection import inspect
from ecqx_onnx.tensors import QuantTensor, Scale


def make_graph(levels: np.ndarray) -> tuple[FloatGraph, Matching]:
    """A single MatMul with a weight of these levels."""
    tensor = QuantTensor("w", levels, Scale(np.float32(0.5)))
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, levels.shape[0]])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, levels.shape[1]])
    weight = numpy_helper.from_array(levels * np.float32(0.5), "w")
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["y"])], "g", [x], [y])
    graph.initializer.append(weight)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    return FloatGraph.from_model(model), Matching((GraphWeight("w", tensor, ("w",)),), ())


def draw_gaussian(size: int, step: float) -> np.ndarray:
    """Levels of 4 bits at most, [size, size]."""
    drawn = np.random.default_rng(0).standard_normal((size, size)) / step
    return np.clip(np.rint(drawn), -7, 7).astype(np.int8)


DENSE = draw_gaussian(640, 0.38)  # 3.5 bits a weight: an eighth less than 4
SPARSE = draw_gaussian(640, 1.2)  # 2 bits a weight


def find_storage(levels: np.ndarray, **options: str) -> str:
    (entry,) = make_plan(*make_graph(levels), **options).entries
    return entry.stored.storage


def test_auto_packs_what_saves_enough_and_says_what_it_costs():
    plan = make_plan(*make_graph(SPARSE))
    assert plan.entries[0].stored.storage == "packed"
    (note,) = plan.notes
    assert "loading decodes 0.4 million packed weights" in note


def test_auto_leaves_dense_what_saves_less_and_says_so():
    plan = make_plan(*make_graph(DENSE))
    assert plan.entries[0].stored.storage == "dense"
    (note,) = plan.notes
    assert "% of the file, less than the 15.0%" in note
    assert "--prefer disk" in note


def test_a_small_file_is_packed_wherever_it_gets_smaller():
    small = draw_gaussian(400, 0.38)
    assert find_storage(small) == find_storage(small, prefer="disk") == "packed"
    assert make_plan(*make_graph(small)).notes == ()


def test_disk_takes_the_fewest_bytes():
    assert find_storage(DENSE, prefer="disk") == "packed"


@pytest.mark.parametrize("levels", [DENSE, SPARSE, draw_gaussian(30, 2.0)])
def test_nothing_is_decoded_at_load_where_that_is_preferred(levels):
    plan = make_plan(*make_graph(levels), prefer="load")
    assert plan.entries[0].stored.storage == "dense"
    assert not plan.entries[0].stored.functions
    assert plan.notes == ()


def test_what_stays_float_counts_as_part_of_the_file():
    graph, matching = make_graph(SPARSE)
    floats = {**graph.weights, "unused": np.zeros((1000, 1000), np.float32)}
    graph = FloatGraph(graph.proto, floats)
    plan = make_plan(graph, matching)
    assert plan.entries[0].stored.storage == "dense"


def test_preferences_that_do_not_go_are_refused(tmp_path):
    with pytest.raises(OptionError, match="nothing prefers 'speed'; choose one of auto, disk"):
        make_plan(*make_graph(SPARSE), prefer="speed")
    with pytest.raises(OptionError, match="--prefer disk chooses among storages"):
        make_plan(*make_graph(SPARSE), prefer="disk", storage="dense")
    with pytest.raises(OptionError, match="--prefer disk chooses among storages"):
        ecqx_onnx.pack(__file__, tmp_path / "a.onnx", prefer="disk", storage="dense")


def test_large_tensors_are_stored_in_whole_bits():
    """Digits would leave 40 bytes a weight behind while loading."""
    ternary = np.clip(DENSE, -1, 1)
    assert find_storage(ternary, storage="dense") == "dense"
    (entry,) = make_plan(*make_graph(ternary), storage="dense").entries
    assert not entry.stored.nodes
    (entry,) = make_plan(*make_graph(ternary[:50, :50]), storage="dense").entries
    assert entry.stored.nodes


def test_the_estimated_peak_is_less_in_stages(monkeypatch):
    tensors = [np.ones((500, 1000), np.int8)] * 8
    staged = stages.estimate_peak(tensors)
    monkeypatch.setattr(stages, "STAGED_FROM", 1 << 40)
    assert staged < 0.6 * stages.estimate_peak(tensors)


class Deflate:
    """Stands for the library `brotli`, which need not be installed."""

    @staticmethod
    def compress(content: bytes, *, quality: int, lgwin: int) -> bytes:
        assert quality in (9, 11)
        assert lgwin == 24
        return zlib.compress(content, 9)


@pytest.fixture
def brotli(monkeypatch):
    monkeypatch.setitem(sys.modules, "brotli", Deflate)


def write_original(folder, levels):
    graph, _ = make_graph(levels)
    onnx.save(graph.to_model(), folder / "original.onnx")
    return folder / "original.onnx"


def test_pack_tells_what_both_files_take_on_the_wire(brotli, tmp_path):
    original = write_original(tmp_path, SPARSE)
    report = ecqx_onnx.pack(original, tmp_path / "packed.onnx")
    told = report.to_json()
    assert told["wire_bytes"] == len(zlib.compress((tmp_path / "packed.onnx").read_bytes(), 9))
    assert told["original_wire_bytes"] == len(zlib.compress(original.read_bytes(), 9))
    assert f"under brotli it takes {told['wire_bytes']:,} bytes, the original" in " ".join(
        str(report).split()
    )
    assert "smaller one on the wire" not in " ".join(str(report).split())


def test_pack_says_where_the_original_is_smaller_on_the_wire(brotli, tmp_path):
    repeated = np.tile(draw_gaussian(16, 0.7), (8, 8))  # which a dictionary coder sees
    report = ecqx_onnx.pack(write_original(tmp_path, repeated), tmp_path / "packed.onnx")
    assert report.wire.written > report.wire.original
    assert "the original is the smaller one on the wire" in " ".join(str(report).split())


def test_without_the_library_nothing_is_said_of_the_wire(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "brotli", None)  # as if it were not installed
    report = ecqx_onnx.pack(write_original(tmp_path, SPARSE), tmp_path / "packed.onnx")
    assert report.to_json()["wire_bytes"] is None
    assert "brotli" not in " ".join(str(report).split())


def test_inspect_says_what_decoding_costs(tmp_path):
    write(make_plan(*make_graph(SPARSE)), tmp_path / "packed.onnx")
    told = dict(inspect(tmp_path / "packed.onnx").facts)
    assert "loading decodes 0.4 million packed weights" in told["load"]
    write(make_plan(*make_graph(DENSE)), tmp_path / "dense.onnx")
    assert "load" not in dict(inspect(tmp_path / "dense.onnx").facts)
