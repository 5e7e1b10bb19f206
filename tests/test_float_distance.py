"""Whatever is quantised without training says how far it is from the float model, and fails a
validation beyond a bound."""

import json

import numpy as np
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import ecqx_onnx
from ecqx_onnx.cli import app
from ecqx_onnx.errors import OptionError
from ecqx_onnx.validation.outputs.metrics import Proportion
from ecqx_onnx.validation.references.float_distance import (
    ROUNDED,
    FloatBounds,
    LayerError,
    choose_bounds,
    judge_distance,
    measure_output,
    measure_weight,
)


def random(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def test_the_relative_error_is_that_of_the_whole_output_over_all_batches():
    exact, found = random(6, 4), random(6, 4, seed=1)
    whole = measure_output("y", found, exact)
    expected = np.linalg.norm(found - exact) / np.linalg.norm(exact)
    np.testing.assert_allclose(whole.error, expected)
    parts = measure_output("y", found[:2], exact[:2]) + measure_output("y", found[2:], exact[2:])
    np.testing.assert_allclose(parts.error, expected)
    assert parts.same == Proportion(int((found.argmax(1) == exact.argmax(1)).sum()), 6)


def test_equal_outputs_have_no_error_whatever_they_hold():
    odd = np.array([[np.nan, np.inf, 0.0]])
    assert measure_output("y", odd, odd).error == 0
    assert measure_output("y", np.zeros((2, 3)), np.zeros((2, 3))).error == 0
    assert measure_output("y", np.ones((2, 3)), np.zeros((2, 3))).error == np.inf
    assert measure_output("y", np.full((1, 2), np.nan), np.ones((1, 2))).error == np.inf


def test_a_weight_that_carries_a_batchnorms_factor_is_measured_without_it():
    exact = random(5, 3, 2)
    found = exact + 0.1 * random(5, 3, 2, seed=2)
    scaled = found * random(5, 1, 1, seed=3)
    plain = measure_weight("w", found, exact).error
    assert measure_weight("w", scaled, exact, rescaled=True).error <= plain
    assert measure_weight("w", exact * 3, exact, rescaled=True).error < 1e-12


def check_of(found, exact, *, scores, **bounds):
    distances = [measure_output("y", found, exact)]
    layers = [LayerError("fc.weight", 0.3), LayerError("head.weight", 0.7)]
    return judge_distance(
        distances, FloatBounds(**bounds), on="a test", scores=scores, layers=layers
    )


def test_class_scores_are_judged_by_agreement_and_all_else_by_the_error():
    exact = random(100, 4)
    near = exact + 0.3 * random(100, 4, seed=1)
    far = np.where(np.arange(100)[:, None] < 10, -exact, exact)
    assert check_of(far, exact, scores=True).passed is False
    assert "99 % are wanted" in check_of(far, exact, scores=True).sentence
    assert check_of(far, exact, scores=True, min_agreement=80).passed
    assert check_of(near, exact, scores=False).passed is False
    assert "is more than 0.05" in check_of(near, exact, scores=False).sentence
    assert check_of(near, exact, scores=False, max_error=0.5).passed
    assert check_of(exact, exact, scores=True, max_error=0.0).passed


def test_a_bound_that_is_given_takes_the_place_of_the_default():
    exact = random(100, 4)
    far = np.where(np.arange(100)[:, None] < 10, -exact, exact)
    assert check_of(far, exact, scores=True, max_error=0.9).passed


def test_a_bound_that_nothing_was_measured_for_is_no_pass():
    exact = random(100, 4)
    assert check_of(exact, exact, scores=False, min_agreement=90).passed is False
    assert check_of(exact, exact, scores=True, max_drop=1.0).passed is False


def test_the_worst_weights_come_first():
    sentence = check_of(random(3, 2), random(3, 2), scores=False).sentence
    assert "worst weights head.weight 0.7, fc.weight 0.3" in sentence


def test_the_weight_that_alone_moves_the_outputs_most_is_named(tmp_path):
    """The second layer's errors are larger, but what it gives hardly counts."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.loud = nn.Linear(16, 8)
            self.quiet = nn.Linear(16, 8)
            with torch.no_grad():
                self.loud.weight.copy_(torch.randn(8, 16) ** 5)  # the few large ones count

        def forward(self, x):
            return self.loud(x) + 1e-4 * self.quiet(x)

    example = torch.zeros(2, 16)
    written = ecqx_onnx.convert(Net(), tmp_path / "out.onnx", bits=3, example=example)
    note = next(note for note in written.notes if "against the float model" in note)
    assert "worst weights quiet.weight" in note
    assert "each alone, these move the outputs most: loud.weight" in note


def test_a_share_is_refused_where_a_percentage_is_meant():
    with pytest.raises(OptionError, match="write 98"):
        FloatBounds(min_agreement=0.98)
    for wrong in (
        {"min_agreement": 101},
        {"max_error": -1.0},
        {"max_drop": float("nan")},
        {"max_error": float("inf")},
    ):
        with pytest.raises(OptionError):
            FloatBounds(**wrong)


# Through the verbs


class Encoder(nn.Module):
    """A pooled embedding [N, 24], which is no class scores."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(
            nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 24)
        )

    def forward(self, x):
        return self.layers(x)


CODE = """import torch
from tests.test_float_distance import Encoder
INPUT_SHAPE = (16,)
network = Encoder
"""


@pytest.fixture
def encoder(tmp_path):
    (tmp_path / "user.py").write_text(CODE)
    torch.save(Encoder().state_dict(), tmp_path / "float.pt")
    return {"against": tmp_path / "float.pt", "factory": f"{tmp_path / 'user.py'}:network"}


def converted(encoder, out, **options):
    return ecqx_onnx.convert(encoder["against"], out, factory=encoder["factory"], **options)


def float_check(report):
    return next(check for check in report.checks if check.name == "float model")


@pytest.mark.parametrize(("bits", "fine"), [(2, False), (8, True)])
def test_an_embedding_is_judged_by_its_relative_error(encoder, tmp_path, bits, fine):
    written = converted(encoder, tmp_path / "out.onnx", bits=bits)
    assert (
        any(note.startswith("warning: against the float model") for note in written.notes) != fine
    )
    assert any(
        "random inputs: relative error" in note and "worst weights" in note
        for note in written.notes
    )
    report = ecqx_onnx.validate(tmp_path / "out.onnx", **encoder, latency_runs=0)
    check = float_check(report)
    assert check.passed is fine
    assert report.ok is fine
    assert "relative error" in check.sentence
    assert "layers." in check.sentence
    assert check.limit == 0.1


def test_the_bounds_are_the_users_to_choose(encoder, tmp_path):
    converted(encoder, tmp_path / "out.onnx", bits=2)
    report = ecqx_onnx.validate(
        tmp_path / "out.onnx", **encoder, latency_runs=0, float_bounds=FloatBounds(max_error=5.0)
    )
    assert report.ok, report.failures


def test_on_data_the_classes_and_the_accuracy_are_compared(encoder, tmp_path):
    x = random(200, 16).astype(np.float32)
    with torch.no_grad():
        y = Encoder()(torch.from_numpy(x)).argmax(1).numpy()
    np.savez(tmp_path / "data.npz", x_test=x, y_test=y)
    data = str(tmp_path / "data.npz")
    written = converted(
        encoder, tmp_path / "out.onnx", bits=3, data=data, float_bounds=FloatBounds(max_drop=1.0)
    )
    assert any(
        "samples of x_test in data.npz" in note and "points of accuracy lost" in note
        for note in written.notes
    )
    report = ecqx_onnx.validate(tmp_path / "out.onnx", **encoder, data=data, latency_runs=0)
    check = float_check(report)
    assert check.limit == 95
    assert not check.passed
    assert check.measured == pytest.approx(100 * report.onnx_accuracy.share)


def test_a_file_that_holds_the_models_own_weights_has_no_such_check(encoder, tmp_path):
    quantizer = ecqx_onnx.Quantizer(Encoder(), bits=2, relevance=None)
    ecqx_onnx.save(quantizer, tmp_path / "m.pt", example=torch.zeros(2, 16))
    ecqx_onnx.convert(tmp_path / "m.pt", tmp_path / "m.onnx")
    for against in ({"against": tmp_path / "m.pt"}, encoder):
        report = ecqx_onnx.validate(tmp_path / "m.onnx", **against, latency_runs=0)
        assert all(check.name != "float model" for check in report.checks)


def test_an_unpacked_file_still_says_that_it_was_never_trained(encoder, tmp_path):
    converted(encoder, tmp_path / "out.onnx", bits=2)
    written = ecqx_onnx.unpack(tmp_path / "out.onnx", tmp_path / "dense.onnx")
    assert any("without training, and lay" in note for note in written.notes)
    report = ecqx_onnx.validate(tmp_path / "dense.onnx", **encoder, latency_runs=0)
    assert float_check(report).passed is False


def test_an_exported_program_is_measured_too(tmp_path):
    program = torch.export.export(Encoder().eval(), (torch.zeros(3, 16),))
    torch.export.save(program, tmp_path / "m.pt2")
    written = ecqx_onnx.convert(tmp_path / "m.pt2", tmp_path / "m.onnx", bits=2)
    assert any(note.startswith("warning: against the float model") for note in written.notes)


def test_the_command_line_has_the_bounds_and_fails_by_them(encoder, tmp_path):
    out, model = str(tmp_path / "out.onnx"), ["--model", encoder["factory"]]
    run = CliRunner().invoke
    done = run(app, ["convert", str(encoder["against"]), out, *model, "--bits", "2", "--json"])
    assert done.exit_code == 0
    assert any("float model" in note for note in json.loads(done.stdout)["notes"])
    asked = ["validate", out, "--against", str(encoder["against"]), *model]
    failed = run(app, asked)
    assert failed.exit_code == 1
    assert "float model" in failed.stderr
    assert run(app, [*asked, "--max-error", "5"]).exit_code == 0
    refused = run(app, [*asked, "--min-agreement", "0.98"])
    assert refused.exit_code == 2
    assert "write 98" in refused.stderr


def test_bounds_without_bits_are_refused(encoder, tmp_path):
    with pytest.raises(OptionError, match="--bits"):
        converted(encoder, tmp_path / "out.onnx", float_bounds=FloatBounds(max_error=1.0))


def test_the_defaults_are_those_of_the_command_that_made_the_file():
    given = FloatBounds(max_error=0.5)
    assert choose_bounds(given, {"recipe": {"bits": 4}}) is given
    assert choose_bounds(None, {"recipe": {"bits": 4, "float_error": 9.0}}) is ROUNDED
    for metadata in ({}, {"recipe": {"trained": False}}, {"recipe": "bits"}):
        assert choose_bounds(None, metadata) == FloatBounds()
