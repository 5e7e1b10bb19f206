"""Losses, metrics and data of tasks beyond one class a sample, through the real command."""

import json
import math

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from ecqx_onnx.cli import app
from ecqx_onnx.data.dataset import Dataset
from ecqx_onnx.data.task import TaskData, load_training_data
from ecqx_onnx.errors import DataError, ModelError, OptionError
from ecqx_onnx.quantization import Quantizer
from ecqx_onnx.quantization.objectives import losses, metrics
from ecqx_onnx.quantization.objectives.objective import Score, choose_objective
from ecqx_onnx.quantization.objectives.values import find_scores
from ecqx_onnx.quantization.relevance.relevance import start_relevance

torch.set_num_threads(1)

NETS = '''
from dataclasses import dataclass

import torch
import torch.nn as nn


class Regressor(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 24), nn.ReLU(), nn.Linear(24, 1))

    def forward(self, x):
        return self.body(x)


class Segmenter(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 3, 3, padding=1)
        )

    def forward(self, x):
        return {"out": self.body(x)}


class Tokens(nn.Module):
    """Scores for each position, the classes last, as language models have them."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(11, 16)
        self.head = nn.Linear(16, 11)

    def forward(self, ids):
        return self.head(torch.relu(self.table(ids)))


@dataclass
class Answer:
    match: torch.Tensor
    first: torch.Tensor


class Pairs(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Linear(6, 12)

    def forward(self, left, right):
        a, b = self.body(left), self.body(right)
        return (a * b).mean(1), a


def regressor():
    torch.manual_seed(1)
    return Regressor()


def segmenter():
    torch.manual_seed(1)
    return Segmenter()


def tokens():
    torch.manual_seed(1)
    return Tokens()


def pairs():
    torch.manual_seed(1)
    return Pairs()


def follow_match(output, target):
    return (output[0] - target) ** 2


def closeness(output, target):
    return -(output[0] - target).abs()


def fail(output, target):
    raise ValueError("my own fault")
'''


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Networks, their weights, and data for each of them."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nets.py").write_text(NETS)
    names: dict = {}
    exec(compile(NETS, "nets.py", "exec"), names)
    for name in ("regressor", "segmenter", "tokens", "pairs"):
        torch.save(names[name]().state_dict(), f"{name}.pt")
    draw = np.random.default_rng(0)
    x = draw.normal(size=(96, 6)).astype(np.float32)
    np.savez("values.npz", x=x, y=(x[:, 0] - x[:, 1]).astype(np.float32))
    images = draw.normal(size=(64, 1, 8, 8)).astype(np.float32)
    np.savez("masks.npz", x=images, y=(images[:, 0] > 0).astype(np.int64))
    ids = draw.integers(0, 11, (64, 7))
    following = np.roll(ids, -1, 1)
    following[:, -1] = -100
    np.savez("text.npz", ids=ids, y=following)
    np.savez(
        "pairs.npz",
        left=draw.normal(size=(64, 6)).astype(np.float32),
        right=draw.normal(size=(64, 6)).astype(np.float32),
        targets=draw.normal(size=64),
    )
    np.savez("bare.npz", x=x)
    return tmp_path


def run(*typed, code=0):
    result = CliRunner().invoke(app, ["quantize", *typed, "--epochs", "2", "--batch-size", "16"])
    assert result.exit_code == code, result.output + result.stderr
    return result


TASKS = {
    "regression": ("regressor", "values.npz", ["--loss", "mse"], "mse"),
    "absolute error": ("regressor", "values.npz", ["--loss", "l1", "--metric", "mse"], "mse"),
    "segmentation": ("segmenter", "masks.npz", ["--loss", "dice"], "dice"),
    "classes of pixels": ("segmenter", "masks.npz", ["--metric", "iou"], "iou"),
    "next token": ("tokens", "text.npz", [], "accuracy"),
    "several inputs, own loss": (
        "pairs",
        "pairs.npz",
        ["--loss", "nets.py:follow_match", "--metric", "nets.py:closeness"],
        "closeness",
    ),
    "no targets": ("regressor", "bare.npz", [], "cosine"),
    "no targets, cosine": ("segmenter", "masks.npz", ["--loss", "distillation"], "cosine"),
}


@pytest.mark.parametrize("task", TASKS)
def test_every_kind_of_task_is_trained_with_default_relevances_and_converted(place, task):
    factory, data, options, metric = TASKS[task]
    result = run(
        f"nets.py:{factory}",
        *("--weights", f"{factory}.pt", "--data", data, "--out", "q.pt", "--json"),
        *options,
    )
    report = json.loads(result.stdout)
    assert report["score"]["metric"] == metric
    assert math.isfinite(report["score"]["value"])
    assert not any("relevance" in warning for warning in report["warnings"]), report["warnings"]
    converted = CliRunner().invoke(app, ["convert", "q.pt", "q.onnx"])
    assert converted.exit_code == 0, converted.output
    validated = CliRunner().invoke(app, ["validate", "q.onnx", "--against", "q.pt"])
    assert validated.exit_code == 0, validated.output


def test_a_regression_learns_and_its_best_epoch_has_the_smallest_error(place):
    typed = ["nets.py:regressor", "--data", "values.npz", "--out", "q.pt", "--json"]
    typed += ["--loss", "mse", "--lr", "0.01", "--epochs", "12", "--batch-size", "8"]
    result = CliRunner().invoke(app, ["quantize", *typed])
    report = json.loads(result.stdout)
    errors = [row["validation_accuracy"] for row in report["history"]]
    assert report["best_epoch"] - 1 == max(i for i, e in enumerate(errors) if e == min(errors))
    assert report["score"]["value"] < 1.0  # the targets' variance is 2


@pytest.mark.parametrize(
    ("typed", "words"),
    [
        (["nets.py:regressor", "--data", "values.npz"], "choose --loss mse or l1"),
        (["nets.py:regressor", "--data", "bare.npz"], "give its --weights"),
        (["nets.py:regressor", "--data", "values.npz", "--loss", "mes"], "loss 'mes' is unknown"),
        (["nets.py:regressor", "--data", "values.npz", "--loss", "mse", "--metric", "f1"], "f1"),
        (["nets.py:regressor", "--data", "values.npz", "--loss", "bce"], "from 0 to 1"),
        (["nets.py:regressor", "--data", "values.npz", "--loss", "nets.py:fail"], "my own fault"),
        (
            ["nets.py:regressor", "--data=values.npz", "--loss=mse", "--metric", "nets.py:fail"],
            "the metric fail cannot judge the model's output (my own fault)",
        ),
        (["nets.py:tokens", "--data", "bare.npz", "--weights", "tokens.pt"], "does not go through"),
        (
            ["nets.py:regressor", "--data", "bare.npz", "--weights=regressor.pt", "--metric=mse"],
            "needs targets",
        ),
        (["nets.py:segmenter", "--data", "masks.npz", "--loss", "mse"], "do not fit"),
    ],
)
def test_what_cannot_be_trained_is_one_sentence_and_status_2(place, typed, words):
    result = run(*typed, "--out", "q.pt", code=2)
    said = " ".join(result.stderr.split())
    assert words in said
    assert "Traceback" not in said
    assert not (place / "q.pt").exists()


def test_values_of_one_column_are_not_broadcast_against_a_row():
    scores, target = torch.randn(5, 1), torch.randn(5)
    assert torch.equal(losses.mse(scores, target), F.mse_loss(scores[:, 0], target))
    with pytest.raises(DataError, match="do not fit"):
        losses.mse(torch.randn(5, 2), target)


def test_cross_entropy_takes_the_classes_second_or_last_and_leaves_padding_out():
    scores, target = torch.randn(4, 7, 5), torch.randint(0, 5, (4, 7))
    target[:, -2:] = -100
    kept = F.cross_entropy(scores[:, :-2].reshape(-1, 5), target[:, :-2].reshape(-1))
    assert torch.allclose(losses.cross_entropy(scores, target), kept)
    assert torch.allclose(losses.cross_entropy(scores.movedim(2, 1), target), kept)
    right = (scores.argmax(2) == target)[:, :-2].float().mean(1)
    assert torch.allclose(metrics.measure_accuracy(scores, target).float(), right)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 4), st.integers(2, 6))
def test_dice_and_iou_equal_counting_by_hand(seed, classes, length):
    torch.manual_seed(seed)
    scores = torch.randn(3, classes, length) if classes > 1 else torch.randn(3, length)
    target = torch.randint(0, max(2, classes), (3, length))
    dice, iou = metrics.measure_dice(scores, target), metrics.measure_iou(scores, target)
    for n in range(3):
        shares, unions = [], []
        for c in range(classes):
            found = (scores[n].argmax(0) == c) if classes > 1 else scores[n] > 0
            wanted = target[n] == (c if classes > 1 else 1)
            both = int((found & wanted).sum())
            sizes = int(found.sum()) + int(wanted.sum())
            shares.append(2 * both / sizes if sizes else 1.0)
            if sizes - both:
                unions.append(both / (sizes - both))
        assert float(dice[n]) == pytest.approx(sum(shares) / classes, abs=1e-5)
        assert float(iou[n]) == pytest.approx(sum(unions) / max(1, len(unions)), abs=1e-5)


def test_following_is_nothing_at_the_float_networks_own_outputs():
    output = {"a": torch.randn(4, 3), "b": torch.randn(4, 2, 2)}
    for by in ("mse", "cosine"):
        assert float(losses.follow(output, output, by=by)) == pytest.approx(0, abs=1e-6)
    assert float(losses.follow(output["a"], output["a"], by="logits")) == pytest.approx(0, abs=1e-6)


def test_the_share_of_distillation_is_a_weighted_mean():
    objective = choose_objective(
        "mse", None, distillation=0.25, distill_by="mse", temperature=1.0, has_targets=True
    )
    output, target, wanted = torch.randn(6, 2), torch.randn(6, 2), torch.randn(6, 2)
    alone = 0.75 * F.mse_loss(output, target)
    followed = 0.25 * F.mse_loss(output, wanted) / wanted.pow(2).mean()
    assert torch.allclose(objective.compute_loss(output, target, wanted), alone + followed)


def test_the_tensor_that_is_compared_is_found_in_dicts_tuples_and_dataclasses():
    a, b = torch.zeros(1), torch.ones(1)
    assert find_scores({"hidden": a, "logits": b}) is b
    assert find_scores((torch.tensor([1]), a)) is a
    assert find_scores({"deep": [a]}) is a
    with pytest.raises(ModelError, match="without a tensor of floats"):
        find_scores({"ids": torch.tensor([1])})


def test_a_score_has_the_interval_of_a_mean():
    values = np.random.default_rng(3).normal(2.0, 0.5, 400)
    score = Score("mse", values.sum(), (values**2).sum(), 400)
    low, high = score.interval
    half = 1.96 * values.std(ddof=1) / 20
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), rel=1e-3)


def test_relevance_starts_at_each_position_of_a_language_model():
    scores, target = torch.randn(2, 3, 5), torch.tensor([[1, 2, -100], [0, 4, 3]])
    _, R = start_relevance(scores, target, "logit")
    expected = torch.zeros_like(scores)
    for n in range(2):
        for t in range(3):
            if target[n, t] >= 0:
                expected[n, t, target[n, t]] = scores[n, t, target[n, t]]
    assert torch.equal(R, expected)


def test_relevance_can_start_at_the_outputs_of_a_loop_of_ones_own():
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 1))
    quantizer = Quantizer(model, start="output")
    quantizer.step(torch.randn(8, 4))
    assert set(quantizer.relevances()) == {"0.weight", "2.weight"}


def test_data_of_classes_stay_a_dataset_and_others_become_a_task(tmp_path):
    x = np.zeros((10, 3), np.float32)
    np.savez(tmp_path / "c.npz", x=x, y=np.arange(10) % 2)
    np.savez(tmp_path / "v.npz", x=x, y=np.zeros((10, 2)))
    assert isinstance(load_training_data(f"{tmp_path}/c.npz", ["x"], classes=True), Dataset)
    task = load_training_data(f"{tmp_path}/v.npz", ["x"], classes=False)
    assert isinstance(task, TaskData)
    assert (len(task.train), len(task.test)) == (8, 2)
    np.savez(tmp_path / "u.npz", x=x, y=np.zeros((9, 2)))
    with pytest.raises(DataError, match="different number"):
        load_training_data(f"{tmp_path}/u.npz", ["x"], classes=False)
    np.savez(tmp_path / "e.npz", x=x[:0])
    with pytest.raises(DataError, match=r"x in e\.npz is empty"):
        load_training_data(f"{tmp_path}/e.npz", ["x"], classes=False)
    np.savez(tmp_path / "p.npz", a=x, b=x)
    pair = load_training_data(f"{tmp_path}/p.npz", ["a", "b"], classes=False)
    with pytest.raises(OptionError, match="--mean"):
        pair.with_preprocessing(task.preprocessing)
