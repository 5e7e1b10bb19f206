"""The real command line, end to end on real (small) data, and what it promises about itself."""

import json
import subprocess
import sys
import time
from pathlib import Path

import onnx
import pytest
import torch
from typer.testing import CliRunner

from ecqx_onnx.cli import app

ROOT = Path(__file__).parents[1]
MODEL = f"{ROOT}/models/digits_cnn.py:digits_cnn"
COMMANDS = ("quantize", "convert", "validate", "inspect", "demo")


def run(*arguments, code=0):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, (
        result.exit_code,
        result.output,
        result.stderr,
        result.exception,
    )
    return result


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    pytest.importorskip("sklearn", reason="scikit-learn brings the digits")
    path = tmp_path_factory.mktemp("cli") / "model.pt"
    result = run(
        *(
            "quantize",
            MODEL,
            "--data",
            "sklearn:digits",
            "--bits",
            3,
            "--entropy-weight",
            0.3,
            "--epochs",
            2,
            "--out",
            path,
            "--json",
        )
    )
    return path, json.loads(result.stdout)


def test_the_three_commands_give_a_file_that_says_the_same(checkpoint, tmp_path):
    path, trained = checkpoint
    out = tmp_path / "out.onnx"
    written = json.loads(run("convert", path, out, "--json").stdout)
    assert written["bytes"] == out.stat().st_size
    assert {row["storage"].split()[0].strip(",") for row in written["tensors"]} <= {
        "dense",
        "sparse",
        "packed",
    }
    report = json.loads(
        run("validate", out, "--against", path, "--data", "sklearn:digits", "--json").stdout
    )
    assert report["ok"]
    assert report["agreement"]["share"] == 1.0
    assert report["onnx_accuracy"]["hits"] == trained["accuracy"]["hits"]
    assert json.loads(run("inspect", out, "--json").stdout)["tensors"]


@pytest.mark.parametrize(
    "options",
    [
        ["--storage", "sparse"],
        ["--dequantize", "standard"],
        ["--target", "qdq"],
        ["--target", "onnxruntime-1.17"],
    ],
)
def test_every_form_of_the_file_says_the_same(checkpoint, tmp_path, options):
    out = tmp_path / "out.onnx"
    run("convert", checkpoint[0], out, *options, "--quiet")
    run(
        "validate",
        out,
        "--against",
        checkpoint[0],
        "--data",
        "sklearn:digits",
        "--samples",
        50,
        "--quiet",
    )


def test_the_same_checkpoint_gives_the_same_bytes(checkpoint, tmp_path):
    for name in ("a.onnx", "b.onnx"):
        run("convert", checkpoint[0], tmp_path / name)
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()


def test_training_again_with_the_same_seed_gives_the_same_levels(checkpoint, tmp_path):
    again = tmp_path / "again.pt"
    run(
        "quantize",
        MODEL,
        "--data",
        "sklearn:digits",
        "--bits",
        3,
        "--entropy-weight",
        0.3,
        "--epochs",
        2,
        "--out",
        again,
        "-q",
    )
    first, second = (
        torch.load(path, weights_only=True)["tensors"] for path in (checkpoint[0], again)
    )
    assert all(
        torch.equal(a["levels"], b["levels"]) and torch.equal(a["step"], b["step"])
        for a, b in zip(first, second, strict=True)
    )


def test_plain_ecq_and_assignment_without_training_are_options(tmp_path):
    out = tmp_path / "model.pt"
    result = run(
        "quantize",
        MODEL,
        "--data",
        "sklearn:digits",
        "--relevance",
        "none",
        "--epochs",
        0,
        "--out",
        out,
        "--json",
    )
    assert json.loads(result.stdout)["history"] == []


def test_a_float_state_dict_can_be_quantised_without_training_and_compared_with_itself(tmp_path):
    from ecqx_onnx.demo.model import digits_cnn

    torch.manual_seed(0)
    torch.save(digits_cnn().state_dict(), tmp_path / "float.pt")
    model = ("--model", MODEL)
    run("convert", tmp_path / "float.pt", tmp_path / "out.onnx", *model, "--bits", 4)
    arguments = ("--against", tmp_path / "float.pt", *model, "--data", "sklearn:digits", "--json")
    arguments = (
        *arguments,
        "--min-agreement",
        10,
    )  # a network that was never trained has no classes to keep
    checks = {
        check["name"]: check
        for check in json.loads(run("validate", tmp_path / "out.onnx", *arguments).stdout)["checks"]
    }
    assert checks["outputs"]["passed"] is None
    assert "is float" in checks["outputs"]["sentence"]
    assert checks["outputs"]["measured"] > 1e-3  # quantisation, not rounding
    assert checks["accuracy"]["passed"] is True


def test_a_pt2_program_and_a_trusted_pickle_convert_as_well(tmp_path):
    from ecqx_onnx.demo.model import INPUT_SHAPE, digits_cnn

    torch.manual_seed(0)
    model = digits_cnn().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.copy_((parameter / 0.05).round() * 0.05)
    example = torch.zeros(2, *INPUT_SHAPE)
    torch.export.save(torch.export.export(model, (example,)), tmp_path / "model.pt2")
    torch.save(model, tmp_path / "pickled.pt")
    run("convert", tmp_path / "model.pt2", tmp_path / "a.onnx")
    run("validate", tmp_path / "a.onnx", "--against", tmp_path / "model.pt2", "-q")
    assert (
        "--trust-pickle"
        in run("convert", tmp_path / "pickled.pt", tmp_path / "b.onnx", code=2).stderr
    )
    shape = ("--input-shape", ",".join(map(str, INPUT_SHAPE)))
    run("convert", tmp_path / "pickled.pt", tmp_path / "b.onnx", "--trust-pickle", *shape)


def test_a_failed_check_exits_1_and_says_which(checkpoint, tmp_path):
    out = tmp_path / "out.onnx"
    run("convert", checkpoint[0], out)
    model = onnx.load(out)
    bias = next(
        t
        for t in model.graph.initializer
        if t.data_type == onnx.TensorProto.FLOAT and list(t.dims) == [10]
    )
    bias.raw_data = bytes(len(bias.raw_data))
    onnx.save(model, out)
    assert (
        "outputs"
        in run(
            "validate", out, "--against", checkpoint[0], "--data", "sklearn:digits", "-q", code=1
        ).stderr
    )


def test_the_checkpoint_and_the_file_hold_no_path_of_this_machine(checkpoint, tmp_path):
    run("convert", checkpoint[0], tmp_path / "out.onnx")
    for path in (checkpoint[0], tmp_path / "out.onnx"):
        assert str(ROOT).encode() not in path.read_bytes()
        assert b"site-packages" not in path.read_bytes()


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example_json_and_quiet(command):
    text = run(command, "--help").output
    assert f"ecqx-onnx {command}" in text
    assert "Example" in text
    assert "--json" in text
    assert "--quiet" in text


def test_help_loads_neither_torch_nor_onnx():
    code = (
        "import sys; from ecqx_onnx.cli import app; sys.exit(any(m in sys.modules for m in "
        "('torch', 'onnx', 'onnxruntime', 'numpy')))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


@pytest.mark.slow
def test_help_takes_less_than_half_a_second():
    times = []
    for _ in range(5):
        start = time.perf_counter()
        subprocess.run(
            [sys.executable, "-m", "ecqx_onnx", "--help"], cwd=ROOT, check=True, capture_output=True
        )
        times.append(time.perf_counter() - start)
    assert min(times) < 0.5
