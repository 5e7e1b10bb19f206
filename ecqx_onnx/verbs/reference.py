"""What an .onnx file is compared with: the PyTorch side or a float .onnx file, and data.

`load_reference` and `load_evaluation_data` turn what a user names into what validation takes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ecqx_onnx.checkpoint.float_model import make_float_model
from ecqx_onnx.compression.model.float_model import is_onnx_path
from ecqx_onnx.compression.search.samples import InputSpec, holds_inputs, load_samples
from ecqx_onnx.data import Dataset, Split
from ecqx_onnx.errors import CheckFailed, InputError, ModelError
from ecqx_onnx.inputs.onnx_file import read_onnx
from ecqx_onnx.options.input_shape import InputShape
from ecqx_onnx.runtime.sessions import open_session
from ecqx_onnx.tensors import QuantTensor
from ecqx_onnx.validation.judgement import read_preprocessing
from ecqx_onnx.validation.outputs.comparison import Batch
from ecqx_onnx.validation.outputs.samples import SampleBatches
from ecqx_onnx.validation.references.onnx_reference import OnnxReference, find_integer_operator

if TYPE_CHECKING:
    import torch

    from ecqx_onnx.sources.to_checkpoint import Source


@dataclass(frozen=True, eq=False)
class Reference:
    """The other side of a comparison; without arguments, there is none.

    Attributes:
        module: runs beside the file; None where nothing is given.
        tensors: the quantized weights that it holds.
        is_float: it is the float model from before the quantization, so that differences are shown
            and not judged.
        float_model: makes the ONNX model from before any quantization; None where there is none.
        labels: names of its classes, in the order of its scores; empty where it has none.
    """

    module: torch.nn.Module | OnnxReference | None = None
    tensors: tuple[QuantTensor, ...] = ()
    is_float: bool = False
    float_model: Callable[..., bytes | None] | None = None
    labels: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class EvaluationData:
    """Data that a file is judged on; without arguments, there are none.

    Attributes:
        split: samples, and their classes numbered as the file numbers them.
        notes: what a user should know of them, one sentence each.
        name: of the data set; "the given data" for a bare split.
        labels: names of the data set's classes, if it has any.
        samples: instead of a split, for any number of inputs; with or without classes.
    """

    split: Split | None = None
    notes: tuple[str, ...] = ()
    name: str = "the given data"
    labels: tuple[str, ...] = ()
    samples: SampleBatches | None = None


def load_reference(
    against: Source | None,
    *,
    factory: str | None = None,
    input_shape: InputShape | None = None,
    trust_pickle: bool = False,
    strict: bool = True,
    onnx_file: str | Path | None = None,
) -> Reference:
    """Load the PyTorch side of a comparison.

    Args:
        against: anything that `convert` takes, or the float model, also as an .onnx file; None
            for no reference.
        factory: FILE.py:FACTORY, the network of a state dict.
        input_shape: of one input without the batch, where FILE.py has no INPUT_SHAPE.
        trust_pickle: unpickle a module, which runs its author's code.
        strict: refuse a state dict that lacks weights, or has others.
        onnx_file: what is compared with it; a network that is traced here gets its free axes.

    Returns:
        The reference; the empty one for None.

    Raises:
        InputError: if it can't be read, or lacks something.
    """
    if against is None:
        return Reference()
    if is_onnx_path(against):
        return _load_float_file(Path(against))
    from ecqx_onnx.sources.to_checkpoint import as_checkpoint

    checkpoint = as_checkpoint(
        against,
        factory=factory,
        input_shape=input_shape,
        dynamic=None if factory is None or onnx_file is None else _find_free_axes(onnx_file),
        trust_pickle=trust_pickle,
        strict=strict,
        allow_float=True,
    )
    return Reference(
        checkpoint.module(),
        checkpoint.tensors,
        is_float=not checkpoint.tensors,
        float_model=functools.partial(make_float_model, checkpoint),
        labels=checkpoint.labels,
    )


def _find_free_axes(onnx_file: str | Path) -> dict[str, dict[int, str]] | None:
    """The free axes of a file's inputs; None where none but first ones are free."""
    found: dict[str, dict[int, str]] = {}
    for value in read_onnx(onnx_file).proto.graph.input:
        dims = value.type.tensor_type.shape.dim
        free = {axis: dim.dim_param for axis, dim in enumerate(dims) if dim.dim_param}
        if free:
            found[value.name] = free
    return found if any(axis for free in found.values() for axis in free) else None


def _load_float_file(path: Path) -> Reference:
    file = read_onnx(path)
    name = find_integer_operator(file)
    if name is not None:
        raise ModelError(
            f"{path}: its weights are integers already ({name}), and a float model is needed here:"
            " give the one from before the quantization"
        )
    return Reference(OnnxReference(path), is_float=True)


def load_samples_or_split(
    data: Any,
    onnx_file: str | Path,
    reference: Reference,
    *,
    samples: int | None = None,
    labels_from: str | Path | None = None,
) -> EvaluationData:
    """Load data that a file is compared with its float model on; they need no labels.

    Args:
        data: whatever `compress` takes, or a labelled data set.
        onnx_file: the file, which may record preprocessing and class names.
        reference: the float model.
        samples: take only so many.
        labels_from: another .onnx file with class names, for where `onnx_file` has none.

    Returns:
        A split where the data are labelled, else samples by the names of the inputs.

    Raises:
        InputError: if the data can't be read, or don't fit the file.
    """
    if data is None:
        return EvaluationData()
    specs = [InputSpec.of(node) for node in _list_inputs(onnx_file, reference)]
    if not holds_inputs(data, [spec.name for spec in specs]):
        try:
            found = load_evaluation_data(
                data, onnx_file, samples=samples, labels=reference.labels, labels_from=labels_from
            )
            if isinstance(found.split, Split):
                return found
        except InputError as error:
            return _load_unlabelled(data, onnx_file, specs, samples, error)
    return _load_unlabelled(data, onnx_file, specs, samples, None)


def _list_inputs(onnx_file: str | Path, reference: Reference) -> list[Any]:
    if isinstance(reference.module, OnnxReference):
        return reference.module.inputs
    try:
        return list(open_session(Path(onnx_file), level="disabled").get_inputs())
    except CheckFailed as error:
        raise ModelError(f"{onnx_file}: {error}") from error


def _load_unlabelled(
    data: Any,
    onnx_file: str | Path,
    specs: Sequence[InputSpec],
    count: int | None,
    trouble: InputError | None,
) -> EvaluationData:
    """As `compress` reads them; `trouble` is told where that does not go either."""
    recorded = read_preprocessing(onnx_file) if len(specs) == 1 else None
    try:
        found = load_samples(data, specs, preprocessing=recorded, samples=count)
        next(found.batches(1))
    except InputError as error:
        raise trouble or error from None

    def read(size: int) -> Iterator[Batch]:
        for feeds, labels in found.batches(1 if found.calls else size):
            yield tuple(feeds[spec.name] for spec in specs), labels

    used = found.preprocessing
    note = f"preprocessing: {used.describe() if used else 'none, arrays as they are'}"
    known = SampleBatches(found.name, len(found), read, found.labels is not None, note)
    return EvaluationData(samples=known, name=found.name)


def load_evaluation_data(
    data: Any,
    onnx_file: str | Path,
    *,
    samples: int | None = None,
    labels: Sequence[str] = (),
    labels_from: str | Path | None = None,
) -> EvaluationData:
    """Load data, and number their classes as the file does.

    Args:
        data: a data set's name (see `load_dataset`), a Dataset, a Split, or None.
        onnx_file: whose class names, where it has any, say which class has which number.
        samples: take only so many.
        labels: class names to go by where no file has any.
        labels_from: another .onnx file with class names, for where `onnx_file` has none.

    Returns:
        The test split, notes and names; empty for None.

    Raises:
        InputError: if the data or a file can't be read, or their classes don't fit the file's.
    """
    from ecqx_onnx.data import load_dataset
    from ecqx_onnx.data.class_names import match_classes

    if isinstance(data, str):
        data = load_dataset(data)
    if isinstance(data, Dataset):
        known, outputs = read_class_names(onnx_file)
        if not known and labels_from is not None:
            known, _ = read_class_names(labels_from)
        dataset, notes = match_classes(data, known or tuple(labels), outputs=outputs)
        split = _take(dataset.test, samples)
        return EvaluationData(split, notes, dataset.name, dataset.labels)
    return EvaluationData(_take(data, samples))


def _take(split: Split | None, samples: int | None) -> Split | None:
    if isinstance(split, Split) and samples is not None:
        return split.take(samples)
    return split


def read_class_names(path: str | Path) -> tuple[tuple[str, ...], int | None]:
    """Read what an .onnx file says of its classes.

    Args:
        path: of the file.

    Returns:
        Their names, empty if it has none; and how many scores its first output [N, C] holds, None
        if that isn't said.

    Raises:
        FileError: if it can't be read.
    """
    file = read_onnx(path)
    labels = file.metadata.get("labels")
    names = tuple(map(str, labels)) if isinstance(labels, list) else ()
    if not file.proto.graph.output:
        return names, None
    dims = file.proto.graph.output[0].type.tensor_type.shape.dim
    if len(dims) != 2:
        return names, None
    return names, dims[1].dim_value or None  # 0 stands for a free length
