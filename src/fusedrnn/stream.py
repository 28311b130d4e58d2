"""A layer one step at a time, its state inside: for speech and control."""

from __future__ import annotations

import os
from typing import Any
from zipfile import BadZipFile

import numpy as np
import numpy.typing as npt

from . import checks, cuda
from .engine import split_state
from .layers import _Layer
from .parameters import placed
from .reference import Array


class Stream:
    """Run a layer one step at a time, as `torch.nn.LSTMCell` in a loop but with any layer.

    On the CPU steps equal the whole sequence at once bit for bit, on one machine and ISA.
    zoneout takes its expected value, as in any inference. Not safe from several threads at
    once.

    Parameters
    ----------
    layer: an `LSTM`, `GRU` or `RNN` that goes one way. On a GPU the state stays there; steps
        never wait for it, while reading ``state`` or saving it does.
    batch_size: B, or None for one sequence without a batch axis.

    Attributes
    ----------
    state: what the layer calls so; assign one to go on from there, None to start anew.

    Raises
    ------
    TypeError: layer is none. ValueError: it goes both ways.

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
        self.layer = layer
        self.batch_size = (
            None if batch_size is None else checks.positive("batch_size", batch_size)
        )
        self._state: tuple[Any, ...] | None = None  # as the layer left it; None for zeros
        self._fresh: Array | None = None  # (B,) the rows that start anew in the next step

    def __repr__(self) -> str:
        return f"Stream({self.layer!r}, batch_size={self.batch_size})"

    @property
    def _dtype(self) -> np.dtype[Any]:
        """That of the state."""
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
            if self._fresh is not None:
                s[:, self._fresh] = 0
        return copies

    def _go_on_from(self, state: tuple[Any, ...] | None) -> None:
        self._state, self._fresh = state, None

    @property
    def state(self) -> Any:
        """The state as the layer gives and takes it; a copy."""
        given = [s[:, 0] if self.batch_size is None else s for s in self._on_host()]
        if self.layer.device != "cpu":
            given = [placed(s, str(self._dtype), self.layer.device) for s in given]
        return tuple(given) if len(given) > 1 else given[0]

    @state.setter
    def state(self, value: Any) -> None:
        if value is None:
            self._go_on_from(None)
            return
        split = zip(
            self.layer._cell.states,
            split_state("state", self.layer._cell, value),
            self._shapes(),
            strict=True,
        )
        self._go_on_from(tuple([self._checked(*one) for one in split]))

    def _checked(self, letter: str, value: Any, shape: tuple[int, ...]) -> Any:
        name, device = f"state, {letter},", self.layer.device
        framework = cuda.framework_of(value)
        on_host = framework is None or device == "cpu"
        array = checks.array(name, value, self._dtype) if on_host else value
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

    def step(self, x: Any) -> Any:
        """Take one step and return h of the last layer.

        Parameters
        ----------
        x: (B, I), or (I,) without a batch axis, of the layer's dtype and where it is.

        Returns
        -------
        y: (B, H) or (H,), of R units with proj_size.

        Raises
        ------
        TypeError: a wrong dtype. ValueError: a wrong shape or device. The state is then as it
            was.
        """
        layer, batch_first = self.layer, self.layer.batch_first
        if not isinstance(x, np.ndarray) and cuda.framework_of(x) is None:
            x = checks.array("x", x)
        if self.batch_size is None:
            checks.shape("x", x, (layer.input_size,), "(I,)")
            x = x[None]
        else:
            checks.shape("x", x, (self.batch_size, layer.input_size), "(B, I)")
        state, resets = self._state, self._fresh
        if state is not None and len(state) == 1:
            state = state[0]
        if resets is not None:
            resets = resets[:, None] if batch_first else resets[None]
        one = x[:, None] if batch_first else x[None]
        y, after = layer(one, state, resets=resets)[:2]
        self._state, self._fresh = after if isinstance(after, tuple) else (after,), None
        y = y[:, 0] if batch_first else y[0]
        return y[0] if self.batch_size is None else y

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
            self._go_on_from(None)
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
        fresh = np.zeros(B, bool) if self._fresh is None else self._fresh.copy()
        fresh[chosen] = True
        self._fresh = fresh

    def save(self, file: str | os.PathLike[str] | Any) -> None:
        """Save the state as an .npz, without pickle.

        Parameters
        ----------
        file: a path, or a file open for writing bytes.
        """
        names: dict[str, Any] = dict(zip(self.layer._cell.states, self._on_host(), strict=True))
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
        for letter, shape in zip(letters, self._shapes(), strict=True):
            checks.shape(f"{letter} in file", found[letter], shape, "(layers, B, H)")
            if found[letter].dtype != self._dtype:
                raise ValueError(
                    f"{letter} in file must be {self._dtype}, got {found[letter].dtype}"
                )
        where = (str(self._dtype), self.layer.device)
        self._go_on_from(tuple([placed(found[letter], *where) for letter in letters]))
