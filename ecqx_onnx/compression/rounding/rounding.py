"""Rounds a matrix so that its output errors cancel: error feedback through second moments.

Columns are rounded one after another; each one's error is pushed onto the columns that are still
open, by the amount that makes up best for it [Frantar et al. 2023, GPTQ, arXiv 2210.17323]:

    H⁻¹ = Uᵀ U (U upper triangular, Cholesky)
    for each column j:   q_j = round(w_j / Δ)
                         e_j = (w_j - q_j Δ) / U_jj
                         w_k = w_k - e_j U_jk              for k > j
    the rows' loss  (w - qΔ) H (w - qΔ)ᵀ  is then  Σ_j e_j²

The grid is open: as many levels as the step asks for, since the file codes them by entropy. Only
int8's ends (here +-HIGHEST) limit it, and a row that would reach them gets a wider step instead of
a clipped level: one clipped outlier, its error pushed on, ruins the whole row.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ecqx_onnx.compression.rounding.moments import Moments

HIGHEST = 127  # of int8, on both sides of zero
DAMPENING = 0.01  # of the mean of H's diagonal
BLOCK = 64  # columns between two updates of all the rest
ROWS_AT_ONCE = 4096
ATTEMPTS = 24  # a matrix that is not positive gets ten times the dampening each time
WIDER = 1.25  # a row's step, each time that a level would leave the grid


@dataclass(frozen=True, eq=False)
class Rounded:
    """levels: int8 [groups, rows, columns]. steps: float32 [groups, rows, 1], wider for some rows.

    loss: what rounding moves the outputs by, mean square summed over rows.
    notes: what had to be done to H, or to steps; empty in good cases.
    """

    levels: np.ndarray
    steps: np.ndarray
    loss: float
    notes: tuple[str, ...]

    @property
    def values(self) -> np.ndarray:
        """float32, what the levels stand for."""
        return self.levels.astype(np.float32) * self.steps


def round_nearest(matrices: np.ndarray, steps: np.ndarray) -> Rounded:
    """The nearest level for each entry, for weights without an input to learn from.

    Args:
        matrices: float32 [groups, rows, columns].
        steps: float32, positive, broadcasts against [groups, rows, 1].

    Returns:
        Levels, and the steps, wider for rows that would not fit.
    """
    steps, notes = widen_steps(matrices, steps)
    levels = np.empty(matrices.shape, np.int8)
    loss = 0.0
    for group in range(len(matrices)):  # in parts: a table of words has millions of rows
        for start in range(0, matrices.shape[1], ROWS_AT_ONCE):
            part = slice(start, start + ROWS_AT_ONCE)
            rows, step = matrices[group][part], steps[group][part]
            nearest = np.rint(rows / step)
            levels[group][part] = nearest
            loss += float(np.square(rows - nearest * step, dtype=np.float64).sum())
    return Rounded(levels, steps, loss, notes)


def round_with_feedback(
    matrices: np.ndarray,
    steps: np.ndarray,
    moments: Moments,
    *,
    target: np.ndarray | None = None,
    dampening: float = DAMPENING,
    capped: int | None = None,
) -> Rounded:
    """Levels whose output errors cancel.

    Args:
        matrices: float32 [groups, rows, columns].
        steps: float32, positive, broadcasts against [groups, rows, 1].
        moments: of the inputs, with as many groups or with one for all.
        target: what is rounded, by default the matrices themselves; see `corrected_target`.
        dampening: added to H's diagonal, as a share of its mean.
        capped: the outermost level of a grid that ends there: weights beyond it take it, and of
            their errors no more than half a step is pushed on. None for the open grid.

    Returns:
        Levels within +-HIGHEST, and the steps, wider for rows that would not fit; or levels within
        +-capped, and the steps as they were.
    """
    notes: tuple[str, ...] = ()
    if capped is None:
        steps, notes = widen_steps(matrices, steps)
    else:
        steps = np.broadcast_to(steps, (*matrices.shape[:2], 1)).astype(np.float32)
    levels = np.empty(matrices.shape, np.int8)
    loss = 0.0
    wanted = matrices if target is None else target
    for group in range(len(matrices)):
        for start, block in zip(moments.starts, moments.blocks, strict=True):
            part = slice(start, start + block.shape[-1])
            hessian = block[group if len(block) > 1 else 0]
            factor, order, note = factorize(hessian, dampening)
            if note:
                notes = (*notes, note)
            given = (wanted[group][:, part], steps[group], factor, order)
            rows, used, lost = _round_rows(*given, capped)
            if not np.array_equal(used, steps[group]) and start:
                # Another block has these rows rounded with a narrower step already.
                steps[group] = used
                return round_with_feedback(
                    matrices, steps, moments, target=target, dampening=dampening
                )
            steps[group] = used
            levels[group][:, part] = rows
            loss += lost
    return Rounded(levels, steps, loss, tuple(dict.fromkeys(notes)))


def widen_steps(matrices: np.ndarray, steps: np.ndarray) -> tuple[np.ndarray, tuple[str, ...]]:
    """Make steps at least so wide that no weight lies beyond the grid.

    Args:
        matrices: float32 [groups, rows, columns].
        steps: float32, positive, broadcasts against [groups, rows, 1].

    Returns:
        (float32 [groups, rows, 1], a sentence if some had to be wider).
    """
    steps = np.broadcast_to(steps, (*matrices.shape[:2], 1)).astype(np.float32)
    peaks = np.abs(matrices).max(axis=-1, keepdims=True, initial=0.0)
    needed = (peaks / np.float32(HIGHEST - 2)).astype(np.float32)
    wider = int(np.count_nonzero(needed > steps))
    if not wider:
        return steps.copy(), ()
    note = f"{wider} of {steps.size} rows have a wider step, for weights far outside"
    return np.maximum(steps, needed), (note,)


def factorize(hessian: np.ndarray, dampening: float) -> tuple[np.ndarray, np.ndarray, str]:
    """Factorize the inverse of a second-moment matrix: H⁻¹ = Uᵀ U.

    A column without energy (a dead input) costs nothing however it is rounded; its diagonal is
    filled with the dampening, so that the matrix can be inverted.

    Args:
        hessian: H, float64 [n, n], symmetric.
        dampening: added to its diagonal, as a share of the diagonal's mean; more where it needs
            more.

    Returns:
        (U, order, note): the factor for columns sorted by `order`, those of most energy first, and
        what had to be done, empty if nothing.
    """
    diagonal = np.diag(hessian)
    mean = float(diagonal.mean()) if diagonal.size else 0.0
    if not mean > 0.0:
        size = len(hessian)
        return np.eye(size), np.arange(size), "its input is constant: rounded to the nearest levels"
    order = np.argsort(-diagonal, kind="stable")
    sorted_hessian = hessian[np.ix_(order, order)]
    added = dampening
    for _ in range(ATTEMPTS):
        dampened = sorted_hessian + added * mean * np.eye(len(hessian))
        try:
            return _upper_of_inverse(dampened), order, _note(added, dampening)
        except np.linalg.LinAlgError:
            added = max(added, 1e-8) * 10
    return np.eye(len(hessian)), order, "its moments can't be inverted: rounded to nearest levels"


def _note(added: float, wanted: float) -> str:
    return "" if added == wanted else f"its moments needed a dampening of {added:g} of their mean"


def _upper_of_inverse(matrix: np.ndarray) -> np.ndarray:
    """U with H⁻¹ = Uᵀ U, from one Cholesky factor: with J the exchange of order, J H J = L Lᵀ gives
    U = J L⁻ᵀ J... transposed back; no inverse of H is formed."""
    flipped = np.linalg.cholesky(matrix[::-1, ::-1])
    inverse = np.linalg.inv(flipped)
    upper = inverse[::-1, ::-1]
    if not np.isfinite(upper).all():
        raise np.linalg.LinAlgError("not finite")
    return upper


def _round_rows(
    rows: np.ndarray,
    steps: np.ndarray,
    factor: np.ndarray,
    order: np.ndarray,
    capped: int | None,
) -> tuple[np.ndarray, np.ndarray, float]:
    """(levels int8 [rows, columns], steps [rows, 1], loss) of one group's block."""
    levels = np.empty(rows.shape, np.int8)
    losses = np.zeros(len(rows))
    steps = steps.copy()
    open_rows = np.arange(len(rows))
    while open_rows.size:
        made, lost = _feed_errors(rows[open_rows][:, order], steps[open_rows], factor, capped)
        fits = np.abs(made).max(axis=1, initial=0.0) <= HIGHEST
        done = open_rows[fits]
        back = np.empty((len(done), rows.shape[1]), np.int8)
        back[:, order] = made[fits]
        levels[done] = back
        losses[done] = lost[fits]
        open_rows = open_rows[~fits]
        steps[open_rows] *= np.float32(WIDER)
    return levels, steps, float(losses.sum())


def _feed_errors(
    rows: np.ndarray, steps: np.ndarray, factor: np.ndarray, capped: int | None
) -> tuple[np.ndarray, np.ndarray]:
    """(levels as floats [rows, columns], loss of each row); columns in the factor's order."""
    work = rows.astype(np.float64)
    wide = steps.astype(np.float64)[:, 0]
    levels = np.empty(work.shape)
    errors = np.empty(work.shape)
    columns = work.shape[1]
    for start in range(0, columns, BLOCK):
        end = min(start + BLOCK, columns)
        for j in range(start, end):
            levels[:, j] = np.rint(work[:, j] / wide)
            if capped is not None:
                levels[:, j] = np.clip(levels[:, j], -capped, capped)
            lost = work[:, j] - levels[:, j] * wide
            if capped is not None:
                lost = np.clip(lost, -wide / 2, wide / 2)
            errors[:, j] = lost / factor[j, j]
            work[:, j + 1 : end] -= errors[:, j : j + 1] * factor[j, j + 1 : end]
        work[:, end:] -= errors[:, start:end] @ factor[start:end, end:]
    return levels, (errors**2).sum(axis=1)


def corrected_target(
    matrices: np.ndarray, quantized: Moments, cross: Moments, *, dampening: float = DAMPENING
) -> np.ndarray:
    """The weights that make up best for what earlier layers' rounding did to the input.

        argmin_V E|W x - V x'|²  =  W C H'⁻¹,   C = E[x x'ᵀ],  H' = E[x' x'ᵀ]

    x is the float network's input and x' the rounded one's [GPTAQ, Li et al. 2025, arXiv
    2504.02692, in closed form]. Dampening shrinks the correction W (C - H') H'⁻¹, not the weights.

    Args:
        matrices: W, float32 [groups, rows, columns].
        quantized: H', moments of the rounded network's input.
        cross: C, in the same blocks.
        dampening: added to the diagonal of H', as a share of its mean.

    Returns:
        float64 [groups, rows, columns], what is rounded in place of the weights.
    """
    target = matrices.astype(np.float64)
    blocks = zip(quantized.blocks, quantized.shrunk().blocks, cross.blocks, strict=True)
    for start, (block, sure, mixed) in zip(quantized.starts, blocks, strict=True):
        part = slice(start, start + block.shape[-1])
        for group in range(len(matrices)):
            of = group if len(block) > 1 else 0
            size = block.shape[-1]
            mean = float(np.trace(block[of])) / size
            if not mean > 0.0:
                continue
            dampened = sure[of] + dampening * mean * np.eye(size)
            difference = mixed[of] - block[of]
            change = np.linalg.solve(dampened, difference.T).T
            target[group][:, part] += matrices[group][:, part].astype(np.float64) @ change
    return target
