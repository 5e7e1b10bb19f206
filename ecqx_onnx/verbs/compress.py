"""The verb: a float model and some samples in, the file that keeps to the bounds out.

    result = compress("model.onnx", "small.onnx", data="samples.npz", max_bytes="70k")
    result.verdict.quality.agreement

Statistics once; points of the curve until the bounds are met; the file; its verdict on samples that
nothing of this saw.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from ecqx_onnx_converters.graph.files import replace_model
from ecqx_onnx_converters.graph.outputs import check_output
from ecqx_onnx_converters.planning.planner import check_forms
from ecqx_onnx_converters.targets import check_name, find_target

from ecqx_onnx import __version__
from ecqx_onnx.compression.encoding import FileOptions
from ecqx_onnx.compression.model.biases import with_biases
from ecqx_onnx.compression.model.float_model import FloatModel, is_onnx_path, load_float_model
from ecqx_onnx.compression.model.weights import Passed, find_weights, select_weights
from ecqx_onnx.compression.result import CompressResult
from ecqx_onnx.compression.rounding.ordered import Layers
from ecqx_onnx.compression.search.bounds import Bounds, make_bounds
from ecqx_onnx.compression.search.folder import SearchFolder, hash_parts
from ecqx_onnx.compression.search.points import Candidate, Point, PointMaker
from ecqx_onnx.compression.search.samples import InputSpec, Samples, Splits, load_splits
from ecqx_onnx.compression.search.search import Found, search
from ecqx_onnx.compression.verdict import judge_file, write_reference
from ecqx_onnx.delivery.delivery import deliver
from ecqx_onnx.errors import DataError, ModelError, OptionError
from ecqx_onnx.options.compress import CompressOptions
from ecqx_onnx.options.input_shape import InputShape
from ecqx_onnx.options.option import check_limits, refuse_unknown_options
from ecqx_onnx.preprocessing.preprocessing import Preprocessing
from ecqx_onnx.runtime.runner import Runner, batch_size, trim_heap

CULPRIT = 0.02  # relative error of the outputs beyond which classes change
BATCH = 32
BATCH_BYTES = 8 << 20  # of inputs; activations may take fifty times as much
Say = Callable[[str], None]


@dataclass(frozen=True)
class _Prepared:
    """Everything that is fixed before the search."""

    model: FloatModel
    layers: Layers
    passed: tuple[Passed, ...]
    splits: Splits
    batch: int
    classes: tuple[int, int] | None
    bounds: Bounds
    notes: tuple[str, ...]


@refuse_unknown_options
def compress(
    model: Any,
    out: str | Path,
    *,
    data: Any,
    factory: str | None = None,
    example: Any = None,
    input_shape: InputShape | None = None,
    dynamic: Any = None,
    max_bytes: int | str | None = None,
    bits_per_weight: float | None = None,
    max_drop: float | None = None,
    min_agreement: float | None = None,
    max_error: float | None = None,
    output: str | None = None,
    class_axis: int | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    mean: Sequence[float] = (),
    std: Sequence[float] = (),
    samples: int = 1024,
    storage: str = "auto",
    dequantize: str = "auto",
    target: str = "onnxruntime",
    opset: int | None = None,
    floats: str = "float32",
    seed: int = 0,
    threads: int = 1,
    keep_best: bool = False,
    checkpoint: str | Path | None = None,
    trust_pickle: bool = False,
    force: bool = False,
    say: Say | None = None,
) -> CompressResult:
    """Compress a float model to a budget, without training.

    Args:
        model: an .onnx file, or whatever `convert` takes.
        out: the .onnx file to write.
        data: samples, with or without labels, as `load_splits` takes them.
        factory: FILE.py:FACTORY, the network of a state dict.
        example: for a module, one batch of its input; only shape and type matter.
        input_shape: of one input without the batch, where FILE.py has no INPUT_SHAPE.
        dynamic: which axes are free, as for `convert`; of PyTorch models.
        max_bytes: of the whole file; a number, or text such as "70k".
        bits_per_weight: coded bits per quantized weight.
        max_drop: percentage points of top-1 accuracy; needs labels.
        min_agreement: percent of samples in the same class as by the float model.
        max_error: largest ||y - y'|| / ||y|| over the outputs.
        output: name of the output that holds class scores.
        class_axis: the axis of it that the classes lie along.
        include: patterns of weights' names: only those are compressed.
        exclude: patterns of weights' names: those stay float.
        mean: what is subtracted from the input, one value or one per channel.
        std: what the input is divided by, likewise.
        samples: at most so many are used.
        storage: "auto" (fewest bytes), "dense", "sparse" or "packed".
        dequantize: "auto", "folded" (float speed) or "standard" (DequantizeLinear).
        target: the runtime that must load the file.
        opset: highest to write; by default what the target can load.
        floats: type of what stays float, "float32" or "float16".
        seed: of the draw of samples.
        threads: of onnxruntime.
        keep_best: write the best file even if a bound is missed.
        checkpoint: of a PyTorch model, a model.pt to write as well: training goes on from it.
        trust_pickle: unpickle a module, which runs its author's code.
        force: replace the file if it exists.
        say: told, line by line, what is done.

    Returns:
        The points, the chosen one and the verdict. `ok` says whether all bounds hold.

    Raises:
        InputError: something given can't be used; one sentence says what to do.
    """
    started = time.monotonic()
    check_limits(CompressOptions, samples=samples, threads=threads)
    say = say or _silent
    out = Path(out)
    bounds = make_bounds(max_bytes, bits_per_weight, max_drop, min_agreement, max_error)
    options = FileOptions(storage, dequantize, target, opset, floats)
    _check_options(options, out, model, force)
    _check_checkpoint(checkpoint, out, model, force)
    loaded = load_float_model(
        model,
        factory=factory,
        example=example,
        input_shape=input_shape,
        dynamic=dynamic,
        trust_pickle=trust_pickle,
    )
    chosen = _preprocessing(loaded, mean, std)
    prepared = _prepare(
        loaded,
        data,
        bounds,
        preprocessing=chosen,
        normalization=(tuple(mean), tuple(std)),
        output=output,
        class_axis=class_axis,
        include=include,
        exclude=exclude,
        samples=samples,
        seed=seed,
        threads=threads,
    )
    say(prepared.splits.sentence)
    chosen_options = (
        __version__, bounds, options, seed, threads, samples, tuple(include), tuple(exclude),
        output, class_axis, tuple(mean), tuple(std),
    )  # fmt: skip
    key = _search_key(prepared, chosen_options)
    metadata = _metadata(prepared)
    with SearchFolder.at(out, key) as folder:

        def make_maker(layers: Layers) -> PointMaker:
            return PointMaker(
                layers,
                prepared.splits.statistics,
                prepared.splits.search,
                batch=prepared.batch,
                classes=prepared.classes,
                options=options,
                metadata=metadata,
                threads=threads,
                say=say,
                keep_levels=checkpoint is not None,
            )

        maker = make_maker(prepared.layers)
        maker.measure(folder.slopes())
        folder.keep_slopes(maker.slopes)
        make = _remembering(maker, folder)
        found = search(make, prepared.bounds, entries=maker.entries, say=say)
        culprits = _culprits(maker, found, prepared.bounds)
        if culprits:
            say(f"{len(culprits)} weights stay float, as int8 is too coarse for them")
            prepared = _without(prepared, culprits)
            maker = make_maker(prepared.layers)
            maker.measure()
            found = search(maker.make, prepared.bounds, entries=maker.entries, say=say)
        candidate = _made(maker, found.chosen)
        del make
        maker.release()
        return _finish(
            prepared,
            maker,
            candidate,
            found.points,
            out=out,
            model=model,
            checkpoint=checkpoint,
            keep_best=keep_best,
            force=force,
            started=started,
            say=say,
        )


def _culprits(maker: PointMaker, found: Found, bounds: Bounds) -> frozenset[str]:
    """Weights that keep a quality bound from being held at any rate; empty where they are all."""
    if found.held or not bounds.limits_quality or bounds.limits_size:
        return frozenset()
    errors = maker.errors_at_finest()
    allowed = bounds.max_error or CULPRIT
    share = 0.5 * allowed / max(1, len(errors)) ** 0.5
    worst = frozenset(name for name, error in errors.items() if error > share)
    return worst if len(worst) < len(errors) else frozenset()


def _without(prepared: _Prepared, names: frozenset[str]) -> _Prepared:
    """These weights stay float."""
    layers = prepared.layers
    kept = tuple(weight for weight in layers.weights if weight.name not in names)
    biases = {name: bias for name, bias in layers.biases.items() if name not in names}
    left = [
        Passed(weight.name, weight.shape, "int8's levels are too coarse for it")
        for weight in layers.weights
        if weight.name in names
    ]
    return replace(
        prepared,
        layers=Layers(layers.graph, kept, biases),
        passed=(*prepared.passed, *left),
    )


def _search_key(prepared: _Prepared, options: tuple[Any, ...]) -> str:
    """What a search depends on: the model, the samples that it is judged by, the options."""
    arrays: list[Any] = [prepared.model.graph.proto.SerializeToString(deterministic=True)]
    arrays += [prepared.model.graph.weights[name] for name in sorted(prepared.model.graph.weights)]
    arrays.append(prepared.splits.statistics.rows)
    for feeds in prepared.splits.search.feeds(prepared.batch):
        arrays += [feeds[name] for name in sorted(feeds)]
    return hash_parts(options, *arrays)


def _silent(text: str) -> None:
    """Nobody listens."""


def _check_options(options: FileOptions, out: Path, model: Any, force: bool) -> None:
    if options.floats not in ("float32", "float16"):
        raise OptionError(
            f"float parameters cannot be stored as '{options.floats}'; choose float32 or float16"
        )
    check_forms(options.storage, options.dequantize)
    find_target(options.target)
    check_output(out, force=force, source=model)
    check_name(out, options.target)


def _preprocessing(
    model: FloatModel, mean: Sequence[float], std: Sequence[float]
) -> Preprocessing | None:
    """What the model's own file says; None where the data say it."""
    known = model.preprocessing
    if known is None or known == Preprocessing("array"):
        return None
    return known.normalized(tuple(mean), tuple(std)) if mean or std else known


def _prepare(
    model: FloatModel,
    data: Any,
    bounds: Bounds,
    *,
    preprocessing: Preprocessing | None,
    normalization: tuple[tuple[float, ...], tuple[float, ...]],
    output: str | None,
    class_axis: int | None,
    include: Sequence[str],
    exclude: Sequence[str],
    samples: int,
    seed: int,
    threads: int,
) -> _Prepared:
    weights, passed = select_weights(*find_weights(model.graph), include=include, exclude=exclude)
    if not weights:
        raise ModelError(_why_no_weights(model, passed))
    graph, biases = with_biases(model.graph, weights)
    layers = Layers(graph, weights, biases)
    runner = Runner(graph, threads=threads)
    specs = [InputSpec.of(node) for node in runner.inputs]
    splits = load_splits(data, specs, preprocessing=preprocessing, samples=samples, seed=seed)
    if any(normalization) and preprocessing is None:
        splits = _normalized(splits, *normalization)
    batch, splits = _choose_batch(specs, splits)
    labels = splits.labels or model.labels
    classes = _find_classes(runner, splits, batch, output, class_axis, labels)
    has_labels = splits.search.labels is not None and splits.verdict.labels is not None
    _check_bounds(bounds, classes, has_labels)
    bounds = bounds.with_defaults(has_classes=classes is not None)
    notes = [*model.notes, splits.sentence]
    used = splits.statistics.preprocessing
    notes.append(f"preprocessing: {used.describe() if used else 'none, arrays as they are'}")
    return _Prepared(model, layers, passed, splits, batch, classes, bounds, tuple(notes))


def _why_no_weights(model: FloatModel, passed: Sequence[Passed]) -> str:
    if not passed:
        return (
            f"{model.source}: has no weight that an operator multiplies with; nothing to compress"
        )
    first = passed[0]
    return (
        f"{model.source}: none of its {len(passed)} tensors is a weight to compress"
        f" ({first.name} {list(first.shape)}: {first.reason})"
    )


def _normalized(splits: Splits, mean: tuple[float, ...], std: tuple[float, ...]) -> Splits:
    known = splits.statistics.preprocessing
    if known is None:
        raise OptionError("--mean and --std go with one input of pixels, audio or numbers")
    changed = known.normalized(mean, std)
    parts = (splits.statistics, splits.search, splits.verdict)
    new = [replace(part, preprocessing=changed) for part in parts]
    return Splits(new[0], new[1], new[2], splits.labels)


def _choose_batch(specs: Sequence[InputSpec], splits: Splits) -> tuple[int, Splits]:
    """Samples in a run, and splits that are whole batches where the model wants that."""
    if splits.statistics.calls:
        return 1, splits
    fixed = {spec.shape[0] for spec in specs if spec.shape and spec.shape[0] is not None}
    if fixed:
        batch = fixed.pop()
        if fixed or not batch:
            raise ModelError("the model's inputs have different fixed lengths along the first axis")
        parts = []
        for part in (splits.statistics, splits.search, splits.verdict):
            whole = len(part) // batch * batch
            if not whole:
                raise DataError(f"the model takes batches of {batch}, and there are {len(part)}")
            parts.append(part.take(whole))
        return int(batch), Splits(parts[0], parts[1], parts[2], splits.labels)
    feeds = next(splits.statistics.batches(1))[0]
    size = sum(array.nbytes for array in feeds.values())
    return max(1, min(BATCH, BATCH_BYTES // max(1, size))), splits


def _find_classes(
    runner: Runner,
    splits: Splits,
    batch: int,
    output: str | None,
    class_axis: int | None,
    labels: tuple[str, ...],
) -> tuple[int, int] | None:
    """(output, axis) of class scores; None where nothing says that there are any."""
    feeds = next(splits.search.batches(batch))[0]
    results = runner.run(feeds)
    if output is not None:
        if output not in runner.outputs:
            there = ", ".join(runner.outputs)
            raise OptionError(f"there is no output '{output}'; the model has {there}")
        index = runner.outputs.index(output)
        rank = results[index].ndim
        axis = -1 if class_axis is None else class_axis
        if not -rank <= axis < rank:
            raise OptionError(f"--class-axis {axis}: output '{output}' has {rank} axes")
        return index, axis
    if class_axis is not None:
        raise OptionError("--class-axis goes with --output, the output that it is an axis of")
    labelled = (splits.search.labels, splits.verdict.labels)
    named = bool(labels) or any(part is not None for part in labelled)
    size = batch_size(feeds)
    for index, array in enumerate(results):
        scores = array.ndim == 2 and array.shape[1] >= 2 and array.dtype.kind == "f"
        if named and scores and len(array) == size:
            return index, 1
    return None


def _check_bounds(bounds: Bounds, classes: tuple[int, int] | None, has_labels: bool) -> None:
    if bounds.max_drop is not None and not has_labels:
        raise DataError(
            "--max-drop counts lost points of accuracy, and the data have no labels: add them, or"
            " use --min-agreement or --max-error"
        )
    if classes is None and (bounds.max_drop is not None or bounds.min_agreement is not None):
        raise OptionError(
            "nothing says which output holds class scores: name it with --output NAME --class-axis"
            " K, or bound the output's error with --max-error"
        )


def _metadata(prepared: _Prepared) -> dict[str, Any]:
    """What the file says of itself: how it was made, and the preprocessing."""
    import json

    document: dict[str, Any] = {"version": __version__, "recipe": {"trained": False}}
    used = prepared.splits.statistics.preprocessing
    if used is not None:
        fields = json.loads(used.to_json())
        document["preprocessing"] = {
            name: value for name, value in fields.items() if value is not None
        }
    labels = prepared.splits.labels or prepared.model.labels
    if labels and labels != tuple(map(str, range(len(labels)))):
        document["labels"] = list(labels)
    return document


def _remembering(maker: PointMaker, folder: SearchFolder) -> Callable[[float], Candidate]:
    """Points of an earlier run are not made again."""
    known = folder.points()

    def make(bits: float) -> Candidate:
        if bits in known:
            return Candidate(known[bits], (), None)  # type: ignore[arg-type]
        candidate = maker.make(bits)
        folder.keep_point(candidate.point)
        return candidate

    return make


def _made(maker: PointMaker, candidate: Candidate) -> Candidate:
    """The candidate with its model, which a point of an earlier run lacks."""
    return candidate if candidate.encoded is not None else maker.make(candidate.point.bits)


def _finish(
    prepared: _Prepared,
    maker: PointMaker,
    candidate: Candidate,
    points: tuple[Point, ...],
    *,
    out: Path,
    model: Any,
    checkpoint: str | Path | None,
    keep_best: bool,
    force: bool,
    started: float,
    say: Say,
) -> CompressResult:
    """Writes the file to a place of its own, judges it, and gives it its name if it may have it."""
    say(f"verdict on {len(prepared.splits.verdict)} samples that nothing has seen")
    sources = (Path(str(model)),) if isinstance(model, str | Path) else ()
    reference_place = tempfile.TemporaryDirectory(prefix="ecqx-onnx-")
    with reference_place as place, replace_model(out, force=force, sources=sources) as draft:
        encoded = candidate.encoded
        valid = prepared.model.valid
        report = deliver(encoded.plan, draft, metadata=encoded.metadata, valid=valid)
        trim_heap()  # loading the file took as much as judging it will
        reference = Path(str(model))
        if not is_onnx_path(model):
            reference = write_reference(prepared.model.graph, Path(place) / "float.onnx")
        verdict = judge_file(
            reference,
            draft,
            prepared.splits.verdict,
            batch=prepared.batch,
            classes=prepared.classes,
            sizes=(prepared.model.file_bytes, report.nbytes),
        )
        bits = candidate.encoded.bits_per_weight
        search_misses = prepared.bounds.misses(candidate.point.quality, report.nbytes, bits)
        verdict_misses = prepared.bounds.quality_misses(verdict.quality)
        misses = [f"on the search samples {miss}" for miss in search_misses]
        misses += [f"on the verdict samples {miss}" for miss in verdict_misses]
        written = not misses or keep_best
        if not written:
            for part in list(draft.parent.iterdir()):
                part.unlink()
        trained_on: tuple[str, ...] = ()
        if written and checkpoint is not None:
            trained_on = _write_checkpoint(prepared, candidate, Path(checkpoint), force=force)
    return CompressResult(
        path=out if written else None,
        source=prepared.model.source,
        bounds=prepared.bounds,
        points=points,
        chosen=candidate.point,
        verdict=verdict,
        misses=tuple(misses),
        report=replace(report, path=out, kept=_kept(prepared, report.kept)),
        entries=maker.entries,
        slopes=dict(maker.slopes),
        notes=(
            *prepared.notes,
            *maker.notes,
            *candidate.encoded.notes,
            *candidate.notes,
            *trained_on,
        ),
        seconds=time.monotonic() - started,
    )


def _check_checkpoint(path: str | Path | None, out: Path, model: Any, force: bool) -> None:
    if path is None:
        return
    if is_onnx_path(model):
        raise OptionError(
            f"--checkpoint is for PyTorch models, which training goes on with, and {model} is an"
            " .onnx file: leave it out"
        )
    if Path(path).resolve() == out.resolve():
        raise OptionError(f"--checkpoint {path} is the file to write itself: name another one")
    check_output(path, force=force, source=model)


def _write_checkpoint(
    prepared: _Prepared, candidate: Candidate, path: Path, *, force: bool
) -> tuple[str, ...]:
    """Writes model.pt with the levels of the file. A sentence for the report."""
    from ecqx_onnx.checkpoint.checkpoint import save
    from ecqx_onnx.compression.trainable import make_checkpoint

    assert candidate.rounded is not None
    recipe = {"trained": False, "bits_per_weight": round(candidate.point.bits_per_weight, 4)}
    made = make_checkpoint(
        prepared.model.checkpoint,
        prepared.layers,
        candidate.rounded,
        recipe=recipe,
        preprocessing=prepared.splits.statistics.preprocessing,
        labels=prepared.splits.labels or prepared.model.labels,
    )
    save(made, path, force=force)
    new = [note for note in made.notes if note not in prepared.model.notes]
    return (*new, f"{path}: the checkpoint that training goes on from (ecqx-onnx quantize)")


def _kept(prepared: _Prepared, kept: Any) -> Any:
    """With the reason why each tensor is no weight, instead of the planner's."""
    reasons = {passed.name: passed.reason for passed in prepared.passed}
    return tuple(replace(entry, reason=reasons.get(entry.name, entry.reason)) for entry in kept)


def batch_of(samples: Samples, size: int) -> list[np.ndarray]:
    """Take the first batch's arrays.

    Args:
        samples: of the model's inputs.
        size: most samples in the batch.

    Returns:
        One array for each input, in the inputs' order.
    """
    feeds = next(samples.batches(size))[0]
    return [feeds[spec.name] for spec in samples.inputs]
