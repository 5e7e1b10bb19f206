"""The verbs: save, convert, validate, quantize as functions of paths and values; the command line only adds words."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ecqx_onnx_converters.graph.outputs import check_output

from ecqx_onnx.data import Dataset
from ecqx_onnx.errors import DataError, FileError, OptionError
from ecqx_onnx.inputs.user_code import is_function_spec, load_function
from ecqx_onnx.tensors import QuantTensor
from ecqx_onnx.validation.metrics import Proportion
from ecqx_onnx.validation.plausibility import MOST_CLASSES, Confusion, doubt_accuracy

if TYPE_CHECKING:
    import torch

    from ecqx_onnx.checkpoint.checkpoint import Checkpoint
    from ecqx_onnx.quantization.report import Report
    from ecqx_onnx.quantization.training import EpochRecord, Training
    from ecqx_onnx.sources.loading import Loaded


@dataclass(frozen=True, eq=False)
class Quantized:
    """What `quantize` did. accuracy: on the test split, which no choice was made on; before is the float network's, after that of
    the quantised one, with activations rounded as they were while training."""

    path: Path
    before: Proportion | None
    after: Proportion
    best_epoch: int
    history: tuple[EpochRecord, ...]
    report: Report
    tensors: tuple[QuantTensor, ...]
    data: str
    notes: tuple[str, ...]
    activations: str = "float32"

    @property
    def zeros(self) -> float:
        return sum(t.zeros * t.size for t in self.tensors) / sum(t.size for t in self.tensors)

    @property
    def bits_per_weight(self) -> float:
        return sum(t.entropy * t.size for t in self.tensors) / sum(t.size for t in self.tensors)


def quantize(
    factory: str,
    *,
    data: str,
    out: str | Path,
    weights: str | Path | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    resume: bool = False,
    force: bool = False,
    strict: bool = True,
    progress: Callable[..., None] | None = None,
    seed: int = 0,
    **options: Any,
) -> Quantized:
    """Train and quantise the network of 'FILE.py:FACTORY' on a data set, and save it as a checkpoint.

    weights: its float state dict; without it the network starts as the factory made it, under `seed`. mean, std: the
    input's normalisation; by default PREPROCESSING of FILE.py, else the training split's own statistics.
    options: those of `quantization.train` and the Quantizer; augment, start and relevance by name or as FILE.py:FUNCTION (for a
    relevance it is called and returns the composite). While training, OUT.training holds what `resume` needs. Under torchrun
    every process calls this, and the first one writes.
    """

    import torch

    from ecqx_onnx.data import load_dataset
    from ecqx_onnx.quantization import train
    from ecqx_onnx.quantization.distributed import find_rank, open_process_group
    from ecqx_onnx.quantization.state_file import state_path
    from ecqx_onnx.sources.loading import load_factory
    from ecqx_onnx.sources.to_checkpoint import as_checkpoint

    out = Path(out)
    check_output(out, force=force, source=weights)
    if out.suffix.lower() == ".onnx":
        raise FileError(
            f"{out}: what is written is a checkpoint, not an .onnx file; name it {out.with_suffix('.pt')}"
        )
    named: dict[str, Any] = {
        name: show_option(options[name])
        for name in ("augment", "relevance", "start")
        if name in options
    }
    options = {**options, **load_named_options(options)}
    torch.manual_seed(seed)
    loaded = load_factory(factory)
    dataset = load_dataset(data)
    dataset = fit_channels(dataset, loaded)
    dataset, told = preprocess_data(dataset, loaded, mean, std, factory=factory)
    state_notes: tuple[str, ...] = ()
    if weights is not None:
        from ecqx_onnx.sources.loading import apply_state, load_state

        state_notes = apply_state(loaded.model, load_state(weights), weights, strict=strict)
    _check_patterns(options, [name for name, _ in loaded.model.named_parameters()])
    x, _ = next(dataset.test.batches(2))
    try:
        outputs = loaded.model.eval()(torch.from_numpy(x)).shape[-1]
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(
            f"{data}: a batch of shape {x.shape} does not go through {factory} ({reason}); give data of the shape that it takes"
        ) from error
    dataset.check_outputs(outputs)
    confusion = None if weights is None else confuse(loaded.model, dataset.test)
    before = None
    if weights is not None:
        before = accuracy(loaded.model, dataset.test) if confusion is None else confusion.right
    told = (*state_notes, *dataset.notes, told, *doubt_accuracy(confusion, who="the float model"))
    if weights is None:
        told = (
            *told,
            "no --weights are given: the network starts from random values and is trained from scratch",
        )
    state_file = state_path(out)
    shown = None if progress is None else training_progress(progress)
    with open_process_group():
        trained = train(
            loaded.model,
            dataset,
            seed=seed,
            progress=shown,
            state_file=state_file,
            resume=resume,
            **options,
        )
        first = find_rank() == 0
    after = accuracy(trained.quantizer.model, dataset.test)
    trained.quantizer.model.to("cpu")
    checkpoint = as_checkpoint(
        trained.quantizer,
        example=torch.from_numpy(x),
        preprocessing=dataset.preprocessing,
        labels=dataset.labels,
        recipe={**trained.setup, "data": dataset.name, "best_epoch": trained.best_epoch, **named},
    )
    checkpoint = with_history(checkpoint, trained, before=before, after=after, data=dataset.name)
    if first:
        from ecqx_onnx.checkpoint.checkpoint import save as save_checkpoint
        from ecqx_onnx.quantization.state_file import StateFile

        save_checkpoint(checkpoint, out, force=force)
        StateFile(state_file).remove()
    return Quantized(
        out,
        before,
        after,
        trained.best_epoch,
        trained.history,
        trained.quantizer.report(),
        checkpoint.tensors,
        dataset.name,
        (*told, *checkpoint.notes),
        trained.quantizer.options.activations,
    )


def fit_channels(dataset: Dataset, loaded: Loaded) -> Dataset:
    """The data with the channels that the network takes: by INPUT_SHAPE, else by what it runs on."""

    import torch

    with torch.no_grad():
        if loaded.input_shape is not None:
            return dataset.fitted(loaded.input_shape)
        for candidate in (
            dataset,
            *(dataset.fitted((channels, None, None)) for channels in (1, 3)),
        ):
            x, _ = next(candidate.test.batches(2))
            with contextlib.suppress(
                RuntimeError, ValueError, TypeError, IndexError, AssertionError
            ):
                loaded.model.eval()(torch.from_numpy(x))
                return candidate
        return dataset


def preprocess_data(
    dataset: Dataset,
    loaded: Loaded,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    *,
    factory: str,
) -> tuple[Dataset, str]:
    """(the data as the training takes them, a sentence that says how and who decided it)."""
    if bool(mean) != bool(std):
        given, missing = ("--mean", "--std") if mean else ("--std", "--mean")
        neutral = "1" if mean else "0"
        raise OptionError(
            f"{given} goes with {missing}: give both ({missing} {neutral} changes nothing)"
        )
    file = Path(factory.rpartition(":")[0]).name
    where = f"the data's type decided; {file} has no PREPROCESSING"
    if loaded.preprocessing is not None:
        dataset, where = (
            dataset.with_preprocessing(loaded.preprocessing),
            f"PREPROCESSING of {file}",
        )
    if mean and std:
        dataset, where = dataset.normalized(mean, std), "mean and std as given, " + where
    elif loaded.preprocessing is None and dataset.preprocessing.kind != "indices":
        dataset = dataset.normalized()
        where = f"mean and std estimated from the training samples of {dataset.name}; " + where
    return dataset, f"preprocessing: {dataset.preprocessing.describe()} ({where})"


def with_history(
    checkpoint: Checkpoint,
    trained: Training,
    *,
    before: Proportion | None,
    after: Proportion | None,
    data: str,
) -> Checkpoint:
    """The checkpoint of a training, with what a report shows of it. before, after: accuracies on the test split."""
    assert checkpoint.insight is not None  # it was made from a Quantizer
    insight = replace(
        checkpoint.insight,
        history=tuple(asdict(record) for record in trained.history),
        best_epoch=trained.best_epoch,
        before=write_counts(before),
        after=write_counts(after),
        data=data,
    )
    return replace(checkpoint, insight=insight)


def write_counts(accuracy: Proportion | None) -> dict[str, int] | None:
    return {"hits": accuracy.hits, "total": accuracy.total} if accuracy else None


def load_named_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """What the options name: an augmentation, and the user's own functions."""
    from ecqx_onnx.data.augmentation import AUGMENTATIONS
    from ecqx_onnx.quantization.relevance.zennit_import import import_zennit

    found: dict[str, Any] = {}
    for name in ("augment", "start", "relevance"):
        value = options.get(name)
        if isinstance(value, str) and is_function_spec(value):
            if name == "relevance":
                import_zennit()  # as the user's file will, and may not be able to by itself
            found[name] = load_function(value)
    if "relevance" in found:
        found["relevance"] = found["relevance"]()
    augment = options.get("augment")
    if isinstance(augment, str) and "augment" not in found:
        if augment not in AUGMENTATIONS:
            raise OptionError(
                f"augmentation '{augment}' is unknown: use one of {', '.join(AUGMENTATIONS)}, or FILE.py:FUNCTION"
            )
        found["augment"] = AUGMENTATIONS[augment]
    return found


def show_option(value: Any) -> Any:
    """An option for the recipe: a file by its name alone, whatever folder it lies in."""
    if isinstance(value, str) and is_function_spec(value):
        file, _, function = value.rpartition(":")
        return f"{Path(file).name}:{function}"
    return (
        value if isinstance(value, str | None) else getattr(value, "__name__", type(value).__name__)
    )


def _check_patterns(options: Mapping[str, Any], names: Sequence[str]) -> None:
    """OptionError for a pattern that no parameter's name matches: told before the training that it is for, not after."""
    from ecqx_onnx.quantization import Recipe

    patterns = {name: options[name] for name in ("exclude", "bits") if name in options}
    for unmatched in Recipe(**patterns).unmatched(names):
        raise OptionError(
            f"--{unmatched} matches no parameter; the first is '{next(iter(names), '')}'"
        )


def accuracy(model: torch.nn.Module, split: Any, *, batch_size: int = 256) -> Proportion:
    """Share of the split that the model classifies right."""

    import torch

    with contextlib.suppress(
        NotImplementedError
    ):  # an exported program has its evaluation mode only
        model.eval()
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    right = 0
    with torch.no_grad():
        for x, y in split.batches(batch_size):
            right += int((model(torch.from_numpy(x).to(device)).argmax(1).cpu().numpy() == y).sum())
    return Proportion(right, len(split))


def confuse(model: torch.nn.Module, split: Any, *, batch_size: int = 256) -> Confusion | None:
    """Which class of the split the model takes for which; None for more classes than can be counted in pairs."""

    import torch

    with torch.no_grad():
        with contextlib.suppress(
            NotImplementedError
        ):  # an exported program has its evaluation mode only
            model.eval()
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        found: Confusion | None = None
        for x, y in split.batches(batch_size):
            scores = model(torch.from_numpy(x).to(device))
            if scores.ndim != 2 or scores.shape[1] > MOST_CLASSES:
                return None
            counted = Confusion.count(y, scores.argmax(1).cpu().numpy(), scores.shape[1])
            found = counted if found is None else found + counted
        return found


def training_progress(progress: Callable[..., None]) -> Callable[[Any], None]:
    """Training's progress value -> (done, total, text) as the command line's bar wants it."""

    def show(at: Any) -> None:
        text = (
            f"epoch {at.epoch}/{at.epochs}  loss {at.loss:.3f}  accuracy {at.accuracy:.2%}  "
            f"zeros {at.zeros:.1%}  {at.bits_per_weight:.2f} bit/weight"
        )
        progress((at.epoch - 1) * at.steps + at.step, at.epochs * at.steps, text)

    return show
