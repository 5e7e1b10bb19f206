"""The cheapest level for each weight, found exactly and hardly slower for more levels.

The grid is uniform, so (w - kΔ)^2 + c_k = w^2 + [k^2 Δ^2 + c_k - 2kΔ·w]: the bracket is a line in
w, and the winner changes only where two lines cross. Those at most 2^b - 1 boundaries are found
once. To look a weight up, the range between the outermost boundaries is cut into equal cells: a
weight's cell says how many boundaries lie in the cells before, and those in its own cell, nearly
always one, are compared with it. Cell numbers come from rounded arithmetic, but the same for
weights and boundaries and monotone in both: what lies in a lower cell is smaller, whatever the
rounding.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

CELLS = 4  # per level
BLOCK = 1 << 17  # weights: what a pass reads and writes stays in a core's own cache
BLOCK_ON_DEVICE = 1 << 22  # large enough to keep a GPU busy, small enough for its memory


def split_into_blocks(rows: Tensor) -> Iterator[tuple[slice, slice]]:
    """Cut rows into contiguous parts of about BLOCK entries each.

    Args:
        rows: [channels, rest].

    Yields:
        (channels, columns) of each part, in order.
    """
    (channels, rest), size = rows.shape, BLOCK if rows.device.type == "cpu" else BLOCK_ON_DEVICE
    if rest < size:
        together = size // max(1, rest)
        for start in range(0, channels, together):
            yield slice(start, start + together), slice(None)
    else:
        for channel in range(channels):
            for start in range(0, rest, size):
                yield slice(channel, channel + 1), slice(start, start + size)


class Envelope:
    """The lower envelope of the levels' costs, one for each channel.

    step: float64 [channels, 1]; levels, cost: float64 [levels], levels ascending; dtype: of the
    weights.
    winners: int64 [channels · places], the index into levels that wins at each of the places that
    `places` gives.
    """

    def __init__(self, step: Tensor, levels: Tensor, cost: Tensor, dtype: torch.dtype) -> None:
        every = find_boundaries(step, levels, cost, dtype)
        channels, self.cells = len(every), CELLS * len(levels)
        self.lowest, highest = every[:, :1], every[:, -1:]
        per_unit = self.cells / (highest - self.lowest)
        self.scale = torch.where(highest > self.lowest, per_unit, torch.zeros_like(per_unit)).clamp(
            max=torch.finfo(dtype).max
        )
        # A level that never wins makes two boundaries coincide: the first of them goes, and its
        # level with it.
        hidden = F.pad(every[:, 1:] == every[:, :-1], (0, 1))
        bounds = every.masked_fill(hidden, torch.inf).sort(-1).values
        winners = F.pad(
            torch.searchsorted(every, bounds, right=True), (1, 0)
        )  # winners[i] up to bounds[i]
        inside = torch.zeros(channels, self.cells, dtype=torch.int64, device=step.device)
        inside.scatter_add_(
            1, self._cell(bounds.minimum(highest), slice(None)).long(), bounds.isfinite().long()
        )
        before = inside.cumsum(1) - inside
        self.most = int(inside.max())  # boundaries in one cell
        order = torch.arange(self.most + 1, device=step.device)
        index = (
            (before[..., None] + order).clamp(max=len(levels) - 1).flatten(1)
        )  # [channels, cells · (most + 1)]
        self.winners = winners.gather(1, index).view(-1)
        bounds = (
            F.pad(bounds, (0, 1), value=torch.inf).gather(1, index).view(channels, self.cells, -1)
        )
        bounds = bounds.masked_fill(order >= inside[..., None], torch.inf)
        self.bounds = [
            bounds[..., i].reshape(-1).contiguous() for i in range(self.most)
        ]  # the i-th in each cell
        self.first_cell: Tensor | None = None
        if channels > 1:
            self.first_cell = torch.arange(channels, device=step.device)[:, None] * self.cells

    def _cell(self, rows: Tensor, channels: slice) -> Tensor:
        return (
            (rows - self.lowest[channels])
            .mul_(self.scale[channels])
            .clamp_(0, self.cells - 1)
            .round_()
        )

    def places(self, rows: Tensor, channels: slice) -> Tensor:
        """Look each weight up.

        Args:
            rows: float [channels, any], weights.
            channels: which of the envelope's channels these are.

        Returns:
            int64 [rows.numel()], the place of each in `winners`.
        """
        cell, flat = self._cell(rows, channels), rows.reshape(-1)
        at = cell.long() if self.first_cell is None else cell.long() + self.first_cell[channels]
        above = (
            self.bounds[0].index_select(0, at.view(-1)).lt_(flat)
        )  # a float comparison in place is the fast one
        for bounds in self.bounds[1:]:
            above += bounds.index_select(0, at.view(-1)).lt_(flat)
        place = above.add_(cell.view(-1), alpha=self.most + 1).long()
        if self.first_cell is not None:
            place.view_as(rows).add_(self.first_cell[channels], alpha=self.most + 1)
        return place


def find_cheapest(rows: Tensor, step: Tensor, levels: Tensor, cost: Tensor) -> Tensor:
    """Find argmin_k (w - kΔ)^2 + c_k; a tie goes to the lower level.

    Args:
        rows: float [channels, rest], the weights.
        step: float64 [channels, 1], Δ.
        levels: float64 [levels], ascending.
        cost: float64 [levels], c_k.

    Returns:
        int64 [channels, rest], indices into levels.
    """
    envelope = Envelope(step, levels, cost, rows.dtype)
    index = torch.empty(rows.shape, dtype=torch.int64, device=rows.device)
    for block in split_into_blocks(rows):
        part = rows[block]
        index[block] = envelope.winners.index_select(0, envelope.places(part, block[0])).view(
            part.shape
        )
    return index


def find_boundaries(step: Tensor, levels: Tensor, cost: Tensor, dtype: torch.dtype) -> Tensor:
    """Find the largest w for which the winner is still among the levels 0 .. i, for each i.

    The levels 0 .. i hold the winner at w if one of them, j, beats every m > i there, that is
    w <= min_m w_jm. A level that never wins makes two boundaries coincide.

    Args:
        step: float64 [channels, 1], Δ.
        levels: float64 [levels], ascending.
        cost: float64 [levels], c_k.
        dtype: of the weights.

    Returns:
        dtype [channels, levels - 1], ascending.
    """
    i, j, step = levels[:, None], levels[None, :], step[:, :, None]
    # i and j > i cost the same at w_ij = (i + j)Δ/2 + (c_j - c_i) / (2Δ(j - i))
    crossing = step * (i + j) / 2 + (cost[None, :] - cost[:, None]) / (2 * step * (j - i))
    crossing = crossing.masked_fill(j <= i, torch.inf)
    beats_all_above = crossing.flip(-1).cummin(-1).values.flip(-1)[:, :-1, 1:]
    exact = beats_all_above.masked_fill((j <= i)[:-1, 1:], -torch.inf).amax(-2)
    # Rounded down to the weights' own precision: w <= boundary then says the same in float32 as
    # in float64.
    rounded = exact.to(dtype)
    return torch.where(
        rounded.double() > exact,
        torch.nextafter(rounded, torch.full_like(rounded, -torch.inf)),
        rounded,
    )
