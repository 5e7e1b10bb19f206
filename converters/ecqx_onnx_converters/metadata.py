"""What a file says of itself, under METADATA_KEY <-> the text that stands there.

The text is JSON, deflated without a header from DICTIONARY, in base 85: of a small network it is a third of the JSON. JSON as it
is, which always begins with a brace, is read as well; up to format 4 that was what files had, with the list of tensors deflated
by itself where that was shorter.
"""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Mapping
from typing import Any

METADATA_KEY, FORMAT, READABLE = "ecqx_onnx", 5, (3, 4, 5)
RAW, LONGEST = -15, 1 << 26  # deflate without a header; bytes of the JSON
# What such JSON often holds, the most usual last. Part of the format: another one needs another number.
DICTIONARY = b"".join(
    [
        b'"labels":["airplane","automobile","bird","cat","deer","dog","frog","horse","ship","truck"],"activations":"int8",'
        b'"data":"cifar10","data":"fsdd.npz","data":"sklearn:digits","kind":"audio","kind":"array","mean":[],"scale":1.0,"std":[],'
        b'"mean":[0.485,0.456,0.406],"std":[0.229,0.224,0.225],"features.classifier.embedding.encoder.decoder.blocks.attention.'
        b'query.key.value.dense.projection.pointwise.depthwise.downsample.shortcut.head.stem.backbone.bias","sparse",'
        b'"packed","storage":"dense","tensors":[["w",'
        b'"gradient":"absolute","granularity":"channel","levels":"asymmetric","exclude":[],"step_rate":0.001,"zero_floor":0.5,'
        b'"prune":0.01,"keep":0.1,"rho":2.0,"relevance_samples":null,"relevance_memory":0.9,"start":"probability","refresh_every":16,'
        b'"relevance_until":1.0,"relevance":"epsilon_plus_flat","trained":false,"precision":"bfloat16","mean_error":'
        b'{"*":2,"conv1.weight":4,"linear.weight":4,"layer1.*":4},"distillation":0.5,"temperature":"optimizer":"adam",'
        b'["fc1.weight",["fc2.weight",["fc3.weight",["fc.weight",["conv2.weight",["layer1.0.conv1.weight",["layer1.0.conv2.weight",'
        b'["layer2.1.conv1.weight",["layer3.2.conv2.weight",["classifier.weight",["layers.0.weight",["layers.2.weight",'
        b'["features.0.weight",["0.weight",["2.weight",["linear.weight",["conv1.weight",',
        b'{"format":5,"version":"0.1.0","recipe":{"augment":"crop_and_flip","batch_size":128,"best_epoch":10,"bits":4,'
        b'"data":"mnist.npz","entropy_ramp":0.5,"entropy_weight":0.1,"epochs":10,"learning_rate":0.002,"relevance":null,"seed":0,'
        b'"size_exponent":0.4,"step":"learned","validation":0.0},"preprocessing":{"kind":"image","mean":[0.1307],"scale":255.0,'
        b'"std":[0.3081],"version":1},"storage":"packed","tensors":[["',
    ]
)


def to_text(content: Mapping[str, Any]) -> str:
    """content: JSON-able."""
    packer = zlib.compressobj(9, wbits=RAW, memLevel=9, zdict=DICTIONARY)
    text = json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode()
    return base64.b85encode(packer.compress(text) + packer.flush()).decode()


def from_text(text: str) -> dict[str, Any]:
    """The inverse of `to_text`, for every text of READABLE formats. ValueError or RecursionError for others."""
    content = json.loads(text if text[:1] == "{" else _inflated(text, DICTIONARY))
    if not isinstance(content, dict) or content.get("format") not in READABLE:
        raise ValueError(f"it isn't of format {FORMAT}")
    tensors = content.get("tensors")
    if isinstance(tensors, str):
        tensors = json.loads(_inflated(tensors))
    if not isinstance(tensors, list):
        raise ValueError("its list of tensors is none")
    return content | {"tensors": tensors}


def _inflated(text: str, dictionary: bytes = b"") -> bytes:
    stretch = zlib.decompressobj(wbits=RAW, zdict=dictionary)
    try:
        return stretch.decompress(base64.b85decode(text), LONGEST)
    except zlib.error as error:
        raise ValueError(str(error)) from error
