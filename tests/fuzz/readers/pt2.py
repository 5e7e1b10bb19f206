"""Exported programs: members and fields of .pt2 archives."""

from __future__ import annotations

import functools
import io
import json
import random
import warnings
from pathlib import Path
from typing import Any

import torch

from ecqx_onnx.inputs.program.program import run_module, save_program
from ecqx_onnx.sources.loading import load_model
from tests.fuzz.mutation import (
    STRINGS,
    mutate_bytes,
    mutate_json,
    mutate_text,
    mutate_value,
    mutate_zip,
)

NAME = "pt2"
SUFFIX = ".pt2"
PLANTED = (
    "__import__('os').system('x')",
    "Pow(Integer(9), Pow(Integer(9), Integer(9)))",
    "Symbol('s0', positive=True, integer=False)",
    "Mul(Integer(2), Symbol('u9', integer=True))",
    "Max(Integer(1), oo)",
    "torch.ops.aten.from_file.default",
    "torch.ops.aten.zeros.default",
    "x): pass",
    "forward",
    "_modules",
    "graph",
    "s77",
    "u999999",
)


class Net(torch.nn.Module):
    """Dynamic sizes, a loop of an LSTM, a constant, a dict of outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = torch.nn.LSTM(4, 3, batch_first=True)
        self.fc = torch.nn.Linear(3, 2)

    def forward(self, x: torch.Tensor) -> dict[str, Any]:
        y = self.fc(self.lstm(x)[0][:, -1]) * torch.tensor([1.0, 2.0])
        return {"y": y, "rest": [x.reshape(x.shape[0] * 2, -1)]}


@functools.cache
def make_seeds() -> list[bytes]:
    """As we write it, and as torch.export.save does."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        batch = torch.export.Dim("batch")
        program = torch.export.export(
            Net().eval(), (torch.randn(2, 6, 4),), dynamic_shapes=({0: batch},)
        )
        buffer = io.BytesIO()
        torch.export.save(program, buffer)
        return [buffer.getvalue(), save_program(program)]


def mutate(seed: bytes, source: random.Random) -> bytes:
    """Fields of the JSON, mostly; else members and bytes."""
    if source.random() < 0.1:
        return mutate_bytes(seed, source)
    return mutate_zip(seed, source, _mutate_member)


def _mutate_member(content: bytes, source: random.Random) -> bytes:
    if content[:1] != b"{":
        return mutate_bytes(content, source)
    chance = source.random()
    if chance < 0.1:
        return mutate_text(content, source)
    if chance < 0.2:
        return mutate_json(content, source)
    document = json.loads(content)
    for _ in range(source.choice((1, 1, 2, 4))):
        document = _mutate_deep(document, source)
    return json.dumps(document).encode()


def _mutate_deep(value: Any, source: random.Random) -> Any:
    """One leaf changed, seldom a whole object."""
    if isinstance(value, dict) and value and source.random() < 0.97:
        key = source.choice(list(value))
        return {**value, key: _mutate_deep(value[key], source)}
    if isinstance(value, list) and value and source.random() < 0.97:
        at = source.randrange(len(value))
        return [*value[:at], _mutate_deep(value[at], source), *value[at + 1 :]]
    if isinstance(value, str) and source.random() < 0.8:
        return source.choice(PLANTED + STRINGS)
    if type(value) is int and source.random() < 0.6:
        return value + source.choice((-1, 1, 2, 10, 2**31, 2**62))
    if type(value) is bool:
        return not value
    return mutate_value(value, source)


def read(path: Path) -> None:
    """As `convert` and `validate` do before they trace or run it."""
    run_module(load_model(path).model)
