"""Cells against the numbers of code that others published; `tests/published/README.md` tells whose.

A case makes a cell of arrays with the names of the source, in a way that is differentiable, so that
gradients are compared under these names, too."""

import pathlib

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import pytest

import pararnn as prnn
from pararnn.cells._chunks_decayed import query_states

FOLDER = pathlib.Path(__file__).parents[1] / "published"
KEY = jax.random.key(0)
# So large that what is added to squares, lest a norm is 0, is below rounding.
LARGE = 1e4


def load(name):
    with np.load(FOLDER / f"{name}.npz") as arrays:
        return {key: jnp.asarray(array) for key, array in arrays.items()}


def filled(make, **parameters):
    """A cell with these parameters, which must be all that it has."""
    cell = eqx.filter_eval_shape(make)
    leaves = {jtu.keystr(path)[1:]: x for path, x in jtu.tree_leaves_with_path(cell)}
    leaves = {k: x for k, x in leaves.items() if isinstance(x, jax.ShapeDtypeStruct)}
    shapes = {name: (x.shape, x.dtype) for name, x in leaves.items()}
    assert shapes == {k.replace("__", "."): (x.shape, x.dtype) for k, x in parameters.items()}
    given = {k.replace("__", "."): x for k, x in parameters.items()}
    return jtu.tree_map_with_path(lambda path, x: given.get(jtu.keystr(path)[1:], x), cell)


def call(cell, xs, state=None):
    return prnn.RNN(cell)(xs, state, throw=False)


def joined(*parts):
    """Inputs that hold these parts, and the matrices that select them."""
    xs = jnp.concatenate(parts, axis=1)
    ends = np.cumsum([0, *(part.shape[1] for part in parts)])
    eye = jnp.eye(xs.shape[1])
    return xs, [eye[a:b] for a, b in zip(ends, ends[1:], strict=False)]


def rows(x, time=0):
    """All that is not time in one axis."""
    x = jnp.moveaxis(x, time, 0)
    return x.reshape(len(x), -1)


def logit(p):
    return jnp.log(p) - jnp.log1p(-p)


def raw_rate(log_decay):
    """From which softplus makes the rate of the decay."""
    return -log_decay + jnp.log(-jnp.expm1(log_decay))


def silu_of_one(y):
    return y / (1 + np.exp(-1))


def normed(y, eps, centred):
    y = y - jnp.mean(y, axis=-1, keepdims=True) if centred else y
    return y / jnp.sqrt(jnp.mean(y**2, axis=-1, keepdims=True) + eps)


def read_states(cell, xs):
    """The states, read by the queries step by step, before any norm."""
    us = cell.project(xs)
    _, states = jax.lax.scan(lambda h, u: (cell.step(h, u),) * 2, cell.init_state(), us)
    return query_states(us.query, states)


# --- linear attention -------------------------------------------------------------------------


def retention(p):
    ones = jnp.ones((p["q"].shape[1], 1))
    xs, (q, k, v, one) = joined(*(rows(p[name], 1) for name in "qkv"), ones)
    cell = filled(
        lambda: prnn.Retention(len(xs[0]), 3, 4, 5, 15, key=KEY),
        **{"weight_q": q, "weight_k": k, "weight_v": v, "weight_o": jnp.eye(15)},
        weight_g=jnp.tile(one, (15, 1)),
        weight_norm=jnp.ones((3, 5)),
    )
    y = read_states(cell, xs)
    expected = rows(silu_of_one(normed(y, 1e-5, centred=True)))
    return jnp.moveaxis(y, 0, 1)[:, -24:], (call(cell, xs)[0], expected)


def gla(p):
    ones = jnp.ones((len(p["q"]), 1))
    raw = 16 * p["log_alpha"] - jnp.log(-jnp.expm1(16 * p["log_alpha"]))
    parts = (rows(x) for x in (p["q"], p["k"], p["v"], raw))
    xs, (q, k, v, gate, one) = joined(*parts, ones)
    cell = filled(
        lambda: prnn.GatedLinearAttention(len(xs[0]), 3, 4, 5, 15, gate_rank=12, key=KEY),
        **{"weight_q": q, "weight_k": k, "weight_v": v, "weight_o": jnp.eye(15)},
        **{"weight_rank": gate, "weight_alpha": jnp.eye(12), "bias_alpha": jnp.zeros(12)},
        weight_g=jnp.tile(one, (15, 1)),
        weight_norm=jnp.ones((3, 5)),
    )
    y = read_states(cell, xs)
    expected = rows(silu_of_one(normed(y, 1e-5, centred=False)))
    return y[-24:], (call(cell, xs)[0], expected)


def based(p):
    xs, (q, k, v) = joined(*(rows(p[name], 1) for name in "qkv"))
    cell = filled(
        lambda: prnn.Based(len(xs[0]), 3, 4, 5, 15, key=KEY),
        **{"weight_q": q, "weight_k": k, "weight_v": v, "weight_o": jnp.eye(15)},
    )
    return call(cell, xs)[0], rows(p["y"], 1)


def delta(p, gated):
    parts = [*(rows(p[name]) for name in "qkv"), logit(p["beta"])]
    parts += [raw_rate(p["log_alpha"])] if gated else []
    xs, (q, k, v, beta, *alpha) = joined(*parts)
    decay = {"a_log": jnp.zeros(3), "bias_alpha": jnp.zeros(3)}
    return xs, filled(
        lambda: prnn.DeltaNet(len(xs[0]), 3, 4, 5, 15, gated=gated, key=KEY),
        **{"weight_q": LARGE * q, "weight_k": LARGE * k, "weight_v": v, "weight_beta": beta},
        **(decay | {"weight_alpha": alpha[0]} if gated else {}),
        weight_o=jnp.eye(15),
    )


def delta_rule(p):
    xs, cell = delta(p, gated=False)
    return call(cell, xs, p["start"])[0], rows(p["y_from_start"])


def gated_delta_rule(p):
    xs, cell = delta(p, gated=True)
    got = call(cell, xs)[0], call(cell, xs, p["start"])[0]
    return got, (rows(p["y"]), rows(p["y_from_start"]))


def gated_delta_product(p):
    k, v, beta = (x.reshape(len(x) // 2, 2, -1) for x in (p["k"], p["v"], p["beta"]))
    pairs = [x[:, j] for x in (k, v, logit(beta / 2)) for j in range(2)]
    xs, (q, k1, k2, v1, v2, b1, b2, alpha) = joined(rows(p["q"]), *pairs, raw_rate(p["log_alpha"]))
    cell = filled(
        lambda: prnn.DeltaProduct(len(xs[0]), 3, 4, 5, 15, key=KEY),
        **{"weight_q": LARGE * q, "weight_k": LARGE * jnp.stack([k1, k2])},
        **{"weight_v": jnp.stack([v1, v2]), "weight_beta": jnp.stack([b1, b2])},
        **{"weight_alpha": alpha, "a_log": jnp.zeros(3), "bias_alpha": jnp.zeros(3)},
        weight_o=jnp.eye(15),
    )
    # The source was run with a scale of 1 on the queries.
    return 2 * call(cell, xs)[0], rows(p["y"])


def gated_deltanet_layer(p, eps=1e-5):
    heads, key_size, value_size = 2, 4, 8
    qkvz = p["p_in_proj_qkvz.weight"].reshape(heads, -1, 6)
    q, k, v, z = jnp.split(qkvz, np.cumsum([key_size, key_size, value_size]), axis=1)
    flat = lambda x: x.reshape(-1, 6)  # noqa: E731
    ba = p["p_in_proj_ba.weight"].reshape(heads, 2, 6)
    cell = filled(
        lambda: prnn.DeltaNet(
            6, heads, key_size, value_size, conv_width=4, output_gate=True, norm_eps=eps, key=KEY
        ),
        **{"weight_q": flat(q), "weight_k": flat(k), "weight_v": flat(v), "weight_g": flat(z)},
        **{"weight_beta": ba[:, 0], "weight_alpha": ba[:, 1], "a_log": p["p_A_log"]},
        **{"bias_alpha": p["p_dt_bias"], "weight_o": p["p_out_proj.weight"]},
        weight_conv=p["p_conv1d.weight"][:, 0].T,
        weight_norm=jnp.tile(p["p_norm.weight"], (heads, 1)),
    )
    return call(cell, p["x"])[0]


# --- state-space models -----------------------------------------------------------------------


def mamba_block(p):
    m = {name.removeprefix("p_mixer."): x for name, x in p.items()}
    inputs, gate = jnp.split(m["in_proj.weight"], 2)
    rank, b, c = jnp.split(m["x_proj.weight"], [2, 6])
    cell = filled(
        lambda: prnn.SelectiveSSM(10, 4, dt_rank=2, key=KEY),
        **{"weight_conv": m["conv1d.weight"][:, 0].T, "bias_conv": m["conv1d.bias"]},
        **{"weight_rank": rank, "weight_b": b, "weight_c": c, "weight_dt": m["dt_proj.weight"]},
        **{"bias_dt": m["dt_proj.bias"], "a_log": m["A_log"], "skip": m["D"]},
    )
    block = prnn.GatedBlock(5, 10, prnn.RNN(cell), key=KEY)
    where = lambda b: [b.norm.weight, b.inputs.weight, b.gate.weight, b.output.weight]  # noqa: E731
    weights = [p["p_norm.weight"], inputs, gate, m["out_proj.weight"]]
    return eqx.tree_at(where, block, weights)(p["x"], throw=False)[0]


def mamba2_layer(p):
    features, state_size = 12, 5
    ends = np.cumsum([features, features, state_size, state_size])
    z, s, b, c, dt = jnp.split(p["p_in_proj.weight"], ends)
    # There: the inputs, B, C; here C, B, the inputs.
    order = np.r_[17:22, 12:17, 0:12]
    cell = filled(
        lambda: prnn.Mamba2(6, 3, 4, state_size, key=KEY),
        **{"weight_c": c, "weight_b": b, "weight_s": s, "weight_dt": dt, "weight_g": z},
        **{"weight_conv": p["p_conv1d.weight"][:, 0].T[:, order], "skip": p["p_D"]},
        **{"bias_conv": p["p_conv1d.bias"][order], "weight_o": p["p_out_proj.weight"]},
        **{"a_log": p["p_A_log"], "bias_dt": p["p_dt_bias"], "norm__weight": p["p_norm.weight"]},
    )
    return call(cell, p["x"])[0]


def selective_scan(p):
    xs, (_, b, c, dt) = joined(p["u"].T, p["B"].T, p["C"].T, p["dt"].T)
    size = len(xs[0])
    # All inputs have channels; those of `u` are the first, and the others are of no interest.
    more = lambda x: jnp.concatenate([x, jnp.zeros((size - 6, *x.shape[1:]))])  # noqa: E731
    cell = filled(
        lambda: prnn.SelectiveSSM(size, 4, dt_rank=size, conv_width=0, key=KEY),
        **{"weight_b": b, "weight_c": c, "weight_rank": jnp.eye(size), "weight_dt": more(dt)},
        **{"bias_dt": more(p["bias"]), "a_log": more(jnp.log(-p["A"])), "skip": more(p["D"])},
        **{"weight_conv": jnp.zeros((0, size)), "bias_conv": jnp.zeros(size)},
    )
    return call(cell, xs)[0][:, :6], p["y"].T


def ssd(p):
    dt = p["dt"] + jnp.log(-jnp.expm1(-p["dt"]))
    xs, (c, b, s, dt) = joined(p["C"], p["B"], rows(p["X"]), dt)
    size = len(xs[0])
    cell = filled(
        lambda: prnn.Mamba2(size, 2, 3, 4, 6, conv_width=0, key=KEY),
        **{"weight_c": c, "weight_b": b, "weight_s": s, "weight_dt": dt},
        **{"weight_g": jnp.zeros((6, size)), "weight_o": jnp.eye(6), "skip": jnp.zeros(2)},
        **{"weight_conv": jnp.zeros((0, 14)), "bias_conv": jnp.zeros(14)},
        **{"a_log": jnp.log(-p["A"]), "bias_dt": jnp.zeros(2), "norm__weight": jnp.ones(6)},
    )
    us = cell.project(xs)
    _, states = jax.lax.scan(lambda h, u: (cell.step(h, u),) * 2, cell.init_state(), us)
    return query_states(us.query, states), p["y"]


def s5(p):
    complex_parts = lambda x: jnp.moveaxis(x, -1, 0)  # noqa: E731
    cell = filled(
        lambda: prnn.S5(4, 4, key=KEY),
        **{"weight_x": complex_parts(p["p_B"]), "weight_o": complex_parts(p["p_C"])},
        **{"nu": jnp.log(-p["p_Lambda_re"]), "omega": p["p_Lambda_im"], "skip": p["p_D"]},
        log_step=p["p_log_step"][:, 0],
    )
    return call(cell, p["xs"])[0]


def s4d(p):
    cell = filled(
        lambda: prnn.S4D(5, 4, key=KEY),
        **{"weight_o": jnp.moveaxis(p["p_kernel.C"], -1, 0), "nu": p["p_kernel.log_A_real"]},
        **{"omega": p["p_kernel.A_imag"], "log_step": p["p_kernel.log_dt"][:, None]},
        skip=p["p_D"],
    )
    return call(cell, p["u"].T)[0].T


# --- gated units ------------------------------------------------------------------------------


def rglru(p, going_on=False):
    gates = ("p_a_gate", "p_input_gate")
    cell = filled(
        lambda: prnn.RGLRU(6, num_heads=3, key=KEY),
        weight_x=jnp.stack([jnp.swapaxes(p[f"{gate}_w"], 1, 2) for gate in gates]),
        bias=jnp.stack([p[f"{gate}_b"].ravel() for gate in gates]),
        decay=p["p_a_param"],
    )
    state = (cell.init_state(), jnp.asarray(True)) if going_on else None
    return call(cell, p["xs"], state)[0]


def plstm(p):
    parts = (rows(p[name], 1) for name in "QKV")
    xs, (q, k, v, gates) = joined(*parts, rows(p["raw"], 2))
    cell = filled(
        lambda: prnn.PLSTM(len(xs[0]), 2, 4, 3, 6, key=KEY),
        **{"weight_q": q, "weight_k": k, "weight_v": v, "weight_o": jnp.eye(6)},
        weight_gates=gates.reshape(4, 2, -1),
        bias_gates=jnp.zeros((4, 2)),
    )
    return call(cell, xs)[0], rows(p["y"], 1)


# --- comparisons ------------------------------------------------------------------------------


def close(got, expected, tol):
    """Each array at its own scale."""
    for a, b in zip(jtu.tree_leaves(got), jtu.tree_leaves(expected), strict=True):
        assert a.shape == b.shape
        np.testing.assert_allclose(a, b, rtol=0, atol=tol * np.max(np.abs(b)))


VALUES = {
    "based": based,
    "delta_rule": delta_rule,
    "gated_delta_rule": gated_delta_rule,
    "gated_delta_product": gated_delta_product,
    "selective_scan": selective_scan,
    "ssd": ssd,
    "plstm": plstm,
    "gated_deltanet_layer_1e-6": lambda p: (gated_deltanet_layer(p, 1e-6), p["y"]),
}


@pytest.mark.parametrize("name", VALUES)
def test_values(name):
    got, expected = jax.jit(VALUES[name])(load(name))
    close(got, expected, 1e-13)


# The case; what its inputs are called; and how far numbers may be apart.
GRADIENTS = {
    "retention": (retention, ("q", "k", "v"), 1e-13),
    "gla": (gla, ("q", "k", "v", "log_alpha"), 1e-13),
    "gated_deltanet_layer_1e-5": (gated_deltanet_layer, ("x",), 1e-13),
    "mamba_block": (mamba_block, ("x",), 1e-13),
    "mamba2_layer": (mamba2_layer, ("x",), 1e-13),
    "s5": (s5, ("xs",), 1e-12),
    "s4d": (s4d, ("u",), 1e-13),
    # The source computes in float32.
    "rglru_from_start": (rglru, ("xs",), 3e-7),
    "rglru_going_on": (lambda p: rglru(p, going_on=True), ("xs",), 3e-7),
}


@pytest.mark.parametrize("name", GRADIENTS)
def test_values_and_gradients(name):
    """With respect to inputs and all parameters; where outputs are normed after what the source
    has, these are compared with the norm of that."""
    case, inputs, tol = GRADIENTS[name]
    arrays = load(name)
    ours = {k: x for k, x in arrays.items() if k in inputs or k.startswith("p_")}

    def loss(ours):
        out = case(ours)
        y, more = out if isinstance(out, tuple) else (out, None)
        return jnp.vdot(y, arrays["w"]), (y, more)

    gradients, (y, more) = jax.jit(jax.grad(loss, has_aux=True))(ours)
    close(y, arrays["ys"] if "ys" in arrays else arrays["y"], tol)
    if more is not None:
        close(*more, 1e-12)
    for key, got in gradients.items():
        called = "gx" if key == "xs" else "g" + key.removeprefix("p")
        close(last_steps(got, arrays[called]), arrays[called], tol)


def last_steps(got, expected):
    """As many as are expected, along whichever axis."""
    return got[tuple(slice(-size, None) for size in expected.shape)]


def test_arrays_are_small_and_all_used():
    files = {file.stem: file.stat().st_size for file in FOLDER.glob("*.npz")}
    assert files.keys() == VALUES.keys() | GRADIENTS.keys()
    assert sum(files.values()) < 300_000
    text = (FOLDER / "README.md").read_text()
    assert all(f"`{name}`" in text or name.startswith("gated_deltanet_layer") for name in files)
