"""State dicts and other files of torch.save, with a factory for their network; .safetensors too."""

from __future__ import annotations

import functools
import io
import json
import pickle
import random
import struct
from pathlib import Path

import torch

from ecqx_onnx.sources.loading import load_model
from tests.fuzz.mutation import mutate_bytes, mutate_zip
from tests.fuzz.readers.checkpoint import mutate_document, save_document

NAME = "state_dict"
SUFFIX = ".pt"
NETWORK = "import torch\nINPUT_SHAPE = (4,)\ndef net():\n    return torch.nn.Linear(4, 3)\n"


@functools.cache
def make_seeds() -> list[bytes]:
    """Bare, wrapped as training scripts do, and in the format of torch before 1.6."""
    torch.manual_seed(0)
    network = torch.nn.Linear(4, 3)
    optimizer = torch.optim.Adam(network.parameters())
    network(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    state = network.state_dict()
    wrapped = {"epoch": 3, "state_dict": dict(state), "optimizer": optimizer.state_dict()}
    return [_saved(state), _saved(wrapped), _saved(state, legacy=True)]


def _saved(value: object, *, legacy: bool = False) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, _use_new_zipfile_serialization=not legacy)
    return buffer.getvalue()


def mutate(seed: bytes, source: random.Random) -> bytes:
    """Entries, the pickle's opcodes, members, bytes; or another format altogether."""
    chance = source.random()
    if chance < 0.05:
        return _safetensors(source)
    if chance < 0.1:
        return pickle.dumps({"weight": [1.0, 2.0]}, protocol=source.randrange(6))
    if seed[:2] != b"PK" or chance < 0.2:
        return mutate_bytes(seed, source)
    if chance < 0.5:
        return mutate_zip(seed, source, mutate_bytes)
    document = torch.load(io.BytesIO(seed), weights_only=True)
    return save_document(mutate_document(document, source), seed)


def _safetensors(source: random.Random) -> bytes:
    header = json.dumps({"weight": {"dtype": "F32", "shape": [3, 4], "data_offsets": [0, 48]}})
    length = source.choice((len(header), 0, 2**40, 2**63))
    return struct.pack("<Q", length) + header.encode() + bytes(48)


def read(path: Path) -> None:
    """As `convert FILE --model net.py:net`."""
    factory = path.parent / "net.py"
    factory.write_text(NETWORK, encoding="utf-8")
    load_model(path, factory=f"{factory}:net")
