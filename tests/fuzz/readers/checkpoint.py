"""Checkpoints of ours: `inspect` and `convert` of them, and the PyTorch reference inside."""

from __future__ import annotations

import dataclasses
import functools
import io
import random
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ecqx_onnx import api, checkpoint
from ecqx_onnx.checkpoint.insight import Insight, WeightInsight
from ecqx_onnx.preprocessing import Preprocessing
from tests.fuzz.commands import run_command
from tests.fuzz.mutation import INTEGERS, mutate_bytes, mutate_json, mutate_value, mutate_zip

NAME = "checkpoint"
SUFFIX = ".pt"


class Net(torch.nn.Module):
    """A tied weight, a bias, a buffer, a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(1, 2, 3)
        self.fc = torch.nn.Linear(8, 8)
        self.tied = torch.nn.Linear(8, 8, bias=False)
        self.tied.weight = self.fc.weight
        self.register_buffer("shift", torch.ones(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv(x).relu().flatten(1)
        return self.tied(self.fc(y).relu()) + self.shift


@functools.cache
def make_seeds() -> list[bytes]:
    """One with all optional entries, one with a codebook."""
    torch.manual_seed(0)
    net = Net().eval()
    with torch.no_grad():
        net.conv.weight.copy_(torch.randint(-3, 4, net.conv.weight.shape) * 0.125)
        net.fc.weight.copy_(torch.tensor([-0.31, 0.0, 0.11, 0.7])[torch.randint(0, 4, (8, 8))])
    made = api.as_checkpoint(net, example=torch.zeros(1, 1, 4, 4))
    pairs = np.array([0.5, 0.25], np.float16)
    weight = WeightInsight("fc.weight", pairs, pairs, np.array([1, -1], np.int8), 0.5, "eps", 0.1)
    insight = Insight(
        weights=(weight,),
        warnings=("one",),
        left_float=(("bias", "small"),),
        history=({"epoch": 1, "loss": float("nan"), "accuracy": None},),
        best_epoch=1,
        before={"hits": 1, "total": 2},
    )
    whole = dataclasses.replace(
        made,
        insight=insight,
        ranges={"x": (0.0, 1.0)},
        recipe={"bits": 4, "layers": {"fc": [1, 2]}},
        preprocessing=Preprocessing("image", scale=255.0, mean=(0.5,), std=(0.5,)),
        labels=tuple("abcdefgh"),
        notes=("a note",),
    )
    return [_saved(made), _saved(whole)]


def _saved(made: checkpoint.Checkpoint) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.pt"
        checkpoint.save(made, path)
        return path.read_bytes()


def mutate(seed: bytes, source: random.Random) -> bytes:
    """Entries of the document, mostly; else the archive or its bytes."""
    chance = source.random()
    if chance < 0.15:
        return mutate_bytes(seed, source)
    if chance < 0.3:
        return mutate_zip(seed, source, mutate_bytes)
    document = torch.load(io.BytesIO(seed), weights_only=True)
    for _ in range(source.choice((1, 1, 2, 3))):
        document = mutate_document(document, source)
    return save_document(document, seed)


def save_document(document: Any, otherwise: bytes) -> bytes:
    """The document as torch.save writes it; `otherwise` for what no file can hold."""
    buffer = io.BytesIO()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.save(document, buffer)
    except (OverflowError, RuntimeError, RecursionError, TypeError, ValueError):
        return otherwise
    return buffer.getvalue()


def mutate_document(value: Any, source: random.Random) -> Any:
    """One place of the document changed: an entry, the JSON in a text, a tensor."""
    inside = source.random() < 0.85
    if isinstance(value, dict) and value and inside:
        key = source.choice(list(value))
        if source.random() < 0.75:
            return {**value, key: mutate_document(value[key], source)}
    elif isinstance(value, list) and value and inside:
        at = source.randrange(len(value))
        if source.random() < 0.75:
            return [*value[:at], mutate_document(value[at], source), *value[at + 1 :]]
    elif isinstance(value, str) and value[:1] in "{[" and inside:
        return mutate_json(value.encode(), source).decode("utf-8", "surrogatepass")
    elif isinstance(value, torch.Tensor) and inside:
        return mutate_tensor(value, source)
    return mutate_value(value, source)


def mutate_tensor(value: torch.Tensor, source: random.Random) -> Any:
    """Another type, shape, stride, content; repeated without end; sparse."""
    kind = source.randrange(9)
    flat = value.detach().reshape(-1)
    if kind == 0:
        dtypes = (torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.bool)
        return value.to(source.choice((*dtypes, torch.complex64)))
    if kind == 1:
        return flat[:1].expand(source.choice((2**10, 2**31, 2**40))) if flat.numel() else value
    if kind == 2:
        return value[None] if source.random() < 0.5 else flat
    if kind == 3:
        return flat[: source.randrange(flat.numel() + 1)].clone()
    if kind == 4:
        return value.to_sparse() if value.ndim else value
    if kind == 5 and value.dtype.is_floating_point:
        return torch.full_like(value, source.choice((float("nan"), float("inf"), 0.0, -1.0, 6e4)))
    if kind == 6 and flat.numel():
        changed = flat.clone()
        number = source.choice(INTEGERS) % 128
        changed[source.randrange(flat.numel())] = number
        return changed.reshape(value.shape)
    if kind == 7:
        return torch.nn.Parameter(value) if value.dtype.is_floating_point else value.bool()
    changed_bytes = mutate_bytes(value.numpy().tobytes(), source)
    return torch.frombuffer(bytearray(changed_bytes or b"\0"), dtype=torch.uint8)


def read(path: Path) -> None:
    """Everything that a command does with it."""
    run_command("inspect", path)
    loaded = checkpoint.load(path)
    run_command("convert", path, path.with_suffix(".onnx"), "--force")
    loaded.module()
