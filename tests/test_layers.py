"""Layers as objects: parameters, packed weights, pickling, threads, processes."""

from __future__ import annotations

import concurrent.futures
import copy
import multiprocessing
import pickle
import warnings
from typing import Any

import numpy as np
import pytest
from helpers import check_layers_against_reference

import fusedrnn as fr

LAYERS = {
    "LSTM": lambda **k: fr.LSTM(3, 20, rng=1, **k),
    "GRU": lambda **k: fr.GRU(3, 20, rng=1, **k),
    "RNN": lambda **k: fr.RNN(3, 20, nonlinearity="relu", rng=1, **k),
}
X = np.random.default_rng(0).normal(size=(6, 4, 3)).astype(np.float32)


@pytest.fixture(params=list(LAYERS))
def layer(request):
    return LAYERS[request.param](num_layers=2, bidirectional=True)


@pytest.mark.parametrize("name", list(LAYERS))
def test_reverse_layers_are_ops_in_reverse(name: str) -> None:
    """A reverse layer has the bits of its op with reverse=True, layer after layer, and may be
    pickled, quantised and combined with lengths.
    """
    layer = LAYERS[name](num_layers=2, reverse=True, batch_first=True)
    lengths, options = np.array([6, 3, 0, 5]), {"nonlinearity": "relu"} if name == "RNN" else {}
    y = X
    for n in range(2):
        names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        weights = [getattr(layer, f"{kind}_l{n}") for kind in names]
        op = getattr(fr, name.lower())
        y = op(y, *weights, reverse=True, lengths=lengths, **options)[0]
    x = X.swapaxes(0, 1)
    np.testing.assert_array_equal(layer(x, lengths=lengths)[0], y.swapaxes(0, 1))
    (trained, _), pullback = layer.vjp(x, lengths=lengths)
    np.testing.assert_array_equal(trained, y.swapaxes(0, 1))
    assert not pullback(trained).x[1, 3:].any()
    again = pickle.loads(pickle.dumps(layer))
    assert "reverse=True" in repr(again)
    np.testing.assert_array_equal(again(x, lengths=lengths)[0], y.swapaxes(0, 1))
    narrow = layer.quantize("int8")(x, lengths=lengths)[0]
    np.testing.assert_allclose(narrow, y.swapaxes(0, 1), atol=0.05)


def test_reverse_layers_have_one_direction() -> None:
    """reverse and bidirectional exclude each other, and a stream runs forward."""
    with pytest.raises(ValueError, match="reverse must be False in a bidirectional layer"):
        fr.GRU(3, 4, bidirectional=True, reverse=True)
    with pytest.raises(ValueError, match="layer must run forward, got a reverse one"):
        fr.Stream(fr.GRU(3, 4, reverse=True))


def test_assigning_a_parameter_repacks(layer) -> None:
    """A parameter that is assigned counts in the next call."""
    before, _ = layer(X)
    layer.weight_hh_l1 = layer.weight_hh_l1 * 2
    changed, _ = layer(X)
    assert (changed != before).any()
    layer.weight_hh_l1 = layer.weight_hh_l1 / 2
    np.testing.assert_array_equal(layer(X)[0], before)


def test_parameters_cannot_change_unnoticed(layer) -> None:
    """A write in place would leave the packed weights behind, so it is refused."""
    with pytest.raises(ValueError, match="read-only"):
        layer.weight_hh_l0[0] = 1
    with pytest.raises(ValueError, match="read-only"):
        layer.state_dict()["bias_ih_l0"] += 1
    mine = np.ones_like(layer.bias_ih_l0)
    layer.bias_ih_l0 = mine
    before, _ = layer(X)
    mine[:] = 5
    np.testing.assert_array_equal(layer(X)[0], before)


def test_pullback_keeps_the_weights_it_ran_with(layer) -> None:
    (y, _), pullback = layer.vjp(X)
    before = pullback(y)
    layer.weight_ih_l0 = layer.weight_ih_l0 * 3
    after = pullback(y)
    np.testing.assert_array_equal(after.x, before.x)


def test_pullback_keeps_the_state_it_started_from() -> None:
    layer = fr.GRU(3, 20, rng=1)
    h0 = np.random.default_rng(2).normal(size=(1, 4, 20)).astype(np.float32)
    (y, _), pullback = layer.vjp(X, h0)
    before = pullback(y).parameters["weight_hh_l0"]
    h0[:] = 0
    np.testing.assert_array_equal(pullback(y).parameters["weight_hh_l0"], before)


def test_state_dict_round_trip(layer) -> None:
    """A layer that loads another's parameters computes the same."""
    fresh = LAYERS[type(layer).__name__](num_layers=2, bidirectional=True)
    fresh.load_state_dict({k: v * 0 for k, v in fresh.state_dict().items()})
    fresh.load_state_dict(layer.state_dict())
    np.testing.assert_array_equal(fresh(X)[0], layer(X)[0])


@pytest.mark.parametrize(
    "duplicate", [copy.copy, copy.deepcopy, lambda l: pickle.loads(pickle.dumps(l))]
)
def test_pickle_and_copy(layer, duplicate) -> None:
    """A copied or unpickled layer computes the same, and changing it leaves the other alone."""
    y, _ = layer(X)
    twin = duplicate(layer)
    assert repr(twin) == repr(layer)
    np.testing.assert_array_equal(twin(X)[0], y)
    twin.weight_hh_l0 = twin.weight_hh_l0 * 2
    np.testing.assert_array_equal(layer(X)[0], y)
    with pytest.raises(ValueError, match="read-only"):
        twin.weight_hh_l0[0] = 1


def test_repr() -> None:
    """repr shows the arguments that differ from their defaults."""
    assert repr(fr.LSTM(3, 4)) == "LSTM(3, 4)"
    layer = fr.GRU(3, 4, 2, bidirectional=True, dtype=np.float64)
    assert repr(layer) == "GRU(3, 4, num_layers=2, bidirectional=True, dtype=float64)"
    assert repr(fr.RNN(3, 4, nonlinearity="relu")) == "RNN(3, 4, nonlinearity=relu)"


def test_same_seed_same_parameters() -> None:
    a, b, c = fr.LSTM(3, 4, rng=5), fr.LSTM(3, 4, rng=5), fr.LSTM(3, 4, rng=6)
    np.testing.assert_array_equal(a.weight_hh_l0, b.weight_hh_l0)
    assert (a.weight_hh_l0 != c.weight_hh_l0).any()


def test_batch_first_states_keep_their_shape() -> None:
    layer = fr.LSTM(3, 4, num_layers=2, batch_first=True)
    y, (h_n, c_n) = layer(X.swapaxes(0, 1))
    assert y.shape == (4, 6, 4)
    assert h_n.shape == c_n.shape == (2, 4, 4)
    assert y.flags.c_contiguous


def test_four_threads_at_once() -> None:
    """Calls from several threads, each with its own team, share layers and weights."""
    fr.set_num_threads(2)
    layer = fr.LSTM(24, 96, num_layers=2, rng=0)
    x = np.random.default_rng(1).normal(size=(4, 30, 5, 24)).astype(np.float32)
    expected = [layer.vjp(part) for part in x]
    gradients = [pullback(y) for (y, _), pullback in expected]
    layer.load_state_dict(layer.state_dict())  # nothing packed: all pack at once

    def work(i: int) -> bool:
        for _ in range(15):
            (y, _), pullback = layer.vjp(x[i])
            same = np.array_equal(y, expected[i][0][0])
            grads = pullback(y)
            same &= np.array_equal(grads.x, gradients[i].x)
            same &= all(
                np.array_equal(a, gradients[i].parameters[n])
                for n, a in grads.parameters.items()
            )
            if not same:
                return False
        return True

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(4)))


def _in_child(layer, x, queue) -> None:
    queue.put(layer(x)[0])


@pytest.mark.skipif(
    "fork" not in multiprocessing.get_all_start_methods(), reason="no fork here"
)
def test_a_forked_child_works() -> None:
    """A call works in a forked child, where the threads of the pool are gone."""
    layer = fr.LSTM(64, 256, rng=0)
    x = np.random.default_rng(1).normal(size=(20, 8, 64)).astype(np.float32)
    fr.set_num_threads(2)
    y, _ = layer(x)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # fork beside threads, on 3.12
        child = context.Process(target=_in_child, args=(layer, x, queue))
        child.start()
    try:
        in_child = queue.get(timeout=60)
        child.join(60)
    finally:
        child.kill()
    np.testing.assert_array_equal(in_child, y)
    assert child.exitcode == 0


@pytest.mark.parametrize("name", list(LAYERS))
def test_a_plain_call_equals_the_checked_one(name: str, dtype: np.dtype, threads: int) -> None:
    """A layer alone hands x and state straight to the kernels if they need no preparing;
    whatever else a user passes takes the way of all other layers.
    """
    layer = LAYERS[name](dtype=dtype)
    x = X.astype(dtype)
    start, *more = (np.full((1, 4, 20), s, dtype) for s in (0.3, -0.4))
    state = (start, *more) if name == "LSTM" else start
    spread = np.zeros((6, 8, 6), dtype)[:, ::2, ::2]
    spread[:] = x
    lists = [s.tolist() for s in state] if name == "LSTM" else state.tolist()
    lists = [np.array(s, dtype) for s in lists] if name == "LSTM" else np.array(lists, dtype)
    for initial in (None, state):
        direct = layer(x, initial)
        others = [
            layer.vjp(x, initial)[0],
            layer(spread, initial),
            layer(np.asfortranarray(x), initial),
        ]
        if initial is not None:
            others.append(layer(x, lists))
        for other in others:
            np.testing.assert_array_equal(other[0], direct[0])
            for a, b in zip(np.stack(other[1]), np.stack(direct[1]), strict=True):
                np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN"])
@pytest.mark.parametrize(
    ("layers", "both", "sizes", "options"),
    [
        (2, True, (40, 2, 24, 20), {}),
        (4, False, (40, 2, 20, 20), {}),
        (3, False, (300, 1, 18, 37), {}),
        (4, False, (16, 1, 512, 16), {}),  # one thread suffices for all but the first layer
        (2, False, (1200, 1, 10, 12), {}),
        (2, True, (12, 40, 24, 40), {"dropout": 0.3}),
        (2, False, (40, 2, 20, 20), {"clip": 1.0, "zoneout": 0.2}),
        (3, True, (30, 4, 20, 24), {"weight_dropout": 0.3, "recurrent_dropout": 0.2}),
    ],
)
@pytest.mark.parametrize("masked", [False, True])
def test_layers_and_directions_side_by_side(
    name: str, layers: int, both: bool, sizes: Any, options: Any, masked: bool
) -> None:
    """Layers and directions side by side give the same bits on any number of threads."""
    T, B, I, H = sizes
    rng = np.random.default_rng(0)
    layer = getattr(fr, name)(I, H, layers, bidirectional=both, rng=0, **options)
    x = rng.normal(size=(T, B, I)).astype(np.float32)
    arguments: dict[str, Any] = {"seed": 5}
    if masked:
        arguments["lengths"] = rng.integers(0, T + 1, B)
        arguments["resets"] = rng.random((T, B)) < 0.1
    found = []
    for count in (1, 2, 3, 4):
        fr.set_num_threads(count)
        (y, state), pullback = layer.vjp(x, **arguments)
        plain, _ = layer(x, training=True, **arguments)
        grads = pullback(y, state)
        states = [*flat(state), *flat(grads.state)]
        found.append([y, plain, *states, grads.x, *grads.parameters.values()])
    for others in found[1:]:
        for a, e in zip(others, found[0], strict=True):
            np.testing.assert_array_equal(a, e)


def flat(state: Any) -> tuple[Any, ...]:
    return state if isinstance(state, tuple) else (state,)


@pytest.mark.parametrize("name", list(LAYERS))
def test_all_layers_and_directions_have_the_same_masks(name: str, threads: int) -> None:
    """Lengths and resets reach two bidirectional layers as they reach four reference runs, and
    the same, bit for bit, where the batch comes first.
    """
    lengths = np.array([6, 0, 3, 5])
    resets = np.random.default_rng(1).random((6, 4)) < 0.3
    results = []
    for batch_first in (False, True):
        layer = LAYERS[name](num_layers=2, bidirectional=True, batch_first=batch_first)
        if not batch_first:
            check_layers_against_reference(layer, X, lengths=lengths, resets=resets)
        swap = (lambda a: a.swapaxes(0, 1)) if batch_first else (lambda a: a)
        (y, state), pullback = layer.vjp(swap(X), lengths=lengths, resets=swap(resets))
        grads = pullback(y)
        results.append([swap(y), *state, swap(grads.x), *grads.parameters.values()])
    for a, b in zip(*results, strict=True):
        np.testing.assert_array_equal(a, b)


def test_masks_of_an_unbatched_sequence(layer) -> None:
    """A sequence without a batch takes one length and one row of resets."""
    resets = np.arange(6) % 3 == 1
    (y, _), pullback = layer.vjp(X[:, 0], lengths=4, resets=resets)
    (batch, _), batch_pullback = layer.vjp(X[:, :1], lengths=[4], resets=resets[:, None])
    np.testing.assert_array_equal(y, batch[:, 0])
    np.testing.assert_array_equal(pullback(y).x, batch_pullback(batch).x[:, 0])


def test_a_layer_alone_takes_masks() -> None:
    """A single layer takes masks, though its short way knows none."""
    layer = fr.GRU(3, 20, rng=1)
    y, h_n = layer(X, lengths=[6, 2, 0, 1])
    assert (y[2:, 1] == 0).all()
    np.testing.assert_array_equal(h_n[0, 1], y[1, 1])
    reset, _ = layer(X, resets=np.ones((6, 4), bool))
    np.testing.assert_array_equal(reset[3], layer(X[3:4])[0][0])


def test_state_can_be_carried_on() -> None:
    """Calls of one step each, carrying the state, give the bits of the whole sequence."""
    layer = fr.GRU(3, 20, num_layers=2, rng=1)
    whole, final = layer(X)
    state = None
    for t in range(len(X)):
        y, state = layer(X[t : t + 1], state)
        np.testing.assert_array_equal(y[0], whole[t])
    np.testing.assert_array_equal(state, final)


def test_explain_tells_the_way() -> None:
    """explain says which kernels a call takes and why, its operations, and its memory."""
    plain = fr.LSTM(8, 40, num_layers=2, bidirectional=True)
    summary = plain.explain(20, 6)
    assert summary["way"] == "plain kernels"
    assert list(summary["plans"]) == ["l0", "l0_reverse", "l1", "l1_reverse"]
    per_row = [4 * 40 * (I + 40) for I in (8, 8, 80, 80)]
    assert summary["flops"] == 2 * 20 * 6 * sum(per_row)
    assert summary["weight_bytes"] == sum(p.nbytes for p in plain.state_dict().values())
    assert summary["floor"] > 0
    assert summary["saved_bytes"] == 0
    training = plain.explain(20, 6, training=True)
    assert training["flops"] == 3 * summary["flops"]
    assert training["saved_bytes"] >= 4 * 4 * 20 * 6 * 5 * 40
    assert "20" in str(summary)
    assert summary["isa"] in str(summary)
    for options, name in (
        ({"peephole": True}, "peephole"),
        ({"layer_norm": True}, "layer_norm"),
        ({"zoneout": 0.1}, "zoneout"),
        ({"coupled_gates": True}, "coupled_gates"),
    ):
        summary = fr.LSTM(8, 40, **options).explain(20, 6)
        assert summary["way"] == "kernels with options"
        assert name in summary["why"][0]
    dropped = fr.GRU(8, 40, recurrent_dropout=0.5)
    assert dropped.explain(20, 6)["way"] == "plain kernels"
    assert "recurrent_dropout" in dropped.explain(20, 6, training=True)["why"][0]
    assert "recompute" in plain.explain(20, 6, training=True, recompute=True)["why"][0]
    with pytest.raises(ValueError, match="T must be from 1"):
        plain.explain(0, 6)
