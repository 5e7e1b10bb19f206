"""Halve between input and output until the first tensor beyond its bound is found.

An error stays, so that what lies behind the first bad tensor is bad as well: log2 n looks do.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from ecqx_onnx.errors import CheckFailed, EcqxError
from ecqx_onnx.inputs.onnx_file import OnnxFile
from ecqx_onnx.runtime.sessions import count_executed_operators
from ecqx_onnx.validation.bisection.result import Bisection, Probe
from ecqx_onnx.validation.bisection.taps import OnnxSide, Side, Tap, align, as_float

# Least SNR in dB: 80 is an error of 1e-4, some hundred units in the last place of float32.
ROUNDING = 80.0
FLOAT16 = 46.0  # 2^-11 of each parameter, over some layers
QUANTIZED = 20.0  # steps of 8-bit activations, a tenth of the signal
FLOAT_MODEL = 26.0  # 5 %, as `validate` asks of files that were not trained
FUSED = ("Fused", "Nchwc", "Nhwc", "SkipLayerNorm", "BiasGelu", "QuickGelu", "FastGelu")


def bisect_file(
    file: OnnxFile,
    inputs: Sequence[np.ndarray],
    *,
    reference: Any = None,
    float_reference: bool = False,
    quantized: bool = False,
) -> tuple[Bisection, ...]:
    """Compare a file with its reference, and its optimizations with none, tensor by tensor.

    Args:
        file: the .onnx file.
        inputs: one batch, in the order of the graph's inputs.
        reference: a torch.fx.GraphModule, an OnnxFile, or None for the second question alone.
        float_reference: whether that is the float model from before the quantization.
        quantized: whether the file asks for 8-bit activations.

    Returns:
        One a question.

    Raises:
        ModelError: if the file is too large.
    """
    plain = OnnxSide(file, "disabled")
    found = []
    half = any(tensor.data_type == 10 for tensor in file.proto.graph.initializer)
    bound = FLOAT16 if half else ROUNDING
    if quantized:
        bound = QUANTIZED
    other = _open_reference(reference)
    if other is not None:
        pairs = align(plain.taps, other.taps)
        least = min(bound, FLOAT_MODEL) if float_reference else bound
        name = "the float model" if float_reference else "PyTorch"
        name = "the original" if isinstance(reference, OnnxFile) and not float_reference else name
        causes = _list_reference_causes(half, quantized, float_reference)
        between = f"{name} against onnxruntime without optimisations"
        found.append(_bisect(between, pairs, (plain, other), inputs, least, causes))
    elif reference is not None:
        found.append(
            Bisection(
                "PyTorch", 0, bound, (), "the PyTorch model is no exported graph: give a .pt2"
            )
        )
    optimized = OnnxSide(file, "all")
    pairs = [(tap, tap) for tap in plain.taps]
    causes = _list_optimization_causes(file, inputs, quantized)
    between = "all optimisations against none"
    found.append(_bisect(between, pairs, (optimized, plain), inputs, bound, causes))
    return tuple(found)


def _open_reference(reference: Any) -> Side | None:
    if isinstance(reference, OnnxFile):
        return OnnxSide(reference, "disabled")
    if reference is None or not hasattr(reference, "graph"):
        return None
    from ecqx_onnx.validation.bisection.torch_side import TorchSide

    return TorchSide(reference)


def _bisect(
    between: str,
    pairs: Sequence[tuple[Tap, Tap]],
    sides: tuple[Side, Side],
    inputs: Sequence[np.ndarray],
    bound: float,
    causes: Sequence[str],
) -> Bisection:
    """Halve; tensors that cannot be compared are passed over."""
    places = list(range(len(pairs)))
    probes: dict[int, Probe | None] = {}

    def look(place: int) -> Probe | None:
        if place not in probes:
            snr = _measure(pairs[place], sides, inputs)
            first, second = pairs[place]
            name = second.name if "(" in second.name else first.name
            probe = None
            if snr is not None:
                probe = Probe(place, name, first.operator, snr, bool(snr >= bound))
            probes[place] = probe
        return probes[place]

    while places and look(places[-1]) is None:
        places.pop()
    low, high = 0, len(places) - 1
    is_bad = bool(places) and not look(places[-1]).passed  # type: ignore[union-attr]
    while is_bad and low < high:
        middle = (low + high) // 2
        probe = look(places[middle])
        if probe is None:
            del places[middle]
            high -= 1
        elif probe.passed:
            low = middle + 1
        else:
            high = middle
    seen = tuple(probe for _, probe in sorted(probes.items()) if probe is not None)
    result = Bisection(between, len(places), bound, seen, "")
    cause = _tell_cause(result, is_bad, causes)
    return Bisection(between, len(places), bound, seen, cause)


def _measure(
    pair: tuple[Tap, Tap], sides: tuple[Side, Side], inputs: Sequence[np.ndarray]
) -> float | None:
    """SNR in dB; None where the two cannot be compared."""
    try:
        found = as_float(sides[0].read(pair[0], inputs))
        wanted = as_float(sides[1].read(pair[1], inputs))
    except (EcqxError, LookupError, TypeError, ValueError):
        return None
    if found.shape != wanted.shape or not wanted.size:
        return None
    signal = float(np.sum(wanted * wanted))
    error = float(np.sum((found - wanted) ** 2))
    if not math.isfinite(error):
        same = np.array_equal(found, wanted, equal_nan=True)
        return math.inf if same else -math.inf
    if error == 0:
        return math.inf
    return 10 * math.log10(signal / error) if signal else -math.inf


def _tell_cause(result: Bisection, is_bad: bool, causes: Sequence[str]) -> str:
    if not result.probes:
        return f"{result.between}: no tensor of the two could be compared"
    if not is_bad or result.first is None:
        return f"{result.between}: no tensor leaves its bound"
    first = result.first
    return (
        f"{result.between}: the first tensor beyond its bound is {first.name}, made by"
        f" {first.operator}, {first.snr:.1f} dB where {result.bound:.0f} are asked for;"
        f" likely cause: {causes[0]}"
    )


def _list_reference_causes(half: bool, quantized: bool, float_reference: bool) -> list[str]:
    """The likeliest first."""
    causes = []
    if quantized:
        causes.append("8-bit activations whose range was calibrated too narrow or too wide")
    if half:
        causes.append("parameters in float16")
    if float_reference:
        causes.append("the weight in front of it was rounded to few levels")
    causes.append(
        "other weights, biases or another preprocessing than PyTorch's, since rounding is smaller"
    )
    return causes


def _list_optimization_causes(
    file: OnnxFile, inputs: Sequence[np.ndarray], quantized: bool
) -> list[str]:
    """What the optimized graph really executes tells."""
    try:
        executed = count_executed_operators(file.path, tuple(inputs))
    except CheckFailed:
        executed = Counter()
    causes = []
    if any("MatMulNBits" in name for name in executed):
        causes.append("MatMulNBits, which may round activations to 8 bits; --dequantize folded")
    if any("DynamicQuantize" in name for name in executed):
        causes.append("activations that the runtime quantizes by itself; --dequantize folded")
    if quantized:
        causes.append("integer kernels, which round sums that the graph as written does not")
    fused = sorted(name for name in executed if any(part in name for part in FUSED))
    if fused:
        causes.append(f"a fused operator, which sums in another order ({', '.join(fused)})")
    causes.append("a rewrite of the graph by the runtime")
    return causes
