"""A layer one step at a time, its state inside: for speech and control."""

from __future__ import annotations

import os
from typing import Any
from zipfile import BadZipFile

import numpy as np
import numpy.typing as npt

from . import checks
from .layers import _Layer
from .reference import Array


class Stream:
    """Run a layer one step at a time, as `torch.nn.LSTMCell` in a loop but with any layer.

    Steps equal the whole sequence at once bit for bit, on one machine and ISA, zoneout taking
    its expected value as in any inference. Not safe from several threads at once.

    Parameters
    ----------
    layer: an `LSTM`, `GRU` or `RNN` on the CPU that goes one way.
    batch_size: B, or None for one sequence without a batch axis.

    Attributes
    ----------
    state: what the layer calls so; assign one to go on from there, None to start anew.

    Raises
    ------
    TypeError: layer is none. ValueError: it goes both ways, or is on a GPU.

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
        if layer.bidirectional:
            raise ValueError("layer must go one way: the other needs the end of the sequence")
        if layer.device != "cpu":
            raise ValueError(f"layer must be on the CPU, got one on {layer.device}")
        self.layer = layer
        self.batch_size = (
            None if batch_size is None else checks.positive("batch_size", batch_size)
        )
        self._state: tuple[Array, ...] = self._zeros()

    def _zeros(self) -> tuple[Array, ...]:
        shapes = self.layer._state_shapes(self.batch_size or 1)
        return tuple(np.zeros(shape, self.layer.dtype) for shape in shapes)

    @property
    def state(self) -> Any:
        """The state as the layer gives and takes it; a copy."""
        views = [s[:, 0] if self.batch_size is None else s for s in self._state]
        copies = tuple(v.copy() for v in views)
        return copies if len(copies) > 1 else copies[0]

    @state.setter
    def state(self, value: Any) -> None:
        if value is None:
            self._state = self._zeros()
            return
        letters = self.layer._cell.states
        self._state = tuple(
            self._checked(letter, given, expected.shape)
            for letter, given, expected in zip(
                letters, self.layer._split_state("state", value), self._zeros(), strict=True
            )
        )

    def _checked(self, letter: str, value: Any, shape: tuple[int, ...]) -> Array:
        array = checks.array(f"state, {letter},", value, self.layer.dtype)
        expected, axes = shape, "(layers, B, H)"
        if self.batch_size is None:
            expected, axes = shape[::2], "(layers, H)"
        checks.shape(f"state, {letter},", array, expected, axes)
        copy: Array = np.array(array, order="C").reshape(shape)
        return copy

    def step(self, x: Array) -> Array:
        """Take one step and return h of the last layer.

        Parameters
        ----------
        x: (B, I), or (I,) without a batch axis, of the layer's dtype.

        Returns
        -------
        y: (B, H) or (H,), of R units with proj_size.

        Raises
        ------
        TypeError: a wrong dtype. ValueError: a wrong shape. The state is then as it was.
        """
        x = checks.array("x", x, self.layer.dtype)
        I = self.layer.input_size
        if self.batch_size is None:
            checks.shape("x", x, (I,), "(I,)")
            x = x[None]
        else:
            checks.shape("x", x, (self.batch_size, I), "(B, I)")
        state = self._state if len(self._state) > 1 else self._state[0]
        one = x[:, None] if self.layer.batch_first else x[None]
        y, after = self.layer(one, state)[:2]
        self._state = after if isinstance(after, tuple) else (after,)
        y = y[:, 0] if self.layer.batch_first else y[0]
        return y[0] if self.batch_size is None else y  # type: ignore[no-any-return]

    def reset(self, rows: npt.ArrayLike | None = None) -> None:
        """Start rows anew, their state 0.

        Parameters
        ----------
        rows: indices or (B,) bool, or None for all.

        Raises
        ------
        TypeError: rows are neither. IndexError: there is no such row.
        """
        if rows is None:
            self._state = self._zeros()
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
        fresh = tuple(s.copy() for s in self._state)
        for s in fresh:
            s[:, chosen] = 0
        self._state = fresh

    def save(self, file: str | os.PathLike[str] | Any) -> None:
        """Save the state as an .npz, without pickle.

        Parameters
        ----------
        file: a path, or a file open for writing bytes.
        """
        names: dict[str, Any] = dict(zip(self.layer._cell.states, self._state, strict=True))
        if isinstance(file, (str, os.PathLike)):
            with open(file, "wb") as opened:  # savez would add a suffix to the name
                np.savez(opened, **names)
        else:
            np.savez(file, **names)

    def load(self, file: str | os.PathLike[str] | Any) -> None:
        """Go on from a state that `save` wrote.

        Raises
        ------
        ValueError: it is of another layer or batch, or no such file. The state then stays.
        """
        try:
            with np.load(file, allow_pickle=False) as saved:
                found = {name: saved[name] for name in saved.files}
        except FileNotFoundError:
            raise
        except (ValueError, OSError, EOFError, TypeError, AttributeError, BadZipFile) as error:
            raise ValueError(f"file must be one that Stream.save wrote: {error}") from None
        letters = self.layer._cell.states
        if set(found) != set(letters):
            raise ValueError(
                f"file must hold {', '.join(letters)}, got {', '.join(found) or 'nothing'}"
            )
        expected = self._zeros()
        for letter, zeros in zip(letters, expected, strict=True):
            checks.shape(f"{letter} in file", found[letter], zeros.shape, "(layers, B, H)")
            if found[letter].dtype != zeros.dtype:
                raise ValueError(
                    f"{letter} in file must be {zeros.dtype}, got {found[letter].dtype}"
                )
        self._state = tuple(found[letter] for letter in letters)
