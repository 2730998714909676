"""The cells whose recurrence is linear and diagonal or fixed, transcribed to NumPy: each yields the
states and the outputs, step by step."""

import numpy as np


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def silu(x):
    return x * sigmoid(x)


def softplus(x):
    return np.log1p(np.exp(x))


def zero_order_hold(p):
    eigenvalues, step = -np.exp(p.nu) + 1j * p.omega, np.exp(p.log_step)
    kept = np.exp(eigenvalues * step)
    return kept, (kept - 1) / eigenvalues


def numpy_s5(p, xs):
    B, C = (w[0] + 1j * w[1] for w in (p.weight_x, p.weight_o))
    kept, gain = zero_order_hold(p)
    D = np.diag(p.skip) if p.skip.ndim == 1 else p.skip
    h = np.zeros(p.hidden_size, complex)
    for x in xs:
        h = kept * h + (np.diag(gain) @ B) @ x
        yield h, 2 * (C @ h).real + D @ x


def numpy_s4d(p, xs):
    C = p.weight_o[0] + 1j * p.weight_o[1]
    kept, gain = zero_order_hold(p)
    h = np.zeros((p.input_size, p.state_size), complex)
    for x in xs:
        h = kept * h + gain * x[:, None]
        yield h, np.array([2 * (C[c] @ h[c]).real + p.skip[c] * x[c] for c in range(len(x))])


def numpy_rglru(p, xs):
    _, num_heads, size, _ = p.weight_x.shape
    W_r, W_i = np.zeros((2, p.input_size, p.input_size))
    for n in range(num_heads):
        block = slice(n * size, (n + 1) * size)
        W_r[block, block], W_i[block, block] = p.weight_x[:, n]
    h = np.zeros(p.input_size)
    for t, x in enumerate(xs):
        r, i = sigmoid(W_r @ x + p.bias[0]), sigmoid(W_i @ x + p.bias[1])
        a = np.exp(-8 * softplus(p.decay) * r)
        gain = np.sqrt(1 - a**2) if t > 0 or p.normalise_first else 1
        h = a * h + gain * (i * x)
        yield h, h


def numpy_min_gru(p, xs):
    h = np.zeros(p.hidden_size)
    for x in xs:
        u_z, candidate = np.split(p.weight_x @ x + p.bias, 2)
        z = sigmoid(u_z)
        h = (1 - z) * h + z * candidate
        yield h, h


def numpy_min_lstm(p, xs):
    h = np.zeros(p.hidden_size)
    for x in xs:
        u_f, u_i, candidate = np.split(p.weight_x @ x + p.bias, 3)
        f, i = sigmoid(u_f), sigmoid(u_i)
        h = f / (f + i) * h + i / (f + i) * candidate
        yield h, h


def numpy_selective_ssm(p, xs):
    A = -np.exp(p.a_log)
    h = np.zeros((p.input_size, p.state_size))
    for t, x in enumerate(xs):
        if p.conv_width:
            seen = range(max(0, t - p.conv_width + 1), t + 1)
            x = silu(
                p.bias_conv + sum(p.weight_conv[p.conv_width - 1 - t + j] * xs[j] for j in seen)
            )
        delta = softplus(p.weight_dt @ (p.weight_rank @ x) + p.bias_dt)
        B, C = p.weight_b @ x, p.weight_c @ x
        for c in range(p.input_size):
            h = h.copy()
            h[c] = np.exp(delta[c] * A[c]) * h[c] + delta[c] * B * x[c]
        yield h, h @ C + p.skip * x


def numpy_plstm(p, xs):
    """The states are the memories before the steps, which the outputs read."""
    N, K, V = p.num_heads, p.key_size, p.value_size
    C = np.zeros((N, K, V))
    for x in xs:
        q, k = ((w @ x).reshape(N, K) for w in (p.weight_q, p.weight_k))
        v = (p.weight_v @ x).reshape(N, V)
        S, T, M, D = (sigmoid(w @ x + b) for w, b in zip(p.weight_gates, p.bias_gates, strict=True))
        outer = [np.outer(k[n], v[n]) for n in range(N)]
        y = [q[n] / np.sqrt(K) @ (M[n] * C[n] + D[n] * outer[n]) for n in range(N)]
        yield C, p.weight_o @ np.concatenate(y)
        C = np.stack([T[n] * C[n] + S[n] * outer[n] for n in range(N)])


def legendre_memory(order, theta):
    """Discretised by the eigenvalues of the continuous system."""
    A, B = np.zeros((order, order)), np.zeros(order)
    for i in range(order):
        B[i] = (2 * i + 1) * (-1) ** i / theta
        for j in range(order):
            A[i, j] = (2 * i + 1) / theta * (-1 if i < j else (-1.0) ** (i - j + 1))
    eigenvalues, vectors = np.linalg.eig(A)
    A_bar = (vectors @ np.diag(np.exp(eigenvalues)) @ np.linalg.inv(vectors)).real
    return A_bar, np.linalg.inv(A) @ (A_bar - np.eye(order)) @ B


def numpy_linear_lmu(p, xs):
    A, B = legendre_memory(p.order, p.theta)
    m = np.zeros((p.memory_size, p.order))
    for x in xs:
        u = p.weight_u @ x
        m = np.stack([A @ m[c] + B * u[c] for c in range(p.memory_size)])
        yield m, np.tanh(p.weight_m @ np.concatenate(list(m)) + p.weight_x @ x + p.bias)


def numpy_lmu(p, xs):
    A, B = legendre_memory(p.order, p.theta)
    h, m = np.zeros(p.hidden_size), np.zeros(p.order)
    for x in xs:
        u = p.encoder_x @ x + p.encoder_h @ h + p.encoder_m @ m
        m = A @ m + B * u
        h = np.tanh(p.weight_x @ x + p.weight_h @ h + p.weight_m @ m)
        yield (h, m), h
