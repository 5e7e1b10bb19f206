"""Which parameters the Quantizer takes for weights, and weights that are computed on the way."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.utils import parametrizations, parametrize, prune

import ecqx_onnx
from ecqx_onnx import api
from ecqx_onnx.quantization import Quantizer
from tests.test_weights import TOKENS, Decoder

torch.set_num_threads(1)

old_norms = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")


class Conv1D(nn.Module):
    """As transformers has it: x W + b, the weight lies [in, out]."""

    def __init__(self, out, width):
        super().__init__()
        self.nf, self.nx = out, width
        self.weight = nn.Parameter(torch.randn(width, out))
        self.bias = nn.Parameter(torch.zeros(out))

    def forward(self, x):
        size_out = (*x.size()[:-1], self.nf)
        x = torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight)
        return x.view(size_out)


class Block(nn.Module):
    """A bare matrix, experts in a list and in one tensor, LoRA; gains, positions and a mask."""

    def __init__(self):
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(6, 6))
        self.experts = nn.ParameterList([nn.Parameter(torch.randn(6, 6)) for _ in range(2)])
        self.stacked = nn.Parameter(torch.randn(3, 6, 6))
        self.down, self.up = nn.Parameter(torch.randn(2, 6)), nn.Parameter(torch.randn(6, 2))
        self.scaled = nn.Parameter(torch.randn(4, 6))
        self.gain = nn.Parameter(torch.ones(1, 6))
        self.positions = nn.Parameter(torch.randn(1, 6))
        self.mask = nn.Parameter(torch.full((6, 6), -torch.inf).triu(1), requires_grad=False)

    def forward(self, x):
        x = x * self.gain + self.positions
        x = x @ self.matrix.t()
        for expert in self.experts:
            x = F.linear(x, expert)
        x = x + torch.einsum("ni,eio->no", x, self.stacked)
        x = x + (x @ self.down.T) @ self.up.T
        x = torch.softmax(x[:, None] @ x[:, None].mT + self.mask[0, 0], -1)[:, 0] * x
        weight = self.scaled * 0.5
        return F.linear(x, weight)


WEIGHTS = {"matrix", "experts.0", "experts.1", "stacked", "down", "up", "scaled"}


@pytest.mark.parametrize("example", [None, torch.randn(4, 6)])
def test_what_a_module_multiplies_itself_is_quantised_with_an_example_and_without(example):
    torch.manual_seed(0)
    quantizer = Quantizer(Block(), example, relevance=None)
    assert {tensor.name for tensor in quantizer.tensors()} == WEIGHTS


def test_the_quantizer_and_convert_take_the_same_parameters_for_weights():
    x = torch.randn(4, 6)
    float_names = {tensor.name for tensor in api.as_checkpoint(Block(), example=x, bits=4).tensors}
    assert float_names == WEIGHTS


def test_a_table_of_positions_stays_float_where_an_example_shows_what_it_is():
    traced = Quantizer(Decoder(), TOKENS, relevance=None)
    assert {tensor.name for tensor in traced.tensors()} == {"tokens.weight", "matrix", "experts"}
    assert "no operator multiplies" in dict(traced.report().left_float)["positions.weight"]
    untraced = Quantizer(Decoder(), relevance=None)
    assert {"tokens.weight", "matrix", "experts"} <= {t.name for t in untraced.tensors()}
    assert "anchors" not in {t.name for t in untraced.tensors()}


def test_a_conv1d_of_transformers_is_quantised_trained_and_written(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(Conv1D(8, 16), nn.ReLU(), Conv1D(3, 8))
    quantizer = Quantizer(model, granularity="channel")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x, y = torch.randn(8, 16), torch.randint(0, 3, (8,))
    before = quantizer.background()["0.weight"].clone()
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    quantizer.step(x, y)
    assert not torch.equal(before, quantizer.background()["0.weight"])
    assert [tensor.meaning.step.shape for tensor in quantizer.tensors()] == [(1, 8), (1, 3)]
    ecqx_onnx.save(quantizer, tmp_path / "m.pt", example=x)
    api.convert(tmp_path / "m.pt", tmp_path / "m.onnx")
    report = api.validate(tmp_path / "m.onnx", against=tmp_path / "m.pt", latency_runs=0)
    assert report.ok, report.failures


def test_what_the_code_does_not_show_stays_float_and_says_how_to_have_it_traced():
    class Elsewhere(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.weight = nn.Linear(4, 4), nn.Parameter(torch.randn(4, 4))

        def forward(self, x):
            return multiply(self.first(x), self.weight)

    def multiply(x, weight):
        return x @ weight

    report = Quantizer(Elsewhere(), relevance=None).report()
    assert [tensor.name for tensor in report.tensors] == ["first.weight"]
    assert "example=x" in dict(report.left_float)["weight"]
    traced = Quantizer(Elsewhere(), torch.randn(2, 4), relevance=None)
    assert {tensor.name for tensor in traced.tensors()} == {"first.weight", "weight"}


class Cache:
    """No tensor, as transformers' decoders return one beside their logits."""


def test_what_a_trace_cannot_return_is_no_reason_not_to_trace():
    class Caching(Decoder):
        def forward(self, tokens):
            return {"logits": super().forward(tokens), "cache": Cache()}

    quantizer = Quantizer(Caching(), {"tokens": TOKENS}, relevance=None)
    assert "positions.weight" not in {tensor.name for tensor in quantizer.tensors()}


class Gained(nn.Conv2d):
    """Scaled weight standardisation, as timm's ScaledStdConv2d: a gain beside the weight."""

    def __init__(self):
        super().__init__(3, 4, 3)
        self.gain = nn.Parameter(torch.ones(4, 1, 1, 1))

    def forward(self, x):
        weight = (self.weight - self.weight.mean((1, 2, 3), keepdim=True)) * self.gain
        return F.conv2d(x, weight, self.bias)


@pytest.mark.parametrize("example", [None, torch.randn(2, 3, 8, 8)])
def test_a_gain_beside_a_layers_weight_is_no_weight(example):
    quantizer = Quantizer(nn.Sequential(Gained()), example, relevance=None)
    assert [tensor.name for tensor in quantizer.tensors()] == ["0.weight"]


def test_an_example_that_cannot_be_traced_leaves_the_choice_to_the_structure():
    quantizer = Quantizer(Block(), torch.randn(4, 5), relevance=None)
    assert {tensor.name for tensor in quantizer.tensors()} == WEIGHTS


def test_a_value_is_looked_at_only_where_the_parameter_is_quantised():
    model = Block()
    model.down.data[0, 0] = torch.nan
    quantizer = Quantizer(model, relevance=None, exclude=["down"])
    assert {tensor.name for tensor in quantizer.tensors()} == WEIGHTS - {"down"}


# Weights that are computed in every forward pass


class Symmetric(nn.Module):
    def forward(self, W):
        return (W + W.mT) / 2


def make_symmetric(layer):
    parametrize.register_parametrization(layer, "weight", Symmetric())
    return layer


def prune_half(layer):
    prune.l1_unstructured(layer, "weight", amount=0.5)
    return layer


NORMS = {
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "own": make_symmetric,
    "old weight_norm": nn.utils.weight_norm,
    "old spectral_norm": nn.utils.spectral_norm,
    "pruned": prune_half,
}


def make_normed(kind):
    return nn.Sequential(
        nn.Linear(16, 8), nn.ReLU(), NORMS[kind](nn.Linear(8, 8)), nn.ReLU(), nn.Linear(8, 3)
    )


def train(model, quantizer, steps, *, gain=0.1):
    optimizer = torch.optim.SGD(model.parameters(), lr=gain)
    x, y = torch.randn(32, 16), torch.randint(0, 3, (32,))
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        quantizer.step(x, y)
        losses.append(float(loss.detach()))
    return losses, x


@old_norms
@pytest.mark.parametrize("kind", list(NORMS))
def test_a_computed_weight_is_quantised_trained_and_written(kind, tmp_path):
    torch.manual_seed(0)
    model = make_normed(kind)
    names = set(model.state_dict())
    quantizer = Quantizer(model, bits=4)
    before = quantizer.background()["2.weight"].clone()
    losses, x = train(model, quantizer, 10)
    assert losses[-1] < losses[0]
    assert not torch.equal(before, quantizer.background()["2.weight"])
    assert [t.name for t in quantizer.tensors()] == ["0.weight", "2.weight", "4.weight"]
    assert set(quantizer.relevances()) == {"0.weight", "2.weight", "4.weight"}
    assert quantizer.report().warnings == ()
    assert set(model.state_dict()) == names  # what users save is as before

    model.eval()
    with torch.no_grad():
        expected = model(x)
    held = dict(zip(("0", "2", "4"), quantizer.tensors(), strict=True))["2"].dequantize()
    np.testing.assert_array_equal(model[2].weight.detach().numpy(), held)
    checkpoint = ecqx_onnx.save(quantizer, tmp_path / "m.pt", example=x)
    assert checkpoint.matching.missing == ()
    torch.testing.assert_close(checkpoint.module()(x), expected)
    api.convert(tmp_path / "m.pt", tmp_path / "m.onnx")
    report = api.validate(tmp_path / "m.onnx", against=tmp_path / "m.pt", latency_runs=0)
    assert report.ok, report.failures
    assert set(model.state_dict()) == names  # saving changed nothing


@old_norms
@pytest.mark.parametrize("kind", ["weight_norm", "old weight_norm", "pruned"])
def test_a_model_let_go_of_computes_its_weight_again_or_keeps_the_levels(kind, tmp_path):
    torch.manual_seed(0)
    model, x = make_normed(kind), torch.randn(4, 16)
    with torch.no_grad():
        expected = model(x)
    Quantizer(model, relevance=None).detach(restore=True)
    torch.testing.assert_close(model(x), expected)
    quantizer = Quantizer(model, relevance=None)
    with torch.no_grad():
        held = model(x)
    model = quantizer.detach()
    torch.testing.assert_close(model(x), held)
    found = api.as_checkpoint(model, example=x)
    assert {tensor.name for tensor in found.tensors} == {"0.weight", "2.weight", "4.weight"}
    torch.testing.assert_close(found.module()(x), held)


@pytest.mark.parametrize("gradient", ["plain", "absolute"])
def test_the_gradient_of_a_computed_weight_is_that_of_its_levels(gradient):
    torch.manual_seed(0)
    layer = nn.Linear(3, 2, bias=False)
    model = nn.Sequential(make_symmetric(nn.Linear(3, 3, bias=False)), layer)
    quantizer = Quantizer(model, relevance=None, gradient=gradient)
    x = torch.randn(5, 3)
    model(x).sum().backward()
    W = torch.from_numpy(quantizer.tensors()[0].dequantize()).requires_grad_()
    (x @ W.T @ layer.weight.detach().T).sum().backward()
    factor = torch.where(W != 0, W.abs(), 1.0) if gradient == "absolute" else 1.0
    expected = W.grad * factor
    expected = (expected + expected.T) / 2
    torch.testing.assert_close(model[0].parametrizations.weight.original.grad, expected.detach())


def test_a_run_with_computed_weights_goes_on_where_it_stopped():
    torch.manual_seed(0)
    model = make_normed("weight_norm")
    quantizer = Quantizer(model, relevance=None)
    train(model, quantizer, 3)
    again = make_normed("weight_norm")
    resumed = Quantizer(again, relevance=None)
    again.load_state_dict(model.state_dict())
    resumed.load_state_dict(quantizer.state_dict())
    x = torch.randn(4, 16)
    torch.testing.assert_close(again(x), model(x))


def test_a_computed_weight_that_is_excluded_stays_float():
    quantizer = Quantizer(make_normed("weight_norm"), relevance=None, exclude="2.*")
    assert {tensor.name for tensor in quantizer.tensors()} == {"0.weight", "4.weight"}
    assert quantizer.report().warnings == ()


def test_a_weight_in_a_recurrent_layer_stays_float_and_is_told_what_to_do():
    recurrent = parametrizations.weight_norm(nn.LSTM(4, 4), "weight_hh_l0")
    report = Quantizer(recurrent, relevance=None).report()
    assert "remove_parametrizations" in report.warnings[0]
