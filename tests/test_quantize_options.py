"""`ecqx-onnx quantize` as a command: its options reach the training, recipes repeat it, torchrun
and kill -9 change nothing."""

import inspect
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from typer.testing import CliRunner

from ecqx_onnx import api
from ecqx_onnx.cli import app
from ecqx_onnx.cli.arguments import parse_bits
from ecqx_onnx.quantization import Recipe, train

ROOT = Path(__file__).parents[1]

NET = """
import torch.nn as nn
INPUT_SHAPE = (6,)
def net():
    return nn.Sequential(nn.Linear(6, 24), nn.ReLU(), nn.Linear(24, 3))
def half(batch, generator):
    return batch / 2
def gamma():
    from zennit.composites import EpsilonGammaBox
    return EpsilonGammaBox(low=-3.0, high=3.0)
def confident(output, target):
    import torch
    return torch.zeros_like(output).scatter_(1, target[:, None], 1.0) * output.detach().square()
"""


@pytest.fixture
def place(tmp_path):
    """A folder with net.py and a small data set, three clouds in six dimensions."""
    generator = np.random.default_rng(0)
    y = generator.integers(0, 3, 320)
    x = (generator.normal(size=(3, 6))[y] * 2 + generator.normal(size=(320, 6))).astype(np.float32)
    np.savez(
        tmp_path / "data.npz", x_train=x[:240], y_train=y[:240], x_test=x[240:], y_test=y[240:]
    )
    (tmp_path / "net.py").write_text(NET)
    return tmp_path


def arguments(place, out, *options):
    fixed = (
        "quantize",
        f"{place}/net.py:net",
        "--data",
        place / "data.npz",
        "--out",
        place / out,
        "--device",
        "cpu",
    )
    return [str(argument) for argument in (*fixed, *options)]


def run(place, out, *options, code=0):
    result = CliRunner().invoke(app, arguments(place, out, *options))
    assert result.exit_code == code, (result.output, result.stderr, result.exception)
    return result


def start(place, out, *options, launcher=()):
    """The real command in a process of its own."""
    environment = {
        **os.environ,
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'converters'}",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, *launcher, "-m", "ecqx_onnx", *arguments(place, out, *options)]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def levels(path):
    return {
        entry["name"]: entry["levels"] for entry in torch.load(path, weights_only=True)["tensors"]
    }


def steps(path):
    return {
        entry["name"]: entry["step"] for entry in torch.load(path, weights_only=True)["tensors"]
    }


def recipe_of(path):
    return json.loads(torch.load(path, weights_only=True)["recipe"])


def test_the_commands_defaults_are_those_of_the_functions_behind_it():
    command = typer.main.get_command(app).commands["quantize"]
    typed = {parameter.name: parameter.default for parameter in command.params}
    behind = {
        name: parameter.default for name, parameter in inspect.signature(train).parameters.items()
    }
    behind |= {**Recipe().to_json(), "bits": "4", "exclude": None}
    for name in behind.keys() - {
        "model",
        "dataset",
        "options",
        "progress",
        "state_file",
        "granularity",
        "budget",  # made of max_bytes or bits_per_weight
    }:
        assert typed[name] == behind[name], name
    assert not typed["per_channel"]


def test_every_option_reaches_the_training(place, monkeypatch):
    seen = {}

    def watched(model, dataset, **options):
        seen.update(options)
        return train(model, dataset, **options)

    monkeypatch.setattr("ecqx_onnx.quantization.train", watched)
    expected = {
        "bits": {"*": 4, "0.*": 2},
        "entropy_weight": 0.2,
        "step": "least_squares",
        "step_rate": 0.002,
        "levels": "asymmetric",
        "granularity": "channel",
        "exclude": ("2.*",),
        "zero_floor": 0.4,
        "size_exponent": 0.5,
        "refresh_every": 2,
        "relevance_samples": 7,
        "relevance_memory": 0.8,
        "relevance_until": 0.7,
        "keep": 0.05,
        "prune": 0.15,
        "rho": 3.0,
        "epochs": 1,
        "learning_rate": 0.01,
        "schedule": "constant",
        "batch_size": 32,
        "distillation": 0.5,
        "temperature": 3.0,
        "entropy_ramp": 0.1,
        "precision": "bfloat16",
        "gradient": "absolute",
        "activations": "int8",
        "validation": 0.2,
        "seed": 3,
    }
    typed = (
        *(
            "--bits",
            "*=4,0.*=2",
            "--entropy-weight",
            0.2,
            "--step",
            "least_squares",
            "--step-rate",
            0.002,
        ),
        *(
            "--levels",
            "asymmetric",
            "--per-channel",
            "--exclude",
            "2.*",
            "--zero-floor",
            0.4,
            "--size-exponent",
            0.5,
        ),
        *(
            "--refresh",
            2,
            "--relevance-samples",
            7,
            "--relevance-memory",
            0.8,
            "--relevance-until",
            0.7,
        ),
        *("--keep", 0.05, "--prune", 0.15, "--rho", 3.0),
        *(
            "--epochs",
            1,
            "--lr",
            0.01,
            "--schedule",
            "constant",
            "--batch-size",
            32,
            "--distillation",
            0.5,
        ),
        *(
            "--gradient",
            "absolute",
            "--activations",
            "int8",
            "--temperature",
            3.0,
            "--entropy-ramp",
            0.1,
            "--precision",
            "bfloat16",
            "--validation",
            0.2,
            "--seed",
            3,
        ),
        *(
            "--augment",
            f"{place}/net.py:half",
            "--start",
            f"{place}/net.py:confident",
            "--relevance",
            f"{place}/net.py:gamma",
        ),
    )
    run(place, "all.pt", *typed)
    assert {name: seen[name] for name in expected} == expected
    assert (seen["augment"].__name__, seen["start"].__name__) == ("half", "confident")
    assert type(seen["relevance"]).__name__ == "EpsilonGammaBox"
    stored = recipe_of(place / "all.pt")
    assert (stored["augment"], stored["start"], stored["relevance"]) == (
        "net.py:half",
        "net.py:confident",
        "net.py:gamma",
    )
    assert {name: stored[name] for name in expected if name != "exclude"} == {
        name: value for name, value in expected.items() if name != "exclude"
    }


def test_a_recipe_repeats_a_run_and_typed_options_win_over_it(place):
    run(
        place,
        "a.pt",
        "--bits",
        "0.*=2,2.*=3",
        "--per-channel",
        "--relevance",
        "none",
        "--epochs",
        1,
        "--exclude",
        "*.bias",
    )
    first, expected = levels(place / "a.pt"), recipe_of(place / "a.pt")
    values = {
        "bits": {"0.*": 2, "2.*": 3},
        "granularity": "channel",
        "relevance": "none",
        "epochs": 1,
        "exclude": ["*.bias"],
    }
    (place / "a.json").write_text(json.dumps(values))
    lines = (
        'granularity = "channel"\nrelevance = "none"\nepochs = 1\nexclude = '
        '["*.bias"]\n[bits]\n"0.*" = 2\n"2.*" = 3\n'
    )
    (place / "a.toml").write_text(lines)
    for name in ("a.json", "a.toml", "a.pt"):
        run(place, "again.pt", "--recipe", place / name, "--force")
        again = levels(place / "again.pt")
        assert all(torch.equal(value, again[name]) for name, value in first.items())
        assert recipe_of(place / "again.pt") == expected
    run(place, "other.pt", "--recipe", place / "a.toml", "--bits", 5)
    assert recipe_of(place / "other.pt") == {**expected, "bits": 5}


def test_the_papers_recipe_has_a_name(place):
    run(place, "p.pt", "--recipe", "paper", "--epochs", 1, "--bits", 3)
    stored = recipe_of(place / "p.pt")
    assert (stored["bits"], stored["prune"], stored["refresh_every"]) == (3, 0.0, 1)
    assert (stored["levels"], stored["schedule"], stored["relevance_until"]) == (
        "asymmetric",
        "constant",
        1.0,
    )
    paper = Recipe.paper(bits=3).to_json()
    assert {name: stored[name] for name in paper} == paper


def test_a_recipe_repeats_a_budget_and_another_loss(place):
    typed = ("--epochs", 1, "--relevance", "none", "--bits-per-weight", 2.5)
    run(place, "b.pt", *typed, "--metric", "error", "--distillation", 0.5)
    assert recipe_of(place / "b.pt")["score"]["metric"] == "error"
    run(place, "c.pt", "--recipe", place / "b.pt")
    one, other = levels(place / "b.pt"), levels(place / "c.pt")
    assert all(np.array_equal(one[name], other[name]) for name in one)


def test_recipes_that_cannot_be_used_are_refused_with_the_reason(place):
    for name, text, reason in (
        ("a.json", "{", "is no recipe"),
        ("b.json", "[1]", "holds a list"),
        ("c.toml", "colour = 3", "'colour', which is no option"),
        ("d.json", '{"epochs": "many"}', "integer"),
        ("e.pt", "x", "damaged"),
    ):
        (place / name).write_text(text)
        assert reason in " ".join(
            run(place, "out.pt", "--recipe", place / name, code=2).stderr.replace("│", "").split()
        )
    assert not (place / "out.pt").exists()


@pytest.mark.parametrize(
    ("typed", "reason"),
    [
        (("--bits", "four"), "neither a number nor a list"),
        (("--bits", "9"), "choose 2 to 8"),
        (("--bits", "conv*=4"), "--bits 'conv*' matches no parameter"),
        (("--step", "guess"), "step 'guess' is unknown"),
        (("--levels", "odd"), "levels 'odd' is unknown"),
        (("--schedule", "odd"), "schedule 'odd' is unknown"),
        (("--precision", "float8"), "precision 'float8' is unknown"),
        (("--relevance", "epsilon_minus"), "names no zennit composite"),
        (("--start", "loss"), "start 'loss' is unknown"),
        (("--augment", "mirror"), "augmentation 'mirror' is unknown"),
        (("--augment", "missing.py:f"), "no Python file missing.py"),
        (("--validation", "1.5"), "validation 1.5"),
        (("--distillation", "2"), "distillation 2.0"),
        (("--rho", "0.5"), "rho is 0.5"),
        (("--keep", "nan"), "keep is nan"),
        (("--exclude", "*"), "no weight that can be quantised"),
        (("--device", "abacus"), "device 'abacus' cannot be used"),
    ],
)
def test_bad_options_are_one_sentence_exit_2_and_leave_nothing(place, typed, reason):
    assert reason in run(place, "out.pt", "--epochs", 1, *typed, code=2).stderr
    assert sorted(path.name for path in place.iterdir()) == ["data.npz", "net.py"]


def test_the_file_keeps_only_the_options_that_were_chosen(place):
    run(place, "model.pt", "--bits", 4, "--keep", 0.2, "--epochs", 0)
    api.convert(place / "model.pt", place / "model.onnx")
    from ecqx_onnx.inputs.onnx_file import read_onnx

    assert read_onnx(place / "model.onnx").metadata["recipe"] == {
        "bits": 4, "keep": 0.2, "epochs": 0, "data": "data.npz", "best_epoch": 0
    }  # fmt: skip


def test_parse_bits():
    assert parse_bits("4") == 4
    assert parse_bits("*=4, fc.*=2") == {"*": 4, "fc.*": 2}


def test_a_killed_run_resumed_gives_the_bytes_of_an_uninterrupted_one(place):
    options = (
        "--epochs",
        30,
        "--quiet",
        "--step",
        "learned",
        "--distillation",
        0.3,
        "--refresh",
        3,
    )
    (place / "whole").mkdir(), (place / "parts").mkdir()
    whole, parts = start(place, "whole/m.pt", *options), start(place, "parts/m.pt", *options)
    state = place / "parts" / "m.pt.training"
    deadline = time.monotonic() + 60
    while not state.exists() and parts.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    parts.send_signal(signal.SIGKILL)
    parts.communicate()
    assert state.exists()
    assert not (place / "parts" / "m.pt").exists()
    assert len(torch.load(state, weights_only=True)["history"]) < 30
    _, err = whole.communicate(timeout=60)
    assert whole.returncode == 0, err
    run(place, "parts/m.pt", *options, "--resume")
    assert not state.exists()
    assert (place / "parts" / "m.pt").read_bytes() == (place / "whole" / "m.pt").read_bytes()


def test_two_processes_of_torchrun_give_the_levels_of_one_and_only_the_first_speaks(place):
    options = ("--epochs", 2, "--refresh", 2, "--json")
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    two = start(place, "two.pt", *options, launcher=launcher)
    alone = json.loads(run(place, "one.pt", *options).stdout)
    out, err = two.communicate(timeout=120)
    assert two.returncode == 0, err
    both = json.loads(out)  # one document: the second process is silent
    assert both["accuracy"]["hits"] == pytest.approx(alone["accuracy"]["hits"], abs=1)
    one, two = levels(place / "one.pt"), levels(place / "two.pt")
    for name, expected in one.items():
        assert float((two[name] != expected).float().mean()) < 0.02, name
    torch.testing.assert_close(steps(place / "two.pt"), steps(place / "one.pt"))
    assert not (place / "two.pt.training").exists()


@pytest.mark.slow
def test_torchrun_with_bad_input_fails_and_says_why(place):
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    process = start(place, "two.pt", "--bits", 9, launcher=launcher)
    _, err = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "choose 2 to 8" in err
    assert not (place / "two.pt").exists()


@pytest.mark.parametrize(("emulated", "options"), [(True, ()), (True, ("--quiet",)), (False, ())])
def test_emulated_bfloat16_is_told_before_training(place, monkeypatch, emulated, options):
    monkeypatch.setattr(
        "ecqx_onnx.quantization.training.emulates_bfloat16", lambda device: emulated
    )
    result = run(place, "told.pt", "--epochs", 0, "--precision", "bfloat16", *options)
    assert ("emulates bfloat16" in result.stderr) == (emulated and not options)
