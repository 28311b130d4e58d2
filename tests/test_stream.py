"""A stream's steps are the whole sequence; its state can be set, saved and loaded."""

from __future__ import annotations

import io
import re
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fusedrnn as fr

LAYERS = {
    "lstm": lambda **o: fr.LSTM(5, 18, rng=1, **o),
    "gru": lambda **o: fr.GRU(5, 18, rng=1, **o),
    "rnn": lambda **o: fr.RNN(5, 18, rng=1, **o),
    "stack": lambda **o: fr.LSTM(5, 18, num_layers=2, batch_first=True, rng=1, **o),
    "options": lambda **o: fr.LSTM(
        5, 18, proj_size=7, peephole=True, layer_norm=True, zoneout=0.1, clip=2, rng=1, **o
    ),
    "before": lambda **o: fr.GRU(5, 18, reset_after=False, recurrent_dropout=0.2, rng=1, **o),
}


def sequence(layer: Any, B: int | None, T: int = 6) -> np.ndarray:
    shape = (T, 5) if B is None else (T, B, 5)
    return np.random.default_rng(0).normal(size=shape).astype(layer.dtype)


def whole(layer: Any, x: np.ndarray, state: Any = None) -> tuple[np.ndarray, Any]:
    """The layer over x (T, …) at once."""
    swaps = layer.batch_first and x.ndim == 3
    y, end = layer(x.swapaxes(0, 1) if swaps else x, state)
    return y.swapaxes(0, 1) if swaps else y, end


def flat(state: Any) -> list[np.ndarray]:
    return list(state) if isinstance(state, tuple) else [state]


@pytest.mark.parametrize("B", [None, 1, 4])
@pytest.mark.parametrize("kind", LAYERS)
def test_steps_equal_the_sequence(kind: str, B: int | None, dtype: np.dtype, isa: str) -> None:
    """A stream's steps give the bits of the whole sequence."""
    layer = LAYERS[kind](dtype=dtype)
    x = sequence(layer, B)
    y, end = whole(layer, x)
    stream = fr.Stream(layer, B)
    np.testing.assert_array_equal(np.stack([stream.step(x_t) for x_t in x]), y)
    for a, b in zip(flat(stream.state), flat(end), strict=True):
        np.testing.assert_array_equal(a, b)


def test_reset_starts_rows_anew() -> None:
    """reset sets the state of all rows, or of those named, to zero."""
    layer = LAYERS["lstm"]()
    x = sequence(layer, 4)
    resets = np.zeros((6, 4), bool)
    resets[2, [1, 3]] = resets[4] = True
    y, _ = layer(x, resets=resets)
    stream, steps = fr.Stream(layer, 4), []
    for t, x_t in enumerate(x):
        if t == 2:
            stream.reset([1, 3])
        if t == 4:
            stream.reset()
        steps.append(stream.step(x_t))
    np.testing.assert_array_equal(np.stack(steps), y)
    stream.reset([])
    assert all((s != 0).any(axis=-1).all() for s in stream.state)
    stream.reset(np.array([True, False, False, True]))
    assert [bool((s[:, [0, 3]] == 0).all()) for s in stream.state] == [True, True]
    assert all((s[:, [1, 2]] != 0).any() for s in stream.state)


@pytest.mark.parametrize("kind", LAYERS)
def test_a_saved_stream_goes_on(kind: str, tmp_path: Path) -> None:
    """A stream that loads a saved state goes on as the one that saved it."""
    layer = LAYERS[kind]()
    x = sequence(layer, 3)
    stream = fr.Stream(layer, 3)
    for x_t in x[:3]:
        stream.step(x_t)
    stream.save(tmp_path / "state")
    memory = io.BytesIO()
    stream.save(memory)
    memory.seek(0)
    expected = [stream.step(x_t) for x_t in x[3:]]
    for file in (tmp_path / "state", memory):
        later = fr.Stream(layer, 3)
        later.load(file)
        np.testing.assert_array_equal([later.step(x_t) for x_t in x[3:]], expected)


def test_state_is_a_copy_both_ways() -> None:
    layer = LAYERS["gru"]()
    stream = fr.Stream(layer, 2)
    initial = np.ones((1, 2, 18), np.float32)
    stream.state = initial
    initial[:] = 7
    stream.state[:] = 8
    np.testing.assert_array_equal(stream.state, np.ones((1, 2, 18)))
    stream.state = None
    np.testing.assert_array_equal(stream.state, np.zeros((1, 2, 18)))


def refused(error: type[Exception], message: str) -> Any:
    return pytest.raises(error, match=re.escape(message))


def test_wrong_arguments_are_refused(tmp_path: Path) -> None:
    """Wrong arguments and damaged files are refused, and the state stays."""
    layer = LAYERS["lstm"]()
    with refused(TypeError, "layer must be an LSTM, GRU or RNN, got int"):
        fr.Stream(3)
    with refused(ValueError, "layer must run forward, got a bidirectional one"):
        fr.Stream(fr.GRU(3, 4, bidirectional=True))
    with refused(ValueError, "batch_size must be from 1"):
        fr.Stream(layer, 0)
    stream = fr.Stream(layer, 2)
    before = stream.state
    with refused(ValueError, "x must have shape (B, I) = (2, 5), got (5,)"):
        stream.step(np.zeros(5, np.float32))
    with refused(TypeError, "x must be float32 like the layer, got float64"):
        stream.step(np.zeros((2, 5)))
    with refused(IndexError, "rows must be from 0 to 1, got [2]"):
        stream.reset([2])
    with refused(TypeError, "rows must be integers or bool"):
        stream.reset([0.5])
    with refused(ValueError, "rows must have shape (B,) = (2,), got (3,)"):
        stream.reset(np.ones(3, bool))
    with refused(TypeError, "state must be a pair (h, c) or None"):
        stream.state = np.zeros((1, 2, 18), np.float32)
    with refused(ValueError, "state, c, must have shape (layers, B, H) = (1, 2, 18)"):
        stream.state = (np.zeros((1, 2, 18), np.float32), np.zeros((1, 3, 18), np.float32))
    (tmp_path / "text").write_text("no state")
    with refused(ValueError, "file must be one that Stream.save wrote"):
        stream.load(tmp_path / "text")
    stream.save(tmp_path / "cut")
    whole = (tmp_path / "cut").read_bytes()
    np.save(tmp_path / "array.npy", np.zeros(3))
    array = (tmp_path / "array.npy").read_bytes()
    for damaged in (b"", whole[: len(whole) // 2], whole[:3], array):
        with refused(ValueError, "file must be one that Stream.save wrote"):
            stream.load(io.BytesIO(damaged))
    np.savez(tmp_path / "pickled.npz", h=np.array([{}], object), c=np.zeros(1))
    with refused(ValueError, "file must be one that Stream.save wrote"):
        stream.load(tmp_path / "pickled.npz")
    other = fr.Stream(LAYERS["gru"](), 2)
    other.save(tmp_path / "gru")
    with refused(ValueError, "file must hold h, c, got h"):
        stream.load(tmp_path / "gru")
    fr.Stream(layer, 3).save(tmp_path / "three")
    with refused(ValueError, "h in file must have shape (layers, B, H) = (1, 2, 18)"):
        stream.load(tmp_path / "three")
    with pytest.raises(FileNotFoundError):
        stream.load(tmp_path / "nowhere")
    for a, b in zip(stream.state, before, strict=True):
        np.testing.assert_array_equal(a, b)


def npz(method: int = zipfile.ZIP_STORED, **arrays: np.ndarray) -> bytes:
    """An .npz whose members are compressed by a method."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as archive:
        for name, array in arrays.items():
            member = io.BytesIO()
            np.save(member, array)
            archive.writestr(f"{name}.npy", member.getvalue())
    return file.getvalue()


def test_damaged_and_hostile_files_are_refused() -> None:
    """Whatever a file holds is a ValueError, and no memory is taken for what it claims."""
    stream = fr.Stream(LAYERS["gru"](), 2)
    state = stream.state
    methods = (zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)
    for whole in (npz(method, h=state + 1) for method in methods):
        stream.load(io.BytesIO(whole))
        assert (stream.state == 1).all()
        at = whole.index(b"h.npy") + 5  # the compressed data
        wrong = whole[:at] + bytes(255 - b for b in whole[at : at + 12]) + whole[at + 12 :]
        with refused(ValueError, "file must be one that Stream.save wrote"):
            stream.load(io.BytesIO(wrong))
    plain = npz(h=state)
    entry = plain.index(b"PK\x01\x02")
    for offset, value in ((8, 1), (8, 64), (10, 99)):  # encrypted, strongly, unknown method
        wrong = plain[: entry + offset] + bytes([value]) + plain[entry + offset + 1 :]
        with refused(ValueError, "file must be one that Stream.save wrote"):
            stream.load(io.BytesIO(wrong))
    tracemalloc.start()
    bomb = npz(zipfile.ZIP_DEFLATED, h=np.zeros((1, 2, 2_000_000), np.float32))
    tracemalloc.reset_peak()
    with refused(ValueError, "h in file must have shape (layers, B, H) = (1, 2, 18)"):
        stream.load(io.BytesIO(bomb))
    header, claim = io.BytesIO(), io.BytesIO()
    shape = {"descr": "<f4", "fortran_order": False, "shape": (1, 2, 10**9)}
    np.lib.format.write_array_header_1_0(header, shape)
    with zipfile.ZipFile(claim, "w") as archive:
        archive.writestr("h.npy", header.getvalue())
    with refused(ValueError, "h in file must have shape (layers, B, H) = (1, 2, 18)"):
        stream.load(claim)
    assert tracemalloc.get_traced_memory()[1] < len(bomb) + 2_000_000
    tracemalloc.stop()
    assert (stream.state == 1).all()
