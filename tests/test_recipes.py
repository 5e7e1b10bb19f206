"""The recipes beside the paper's networks: each runs through the command line, on folders as users
have them."""

import importlib.util
import json
import wave
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from ecqx_onnx.cli import app

ROOT = Path(__file__).parents[1]
RATE = 16_000


def save_wav(path: Path, seconds: float, seed: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    samples = np.random.default_rng(seed).integers(-9000, 9000, int(RATE * seconds)).astype("<i2")
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(RATE)
        file.writeframes(samples.tobytes())


def quantize_model(name: str, data: Path, out: Path) -> dict:
    """One epoch with the recipe; what its checkpoint says it was made with."""
    model = f"{ROOT}/models/{name}.py:{name}"
    command = [
        "quantize",
        model,
        "--recipe",
        ROOT / f"models/{name}.toml",
        "--data",
        data,
        "--out",
        out,
    ]
    few = [
        "--epochs",
        1,
        "--batch-size",
        4,
        "--refresh",
        100,
        "--validation",
        0,
        "--device",
        "cpu",
        "--quiet",
    ]
    result = CliRunner().invoke(app, [str(argument) for argument in (*command, *few)])
    assert result.exit_code == 0, (result.output, result.stderr, result.exception)
    return json.loads(torch.load(out, weights_only=True)["recipe"])


def test_every_recipe_of_the_folder_is_tested_here():
    assert sorted(path.stem for path in (ROOT / "models").glob("*.toml")) == [
        "mlp_gsc",
        "resnet18",
        "vgg16",
    ]


def arrange(source: Path, out: Path):
    spec = importlib.util.spec_from_file_location(
        "speech_commands", ROOT / "benchmarks/speech_commands.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module, module.arrange(source, out)


@pytest.fixture
def speech_commands(tmp_path):
    """A Speech Commands of 2 training and 1 test clip a word, two more words, and 10 s of noise."""
    source = tmp_path / "speech_commands"
    tested = []
    for word in (
        "yes",
        "no",
        "up",
        "down",
        "left",
        "right",
        "on",
        "off",
        "stop",
        "go",
        "bed",
        "cat",
    ):
        for voice in range(3):
            save_wav(source / word / f"voice{voice}_nohash_0.wav", 0.9, seed=voice)
        tested.append(f"{word}/voice2_nohash_0.wav")
    (source / "testing_list.txt").write_text("\n".join(tested) + "\n")
    save_wav(source / "_background_noise_" / "pink_noise.wav", 10)
    return source


def test_speech_commands_become_twelve_classes_with_other_voices_for_testing(
    speech_commands, tmp_path
):
    _, counts = arrange(speech_commands, tmp_path / "gsc12")
    assert {name: set(classes.values()) for name, classes in counts.items()} == {
        "train": {2},
        "test": {1},
    }
    for split, count in (("train", 2), ("test", 1)):
        folders = sorted((tmp_path / "gsc12" / split).iterdir())
        assert len(folders) == 12
        assert all(len(list(folder.iterdir())) == count for folder in folders)
    assert not any("voice2" in file.name for file in (tmp_path / "gsc12/train").rglob("*.wav"))
    with wave.open(str(tmp_path / "gsc12/train/_silence_/00000.wav")) as file:
        assert file.getnframes() == RATE


def test_a_folder_that_holds_something_else_is_refused_with_the_reason(tmp_path):
    with pytest.raises(ValueError, match=r"no testing_list\.txt"):
        arrange(tmp_path, tmp_path / "out")


def test_mlp_gsc_learns_from_folders_of_wavs(speech_commands, tmp_path):
    arrange(speech_commands, tmp_path / "gsc12")
    recipe = quantize_model("mlp_gsc", tmp_path / "gsc12", tmp_path / "model.pt")
    assert (recipe["bits"], recipe["relevance"], recipe["augment"]) == (
        4,
        "epsilon_plus_flat",
        "shift_audio",
    )
    converted = CliRunner().invoke(
        app, ["convert", str(tmp_path / "model.pt"), str(tmp_path / "out.onnx"), "--json"]
    )
    assert converted.exit_code == 0, converted.stderr
    assert json.loads(converted.stdout)["bytes"] == (tmp_path / "out.onnx").stat().st_size


@pytest.mark.parametrize(("name", "size"), [("vgg16", 32), ("resnet18", 60)])
def test_the_image_networks_learn_from_folders_of_images(tmp_path, name, size):
    generator = np.random.default_rng(0)
    for split, count in (("train", 2), ("test", 1)):
        for label in ("cat", "dog"):
            for index in range(count):
                path = tmp_path / "photos" / split / label / f"{index}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(generator.integers(0, 256, (size, size, 3), dtype=np.uint8)).save(
                    path
                )
    recipe = quantize_model(name, tmp_path / "photos", tmp_path / "model.pt")
    assert (recipe["bits"], recipe["relevance"], recipe["learning_rate"]) == (
        4,
        "epsilon_plus_flat",
        1e-4,
    )
