"""Streams of packed weights: payload, tree, tables, sizes, as they lie in a model."""

from __future__ import annotations

import random
from pathlib import Path

import onnx
from ecqx_onnx_converters import read_weights

from tests.fuzz import models

NAME = "packed"
SUFFIX = ".onnx"


def make_seeds() -> list[bytes]:
    """Files of today with one and with several streams."""
    return models.packed_models()


def mutate(seed: bytes, random: random.Random) -> bytes:
    """One to three tensors, or inputs of a decoder, change."""
    model = onnx.load_model_from_string(seed)
    for _ in range(random.choice((1, 1, 2, 3))):
        if random.random() < 0.8:
            models.mutate_tensor(random.choice(model.graph.initializer), random)
        else:
            models.mutate_node(random.choice(model.graph.node), model, random)
    return model.SerializeToString()


def read(path: Path) -> None:
    """Refused, or levels, right or wrong."""
    read_weights(path)
