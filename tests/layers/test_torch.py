"""Networks with the weights of PyTorch: against its formulas in NumPy, and against itself."""

import pathlib
import re

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pararnn as prnn

GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}
INPUTS, UNITS, LENGTH = 3, 4, 12


def random_weights(
    kind, layers=2, bidirectional=False, bias=True, dtype=np.float64, wrap=np.asarray
):
    rng = np.random.default_rng(len(kind) + 10 * layers)
    rows, ways = GATES[kind] * UNITS, ["", "_reverse"] if bidirectional else [""]
    entries = {}
    for number in range(layers):
        for way in ways:
            width = UNITS * len(ways) if number else INPUTS
            shapes = {"weight_ih": (rows, width), "weight_hh": (rows, UNITS)}
            if bias:
                shapes |= {"bias_ih": (rows,), "bias_hh": (rows,)}
            for part, shape in shapes.items():
                values = rng.uniform(-0.7, 0.7, shape).astype(dtype)
                entries[f"{part}_l{number}{way}"] = wrap(values)
    return entries


def inputs(dtype=np.float64, shape=(LENGTH, INPUTS)):
    return np.random.default_rng(5).standard_normal(shape).astype(dtype)


# --- PyTorch's documented formulas ------------------------------------------------------------


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def lstm(x, h, c, w, r, b, s):
    i, f, g, o = (w @ x + b + r @ h + s).reshape(4, -1)
    c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
    return sigmoid(o) * np.tanh(c), c


def gru(x, h, c, w, r, b, s):
    (x_r, x_z, x_n), (h_r, h_z, h_n) = (w @ x + b).reshape(3, -1), (r @ h + s).reshape(3, -1)
    z, n = sigmoid(x_z + h_z), np.tanh(x_n + sigmoid(x_r + h_r) * h_n)
    return (1 - z) * n + z * h, c


def rnn_tanh(x, h, c, w, r, b, s):
    return np.tanh(w @ x + b + r @ h + s), c


def rnn_relu(x, h, c, w, r, b, s):
    return np.maximum(w @ x + b + r @ h + s, 0), c


STEPS = {"LSTM": lstm, "GRU": gru, "tanh": rnn_tanh, "relu": rnn_relu}


def transcription(name, entries, xs):
    """The outputs, and `(h, c)` at the end for each layer and direction."""
    finals, zero = [], np.zeros(len(entries["weight_hh_l0"]))
    layers = len({key.split("_l")[1].removesuffix("_reverse") for key in entries})
    for number in range(layers):
        columns = []
        for way in ("", "_reverse"):
            end = f"_l{number}{way}"
            if "weight_ih" + end not in entries:
                continue
            parts = [entries.get(p + end, zero) for p in ("weight_ih", "weight_hh")]
            parts += [entries.get(p + end, zero) for p in ("bias_ih", "bias_hh")]
            h, c, ys = np.zeros(UNITS), np.zeros(UNITS), []
            for x in xs[::-1] if way else xs:
                h, c = STEPS[name](x, h, c, *parts)
                ys.append(h)
            columns.append(np.stack(ys[::-1] if way else ys))
            finals.append((h, c))
        xs = np.concatenate(columns, axis=-1)
    return xs, finals


def convert(name, entries, **options):
    if name == "relu":
        options["nonlinearity"] = "relu"
    return prnn.from_torch(entries, **options)


def kind_of(name):
    return "RNN" if name in ("tanh", "relu") else name


def flat(name, network, finals):
    """The final states as the transcription has them."""
    if isinstance(network.layers[0], prnn.Bidirectional):
        finals = [state for pair in finals for state in pair]
    return [state[::-1] if name == "LSTM" else (state, None) for state in finals]


def check(name, network, xs, expected, expected_finals, tolerance):
    ys, finals = eqx.filter_jit(network)(xs)
    assert ys.dtype == xs.dtype
    np.testing.assert_allclose(ys, expected, rtol=tolerance, atol=tolerance)
    pairs = flat(name, network, finals)
    for (h, c), (expected_h, expected_c) in zip(pairs, expected_finals, strict=True):
        np.testing.assert_allclose(h, expected_h, rtol=tolerance, atol=tolerance)
        if c is not None:
            np.testing.assert_allclose(c, expected_c, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    "layers, bidirectional, bias", [(1, False, True), (2, False, False), (2, True, True)]
)
@pytest.mark.parametrize("name", STEPS)
def test_against_the_formulas(name, layers, bidirectional, bias):
    entries = random_weights(kind_of(name), layers, bidirectional, bias)
    network, xs = convert(name, entries), inputs()
    assert len(network.layers) == layers
    check(name, network, xs, *transcription(name, entries, xs), 1e-13)


def test_solved_in_parallel():
    """The solver and the adjoint are those of all layers."""
    entries = random_weights("GRU", layers=1, bidirectional=True)
    solver, adjoint = prnn.Newton(chunk_size=4), prnn.Sequential()
    network = prnn.from_torch(entries, solver=solver, adjoint=adjoint)
    rnns = [rnn for layer in network.layers for rnn in (layer.forward, layer.backward)]
    assert all(rnn.solver == solver and rnn.adjoint == adjoint for rnn in rnns)
    check("GRU", network, inputs(), *transcription("GRU", entries, inputs()), 1e-10)
    one_way = prnn.from_torch(random_weights("GRU"), solver=solver, adjoint=adjoint)
    assert all(rnn.solver == solver and rnn.adjoint == adjoint for rnn in one_way.layers)


@pytest.mark.parametrize("bidirectional", [False, True])
def test_throw(bidirectional):
    network = prnn.from_torch(random_weights("RNN", layers=1, bidirectional=bidirectional))
    xs = inputs()
    xs[3] = np.nan
    assert np.isnan(network(xs, throw=False)[0][3]).all()
    with pytest.raises(RuntimeError, match="not finite"):
        network(xs)


def test_streaming_and_going_on():
    network, xs = prnn.from_torch(random_weights("LSTM")), inputs()
    ys, final = network(xs)
    head, state = network(xs[:5], network.init_state())
    step, rest = eqx.filter_jit(network.step), []
    for x in xs[5:]:
        y, state = step(state, x)
        rest.append(y)
    np.testing.assert_allclose(jnp.concatenate([head, jnp.stack(rest)]), ys, atol=1e-14)
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(final), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-14)
    np.testing.assert_allclose(step(None, xs[0])[0], ys[0], atol=1e-14)


@pytest.mark.parametrize("bidirectional", [False, True])
def test_resets_and_padding(bidirectional):
    """Pieces in one sequence, with padding between them, are the pieces one by one."""
    network = prnn.from_torch(random_weights("GRU", bidirectional=bidirectional))
    xs, mask = inputs(), np.arange(LENGTH) % 6 < 4
    ys, _ = network(xs, reset=np.arange(LENGTH) == 6, mask=mask)
    for piece in (slice(0, 4), slice(6, 10)):
        expected, _ = network(xs[piece])
        np.testing.assert_allclose(ys[piece], expected, atol=1e-14)
    assert not np.any(ys[~mask])


def test_gradients_reach_the_entries():
    """Converting is differentiable, so trained weights can be handed back under PyTorch's names."""
    entries = random_weights("GRU", layers=1, wrap=jnp.asarray)

    @jax.jit
    @jax.value_and_grad
    def loss(entries):
        return jnp.sum(jnp.sin(prnn.from_torch(entries)(inputs())[0]))

    _, grads = loss(entries)
    grads = {name: np.asarray(grad) for name, grad in grads.items()}
    # Of both biases only the sum counts, but for that of n, inside the product with the gate.
    b, s = grads["bias_ih_l0"], grads["bias_hh_l0"]
    np.testing.assert_allclose(b[: 2 * UNITS], s[: 2 * UNITS], rtol=1e-12)
    assert np.all(np.abs(b[2 * UNITS :] - s[2 * UNITS :]) > 1e-6)
    for name, entry in entries.items():
        shift = np.zeros(entry.shape)
        shift.flat[-1] = 1e-6
        up, down = (loss(entries | {name: entry + sign * shift})[0] for sign in (1, -1))
        np.testing.assert_allclose(grads[name].flat[-1], (up - down) / 2e-6, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, np.float16, np.float32])
def test_the_dtype_is_kept(dtype):
    network = prnn.from_torch(random_weights("LSTM", dtype=dtype))
    weights = jax.tree.leaves(eqx.filter(network, eqx.is_array))
    assert len(weights) == 6 and {w.dtype for w in weights} == {jnp.dtype(dtype)}


def test_the_weights_are_copied():
    """A PyTorch module that goes on training writes into the memory of its tensors."""
    # Of a size and an alignment that JAX would share on a CPU.
    entries = {name: np.zeros((512, 512), np.float32) for name in ("weight_ih_l0", "weight_hh_l0")}
    network = prnn.from_torch(entries)
    for entry in entries.values():
        entry += 1
    assert not np.any(network.layers[0].cell.weight_x)
    assert not np.any(network.layers[0].cell.weight_h)


def test_the_package_does_not_import_torch():
    for file in pathlib.Path(prnn.__file__).parent.rglob("*.py"):
        assert not re.search(r"^\s*(import|from) torch\b", file.read_text(), re.M), file


# --- errors -----------------------------------------------------------------------------------


def without(name):
    entries = random_weights("GRU", bidirectional=True)
    del entries[name]
    return entries


@pytest.mark.parametrize(
    "entries, message",
    [
        ({}, "`state_dict` must hold the weights of a network; got an empty mapping"),
        (without("weight_hh_l0"), "lacks the entry 'weight_hh_l0'; it has bias_hh_l0, "),
        (without("bias_ih_l1"), "lacks the entry 'bias_ih_l1'"),
        (without("weight_ih_l1_reverse"), "lacks the entry 'weight_ih_l1_reverse'"),
        ({"weight_ih_l3": np.ones((4, 1))}, "lacks the entry 'weight_ih_l0'"),
        ({"rnn.weight_ih_l0": np.ones((4, 1))}, "unknown entry 'rnn.weight_ih_l0'.*prefix"),
        ({"weight_ih": np.ones((4, 1))}, "unknown entry 'weight_ih'"),
        ({"bias_hr_l0": np.ones(4)}, "unknown entry 'bias_hr_l0'"),
        ({7: np.ones(4)}, "unknown entry 7"),
        (
            random_weights("LSTM") | {"weight_hr_l0": np.ones((2, UNITS))},
            r"'weight_hr_l0': an LSTM with projections \(`proj_size`\) is not supported",
        ),
        (
            random_weights("LSTM") | {"weight_hh_l0": np.ones((4 * UNITS, 2))},
            r"'weight_hh_l0.*got \(16, 2\). That of.*projections \(`proj_size`\).*'weight_hr_l0'",
        ),
        (
            random_weights("RNN") | {"weight_hh_l0": np.ones((2 * UNITS, UNITS))},
            r"\['weight_hh_l0'\]` must have the shape .*; got \(8, 4\)",
        ),
        (
            random_weights("GRU") | {"weight_hh_l0": np.ones(12)},
            r"\['weight_hh_l0'\]` must have the shape .*; got \(12,\)",
        ),
        (
            random_weights("GRU") | {"weight_ih_l0": np.ones(12)},
            r"\['weight_ih_l0'\]` must have the shape \(12, input_size\).*GRU.*; got \(12,\)",
        ),
        (
            random_weights("LSTM") | {"weight_ih_l1": np.ones((16, 2 * UNITS))},
            r"\['weight_ih_l1'\]` must have the shape \(16, 4\).*LSTM with 4.*; got \(16, 8\)",
        ),
        (
            random_weights("LSTM") | {"bias_hh_l1": np.ones(4)},
            r"\['bias_hh_l1'\]` must have the shape \(16,\).*; got \(4,\)",
        ),
        (
            random_weights("LSTM") | {"bias_hh_l1": np.ones(16, np.float32)},
            "must have one dtype; got float32 for 'bias_hh_l1' and float64 for 'weight_ih_l0'",
        ),
        (
            random_weights("LSTM") | {"bias_hh_l1": np.ones(16, int)},
            r"\['bias_hh_l1'\]` must hold real floating-point numbers; got int64",
        ),
    ],
)
def test_entries_that_are_refused(entries, message, as_users_run_it):
    with pytest.raises(ValueError, match=message):
        prnn.from_torch(entries)


def test_errors(as_users_run_it):
    class Module:
        pass

    class Tensor:
        def __array__(self, *args, **kwargs):
            raise RuntimeError("Can't call numpy() on Tensor that requires grad.")

    with pytest.raises(TypeError, match=r"`state_dict` must be a mapping.*`module.state_dict\(\)`"):
        prnn.from_torch(Module())
    with pytest.raises(TypeError, match=r"\['weight_ih_l0'\]` cannot be read.*requires grad.*cpu"):
        prnn.from_torch({"weight_ih_l0": Tensor()})
    with pytest.raises(ValueError, match="`nonlinearity` must be 'tanh' or 'relu'; got 'elu'"):
        prnn.from_torch(random_weights("RNN"), nonlinearity="elu")
    with pytest.raises(ValueError, match="torch.nn.RNN; got 'relu' for those of a torch.nn.LSTM"):
        prnn.from_torch(random_weights("LSTM"), nonlinearity="relu")

    network, xs = prnn.from_torch(random_weights("LSTM")), inputs()
    with pytest.raises(ValueError, match=r"`xs` must have shape \(L, 3\)|\(L, 3\)"):
        network(xs[:, :2])
    # As PyTorch has them: would be taken for (c, h) of two units each, were they not checked.
    theirs = (np.zeros((2, UNITS)), np.zeros((2, UNITS)))
    for call in (lambda: network(xs, theirs), lambda: network.step(theirs, xs[0])):
        with pytest.raises(ValueError, match=r"`state` must be shaped like `init_state\(\)`"):
            call()
    both = prnn.from_torch(random_weights("LSTM", bidirectional=True))
    for call in (both.init_state, lambda: both.step(None, xs[0]), lambda: both(xs, theirs)):
        with pytest.raises(ValueError, match="A bidirectional layer has seen all"):
            call()


# --- PyTorch itself (`pip install 'pararnn[torch]'`) ------------------------------------------


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch", reason="the extra `torch` is not installed")


def make(torch, name, dtype, **options):
    if name in ("tanh", "relu"):
        options["nonlinearity"] = name
    torch.manual_seed(0)
    module = getattr(torch.nn, kind_of(name))(INPUTS, UNITS, **options)
    return module.to(getattr(torch, dtype))


def finals_of(name, theirs):
    h, c = theirs if name == "LSTM" else (theirs, theirs)
    return list(zip(h.detach().numpy(), c.detach().numpy(), strict=True))


@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-6), ("float64", 1e-14)])
@pytest.mark.parametrize("layers, bidirectional", [(1, False), (3, True)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", STEPS)
def test_against_torch(torch, name, layers, bidirectional, bias, dtype, tolerance):
    options = {"num_layers": layers, "bidirectional": bidirectional, "bias": bias}
    module, xs = make(torch, name, dtype, **options), inputs(dtype, (50, INPUTS))
    ys, finals = module(torch.from_numpy(xs))
    network = convert(name, module.state_dict())
    check(name, network, xs, ys.detach().numpy(), finals_of(name, finals), tolerance)


@pytest.mark.parametrize("bidirectional", [False, True])
def test_padding_against_torch(torch, bidirectional):
    """`mask` under `vmap` is what PyTorch's packed sequences are."""
    module = make(torch, "LSTM", "float64", num_layers=2, bidirectional=bidirectional)
    xs, lengths = inputs(shape=(3, LENGTH, INPUTS)), [12, 7, 1]
    packing = torch.nn.utils.rnn
    packed = packing.pack_padded_sequence(torch.from_numpy(xs), lengths, batch_first=True)
    ys, finals = module(packed)
    expected, _ = packing.pad_packed_sequence(ys, batch_first=True)

    network = prnn.from_torch(module.state_dict())
    mask = np.arange(LENGTH) < np.array(lengths)[:, None]
    got, states = jax.vmap(lambda xs, mask: network(xs, mask=mask))(xs, mask)
    np.testing.assert_allclose(got, expected.detach().numpy(), atol=1e-14)
    for (h, c), (their_h, their_c) in zip(
        flat("LSTM", network, states), finals_of("LSTM", finals), strict=True
    ):
        np.testing.assert_allclose(h, their_h, atol=1e-14)
        np.testing.assert_allclose(c, their_c, atol=1e-14)


@pytest.mark.parametrize("name", STEPS)
def test_gradients_against_torch(torch, name):
    module, xs = make(torch, name, "float64", num_layers=2), inputs()
    torch.sin(module(torch.from_numpy(xs))[0]).sum().backward()

    @jax.jit
    @jax.grad
    def grads(entries):
        return jnp.sum(jnp.sin(convert(name, entries)(xs)[0]))

    entries = {key: jnp.asarray(value.numpy()) for key, value in module.state_dict().items()}
    got = grads(entries)
    for key, parameter in module.named_parameters():
        np.testing.assert_allclose(got[key], parameter.grad.numpy(), rtol=1e-10, atol=1e-12)


def test_tensors_that_are_refused(torch, as_users_run_it):
    module = make(torch, "GRU", "float64")
    with pytest.raises(TypeError, match=r"\['weight_ih_l0'\]` cannot be read.*requires grad"):
        prnn.from_torch(dict(module.named_parameters()))
    with pytest.raises(TypeError, match=r"BFloat16.*`tensor.float\(\)`"):
        prnn.from_torch(module.bfloat16().state_dict())
    with pytest.raises(TypeError, match=r"got GRU\(3, 4\)"):
        prnn.from_torch(module)
    projected = torch.nn.LSTM(INPUTS, UNITS, proj_size=2)
    with pytest.raises(ValueError, match="projections"):
        prnn.from_torch(projected.state_dict())
