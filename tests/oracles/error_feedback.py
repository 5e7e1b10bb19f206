"""Slow second opinions on rounding and allocation, straight from their definitions."""

import itertools

import numpy as np


def best_levels(row, step, hessian, reach=2):
    """The levels with the least (w - qΔ) H (w - qΔ)ᵀ, by trying all within `reach` of the
    nearest."""
    nearest = np.rint(row / step).astype(int)
    choices = [range(level - reach, level + reach + 1) for level in nearest]
    best, least = None, np.inf
    for levels in itertools.product(*choices):
        error = row - step * np.array(levels)
        loss = float(error @ hessian @ error)
        if loss < least:
            best, least = np.array(levels), loss
    return best, least


def feed_errors_one_by_one(row, step, hessian):
    """GPTQ as its derivation has it: after each column the inverse of H for the open ones anew.

    [Frantar et al. 2023, equations 2 and 3; Hassibi and Stork 1993]
    """
    w = row.astype(float).copy()
    levels = np.zeros(len(w), int)
    for j in range(len(w)):
        inverse = np.linalg.inv(hessian[j:, j:])
        levels[j] = int(np.rint(w[j] / step))
        error = w[j] - levels[j] * step
        w[j:] -= error / inverse[0, 0] * inverse[0]
    return levels


def layer_error(weights, rounded, inputs):
    """Mean over inputs of |W x - W' x|²."""
    difference = (weights - rounded) @ inputs.T
    return float((difference**2).sum(axis=0).mean())


def best_allocation(rates, errors, budget):
    """The choice of one rung for each weight with least total error within `budget` bits."""
    best, least = None, np.inf
    for choice in itertools.product(*(range(len(rate)) for rate in rates)):
        bits = sum(rate[index] for rate, index in zip(rates, choice, strict=True))
        error = sum(e[index] for e, index in zip(errors, choice, strict=True))
        if bits <= budget and error < least:
            best, least = choice, error
    return best, least


def windows_by_hand(image, kernel, strides, pads, dilations):
    """[places, channels · kernel] of one image [C, H, W], with loops."""
    top, left, bottom, right = pads
    padded = np.pad(image, ((0, 0), (top, bottom), (left, right)))
    height = (padded.shape[1] - (kernel[0] - 1) * dilations[0] - 1) // strides[0] + 1
    width = (padded.shape[2] - (kernel[1] - 1) * dilations[1] - 1) // strides[1] + 1
    found = []
    for row in range(height):
        for column in range(width):
            vector = []
            for channel in range(image.shape[0]):
                for y in range(kernel[0]):
                    for x in range(kernel[1]):
                        at = (
                            row * strides[0] + y * dilations[0],
                            column * strides[1] + x * dilations[1],
                        )
                        vector.append(padded[channel, at[0], at[1]])
            found.append(vector)
    return np.array(found)
