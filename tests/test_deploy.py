"""deploy writes a folder whose runners really run, tell an altered file from the deployed one, and
repeat our preprocessing."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from ecqx_onnx_converters.serialization.metadata import METADATA_KEY
from typer.testing import CliRunner

from ecqx_onnx import api
from ecqx_onnx.cli import app
from ecqx_onnx.data import Dataset
from ecqx_onnx.data.images import decode_image
from ecqx_onnx.deployment import PLATFORMS, find_platform
from ecqx_onnx.deployment.platforms import TEMPLATES, find_oldest_runtime
from ecqx_onnx.errors import CheckFailed, FileError, InputError, ModelError
from ecqx_onnx.inputs.onnx_file import read_onnx
from ecqx_onnx.preprocessing import Preprocessing
from ecqx_onnx.preprocessing.spectrum import Spectrum
from ecqx_onnx.validation import validate
from ecqx_onnx.validation.devices import set_up
from tests.chromium import find_chromium, open_browser, serve

STUBS = Path(__file__).parent / "stubs"
LABELS = ("cat", "dog", "<b>bird</b>")
MEL = Spectrum(8000, frame_length=128, hop=64, fft_length=128, mel_bands=10)
MFCC = Spectrum(
    8000, frame_length=100, hop=50, fft_length=120, mel_bands=12, coefficients=6
)  # 120 is no power of two
KINDS = {
    "grey": Preprocessing("image", scale=255.0, mean=(0.13,), std=(0.31,)),
    "colour": Preprocessing("image", scale=255.0, mean=(0.49, 0.48, 0.45), std=(0.25, 0.24, 0.26)),
    "sound": Preprocessing(
        "waveform", scale=32768.0, samples=1000, spectrum=MEL, mean=(-3.0,), std=(2.0,)
    ),
    "features": Preprocessing("array", mean=(0.1,) * 6, std=(3.0,) * 6),
}


def raw_samples(kind, count, seed=0):
    generator = np.random.default_rng(seed)
    if kind == "sound":
        return (generator.standard_normal((count, 1000)) * 3000).astype(np.int16)
    if kind == "features":
        return generator.standard_normal((count, 6)).astype(np.float32)
    return generator.integers(
        0, 256, (count, 9, 7, *([3] if kind == "colour" else [])), dtype=np.uint8
    )


def a_model(kind, folder):
    """(model.pt, out.onnx, data set) of a small net for inputs of this kind."""
    torch.manual_seed(0)
    raw = raw_samples(kind, 40)
    x = torch.from_numpy(KINDS[kind].apply(raw))
    net = torch.nn.Sequential(
        torch.nn.Flatten(),
        torch.nn.Linear(x[0].numel(), 16),
        torch.nn.ReLU(),
        torch.nn.Linear(16, 3),
    )
    checkpoint = api.as_checkpoint(
        net, example=x[:2], bits=4, preprocessing=KINDS[kind], labels=LABELS
    )
    api.save(checkpoint, folder / "model.pt")
    api.convert(folder / "model.pt", folder / "out.onnx")
    with torch.no_grad():
        y = checkpoint.module()(x).argmax(1).numpy()  # `net` itself stays float
    data = Dataset.from_arrays(
        "made-up",
        {"x_test": raw, "y_test": y, "labels": np.array(LABELS)},
        preprocessing=KINDS[kind],
    )
    return folder / "model.pt", folder / "out.onnx", data


@pytest.fixture(scope="module")
def grey(tmp_path_factory):
    return a_model("grey", tmp_path_factory.mktemp("grey"))


@pytest.fixture(scope="module")
def linux(grey, tmp_path_factory):
    checkpoint, file, data = grey
    folder = tmp_path_factory.mktemp("deployed") / "linux"
    return api.deploy(file, folder, to="linux", against=checkpoint, data=data)


def manifest_of(folder):
    return json.loads((folder / "manifest.json").read_text())


def stored(folder, entry):
    data = (folder / entry["file"]).read_bytes()
    assert hashlib.sha256(data).hexdigest() == entry["sha256"]
    return np.frombuffer(data, np.dtype(entry["dtype"]).newbyteorder("<")).reshape(entry["shape"])


def run_py(folder, *arguments):
    return subprocess.run(
        [sys.executable, str(folder / "run.py"), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_the_manifest_says_what_the_folder_holds(linux, grey):
    _, file, data = grey
    manifest = manifest_of(linux.folder)
    copy = (linux.folder / "model.onnx").read_bytes()
    assert copy == file.read_bytes()
    assert manifest["model"]["sha256"] == hashlib.sha256(copy).hexdigest()
    assert manifest["model"]["bytes"] == len(copy)
    assert manifest["model"]["float32_bytes"] > 4 * (63 * 16 + 16 * 3)
    assert manifest["labels"] == list(LABELS)
    assert manifest["inputs"] == [
        {"name": manifest["inputs"][0]["name"], "dtype": "float32", "shape": [None, 1, 9, 7]}
    ]
    assert manifest["outputs"][0]["shape"] == [None, 3]
    assert Preprocessing.from_json(json.dumps(manifest["preprocessing"])) == KINDS["grey"]
    assert manifest["raw"] == {"dtype": "uint8", "shape": [9, 7]}
    report = validate(file, split=data.test, latency_runs=0)
    assert manifest["accuracy"] == {**report.onnx_accuracy.to_json(), "data": "made-up"}
    assert manifest["tool"].startswith("ecqx-onnx ")
    assert manifest["bits"] == 4


def test_golden_outputs_are_a_sessions_and_raw_inputs_preprocess_to_golden_ones(linux):
    manifest = manifest_of(linux.folder)
    session = onnxruntime.InferenceSession(
        str(linux.folder / "model.onnx"), providers=["CPUExecutionProvider"]
    )
    assert len(manifest["golden"]["cases"]) == 8
    for case in manifest["golden"]["cases"]:
        x = stored(linux.folder, case["inputs"][0])
        np.testing.assert_array_equal(
            session.run(None, {case["inputs"][0]["name"]: x})[0],
            stored(linux.folder, case["outputs"][0]),
        )
        np.testing.assert_array_equal(KINDS["grey"].apply(stored(linux.folder, case["raw"])), x)
        assert case["labels"] == stored(linux.folder, case["outputs"][0]).argmax(1).tolist()


def test_the_tolerance_follows_from_the_reference_and_is_coarse_without_one(linux, grey, tmp_path):
    _, file, data = grey
    outputs = np.concatenate(
        [
            stored(linux.folder, case["outputs"][0])
            for case in manifest_of(linux.folder)["golden"]["cases"]
        ]
    )
    sharp = manifest_of(linux.folder)["outputs"][0]["tolerance"]
    assert 0 < sharp < 100 * np.spacing(np.abs(outputs).max())
    api.deploy(file, tmp_path / "coarse", to="linux", data=data)
    coarse = manifest_of(tmp_path / "coarse")["outputs"][0]["tolerance"]
    assert (
        sharp
        < coarse
        == pytest.approx(2 * 1024 * np.spacing(max(np.float32(1), np.abs(outputs).max())), rel=1)
    )


def test_the_python_runner_passes_where_nothing_was_changed(linux):
    done = run_py(linux.folder)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.strip().endswith("PASSED")
    said = json.loads(run_py(linux.folder, "--json").stdout)
    assert said["ok"]
    assert said["latency_seconds"] > 0
    assert [check["name"] for check in said["checks"]] == [
        "file",
        "preprocessing",
        "outputs",
        "raw to output",
    ]


def change_byte(path, at=-1):
    data = bytearray(path.read_bytes())
    data[at] ^= 0x40
    path.write_bytes(data)


def other_weights(folder):
    """A valid model of the same shape, whose weights are others: only what it computes can tell."""
    model = onnx.load(folder / "model.onnx")
    bias = next(
        t
        for t in model.graph.initializer
        if t.data_type == onnx.TensorProto.FLOAT and len(t.dims) == 1 and t.dims[0] == 3
    )
    values = onnx.numpy_helper.to_array(bias) + np.float32(0.01)
    bias.CopyFrom(onnx.numpy_helper.from_array(values, bias.name))
    onnx.save(model, folder / "model.onnx")
    manifest = manifest_of(folder)
    manifest["model"]["sha256"] = hashlib.sha256((folder / "model.onnx").read_bytes()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("tamper", "failing"),
    [
        (other_weights, "outputs"),
        (lambda folder: change_byte(folder / "golden" / "00.output0.bin"), "outputs"),
        (lambda folder: change_byte(folder / "golden" / "00.input0.bin"), "preprocessing"),
        (lambda folder: change_byte(folder / "golden" / "00.raw.bin"), "raw to output"),
        (lambda folder: (folder / "golden" / "03.output0.bin").unlink(), "outputs"),
    ],
    ids=["model of other weights", "golden output", "golden input", "raw input", "missing output"],
)
def test_the_python_runner_fails_where_something_was_changed(linux, tmp_path, tamper, failing):
    shutil.copytree(linux.folder, tmp_path / "copy")
    tamper(tmp_path / "copy")
    done = run_py(tmp_path / "copy", "--json")
    assert done.returncode == 1, done.stdout + done.stderr
    assert failing in [
        check["name"] for check in json.loads(done.stdout)["checks"] if not check["ok"]
    ]


def test_the_python_runner_fails_on_a_model_that_does_not_load(linux, tmp_path):
    shutil.copytree(linux.folder, tmp_path / "copy")
    (tmp_path / "copy" / "model.onnx").write_bytes(b"no model")
    done = run_py(tmp_path / "copy")
    assert done.returncode == 1
    assert "does not load" in done.stderr


def flip_a_bit(path, position):
    """Of a file that still loads, as most damaged models do."""
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def bias_position(path):
    """Where in the file a float parameter lies."""
    bias = next(
        t
        for t in onnx.load(path).graph.initializer
        if t.data_type == onnx.TensorProto.FLOAT and len(t.raw_data) > 8
    )
    return path.read_bytes().index(bias.raw_data)


@pytest.mark.parametrize("arguments", [(), ("--json", "one.npy")])
def test_the_python_runner_loads_no_model_of_another_sha256(linux, tmp_path, arguments):
    shutil.copytree(linux.folder, tmp_path / "copy")
    model = tmp_path / "copy" / "model.onnx"
    np.save(tmp_path / "copy" / "one.npy", raw_samples("grey", 1, seed=5)[0])
    flip_a_bit(model, bias_position(model))
    onnxruntime.InferenceSession(str(model), providers=["CPUExecutionProvider"])
    done = run_py(tmp_path / "copy", *arguments)
    assert done.returncode == 1
    assert "model.onnx was changed: its sha256" in done.stderr
    assert not done.stdout


def test_the_page_loads_no_model_of_another_sha256(linux, tmp_path):
    """The module that opens the model, in Node, with a runtime that says when it is asked to
    load."""
    if shutil.which("node") is None:
        pytest.skip("node is not installed")
    shutil.copytree(linux.folder, tmp_path / "copy")
    (tmp_path / "copy" / "package.json").write_text('{"type": "module"}')
    for name in ("model.js", "preprocessing.js"):
        shutil.copyfile(TEMPLATES / "web" / name, tmp_path / "copy" / name)
    (tmp_path / "copy" / "run.js").write_text(
        "import fs from 'node:fs';\nimport { Model } from './model.js';\n"
        "const read = async (name) => new Uint8Array(fs.readFileSync(name));\n"
        "const create = async () => { console.log('loaded'); return {}; };\n"
        "Model.open(read, { env: { wasm: {} }, InferenceSession: { create } }).catch((error) => "
        "console.log(error.message));\n"
    )

    def said():
        command = ["node", "run.js"]
        done = subprocess.run(
            command, cwd=tmp_path / "copy", capture_output=True, text=True, timeout=60, check=True
        )
        return done.stdout.strip()

    assert said() == "loaded"
    model = tmp_path / "copy" / "model.onnx"
    flip_a_bit(model, bias_position(model))
    assert said().startswith("model.onnx was changed: its sha256")
    model.write_bytes(model.read_bytes()[:-1])
    assert "bytes, not" in said()


@pytest.mark.parametrize("name", ["android/EcqxModel.kt", "ios/EcqxModel.swift"])
def test_the_phones_runners_compare_the_sha256_before_they_make_a_session(name):
    """Their compilers are seldom here: at least the order is seen."""
    source = (TEMPLATES / name).read_text()
    compared, made = source.index("was changed: its sha256"), source.index("session = ")
    assert compared < made


def test_the_python_runner_predicts_one_image(linux, tmp_path):
    from PIL import Image

    pixels = raw_samples("grey", 1, seed=5)[0]
    Image.fromarray(pixels).save(tmp_path / "one.png")
    np.save(tmp_path / "one.npy", pixels)
    from_image, from_array = (
        json.loads(run_py(linux.folder, "--json", tmp_path / name).stdout)
        for name in ("one.png", "one.npy")
    )
    assert from_image == from_array
    session = onnxruntime.InferenceSession(
        str(linux.folder / "model.onnx"), providers=["CPUExecutionProvider"]
    )
    (scores,) = session.run(None, {session.get_inputs()[0].name: KINDS["grey"].apply(pixels[None])})
    np.testing.assert_allclose(from_image["outputs"][0], scores[0], rtol=1e-5, atol=1e-6)
    assert from_image["top"][0][0] == LABELS[scores[0].argmax()]
    assert {label for label, _ in from_image["top"]} == set(LABELS)
    assert sum(share for _, share in from_image["top"]) == pytest.approx(1)
    damaged = tmp_path / "damaged.png"
    damaged.write_bytes(b"x")
    assert "cannot be read" in run_py(linux.folder, damaged).stderr


def test_quantised_activations_widen_the_tolerance_by_what_the_graph_as_written_differs_by(
    grey, tmp_path
):
    checkpoint, _, data = grey
    calibration = Dataset("calibration", data.test, data.test, data.labels)
    api.convert(checkpoint, tmp_path / "int8.onnx", activations="int8", calibration=calibration)
    api.deploy(
        tmp_path / "int8.onnx", tmp_path / "linux", to="linux", against=checkpoint, data=data
    )
    output = manifest_of(tmp_path / "linux")["outputs"][0]
    assert "between integer kernels and the graph as written" in output["tolerance_from"]
    levels = float(re.search(r"\+ (\S+) between", output["tolerance_from"])[1])
    assert levels <= output["tolerance"] < levels + 1e-3
    assert run_py(tmp_path / "linux").returncode == 0


@pytest.mark.parametrize("kind", ["colour", "sound", "features"])
def test_every_kind_of_input_is_deployed_and_checks_itself(kind, tmp_path):
    checkpoint, file, data = a_model(kind, tmp_path)
    api.deploy(file, tmp_path / "with", to="linux", against=checkpoint, data=data)
    api.deploy(file, tmp_path / "without", to="linux")
    for folder in (tmp_path / "with", tmp_path / "without"):
        said = json.loads(run_py(folder, "--json").stdout)
        assert said["ok"], said
        assert len(said["checks"]) == 4
    assert manifest_of(tmp_path / "without")["accuracy"] is None


def test_a_foreign_file_is_deployed_with_made_up_inputs_and_no_preprocessing(tmp_path):
    foreign_file(tmp_path / "foreign.onnx")
    written = api.deploy(tmp_path / "foreign.onnx", tmp_path / "linux", to="linux")
    manifest = manifest_of(tmp_path / "linux")
    assert manifest["preprocessing"] is None
    assert manifest["bits"] is None
    assert any("no preprocessing" in note for note in written.notes)
    said = json.loads(run_py(tmp_path / "linux", "--json").stdout)
    assert said["ok"]
    assert [check["name"] for check in said["checks"]] == ["file", "outputs"]


def foreign_file(path, *, shape=("N", 4), kind=onnx.TensorProto.FLOAT, opset=18, nodes=None):
    nodes = nodes or [onnx.helper.make_node("Identity", ["x"], ["y"])]
    values = [onnx.helper.make_tensor_value_info(name, kind, shape) for name in ("x", "y")]
    graph = onnx.helper.make_graph(nodes, "g", values[:1], values[1:])
    model = onnx.helper.make_model(
        graph, opset_imports=[onnx.helper.make_opsetid("", opset)], ir_version=9
    )
    onnx.save(model, path)


def compiled(source, tmp_path):
    """run.cpp linked with tests/stubs, whose runtime knows Identity only: the slow test below has
    the real one."""
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed")
    flags = ["-std=c++17", "-Wall", "-Wextra", "-Werror", "-I", str(STUBS)]
    done = subprocess.run(
        ["g++", *flags, str(source), "-o", str(tmp_path / "run")],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return lambda folder, *more: subprocess.run(
        [tmp_path / "run", *more], cwd=folder, capture_output=True, text=True, timeout=60
    )


def test_the_cpp_runner_tells_golden_outputs_from_others(grey, tmp_path):
    foreign_file(tmp_path / "identity.onnx")
    folder = api.deploy(tmp_path / "identity.onnx", tmp_path / "linux", to="linux").folder
    run = compiled(folder / "run.cpp", tmp_path)
    done = run(folder)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.strip().endswith("PASSED")
    predicted = run(folder, "golden/00.input0.bin")
    best = int(np.fromfile(folder / "golden" / "00.input0.bin", "<f4").argmax())
    assert f"class {best}" in predicted.stdout.splitlines()[0]
    change_byte(folder / "golden" / "05.output0.bin")
    assert run(folder).returncode == 1
    output = (folder / "golden" / "05.output0.bin").read_bytes()
    (folder / "golden" / "05.output0.bin").write_bytes(b"x")
    assert "does not hold its shape" in run(folder).stderr
    (folder / "golden" / "05.output0.bin").write_bytes(output)
    whole = (folder / "model.onnx").read_bytes()
    flip_a_bit(folder / "model.onnx", whole.index(b"Identity") - 1)
    assert "model.onnx was changed: its sha256" in run(folder).stderr
    (folder / "model.onnx").write_bytes(b"x")
    assert run(folder).returncode == 1
    assert run(folder, "golden/00.input0.bin").returncode == 1
    # Of a model with preprocessing it reads every line; the stand-in then refuses the model.
    real = api.deploy(grey[1], tmp_path / "real", to="linux").folder
    assert "Identity only" in run(real).stderr


@pytest.mark.slow
def test_the_cpp_runner_passes_its_self_check_with_onnxruntime(grey, tmp_path):
    """ONNXRUNTIME_ROOT: a folder with include/ and lib/, such as a release's archive unpacked."""
    root = Path(os.environ.get("ONNXRUNTIME_ROOT", ""))
    if not (root / "include" / "onnxruntime_cxx_api.h").is_file() or shutil.which("g++") is None:
        pytest.skip(
            "set ONNXRUNTIME_ROOT to a folder with onnxruntime's include/ and lib/, and install g++"
        )
    folder = api.deploy(grey[1], tmp_path / "linux", to="linux").folder
    flags = [
        "-std=c++17",
        "-Wall",
        "-Wextra",
        "-Werror",
        f"-I{root / 'include'}",
        f"-L{root / 'lib'}",
        "-lonnxruntime",
    ]
    command = ["g++", "run.cpp", *flags, "-o", "run"]
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    environment = {**os.environ, "LD_LIBRARY_PATH": str(root / "lib")}

    def run(*more):
        return subprocess.run(
            ["./run", *more],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    done = run()
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.strip().endswith("PASSED")
    assert run("golden/00.input0.bin").returncode == 0
    change_byte(folder / "golden" / "00.output0.bin")
    assert run().returncode == 1


def identity(path, kind):
    """A model of one Identity, which is all that the stand-in runtimes know, with our preprocessing
    of that kind."""
    shape = KINDS[kind].apply(raw_samples(kind, 1)).shape
    foreign_file(path, shape=("N", *shape[1:]))
    model = onnx.load(path)
    settings = json.loads(KINDS[kind].to_json())
    metadata = {
        "format": 3,
        "version": "0",
        "tensors": [],
        "labels": list(LABELS),
        "preprocessing": settings,
    }
    model.metadata_props.add(key=METADATA_KEY, value=json.dumps(metadata))
    onnx.save(model, path)


@pytest.fixture(scope="module")
def kotlin(tmp_path_factory):
    """The Android runners compiled with tests/stubs: arguments -> a finished process."""
    if shutil.which("kotlinc") is None or shutil.which("java") is None:
        pytest.skip("kotlinc and java are not installed")
    jar = tmp_path_factory.mktemp("kotlin") / "run.jar"
    sources = [
        STUBS / "onnxruntime.kt",
        STUBS / "main.kt",
        *sorted((TEMPLATES / "android").glob("*.kt")),
    ]
    command = ["kotlinc", *map(str, sources), "-include-runtime", "-d", str(jar)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return lambda *more: subprocess.run(
        ["java", "-jar", jar, *map(str, more)], capture_output=True, text=True, timeout=60
    )


@pytest.mark.slow  # the compiler takes half a minute
@pytest.mark.parametrize("kind", KINDS)
def test_the_kotlin_runner_tells_golden_outputs_from_others_and_preprocesses_as_python_does(
    kind, kotlin, tmp_path
):
    identity(tmp_path / "identity.onnx", kind)
    folder = api.deploy(tmp_path / "identity.onnx", tmp_path / "android", to="android").folder
    done = kotlin(folder)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(": true ") == 4
    change_byte(folder / "golden" / "02.output0.bin")
    done = kotlin(folder)
    assert done.returncode == 1
    assert "outputs: false" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "channels"), [("grey", 1), ("colour", 3)])
def test_the_kotlin_runner_resizes_images_as_pillow_does_to_the_bit(
    kind, channels, kotlin, tmp_path
):
    identity(tmp_path / "identity.onnx", kind)
    folder = api.deploy(tmp_path / "identity.onnx", tmp_path / "android", to="android").folder
    pixels = np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8)
    rgba = np.concatenate([pixels, np.full((40, 30, 1), 255, np.uint8)], axis=2)
    (tmp_path / "rgba.bin").write_bytes(rgba.tobytes())
    found = np.frombuffer(
        bytes.fromhex(kotlin(folder, 30, 40, tmp_path / "rgba.bin").stdout), np.uint8
    )
    np.testing.assert_array_equal(
        found.reshape(9, 7, channels), as_decoded(decode_image, pixels, (9, 7, channels))
    )


@pytest.mark.slow
def test_the_kotlin_runner_does_a_job_that_validate_judges_on_a_whole_data_set(kotlin, tmp_path):
    """As on a phone: the first call writes the job, the deployed runner does it, the second call
    reads the result."""
    identity(tmp_path / "identity.onnx", "features")
    folder = api.deploy(tmp_path / "identity.onnx", tmp_path / "android", to="android").folder
    x = raw_samples("features", 50)
    y = KINDS["features"].apply(x).argmax(1)
    np.savez(tmp_path / "data.npz", x_train=x, y_train=y, x_test=x, y_test=y)
    device = f"folder:{tmp_path / 'job'}"
    data = str(tmp_path / "data.npz")
    judge = functools.partial(
        api.validate_on, [device], tmp_path / "identity.onnx", data=data, batch_size=20
    )
    assert "holds no result.json" in judge().troubles[0].sentence
    done = kotlin(folder, tmp_path / "job")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.split() == ["1/3", "2/3", "3/3"]
    table = judge()
    assert table.ok, (table.failures, table.troubles)
    assert table.reports[0].samples == 50
    assert table.reports[0].onnx_accuracy.share == 1.0
    assert "stand-in" in table.reports[0].runtime


def test_the_swift_runner_is_of_valid_syntax():
    swift = pytest.importorskip("tree_sitter_swift", reason="tree-sitter-swift is not installed")
    tree_sitter = pytest.importorskip("tree_sitter")
    parser = tree_sitter.Parser(tree_sitter.Language(swift.language()))
    for path in (TEMPLATES / "ios").glob("*.swift"):
        source = path.read_bytes()
        assert not parser.parse(source).root_node.has_error, path.name
    assert parser.parse(source.replace(b"func ", b"func func ", 1)).root_node.has_error


def test_outputs_that_are_no_numbers_make_no_golden_ones(tmp_path):
    foreign_file(
        tmp_path / "nan.onnx",
        nodes=[
            onnx.helper.make_node("Sub", ["x", "x"], ["z"]),
            onnx.helper.make_node("Div", ["z", "z"], ["y"]),
        ],
    )
    with pytest.raises(ModelError, match="NaN or infinity"):
        api.deploy(tmp_path / "nan.onnx", tmp_path / "linux", to="linux")
    assert not (tmp_path / "linux").exists()


def test_text_inputs_make_no_golden_ones(tmp_path):
    foreign_file(tmp_path / "text.onnx", kind=onnx.TensorProto.STRING)
    with pytest.raises(InputError, match="tensor\\(string\\)"):
        api.deploy(tmp_path / "text.onnx", tmp_path / "linux", to="linux")


def test_a_file_that_the_platform_cannot_load_is_refused(grey, tmp_path):
    _, file, _ = grey
    model = read_onnx(file).proto
    model.opset_import[0].version = 28
    for platform in PLATFORMS.values():
        with pytest.raises(ModelError, match="opset 28"):
            platform.check(model, file)
    model.opset_import[0].version = 21
    model.graph.initializer[0].data_location = onnx.TensorProto.EXTERNAL
    refused = [platform.name for platform in PLATFORMS.values() if not platform.external]
    for name in refused:
        with pytest.raises(ModelError, match="second file"):
            find_platform(name).check(model, file)


def test_a_file_that_fails_its_validation_is_not_deployed(grey, tmp_path):
    _, file, data = grey
    torch.manual_seed(1)
    other = torch.nn.Sequential(
        torch.nn.Flatten(), torch.nn.Linear(63, 16), torch.nn.ReLU(), torch.nn.Linear(16, 3)
    )
    wrong = api.as_checkpoint(
        other, example=torch.zeros(2, 1, 9, 7), bits=4, preprocessing=KINDS["grey"]
    )
    with pytest.raises(CheckFailed, match="not deployed"):
        api.deploy(file, tmp_path / "linux", to="linux", against=wrong, data=data)
    assert list(tmp_path.iterdir()) == []


def test_external_data_travels_with_the_model(tmp_path):
    foreign_file(
        tmp_path / "plain.onnx", nodes=[onnx.helper.make_node("MatMul", ["x", "w"], ["y"])]
    )
    model = onnx.load(tmp_path / "plain.onnx")
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.eye(4, dtype=np.float32), "w"))
    onnx.save(
        model,
        tmp_path / "outer.onnx",
        save_as_external_data=True,
        location="weights.bin",
        size_threshold=0,
    )
    api.deploy(tmp_path / "outer.onnx", tmp_path / "linux", to="linux")
    assert [entry["file"] for entry in manifest_of(tmp_path / "linux")["external"]] == [
        "model.onnx.data"
    ]
    assert run_py(tmp_path / "linux").returncode == 0
    change_byte(tmp_path / "linux" / "model.onnx.data")
    assert run_py(tmp_path / "linux").returncode == 1


def test_a_folder_in_the_way_is_replaced_only_with_force_and_only_if_it_is_ours(grey, tmp_path):
    _, file, _ = grey
    target = tmp_path / "there"
    api.deploy(file, target, to="linux")
    with pytest.raises(FileError, match="--force"):
        api.deploy(file, target, to="linux")
    (target / "old").touch()
    api.deploy(file, target, to="linux", force=True)
    assert not (target / "old").exists()
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("years")
    with pytest.raises(FileError, match="did not write"):
        api.deploy(file, precious, to="linux", force=True)
    assert (precious / "thesis.txt").read_text() == "years"
    (tmp_path / "file").touch()
    with pytest.raises(FileError, match="not a folder"):
        api.deploy(file, tmp_path / "file", to="linux", force=True)
    with pytest.raises(FileError, match="does not exist"):
        api.deploy(file, tmp_path / "no" / "where", to="linux")


def test_a_disk_that_refuses_leaves_nothing_and_keeps_the_old_folder(grey, tmp_path, monkeypatch):
    _, file, data = grey
    target = tmp_path / "there"
    api.deploy(file, target, to="linux")
    before = (target / "manifest.json").read_bytes()

    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("shutil.copyfile", full)
    with pytest.raises(FileError, match="No space left"):
        api.deploy(file, target, to="linux", data=data, force=True)
    assert (target / "manifest.json").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


def test_the_command_line_deploys_and_refuses_in_one_sentence(grey, tmp_path):
    _, file, _ = grey
    runner = CliRunner()
    done = runner.invoke(
        app, ["deploy", str(file), str(tmp_path / "out"), "--to", "linux", "--json"]
    )
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["files"]["model.onnx"] == file.stat().st_size
    named = runner.invoke(
        app,
        [
            "deploy",
            str(file),
            str(tmp_path / "named"),
            "--to",
            "linux",
            "--labels",
            "a, b,c",
            "--quiet",
        ],
    )
    assert named.exit_code == 0, named.output
    assert manifest_of(tmp_path / "named")["labels"] == ["a", "b", "c"]
    for arguments, word in (
        ([str(file), str(tmp_path / "x"), "--to", "toaster"], "toaster"),
        ([str(tmp_path / "none.onnx"), str(tmp_path / "x"), "--to", "linux"], "none.onnx"),
        ([str(file), str(tmp_path / "out"), "--to", "linux"], "exists already"),
    ):
        done = runner.invoke(app, ["deploy", *arguments])
        assert done.exit_code == 2
        assert word in done.stderr
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("platform", list(PLATFORMS))
def test_every_platform_has_templates_that_say_what_was_not_tested(platform):
    templates = {path.name for path in PLATFORMS[platform].templates}
    assert "README.md" in templates
    assert len(templates) >= 2


def test_the_oldest_runtime_follows_from_opset_and_types(grey, tmp_path):
    foreign_file(tmp_path / "old.onnx", opset=17)
    assert find_oldest_runtime(read_onnx(tmp_path / "old.onnx").proto) == "1.17"
    assert find_oldest_runtime(read_onnx(grey[1]).proto) in ("1.17", "1.23")


def web_folder(grey, tmp_path):
    checkpoint, file, data = grey
    try:
        set_up("web")
    except InputError as error:
        pytest.skip(str(error))
    api.deploy(file, tmp_path / "web", to="web", against=checkpoint, data=data)
    return tmp_path / "web"


def test_the_web_folder_names_no_other_server(grey, tmp_path):
    folder = web_folder(grey, tmp_path)
    for path in folder.iterdir():
        if path.suffix in (".html", ".css", ".js"):
            assert not re.search(r"(https?:)?//[a-z0-9.-]+\.[a-z]{2,}", path.read_text()), path
    policy = re.search(
        r'Content-Security-Policy" content="([^"]+)"', (folder / "index.html").read_text()
    )[1]
    assert "default-src 'none'" in policy
    assert "unsafe-inline" not in policy


@pytest.mark.parametrize("name", KINDS | {"mfcc": None, "plain sound": None, "indices": None})
def test_the_pages_preprocessing_is_pythons_to_the_bit(name, tmp_path):
    """For spectra up to float32 rounding."""
    if shutil.which("node") is None:
        pytest.skip("node is not installed")
    more = {
        "mfcc": Preprocessing(
            "waveform", scale=32768.0, spectrum=MFCC, mean=(1.0,) * 6, std=(2.0,) * 6
        ),
        "plain sound": Preprocessing("waveform", scale=32768.0),
        "indices": Preprocessing("indices"),
    }
    settings = (KINDS | more)[name]
    like = {"mfcc": "sound", "plain sound": "sound"}.get(name, name)
    raw = np.arange(12).reshape(2, 6) if name == "indices" else raw_samples(like, 3)
    expected = settings.apply(raw)
    (tmp_path / "raw.bin").write_bytes(raw.tobytes())
    (tmp_path / "package.json").write_text('{"type": "module"}')
    shutil.copyfile(TEMPLATES / "web" / "preprocessing.js", tmp_path / "preprocessing.js")
    array = {
        "uint8": "Uint8Array",
        "int16": "Int16Array",
        "float32": "Float32Array",
        "int64": "BigInt64Array",
    }[raw.dtype.name]
    (tmp_path / "run.js").write_text(
        "import fs from 'node:fs';\nimport { preprocess } from './preprocessing.js';\n"
        f"const raw = new {array}(new Uint8Array(fs.readFileSync('raw.bin')).buffer);\n"
        f"const found = preprocess(raw, {list(raw.shape)}, {settings.to_json()});\n"
        "fs.writeFileSync('out.bin', new "
        "Uint8Array(found.data.buffer));\nconsole.log(JSON.stringify(found.shape));\n"
    )
    done = subprocess.run(
        ["node", "run.js"], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == list(expected.shape)
    found = np.frombuffer((tmp_path / "out.bin").read_bytes(), expected.dtype).reshape(
        expected.shape
    )
    limit = 4 * np.spacing(np.abs(expected).max()) if settings.spectrum else 0
    assert np.abs(found - expected).max() <= limit


@pytest.mark.parametrize("shape", [(40, 30), (9, 7), (64, 64), (5, 90), (3, 3)])
@pytest.mark.parametrize("channels", [1, 3])
def test_the_page_resizes_images_as_pillow_does_to_the_bit(shape, channels, tmp_path):
    if shutil.which("node") is None:
        pytest.skip("node is not installed")
    pixels = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    expected = as_decoded(decode_image, pixels, (9, 7, channels))
    rgba = np.concatenate([pixels, np.full((*shape, 1), 255, np.uint8)], axis=2)
    (tmp_path / "raw.bin").write_bytes(rgba.tobytes())
    (tmp_path / "package.json").write_text('{"type": "module"}')
    shutil.copyfile(TEMPLATES / "web" / "preprocessing.js", tmp_path / "preprocessing.js")
    (tmp_path / "run.js").write_text(
        "import fs from 'node:fs';\nimport { fitImage } from './preprocessing.js';\n"
        f"const image = {{ pixels: fs.readFileSync('raw.bin'), width: {shape[1]}, height: "
        f"{shape[0]} }};\n"
        f"fs.writeFileSync('out.bin', fitImage(image, [9, 7, {channels}]));\n"
    )
    subprocess.run(["node", "run.js"], cwd=tmp_path, check=True, capture_output=True, timeout=60)
    found = np.frombuffer((tmp_path / "out.bin").read_bytes(), np.uint8).reshape(9, 7, channels)
    np.testing.assert_array_equal(found, expected)


def as_decoded(decode_image, pixels, shape):
    import io

    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "png")
    return decode_image(buffer.getvalue(), where="a test", shape=shape, resize=True)


def opened(folder):
    """The page's document after its self-check, served by a plain static file server."""
    find_chromium()
    with open_browser() as tab, serve(folder) as url:
        tab.open(url)
        tab.wait("document.documentElement.dataset.state")
        return tab.evaluate("document.documentElement.outerHTML")


def test_the_page_checks_itself_in_a_browser(grey, tmp_path):
    page = opened(web_folder(grey, tmp_path))
    assert 'data-check="passed"' in page, page[-3000:]
    assert 'data-state="ready"' in page
    assert page.count('class="sentence"') == 4
    assert "same class for 8 of 8" in page
    assert "<b>bird</b>" not in page


def test_the_page_sees_a_golden_output_that_is_not_its_own(grey, tmp_path):
    folder = web_folder(grey, tmp_path)
    manifest = manifest_of(folder)
    entry = manifest["golden"]["cases"][0]["outputs"][0]
    values = stored(folder, entry) + np.float32(0.01)
    (folder / entry["file"]).write_bytes(values.tobytes())
    entry["sha256"] = hashlib.sha256(values.tobytes()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest))
    page = opened(folder)
    assert 'data-check="failed"' in page, page[-3000:]
    assert "does NOT compute" in page
