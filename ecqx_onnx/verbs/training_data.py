"""Fit a data set to the network that is trained on it: its channels, and its preprocessing."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ecqx_onnx.data import Dataset
from ecqx_onnx.errors import OptionError

if TYPE_CHECKING:
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
