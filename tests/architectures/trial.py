"""Bring one architecture through convert, validate and a step of training; what came of it."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from ecqx_onnx import api
from ecqx_onnx.errors import InputError
from ecqx_onnx.quantization import Quantizer
from tests.architectures.entry import Entry


@dataclass(frozen=True)
class Row:
    """What came of one architecture.

    parameters: floats in the model. weights: names that were quantized. share: of the parameters.
    float_left: names of matrices that stayed float. nbytes: of the .onnx. trouble: what went
    wrong, a sentence each; empty for success. relevances: how many weights had one. seconds: all.
    """

    name: str
    family: str
    parameters: int = 0
    weights: tuple[str, ...] = ()
    share: float = 0.0
    float_left: tuple[str, ...] = ()
    nbytes: int = 0
    relevances: int = 0
    notes: tuple[str, ...] = ()
    trouble: tuple[str, ...] = ()
    seconds: float = 0.0


def try_entry(entry: Entry, folder: Path) -> Row:
    """Convert at 4 bits without training, validate, then train a step with the defaults."""
    start = time.perf_counter()
    torch.manual_seed(0)
    model, example = entry.make()
    model.eval()
    sizes = {name: value.numel() for name, value in model.named_parameters()}
    shapes = {name: value.shape for name, value in model.named_parameters()}
    trouble: list[str] = []
    names: tuple[str, ...] = ()
    nbytes, notes, quantized = 0, (), 0
    try:
        checkpoint = api.as_checkpoint(model, example=example, bits=4)
        names = tuple(tensor.name for tensor in checkpoint.tensors)
        quantized = sum(tensor.size for tensor in checkpoint.tensors)
        path = folder / "model.onnx"
        report = api.convert(checkpoint, path, force=True)
        nbytes, notes = report.nbytes, checkpoint.notes
        trouble += [f"not placed: {entry.name}" for entry in checkpoint.matching.missing]
        checked = api.validate(path, against=checkpoint, latency_runs=0)
        trouble += [f"validate: {failure}" for failure in checked.failures]
    except InputError as error:
        trouble.append(f"convert: {error}")
    relevances = 0
    try:
        quantizer = train_step(model, example)
        relevances = len(quantizer.relevances())
        trained = {tensor.name for tensor in quantizer.tensors()}
        if names and trained != set(names):
            more, fewer = sorted(trained - set(names)), sorted(set(names) - trained)
            trouble.append(f"the Quantizer has {more[:4]} and lacks {fewer[:4]}")
        failed = quantizer.report().relevance_failures
        trouble += [f"relevance of {name}: {why}" for name, why in failed]
    except InputError as error:
        trouble.append(f"training: {error}")
    left = tuple(name for name in sizes if name not in names and len(shapes[name]) >= 2)
    return Row(
        entry.name,
        entry.family,
        sum(sizes.values()),
        names,
        quantized / max(1, sum(sizes.values())),
        left,
        nbytes,
        relevances,
        tuple(notes),
        tuple(trouble),
        time.perf_counter() - start,
    )


def train_step(model: torch.nn.Module, example: Any) -> Quantizer:
    """One step with the default relevances; the start is the model's first output."""
    quantizer = Quantizer(model, example, start=start_at_first)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    model.train()
    output = call(model, example)
    floats = [leaf for leaf in list_tensors(output) if leaf.is_floating_point()]
    sum(leaf.square().mean() for leaf in floats if leaf.requires_grad).backward()
    optimizer.step()
    quantizer.step(example, None)
    model.eval()
    return quantizer


def call(model: torch.nn.Module, example: Any) -> Any:
    if isinstance(example, Mapping):
        return model(**example)
    return model(*(example if isinstance(example, tuple) else (example,)))


def start_at_first(output: Any, _: Any) -> tuple[torch.Tensor, torch.Tensor]:
    first = next(leaf for leaf in list_tensors(output) if leaf.is_floating_point())
    return first, first.detach()


def list_tensors(output: Any) -> list[torch.Tensor]:
    values = output.to_tuple() if hasattr(output, "to_tuple") else output
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)]


HEADING = (
    "| architecture | family | parameters | quantised | weights | relevances | .onnx |"
    " matrices left float | result |\n|---|---|---:|---:|---:|---:|---:|---|---|"
)


def write_row(row: Row) -> str:
    """A row of the table in Markdown."""
    left = ", ".join(row.float_left[:3])
    left += f" and {len(row.float_left) - 3} more" if len(row.float_left) > 3 else ""
    result = "; ".join(row.trouble).replace("|", "/") or "ok"
    return (
        f"| {row.name} | {row.family} | {row.parameters:,} | {100 * row.share:.1f} % |"
        f" {len(row.weights)} | {row.relevances} | {row.nbytes:,} | {left} | {result} |"
    )


def write_table(rows: list[Row]) -> str:
    """The rows in Markdown."""
    return "\n".join([HEADING, *map(write_row, rows)])
