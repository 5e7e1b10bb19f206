"""Models with several inputs and outputs: by name, from the command line, with free axes."""

from __future__ import annotations

from collections import namedtuple
from dataclasses import dataclass

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from typer.testing import CliRunner

import ecqx_onnx
from ecqx_onnx import api
from ecqx_onnx.cli import app
from ecqx_onnx.errors import ModelError, OptionError
from ecqx_onnx.options.input_shape import TypedShape, parse_dynamic, parse_input_shape
from ecqx_onnx.quantization import Quantizer
from ecqx_onnx.runtime.random_values import draw_values

torch.set_num_threads(1)


@dataclass
class Answer:
    logits: torch.Tensor
    hidden: tuple | None = None
    cache: object = None


Pair = namedtuple("Pair", "first second")


class Cache:
    """No tensor: what transformers' models return beside their logits."""


class TwoInputs(nn.Module):
    """Arguments in another order than the example's, a flag, an optional one in between."""

    def __init__(self, wrap=lambda x: x):
        super().__init__()
        self.tokens, self.out = nn.Embedding(11, 8), nn.Linear(8, 4)
        self.wrap = wrap

    def forward(self, ids, kind=None, mask=None, double=False):
        x = self.tokens(ids)
        if mask is not None:
            x = x * mask[..., None]
        x = self.out(x)
        return self.wrap(x * 2 if double else x)


IDS = torch.randint(0, 11, (2, 6), generator=torch.Generator().manual_seed(0))
MASK = torch.ones(2, 6)


def shape_of(value):
    dims = value.type.tensor_type.shape.dim
    return [dim.dim_param or dim.dim_value for dim in dims]


def shapes(path):
    graph = onnx.load(path).graph
    return {value.name: shape_of(value) for value in (*graph.input, *graph.output)}


def run(path, **feeds):
    session = onnxruntime.InferenceSession(path)
    found = session.run(None, {name: np.asarray(value) for name, value in feeds.items()})
    return dict(zip((output.name for output in session.get_outputs()), found, strict=True))


def check(path, model, expected, **feeds):
    """The file computes what the quantised program does, and validation says so."""
    report = api.validate(path, against=model, latency_runs=0)
    assert report.ok, report.failures
    for name, value in run(path, **feeds).items():
        np.testing.assert_allclose(value, expected[name].detach().numpy(), rtol=1e-4, atol=1e-5)


def test_an_example_may_name_its_arguments_and_fix_those_that_are_no_tensors(tmp_path):
    torch.manual_seed(0)
    model, path = TwoInputs(), tmp_path / "m.onnx"
    example = {"mask": MASK, "ids": IDS, "double": True}
    checkpoint = api.as_checkpoint(model, example=example, bits=8)
    api.convert(checkpoint, path)
    assert shapes(path) == {
        "ids": ["batch", 6],
        "mask": ["batch", 6],
        "output": ["batch", 6, 4],
    }
    expected = {"output": checkpoint.module()(IDS, MASK)}
    check(path, checkpoint, expected, ids=IDS, mask=MASK)
    torch.testing.assert_close(expected["output"], model(IDS, None, MASK, True), atol=0.1, rtol=0.1)


def test_a_tuple_may_hold_none_and_lists_of_tensors(tmp_path):
    class Images(nn.Module):
        def __init__(self):
            super().__init__()
            self.out = nn.Linear(4, 2)

        def forward(self, images, scale=None):
            return self.out(torch.stack(images)), scale

    images = [torch.randn(4), torch.randn(4)]
    checkpoint = api.as_checkpoint(Images(), example=(images, None), bits=4, dynamic={})
    api.convert(checkpoint, tmp_path / "m.onnx")
    assert list(shapes(tmp_path / "m.onnx")) == ["images_0", "images_1", "output"]


WRAPPED = {
    "dict": (lambda x: {"logits": x, "hidden": (x + 1, x + 2)}, ["logits", "hidden_0", "hidden_1"]),
    "dataclass": (lambda x: Answer(x, cache=Cache()), ["logits"]),
    "namedtuple": (lambda x: Pair(x, x + 1), ["first", "second"]),
    "nested": (lambda x: {"a": {"b": x}, "c": None}, ["a_b"]),
}


@pytest.mark.parametrize("kind", list(WRAPPED))
def test_keys_and_fields_become_the_names_of_outputs(kind, tmp_path):
    wrap, names = WRAPPED[kind]
    model, path = TwoInputs(wrap), tmp_path / "m.onnx"
    report = api.convert(model, path, example={"ids": IDS}, bits=4)
    assert list(shapes(path)) == ["ids", *names]
    told = [note for note in report.notes if "no tensor" in note]
    assert len(told) == (kind == "dataclass")
    checked = api.validate(path, against=api.as_checkpoint(model, example={"ids": IDS}, bits=4))
    assert checked.ok, checked.failures


def test_a_quantizer_takes_and_saves_examples_by_name(tmp_path):
    torch.manual_seed(0)
    model = TwoInputs(lambda x: {"logits": x.mean(1)})
    example = {"ids": IDS, "mask": MASK}
    quantizer = Quantizer(model, example)
    quantizer.step(example, torch.tensor([0, 1]))
    assert quantizer.report().warnings == ()
    ecqx_onnx.save(quantizer, tmp_path / "m.pt", example=example)
    api.convert(tmp_path / "m.pt", tmp_path / "m.onnx")
    assert list(shapes(tmp_path / "m.onnx")) == ["ids", "mask", "logits"]
    report = api.validate(tmp_path / "m.onnx", against=tmp_path / "m.pt", latency_runs=0)
    assert report.ok, report.failures


def test_an_argument_that_forward_lacks_is_named_with_those_it_has():
    with pytest.raises(ModelError, match=r"no argument 'token'.*it has ids, kind, mask"):
        api.as_checkpoint(TwoInputs(), example={"token": IDS}, bits=4)


# Free axes


def test_free_axes_are_the_users_to_say_and_have_the_users_names(tmp_path):
    path = tmp_path / "m.onnx"
    dynamic = {"ids": {0: "batch", 1: "time"}}
    report = api.convert(TwoInputs(), path, example=IDS, bits=4, dynamic=dynamic)
    assert shapes(path) == {"ids": ["batch", "time"], "output": ["batch", "time", 4]}
    assert any("ids [batch, time]" in note for note in report.notes)
    assert run(path, ids=np.zeros((3, 9), np.int64))["output"].shape == (3, 9, 4)


def test_an_axis_that_is_not_named_is_fixed_and_none_fixes_all(tmp_path):
    path = tmp_path / "m.onnx"
    api.convert(TwoInputs(), path, example=IDS, bits=4, dynamic={"ids": {1: "time"}})
    assert shapes(path)["ids"] == [2, "time"]
    api.convert(TwoInputs(), path, example=IDS, bits=4, dynamic={}, force=True)
    assert shapes(path)["ids"] == [2, 6]


def test_an_axis_that_cannot_be_free_is_refused_with_the_reason(tmp_path):
    flat, x = nn.Sequential(nn.Flatten(), nn.Linear(12, 2)), torch.zeros(2, 12)
    with pytest.raises(ModelError, match="does not trace with input:1 free"):
        api.convert(
            flat,
            tmp_path / "m.onnx",
            example=torch.zeros(2, 12),
            bits=4,
            dynamic={"input": {1: "n"}},
        )
    assert not (tmp_path / "m.onnx").exists()
    with pytest.raises(OptionError, match="names the input 'x', and the model's are input"):
        api.as_checkpoint(flat, example=x, bits=4, dynamic={"x": {0: "n"}})
    with pytest.raises(OptionError, match="its axes are 0 to 1"):
        api.as_checkpoint(flat, example=x, bits=4, dynamic={"input": {2: "n"}})


def test_saved_checkpoints_keep_their_free_axes(tmp_path):
    quantizer = Quantizer(TwoInputs(), relevance=None)
    dynamic = {"ids": {0: "n", 1: "time"}}
    ecqx_onnx.save(quantizer, tmp_path / "m.pt", example=IDS, dynamic=dynamic)
    api.convert(tmp_path / "m.pt", tmp_path / "m.onnx")
    assert shapes(tmp_path / "m.onnx")["ids"] == ["n", "time"]
    report = api.validate(tmp_path / "m.onnx", against=tmp_path / "m.pt", latency_runs=0)
    assert report.ok, report.failures
    with pytest.raises(OptionError, match="leave --dynamic out"):
        api.convert(tmp_path / "m.pt", tmp_path / "n.onnx", dynamic=dynamic)


# From the command line


FILE = """
import torch, torch.nn as nn
{more}
class Net(nn.Module):
    def __init__(s):
        super().__init__(); s.e = nn.Embedding(11, 8); s.o = nn.Linear(8, 4)
    def forward(s, ids, mask):
        return s.o(s.e(ids) * mask[..., None].float())
def net():
    torch.manual_seed(0); return Net().eval()
"""
SHAPES = ["--input-shape", "mask=2,6:bool", "--input-shape", "ids=2,6:int64"]


def command(*words):
    result = CliRunner().invoke(app, [str(word) for word in words])
    return result.exit_code, result.output


def write_files(folder, more=""):
    (folder / "net.py").write_text(FILE.format(more=more))
    namespace = {}
    exec(FILE.format(more=more), namespace)
    torch.save(namespace["net"]().state_dict(), folder / "net.pt")
    return folder / "net.pt", f"{folder / 'net.py'}:net"


@pytest.mark.parametrize(
    "more",
    [
        "EXAMPLE = (torch.zeros(2, 6, dtype=torch.long), torch.ones(2, 6))",
        "def example_inputs():\n"
        "    return {'mask': torch.ones(2, 6), 'ids': torch.zeros(2, 6, dtype=torch.long)}",
        "",
    ],
)
def test_several_inputs_come_from_the_file_or_the_command_line(tmp_path, more):
    state, factory = write_files(tmp_path, more)
    out = tmp_path / "m.onnx"
    given = [] if more else SHAPES
    code, text = command("convert", state, out, "--model", factory, "--bits", 8, *given)
    assert code == 0, text
    assert list(shapes(out)) == ["ids", "mask", "output"]
    code, text = command("validate", out, "--against", state, "--model", factory, *given)
    assert code == 0, text


def test_no_shape_at_all_says_all_the_ways_to_give_one(tmp_path):
    state, factory = write_files(tmp_path)
    code, text = command("convert", state, tmp_path / "m.onnx", "--model", factory, "--bits", 4)
    assert code == 2
    assert "NAME=1,16:int64" in text
    assert "EXAMPLE" in text


def test_free_axes_come_from_the_command_line(tmp_path):
    state, factory = write_files(tmp_path)
    out = tmp_path / "m.onnx"
    axes = [
        word
        for axis in ("ids:0", "ids:1=time", "mask:0", "mask:1=time")
        for word in ("--dynamic", axis)
    ]
    code, text = command("convert", state, out, "--model", factory, "--bits", 8, *SHAPES, *axes)
    assert code == 0, text
    code, text = command("validate", out, "--against", state, "--model", factory, *SHAPES)
    assert code == 0, text
    assert shapes(out) == {
        "ids": ["batch", "time"],
        "mask": ["batch", "time"],
        "output": ["batch", "time", 4],
    }


def test_what_is_typed_is_read_or_refused_in_one_sentence():
    assert parse_input_shape(["3,32,32"]) == (3, 32, 32)
    assert parse_input_shape(["x=1,3,8", "n=:int64"]) == {
        "x": TypedShape((1, 3, 8)),
        "n": TypedShape((), "int64"),
    }
    assert parse_dynamic(["x:0", "x:2", "y:1=time"]) == {
        "x": {0: "batch", 2: "x_2"},
        "y": {1: "time"},
    }
    assert parse_dynamic(["none"]) == {}
    for wrong in (["3,32", "4"], ["x=2", "3"], ["x=2", "x=3"], ["x=0"], ["x=2:float"], ["a b=2"]):
        with pytest.raises(OptionError):
            parse_input_shape(wrong)
    for wrong in ("x", "x:", ":1", "x:-1", "x:1=", "x:1=a b", "x:1=2"):
        with pytest.raises(OptionError, match="--dynamic"):
            parse_dynamic([wrong])


# Random inputs mean something


def test_no_row_of_a_random_mask_is_hidden_altogether():
    generator = np.random.default_rng(0)
    seen = draw_values("attention_mask", np.int64, (64, 7), generator)
    assert (seen[:, 0] == 1).all()  # padded on the right
    assert (np.diff(seen, axis=1) <= 0).all()
    assert 0 < seen.mean() < 1
    hidden = draw_values("src_key_padding_mask", np.bool_, (64, 7), generator)
    assert not hidden[:, 0].any()
    assert hidden.any()
    pairs = draw_values("attn_mask", np.bool_, (5, 5), generator)
    assert pairs.any(1).all()
    assert not pairs.all(1).any()


class Masked(nn.Module):
    """Causal attention with an attention mask: what every decoder of Hugging Face does."""

    def __init__(self):
        super().__init__()
        self.i, self.o = nn.Linear(16, 48), nn.Linear(16, 4)

    def forward(self, x, mask):
        q, k, v = self.i(x).chunk(3, -1)
        causal = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()[None]
        seen = causal & (mask[:, None] > 0)
        y = F.scaled_dot_product_attention(
            q[:, None], k[:, None], v[:, None], attn_mask=seen[:, None]
        )
        return self.o(y[:, 0])


def test_a_masked_decoder_validates_on_random_inputs(tmp_path):
    torch.manual_seed(0)
    example = (torch.randn(2, 6, 16), torch.ones(2, 6, dtype=torch.long))
    checkpoint = api.as_checkpoint(Masked(), example=example, bits=4)
    api.convert(checkpoint, tmp_path / "m.onnx")
    report = api.validate(tmp_path / "m.onnx", against=checkpoint, latency_runs=0)
    assert report.ok, report.failures


class Running(nn.Module):
    """Adds its running state, in place or anew."""

    def __init__(self, in_place):
        super().__init__()
        self.layer, self.in_place = nn.Linear(8, 8), in_place
        self.register_buffer("state", torch.zeros(8))

    def forward(self, x):
        y = self.layer(x) + self.state
        change = x.mean(0).abs() * 100
        if self.in_place:
            self.state.add_(change)
        else:
            self.state = self.state + change
        return y


@pytest.mark.parametrize("in_place", [True, False])
def test_a_running_state_does_not_widen_the_bound_that_a_file_is_measured_by(tmp_path, in_place):
    torch.manual_seed(0)
    checkpoint = api.as_checkpoint(Running(in_place), example=torch.randn(2, 8), bits=4)
    assert any("writes the model's buffers (state)" in note for note in checkpoint.notes)
    api.convert(checkpoint, tmp_path / "m.onnx")
    report = api.validate(tmp_path / "m.onnx", against=checkpoint, latency_runs=0)
    assert report.ok
    (outputs,) = [check for check in report.checks if check.name == "outputs"]
    assert outputs.measured <= outputs.limit < 1e-3


class Grouped(nn.Module):
    """Experts as transformers has them: on a kernel of its own unless it is told otherwise."""

    def __init__(self):
        super().__init__()
        self.experts = nn.Parameter(torch.randn(2, 8, 8))
        self.way = "grouped_mm"

    def get_experts_implementation(self):
        return {"": self.way}

    def set_experts_implementation(self, way):
        self.way = way[""] if isinstance(way, dict) else way

    def forward(self, x):
        if self.way == "grouped_mm":
            return x * float(x.sum())  # which no trace goes through
        return torch.einsum("ni,eio->no", x, self.experts).reshape_as(x)


def test_experts_are_traced_on_operators_that_onnx_has_and_left_as_they_were():
    model = Grouped()
    checkpoint = api.as_checkpoint(model, example=torch.randn(2, 8), bits=8)
    assert [tensor.name for tensor in checkpoint.tensors] == ["experts"]
    assert model.way == "grouped_mm"
