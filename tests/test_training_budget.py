"""A training that ends at a budget of bytes, and one that goes on from a compressed network."""

import json

import numpy as np
import onnxruntime
import pytest
import torch
import torch.nn as nn
from typer.testing import CliRunner

from ecqx_onnx import api, compress
from ecqx_onnx.checkpoint import load
from ecqx_onnx.cli import app
from ecqx_onnx.errors import ModelError
from ecqx_onnx.quantization import Quantizer
from ecqx_onnx.tensors import QuantTensor, Scale

torch.set_num_threads(1)

NET = """
import torch
import torch.nn as nn

INPUT_SHAPE = (16,)


def net():
    torch.manual_seed(0)
    layers = [nn.Linear(16, 96), nn.ReLU(), nn.Linear(96, 96), nn.ReLU(), nn.Linear(96, 5)]
    return nn.Sequential(*layers)
"""


def make_net():
    names: dict = {}
    exec(compile(NET, "net.py", "exec"), names)
    return names["net"]()


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A network that was trained a little, its data with and without labels."""
    folder = tmp_path_factory.mktemp("budget")
    (folder / "net.py").write_text(NET)
    draw = np.random.default_rng(0)
    centers = draw.normal(size=(5, 16))
    y = draw.integers(0, 5, 512)
    x = (centers[y] + draw.normal(size=(512, 16))).astype(np.float32)
    np.savez(folder / "labeled.npz", x=x, y=y)
    np.savez(folder / "bare.npz", x=x)
    model = make_net()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(torch.from_numpy(x)), torch.from_numpy(y)).backward()
        optimizer.step()
    torch.save(model.state_dict(), folder / "float.pt")
    return folder


def run(place, *typed, code=0):
    options = ["net.py:net", "--weights", "float.pt", *typed]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        result = CliRunner().invoke(app, ["quantize", *options])
    assert result.exit_code == code, result.output + result.stderr
    return result


@pytest.mark.parametrize("limit", [5000, pytest.param(6500, marks=pytest.mark.slow)])
def test_the_written_file_ends_within_two_percent_below_the_budget(place, tmp_path, limit):
    out = tmp_path / "q.pt"
    typed = ["--data", "labeled.npz", "--epochs", "4", "--relevance", "none", "--json"]
    result = run(place, *typed, "--max-bytes", str(limit), "--out", str(out))
    api.convert(out, tmp_path / "q.onnx")
    size = (tmp_path / "q.onnx").stat().st_size
    assert 0.98 * limit <= size <= limit
    report = json.loads(result.stdout)
    assert report["best_epoch"] == 4
    assert any(f"--max-bytes {limit}" in note for note in report["notes"])


def test_bits_per_weight_are_a_budget_of_the_coded_levels(place, tmp_path):
    typed = ["--data", "labeled.npz", "--epochs", "3", "--bits-per-weight", "1.6"]
    result = run(place, *typed, "--out", str(tmp_path / "q.pt"), "--json")
    note = next(n for n in json.loads(result.stdout)["notes"] if "--bits-per-weight" in n)
    assert 0.98 * 1.6 <= float(note.split()[0]) <= 1.6


@pytest.mark.parametrize(
    ("typed", "words"),
    [
        (["--max-bytes", "900"], "cannot be reached"),
        (["--max-bytes", "many"], "no number of bytes"),
        (["--max-bytes", "9k", "--bits-per-weight", "2"], "two budgets"),
        (["--max-bytes", "9k", "--epochs", "0"], "0 epochs train nothing"),
        (["--from", "float.pt"], "float.pt"),
        (["--from", "nothing.pt"], "nothing.pt"),
    ],
)
def test_budgets_and_starts_that_make_no_sense_are_one_sentence(place, tmp_path, typed, words):
    out = tmp_path / "q.pt"
    result = run(place, "--data", "labeled.npz", "--out", str(out), *typed, code=2)
    said = " ".join(result.stderr.split())
    assert words in said
    assert "Traceback" not in said
    assert not out.exists()


@pytest.mark.slow
def test_a_resumed_training_to_a_budget_gives_the_same_bytes(place, tmp_path, monkeypatch):
    from ecqx_onnx.quantization.training import run as run_module

    typed = ["--data", "labeled.npz", "--epochs", "3", "--max-bytes", "8k", "--relevance", "none"]
    whole, halved = tmp_path / "whole.pt", tmp_path / "halved.pt"
    run(place, *typed, "--out", str(whole))
    train_epoch = run_module.TrainingRun.train_epoch

    def stop_in_the_second(self, split, held_out):
        if len(self.history) == 1:
            raise KeyboardInterrupt
        train_epoch(self, split, held_out)

    monkeypatch.setattr(run_module.TrainingRun, "train_epoch", stop_in_the_second)
    run(place, *typed, "--out", str(halved), code=130)
    monkeypatch.undo()
    run(place, *typed, "--out", str(halved), "--resume")
    tensors = [load(path).tensors for path in (whole, halved)]
    for one, other in zip(*tensors, strict=True):
        assert np.array_equal(one.levels, other.levels)
        assert np.array_equal(one.meaning.step, other.meaning.step)


@pytest.mark.slow
def test_following_the_float_network_improves_a_compressed_one_at_equal_bytes(place, tmp_path):
    model = make_net()
    model.load_state_dict(torch.load(place / "float.pt"))
    x = np.load(place / "bare.npz")["x"]
    limit = 4700
    compressed = compress(
        model.eval(),
        tmp_path / "c.onnx",
        data=x,
        example=torch.from_numpy(x[:2]),
        max_bytes=limit,
        checkpoint=tmp_path / "c.pt",
    )
    assert compressed.ok
    typed = ["--from", str(tmp_path / "c.pt"), "--data", "bare.npz", "--loss", "distillation"]
    typed += ["--max-bytes", str(limit), "--epochs", "20", "--metric", "error"]
    typed += ["--lr", "0.0005"]
    run(place, *typed, "--out", str(tmp_path / "q.pt"))
    api.convert(tmp_path / "q.pt", tmp_path / "q.onnx")
    assert (tmp_path / "q.onnx").stat().st_size <= limit
    wanted = model(torch.from_numpy(x)).detach().numpy()

    def measure_error(path):
        session = onnxruntime.InferenceSession(path)
        found = session.run(None, {session.get_inputs()[0].name: x})[0]
        return np.linalg.norm(found - wanted) / np.linalg.norm(wanted)

    assert measure_error(tmp_path / "q.onnx") < 0.9 * measure_error(tmp_path / "c.onnx")


def test_a_quantizer_adopts_levels_and_steps_by_channel():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    quantizer = Quantizer(model, relevance=None, entropy_weight=0.0)
    levels = np.array([[1, -20, 3], [0, 0, 9], [5, 5, 5], [-9, 1, 0]], np.int8)
    step = np.array([[0.1], [0.2], [0.3], [0.4]], np.float32)
    quantizer.adopt([QuantTensor("0.weight", levels, Scale(step))])
    assert np.array_equal(model[0].weight.detach().numpy(), levels * step)
    assert np.array_equal(quantizer.tensors()[0].levels, levels)
    with pytest.raises(ModelError, match="start from a checkpoint of the same network"):
        quantizer.adopt([QuantTensor("9.weight", levels, Scale(step))])
