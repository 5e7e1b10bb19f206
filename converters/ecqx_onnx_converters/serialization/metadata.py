"""Turns what a file says of itself into the text that stands under METADATA_KEY, and back.

The text is JSON, deflated without a header from DICTIONARY, in base 85: of a small network it is a
third of the JSON. JSON as it is, which always begins with a brace, is read as well; up to format 4
that was what files had, with the list of tensors deflated by itself where that was shorter. Behind
the deflated bytes lie four of a checksum (checksum.py), which older files lack.
"""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

METADATA_KEY = "ecqx_onnx"
FORMAT = 5
READABLE = (3, 4, 5)  # formats of files that this version reads
RAW = -15  # deflate without a header
LONGEST = 1 << 22  # bytes of the JSON; a weight takes some 60
DEEPEST = 16  # objects and lists inside each other; ours have 4
CHECKSUM = 4  # bytes behind the deflated ones
# What such JSON often holds, the most usual last. Part of the format: another one needs another
# number.
DICTIONARY = b"".join(
    [
        b'"labels":["airplane","automobile","bird","cat","deer","dog","frog","horse","ship",',
        b'"truck"],"activations":"int8","data":"cifar10","data":"fsdd.npz","data":"sklearn:',
        b'digits","kind":"audio","kind":"array","mean":[],"scale":1.0,"std":[],"mean":[0.485,',
        b'0.456,0.406],"std":[0.229,0.224,0.225],',
        b'"features.classifier.embedding.encoder.decoder.blocks.attention.query.key.value.dense.',
        b'projection.pointwise.depthwise.downsample.shortcut.head.stem.backbone.bias",',
        b'"sparse","packed","storage":"dense","tensors":[["w","gradient":"absolute",',
        b'"granularity":"channel","levels":"asymmetric","exclude":[],"step_rate":0.001,',
        b'"zero_floor":0.5,"prune":0.01,"keep":0.1,"rho":2.0,"relevance_samples":null,',
        b'"relevance_memory":0.9,"start":"probability","refresh_every":16,"relevance_until":1.0,',
        b'"relevance":"epsilon_plus_flat","trained":false,"precision":"bfloat16","mean_error":',
        b'{"*":2,"conv1.weight":4,"linear.weight":4,"layer1.*":4},"distillation":0.5,',
        b'"temperature":"optimizer":"adam",["fc1.weight",["fc2.weight",["fc3.weight",[',
        b'"fc.weight",["conv2.weight",["layer1.0.conv1.weight",["layer1.0.conv2.weight",[',
        b'"layer2.1.conv1.weight",["layer3.2.conv2.weight",["classifier.weight",[',
        b'"layers.0.weight",["layers.2.weight",["features.0.weight",["0.weight",["2.weight",[',
        b'"linear.weight",["conv1.weight",{"format":5,"version":"0.1.0","recipe":{"augment":',
        b'"crop_and_flip","batch_size":128,"best_epoch":10,"bits":4,"data":"mnist.npz",',
        b'"entropy_ramp":0.5,"entropy_weight":0.1,"epochs":10,"learning_rate":0.002,"relevance":',
        b'null,"seed":0,"size_exponent":0.4,"step":"learned","validation":0.0},"preprocessing":',
        b'{"kind":"image","mean":[0.1307],"scale":255.0,"std":[0.3081],"version":1},"storage":',
        b'"packed","tensors":[["',
    ]
)


# Field -> types that it may have; a field that isn't there is None.
FIELDS: Mapping[str, tuple[type, ...]] = {
    "labels": (list,),
    "recipe": (dict, str),
    "preprocessing": (dict, str),
    "activations": (dict, str),
    "floats": (str,),
    "storage": (str,),
    "version": (str,),
    "tool_version": (str,),
}


def compute_levels_crc(levels: np.ndarray) -> int:
    """Compute the checksum of one weight's levels.

    Args:
        levels: Integers in [-128, 127], any shape.

    Returns:
        CRC-32 of them as int8, row-major.
    """
    return zlib.crc32(np.ascontiguousarray(levels, np.int8).tobytes())


def to_text(content: Mapping[str, Any], checksum: Callable[[int], int] | None = None) -> str:
    """Make the text that stands in a file.

    Args:
        content: JSON-able.
        checksum: Called with the CRC-32 of the deflated content, gives that of the whole model;
            None leaves it out.

    Returns:
        Base 85 text, without characters that XML or JSON would have to escape.
    """
    packer = zlib.compressobj(9, wbits=RAW, memLevel=9, zdict=DICTIONARY)
    text = json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode()
    deflated = packer.compress(text) + packer.flush()
    if checksum is not None:
        deflated += checksum(zlib.crc32(deflated)).to_bytes(CHECKSUM, "big")
    return base64.b85encode(deflated).decode()


def read_checksum(text: str) -> tuple[int, int] | None:
    """Read the checksum that `to_text` wrote behind the content.

    Args:
        text: As for `from_text`.

    Returns:
        (CRC-32 of the deflated content, the model's checksum); None for a text without one, as
        older files have.

    Raises:
        ValueError: The text can't be read.
    """
    if text[:1] == "{":
        return None
    _, behind = _inflate(text, DICTIONARY)
    if not behind:
        return None
    deflated = base64.b85decode(text)[:-CHECKSUM]
    return zlib.crc32(deflated), int.from_bytes(behind, "big")


def from_text(text: str) -> dict[str, Any]:
    """Read the content of a text of any of READABLE formats; the inverse of `to_text`.

    Args:
        text: What stands in a file, whoever wrote it.

    Returns:
        The JSON object: at most LONGEST bytes, DEEPEST deep, text that can be printed, fields of
        known names of known types.

    Raises:
        ValueError: The text is of another format, damaged, or beyond these limits.
        RecursionError: It is nested too deeply even to be read.
    """
    # 1. The JSON object.
    if text[:1] == "{":
        content = _parse(text.encode())
    else:
        inflated, _ = _inflate(text, DICTIONARY)
        content = _parse(inflated)
    if not isinstance(content, dict) or content.get("format") not in READABLE:
        raise ValueError(f"it isn't of format {FORMAT}")
    # 2. Its list of tensors, which older files may have deflated by itself.
    tensors = content.get("tensors")
    if isinstance(tensors, str):
        inflated, _ = _inflate(tensors, b"")
        tensors = _parse(inflated)
    if not isinstance(tensors, list):
        raise ValueError("its list of tensors is none")
    # 3. The types of all fields, so that no reader stumbles over them later.
    for name, types in FIELDS.items():
        if not isinstance(content.get(name), (*types, type(None))):
            raise ValueError(f"its {name} is a {type(content[name]).__name__}")
    labels = content.get("labels") or []
    if not all(isinstance(label, str) for label in labels):
        raise ValueError("one of its labels is no text")
    return content | {"tensors": tensors}


def _parse(text: bytes) -> Any:
    """JSON within the limits.

    ValueError for anything else, also for halves of characters, which no terminal prints.
    """
    if len(text) > LONGEST:
        raise ValueError(f"it has more than {LONGEST} bytes")
    content = json.loads(text)
    level = [content]
    for _ in range(DEEPEST):
        inner: list[Any] = []
        for part in level:
            if isinstance(part, dict):
                inner.extend(part.values())
            elif isinstance(part, list):
                inner.extend(part)
        level = inner
        if not level:
            break
    else:
        raise ValueError(f"it is nested more than {DEEPEST} deep")
    json.dumps(content, ensure_ascii=False).encode()
    return content


def _inflate(text: str, dictionary: bytes) -> tuple[bytes, bytes]:
    """The bytes that a base 85 text holds deflated, and what lies behind them.

    Of more than LONGEST, one more.
    """
    stretch = zlib.decompressobj(wbits=RAW, zdict=dictionary)
    try:
        found = stretch.decompress(base64.b85decode(text), LONGEST + 1)
    except zlib.error as error:
        raise ValueError(str(error)) from error
    if not stretch.eof and len(found) <= LONGEST:
        raise ValueError("it is cut short")
    if len(stretch.unused_data) not in (0, CHECKSUM):
        raise ValueError(f"{len(stretch.unused_data)} bytes follow it that are no checksum")
    return found, stretch.unused_data
