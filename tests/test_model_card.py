"""`deploy --card` writes a model card that names the float model as its base."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

import ecqx_onnx
from ecqx_onnx.deployment.card import NAME, write_card
from ecqx_onnx.errors import OptionError
from tests.test_package import write_quantized_model

ROOT = Path(__file__).parents[1]


def read_head(text):
    """The YAML at the top, every value of which is JSON."""
    head = re.match(r"---\n(.*?)\n---\n", text, re.S)[1]
    fields = {}
    for line in head.splitlines():
        name, _, value = line.partition(": ")
        fields[name] = json.loads(value)
    return fields


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("card")
    write_quantized_model(place / "model-int8.onnx")
    ecqx_onnx.pack(place / "model-int8.onnx", place / "packed.onnx")
    options = {"to": "linux", "title": "one | *layer*"}
    ecqx_onnx.deploy(place / "packed.onnx", place / "out", card="owner/one-layer", **options)
    ecqx_onnx.deploy(place / "packed.onnx", place / "plain", **options)
    return place


def test_the_card_names_base_and_relation(folder):
    fields = read_head((folder / "out/MODEL_CARD.md").read_text(encoding="utf-8"))
    assert fields["base_model"] == "owner/one-layer"
    assert fields["base_model_relation"] == "quantized"
    assert "onnx" in fields["tags"]


def test_the_card_says_what_the_manifest_says(folder):
    text = (folder / "out/MODEL_CARD.md").read_text(encoding="utf-8")
    manifest = json.loads((folder / "out/manifest.json").read_text(encoding="utf-8"))
    assert f"{manifest['model']['bytes']:,} bytes" in text
    assert manifest["model"]["sha256"] in text
    assert manifest["inputs"][0]["name"] in text
    assert "\n# one \\| \\*layer\\*\n" in text  # nothing of the user's is markup


def test_without_the_option_there_is_no_card(folder):
    assert not (folder / "plain/MODEL_CARD.md").exists()


@pytest.mark.parametrize("name", ["a b", "a: b", "a\nlicense: x", "../x", "a/b/c", "-x", "a" * 200])
def test_what_is_no_name_of_a_model_is_refused(name, tmp_path):
    write_quantized_model(tmp_path / "a.onnx")
    with pytest.raises(OptionError, match="is no name of a model"):
        ecqx_onnx.deploy(tmp_path / "a.onnx", tmp_path / "out", to="linux", card=name)
    assert not (tmp_path / "out").exists()


def test_a_name_that_yaml_reads_otherwise_is_quoted():
    assert NAME.fullmatch("no")
    manifest = {
        "name": "m",
        "tool": "ecqx-onnx 0",
        "runtime": "onnxruntime",
        "bits": 4,
        "model": {"file": "model.onnx", "bytes": 10, "sha256": "0", "float32_bytes": 40},
        "accuracy": {"hits": 9, "total": 10, "share": 0.9, "low": 0.6, "high": 0.98, "data": "d"},
        "inputs": [{"name": "x", "dtype": "float32", "shape": [None, 4]}],
        "outputs": [{"name": "y", "dtype": "float32", "shape": [None, 2]}],
        "labels": ["cat", "<b>dog"],
    }
    text = write_card(manifest, "no", {"outputs": "they agree"})
    assert 'base_model: "no"' in text
    assert "90.00 % (95 %: 60.00 to 98.00), 9 of 10 samples of d" in text
    assert "\\<b\\>dog" in text
    assert "Nx4" in text
