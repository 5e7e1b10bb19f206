"""ONNX models, someone else's and ours, through every command that opens one."""

from __future__ import annotations

import random
from pathlib import Path

from ecqx_onnx.errors import EcqxError
from tests.fuzz import models
from tests.fuzz.commands import run_command

NAME = "onnx"
SUFFIX = ".onnx"


def make_seeds() -> list[bytes]:
    """Weights as floats, behind DequantizeLinear, in subgraphs; and ours: dense, sparse, packed."""
    return [*models.foreign_models(), *models.our_models()]


def mutate(seed: bytes, random: random.Random) -> bytes:
    """Fields, types, shapes and attributes of the message; now and then its bytes."""
    return models.mutate_model(seed, random)


def read(path: Path) -> None:
    """Every command is tried, whatever the others said; refused if all refuse."""
    out = path.with_name("out.onnx")
    refusals: list[EcqxError] = []
    for command in (
        ["inspect"],
        ["validate"],
        ["pack", out, "--force"],
        ["unpack", out, "--force"],
    ):
        try:
            run_command(command[0], path, *command[1:])
        except EcqxError as error:
            refusals.append(error)
    out.unlink(missing_ok=True)
    if len(refusals) == 4:
        raise refusals[0]
