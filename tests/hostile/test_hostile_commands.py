"""Command lines that are wrong in a likely way: options that would be ignored, files of another kind."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from ecqx_onnx import api
from ecqx_onnx.errors import OptionError
from tests.hostile.test_hostile_outputs import MODELS, refused
from tests.test_packing import CASES

CHECKPOINT = MODELS / "lenet_300_100_mnist_2bit.pt"
NETWORK = f"{MODELS}/lenet_300_100.py:lenet_300_100"


def test_bits_for_a_checkpoint_that_has_them_are_refused(tmp_path):
    message = refused("convert", CHECKPOINT, tmp_path / "out.onnx", "--bits", 3)
    assert "quantised already, which --bits 3 can't do again; leave it out" in message
    with pytest.raises(OptionError, match="quantised already"):
        api.convert(api.as_checkpoint(CHECKPOINT), tmp_path / "out.onnx", bits=3)


@pytest.mark.parametrize("option", [("--entropy-weight", "0.1"), ("--exclude", "*.bias")])
def test_options_of_a_quantisation_without_bits_are_refused(tmp_path, option):
    assert f"{option[0]} goes with --bits" in refused("convert", CHECKPOINT, tmp_path / "out.onnx", *option)


@pytest.mark.parametrize("model", [NETWORK, NETWORK.partition(":")[0]])
def test_code_in_place_of_weights_is_told_where_code_goes(tmp_path, model):
    message = refused("convert", model, tmp_path / "out.onnx", "--bits", 4)
    assert "is Python code" in message
    assert "--model FILE.py:FACTORY" in message


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty"),
        (b"hello\n", "was not written by torch.save; save it again"),
        (CHECKPOINT.read_bytes()[:3000], "was not written by torch.save"),
    ],
)
def test_a_file_that_torch_cannot_read_is_told_without_torchs_inside(tmp_path, content, words):
    (tmp_path / "model.pt").write_bytes(content)
    message = refused("convert", tmp_path / "model.pt", tmp_path / "out.onnx")
    assert words in message
    assert not any(inside in message for inside in ("Error", "Pytorch", "[", " )"))


def test_an_npz_is_no_checkpoint(tmp_path):
    np.savez(tmp_path / "data.npz", x=np.zeros(3))
    message = refused("inspect", tmp_path / "data.npz")
    assert "was not written by torch.save" in message
    assert "enforce fail" not in message


@pytest.mark.parametrize(
    "arguments",
    [
        ("pack", CHECKPOINT, "{}/out.onnx"),
        ("validate", CHECKPOINT, "--against", CHECKPOINT),
        ("unpack", CHECKPOINT, "{}/out.onnx"),
    ],
)
def test_a_torch_file_where_an_onnx_file_belongs_is_told(tmp_path, arguments):
    message = refused(*(str(argument).format(tmp_path) for argument in arguments))
    assert "is not an ONNX model but a zip archive, as PyTorch's files are; give an .onnx file" in message


def test_an_onnx_file_where_a_torch_file_belongs_is_told(tmp_path):
    (tmp_path / "model.onnx").write_bytes(b"\x08\x0a")
    for command in (
        ("report", tmp_path / "model.onnx", "-o", tmp_path / "r.html"),
        ("convert", tmp_path / "model.onnx", tmp_path / "out.onnx", "--trust-pickle"),
        ("quantize", NETWORK, "--weights", tmp_path / "model.onnx", "--data", "sklearn:digits", "--out", tmp_path / "m.pt"),
    ):
        assert "is an .onnx file where a PyTorch model is needed" in refused(*command)


def test_inputs_that_are_no_npz_are_told_without_numpys_advice(tmp_path):
    torch.save({}, tmp_path / "x.pt")
    (tmp_path / "x.txt").write_text("hello")
    np.save(tmp_path / "x.npy", np.zeros(3))
    np.savez(tmp_path / "objects.npz", x=np.array([{}], dtype=object))
    onnx.save(CASES["int8"].model, tmp_path / "a.onnx")
    for name in ("x.txt", "x.npy", "x.pt", "objects.npz", "missing.npz"):
        message = refused("pack", tmp_path / "a.onnx", tmp_path / "out.onnx", "--inputs", tmp_path / name)
        assert "as an .npz of the model's inputs" in message
        assert "allow_pickle" not in message
        assert "attribute" not in message
    assert not (tmp_path / "out.onnx").exists()


def test_every_refusal_is_one_line_on_stderr_and_nothing_on_stdout(tmp_path):
    from typer.testing import CliRunner

    from ecqx_onnx.cli import app

    result = CliRunner().invoke(app, ["convert", str(Path("no") / "model.pt"), str(tmp_path / "out.onnx"), "--json"])
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
