"""Which passes lie between an exported graph and the plan of its file, in their order.

`convert` and the float model that validation compares with take their passes from here, so that
both always speak of the same parameters.
"""

from __future__ import annotations

from ecqx_onnx_converters.passes.batchnorm import fold_batchnorms
from ecqx_onnx_converters.passes.float16 import round_parameters, round_steps, store_float16
from ecqx_onnx_converters.passes.work import Pass


def list_passes(
    floats: str, *, activations: Pass | None = None, emulate: bool = False
) -> tuple[Pass, ...]:
    """List the passes of a conversion.

    Args:
        floats: type of the parameters that stay float, "float32" or "float16".
        activations: the pass that puts activations on integers; None where they stay float.
        emulate: round parameters as the file has them, but keep them float32: for the float model
            that a file is compared with.

    Returns:
        The passes, the first one first.
    """
    halve = floats == "float16"
    passes: list[Pass] = [fold_batchnorms]
    if halve:
        passes.append(round_steps)  # before biases take their scale from the steps
    if activations is not None:
        passes.append(activations)
    if halve:
        passes.append(round_parameters if emulate else store_float16)
    return tuple(passes)
