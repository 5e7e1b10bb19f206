"""Layer-wise relevance propagation by hand: loops over every connection of dense layers, in
float64.

A convolution is such a layer once its connections are listed: see `conv_connections`. Biases take
their share of z.
"""

from __future__ import annotations

import numpy as np

EPSILON = 1e-6


def stabilised(z):
    return z + EPSILON if z >= 0 else z - EPSILON


def weight_relevance(x, connections, bias, z, R_z, weights):
    """r_w = Σ w·x·R_z / (z + ε sign z) over the connections (input i, output j, weight index w)."""
    r = np.zeros(len(weights))
    for i, j, w in connections:
        r[w] += weights[w] * x[i] * R_z[j] / stabilised(z[j])
    return r


def forward(x, connections, bias, weights):
    z = np.array(bias, dtype=np.float64)
    for i, j, w in connections:
        z[j] += x[i] * weights[w]
    return z


def epsilon_rule(x, connections, bias, weights, R_z):
    z = forward(x, connections, bias, weights)
    R_x = np.zeros(len(x))
    for i, j, w in connections:
        R_x[i] += x[i] * weights[w] * R_z[j] / stabilised(z[j])
    return R_x


def z_plus_rule(x, connections, bias, weights, R_z):
    """Only contributions that are positive count, x·w > 0, and positive biases."""
    z = np.maximum(np.array(bias, dtype=np.float64), 0)
    for i, j, w in connections:
        z[j] += max(x[i] * weights[w], 0.0)
    R_x = np.zeros(len(x))
    for i, j, w in connections:
        R_x[i] += max(x[i] * weights[w], 0.0) * R_z[j] / stabilised(z[j])
    return R_x


def dense_connections(inputs, outputs):
    """Weight [out, in], flattened."""
    return [(i, j, j * inputs + i) for j in range(outputs) for i in range(inputs)]


def conv_connections(channels_in, channels_out, length, kernel, stride):
    """A 1-d convolution without padding: input [channels_in, length] and weight [out, in, kernel],
    both flattened."""
    positions = (length - kernel) // stride + 1
    return [
        (c * length + p * stride + k, o * positions + p, (o * channels_in + c) * kernel + k)
        for o in range(channels_out)
        for p in range(positions)
        for c in range(channels_in)
        for k in range(kernel)
    ], positions
