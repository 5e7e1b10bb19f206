"""Train a network so that its weights lie on few levels, and save it as a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ecqx_onnx_converters.graph.outputs import check_output

from ecqx_onnx.data import Dataset
from ecqx_onnx.data.task import TaskData
from ecqx_onnx.errors import DataError, FileError, OptionError
from ecqx_onnx.inputs.user_code import is_function_spec, load_function
from ecqx_onnx.options.option import refuse_unknown_options
from ecqx_onnx.options.quantize import QuantizeOptions
from ecqx_onnx.options.quantizer import (
    Activations,
    Gradient,
    Granularity,
    Levels,
    Recipe,
    StepRule,
)
from ecqx_onnx.options.training import DistillBy, Precision, Schedule
from ecqx_onnx.validation.outputs.metrics import Proportion
from ecqx_onnx.validation.outputs.plausibility import doubt_accuracy
from ecqx_onnx.verbs.accuracy import accuracy, confuse
from ecqx_onnx.verbs.reports import Quantized
from ecqx_onnx.verbs.training.data import (
    fit_channels,
    list_arguments,
    make_example,
    preprocess_data,
    preprocess_task,
)

if TYPE_CHECKING:
    import torch

    from ecqx_onnx.checkpoint.checkpoint import Checkpoint
    from ecqx_onnx.quantization.objectives.objective import Objective, Score
    from ecqx_onnx.quantization.training import EpochRecord, Progress, Training
    from ecqx_onnx.sources.loading import Loaded

OF_TRAIN = (
    "distill_by",
    "epochs",
    "batch_size",
    "learning_rate",
    "schedule",
    "validation",
    "distillation",
    "temperature",
    "entropy_ramp",
    "relevance_until",
    "precision",
    "device",
    "seed",
    "resume",
)  # options of `quantization.train` beside those of the levels and the augmentation
BY_NAME = ("augment", "relevance", "start", "loss", "metric")  # options that may name a function
Told = Callable[[int, int, str], None]


@dataclass(frozen=True, eq=False)
class _Prepared:
    """A network and its data, ready for the training."""

    loaded: Loaded
    dataset: Dataset | TaskData
    example: Any
    before: Proportion | Score | None
    notes: tuple[str, ...]


@refuse_unknown_options
def quantize(
    factory: str,
    *,
    data: str,
    out: str | Path,
    weights: str | Path | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    validation: float = 0.1,
    augment: str | Callable[..., Any] | None = None,
    bits: int | Mapping[str, int] = 4,
    entropy_weight: float = 0.1,
    step: StepRule | Literal["learned"] = "auto",
    step_rate: float = 1e-3,
    levels: Levels = "symmetric",
    granularity: Granularity = "tensor",
    exclude: Sequence[str] = (),
    activations: Activations = "float32",
    gradient: Gradient = "plain",
    zero_floor: float = 0.5,
    size_exponent: float = 1.0,
    relevance: Any = "epsilon_plus_flat",
    start: str | Callable[..., Any] = "logit",
    refresh_every: int = 8,
    relevance_samples: int | None = None,
    relevance_memory: float = 0.9,
    relevance_until: float = 0.4,
    keep: float = 0.1,
    prune: float = 0.1,
    rho: float = 2.0,
    loss: str | Callable[..., Any] = "cross_entropy",
    metric: str | Callable[..., Any] | None = None,
    epochs: int = 10,
    learning_rate: float | None = None,
    schedule: Schedule = "cosine",
    batch_size: int = 64,
    distillation: float = 0.0,
    distill_by: DistillBy = "auto",
    temperature: float = 2.0,
    entropy_ramp: float = 0.0,
    precision: Precision = "float32",
    device: str | None = None,
    max_bytes: int | str | None = None,
    bits_per_weight: float | None = None,
    start_from: str | Path | None = None,
    seed: int = 0,
    strict: bool = True,
    resume: bool = False,
    force: bool = False,
    progress: Told | None = None,
) -> Quantized:
    """Train and quantize a network by ECQx, and save it as a checkpoint.

    While training, OUT.training holds what `resume` needs. Under torchrun every process calls this,
    and the first one writes.

    Args:
        factory: 'FILE.py:FACTORY', a function or class that returns the network.
        data: training data: an .npz, a folder per class, sklearn:digits, or FILE.py:FUNCTION; for
            tasks without classes see `ecqx_onnx.data.task`.
        out: the checkpoint to write.
        weights: its trained float state dict; without it, the network starts as the factory made
            it, under `seed`.
        mean: what is subtracted from the input, one value or one per channel; by default the
            PREPROCESSING of FILE.py, else the training split's own.
        std: what the input is divided by, likewise.
        validation: share of the training samples that chooses the best epoch, in [0, 1); 0 takes
            the last.
        augment: crop_and_flip, shift_images, shift_audio, FILE.py:FUNCTION, or a function.
        bits: per level, 2 to 8; or {pattern of parameter names: bits}, the last match wins.
        entropy_weight: γ in [0, 1], how dear coding is against distance; 0 is nearest level.
        step: between levels: auto, percentile, least_squares or learned.
        step_rate: with step="learned", the learning rate of the steps.
        levels: symmetric (2^b - 1 of them) or asymmetric (2^b).
        granularity: one step per "tensor", or per output "channel".
        exclude: patterns of parameter names that stay float.
        activations: "int8" rounds them while training, as `convert(activations="int8")` will.
        gradient: straight-through: "plain", or "absolute", scaled by the size of the level.
        zero_floor: zero counts as at least this frequent, in [0, 1].
        size_exponent: how far small tensors are spared the entropy weight: 1 most, 0 not.
        relevance: name of an LRP composite, a Composite, FILE.py:FUNCTION that returns one, or None
            for plain ECQ.
        start: relevance at the output: logit, probability or ones of the true class, output for
            each value of it, or a function of (output, target), as FILE.py:FUNCTION or itself.
        refresh_every: relevances are taken anew every so many steps.
        relevance_samples: they are taken on so many samples of the batch; None for all.
        relevance_memory: share of the old ones in their moving average, in [0, 1).
        relevance_until: share of the training after which no new ones are taken, in (0, 1].
        keep: largest share of zeros that relevances may take away, in [0, 1].
        prune: largest share of extra zeros that they may add, in [0, 1].
        rho: ρ of f(R) = ρ R^β, above 1.
        loss: cross_entropy, bce, mse, l1, dice, distillation, FILE.py:FUNCTION, or a function
            (what the network returns, targets) -> tensor.
        metric: what chooses the best epoch, accuracy, label_accuracy, mse, l1, dice, iou,
            agreement, cosine, error, FILE.py:FUNCTION, or a function (output, targets) -> one
            number a sample, where more is better; by default the one of the loss.
        epochs: passes over the training samples; 0 assigns levels without training.
        learning_rate: Adam's; None for 1e-3, and for 1e-4 with start_from.
        schedule: of the learning rate: "cosine" or "constant".
        batch_size: samples in a training step.
        distillation: share of the loss that follows the float network's outputs, in [0, 1]; 1
            where the data have no targets.
        distill_by: how they are followed: "logits", "mse", "cosine", or "auto".
        temperature: of the softmax of the distillation loss, above 0.
        entropy_ramp: share of the training over which γ rises from 0, in [0, 1).
        precision: of the forward passes: "float32" or "bfloat16".
        device: cpu, cuda, cuda:1 ...; by default cuda where there is one.
        max_bytes: of the .onnx file that `convert` makes of the result, a number or "40k"; the
            entropy weight is driven so that it is met, and the last epoch is kept.
        bits_per_weight: of the coded levels, instead of max_bytes.
        start_from: checkpoint that `compress` wrote (checkpoint=...), to go on from.
        seed: of all random choices: same seed, same bytes.
        strict: refuse a state dict that lacks weights, or has others.
        resume: go on where an interrupted run with the same `out` stopped.
        force: replace `out` if it exists.
        progress: called with (steps done, steps in all, a line of text).

    Returns:
        Accuracies on the test split, how each weight was quantized, and notes.

    Raises:
        UnknownOptionError: for a keyword that is no option; a TypeError as well.
        InputError: if something given can't be used.

    Example:
        result = ecqx_onnx.quantize(
            "models/lenet5.py:lenet5", weights="fp32.pt", data="mnist.npz", bits=4, out="lenet5.pt"
        )
        print(result)
    """
    options = QuantizeOptions(
        factory=factory,
        data=data,
        out=out,
        weights=weights,
        mean=mean,
        std=std,
        validation=validation,
        augment=augment,
        bits=bits,
        entropy_weight=entropy_weight,
        step=step,
        step_rate=step_rate,
        levels=levels,
        granularity=granularity,
        exclude=exclude,
        activations=activations,
        gradient=gradient,
        zero_floor=zero_floor,
        size_exponent=size_exponent,
        relevance=relevance,
        start=start,
        refresh_every=refresh_every,
        relevance_samples=relevance_samples,
        relevance_memory=relevance_memory,
        relevance_until=relevance_until,
        keep=keep,
        prune=prune,
        rho=rho,
        loss=loss,
        metric=metric,
        epochs=epochs,
        learning_rate=learning_rate,
        schedule=schedule,
        batch_size=batch_size,
        distillation=distillation,
        distill_by=distill_by,
        temperature=temperature,
        entropy_ramp=entropy_ramp,
        precision=precision,
        device=device,
        max_bytes=max_bytes,
        bits_per_weight=bits_per_weight,
        start_from=start_from,
        seed=seed,
        strict=strict,
        resume=resume,
        force=force,
    )
    return _quantize(options, progress)


def _quantize(options: QuantizeOptions, progress: Told | None) -> Quantized:
    import torch

    from ecqx_onnx.checkpoint.checkpoint import save
    from ecqx_onnx.quantization.distributed import find_rank, open_process_group
    from ecqx_onnx.quantization.state_file import StateFile, state_path
    from ecqx_onnx.sources.to_checkpoint import as_checkpoint

    # 1. Refuse what can be refused before anything is loaded.
    out = Path(options.out)
    check_output(out, force=options.force, source=options.weights)
    if out.suffix.lower() == ".onnx":
        raise FileError(
            f"{out}: what is written is a checkpoint, not an .onnx file; name it"
            f" {out.with_suffix('.pt')}"
        )
    functions = _load_named_functions(options)

    # 2. Load the network and the data, and look what the float network can do.
    torch.manual_seed(options.seed)
    prepared = _prepare(options, functions)
    dataset = prepared.dataset

    # 3. Train.
    state_file = state_path(out)
    with open_process_group():
        trained = _train(options, functions, prepared, state_file, progress)
        is_first = find_rank() == 0
    after: Proportion | Score
    if _is_classifier(options, dataset):
        after = accuracy(trained.quantizer.model, dataset.test)
    else:
        assert trained.evaluate is not None  # `train` gives it
        after = trained.evaluate(dataset.test)

    # 4. Save what came out, with how it came about.
    trained.quantizer.model.to("cpu")
    recipe = {**trained.setup, **_describe_recipe(options, prepared, trained.best_epoch)}
    recipe = {name: value for name, value in recipe.items() if name != "budget" or value}
    if not isinstance(after, Proportion):
        recipe["score"] = {"metric": after.metric, "value": float(f"{after.value:.4g}")}
    checkpoint = as_checkpoint(
        trained.quantizer,
        example=prepared.example,
        preprocessing=dataset.preprocessing,
        labels=dataset.labels,
        recipe=recipe,
    )
    checkpoint = with_history(
        checkpoint, trained, before=prepared.before, after=after, data=dataset.name
    )
    if is_first:
        save(checkpoint, out, force=options.force)
        StateFile(state_file).remove()
    return Quantized(
        path=out,
        before=prepared.before,
        after=after,
        best_epoch=trained.best_epoch,
        history=trained.history,
        report=trained.quantizer.report(),
        tensors=checkpoint.tensors,
        data=dataset.name,
        notes=(*prepared.notes, *trained.notes, *checkpoint.notes),
        activations=trained.quantizer.options.activations,
    )


def _prepare(options: QuantizeOptions, functions: Mapping[str, Any]) -> _Prepared:
    from ecqx_onnx.data.task import load_training_data
    from ecqx_onnx.quantization.objectives.objective import name_of
    from ecqx_onnx.sources.loading import apply_state, load_factory, load_state

    loaded = load_factory(options.factory)
    has_classes = name_of(options.loss) == "cross_entropy"
    arguments = list_arguments(loaded.model)
    dataset = load_training_data(options.data, arguments, classes=has_classes)
    decided = ""
    if isinstance(dataset, Dataset):
        dataset, decided = preprocess_data(
            fit_channels(dataset, loaded),
            loaded,
            options.mean,
            options.std,
            factory=options.factory,
        )
    else:
        dataset, decided = preprocess_task(dataset, loaded, options.mean, options.std)
    notes: tuple[str, ...] = ()
    if options.weights is not None:
        state = load_state(options.weights)
        notes = apply_state(loaded.model, state, options.weights, strict=options.strict)
    elif name_of(options.loss) == "distillation" or not _has_targets(dataset):
        raise OptionError(
            "training without targets follows the float network, which random weights are none of:"
            " give its --weights"
        )
    _check_patterns(options, [name for name, _ in loaded.model.named_parameters()])
    example = make_example(next(iter(dataset.test.batches(2)))[0], arguments)
    output = _run_example(loaded.model, example, options)
    if isinstance(dataset, Dataset) and has_classes:
        dataset.check_outputs(int(output.shape[-1]))
    notes = (*notes, *dataset.notes, decided)
    if options.weights is None:
        scratch = (
            "no --weights are given: the network starts from random values and is trained from"
            " scratch"
        )
        return _Prepared(loaded, dataset, example, None, (*notes, scratch))
    if not _is_classifier(options, dataset):
        score = _measure_float(options, functions, loaded.model, dataset)
        return _Prepared(loaded, dataset, example, score, notes)
    confusion = confuse(loaded.model, dataset.test)
    before = accuracy(loaded.model, dataset.test) if confusion is None else confusion.right
    doubts = doubt_accuracy(confusion, who="the float model")
    return _Prepared(loaded, dataset, example, before, (*notes, *doubts))


def _has_targets(dataset: Dataset | TaskData) -> bool:
    return bool(getattr(dataset.train, "has_targets", True))


def _is_classifier(options: QuantizeOptions, dataset: Dataset | TaskData) -> bool:
    """Whether it is judged by how many of the samples get their right class."""
    from ecqx_onnx.quantization.objectives.objective import name_of

    metric = "accuracy" if options.metric is None else name_of(options.metric)
    is_plain = name_of(options.loss) == "cross_entropy" and metric == "accuracy"
    return is_plain and isinstance(dataset, Dataset)


def _choose_objective(
    options: QuantizeOptions, functions: Mapping[str, Any], dataset: Dataset | TaskData
) -> Objective:
    from ecqx_onnx.quantization.objectives.objective import choose_objective

    return choose_objective(
        functions.get("loss", options.loss),
        functions.get("metric", options.metric),
        distillation=options.distillation,
        distill_by=options.distill_by,
        temperature=options.temperature,
        has_targets=_has_targets(dataset),
    )


def _measure_float(
    options: QuantizeOptions,
    functions: Mapping[str, Any],
    model: torch.nn.Module,
    dataset: Dataset | TaskData,
) -> Score | None:
    """The float network's score; None for a metric that compares with the float network."""
    from ecqx_onnx.quantization.objectives.evaluation import evaluate

    objective = _choose_objective(options, functions, dataset)
    if objective.metric.against_float:
        return None
    return evaluate(model, dataset.test, objective)


def _run_example(model: torch.nn.Module, example: Any, options: QuantizeOptions) -> torch.Tensor:
    """The scores of two samples; DataError if they do not go through the network."""
    import torch

    from ecqx_onnx.quantization.objectives.values import call_model, find_scores

    try:
        with torch.no_grad():
            return find_scores(call_model(model.eval(), example))
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        shown = tuple(example.shape) if hasattr(example, "shape") else "these inputs"
        raise DataError(
            f"{options.data}: a batch of shape {shown} does not go through"
            f" {options.factory} ({reason}); give data of the shape that it takes"
        ) from error


def _train(
    options: QuantizeOptions,
    functions: Mapping[str, Any],
    prepared: _Prepared,
    state_file: Path,
    progress: Told | None,
) -> Training:
    from ecqx_onnx.quantization import train
    from ecqx_onnx.verbs.training.budget import load_start, make_budget

    start = None if options.start_from is None else load_start(options.start_from)
    budget = make_budget(
        options.max_bytes,
        options.bits_per_weight,
        example=prepared.example,
        details={
            "preprocessing": prepared.dataset.preprocessing,
            "labels": prepared.dataset.labels,
            "recipe": {
                **_describe_recipe(options, prepared, options.epochs),
                "score": {
                    "metric": _choose_objective(options, functions, prepared.dataset).metric.name,
                    "value": 0.1234,
                },
            },
        },
    )

    given = {name: getattr(options, name) for name in (*OF_TRAIN, "augment", "loss", "metric")}
    for entry in fields(Recipe):
        given[entry.name] = getattr(options, entry.name)
    return train(
        prepared.loaded.model,
        prepared.dataset,
        progress=None if progress is None else training_progress(progress),
        state_file=state_file,
        budget=budget,
        start_from=start,
        **{**given, **functions},
    )


def _describe_recipe(
    options: QuantizeOptions, prepared: _Prepared, best_epoch: int
) -> dict[str, Any]:
    """What the checkpoint says of its training, beside the options of the levels."""
    not_kept = ("device", "resume")
    recipe = {name: getattr(options, name) for name in OF_TRAIN if name not in not_kept}
    recipe |= {"data": prepared.dataset.name, "best_epoch": best_epoch}
    for name in BY_NAME:
        recipe[name] = _show_option(getattr(options, name))
    recipe["budget"] = None
    for name in ("max_bytes", "bits_per_weight"):
        if getattr(options, name) is not None:
            recipe["budget"] = {name: getattr(options, name)}
    if options.start_from is not None:
        recipe["start_from"] = Path(options.start_from).name
    return recipe


def with_history(
    checkpoint: Checkpoint,
    trained: Training,
    *,
    before: Proportion | Score | None,
    after: Proportion | Score | None,
    data: str,
) -> Checkpoint:
    """Add to a checkpoint what a report shows of its training.

    Args:
        checkpoint: made from a Quantizer.
        trained: the training.
        before: accuracy of the float network on the test split, if known.
        after: accuracy of the quantized one on it, if known.
        data: name of the data set.

    Returns:
        The checkpoint with history and accuracies.
    """
    assert checkpoint.insight is not None  # it was made from a Quantizer
    insight = replace(
        checkpoint.insight,
        history=tuple(_write_record(record) for record in trained.history),
        best_epoch=trained.best_epoch,
        before=_write_counts(before),
        after=_write_counts(after),
        data=data,
    )
    return replace(checkpoint, insight=insight)


def _write_counts(found: Proportion | Score | None) -> dict[str, int] | None:
    if isinstance(found, Proportion) and found:
        return {"hits": found.hits, "total": found.total}
    return None


def _write_record(record: EpochRecord) -> dict[str, Any]:
    """Numbers alone, as checkpoints hold them; the metric's name stands in the recipe."""
    values = asdict(record)
    del values["metric"]
    return values


def _load_named_functions(options: QuantizeOptions) -> dict[str, Any]:
    """The functions that options name, by the option: augmentations of ours, and the user's own."""
    from ecqx_onnx.data.augmentation import AUGMENTATIONS
    from ecqx_onnx.quantization.relevance.zennit_import import import_zennit

    found: dict[str, Any] = {}
    for name in BY_NAME:
        value = getattr(options, name)
        if isinstance(value, str) and is_function_spec(value):
            if name == "relevance":
                import_zennit()  # as the user's file will, and may not be able to by itself
            found[name] = load_function(value)
    if "relevance" in found:
        found["relevance"] = found["relevance"]()
    augment = options.augment
    if isinstance(augment, str) and "augment" not in found:
        if augment not in AUGMENTATIONS:
            raise OptionError(
                f"augmentation '{augment}' is unknown: use one of {', '.join(AUGMENTATIONS)}, or"
                " FILE.py:FUNCTION"
            )
        found["augment"] = AUGMENTATIONS[augment]
    return found


def _show_option(value: Any) -> Any:
    """An option for the recipe: a file by its name alone, whatever folder it lies in."""
    if isinstance(value, str) and is_function_spec(value):
        file, _, function = value.rpartition(":")
        return f"{Path(file).name}:{function}"
    if value is None or isinstance(value, str):
        return value
    return getattr(value, "__name__", type(value).__name__)


def _check_patterns(options: QuantizeOptions, names: Sequence[str]) -> None:
    """OptionError for a pattern that matches no parameter: told before the training, not after."""
    for unmatched in options.unmatched(names):
        first = next(iter(names), "")
        raise OptionError(f"--{unmatched} matches no parameter; the first is '{first}'")


def training_progress(progress: Told) -> Callable[[Progress], None]:
    """Write a training's progress as the command line's bar wants it.

    Args:
        progress: called with (steps done, steps in all, a line of text).

    Returns:
        What `quantization.train` calls.
    """

    def show(at: Progress) -> None:
        text = (
            f"epoch {at.epoch}/{at.epochs}  loss {at.loss:.3f}  {_show_metric(at)}"
            f"  {at.zeros:.0%} zeros  {at.bits_per_weight:.2f} bit"
        )
        progress((at.epoch - 1) * at.steps + at.step, at.epochs * at.steps, text)

    return show


def _show_metric(at: Progress) -> str:
    if at.metric == "accuracy":
        return f"accuracy {at.accuracy:.2%}"
    return f"{at.metric} {at.accuracy:.4g}"
