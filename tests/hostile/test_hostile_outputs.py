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


def test_pack_gives_no_onnx_file_the_name_of_another_format(tmp_path):
    onnx.save(CASES["int8"].model, tmp_path / "original.onnx")
    assert "pack writes .onnx files; name it" in refused("pack", tmp_path / "original.onnx", tmp_path / "out.ort")
