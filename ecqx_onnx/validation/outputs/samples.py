"""Samples that need no labels, for models with any number of inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from ecqx_onnx.validation.outputs.comparison import Batch


@dataclass(frozen=True)
class SampleBatches:
    """Samples by the names of a model's inputs, labelled or not.

    Attributes:
        name: of the data.
        count: samples.
        read: size of a batch -> batches of that size, inputs in the order of the file's.
        labelled: whether each has its class.
        note: how they were preprocessed, a sentence.
    """

    name: str
    count: int
    read: Callable[[int], Iterator[Batch]]
    labelled: bool
    note: str

    @classmethod
    def of_arrays(cls, name: str, arrays: Mapping[str, np.ndarray]) -> SampleBatches:
        """Make batches of arrays as they are.

        Args:
            name: of the data.
            arrays: input -> [N, ...], in the order of the file's inputs.

        Returns:
            The samples, without labels.
        """
        count = max((len(array) for array in arrays.values() if array.ndim), default=1)

        def read(size: int) -> Iterator[Batch]:
            for start in range(0, count, size):
                parts = [array[start : start + size] for array in arrays.values()]
                yield tuple(parts), None

        return cls(name, count, read, False, "inputs as they are given")
