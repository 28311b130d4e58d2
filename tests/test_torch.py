"""Layers agree with torch.nn in float64: an oracle that shares nothing with the reference."""

from __future__ import annotations

import numpy as np
import pytest
from helpers import assert_close

import fusedrnn as fr

torch = pytest.importorskip("torch", reason="torch is the oracle of these tests")

KINDS = {
    "LSTM": {},
    "GRU": {},
    "RNN-tanh": {"nonlinearity": "tanh"},
    "RNN-relu": {"nonlinearity": "relu"},
}


def pair(kind: str, dtype, input_size: int, hidden_size: int, **options):
    """A torch module in float64 and our layer with its parameters as rounded to dtype."""
    torch.manual_seed(3)
    name = kind.partition("-")[0]
    options |= KINDS[kind]
    module = getattr(torch.nn, name)(input_size, hidden_size, dtype=torch.float64, **options)
    layer = getattr(fr, name)(input_size, hidden_size, dtype=dtype, **options)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.from_numpy(p.numpy().astype(dtype)))
    layer.load_state_dict({k: v.numpy() for k, v in module.state_dict().items()})
    return module, layer


def flat(state) -> list:
    return list(state) if isinstance(state, tuple) else [state]


def compare(
    module, layer, dtype, x: np.ndarray, states: list[np.ndarray], **masks: np.ndarray
) -> None:
    """Outputs and the gradient of every input and parameter; `module` is called alike."""
    x_t = torch.tensor(x, dtype=torch.float64, requires_grad=True)
    states_t = [torch.tensor(s, dtype=torch.float64, requires_grad=True) for s in states]
    one = len(states) == 1
    y_t, final_t = module(x_t, states_t[0] if one else tuple(states_t), **masks)
    (y, final), pullback = layer.vjp(x, states[0] if one else tuple(states), **masks)
    assert_close(y, y_t, dtype, "y")
    for a, e in zip(flat(final), flat(final_t), strict=True):
        assert_close(a, e, dtype, "state")
    inference, _ = layer(x, states[0] if one else tuple(states), **masks)
    np.testing.assert_array_equal(inference, y)

    rng = np.random.default_rng(9)
    dy = rng.normal(size=y.shape).astype(dtype)
    d_final = [rng.normal(size=s.shape).astype(dtype) for s in flat(final)]
    torch.autograd.backward(
        [y_t, *flat(final_t)], [torch.from_numpy(d.astype(np.float64)) for d in (dy, *d_final)]
    )
    grads = pullback(dy, d_final[0] if one else tuple(d_final))
    assert_close(grads.x, x_t.grad, dtype, "dx", gradient=True)
    for a, e in zip(flat(grads.state), states_t, strict=True):
        assert_close(a, e.grad, dtype, "d state", gradient=True)
    expected = dict(module.named_parameters())
    assert list(grads.parameters) == list(expected)
    for name, gradient in grads.parameters.items():
        assert_close(gradient, expected[name].grad, dtype, name, gradient=True)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_layers", [1, 3])
@pytest.mark.parametrize("bidirectional", [False, True], ids=["one-way", "both-ways"])
def test_agrees_with_torch(
    kind: str, num_layers: int, bidirectional: bool, dtype, isa_on_threads: None
) -> None:
    """Layers agree with torch.nn in each number of layers and directions."""
    module, layer = pair(
        kind, dtype, 11, 37, num_layers=num_layers, bidirectional=bidirectional
    )
    rng = np.random.default_rng(1)
    shape = (num_layers * (1 + bidirectional), 5, 37)
    states = [rng.normal(size=shape).astype(dtype) for _ in range(1 + (kind == "LSTM"))]
    compare(module, layer, dtype, rng.normal(size=(9, 5, 11)).astype(dtype), states)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("batched", [True, False], ids=["batch-first", "unbatched"])
def test_forms_of_input(kind: str, bias: bool, batched: bool, dtype) -> None:
    """Layers agree with torch.nn without bias, batch first, and without a batch."""
    module, layer = pair(
        kind, dtype, 6, 20, num_layers=2, bias=bias, batch_first=True, bidirectional=True
    )
    rng = np.random.default_rng(2)
    batch = (3,) if batched else ()
    states = [
        rng.normal(size=(4, *batch, 20)).astype(dtype) for _ in range(1 + (kind == "LSTM"))
    ]
    compare(module, layer, dtype, rng.normal(size=(*batch, 8, 6)).astype(dtype), states)


class Packed(torch.nn.Module):
    """A module that takes lengths by way of PackedSequence."""

    def __init__(self, inner) -> None:
        super().__init__()
        self.inner = inner

    def named_parameters(self):
        return self.inner.named_parameters()

    def forward(self, x, state, lengths):
        first, rnn = self.inner.batch_first, torch.nn.utils.rnn
        packed = rnn.pack_padded_sequence(x, torch.tensor(lengths), first, enforce_sorted=False)
        y, final = self.inner(packed, state)
        T = x.shape[1 if first else 0]
        return rnn.pad_packed_sequence(y, first, total_length=T)[0], final


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bidirectional", [False, True], ids=["one-way", "both-ways"])
@pytest.mark.parametrize("batch_first", [False, True])
def test_lengths_agree_with_packed_sequences(
    kind: str, bidirectional: bool, batch_first: bool, threads: int
) -> None:
    dtype = np.float64
    options = {"num_layers": 2, "bidirectional": bidirectional, "batch_first": batch_first}
    module, layer = pair(kind, dtype, 11, 37, **options)
    rng = np.random.default_rng(1)
    shape = (2 * (1 + bidirectional), 6, 37)
    states = [rng.normal(size=shape) for _ in range(1 + (kind == "LSTM"))]
    x = rng.normal(size=(6, 9, 11) if batch_first else (9, 6, 11))
    lengths = np.array([3, 9, 1, 5, 9, 2])
    compare(Packed(module), layer, dtype, x, states, lengths=lengths)


class Cut(Packed):
    """A one-layer module that takes resets by a loop over single steps."""

    def forward(self, x, state, resets):
        pair, rows = isinstance(state, tuple), []
        for t in range(len(x)):
            keep = torch.from_numpy(~resets[t]).to(x)[:, None]
            state = tuple(s * keep for s in state) if pair else state * keep
            y, state = self.inner(x[t : t + 1], state)
            rows.append(y)
        return torch.cat(rows), state


@pytest.mark.parametrize("kind", KINDS)
def test_resets_agree_with_a_loop_cut_at_them(kind: str, threads: int) -> None:
    module, layer = pair(kind, np.float64, 11, 37)
    rng = np.random.default_rng(1)
    states = [rng.normal(size=(1, 5, 37)) for _ in range(1 + (kind == "LSTM"))]
    resets = rng.random((9, 5)) < 0.3
    compare(Cut(module), layer, np.float64, rng.normal(size=(9, 5, 11)), states, resets=resets)


@pytest.mark.parametrize("kind", KINDS)
def test_same_parameters(kind: str) -> None:
    """Names, order, shapes and the bound of the initialisation are torch's."""
    module, layer = pair(kind, np.float32, 6, 20, num_layers=2, bidirectional=True)
    ours = {k: v.shape for k, v in layer.state_dict().items()}
    assert list(ours.items()) == [(k, tuple(v.shape)) for k, v in module.state_dict().items()]
    fresh = fr.LSTM(6, 400, rng=0).state_dict()["weight_hh_l0"]
    assert 0.99 * 400**-0.5 < np.abs(fresh).max() <= 400**-0.5


@pytest.mark.parametrize("num_layers", [1, 2])
@pytest.mark.parametrize("bidirectional", [False, True], ids=["one-way", "both-ways"])
def test_projection_agrees_with_torch(
    num_layers: int, bidirectional: bool, dtype, isa_on_threads: None
) -> None:
    """An LSTM with a projection agrees with torch.nn, and has the same parameters."""
    module, layer = pair(
        "LSTM", dtype, 11, 37, num_layers=num_layers, bidirectional=bidirectional, proj_size=13
    )
    rng = np.random.default_rng(1)
    count = num_layers * (1 + bidirectional)
    x = rng.normal(size=(6, 5, 11)).astype(dtype)
    states = [rng.normal(size=(count, 5, width)).astype(dtype) for width in (13, 37)]
    compare(module, layer, dtype, x, states)
    assert list(layer.state_dict()) == list(module.state_dict())


def test_a_packed_sequence_is_refused() -> None:
    packed = torch.nn.utils.rnn.pack_sequence([torch.zeros(5, 3)])
    # NumPy before 1.24 makes an array of objects of it.
    with pytest.raises(TypeError, match=r"x must be (an array|float32, .* got object)"):
        fr.LSTM(3, 4)(packed)
