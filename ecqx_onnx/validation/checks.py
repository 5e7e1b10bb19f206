"""The checks of a validation report, each with its verdict and one sentence.

What was measured goes in, a `Check` comes out. Names of checks are part of the report's JSON.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
from ecqx_onnx_converters.graph.uses import list_operators
from ecqx_onnx_converters.graph.well_formed import find_fault
from ecqx_onnx_converters.serialization.reading import is_as_written, read_metadata

from ecqx_onnx.errors import CheckFailed
from ecqx_onnx.inputs.onnx_file import OnnxFile
from ecqx_onnx.runtime.latency import Latency
from ecqx_onnx.runtime.sessions import Session, run
from ecqx_onnx.validation.outputs.bounds import Bound
from ecqx_onnx.validation.outputs.comparison import Comparison, Difference
from ecqx_onnx.validation.outputs.metrics import Agreement, Proportion, find_largest_difference
from ecqx_onnx.validation.report import Check
from ecqx_onnx.validation.stored.parameters import ParametersComparison
from ecqx_onnx.validation.stored.weights import WeightsComparison

# Operators that round activations to integers, and those that compute on such.
QUANTIZING = {
    "MatMulNBits",
    "QuantizeLinear",
    "DynamicQuantizeLinear",
    "DynamicQuantizeMatMul",
    "DynamicQuantizeLSTM",
    "QGemm",
    "QAttention",
    "MatMulIntegerToFloat",
}


def check_format(file: OnnxFile, *, original: Path | None = None) -> Check:
    """Ask onnx's own checker, with full shape inference where it knows all that is in the file.

    Args:
        file: The file to check.
        original: What it was made from, which the checker may reject, too: runtimes take more.

    Returns:
        The check "format".
    """
    fault = find_fault(file.path)
    if fault is None:
        sparse = bool(file.proto.graph.sparse_initializer)  # strict shape inference rejects these
        without = ", without shape inference, which rejects sparse initializers" if sparse else ""
        sentence = f"onnx's checker accepts the file (opset {_find_opset(file.proto)}{without})"
        return Check("format", True, None, None, sentence)
    if original is None or find_fault(original) is None:
        return Check("format", False, None, None, f"onnx's checker rejects the file: {fault}")
    sentence = f"onnx's checker rejects the file as it rejects the original: {fault}"
    return Check("format", None, None, None, sentence)


def _find_opset(proto: onnx.ModelProto) -> int:
    return max(
        (entry.version for entry in proto.opset_import if entry.domain in ("", "ai.onnx")),
        default=0,
    )


def check_optimization(
    optimized: Session,
    plain: Session,
    inputs: Sequence[np.ndarray],
    bounds: list[Bound],
    *,
    quantized: bool = False,
) -> Check:
    """Compare a session with all optimizations to one with none, on the same inputs.

    Args:
        optimized: The session with all optimizations.
        plain: The session with none.
        inputs: The model's inputs.
        bounds: One for each output.
        quantized: Whether activations are quantized on purpose: where sums differ by a rounding, an
            activation may fall on the next integer, so the difference is told and not judged.

    Returns:
        The check "optimisation".
    """
    try:
        outputs = list(zip(run(optimized, inputs), run(plain, inputs), bounds, strict=True))
    except CheckFailed as error:
        return Check("optimisation", False, None, None, str(error))
    if quantized:
        measured = max(find_largest_difference(a, b) for a, b, _ in outputs)
        sentence = (
            "largest difference between integer kernels and the same graph in floats; no bound, "
            "by rounding activations"
        )
        return Check("optimisation", None, measured, None, sentence)
    measured, limit = max(
        ((find_largest_difference(a, b), bound.limit) for a, b, bound in outputs),
        key=lambda pair: _compute_excess(*pair),
    )
    if measured <= limit:
        says = "agree"
    else:
        says = "do NOT agree: an optimisation of the runtime changes the result"
    sentence = f"outputs with all optimisations and with none {says} (largest difference)"
    return Check("optimisation", measured <= limit, measured, limit, sentence)


def check_operators(
    file: OnnxFile, executed: Counter[str], *, original: Counter[str] | None = None
) -> Check:
    """Check that the runtime rounded no activations that are not to be rounded.

    Args:
        file: The file, which may say that its activations are quantized.
        executed: Number of executions of each operator.
        original: The same of the original file, which then decides instead of the file.

    Returns:
        The check "operators".
    """
    found = {name: count for name, count in executed.items() if rounds_activations(name)}
    words = ", ".join(f"{count} {name}" for name, count in sorted(found.items()))
    total = sum(executed.values())
    if not found:
        return Check(
            "operators",
            True,
            0,
            0,
            f"{total} operators were executed, none of which quantises activations",
        )
    if original is not None and any(map(rounds_activations, original)):
        return Check(
            "operators",
            True,
            sum(found.values()),
            None,
            f"activations are quantised, as in the original: {words}",
        )
    if original is None and has_quantized_activations(file):
        return Check(
            "operators",
            True,
            sum(found.values()),
            None,
            f"activations are quantised, as the file says: {words}",
        )
    asks = "the file does not ask for" if original is None else "the original does not do"
    sentence = f"the runtime SILENTLY QUANTISED ACTIVATIONS: it executed {words}, which {asks}"
    return Check(
        "operators", False, sum(found.values()), 0, f"{sentence}; convert with --dequantize folded"
    )


def rounds_activations(operator: str) -> bool:
    """Tell whether an operator rounds activations or computes on rounded ones.

    Args:
        operator: An operator's type, such as "QLinearConv".

    Returns:
        True for those of integer kernels.
    """
    return operator in QUANTIZING or operator.startswith("QLinear") or operator.endswith("Integer")


def has_quantized_activations(file: OnnxFile) -> bool:
    """Tell whether the file says itself that its activations are quantized.

    Args:
        file: One of ours, which says so in its metadata, or a foreign one.

    Returns:
        Whether our metadata says so; of a foreign file, whether its graph has such operators.
    """
    if file.metadata:
        return bool(file.metadata.get("activations"))
    return any(map(rounds_activations, list_operators(file.proto.graph)))


def check_weights(comparison: WeightsComparison, *, alone: bool = False) -> Check:
    """Check that stored integers dequantize to PyTorch's values, bit for bit.

    Args:
        comparison: What was found weight by weight.
        alone: Whether the file was checked in itself, without PyTorch's values.

    Returns:
        The check "weights".
    """
    faults = comparison.faults
    if faults:
        more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
        return Check("weights", False, comparison.equal, comparison.total, f"{faults[0]}{more}")
    sentence = (
        f"all {comparison.total} quantised weights are PyTorch's bit for bit, as stored and as "
        "the runtime decodes them"
    )
    if alone:
        sentence = (
            f"all {comparison.total} quantised weights match the file's checksums, and the "
            "runtime decodes them bit for bit"
        )
    if comparison.rescaled:
        sentence += (
            f"; {comparison.rescaled} of them up to a factor per channel (BatchNorm), for which "
            "the outputs vouch"
        )
    if comparison.absent:
        sentence += f"; not in the graph: {', '.join(comparison.absent)}"
    return Check("weights", True, comparison.equal, comparison.total, sentence)


def check_contents(model: onnx.ModelProto) -> Check | None:
    """Check that the file is as it was written, by its own checksum.

    Args:
        model: With its data in it.

    Returns:
        None for a file of someone else's. A file of an earlier version has no such checksum: that
        is no fault, and said.

    Raises:
        FileError: The file's metadata can't be read.
    """
    intact = is_as_written(model)
    if intact is None and not read_metadata(model):
        return None
    if intact is None:
        sentence = (
            "the file has no checksum of its graph and float parameters, as files of earlier "
            "versions; convert it again"
        )
        return Check("contents", None, None, None, sentence)
    if intact:
        return Check(
            "contents",
            True,
            None,
            None,
            "graph, parameters and metadata have the checksum that they were written with",
        )
    sentence = (
        "graph, parameters or metadata don't have the file's own checksum: it is damaged, or some "
        "tool has changed it"
    )
    return Check("contents", False, None, None, sentence)


def check_parameters(compared: ParametersComparison, *, reference: str) -> Check:
    """What isn't quantised is what it was, bit for bit, or by the rule that the file states.

    Args:
        compared: What of it is in the file.
        reference: Whose parameters these are, in words.

    Returns:
        A failed check that names the first tensor that isn't there, or one that passed.
    """
    if not compared.faults:
        sentence = (
            f"all {compared.total} parameters, weights dequantised, are those of {reference}, bit "
            "for bit"
        )
        return Check("parameters", True, compared.equal, compared.total, sentence)
    more = f" (and {len(compared.faults) - 1} more)" if len(compared.faults) > 1 else ""
    sentence = f"{compared.faults[0]}{more}: not what {reference} has"
    return Check("parameters", False, compared.equal, compared.total, sentence)


def explain_inexactness(file: OnnxFile, *, float_reference: bool) -> str | None:
    """Say why outputs may differ from PyTorch's by more than rounding, on purpose.

    Args:
        file: The file that was run.
        float_reference: Whether it is compared with the model from before the quantization.

    Returns:
        The reason, or None where they may not.
    """
    if float_reference:
        return "the model compared with is float and the file's weights are quantised"
    return "activations are quantised" if has_quantized_activations(file) else None


def check_difference(
    comparison: Comparison, *, inexact: str | None, reference: str = "PyTorch"
) -> Check:
    """Compare the largest difference to PyTorch's outputs with its bound.

    Args:
        comparison: A pass over the data beside PyTorch's model.
        inexact: What `explain_inexactness` says; with a reason nothing is judged.
        reference: What it is compared with, in words.

    Returns:
        The check "outputs".
    """
    if comparison.mismatch:
        return Check("outputs", False, None, None, comparison.mismatch)
    worst = max(comparison.differences, key=lambda d: _compute_excess(d.measured, d.bound.limit))
    where = f"output '{worst.output}', " if len(comparison.differences) > 1 else ""
    if inexact:
        sentence = f"{where}largest difference to {reference}; no bound, because {inexact}"
        return Check("outputs", None, worst.measured, None, sentence)
    return Check(
        "outputs",
        worst.within,
        worst.measured,
        worst.bound.limit,
        f"{where}{_describe_difference(worst, comparison.samples)}",
    )


def check_agreement(
    comparison: Comparison, *, inexact: str | None, reference: str = "PyTorch"
) -> Check | None:
    """Check the classes beside PyTorch's.

    Args:
        comparison: A pass over the data.
        inexact: What `explain_inexactness` says.
        reference: What it is compared with, in words.

    Returns:
        The check "top-1", or None where the outputs are no classes.
    """
    if comparison.agreement is None:
        return None
    # Both classes' scores may each move by the bound, and by what rounded parameters change.
    tie = 2 * (comparison.differences[0].bound.limit + comparison.differences[0].moved)
    return check_classes(comparison.agreement, tie, reference=reference, inexact=inexact)


def check_classes(
    agreement: Agreement, tie: float, *, reference: str, inexact: str | None = None
) -> Check:
    """Check that every input gets the reference's class, except where its lead is mere rounding.

    Args:
        agreement: How often both say the same class.
        tie: A lead, in units of the scores, that is no more than rounding.
        reference: Whose classes these are, in words.
        inexact: What `explain_inexactness` says.

    Returns:
        The check "top-1".
    """
    same, margin = agreement.same, agreement.margin
    share = 100 * same.share
    differ = f"{same.total - same.hits} of {same.total} samples get another class"
    if same.hits == same.total:
        sentence = (
            f"the file and {reference} give the same class to all {same.total} samples (per cent)"
        )
        return Check("top-1", True, share, 100, sentence)
    if inexact:
        return Check("top-1", None, share, None, f"{differ}; {inexact}")
    if margin <= tie:
        sentence = (
            f"{differ}, all of them ties in {reference} (lead {margin:.1e}, at most {tie:.1e})"
        )
        return Check("top-1", True, share, 100, sentence)
    sentence = f"{differ}, with a lead of up to {margin:.2e} in {reference}, which is no rounding"
    return Check("top-1", False, share, 100, sentence)


def check_accuracy(comparison: Comparison, *, reference: str = "PyTorch") -> Check | None:
    """Check the accuracy beside PyTorch's.

    Args:
        comparison: A pass over the data.
        reference: What it is compared with, in words.

    Returns:
        The check "accuracy", or None without labels.
    """
    if comparison.onnx_accuracy is None:
        return None
    if comparison.pytorch_accuracy is None:
        sentence = (
            f"{comparison.onnx_accuracy} on {comparison.samples} samples, nothing to compare with"
        )
        return Check("accuracy", None, 100 * comparison.onnx_accuracy.share, None, sentence)
    return check_chance(comparison.onnx_accuracy, comparison.pytorch_accuracy, reference=reference)


def check_chance(file: Proportion, other: Proportion, *, reference: str) -> Check:
    """Check that the file is not less accurate than the reference may be by chance.

    Args:
        file: The file's accuracy.
        other: The reference's, on the same data.
        reference: Its name, in words.

    Returns:
        The check "accuracy": passed down to the lower end of the reference's 95 % interval.
    """
    measured, lowest = 100 * file.share, 100 * other.interval[0]
    sentence = f"the file {file}, {reference} {other}, per cent with 95 % interval"
    return Check("accuracy", measured >= lowest, measured, lowest, sentence)


def check_latency(file: OnnxFile, latency: Latency | None, *, runtime: str) -> Check | None:
    """Say what to do where integer kernels are no faster than floats. No file fails by that.

    Args:
        file: The file that was measured.
        latency: What was measured, or None.
        runtime: Its name; an emulator's times say nothing of the processor that it stands for.

    Returns:
        The check "latency", or None where there is nothing to say.
    """
    if (
        latency is None
        or latency.ratio < 1
        or not has_quantized_activations(file)
        or "emulated" in runtime
    ):
        return None
    sentence = (
        f"integer kernels took {latency.ratio:.2f} x the float model's time for one sample here, "
        "so they save none: unless"
        " another device is the target, keep float activations: convert without --activations int8"
    )
    return Check("latency", None, latency.ratio, None, sentence)


def _describe_difference(difference: Difference, samples: int) -> str:
    verb = "lies within" if difference.within else "EXCEEDS"
    rounded = ""
    if difference.moved:
        rounded = f"; float16 parameters move outputs by {difference.moved:.2e}, left out of it"
    return (
        f"the largest difference over {samples} samples {verb} the bound "
        f"{difference.bound.formula}{rounded}"
    )


def _compute_excess(measured: float, limit: float) -> float:
    if measured <= limit:
        return measured / limit if limit else 0.0
    return float(np.inf) if not limit else measured / limit
