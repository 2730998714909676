"""The cells made of delta rules, and attention as a recurrence, transcribed to NumPy: each yields
the states and the outputs, step by step."""

import numpy as np
from linear_cells import sigmoid, softplus


def units(maps, x):
    """The vectors of all heads, divided by their norms."""
    a = maps @ x
    return a / np.sqrt(np.sum(a**2, 1, keepdims=True) + 1e-6)


def corrected(S, k, v, beta):
    """Erased and written once, each head by a matrix."""
    erase = [np.eye(len(k[n])) - beta[n] * np.outer(k[n], k[n]) for n in range(len(S))]
    return [erase[n] @ S[n] + beta[n] * np.outer(k[n], v[n]) for n in range(len(S))]


def numpy_delta_net(p, xs):
    """Of any number of corrections per step."""
    N, K, V = p.num_heads, p.key_size, p.value_size
    count = getattr(p, "num_factors", 1)
    maps_k = p.weight_k.reshape(count, N, K, -1)
    maps_v = p.weight_v.reshape(count, N, V, -1)
    maps_beta = p.weight_beta.reshape(count, N, -1)
    S = np.zeros((N, K, V))
    for x in xs:
        if p.weight_alpha is not None:
            alpha = np.exp(-np.exp(p.a_log) * softplus(p.weight_alpha @ x + p.bias_alpha))
            S = [alpha[n] * S[n] for n in range(N)]
        for j in range(count):
            beta = (2 if p.negative_eigenvalues else 1) * sigmoid(maps_beta[j] @ x)
            S = corrected(S, units(maps_k[j], x), maps_v[j] @ x, beta)
        q = units(p.weight_q.reshape(N, K, -1), x) / np.sqrt(K)
        yield np.stack(S), p.weight_o @ np.concatenate([S[n].T @ q[n] for n in range(N)])


def numpy_ttt(p, xs):
    """By the gradient of the inner loss, from the learned start."""
    N, K, V = p.num_heads, p.key_size, p.value_size
    W = p.weight_start
    for x in xs:
        q, k = (units(w.reshape(N, K, -1), x) for w in (p.weight_q, p.weight_k))
        v = (p.weight_v @ x).reshape(N, V)
        rate = p.max_rate * sigmoid(p.weight_rate @ x + p.bias_rate)
        gradient = [np.outer(k[n], k[n] @ W[n] - v[n]) for n in range(N)]
        W = np.stack([W[n] - rate[n] * gradient[n] for n in range(N)])
        y = np.concatenate([q[n] @ W[n] for n in range(N)])
        yield W - p.weight_start, p.weight_o @ y


def numpy_aaren(p, xs):
    """By softmax over all inputs so far."""
    N, K, V = p.num_heads, p.key_size, p.value_size
    keys = (xs @ p.weight_k.T).reshape(-1, N, K)
    values = (xs @ p.weight_v.T).reshape(-1, N, V)
    scores = np.einsum("nk,lnk->ln", p.query, keys) / np.sqrt(K)
    for t in range(len(xs)):
        s, v = scores[: t + 1], values[: t + 1]
        m = s.max(0)
        u, w = np.exp(s - m).sum(0), np.einsum("tn,tnv->nv", np.exp(s - m), v)
        probabilities = np.exp(s) / np.exp(s).sum(0)
        y = np.einsum("tn,tnv->nv", probabilities, v)
        yield (m, u, w), p.weight_o @ y.ravel()
