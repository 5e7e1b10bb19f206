"""`compress` from end to end on small networks: bounds, splits, statuses, what is refused."""

import json
import subprocess
import sys

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from typer.testing import CliRunner

from ecqx_onnx.cli import app
from ecqx_onnx.errors import DataError, FileError, ModelError, OptionError
from ecqx_onnx.verbs.compress import compress
from tests.test_compression_parts import images, small_network


@pytest.fixture
def model(tmp_path):
    path = tmp_path / "float.onnx"
    onnx.save(small_network(), path)
    return path


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "data.npz"
    np.savez(path, x=images(96))
    return path


@pytest.fixture
def labeled(tmp_path, model):
    x = images(96)
    scores = onnxruntime.InferenceSession(model).run(None, {"x": x})[0]
    path = tmp_path / "labelled.npz"
    np.savez(path, x=x, labels=scores.argmax(1))
    return path


def difference(one, other, x):
    y, z = (onnxruntime.InferenceSession(path).run(None, {"x": x})[0] for path in (one, other))
    return np.linalg.norm(y - z) / np.linalg.norm(y)


def test_an_error_bound_is_held_on_data_that_nothing_has_seen(tmp_path, model, data):
    out = tmp_path / "small.onnx"
    result = compress(model, out, data=data, max_error=0.1)
    assert result.ok
    assert result.verdict.quality.error <= 0.1
    assert difference(model, out, images(200, seed=7)) < 0.15
    assert not (tmp_path / "small.onnx.compress").exists()


def test_a_size_is_kept_to_the_byte_and_used(tmp_path, model, data):
    out = tmp_path / "small.onnx"
    result = compress(model, out, data=data, max_bytes="1.1k")
    assert result.ok
    assert 0.9 * 1100 < out.stat().st_size <= 1100
    assert result.report.nbytes == out.stat().st_size == result.chosen.nbytes


def test_bits_per_weight_bound_the_coded_bytes(tmp_path, model, data):
    result = compress(model, tmp_path / "small.onnx", data=data, bits_per_weight=8.0)
    assert result.chosen.bits_per_weight <= 8.0


def test_without_a_bound_the_default_is_told(tmp_path, model, data):
    result = compress(model, tmp_path / "small.onnx", data=data, keep_best=True)
    assert result.bounds.max_error == 0.05
    assert "default" in result.bounds.words


def test_labels_make_agreement_and_lost_points(tmp_path, model, labeled):
    result = compress(model, tmp_path / "small.onnx", data=labeled, max_drop=20)
    assert result.verdict.quality.float_accuracy.share == 1.0
    assert result.verdict.quality.drop <= 20


def test_the_same_command_writes_the_same_bytes(tmp_path, model, data):
    files = [tmp_path / f"{name}.onnx" for name in "ab"]
    for file in files:
        compress(model, file, data=data, max_bytes=1100)
    assert files[0].read_bytes() == files[1].read_bytes()


def test_a_missed_bound_writes_nothing_and_says_what_was_reached(tmp_path, model, data):
    out = tmp_path / "small.onnx"
    result = compress(model, out, data=data, max_bytes=500)
    assert not result.ok
    assert "500 are allowed" in result.misses[0]
    assert not out.exists()
    assert compress(model, out, data=data, max_bytes=500, keep_best=True).path == out
    assert out.exists()


def test_the_result_prints_as_a_table_as_json_and_as_html(tmp_path, model, data):
    result = compress(model, tmp_path / "small.onnx", data=data, max_error=0.2)
    assert "coded bits a weight" in str(result)
    assert json.loads(json.dumps(result.to_json()))["ok"]
    assert "<svg" in result._repr_html_()


def test_the_command_ends_with_the_status_of_its_bounds(tmp_path, model, data):
    out, runner = tmp_path / "small.onnx", CliRunner()
    arguments = ["compress", str(model), str(out), "--data", str(data)]
    good = runner.invoke(app, [*arguments, "--max-error", "0.2", "--json"])
    assert good.exit_code == 0
    assert json.loads(good.stdout)["bytes"] == out.stat().st_size
    assert runner.invoke(app, [*arguments, "--max-bytes", "500", "--force"]).exit_code == 1
    assert runner.invoke(app, [*arguments, "--min-agreement", "0.9"]).exit_code == 2
    page = tmp_path / "page.html"
    more = ["--max-error", "0.2", "--force", "--quiet", "--report", str(page)]
    assert runner.invoke(app, [*arguments, *more]).exit_code == 0
    assert page.read_text().startswith("<!doctype html>")


def test_a_page_that_exists_is_kept_and_told_before_the_work(tmp_path, model, data):
    page, runner = tmp_path / "page.html", CliRunner()
    page.write_text("mine")
    arguments = ["compress", str(model), str(tmp_path / "o.onnx"), "--data", str(data)]
    refused = runner.invoke(app, [*arguments, "--report", str(page)])
    assert refused.exit_code == 2
    assert "--force" in refused.stderr
    assert page.read_text() == "mine"
    assert not (tmp_path / "o.onnx").exists()
    same = runner.invoke(app, [*arguments, "--report", str(tmp_path / "o.onnx")])
    assert same.exit_code == 2


def test_an_interrupted_search_goes_on_from_its_points(tmp_path, model, data, monkeypatch):
    from ecqx_onnx.compression.search.points import PointMaker

    out, made = tmp_path / "small.onnx", []
    plain = PointMaker.make

    def stopping(self, bits):
        made.append(bits)
        if len(made) == 2:
            raise KeyboardInterrupt
        return plain(self, bits)

    monkeypatch.setattr(PointMaker, "make", stopping)
    with pytest.raises(KeyboardInterrupt):
        compress(model, out, data=data, max_error=0.1)
    assert (tmp_path / "small.onnx.compress" / "points.jsonl").exists()
    compress(model, out, data=data, max_error=0.1)
    assert made[0] not in made[2:-1]
    assert out.exists()


def test_a_second_command_for_the_same_file_is_refused(tmp_path, model, data):
    folder = tmp_path / "small.onnx.compress"
    folder.mkdir()
    (folder / "lock").write_text("1")  # a process that is always there
    with pytest.raises(FileError, match="process 1"):
        compress(model, tmp_path / "small.onnx", data=data, max_error=0.1)


@pytest.mark.parametrize(
    ("arrays", "options", "error", "words"),
    [
        ({"x": images(20)}, {}, DataError, "32"),
        ({"x": images(64)[:, :2]}, {}, DataError, "takes"),
        ({"x": np.full((64, 3, 9, 9), np.nan, np.float32)}, {}, DataError, "NaN"),
        ({"z": images(64)}, {}, DataError, "one array for each input"),
        ({"x": images(64)}, {"max_drop": 1.0}, DataError, "no labels"),
        ({"x": images(64)}, {"min_agreement": 98}, OptionError, "--max-error"),
        ({"x": images(64)}, {"max_bytes": 0}, OptionError, "no room"),
        ({"x": images(64)}, {"exclude": ["*"]}, ModelError, "none of its"),
        ({"x": images(64)}, {"include": ["q*"]}, OptionError, "matches no weight"),
        ({"x": images(64)}, {"output": "q"}, OptionError, "no output 'q'"),
        ({"x": images(64), "labels": np.zeros(3, int)}, {}, DataError, "labels"),
    ],
)
def test_bad_input_is_one_sentence(tmp_path, model, arrays, options, error, words):
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(error, match=words):
        compress(model, tmp_path / "small.onnx", data=tmp_path / "bad.npz", **options)
    assert not (tmp_path / "small.onnx").exists()


def test_a_compressed_file_is_not_compressed_again(tmp_path, model, data):
    out = tmp_path / "small.onnx"
    compress(model, out, data=data, max_error=0.2)
    with pytest.raises(ModelError, match="already"):
        compress(out, tmp_path / "again.onnx", data=data)


def test_a_model_without_weights_is_told_so(tmp_path, data):
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 3, 9, 9])
    result = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 3, 9, 9])
    node = helper.make_node("Relu", ["x"], ["y"])
    graph = helper.make_graph([node], "none", [value], [result])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    onnx.save(model, tmp_path / "none.onnx")
    with pytest.raises(ModelError, match="no weight"):
        compress(tmp_path / "none.onnx", tmp_path / "out.onnx", data=data)


def recurrent_network():
    """LSTM over a sequence of embedded indices, with a mask of lengths; two inputs."""
    generator = np.random.default_rng(0)

    def array(name, *shape):
        return numpy_helper.from_array(
            (generator.normal(size=shape) * 0.4).astype(np.float32), name
        )

    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["e"]),
        helper.make_node("Transpose", ["e"], ["s"], perm=[1, 0, 2]),
        helper.make_node("LSTM", ["s", "w", "r"], ["", "h", ""], hidden_size=16),
        helper.make_node("Squeeze", ["h", "axis"], ["q"]),
        helper.make_node("Concat", ["q", "extra"], ["c"], axis=1),
        helper.make_node("Gemm", ["c", "dense"], ["y"], transB=1),
    ]
    initializers = [
        array("table", 50, 12), array("w", 1, 64, 12), array("r", 1, 64, 16),
        array("dense", 5, 20), numpy_helper.from_array(np.array([0]), "axis"),
    ]  # fmt: skip
    graph = helper.make_graph(
        nodes,
        "recurrent",
        [
            helper.make_tensor_value_info("ids", TensorProto.INT64, ["N", 7]),
            helper.make_tensor_value_info("extra", TensorProto.FLOAT, ["N", 4]),
        ],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 5])],
        initializers,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)


def recurrent_data(count):
    generator = np.random.default_rng(1)
    ids = generator.integers(0, 50, (count, 7))
    return {"ids": ids, "extra": generator.normal(size=(count, 4)).astype(np.float32)}


def test_an_lstm_with_a_table_and_two_inputs_is_compressed(tmp_path):
    onnx.save(recurrent_network(), tmp_path / "float.onnx")
    np.savez(tmp_path / "data.npz", **recurrent_data(800))
    out = tmp_path / "small.onnx"
    result = compress(tmp_path / "float.onnx", out, data=tmp_path / "data.npz", max_error=0.1)
    assert result.ok
    assert {row.name for row in result.report.tensors} >= {"table", "w", "r", "dense"}


def test_a_float16_model_keeps_its_interface(tmp_path):
    generator = np.random.default_rng(0)
    weight = (generator.normal(size=(24, 10)) / 5).astype(np.float16)
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["d"]),
        helper.make_node("Relu", ["d"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "half",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT16, ["N", 24])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT16, ["N", 10])],
        [numpy_helper.from_array(weight, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, tmp_path / "half.onnx")
    data = {"x": generator.normal(size=(64, 24)).astype(np.float16)}
    out = tmp_path / "small.onnx"
    result = compress(tmp_path / "half.onnx", out, data=data, max_error=0.1)
    assert result.ok
    assert onnxruntime.InferenceSession(out).get_outputs()[0].type == "tensor(float16)"


def test_samples_come_from_a_function_that_yields_batches(tmp_path, model):
    (tmp_path / "load.py").write_text(
        "import numpy as np\n"
        "def batches():\n"
        "    for seed in range(8):\n"
        "        generator = np.random.default_rng(seed)\n"
        "        yield {'x': generator.normal(size=(8, 3, 9, 9)).astype('float32')}\n"
    )
    spec = f"{tmp_path / 'load.py'}:batches"
    assert compress(model, tmp_path / "small.onnx", data=spec, max_error=0.2).ok


def test_an_onnx_model_is_compressed_without_torch(tmp_path, model, data):
    code = (
        "import sys; from ecqx_onnx import compress;"
        f"compress({str(model)!r}, {str(tmp_path / 'o.onnx')!r}, data={str(data)!r}, max_error=.2);"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_module_of_pytorch_is_compressed_too(tmp_path):
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    module = torch.nn.Linear(16, 8)
    x = torch.randn(96, 16)
    result = compress(
        module.eval(), tmp_path / "small.onnx", data=x.numpy(), example=x[:2], max_error=0.1
    )
    assert result.ok


def test_lines_of_progress_say_how_long_it_will_take(tmp_path, model, data):
    lines = []
    compress(model, tmp_path / "small.onnx", data=data, max_error=0.02, say=lines.append)
    assert any("sensitivity of weight" in line and "about" in line for line in lines)
    assert any(line.startswith("point 1") and "more)" in line for line in lines)


@pytest.mark.parametrize("option", [{"factory": "net.py:net"}, {"input_shape": (3, 9, 9)}])
def test_what_only_pytorch_models_need_is_refused_beside_an_onnx_file(
    tmp_path, model, data, option
):
    with pytest.raises(OptionError, match="PyTorch models"):
        compress(model, tmp_path / "small.onnx", data=data, **option)


def test_every_kind_of_bad_input_ends_the_command_with_status_2(tmp_path, model, data):
    """One sentence on stderr, nothing written; as the issue lists them."""
    files = {
        "few": {"x": images(8)},
        "none": {"x": images(0)},
        "shape": {"x": images(64)[:, :2]},
        "type": {"x": np.array(["a"] * 64)},
        "nan": {"x": np.full((64, 3, 9, 9), np.nan, np.float32)},
        "huge": {"x": np.full((64, 3, 9, 9), 3e38, np.float32)},  # infinite inside the network
        "other": {"z": images(64)},
    }
    for name, arrays in files.items():
        np.savez(tmp_path / f"{name}.npz", **arrays)
    compress(model, tmp_path / "compressed.onnx", data=data, max_error=0.2)
    good, out = str(data), str(tmp_path / "out.onnx")
    runs = [[str(model), out, "--data", str(tmp_path / f"{name}.npz")] for name in files]
    runs += [
        [str(model), out, "--data", good, "--max-drop", "1"],
        [str(model), out, "--data", good, "--max-bytes", "0"],
        [str(model), out, "--data", good, "--max-bytes", "many"],
        [str(model), out, "--data", good, "--bits-per-weight", "0"],
        [str(model), out, "--data", good, "--max-error", "nan"],
        [str(model), out, "--data", good, "--min-agreement", "0.98"],
        [str(model), out, "--data", good, "--checkpoint", str(tmp_path / "c.pt")],
        [str(model), out, "--data", str(tmp_path / "absent.npz")],
        [str(tmp_path / "absent.onnx"), out, "--data", good],
        [str(tmp_path / "compressed.onnx"), out, "--data", good],
        [str(data), out, "--data", good],
        [str(model), str(model), "--data", good, "--force"],
    ]
    for words in runs:
        result = CliRunner().invoke(app, ["compress", *words])
        assert result.exit_code == 2, (words, result.exit_code, result.stderr, result.exception)
        sentences = [line for line in result.stderr.splitlines() if line.startswith("error")]
        assert len(sentences) == 1, (words, result.stderr)
        assert not (tmp_path / "out.onnx").exists()
        assert not (tmp_path / "out.onnx.compress").exists(), words


def test_images_of_any_size_are_brought_to_that_of_the_model(tmp_path):
    """Its name has spaces, which the next command quotes."""
    from onnx import TensorProto, helper, numpy_helper
    from PIL import Image

    draw = np.random.default_rng(0)
    weight = numpy_helper.from_array(draw.normal(size=(8, 3, 3, 3)).astype(np.float32), "w")
    node = helper.make_node("Conv", ["x", "w"], ["y"])
    shape = ["N", 3, 20, 24]
    graph = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [weight],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, tmp_path / "a model.onnx")
    for number in range(40):
        pixels = draw.integers(0, 255, (20 + number % 5, 24 + number % 3, 3), dtype=np.uint8)
        folder = tmp_path / "images" / "ab"[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / f"{number} %s.png")
    result = compress(
        tmp_path / "a model.onnx",
        tmp_path / "small one.onnx",
        data=str(tmp_path / "images"),
        max_error=0.2,
    )
    assert result.ok
    assert any("resized to 20x24x3" in note for note in result.notes)
    assert f"'{tmp_path}/small one.onnx'" in result.advice


def test_what_onnxruntime_runs_is_compressed_whatever_the_checker_thinks(tmp_path):
    """Nodes in the wrong order, an output without a shape, LayerNormalization below opset 17."""
    draw = np.random.default_rng(0)

    def make_array(name, *shape):
        return numpy_helper.from_array((draw.normal(size=shape) / 4).astype(np.float32), name)

    nodes = [
        helper.make_node("Gemm", ["n", "w2"], ["y"]),
        helper.make_node("LayerNormalization", ["r", "s", "b"], ["n"]),
        helper.make_node("Relu", ["a"], ["r"]),
        helper.make_node("MatMul", ["x", "w1"], ["a"]),
    ]
    arrays = [make_array("w1", 32, 48), make_array("s", 48), make_array("b", 48)]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 32])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [*arrays, make_array("w2", 48, 5)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 14)], ir_version=8)
    onnx.save(model, tmp_path / "a.onnx")
    np.savez(tmp_path / "x.npz", x=draw.normal(size=(96, 32)).astype(np.float32))
    typed = ["--data", f"{tmp_path}/x.npz", "--max-error", "0.04"]
    files = [f"{tmp_path}/a.onnx", f"{tmp_path}/b.onnx"]
    made = CliRunner().invoke(app, ["compress", *files, *typed])
    assert made.exit_code == 0, made.stderr
    judged = CliRunner().invoke(app, ["validate", files[1], "--against", files[0], *typed[:2]])
    assert judged.exit_code == 0, judged.output
