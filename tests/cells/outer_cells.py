"""The cells of decayed outer products, transcribed to NumPy: each yields the states and the
outputs, step by step."""

import numpy as np
from linear_cells import sigmoid, silu, softplus


def _maps(p, x):
    N = p.num_heads
    return ((w @ x).reshape(N, -1) for w in (p.weight_q, p.weight_k, p.weight_v))


def _layer_norm(y, eps=1e-5):
    """Of each head."""
    y = y - y.mean(1, keepdims=True)
    return y / np.sqrt((y**2).mean(1, keepdims=True) + eps)


def numpy_gla(p, xs):
    N, K, V = p.num_heads, p.key_size, p.value_size
    S = np.zeros((N, K, V))
    for x in xs:
        q, k, v = _maps(p, x)
        alpha = sigmoid(p.weight_alpha @ p.weight_rank @ x + p.bias_alpha) ** (1 / 16)
        alpha = alpha.reshape(N, K)
        S = np.stack([np.diag(alpha[n]) @ S[n] + np.outer(k[n], v[n]) for n in range(N)])
        y = np.stack([q[n] / np.sqrt(K) @ S[n] for n in range(N)])
        y = y / np.sqrt(np.mean(y**2, axis=1, keepdims=True) + p.norm_eps) * p.weight_norm
        yield S, p.weight_o @ (y.ravel() * silu(p.weight_g @ x))


def numpy_retention(p, xs):
    """As attention over all steps so far, complex keys and queries turned by their positions."""
    N, d = p.num_heads, p.key_size // 2
    angles = 1 / 10000 ** (np.arange(d) / d)
    gamma = 1 - 2.0 ** (-5 - np.arange(N))
    written = []
    for t, x in enumerate(xs):
        q, k, v = _maps(p, x)
        q, k = (a[:, :d] + 1j * a[:, d:] for a in (q, k))
        written.append((k * np.exp(1j * angles * t), v))
        turn = np.exp(1j * angles * t)
        turned, y, S = q * turn, 0, 0
        for s, (k_s, v_s) in enumerate(written):
            kept = gamma ** (t - s)
            weights = kept * (turned * k_s.conj()).sum(1).real / np.sqrt(2 * d)
            y = y + weights[:, None] * v_s
            S = S + kept[:, None, None] * (k_s / turn)[:, :, None] * v_s[:, None, :]
        y = _layer_norm(y, p.norm_eps) * p.weight_norm
        yield np.concatenate([S.real, S.imag], 1), p.weight_o @ (y.ravel() * silu(p.weight_g @ x))


def numpy_mamba2(p, xs):
    H, P, N = p.num_heads, p.head_size, p.state_size
    maps = np.concatenate([xs @ p.weight_c.T, xs @ p.weight_b.T, xs @ p.weight_s.T], axis=1)
    S = np.zeros((H, N, P))
    for t, x in enumerate(xs):
        channels = maps[t]
        if p.conv_width:
            seen = range(max(0, t - p.conv_width + 1), t + 1)
            channels = sum(p.weight_conv[p.conv_width - 1 - t + j] * maps[j] for j in seen)
            channels = silu(channels + p.bias_conv)
        C, B, s = channels[:N], channels[N : 2 * N], channels[2 * N :].reshape(H, P)
        delta = softplus(p.weight_dt @ x + p.bias_dt)
        a = np.exp(-delta * np.exp(p.a_log))
        S = np.stack([a[h] * S[h] + np.outer(B, delta[h] * s[h]) for h in range(H)])
        y = np.concatenate([C @ S[h] + p.skip[h] * s[h] for h in range(H)])
        y = y * silu(p.weight_g @ x)
        yield S, p.weight_o @ (y / np.sqrt(np.mean(y**2) + p.norm.eps) * p.norm.weight)


def numpy_based(p, xs):
    """The outputs as attention over all steps so far, without features."""
    N, K, V = p.num_heads, p.key_size, p.value_size
    S, written = np.zeros((N, 1 + K + K * K, V + 1)), []
    for x in xs:
        q, k, v = _maps(p, x)
        q, k = q / K**0.25, k / K**0.25
        written.append((k, v))
        y = []
        for n in range(N):
            products = np.array([q[n] @ k_s[n] for k_s, _ in written])
            weights = 1 + products + products**2 / 2
            y.append(weights @ np.stack([v_s[n] for _, v_s in written]) / weights.sum())
            phi = np.concatenate([[1], k[n], np.outer(k[n], k[n]).ravel() / np.sqrt(2)])
            S[n] += np.outer(phi, np.append(v[n], 1))
        yield S.copy(), p.weight_o @ np.concatenate(y)


def numpy_mlstm(p, xs):
    """The stabilised form of the paper, with the first step's maximum over one argument. The sum of
    all weights stands beside the normaliser."""
    N, K, V = p.num_heads, p.key_size, p.value_size
    C, n, total, m = np.zeros((N, V, K)), np.zeros((N, K)), np.zeros(N), np.full(N, -np.inf)
    for x in xs:
        q, k, v = _maps(p, x)
        k = k / np.sqrt(K)
        raw = p.weight_i @ x + p.bias_i
        kept = m - np.logaddexp(0, -(p.weight_f @ x + p.bias_f))
        m = np.maximum(kept, raw)
        f, i = np.exp(kept - m), np.exp(raw - m)
        C = np.stack([f[h] * C[h] + i[h] * np.outer(v[h], k[h]) for h in range(N)])
        n, total = f[:, None] * n + i[:, None] * k, f * total + i
        least = np.exp(-m)
        y = np.stack([C[h] @ q[h] / max(abs(n[h] @ q[h]), least[h]) for h in range(N)])
        y = (_layer_norm(y) * p.weight_norm).ravel()
        memory = np.concatenate([C.transpose(0, 2, 1), n[:, :, None]], 2) / total[:, None, None]
        yield (memory, np.log(total) + m), p.weight_o @ (sigmoid(p.weight_g @ x + p.bias_g) * y)
