"""Where results are to be written: nothing that the user still needs is overwritten, whatever --force says."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import onnx
import pytest
from ecqx_onnx_converters.files import replacing
from typer.testing import CliRunner

from ecqx_onnx.cli import app
from ecqx_onnx.errors import FileError
from ecqx_onnx.packing import pack
from tests.test_packing import CASES

MODELS = Path(__file__).parents[2] / "models"


def refused(*arguments):
    result = CliRunner().invoke(app, list(map(str, arguments)))
    assert result.exit_code == 2, (result.output, result.stderr, result.exception)
    message = result.stderr.strip()
    assert message.startswith("error: ")
    assert "\n" not in message
    return message


@pytest.fixture
def checkpoint(tmp_path):
    return Path(shutil.copy(MODELS / "lenet_300_100_mnist_2bit.pt", tmp_path / "model.pt"))


@pytest.mark.parametrize("command", [("convert", "{0}", "{1}"), ("report", "{0}", "-o", "{1}")])
def test_a_checkpoint_is_never_replaced_by_what_is_made_of_it(checkpoint, command):
    before = checkpoint.read_bytes()
    for same in (checkpoint, checkpoint.parent / "." / "sub" / ".." / "model.pt"):
        (checkpoint.parent / "sub").mkdir(exist_ok=True)
        message = refused(*(part.format(checkpoint, same) for part in command), "--force")
        assert "is what is read: choose another name" in message
        assert checkpoint.read_bytes() == before


def test_float_weights_are_never_replaced_by_the_checkpoint_that_is_trained_from_them(checkpoint):
    before = checkpoint.read_bytes()
    network = f"{MODELS}/lenet_300_100.py:lenet_300_100"
    message = refused("quantize", network, "--weights", checkpoint, "--data", "sklearn:digits", "--out", checkpoint, "--force")
    assert "is what is read" in message
    assert checkpoint.read_bytes() == before


@pytest.mark.parametrize("command", ["pack", "unpack"])
def test_an_onnx_file_is_never_replaced_by_its_other_storage(command, tmp_path):
    onnx.save(CASES["int8"].model, tmp_path / "original.onnx")
    pack(tmp_path / "original.onnx", tmp_path / "packed.onnx")
    file = tmp_path / ("original.onnx" if command == "pack" else "packed.onnx")
    before = file.read_bytes()
    assert "is what is read: choose another name" in refused(command, file, file, "--force")
    assert file.read_bytes() == before


@pytest.mark.parametrize("force", [(), ("--force",)])
def test_a_folder_is_called_a_folder(checkpoint, tmp_path, force):
    (tmp_path / "folder").mkdir()
    onnx.save(CASES["int8"].model, tmp_path / "original.onnx")
    for command in (("convert", checkpoint), ("pack", tmp_path / "original.onnx")):
        assert "is a folder; name a file" in refused(*command, tmp_path / "folder", *force)
    assert "is a folder; name a file" in refused("report", checkpoint, "-o", tmp_path / "folder", *force)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="POSIX only")
def test_what_is_no_regular_file_stays_what_it_is(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(FileError, match="is no regular file"), replacing(tmp_path / "pipe", force=True):
        raise AssertionError("nothing may be written")
    assert (tmp_path / "pipe").is_fifo()


@pytest.mark.parametrize("name", ["out.ort", "out.pt", "out"])
def test_no_onnx_file_gets_the_name_of_another_format(checkpoint, name, tmp_path):
    onnx.save(CASES["int8"].model, tmp_path / "original.onnx")
    pack(tmp_path / "original.onnx", tmp_path / "packed.onnx")
    for command in (("convert", checkpoint), ("pack", tmp_path / "original.onnx"), ("unpack", tmp_path / "packed.onnx")):
        assert f"loads .onnx files; name it {tmp_path / 'out.onnx'}" in refused(*command, tmp_path / name)
    assert not (tmp_path / name).exists()


def test_a_phones_file_gets_no_other_name(checkpoint, tmp_path):
    message = refused("convert", checkpoint, tmp_path / "out.onnx", "--target", "onnxruntime-mobile")
    assert f"'onnxruntime-mobile' loads .ort files; name it {tmp_path / 'out.ort'}" in message


def test_a_checkpoint_is_not_named_like_an_onnx_file(tmp_path):
    network = f"{MODELS}/lenet_300_100.py:lenet_300_100"
    message = refused("quantize", network, "--data", "no.npz", "--out", tmp_path / "out.onnx")
    assert f"is a checkpoint, not an .onnx file; name it {tmp_path / 'out.pt'}" in message


def test_a_folder_that_is_missing_is_told_before_anything_is_read(tmp_path):
    out = tmp_path / "no" / "out.onnx"
    for command in (
        ("convert", "no.pt", out),
        ("pack", "no.onnx", out),
        ("unpack", "no.onnx", out),
        ("report", "no.pt", "-o", out),
    ):
        assert f"the folder {out.parent} does not exist; create it first" in refused(*command)


@pytest.mark.parametrize("place", ["file", "file/demo"])
def test_the_demo_makes_no_folder_of_a_file(tmp_path, place):
    (tmp_path / "file").write_text("mine")
    assert "cannot be made a folder" in refused("demo", "--folder", tmp_path / place)
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("option", ["--storage", "--dequantize"])
def test_pack_knows_its_options_for_a_file_that_it_copies_too(tmp_path, option):
    onnx.save(CASES["int8"].model, tmp_path / "original.onnx")
    pack(tmp_path / "original.onnx", tmp_path / "packed.onnx")
    assert "there is no" in refused("pack", tmp_path / "packed.onnx", tmp_path / "again.onnx", option, "misspelt")
    assert not (tmp_path / "again.onnx").exists()


def test_a_folder_with_too_few_labels_is_not_deployed(checkpoint, tmp_path):
    assert CliRunner().invoke(app, ["convert", str(checkpoint), str(tmp_path / "m.onnx")]).exit_code == 0
    message = refused("deploy", tmp_path / "m.onnx", tmp_path / "web", "--to", "linux", "--labels", "cat,dog")
    assert "--labels names 2 classes, and the model tells 10 apart" in message
    assert not (tmp_path / "web").exists()
