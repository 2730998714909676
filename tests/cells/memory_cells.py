"""The formulas of memories that learn at test time, transcribed to NumPy: each yields the states
and the outputs, step by step."""

import numpy as np
from linear_cells import sigmoid, silu


def unit(x):
    return x / np.sqrt(np.sum(x**2) + 1e-6)


def gradient(W_1, W_2, k, v):
    """Of half the squared error, by the chain rule."""
    z = W_1 @ k
    error = W_2 @ silu(z) - v
    slope = sigmoid(z) + z * sigmoid(z) * (1 - sigmoid(z))
    return np.outer(W_2.T @ error * slope, k), np.outer(error, silu(z))


def numpy_titans(p, xs):
    for theta, S, _, _, y in learn(p, xs, 1):
        yield (theta, S), y


def numpy_titans_chunked(p, xs):
    for theta, S, start, count, y in learn(p.titans, xs, p.chunk_length):
        yield (theta, S, start, float(count)), y


def learn(p, xs, chunk_length):
    theta, S = p.memory, tuple(np.zeros_like(W) for W in p.memory)
    for t, x in enumerate(xs):
        if t % chunk_length == 0:
            start = theta
        q, k, v = unit(p.weight_q @ x), unit(p.weight_k @ x), p.weight_v @ x
        eta, rate, alpha = sigmoid(p.weight_gates @ x + p.bias_gates)
        g = gradient(*start, k, v)
        S = tuple(eta * S[i] - p.max_rate * rate * g[i] for i in (0, 1))
        theta = tuple((1 - alpha) * theta[i] + S[i] for i in (0, 1))
        y = p.weight_o @ (theta[1] @ silu(theta[0] @ q))
        yield theta, S, start, (t + 1) % chunk_length, y
