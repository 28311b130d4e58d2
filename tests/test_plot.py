"""`fusedrnn.plot` draws the gates that a trace has, where they belong."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest

import fusedrnn as fr
from fusedrnn import plot

pytest.importorskip("matplotlib", reason="plots are matplotlib's")

X = np.random.default_rng(0).normal(size=(7, 3, 4)).astype(np.float32)


def drawn(figure: Any) -> dict[str, np.ndarray]:
    return {ax.get_title(): ax.images[0].get_array() for ax in figure.axes if ax.get_title()}


def test_each_gate_of_each_layer_and_the_cells() -> None:
    """Each gate and the cells of the chosen row and units are drawn under their names."""
    lstm = fr.LSTM(4, 5, num_layers=2, bidirectional=True, rng=0)
    *_, cells, trace = lstm(X, return_cells=True, trace=True)
    found = drawn(plot.gates(trace, row=2, cells=cells, units=[4, 1], title="an LSTM"))
    assert len(found) == 4 * 4 + 2
    for name, values in trace.items():
        letter, _, layer = name.partition("_")
        np.testing.assert_array_equal(found[f"{letter}, {layer}"], values[:, 2, [4, 1]].T)
    np.testing.assert_array_equal(found["c, l1"], cells[:, 2, [4, 1]].T)
    np.testing.assert_array_equal(found["c, l1_reverse"], cells[:, 2, [9, 6]].T)


def test_of_an_op_a_module_and_without_a_batch() -> None:
    """Traces of an op, of a module of PyTorch and without a batch are drawn."""
    gru = fr.GRU(4, 5, batch_first=True, rng=0)
    *_, trace = gru(X, trace=True)
    found = drawn(plot.gates(trace, row=6, batch_first=True))
    assert list(found) == ["r, l0", "z, l0", "n, l0"]
    np.testing.assert_array_equal(found["n, l0"], trace["n_l0"][6].T)
    *_, trace = fr.rnn(X[:, 0], *list(fr.RNN(4, 5, rng=0).state_dict().values()), trace=True)
    np.testing.assert_array_equal(drawn(plot.gates(trace))["h"], trace["h"].T)
    torch = pytest.importorskip("torch", reason="modules are of fusedrnn.torch")
    import fusedrnn.torch as ft

    *_, trace = ft.LSTM(4, 5)(torch.from_numpy(X), trace=True)
    assert list(drawn(plot.gates(trace))) == ["i, l0", "f, l0", "g, l0", "o, l0"]


@pytest.mark.parametrize(
    ("trace", "row", "error", "message"),
    [
        ([X], 0, TypeError, "trace must be a dict of gates, got list"),
        ({}, 0, TypeError, "trace must be a dict of gates, got an empty one"),
        ({"gate": X}, 0, TypeError, "trace must have names as"),
        ({"i": X}, 3, ValueError, "row must be below 3, the rows of trace"),
        ({"i": X[0, 0]}, 0, ValueError, r"trace\['i'\] must be \(T, B, H\) or \(T, H\), got"),
    ],
)
def test_bad_input(trace: Any, row: int, error: type[Exception], message: str) -> None:
    """What is no trace, and a row that it has not, are refused."""
    with pytest.raises(error, match=message):
        plot.gates(trace, row)


def test_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without matplotlib the extra to install is named."""
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r'pip install "fusedrnn\[plot\]"'):
        plot.gates({"i": X})
