"""Second moments of what each weight multiplies, streamed batch by batch through onnxruntime.

    H = E[(x - m)(x - m)ᵀ],  m = E[x]        where the layer's bias takes up the mean error
    H = E[x xᵀ],             m = 0           where there is no bias to do that

An error E in the weight W moves the layer's output by E x, whose mean square is tr(E H Eᵀ)
[Frantar et al. 2023, arXiv 2210.17323]. A bias can be corrected by E m at no cost, which leaves the
centered moments. Inputs longer than `LONGEST` have their moments in diagonal blocks, so that memory
is bounded; the sums are float64.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ecqx_onnx.compression.model.weights import Product, Weight
from ecqx_onnx.compression.rounding.vectors import take_input_vectors
from ecqx_onnx.errors import ModelError
from ecqx_onnx.runtime.runner import Feeds, Runner, batch_size

LONGEST = 4096  # inputs of one block of H
VECTORS_PER_INPUT = 32  # as many vectors as that times the length of x, or FEWEST_VECTORS
FEWEST_VECTORS = 65_536
BUDGET = 1 << 29  # bytes of moments that one pass over the data may hold


@dataclass(frozen=True)
class MomentKey:
    """What moments depend on: weights with the same key (Q, K and V, say) share them."""

    product: Product
    groups: int

    @classmethod
    def of(cls, weight: Weight) -> MomentKey | None:
        """Find the key of a weight's moments.

        Args:
            weight: of the graph.

        Returns:
            The key; None where no input can be watched.
        """
        product = weight.watched
        if product is None or product.layout in ("unwatched", "rows"):
            return None
        groups = 1 if product.layout in ("sequence", "last", "first", "second_last") else 0
        return cls(_drop_irrelevant(product), groups or weight.groups)


def _drop_irrelevant(product: Product) -> Product:
    """The product without what does not matter for its input's vectors."""
    operator = "" if product.layout in ("last", "sequence") else product.operator
    layout = "last" if product.layout == "sequence" else product.layout
    return Product(operator, product.value, "", layout, product.main, product.window)


@dataclass(frozen=True, eq=False)
class Moments:
    """Second moments of one input.

    Attributes:
        blocks: float64 arrays [groups, k, k] on the diagonal, for inputs `starts[i]` to `starts[i]
            + k`.
        mean: float64 [groups, n].
        count: vectors that were seen.
        tails: float64 [groups], E|x|⁴ as a multiple of what it were for a normal distribution;
            tells how sure the moments are.
    """

    blocks: tuple[np.ndarray, ...]
    starts: tuple[int, ...]
    mean: np.ndarray
    count: int
    tails: np.ndarray | None = None

    @property
    def length(self) -> int:
        """Entries of x."""
        return int(self.mean.shape[-1])

    def centered(self) -> Moments:
        """Center the moments about the mean: E[x xᵀ] - m mᵀ.

        Returns:
            New moments with the same mean and count.
        """
        blocks = []
        for start, block in zip(self.starts, self.blocks, strict=True):
            part = self.mean[:, start : start + block.shape[-1]]
            blocks.append(block - part[:, :, None] * part[:, None, :])
        return Moments(tuple(blocks), self.starts, self.mean, self.count, self.tails)

    def shrunk(self) -> Moments:
        """The same with correlations drawn towards none, as far as chance may have made them.

            α = (E|x|⁴ - |S|²) / N / |S - diag S|²,   S <- (1 - α) S + α diag S
            E|x|⁴ = tails · ((tr S)² + 2 |S|²)

        [Ledoit and Wolf 2004, J. Multivariate Analysis 88, with diag S as the target]. With fewer
        vectors than inputs, error feedback would push every error to where these few do not see it.

        Returns:
            New moments; these ones themselves where nothing tells how sure they are.
        """
        if self.tails is None or self.count < 1:
            return self
        blocks = tuple(self._shrink(block) for block in self.blocks)
        return Moments(blocks, self.starts, self.mean, self.count, self.tails)

    def _shrink(self, block: np.ndarray) -> np.ndarray:
        assert self.tails is not None
        shrunk = np.empty_like(block)
        for group, matrix in enumerate(block):
            diagonal = np.diag(matrix)
            square = float((matrix**2).sum())
            apart = square - float((diagonal**2).sum())
            fourth = float(self.tails[group]) * (float(diagonal.sum()) ** 2 + 2 * square)
            chance = max(0.0, fourth - square) / self.count
            share = min(1.0, chance / apart) if apart > 0 else 1.0
            shrunk[group] = (1 - share) * matrix
            np.fill_diagonal(shrunk[group], diagonal)
        return shrunk


class MomentSum:
    """Adds up vectors of one input, or of two inputs x and x' of the same length: E[x' xᵀ]."""

    def __init__(self) -> None:
        self.blocks: list[np.ndarray] = []
        self.starts: list[int] = []
        self.total: np.ndarray | None = None
        self.fourth: np.ndarray | None = None
        self.count = 0

    def add(self, vectors: np.ndarray, others: np.ndarray | None = None) -> None:
        """Add one batch of vectors to all sums.

        Args:
            vectors: x, float32 [groups, count, n].
            others: x' of the same shape, to which the rows of a block belong; None for x itself.
        """
        groups, count, length = vectors.shape
        if self.total is None:
            self.total = np.zeros((groups, length))
            self.starts = list(range(0, length, LONGEST))
            sizes = [min(LONGEST, length - start) for start in self.starts]
            self.blocks = [np.zeros((groups, size, size)) for size in sizes]
            self.fourth = np.zeros(groups)
        self.count += count
        with np.errstate(over="ignore", invalid="ignore"):  # which check_finite tells
            self._add_products(vectors, others)

    def _add_products(self, vectors: np.ndarray, others: np.ndarray | None) -> None:
        assert self.total is not None
        assert self.fourth is not None
        self.total += vectors.sum(axis=1, dtype=np.float64)
        squares = np.einsum("gcn,gcn->gc", vectors, vectors).astype(np.float64)
        self.fourth += (squares**2).sum(axis=1)
        for start, block in zip(self.starts, self.blocks, strict=True):
            part = vectors[:, :, start : start + block.shape[-1]]
            other = part if others is None else others[:, :, start : start + block.shape[-1]]
            for group in range(len(vectors)):
                block[group] += other[group].T @ part[group]

    def add_mean(self, vectors: np.ndarray) -> None:
        """Add one batch to the mean only, not to second moments.

        Args:
            vectors: float32 [groups, count, n].
        """
        total = vectors.sum(axis=1, dtype=np.float64)
        self.total = total if self.total is None else self.total + total
        self.count += vectors.shape[1]

    def finish(self) -> Moments:
        """Divide the sums by the number of vectors.

        Returns:
            The averages; their blocks are empty if only means were added.
        """
        assert self.total is not None
        count = max(1, self.count)
        blocks = tuple(block / count for block in self.blocks)
        tails = None if self.fourth is None else self._tails(blocks, self.fourth / count)
        return Moments(blocks, tuple(self.starts), self.total / count, self.count, tails)

    def _tails(self, blocks: tuple[np.ndarray, ...], fourth: np.ndarray) -> np.ndarray:
        """E|x|⁴ against (tr S)² + 2 |S|², for x in blocks nearly so."""
        traces = sum(np.trace(block, axis1=1, axis2=2) for block in blocks)
        squares = sum((block**2).sum(axis=(1, 2)) for block in blocks)
        normal = traces**2 + 2 * squares
        return np.divide(fourth, normal, out=np.ones(len(fourth)), where=normal > 0)


def collect_moments(
    runner: Runner,
    weights: Sequence[Weight],
    batches: Iterable[Feeds],
    *,
    samples: int,
    changed: Mapping[str, np.ndarray] | None = None,
) -> dict[MomentKey, Moments]:
    """Moments of the inputs of `weights`, in one pass over the data.

    Args:
        runner: knows the values that the weights are multiplied with.
        weights: whose inputs are wanted; those without an input to watch are passed over.
        batches: the model's inputs, batch by batch.
        samples: how many samples all batches hold, for an even choice of windows.
        changed: values of weights that differ from the graph's own.
    Returns:
        Moments by key.
    Raises:
        ModelError: an activation holds NaN or infinity.
    """
    keys = unique_keys(weights)
    sums = {key: MomentSum() for key in keys}
    names = list(dict.fromkeys(key.product.value for key in keys if key.product.value))
    for number, feeds in enumerate(batches):
        found = dict(zip(names, runner.run(feeds, fetch=names, weights=changed), strict=True))
        mask = padding_mask(feeds)
        size = max(1, batch_size(feeds))
        for key, total in sums.items():
            activation = found[str(key.product.value)]
            if not activation.size:  # of a branch that was not taken
                continue
            total.add(vectors_of(key, activation, number, size / samples, mask))
    for key, total in sums.items():
        check_finite(str(key.product.value), total)
    return {key: total.finish() for key, total in sums.items() if total.total is not None}


def unique_keys(weights: Sequence[Weight]) -> list[MomentKey]:
    """The keys of the weights that have one, each once, in their order.

    Args:
        weights: in any order.

    Returns:
        Keys without repetitions; weights without an input to watch have none.
    """
    keys = [MomentKey.of(weight) for weight in weights]
    return list(dict.fromkeys(key for key in keys if key is not None))


def vectors_of(
    key: MomentKey, activation: np.ndarray, number: int, share: float, mask: np.ndarray | None
) -> np.ndarray:
    """Take this batch's vectors for one key from an activation.

    Args:
        key: says how the activation is read.
        activation: of this batch, any float type.
        number: of the batch, so that batches see other places.
        share: of this batch's samples in all samples: it gives that share of the vectors wanted.
        mask: bool [N, T], False for tokens that are padding; None without one.

    Returns:
        float32 [groups, count, length].
    """
    window = key.product.window
    taps = int(np.prod(window.kernel)) if window is not None else 1
    channels = activation.shape[1] if activation.ndim > 1 else 1
    length = channels // key.groups * taps if window is not None else activation.shape[-1]
    wanted = max(FEWEST_VECTORS, VECTORS_PER_INPUT * length)
    limit = max(1, int(wanted * share))
    return take_input_vectors(
        activation, key.product, groups=key.groups, limit=limit, offset=number, mask=mask
    )


def check_finite(name: str, total: MomentSum) -> None:
    """Refuse sums that hold NaN or infinity: so do the values, or their squares.

    Args:
        name: of the activation, for the message.
        total: its sums.

    Raises:
        ModelError: they do.
    """
    sums = [*total.blocks] if total.total is None else [total.total, *total.blocks]
    if not all(np.isfinite(part).all() for part in sums):
        raise ModelError(
            f"activation '{name}' holds NaN, infinity or numbers beyond 1e18 on these data: mend"
            " the model or the data"
        )


def padding_mask(feeds: Feeds) -> np.ndarray | None:
    """Find the padding mask of a batch: a 2-D integer or bool input with "mask" in its name.

    Args:
        feeds: the model's inputs by name.

    Returns:
        bool [N, T], False for padding; None without such an input, or where it is 0 everywhere.
    """
    for name, array in feeds.items():
        if "mask" in name.lower() and array.ndim == 2 and array.dtype.kind in "iub":
            mask = array != 0
            if mask.any():
                return mask
    return None
