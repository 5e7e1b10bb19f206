"""Command lines that are wrong in a likely way: options that would be ignored, files of another
kind."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from typer.testing import CliRunner

from ecqx_onnx import api
from ecqx_onnx.cli import app
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
    assert f"{option[0]} goes with --bits" in refused(
        "convert", CHECKPOINT, tmp_path / "out.onnx", *option
    )


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


def test_a_flipped_byte_of_a_weight_is_told(tmp_path):
    """torch.load does not look at the checksums that torch.save writes."""
    content = bytearray(CHECKPOINT.read_bytes())
    with zipfile.ZipFile(CHECKPOINT) as members:
        largest = max(members.infolist(), key=lambda member: member.file_size)
    content[largest.header_offset + largest.file_size // 2] ^= 1
    (tmp_path / "model.pt").write_bytes(content)
    for command in (
        ("convert", tmp_path / "model.pt", tmp_path / "out.onnx"),
        ("inspect", tmp_path / "model.pt"),
    ):
        assert "is damaged: its part" in refused(*command)


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
    assert (
        "is not an ONNX model but a zip archive, as PyTorch's files are; give an .onnx file"
        in message
    )


def test_an_onnx_file_where_a_torch_file_belongs_is_told(tmp_path):
    (tmp_path / "model.onnx").write_bytes(b"\x08\x0a")
    for command in (
        ("report", tmp_path / "model.onnx", "-o", tmp_path / "r.html"),
        (
            "quantize",
            NETWORK,
            "--weights",
            tmp_path / "model.onnx",
            "--data",
            "sklearn:digits",
            "--out",
            tmp_path / "m.pt",
        ),
    ):
        assert "is an .onnx file where a PyTorch model is needed" in refused(*command)
    said = refused("convert", tmp_path / "model.onnx", tmp_path / "out.onnx", "--trust-pickle")
    assert "is an .onnx file" in said


def test_inputs_that_are_no_npz_are_told_without_numpys_advice(tmp_path):
    torch.save({}, tmp_path / "x.pt")
    (tmp_path / "x.txt").write_text("hello")
    np.save(tmp_path / "x.npy", np.zeros(3))
    np.savez(tmp_path / "objects.npz", x=np.array([{}], dtype=object))
    onnx.save(CASES["int8"].model, tmp_path / "a.onnx")
    for name in ("x.txt", "x.npy", "x.pt", "objects.npz", "missing.npz"):
        message = refused(
            "pack", tmp_path / "a.onnx", tmp_path / "out.onnx", "--inputs", tmp_path / name
        )
        assert "as an .npz of the model's inputs" in message
        assert "allow_pickle" not in message
        assert "attribute" not in message
    assert not (tmp_path / "out.onnx").exists()


def save_program(file):
    class Relu(torch.nn.Module):
        def forward(self, x):
            return x.relu()

    torch.export.save(torch.export.export(Relu(), (torch.zeros(2, 3),)), file)
    return file


def test_a_program_where_a_state_dict_belongs_is_called_one(tmp_path):
    program = save_program(tmp_path / "model.pt2")
    train = (
        "quantize",
        NETWORK,
        "--weights",
        program,
        "--data",
        "sklearn:digits",
        "--out",
        tmp_path / "m.pt",
    )
    for command in (train, ("inspect", program), ("report", program, "-o", tmp_path / "r.html")):
        assert "is a .pt2 program, where a checkpoint or state dict is needed" in refused(*command)


def test_a_checkpoint_where_a_state_dict_belongs_is_called_one(tmp_path):
    np.savez(tmp_path / "d.npz", x=np.zeros((4, 28, 28), np.uint8), y=np.arange(4))
    train = (
        "quantize",
        NETWORK,
        "--weights",
        CHECKPOINT,
        "--data",
        tmp_path / "d.npz",
        "--out",
        tmp_path / "m.pt",
    )
    for command in (train, ("convert", CHECKPOINT, tmp_path / "out.onnx", "--model", NETWORK)):
        assert (
            "is a checkpoint of ecqx-onnx, quantised already and with its network in it"
            in refused(*command)
        )


def test_what_is_no_state_dict_is_not_sent_for_a_network(tmp_path):
    torch.save({"losses": [1.0, 2.0]}, tmp_path / "log.pt")
    assert "holds no state dict" in refused("convert", tmp_path / "log.pt", tmp_path / "out.onnx")


def test_what_inspect_and_report_cannot_take_names_no_option_that_they_lack(tmp_path):
    torch.save({"weight": torch.zeros(2, 2)}, tmp_path / "float.pt")
    for command in (("inspect",), ("report", "-o", tmp_path / "r.html")):
        message = refused(*command, tmp_path / "float.pt")
        assert "is no checkpoint of ecqx-onnx; give what `ecqx-onnx quantize` or" in message
        assert "--model" not in message


def test_a_model_without_weights_is_not_advised_to_quantise_them(tmp_path):
    program = save_program(tmp_path / "model.pt2")
    for bits in ((), ("--bits", 4)):
        assert "no weight of two or more dimensions" in refused(
            "convert", program, tmp_path / "out.onnx", *bits
        )


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("nosuch*", "--exclude 'nosuch*' matches no parameter"),
        ("*", "--exclude * leaves no weight to quantise"),
    ],
)
def test_a_pattern_that_excludes_nothing_or_everything_is_told(tmp_path, pattern, words):
    (tmp_path / "net.py").write_text(
        "import torch\nINPUT_SHAPE = (4,)\ndef net(): return torch.nn.Linear(4, 3)\n"
    )
    torch.save(torch.nn.Linear(4, 3).state_dict(), tmp_path / "float.pt")
    command = (
        "convert",
        tmp_path / "float.pt",
        tmp_path / "out.onnx",
        "--model",
        f"{tmp_path}/net.py:net",
        "--bits",
        4,
    )
    assert words in refused(*command, "--exclude", pattern)
    assert not (tmp_path / "out.onnx").exists()


@pytest.mark.parametrize("option", [("--exclude", "nosuch*"), ("--bits", "*=4,nosuch*=2")])
def test_a_pattern_without_a_parameter_is_told_before_training(tmp_path, option):
    command = (
        "quantize",
        NETWORK,
        "--data",
        "sklearn:digits",
        "--out",
        tmp_path / "m.pt",
        "--epochs",
        100000,
    )
    assert f"{option[0]} 'nosuch*' matches no parameter; the first is '" in refused(
        *command, *option
    )
    assert not list(tmp_path.iterdir())


def test_an_input_shape_for_what_has_one_is_refused(tmp_path):
    assert "leave --input-shape out" in refused(
        "convert", CHECKPOINT, tmp_path / "out.onnx", "--input-shape", "1,2,3"
    )
    program = save_program(tmp_path / "model.pt2")
    assert "leave --input-shape out" in refused(
        "convert", program, tmp_path / "out.onnx", "--bits", 4, "--input-shape", 3
    )


@pytest.mark.parametrize(
    "code", ["import sys\nsys.exit(3)\ndef net(): pass\n", "def net(): raise SystemExit(3)\n"]
)
def test_a_script_that_ends_the_program_is_told(tmp_path, code):
    (tmp_path / "script.py").write_text(code)
    torch.save({"weight": torch.zeros(2, 2)}, tmp_path / "float.pt")
    assert "SystemExit: 3" in refused(
        "convert",
        tmp_path / "float.pt",
        tmp_path / "o.onnx",
        "--model",
        f"{tmp_path}/script.py:net",
    )


def test_a_file_beside_itself_proves_nothing(tmp_path):
    onnx.save(CASES["int8"].model, tmp_path / "a.onnx")
    message = refused("validate", tmp_path / "a.onnx", "--against", tmp_path / "." / "a.onnx")
    assert "is the file itself, which proves nothing; give what it was made from" in message


def test_an_npz_of_other_names_is_told_which_it_has(tmp_path):
    np.savez(tmp_path / "d.npz", images=np.zeros((4, 28, 28)), targets=np.arange(4))
    message = refused("quantize", NETWORK, "--data", tmp_path / "d.npz", "--out", tmp_path / "m.pt")
    assert "has no 'x', and no arrays named as the network's inputs x (found: images, targets)" in (
        message
    )


def test_a_missing_recipe_is_told_without_a_number(tmp_path):
    result = CliRunner().invoke(
        app, ["quantize", NETWORK, "--data", "d.npz", "--out", "m.pt", "--recipe", "no.toml"]
    )
    assert result.exit_code == 2
    assert "Errno" not in result.stderr
    assert "no.toml is no recipe" in result.stderr


def test_with_json_stdout_holds_nothing_else_even_if_the_users_code_prints(tmp_path):
    code = (
        "import torch\nprint('hello')\nINPUT_SHAPE = 40,\ndef net():\n  print('building')\n  "
        "return torch.nn.Linear(40, 30)\n"
    )
    (tmp_path / "net.py").write_text(code)
    torch.save(torch.nn.Linear(40, 30).state_dict(), tmp_path / "float.pt")
    command = [
        "convert",
        f"{tmp_path}/float.pt",
        f"{tmp_path}/out.onnx",
        "--model",
        f"{tmp_path}/net.py:net",
        "--bits",
        "4",
    ]
    result = CliRunner().invoke(app, [*command, "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)
    assert "hello" in result.stderr
    assert "building" in result.stderr


@pytest.mark.skipif(
    not Path("/dev/full").exists(), reason="a disk that is full is played by Linux's /dev/full"
)
@pytest.mark.parametrize("option", [[], ["--json"]])
def test_a_full_disk_behind_stdout_is_told(option):
    command = [sys.executable, "-m", "ecqx_onnx", "inspect", str(CHECKPOINT), *option]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2
    assert done.stderr == (
        "error: the result can't be written to standard output: No space left on device; what "
        "it tells of is done\n"
    )


def test_every_refusal_is_one_line_on_stderr_and_nothing_on_stdout(tmp_path):
    result = CliRunner().invoke(
        app, ["convert", str(Path("no") / "model.pt"), str(tmp_path / "out.onnx"), "--json"]
    )
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
