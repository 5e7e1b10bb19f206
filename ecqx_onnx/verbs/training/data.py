"""Fit a data set to the network that is trained on it: its channels, and its preprocessing."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ecqx_onnx.data import Dataset
from ecqx_onnx.data.task import TaskData
from ecqx_onnx.errors import DataError, OptionError
from ecqx_onnx.preprocessing.preprocessing import Preprocessing

if TYPE_CHECKING:
    import torch

    from ecqx_onnx.sources.loading import Loaded

DOES_NOT_FIT = (RuntimeError, ValueError, TypeError, IndexError, AssertionError)


def fit_channels(dataset: Dataset, loaded: Loaded) -> Dataset:
    """Give the data the channels that the network takes.

    Args:
        dataset: as it was loaded.
        loaded: the network, with the INPUT_SHAPE of its file where it has one.

    Returns:
        The data fitted to INPUT_SHAPE; without one, as they are or with 1 or 3 channels, whatever
        the network runs on first.
    """
    import torch

    if loaded.input_shape is not None:
        return dataset.fitted(loaded.input_shape)
    model = loaded.model.eval()
    for channels in (None, 1, 3):
        candidate = dataset if channels is None else dataset.fitted((channels, None, None))
        x, _ = next(candidate.test.batches(2))
        with contextlib.suppress(*DOES_NOT_FIT), torch.no_grad():
            model(torch.from_numpy(x))
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
    """Choose how raw samples become inputs of the network.

    Args:
        dataset: the data.
        loaded: the network, with the PREPROCESSING of its file where it has one.
        mean: what is subtracted, one value or one per channel; None for no wish.
        std: what is divided by, likewise.
        factory: FILE.py:FACTORY, for the sentence.

    Returns:
        The data as the training takes them, and a sentence that says how, and who decided it.

    Raises:
        OptionError: if only one of mean and std is given.
    """
    if bool(mean) != bool(std):
        given = "--mean" if mean else "--std"
        missing = "--std" if mean else "--mean"
        neutral = "1" if mean else "0"
        raise OptionError(
            f"{given} goes with {missing}: give both ({missing} {neutral} changes nothing)"
        )
    file = Path(factory.rpartition(":")[0]).name
    where = f"the data's type decided; {file} has no PREPROCESSING"
    if loaded.preprocessing is not None:
        dataset = dataset.with_preprocessing(loaded.preprocessing)
        where = f"PREPROCESSING of {file}"
    if mean and std:
        dataset = dataset.normalized(mean, std)
        where = "mean and std as given, " + where
    elif loaded.preprocessing is None and dataset.preprocessing.kind != "indices":
        dataset = dataset.normalized()
        where = f"mean and std estimated from the training samples of {dataset.name}; " + where
    return dataset, f"preprocessing: {dataset.preprocessing.describe()} ({where})"


def preprocess_task(
    dataset: TaskData,
    loaded: Loaded,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
) -> tuple[TaskData, str]:
    """Choose how raw samples of a task without classes become inputs of the network.

    Args:
        dataset: the data.
        loaded: the network, with the PREPROCESSING of its file where it has one.
        mean: what is subtracted, one value or one per channel; None for no wish.
        std: what is divided by, likewise.

    Returns:
        The data as the training takes them, and a sentence that says how, and who decided it.

    Raises:
        OptionError: if only one of mean and std is given, or the data have several inputs.
    """
    if bool(mean) != bool(std):
        raise OptionError("--mean and --std go together: give both")
    where = "the data's type decided"
    if loaded.preprocessing is not None and dataset.preprocessing is not None:
        dataset = dataset.with_preprocessing(loaded.preprocessing)
        where = "PREPROCESSING of the network's file"
    if mean and std:
        base = dataset.preprocessing or Preprocessing("array")
        dataset = dataset.with_preprocessing(base.normalized(mean, std))
        where = "mean and std as given"
    if dataset.preprocessing is None:
        return dataset, "preprocessing: none, inputs are taken as they are"
    return dataset, f"preprocessing: {dataset.preprocessing.describe()} ({where})"


def list_arguments(model: torch.nn.Module) -> tuple[str, ...]:
    """List the inputs of a network.

    Args:
        model: a module.

    Returns:
        Names of the parameters of its forward, in order; none where it takes any.
    """
    try:
        parameters = inspect.signature(model.forward).parameters.values()
    except (TypeError, ValueError):
        return ()
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.POSITIONAL_ONLY)
    return tuple(entry.name for entry in parameters if entry.kind in kinds)


def make_example(x: Any, arguments: Sequence[str]) -> Any:
    """Make an example of a batch: what a network can be traced with.

    Args:
        x: an array, or {argument: array}.
        arguments: of the network's forward, in order.

    Returns:
        A tensor; or a tuple of them in the order of the arguments.

    Raises:
        DataError: if an argument before one that is given is missing.
    """
    import numpy as np
    import torch

    if isinstance(x, np.ndarray):
        return torch.from_numpy(x)
    if not isinstance(x, Mapping):
        return tuple(torch.as_tensor(value) for value in x)
    wanted = tuple(arguments[: len(x)])
    if set(wanted) != set(x):
        raise DataError(
            f"the data give {', '.join(x)}, and the network's first inputs are"
            f" {', '.join(wanted)}: give these, or wrap the network in one that takes yours"
        )
    return tuple(torch.from_numpy(x[name]) for name in wanted)
