"""Every layer kind, from PyTorch through ONNX to onnxruntime, folded and standard, at two
optimisation levels."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from ecqx_onnx.tensors import QuantTensor, Scale
from tests.conversions import assert_says_the_same, convert, float_graph, quantize_model


class First(nn.Module):
    """A module that returns several values, of which the first counts."""

    def __init__(self, inner: nn.Module, copies: int = 1) -> None:
        super().__init__()
        self.inner, self.copies = inner, copies

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(*[x] * self.copies)[0]


class CrossAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return self.attention(x, y, y)[0]


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 8)
        self.output = nn.Linear(8, 20, bias=False)
        self.output.weight = self.embedding.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.output(self.embedding(tokens))


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cond(x.sum() > 0, lambda x: self.one(x), lambda x: self.other(x), (x,))


def with_statistics(norm: nn.Module) -> nn.Module:
    """BatchNorm as after training: factors of both signs, one of them zero."""
    with torch.no_grad():
        norm.weight.uniform_(-1.5, 1.5)
        norm.weight[0] = 0
        norm.bias.normal_()
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
    return norm


IMAGE, SIGNAL, VOLUME, SEQUENCE, ROWS = (2, 4, 6, 6), (2, 4, 9), (2, 2, 4, 4, 4), (3, 5, 4), (3, 4)
LAYERS = {
    "linear": (lambda: nn.Linear(4, 3), ROWS),
    "linear on sequences": (lambda: nn.Linear(4, 3), SEQUENCE),
    "linear without bias": (lambda: nn.Linear(4, 3, bias=False), SEQUENCE),
    "linear, batchnorm": (
        lambda: nn.Sequential(nn.Linear(4, 3), with_statistics(nn.BatchNorm1d(3))),
        ROWS,
    ),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, groups=2), SIGNAL),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1), IMAGE),
    "conv2d, batchnorm": (
        lambda: nn.Sequential(nn.Conv2d(4, 6, 3), with_statistics(nn.BatchNorm2d(6)), nn.ReLU()),
        IMAGE,
    ),
    "conv2d in groups": (lambda: nn.Conv2d(4, 6, 3, groups=2), IMAGE),
    "depthwise": (
        lambda: nn.Sequential(nn.Conv2d(4, 4, 3, groups=4), with_statistics(nn.BatchNorm2d(4))),
        IMAGE,
    ),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2), VOLUME),
    "transposed conv": (
        lambda: nn.Sequential(nn.ConvTranspose2d(4, 3, 3), with_statistics(nn.BatchNorm2d(3))),
        IMAGE,
    ),
    "transposed conv in groups": (
        lambda: nn.Sequential(
            nn.ConvTranspose2d(4, 6, 3, groups=2), with_statistics(nn.BatchNorm2d(6))
        ),
        IMAGE,
    ),
    "transposed conv1d": (lambda: nn.ConvTranspose1d(4, 6, 3, groups=2), SIGNAL),
    "lstm": (lambda: First(nn.LSTM(4, 3, batch_first=True)), SEQUENCE),
    "lstm, both directions, two layers": (
        lambda: First(nn.LSTM(4, 3, num_layers=2, bidirectional=True, batch_first=True)),
        SEQUENCE,
    ),
    "gru": (lambda: First(nn.GRU(4, 3, bidirectional=True, batch_first=True)), SEQUENCE),
    "rnn": (lambda: First(nn.RNN(4, 3, batch_first=True)), SEQUENCE),
    "self-attention": (lambda: First(nn.MultiheadAttention(4, 2, batch_first=True), 3), SEQUENCE),
    "transformer": (lambda: nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), SEQUENCE),
}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(3)


@pytest.mark.parametrize("kind", LAYERS)
def test_layer_says_the_same_in_onnxruntime(kind, tmp_path):
    make, shape = LAYERS[kind]
    model, inputs = make().eval(), (torch.randn(shape),)
    tensors = quantize_model(model)
    graph = float_graph(model, inputs)
    other_batch = (torch.randn(5, *shape[1:]),)  # the batch size is free
    for form in ("folded", "standard"):
        conversion = convert(graph, tensors, tmp_path, dequantize=form)
        assert not conversion.report.missing
        assert not [kept for kept in conversion.report.kept if kept.reason != "biases stay float"]
        assert_says_the_same(conversion, model, inputs)
        assert_says_the_same(conversion, model, other_batch)


@pytest.mark.parametrize("kind", LAYERS)
def test_layer_with_one_step_per_channel_says_the_same(kind, tmp_path):
    make, shape = LAYERS[kind]
    model, inputs = make().eval(), (torch.randn(shape),)
    tensors = quantize_model(model, per_channel=True)
    for form in ("folded", "standard"):
        conversion = convert(float_graph(model, inputs), tensors, tmp_path, dequantize=form)
        assert not conversion.report.missing
        assert_says_the_same(conversion, model, inputs)


@pytest.mark.parametrize("kind", LAYERS)
def test_layer_on_a_codebook_says_the_same(kind, tmp_path):
    make, shape = LAYERS[kind]
    model, inputs = make().eval(), (torch.randn(shape),)
    tensors = quantize_model(model, codebook=True)
    conversion = convert(float_graph(model, inputs), tensors, tmp_path)
    assert not conversion.report.missing
    assert {tensor.storage for tensor in conversion.report.tensors} == {"dense INT2"}
    assert_says_the_same(conversion, model, inputs)


@pytest.mark.parametrize("form", ["folded", "standard"])
def test_attention_between_two_sequences_says_the_same(form, tmp_path):
    model, inputs = CrossAttention().eval(), (torch.randn(2, 3, 8), torch.randn(2, 5, 8))
    tensors = quantize_model(model)
    conversion = convert(float_graph(model, inputs), tensors, tmp_path, dequantize=form)
    assert not conversion.report.missing
    assert_says_the_same(conversion, model, inputs)


@pytest.mark.parametrize("form", ["folded", "standard"])
@pytest.mark.parametrize("per_channel", [False, True])
def test_embedding_says_the_same(form, per_channel, tmp_path):
    model, inputs = (
        nn.Sequential(nn.Embedding(20, 8), nn.Linear(8, 3)).eval(),
        (torch.randint(0, 20, (2, 5)),),
    )
    tensors = quantize_model(model, per_channel=per_channel)
    conversion = convert(float_graph(model, inputs), tensors, tmp_path, dequantize=form)
    assert_says_the_same(conversion, model, inputs)
    table = next(tensor for tensor in conversion.report.tensors if tensor.name == "0.weight")
    assert table.dequantization == ("folded" if per_channel else form)


@pytest.mark.parametrize("form", ["folded", "standard"])
def test_tied_weights_are_stored_once(form, tmp_path):
    model, inputs = Tied().eval(), (torch.randint(0, 20, (2, 5)),)
    tensors = quantize_model(model)
    conversion = convert(float_graph(model, inputs), tensors, tmp_path, dequantize=form)
    assert_says_the_same(conversion, model, inputs)
    assert sorted(tensor.storage for tensor in conversion.report.tensors) == [
        "dense INT4",
        "dense INT4, shared",
    ]
    assert len({stored.levels_name for stored in conversion.stored}) == 1


@pytest.mark.parametrize("form", ["folded", "standard"])
def test_weights_of_branches_say_the_same(form, tmp_path):
    model, inputs = Branches().eval(), (torch.randn(2, 4),)
    tensors = quantize_model(model)
    conversion = convert(float_graph(model, inputs), tensors, tmp_path, dequantize=form)
    assert len(conversion.report.tensors) == 2
    assert_says_the_same(conversion, model, inputs)
    assert_says_the_same(conversion, model, (-inputs[0],))


@pytest.mark.parametrize("form", ["folded", "standard"])
def test_zero_channels_and_zero_tensors_say_the_same(form, tmp_path):
    model = nn.Sequential(
        nn.Conv2d(4, 6, 3), with_statistics(nn.BatchNorm2d(6)), nn.Flatten(), nn.Linear(96, 3)
    ).eval()
    with torch.no_grad():
        model[0].weight[1:3] = 0
        model[3].weight.zero_()
    inputs = (torch.randn(2, 4, 6, 6),)
    tensors = quantize_model(model)
    conversion = convert(float_graph(model, inputs), tensors, tmp_path, dequantize=form)
    assert not conversion.report.missing
    assert_says_the_same(conversion, model, inputs)
    assert {tensor.zeros for tensor in conversion.report.tensors if tensor.name == "3.weight"} == {
        1.0
    }


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
@pytest.mark.parametrize("target", ["onnxruntime", "onnxruntime-1.17", "qdq"])
def test_every_bit_width_says_the_same_on_every_target(bits, target, tmp_path):
    model, inputs = nn.Linear(16, 12).eval(), (torch.randn(3, 16),)
    tensors = quantize_model(model, bits=bits)
    conversion = convert(float_graph(model, inputs), tensors, tmp_path, target=target)
    assert_says_the_same(conversion, model, inputs)
    np.testing.assert_array_equal(
        conversion.stored[0].weight.dequantize(), model.weight.detach().numpy()
    )


def test_a_mostly_zero_weight_is_stored_sparse(tmp_path):
    model, inputs = nn.Linear(64, 32).eval(), (torch.randn(3, 64),)
    levels = np.zeros((32, 64), np.int8)
    levels[3, 5], levels[31, 63] = 7, -7
    tensor = QuantTensor("weight", levels, Scale(np.float32(0.1)))
    with torch.no_grad():
        model.weight.copy_(torch.from_numpy(tensor.dequantize()))
    conversion = convert(float_graph(model, inputs), [tensor], tmp_path)
    assert [tensor.storage for tensor in conversion.report.tensors] == ["sparse INT8"]
    assert_says_the_same(conversion, model, inputs)
