"""What counts as a weight, and that converting a float model changes nothing of it."""

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.utils import parametrizations

from ecqx_onnx import api
from ecqx_onnx.checkpoint.export import prepare
from ecqx_onnx.checkpoint.tracing import trace
from ecqx_onnx.errors import ModelError, OptionError
from ecqx_onnx.quantization.weights import find_weights

torch.set_num_threads(1)  # tiny tensors: more threads only wait for each other


class Decoder(nn.Module):
    """Tokens and positions, a bare matrix as in transformers' Conv1D, experts, gains, a mask: which
    of these are weights?"""

    def __init__(self):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(20, 8), nn.Embedding(6, 8)
        self.matrix, self.bias = nn.Parameter(torch.randn(8, 8)), nn.Parameter(torch.zeros(8))
        self.experts, self.gain = (
            nn.Parameter(torch.randn(2, 8, 8)),
            nn.Parameter(torch.ones(1, 1, 8)),
        )
        self.norm, self.added = nn.LayerNorm([6, 8]), nn.Parameter(torch.zeros(6, 8))
        self.register_buffer("mask", torch.full((6, 6), -torch.inf).triu(1))
        self.register_buffer(
            "anchors", torch.tensor([[10.0, 13.0, 16.0, 30.0, 33.0, 23.0, 1.0, 2.0]])
        )
        self.head = nn.Linear(8, 20, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, tokens):
        x = self.norm(self.tokens(tokens) + self.positions(torch.arange(6))) + self.added
        x = torch.addmm(self.bias, x.reshape(-1, 8), self.matrix).reshape(x.shape)
        x = torch.softmax(x @ x.transpose(1, 2) + self.mask, -1) @ x
        x = torch.bmm(x.reshape(1, -1, 8).expand(2, -1, -1), self.experts).sum(0).reshape(x.shape)
        return self.head(x * self.gain * self.anchors)


TOKENS = torch.arange(12).reshape(2, 6)


def test_a_weight_is_what_an_operator_multiplies_and_nothing_else():
    program, _ = trace(Decoder(), TOKENS)
    found = find_weights(program)
    assert {name.replace("tokens", "head") for name in found} == {
        "head.weight",
        "matrix",
        "experts",
    }
    assert (found["matrix"].operator, found["matrix"].axis) == ("addmm", 1)
    assert found["experts"].axis == 2


def test_bits_quantise_the_weights_only_whatever_a_mask_holds():
    checkpoint = api.as_checkpoint(Decoder(), example=TOKENS, bits=4)
    assert [tensor.name for tensor in checkpoint.tensors] == ["matrix", "experts", "tokens.weight"]
    assert checkpoint.matching.missing == ()
    torch.testing.assert_close(checkpoint.state["anchors"], Decoder().anchors)


def test_include_adds_and_exclude_removes_before_any_value_is_looked_at():
    model = Decoder()
    model.experts.data[0, 0, 0] = torch.nan
    with pytest.raises(ModelError, match="'experts' holds NaN"):
        api.as_checkpoint(model, example=TOKENS, bits=4)
    options = {"include": ["positions.*"], "exclude": ["experts"]}
    checkpoint = api.as_checkpoint(model, example=TOKENS, bits=4, **options)
    assert [tensor.name for tensor in checkpoint.tensors] == [
        "matrix",
        "tokens.weight",
        "positions.weight",
    ]
    with pytest.raises(OptionError, match="--include 'nothing' matches no parameter"):
        api.as_checkpoint(model, example=TOKENS, bits=4, include=["nothing"])


class OwnProduct(nn.Module):
    def __init__(self, use):
        super().__init__()
        self.use, self.weight, self.other = (
            use,
            nn.Parameter(torch.randn(8, 16)),
            nn.Parameter(torch.randn(1, 1)),
        )

    def forward(self, x):
        return self.use(x, self.weight)


COMPUTED = {
    "scaled": lambda x, w: F.linear(x, w * 0.125),
    "standardised": lambda x, w: F.linear(
        x, (w - w.mean(1, keepdim=True)) / (w.var(1, keepdim=True) + 1e-5).sqrt()
    ),
    "batch-normalised": lambda x, w: F.linear(
        x, F.batch_norm(w.reshape(1, 8, -1), None, None, training=True).reshape_as(w)
    ),
    "normalised": lambda x, w: F.linear(F.normalize(x, dim=1), F.normalize(w, dim=1)),
}


@pytest.mark.parametrize("way", list(COMPUTED))
def test_a_weight_that_the_model_computes_with_is_quantised_and_written_as_integers(way):
    torch.manual_seed(0)
    checkpoint = api.as_checkpoint(OwnProduct(COMPUTED[way]), example=torch.randn(2, 16), bits=4)
    assert [tensor.name for tensor in checkpoint.tensors] == ["weight"]
    assert checkpoint.matching.missing == ()
    assert [weight.name for weight in checkpoint.matching.found] == ["weight"]


def small_models():
    old = nn.utils.weight_norm(nn.Linear(8, 8))
    yield "plain", nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3))
    yield (
        "new weight_norm",
        nn.Sequential(nn.Linear(16, 8), parametrizations.weight_norm(nn.Linear(8, 8))),
    )
    yield "old weight_norm", nn.Sequential(nn.Linear(16, 8), old)
    yield (
        "spectral_norm",
        nn.Sequential(nn.Linear(16, 8), parametrizations.spectral_norm(nn.Linear(8, 8))),
    )
    yield "float16", nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3)).half()


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_converting_changes_no_model_and_other_bits_give_other_levels():
    torch.manual_seed(0)
    for name, model in small_models():
        before = {key: value.clone() for key, value in model.state_dict().items()}
        levels = []
        for bits in (2, 4):
            checkpoint = api.as_checkpoint(model, example=torch.zeros(2, 16), bits=bits)
            levels.append(max(len(np.unique(tensor.levels)) for tensor in checkpoint.tensors))
            assert [tensor.name.split(".")[1] for tensor in checkpoint.tensors] == [
                "weight",
                "weight",
            ], name
            assert checkpoint.matching.missing == ()
            if name != "plain":
                assert any(
                    "merged" in note or "converted to float32" in note for note in checkpoint.notes
                )
        assert levels[0] <= 4 < levels[1]
        with pytest.raises(ModelError):
            api.as_checkpoint(model, example=torch.zeros(2, 5), bits=4)
        assert list(before) == list(model.state_dict())
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items()), (
            name
        )


def test_a_program_is_not_changed_and_its_ties_hold():
    program, _ = trace(Decoder(), TOKENS)
    before = dict(program.state_dict)
    values = {name: value.clone() for name, value in before.items()}
    checkpoint = api.as_checkpoint(program, bits=4)
    assert checkpoint.aliases == {"head.weight": "tokens.weight"}
    assert all(
        program.state_dict[name] is value and torch.equal(value, values[name])
        for name, value in before.items()
    )


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(16, 8)
        self.register_buffer("seen", torch.zeros(8))

    def forward(self, x, y):
        return (self.inner(x) - self.inner(y)).abs()


def test_one_tensor_given_twice_is_two_inputs():
    x = torch.randn(2, 16)
    module = api.as_checkpoint(Pair(), example=(x, x), bits=4).module()
    assert float(module(x, x + 1).abs().sum()) > 0


def test_unread_inputs_written_buffers_and_outputs_that_are_inputs_or_have_names():
    class Odd(Pair):
        def forward(self, x, y):
            self.seen.add_(self.inner(x).mean(0))
            return {"given": x, "score": self.inner(x) + self.seen}

    model = Odd()
    checkpoint = api.as_checkpoint(model, example=(torch.randn(2, 16), torch.randn(2, 16)), bits=4)
    assert any("nothing reads the input 'y'" in note for note in checkpoint.notes)
    assert any("forward writes the model's buffers (seen)" in note for note in checkpoint.notes)
    assert [value.name for value in checkpoint.graph.proto.graph.output] == ["given", "score"]
    assert not model.seen.any()


def test_the_copy_that_is_exported_keeps_the_models_mode():
    model = nn.Linear(4, 4).train()
    copy, notes = prepare(model)
    assert model.training
    assert not copy.training
    assert notes == ()
