"""Passes take one value and return another; `convert` and the float model share one list of
them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import onnx
import pytest
import torch
from ecqx_onnx_converters import FloatGraph, Matching
from ecqx_onnx_converters.passes import sequence
from ecqx_onnx_converters.passes.sequence import list_passes
from ecqx_onnx_converters.passes.work import Work, apply_passes
from onnx import numpy_helper

from ecqx_onnx import api
from ecqx_onnx.checkpoint.float_model import make_float_model
from tests.conversions import float_graph


@dataclass(frozen=True)
class Remark:
    sentence: str


def work() -> Work:
    graph = float_graph(torch.nn.Linear(3, 2), [torch.zeros(1, 3)])
    return Work(graph, Matching((), ()))


def with_remark(text: str):
    return lambda work: replace(work, notes=(*work.notes, Remark(text)))


def test_passes_are_applied_in_their_order_and_change_nothing_that_they_were_given():
    start = work()
    end = apply_passes([with_remark("one"), with_remark(""), with_remark("two")], start)
    assert end.sentences == ["one", "two"]
    assert len(end.find_notes(Remark)) == 3
    assert end.find_notes(str) == ()
    assert start.notes == ()
    assert apply_passes([], start) is start


@pytest.mark.parametrize("floats", ["float32", "float16"])
@pytest.mark.parametrize("emulate", [False, True])
def test_every_pass_takes_a_work_and_leaves_it_as_it_was(floats, emulate):
    start = work()
    before = start.graph.to_model().SerializeToString(deterministic=True)
    for rewrite in list_passes(floats, activations=with_remark("integers"), emulate=emulate):
        assert isinstance(rewrite(start), Work)
        assert start.graph.to_model().SerializeToString(deterministic=True) == before
        assert start.notes == ()


@pytest.mark.parametrize("floats", ["float32", "float16"])
def test_a_new_pass_reaches_the_file_and_the_float_model_alike(floats, tmp_path, monkeypatch):
    """A pass that moves a bias, as no pass would: validation still finds one and the same."""

    def move_bias(work: Work) -> Work:
        proto = onnx.ModelProto()
        proto.CopyFrom(work.graph.proto)
        biases = [tensor for tensor in proto.graph.initializer if len(tensor.dims) == 1]
        for bias in biases:
            values = numpy_helper.to_array(bias) + np.float32(0.25)
            bias.CopyFrom(numpy_helper.from_array(values, bias.name))
        return replace(work, graph=FloatGraph(proto, work.graph.weights))

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.ReLU(), torch.nn.Linear(32, 4))
    checkpoint = api.as_checkpoint(model.eval(), example=torch.zeros(2, 8), bits=4)
    plain = make_float_model(checkpoint, floats=floats)
    monkeypatch.setattr(sequence, "fold_batchnorms", move_bias)
    assert make_float_model(checkpoint, floats=floats) != plain
    api.convert(checkpoint, tmp_path / "moved.onnx", floats=floats)
    report = api.validate(tmp_path / "moved.onnx", against=checkpoint, latency_runs=0)
    checks = {check.name: check.passed for check in report.checks}
    assert checks["parameters"]  # the file's against the float model's
    assert not checks["outputs"]  # of PyTorch, which knows nothing of the pass
