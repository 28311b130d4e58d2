"""A layer that runs one step at a time and keeps its state, for speech and control."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from zipfile import ZipFile

import numpy as np
import numpy.typing as npt

from . import checks, cuda
from .engine import split_state
from .files import replacing
from .layers import _Layer
from .options import MaskedOutput
from .parameters import placed
from .reference import Array


class Stream:
    """Run a layer one step at a time, like `torch.nn.LSTMCell` in a loop, but with any layer.

    On the CPU, steps give the same bits as one call on the whole sequence, on one machine and
    ISA. Zoneout takes its expected value, as in any inference. Only one thread at a time may
    use a stream.

    Parameters
    ----------
    layer: an `LSTM`, `GRU` or `RNN` that runs forward. On a GPU the state stays there; steps
        never wait for the GPU, but reading ``state`` or saving it does.
    batch_size: B, or None for one sequence without a batch axis.

    Attributes
    ----------
    state: the layer's state; assign one to continue from it, or None to start from zeros.

    Raises
    ------
    TypeError: layer is not a layer. ValueError: it is bidirectional or reverse.

    >>> import numpy as np, fusedrnn as fr
    >>> lstm = fr.LSTM(3, 4, rng=0)
    >>> stream = fr.Stream(lstm, batch_size=2)
    >>> x = np.random.default_rng(0).normal(size=(5, 2, 3)).astype(np.float32)
    >>> steps = np.stack([stream.step(x_t) for x_t in x])
    >>> bool((steps == lstm(x)[0]).all())
    True
    """

    def __init__(self, layer: Any, batch_size: int | None = 1) -> None:
        if not isinstance(layer, _Layer):
            raise TypeError(f"layer must be an LSTM, GRU or RNN, got {type(layer).__name__}")
        if layer.bidirectional or layer.reverse:
            kind = "bidirectional" if layer.bidirectional else "reverse"
            raise ValueError(
                f"layer must run forward, got a {kind} one, which needs the end of the sequence"
            )
        self.layer = layer
        self.batch_size = (
            None if batch_size is None else checks.positive("batch_size", batch_size)
        )
        self._state: tuple[Any, ...] | None = None  # after the last step; None for zeros
        self._reset_rows: Array | None = None  # (B,) bool, rows that start from 0 next

    def __repr__(self) -> str:
        return f"Stream({self.layer!r}, batch_size={self.batch_size})"

    @property
    def _dtype(self) -> np.dtype[Any]:
        """The dtype of the state."""
        return np.dtype("float64" if self.layer.dtype == "float64" else "float32")

    def _shapes(self) -> list[tuple[int, ...]]:
        spec, batch = self.layer._spec, (self.batch_size or 1,)
        widths = (spec.R, spec.H)[: len(spec.cell.states)]
        return [spec.state_shape(batch, width) for width in widths]

    def _on_host(self) -> list[Array]:
        """Return copies of the state on the host."""
        if self._state is None:
            return [np.zeros(shape, self._dtype) for shape in self._shapes()]
        copies = [cuda.on_host(s) for s in self._state]
        for s in copies:
            if self._reset_rows is not None:
                s[:, self._reset_rows] = 0
        return copies

    def _continue_from(self, state: tuple[Any, ...] | None) -> None:
        self._state, self._reset_rows = state, None

    @property
    def state(self) -> Any:
        """A copy of the state, in the form that the layer takes and returns."""
        copies = [s[:, 0] if self.batch_size is None else s for s in self._on_host()]
        if self.layer.device != "cpu":
            copies = [placed(s, str(self._dtype), self.layer.device) for s in copies]
        return tuple(copies) if len(copies) > 1 else copies[0]

    @state.setter
    def state(self, value: Any) -> None:
        if value is None:
            self._continue_from(None)
            return
        split = zip(
            self.layer._cell.states,
            split_state("state", self.layer._cell, value),
            self._shapes(),
            strict=True,
        )
        self._continue_from(tuple([self._checked(*part) for part in split]))

    def _checked(self, letter: str, value: Any, shape: tuple[int, ...]) -> Any:
        name, device = f"state, {letter},", self.layer.device
        framework = cuda.framework_of(value)
        on_host = framework is None or device == "cpu"
        array = checks.array(name, value, self._dtype, "the layer") if on_host else value
        expected, axes = shape, "(layers, B, H)"
        if self.batch_size is None:
            expected, axes = shape[::2], "(layers, H)"
        checks.shape(name, array, expected, axes)
        copy = (
            placed(array, str(self._dtype), device)
            if framework is None
            else cuda.copy_of(name, array, framework, str(self._dtype), device)
        )
        return copy[:, None] if self.batch_size is None else copy

    def step(
        self,
        x: Any,
        mask: npt.ArrayLike | None = None,
        *,
        masked_output: MaskedOutput = "zero",
    ) -> Any:
        """Take one step and return h of the last layer.

        Parameters
        ----------
        x: (B, I), or (I,) without a batch axis, of the layer's dtype and on its device.
        mask: (B,) bool, or one bool without a batch axis: the rows that take the step. The
            state of the others stays. None for all.
        masked_output: y of the others: "zero", or "last" for h of their state.

        Returns
        -------
        y: (B, H) or (H,); with proj_size, of R units.

        Raises
        ------
        TypeError: a wrong dtype. ValueError: a wrong shape or device. Neither changes the
            state.
        """
        layer, batch_first = self.layer, self.layer.batch_first
        if not isinstance(x, np.ndarray) and cuda.framework_of(x) is None:
            x = checks.array("x", x)
        if self.batch_size is None:
            checks.shape("x", x, (layer.input_size,), "(I,)")
            x = x[None]
        else:
            checks.shape("x", x, (self.batch_size, layer.input_size), "(B, I)")
        if mask is not None and self._reset_rows is not None:
            self.state = self.state  # rows that do not take this step are reset, too
        state, resets = self._state, self._reset_rows
        if state is not None and len(state) == 1:
            state = state[0]
        if resets is not None:
            resets = resets[:, None] if batch_first else resets[None]
        sequence = x[:, None] if batch_first else x[None]
        if mask is not None:
            rows = () if self.batch_size is None else (self.batch_size,)
            taken = checks.flags("mask", mask, rows, "(B,)" if rows else "of one flag")
            mask = taken.reshape(-1, 1) if batch_first else taken.reshape(1, -1)
        y, after = layer(sequence, state, None, resets, mask, masked_output=masked_output)[:2]
        self._state, self._reset_rows = after if isinstance(after, tuple) else (after,), None
        y = y[:, 0] if batch_first else y[0]
        return y[0] if self.batch_size is None else y

    def reset(self, rows: npt.ArrayLike | None = None) -> None:
        """Set the state of some rows to 0.

        Parameters
        ----------
        rows: indices or (B,) bool, or None for all.

        Raises
        ------
        TypeError: rows are neither integers nor bool. IndexError: a row is out of range.
        """
        if rows is None:
            self._continue_from(None)
            return
        chosen = checks.as_array("rows", rows)
        if chosen.size == 0:
            return
        if chosen.dtype.kind not in "iub":
            raise TypeError(f"rows must be integers or bool, got {chosen.dtype}")
        B = self.batch_size or 1
        if chosen.dtype == bool:
            checks.shape("rows", chosen, (B,), "(B,)")
        elif chosen.min() < 0 or chosen.max() >= B:
            raise IndexError(f"rows must be from 0 to {B - 1}, got {rows}")
        reset = np.zeros(B, bool) if self._reset_rows is None else self._reset_rows.copy()
        reset[chosen] = True
        self._reset_rows = reset

    def save(self, file: str | os.PathLike[str] | Any) -> None:
        """Save the state as an .npz, without pickle.

        Parameters
        ----------
        file: a path, or a file open for writing bytes. The file of a path is replaced as a
            whole, or not at all.

        Raises
        ------
        OSError: the file cannot be written.
        """
        names: dict[str, Any] = dict(zip(self.layer._cell.states, self._on_host(), strict=True))
        if isinstance(file, (str, os.PathLike)):
            written = io.BytesIO()
            np.savez(written, **names)
            with replacing(file) as temporary:
                temporary.write_bytes(written.getbuffer())
        else:
            np.savez(file, **names)

    def load(self, file: str | os.PathLike[str] | Any) -> None:
        """Continue from a state that `save` wrote.

        Raises
        ------
        ValueError: the state is that of another layer or batch size, or `save` did not write
            the file. The state does not change then.
        """
        letters, count = self.layer._cell.states, len(self.layer._cell.states)
        with _opened(file) as archive:
            names = [name.removesuffix(".npy") for name in archive.namelist()]
            headers = [_header(archive, name) for name in names[: count + 1]]
        if sorted(names) != sorted(letters):
            raise ValueError(
                f"file must hold {', '.join(letters)}, "
                f"got {', '.join(names[: count + 1]) or 'nothing'}"
            )
        saved = dict(zip(names, headers, strict=True))
        for letter, expected in zip(letters, self._shapes(), strict=True):
            checks.shape(f"{letter} in file", saved[letter], expected, "(layers, B, H)")
            dtype = saved[letter].dtype
            if dtype != self._dtype:
                raise ValueError(f"{letter} in file must be {self._dtype}, got {dtype}")
        with _opened(file) as archive:
            states = [_array(archive, letter) for letter in letters]
        where = (str(self._dtype), self.layer.device)
        self._continue_from(tuple([placed(state, *where) for state in states]))


class _Header(NamedTuple):
    """The shape and dtype of an array in a file, known before its values are read."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]


@contextmanager
def _opened(file: Any) -> Iterator[ZipFile]:
    """Open an .npz; whatever is wrong with it is a ValueError."""
    try:
        with ZipFile(file) as archive:
            yield archive
    except FileNotFoundError:
        raise
    except Exception as error:  # of zipfile, its decompressors and NumPy
        raise ValueError(f"file must be one that Stream.save wrote: {error}") from None


def _header(archive: ZipFile, name: str) -> _Header:
    with archive.open(f"{name}.npy") as member:
        version = np.lib.format.read_magic(member)
        if version != (1, 0):
            raise ValueError(f"version {version} of .npy")
        shape, _, dtype = np.lib.format.read_array_header_1_0(member)
    if dtype.hasobject:
        raise ValueError(f"{name} is an array of objects")
    return _Header(shape, dtype)


def _array(archive: ZipFile, name: str) -> Array:
    with archive.open(f"{name}.npy") as member:
        array: Array = np.lib.format.read_array(member, allow_pickle=False)
    return array
