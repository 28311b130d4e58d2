"""Conversions from and to Flax, MLX and cuDNN's layout in JAX, with the libraries as oracles.

test_convert.py runs these tests in a process of their own.
"""

from __future__ import annotations

import os

os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import mlx.core as mx
import mlx.nn
import numpy as np
import pytest
from flax import linen, nnx
from helpers import assert_close
from jax.experimental import rnn
from test_convert import BOTH, CELL, B, H, I, T, random

from fusedrnn import convert

WAYS = ("forward", "backward")


@CELL
@BOTH
@pytest.mark.parametrize("optimized", [False, True])
def test_flax_linen(cell: str, D: int, optimized: bool) -> None:
    """Parameters of flax.linen become a layer that computes the same, and back."""
    kinds = {"lstm": "LSTMCell", "gru": "GRUCell", "rnn": "SimpleCell"}
    name = "Optimized" * (optimized and cell == "lstm") + kinds[cell]
    module = linen.RNN(getattr(linen, name)(H))
    if D == 2:
        module = linen.Bidirectional(module, linen.RNN(getattr(linen, name)(H)))
    x = random(B, T, I, dtype=np.float32)
    parameters = module.init(jax.random.key(0), x)
    parameters = jax.tree.map(lambda a: random(*a.shape, dtype=np.float32), parameters)
    expected = np.asarray(module.apply(parameters, x))
    layer = convert.from_flax(parameters)
    assert_close(layer(x)[0], expected)
    (made,) = convert.to_flax(layer)
    if D == 2:
        made = {f"{way}_rnn": {"cell": p} for way, p in zip(WAYS, made, strict=True)}
    else:
        made = {"cell": made}
    jax.tree.map(np.testing.assert_allclose, {"params": made}, parameters)


@BOTH
@pytest.mark.parametrize("kind", ["LSTMCell", "OptimizedLSTMCell", "GRUCell", "SimpleCell"])
def test_flax_nnx(kind: str, D: int) -> None:
    """Parameters of flax.nnx become a layer that computes the same, and back."""
    cells = [getattr(nnx, kind)(I, H, rngs=nnx.Rngs(n)) for n in range(D)]
    for n, cell in enumerate(cells):
        state = nnx.state(cell, nnx.Param)
        values = nnx.to_pure_dict(state)
        for of_dense in values.values():
            for name, a in of_dense.items():
                of_dense[name] = random(*a.shape, seed=n, dtype=np.float32)
        nnx.replace_by_pure_dict(state, values)
        nnx.update(cell, state)
    x = random(B, T, I, dtype=np.float32)
    module = nnx.RNN(cells[0])
    if D == 2:
        module = nnx.Bidirectional(module, nnx.RNN(cells[1]), rngs=nnx.Rngs(0))
    layer = convert.from_flax(nnx.to_pure_dict(nnx.state(module)))
    assert_close(layer(x)[0], np.asarray(module(x)))
    made = convert.to_flax(layer, "nnx_optimized" if "Optimized" in kind else "nnx")[0]
    for cell, parameters in zip(cells, made if D == 2 else [made], strict=True):
        state = nnx.state(cell, nnx.Param)
        expected = nnx.to_pure_dict(state)
        assert {k: set(v) for k, v in parameters.items()} == {
            k: set(v) for k, v in expected.items()
        }
        for name, of_dense in expected.items():
            for what, a in of_dense.items():
                np.testing.assert_allclose(parameters[name][what], a)


@CELL
@pytest.mark.parametrize("bias", [True, False])
def test_mlx(cell: str, bias: bool) -> None:
    """Parameters of MLX become a layer that computes the same, and back."""
    module = getattr(mlx.nn, cell.upper())(I, H, bias=bias)
    named = {n: random(*a.shape, dtype=np.float32) for n, a in module.parameters().items()}
    module.update({n: mx.array(a) for n, a in named.items()})
    x = random(B, T, I, dtype=np.float32)
    y = module(mx.array(x))
    layer = convert.from_mlx(module.parameters())
    assert_close(layer(x)[0], np.asarray(y[0] if isinstance(y, tuple) else y))
    (made,) = convert.to_mlx(layer)
    assert set(made) == set(named)
    for name, a in named.items():
        np.testing.assert_allclose(made[name], a)


@BOTH
def test_cudnn(D: int) -> None:
    """A flat buffer is split as JAX splits cuDNN's, whose reference computes the same."""
    count = rnn.get_num_params_in_lstm(I, H, 2, D == 2)
    flat, x = random(count, dtype=np.float32), random(B, T, I, dtype=np.float32)
    layer = convert.from_cudnn("lstm", flat, I, H, 2, D == 2)
    h0, c0 = (
        random(2 * D, B, H, dtype=np.float32),
        random(2 * D, B, H, seed=1, dtype=np.float32),
    )
    parts = rnn.unpack_lstm_weights(flat, I, H, 2, D == 2)
    lengths = np.full(B, T, np.int32)
    y, h_n, c_n = rnn.lstm_ref(
        x, h0, c0, *parts, lengths, input_size=I, hidden_size=H, num_layers=2, dropout=0.0,
        bidirectional=D == 2,
    )  # fmt: skip
    ours, (h, c) = layer(x.swapaxes(0, 1), (h0, c0))
    assert_close(ours, np.asarray(y).swapaxes(0, 1))
    assert_close((h, c), tuple(np.asarray(a).reshape(h0.shape) for a in (h_n, c_n)))
    np.testing.assert_array_equal(convert.to_cudnn(layer), flat)


def test_mlx_in_bfloat16() -> None:
    """Parameters of bfloat16 become float32."""
    module = mlx.nn.GRU(I, H)
    module.set_dtype(mx.bfloat16)
    layer = convert.from_mlx(module.parameters())
    x = random(B, T, I, dtype=np.float32)
    module.set_dtype(mx.float32)
    assert_close(layer(x)[0], np.asarray(module(mx.array(x))))
