"""What an .onnx file says of itself: deflated JSON, preprocessing, labels, records of weights."""

from __future__ import annotations

import json
import random
from pathlib import Path

import onnx
from ecqx_onnx_converters import read_weights
from ecqx_onnx_converters.serialization.metadata import METADATA_KEY, from_text, to_text

from ecqx_onnx.inputs.onnx_file import read_onnx
from ecqx_onnx.inspection import inspect
from ecqx_onnx.validation import read_preprocessing
from tests.fuzz import models
from tests.fuzz.mutation import mutate_text, mutate_value

NAME = "metadata"
SUFFIX = ".onnx"


def make_seeds() -> list[bytes]:
    """Files of ours, each with a recipe, labels and a preprocessing."""
    return models.our_models()


def mutate(seed: bytes, random: random.Random) -> bytes:
    """A value of the JSON, or characters of the text."""
    model = onnx.load_model_from_string(seed)
    entry = next(entry for entry in model.metadata_props if entry.key == METADATA_KEY)
    if random.random() < 0.8:
        content = mutate_value(from_text(entry.value), random)
        for _ in range(random.choice((0, 0, 1))):
            content = mutate_value(content, random)
        plain = random.random() < 0.5 or not isinstance(content, dict)
        try:
            entry.value = json.dumps(content) if plain else to_text(content)
        except UnicodeEncodeError:  # half a character, which only JSON's escapes can say
            entry.value = json.dumps(content)
    else:
        text = mutate_text(entry.value.encode(), random)[:1_000_000]
        entry.value = text.decode("utf-8", "ignore")
    return model.SerializeToString()


def read(path: Path) -> None:
    """By all that look at it."""
    read_preprocessing(read_onnx(path))
    inspect(path).to_json()
    read_weights(path)
