"""Train or compress a model to 2-5 bit sparse weights, and write them as a tiny ONNX file.

Stock runtimes run that file, and `validate` shows that it computes the same as the model:

    import ecqx_onnx

    preprocessing = ecqx_onnx.Preprocessing("image", scale=255.0)  # what the loader does
    quantizer = ecqx_onnx.Quantizer(model, bits=4, entropy_weight=0.1)
    for x, y in loader:
        optimizer.zero_grad()
        loss_function(model(x), y).backward()
        optimizer.step()
        quantizer.step(x, y)
    ecqx_onnx.save(quantizer, "model.pt", example=x, preprocessing=preprocessing)
    ecqx_onnx.convert("model.pt", "out.onnx")
    ecqx_onnx.validate("out.onnx", against="model.pt", data="data.npz")

Names are imported when first used, so that `import ecqx_onnx` alone loads neither torch nor onnx.
"""

from importlib import import_module
from typing import Any

__version__ = "0.2.0"

_HOMES = {
    "Quantizer": "ecqx_onnx.quantization",
    "Recipe": "ecqx_onnx.options.quantizer",
    "quantize": "ecqx_onnx.verbs.quantize",
    "save": "ecqx_onnx.api",
    "convert": "ecqx_onnx.api",
    "validate": "ecqx_onnx.api",
    "deploy": "ecqx_onnx.api",
    "compress": "ecqx_onnx.verbs.compress",
    "CompressResult": "ecqx_onnx.compression.result",
    "inspect": "ecqx_onnx.inspection",
    "pack": "ecqx_onnx.verbs.pack",
    "unpack": "ecqx_onnx.verbs.pack",
    "load": "ecqx_onnx.checkpoint",
    "load_dataset": "ecqx_onnx.data",
    "Preprocessing": "ecqx_onnx.preprocessing",
    "QuantTensor": "ecqx_onnx.tensors",
    "Scale": "ecqx_onnx.tensors",
    "Codebook": "ecqx_onnx.tensors",
    "EcqxError": "ecqx_onnx.errors",
    "InputError": "ecqx_onnx.errors",
    "CheckFailed": "ecqx_onnx.errors",
}
__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'ecqx_onnx' has no attribute {name!r}")
    try:
        return getattr(import_module(_HOMES[name]), name)
    except ImportError as error:
        from ecqx_onnx.errors import explain_missing_package

        raise explain_missing_package(error, f"ecqx_onnx.{name}") or error from error


def __dir__() -> list[str]:
    return __all__
