"""Layers that own their parameters: stacking, directions, states, packed weights.

Parameter names, shapes, order and initialisation are PyTorch's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from . import checks, cuda
from .cells import CELLS, Cell
from .cuda import Precision
from .device import backend_of
from .functional import rnn_cell
from .kernel import FEW_ROWS, HOST
from .reference import Array, Nonlinearity

StateT = TypeVar("StateT")
LayerT = TypeVar("LayerT", bound="_Layer[Any]")


# Attributes that the parameters' shapes or the calls depend on, and prefixes of parameters.
_FIXED = (
    "input_size",
    "hidden_size",
    "num_layers",
    "nonlinearity",
    "bias",
    "batch_first",
    "bidirectional",
    "dtype",
    "device",
    "precision",
)
_KINDS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
_PARAMETERS = tuple(f"{kind}_l" for kind in _KINDS)


def _on_host(value: Any) -> Array:
    """Return a parameter's values; a GPU is waited for."""
    return value.numpy() if isinstance(value, cuda.Array) else value


def _placed(array: Array, dtype: str, place: str) -> Any:
    """Return a copy of a host's array on the CPU or a GPU, not to be written to."""
    if place != "cpu":
        return cuda.array(array, dtype, int(place.partition(":")[2]))
    copy: Array = array.astype(dtype, order="C")
    copy.flags.writeable = False
    return copy


class LayerGrads(NamedTuple, Generic[StateT]):
    """What a layer's pullback returns.

    Attributes
    ----------
    x: shaped like the input.
    state: shaped like the state that goes in: h0, or (h0, c0) for an LSTM.
    parameters: a dict with the keys and shapes of `state_dict`.
    """

    x: Array
    state: StateT
    parameters: dict[str, Array]


class _Layer(Generic[StateT]):
    """What LSTM, GRU and RNN share. `_cell` decides the rest."""

    _cell: Cell
    _parameters: dict[str, Any]  # arrays of NumPy or, on a GPU, of `cuda`
    _packed: dict[tuple[str, bool], Any]
    _is_simple: bool  # the kernels take a call as it comes
    dtype: Any  # np.dtype or, on a GPU, its name

    def __init__(
        self,
        cell: Cell,
        input_size: int,
        hidden_size: int,
        num_layers: int,
        bias: bool,
        batch_first: bool,
        bidirectional: bool,
        dtype: npt.DTypeLike,
        rng: np.random.Generator | int | None,
    ) -> None:
        self._cell = cell
        self._parameters = {}
        self._packed = {}
        self.input_size = checks.positive("input_size", input_size)
        self.hidden_size = checks.positive("hidden_size", hidden_size)
        self.num_layers = checks.positive("num_layers", num_layers)
        self.bias = checks.flag("bias", bias)
        self.batch_first = checks.flag("batch_first", batch_first)
        self.bidirectional = checks.flag("bidirectional", bidirectional)
        self.dtype = np.dtype(dtype)
        if self.dtype not in checks.DTYPES:
            raise TypeError(f"dtype must be float32 or float64, got {self.dtype}")
        self.device = "cpu"
        self.precision: Precision = "exact"
        self._is_simple = self._has_simple_calls()
        generator = np.random.default_rng(rng)
        bound = self.hidden_size**-0.5
        for name, shape in self._shapes().items():
            value = generator.uniform(-bound, bound, shape)
            self._parameters[name] = _placed(value, str(self.dtype), self.device)

    # Parameters

    def _directions(self) -> Iterator[tuple[int, int, str]]:
        """Yield (layer, direction, the suffix of its parameters' names)."""
        for layer in range(self.num_layers):
            for direction in range(1 + self.bidirectional):
                yield layer, direction, f"l{layer}" + "_reverse" * direction

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        H = self.hidden_size
        shapes: dict[str, tuple[int, ...]] = {}
        for layer, _, suffix in self._directions():
            I = self.input_size if layer == 0 else H * (1 + self.bidirectional)
            of_kinds = zip(_KINDS, self._cell.parameter_shapes(I, H), strict=True)
            for kind, shape in of_kinds:
                if self.bias or kind.startswith("weight"):
                    shapes[f"{kind}_{suffix}"] = shape
        return shapes

    def to(
        self: LayerT,
        device: str,
        dtype: npt.DTypeLike | str | None = None,
        precision: Precision = "exact",
    ) -> LayerT:
        """Move the layer to a GPU or back, and return it.

        Parameters
        ----------
        device: "cpu", "cuda" (the first GPU) or "cuda:1" and so on. On a GPU, parameters are
            `fusedrnn.cuda.Array`s, and x and states must be arrays there.
        dtype: what parameters become: float32 or float64; on a GPU bfloat16 or float16, too.
            None leaves it, but makes it float32 on the CPU.
        precision: "tf32" lets a GPU's matrix units multiply float32, rounded to 10 bits.

        Raises
        ------
        TypeError, ValueError: an argument of a wrong type or value. RuntimeError: no GPU can
            be used. MemoryError: it is full. The layer is then as it was.

        >>> import fusedrnn as fr
        >>> fr.LSTM(3, 4).to("cuda" if fr.cuda.is_available() else "cpu").hidden_size
        4
        """
        place, name = self._place(device, dtype)
        cuda.check_precision(precision)
        if precision != "exact" and place == "cpu":
            raise ValueError(f'precision must be "exact" on the CPU, got "{precision}"')
        cuda.precision_of(name, precision)
        values = {k: _on_host(v) for k, v in self._parameters.items()}
        moved = {k: _placed(v, name, place) for k, v in values.items()}
        self.__dict__.update(
            device=place,
            dtype=np.dtype(name) if place == "cpu" else name,
            precision=precision,
            _is_simple=place == "cpu" and self._has_simple_calls(),
        )
        self._parameters.update(moved)
        self._forget_packed()
        return self

    def _place(self, device: Any, dtype: Any) -> tuple[str, str]:
        """Check where to move to; return its name and that of the dtype there."""
        if not isinstance(device, str):
            raise TypeError(f"device must be a string, got {type(device).__name__}")
        kind, _, number = device.partition(":")
        on_cpu = device == "cpu"
        if not on_cpu and (kind != "cuda" or (":" in device and not number.isdecimal())):
            raise ValueError(f'device must be "cpu", "cuda" or "cuda:<number>", got {device!r}')
        if not on_cpu:
            cuda.check_device(int(number or 0))
        known = ("float32", "float64") if on_cpu else cuda.DTYPES
        name = str(self.dtype) if dtype is None else cuda.dtype_name(dtype)
        if dtype is None and name not in known:
            name = "float32"
        if name not in known:
            raise TypeError(f"dtype must be one of {', '.join(known)}, got {name}")
        return device if on_cpu else f"cuda:{int(number or 0)}", name

    def _has_simple_calls(self) -> bool:
        return self.num_layers == 1 and not (self.batch_first or self.bidirectional)

    def state_dict(self) -> dict[str, Any]:
        """Return the parameters by torch's names; the arrays are the layer's, read-only."""
        return dict(self._parameters)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over every parameter; nothing changes unless all names and shapes fit.

        Parameters
        ----------
        state_dict: arrays (or what NumPy can see as such: CPU tensors) of float32 or float64
            by torch's names, converted to the layer's dtype and copied.

        Raises
        ------
        KeyError: names are missing or unknown. TypeError, ValueError: a wrong dtype, shape.
        """
        missing = [name for name in self._parameters if name not in state_dict]
        unknown = [name for name in state_dict if name not in self._parameters]
        if missing or unknown:
            raise KeyError(
                f"state_dict must have the layer's names: missing {missing}, unknown {unknown}"
            )
        self._parameters.update(
            {name: self._checked(name, value) for name, value in state_dict.items()}
        )
        self._forget_packed()

    def _checked(self, name: str, value: Any) -> Any:
        """Return a copy of a new parameter where the layer is."""
        framework = cuda.framework_of(value)
        array = checks.array(name, value) if framework is None else value
        expected = self._parameters[name].shape
        checks.shape(
            name, array, expected, "(rows, columns)" if len(expected) == 2 else "(rows,)"
        )
        if framework is not None:
            return cuda.copy_of(name, array, framework, self.dtype, self.device)
        return _placed(array, str(self.dtype), self.device)

    def __getattr__(self, name: str) -> Any:
        parameters = self.__dict__.get("_parameters", {})
        if name in parameters:
            return parameters[name]
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")

    def __setattr__(self, name: str, value: Any) -> None:
        parameters = self.__dict__.get("_parameters", {})
        if name in parameters:
            parameters[name] = self._checked(name, value)
            self._forget_packed()
        elif parameters and (name in _FIXED or name.startswith(_PARAMETERS)):
            what = (
                "is fixed when the layer is made" if name in _FIXED else "is no parameter of it"
            )
            raise AttributeError(f"{name} {what}: {self!r}")
        else:
            object.__setattr__(self, name, value)

    def __getstate__(self) -> dict[str, Any]:
        parameters = {k: _on_host(v) for k, v in self._parameters.items()}
        cell = self._cell.name
        return {**self.__dict__, "_cell": cell, "_parameters": parameters, "_packed": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _cell=CELLS[state["_cell"]])
        self._parameters = {
            k: _placed(v, str(self.dtype), self.device) for k, v in state["_parameters"].items()
        }

    def __repr__(self) -> str:
        extra = [f"{self.input_size}, {self.hidden_size}"]
        defaults = {
            "num_layers": 1,
            "nonlinearity": "tanh",
            "bias": True,
            "batch_first": False,
            "bidirectional": False,
        }
        for name, default in defaults.items():
            if getattr(self, name, default) != default:
                extra.append(f"{name}={getattr(self, name)}")
        if self.dtype != "float32":
            extra.append(f"dtype={self.dtype}")
        if self.device != "cpu":
            extra.append(f"device={self.device}")
        return f"{type(self).__name__}({', '.join(extra)})"

    def _of(self, suffix: str) -> tuple[Array, Array, Array | None, Array | None]:
        get = self._parameters.get
        return (
            self._parameters[f"weight_ih_{suffix}"],
            self._parameters[f"weight_hh_{suffix}"],
            get(f"bias_ih_{suffix}"),
            get(f"bias_hh_{suffix}"),
        )

    def _forward_weights(self, on: Any, suffix: str) -> Any:
        """Return the packed weights, packing them on first use."""
        return self._pack_once(on, suffix, None)

    def _backward_weights(self, on: Any, suffix: str, forward: Any, rows: int) -> Any:
        if rows <= FEW_ROWS and on is HOST:
            return on.pack(self._cell, *self._of(suffix), forward, borrow=True)
        return self._pack_once(on, suffix, forward)

    def _pack_once(self, on: Any, suffix: str, forward: Any) -> Any:
        cache = self._packed  # before the parameters are read: see _forget_packed
        key = (suffix, forward is not None)
        packed = cache.get(key)
        if packed is None or (forward is not None and packed.isa != forward.isa):
            on.check_may_keep()
            parameters = (None if p is None else on.see(p) for p in self._of(suffix))
            packed = on.pack(self._cell, *parameters, forward)
            cache[key] = packed
        return packed

    def _forget_packed(self) -> None:
        """Start a new cache: a thread that is packing old parameters fills the old one."""
        self._packed = {}

    # Calls

    def _input(self, x: Any) -> tuple[Any, Any, bool]:
        """Return where to run, x as (T, B, I), and whether it came without B."""
        on = backend_of(x, self.precision if cuda.framework_of(x) else "exact")
        if str(on) != self.device:
            raise ValueError(f"x must be on {self.device} like the layer, got one on {on}")
        x = on.array("x", x)
        checks.sequence(x, "(B, T, I)" if self.batch_first else "(T, B, I)", self.input_size)
        if x.dtype != self.dtype:
            raise TypeError(f"x must be {self.dtype} like the layer, got {x.dtype}")
        return on, self._time_major(x), x.ndim == 2

    def _time_major(self, a: Any) -> Any:
        if a.ndim == 2:
            return a[:, None]
        return a.swapaxes(0, 1) if self.batch_first else a

    def _state(
        self, on: Any, name: str, value: Any, shape: tuple[int, ...], copy: bool = False
    ) -> Any:
        """Check a state or its gradient; shape is (layers·directions, B, H) or without B."""
        state = on.state(name, value, on.state_dtype(self.dtype), copy)
        axes = "(layers*directions, B, H)" if len(shape) == 3 else "(layers*directions, H)"
        checks.shape(name, state, shape, axes)
        return state if len(shape) == 3 else state[:, None]

    def _masks(self, on: Any, lengths: Any, resets: Any, x: Any, unbatched: bool) -> Any:
        """Check the masks of x (T, B, I)."""
        T, B, _ = x.shape
        if lengths is not None:
            lengths = on.lengths(lengths, T, () if unbatched else (B,))
        if resets is not None:
            axes = "(T,)" if unbatched else "(B, T)" if self.batch_first else "(T, B)"
            seen = self._user_sequence(x, unbatched).shape[:-1]
            resets = on.resets(resets, seen, axes)
            resets = self._time_major(resets[..., None])[..., 0]
        return on.masks(lengths, resets)

    def _state_shape(self, x: Any, unbatched: bool) -> tuple[int, ...]:
        count = self.num_layers * (1 + self.bidirectional)
        return (count, *(() if unbatched else (x.shape[1],)), self.hidden_size)

    def _run(
        self, x: Any, states: tuple[Any, ...], lengths: Any, resets: Any, save: bool
    ) -> tuple[Any, Any, tuple[Any, ...], list[Any], bool]:
        on, seen, unbatched = self._input(x)
        T, B, _ = seen.shape
        H, D = self.hidden_size, 1 + self.bidirectional
        shape = self._state_shape(seen, unbatched)
        letters = self._cell.states
        state_dtype = on.state_dtype(self.dtype)
        start = tuple(
            on.zeros((self.num_layers * D, B, H), state_dtype)
            if value is None
            else self._state(on, f"{letter}0", value, shape, copy=save)
            for letter, value in zip(letters, states, strict=True)
        )
        masks = self._masks(on, lengths, resets, seen, unbatched)
        final = tuple(on.empty((self.num_layers * D, B, H), state_dtype) for _ in letters)
        ends = tuple(map(on.see, final))
        tapes = []
        for layer, direction, suffix in self._directions():
            if direction == 0:
                below = seen
                last = layer == self.num_layers - 1
                y = self._empty(on, T, B, D * H, last and not unbatched)
                seen = on.see(y)
            mine = seen[..., direction * H : (direction + 1) * H] if D > 1 else seen
            at = layer * D + direction
            weights = self._forward_weights(on, suffix)
            own_start = tuple(None if s is None else s[at] for s in start)
            own_final = tuple(s[at] for s in ends)
            reverse = direction == 1
            saved = on.forward(weights, below, own_start, masks, reverse, mine, own_final, save)
            if save:
                back = self._backward_weights(on, suffix, weights, T * B)
                tapes.append(
                    on.tape(self._cell, back, below, own_start, masks, reverse, mine, saved)
                )
        return on, y, tuple(map(on.give, final)), tapes, unbatched

    def _empty(self, on: Any, T: int, B: int, width: int, for_user: bool) -> Any:
        """Make a sequence (T, B, width), for a user who wants it batch first so in memory."""
        if for_user and self.batch_first and on is HOST:
            return on.empty((B, T, width), self.dtype).swapaxes(0, 1)
        return on.empty((T, B, width), self.dtype)

    def _user_sequence(self, a: Any, unbatched: bool) -> Any:
        if unbatched:
            return a[:, 0]
        return a.swapaxes(0, 1) if self.batch_first else a

    def _user_state(self, state: tuple[Any, ...], unbatched: bool) -> Any:
        views = tuple(s[:, 0] for s in state) if unbatched else state
        return views if len(views) > 1 else views[0]

    def _split_state(self, name: str, value: Any) -> tuple[Any, ...]:
        """Split a user's state into one value per letter, None for zeros."""
        count = len(self._cell.states)
        if count == 1:
            return (value,)
        if value is None:
            return (None,) * count
        if not isinstance(value, (tuple, list)) or len(value) != count:
            what = f"{len(value)} items" if hasattr(value, "__len__") else "no pair"
            raise TypeError(
                f"{name} must be a pair of arrays or None, "
                f"got {type(value).__name__} with {what}"
            )
        return tuple(value)

    def __call__(
        self,
        x: Array,
        state: StateT | None = None,
        lengths: npt.ArrayLike | None = None,
        resets: npt.ArrayLike | None = None,
    ) -> tuple[Array, StateT]:
        """Run the layer over a sequence; nothing is saved.

        Parameters
        ----------
        x: (T, B, I), (B, T, I) if batch_first, or (T, I).
        state: h0, or (h0, c0) for an LSTM, each (layers*directions, B, H) or, for x of rank
            2, (layers*directions, H); None for zeros.
        lengths: (B,) integers 0 to T in any order, one for x of rank 2, or None for T. Row b
            takes the steps of times below lengths[b] alone: beyond them its y is 0 and x is
            not read.
        resets: bool, shaped like x without its last axis, or None for none. Where true, the
            state that enters that step is 0, in every layer and direction.

        Returns
        -------
        y: (T, B, directions*H), (B, T, …) or (T, …), every h of the last layer.
        state: shaped like the state that goes in, after each row's last step in each
            direction.

        Raises
        ------
        TypeError: a wrong type or dtype. ValueError: a wrong shape. Both before computing.
        """
        if self._is_simple and lengths is None and resets is None:
            results: tuple[Array, StateT] | None
            results = self._forward_weights(HOST, "l0").call(x, state)
            if results is not None:
                return results
        on, y, final, _, unbatched = self._run(
            x, self._split_state("state", state), lengths, resets, save=False
        )
        y_user: Array = self._user_sequence(on.give(y), unbatched)
        return y_user, self._user_state(final, unbatched)

    def vjp(
        self,
        x: Array,
        state: StateT | None = None,
        lengths: npt.ArrayLike | None = None,
        resets: npt.ArrayLike | None = None,
    ) -> tuple[tuple[Array, StateT], Callable[..., LayerGrads[StateT]]]:
        """Run the layer and return a function that computes its gradients.

        x is kept by reference and y is read-only, because the pullback reads both; the rest is
        copied. On a GPU everything is kept by reference, y too: leave it as it is until the
        pullback was called. Assigning new parameters in between does not disturb it.

        Returns
        -------
        (y, state), pullback: as from a call, and ``pullback(dy=None, d_state=None)``, which
            takes their gradients, None for zeros, and returns a `LayerGrads`. It may be
            called more than once.
        """
        on, y, final, tapes, unbatched = self._run(
            x, self._split_state("state", state), lengths, resets, save=True
        )
        on.freeze(y)
        y_user = self._user_sequence(on.give(y), unbatched)
        state_shape = self._state_shape(y, unbatched)
        names = [f"d{letter}_n" for letter in self._cell.states]

        def pullback(dy: Any = None, d_state: Any = None) -> LayerGrads[StateT]:
            now = on.now()
            if dy is not None:
                dy = now.array("dy", dy, self.dtype)
                axes = "(B, T, directions*H)" if self.batch_first else "(T, B, directions*H)"
                axes = "(T, directions*H)" if unbatched else axes
                checks.shape("dy", dy, y_user.shape, axes)
                dy = self._time_major(dy)
            d_final = tuple(
                None if d is None else self._state(now, f"d_state, {name},", d, state_shape)
                for name, d in zip(names, self._split_state("d_state", d_state), strict=True)
            )
            return self._backward(now, tapes, dy, d_final, unbatched)

        return (y_user, self._user_state(final, unbatched)), pullback

    def _backward(
        self,
        on: Any,
        tapes: list[Any],
        dy: Any,
        d_final: tuple[Any, ...],
        unbatched: bool,
    ) -> LayerGrads[StateT]:
        H, D = self.hidden_size, 1 + self.bidirectional
        T, B, _ = tapes[0].x.shape
        state_dtype = on.state_dtype(self.dtype)
        d_start = tuple(on.empty((self.num_layers * D, B, H), state_dtype) for _ in d_final)
        d_starts = tuple(map(on.see, d_start))
        gradients: dict[str, Any] = {}
        for layer, direction, suffix in reversed(list(self._directions())):
            at = layer * D + direction
            tape = tapes[at]
            mine = dy
            if dy is not None and D > 1:
                mine = dy[..., direction * H : (direction + 1) * H]
            if direction == D - 1:
                dx = self._empty(on, T, B, tape.x.shape[-1], layer == 0 and not unbatched)
            d_parameters = tape.backward(
                mine,
                tuple(None if d is None else d[at] for d in d_final),
                on.see(dx),
                tuple(d[at] for d in d_starts),
                adds=direction < D - 1,
            )
            for kind, gradient in zip(_KINDS, d_parameters, strict=True):
                gradients[f"{kind}_{suffix}"] = on.give(gradient)
            if direction == 0:
                dy = on.see(dx)
        return LayerGrads(
            self._user_sequence(on.give(dx), unbatched),
            self._user_state(tuple(map(on.give, d_start)), unbatched),
            {name: gradients[name] for name in self._parameters},
        )


class LSTM(_Layer[tuple[Array, Array]]):
    """A stack of LSTM layers in one or both directions, as `torch.nn.LSTM`.

    The equations are those of `fusedrnn.lstm`; layer l+1 reads the y of layer l, both
    directions side by side.

    Parameters
    ----------
    input_size, hidden_size: I and H.
    num_layers: how many are stacked.
    bias: whether there are bias_ih and bias_hh.
    batch_first: x and y are (B, T, …); states are (layers*directions, B, H) all the same.
    bidirectional: each layer also runs from the last time to the first.
    dtype: float32 or float64.
    rng: a NumPy generator or seed for the parameters, uniform in ±1/√H.

    Its parameters are attributes with torch's names (weight_ih_l0, weight_hh_l0, bias_ih_l0,
    bias_hh_l0, …_reverse), read-only arrays; assign a new array to change one. Calls are
    safe from several threads at once, though not beside an assignment. A layer can be pickled.

    Raises
    ------
    TypeError, ValueError: an argument of a wrong type or value.

    >>> import numpy as np, fusedrnn as fr
    >>> lstm = fr.LSTM(3, 4, num_layers=2, rng=0)
    >>> y, (h_n, c_n) = lstm(np.zeros((5, 2, 3), np.float32))
    >>> y.shape, h_n.shape
    ((5, 2, 4), (2, 2, 4))
    >>> (y, state), pullback = lstm.vjp(np.zeros((5, 2, 3), np.float32))
    >>> sorted(pullback(y).parameters)[:2]
    ['bias_hh_l0', 'bias_hh_l1']
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        *,
        bidirectional: bool = False,
        dtype: npt.DTypeLike = np.float32,
        rng: np.random.Generator | int | None = None,
    ) -> None:
        super().__init__(
            CELLS["lstm"],
            input_size,
            hidden_size,
            num_layers,
            bias,
            batch_first,
            bidirectional,
            dtype,
            rng,
        )


class GRU(_Layer[Array]):
    """A stack of GRU layers in one or both directions, as `torch.nn.GRU`.

    The equations are those of `fusedrnn.gru`; everything else is as for `LSTM`, but the
    state is h0 alone.

    >>> import numpy as np, fusedrnn as fr
    >>> gru = fr.GRU(3, 4, bidirectional=True, rng=0)
    >>> y, h_n = gru(np.zeros((5, 2, 3), np.float32))
    >>> y.shape, h_n.shape
    ((5, 2, 8), (2, 2, 4))
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        *,
        bidirectional: bool = False,
        dtype: npt.DTypeLike = np.float32,
        rng: np.random.Generator | int | None = None,
    ) -> None:
        super().__init__(
            CELLS["gru"],
            input_size,
            hidden_size,
            num_layers,
            bias,
            batch_first,
            bidirectional,
            dtype,
            rng,
        )


class RNN(_Layer[Array]):
    """A stack of Elman RNN layers in one or both directions, as `torch.nn.RNN`.

    The equations are those of `fusedrnn.rnn`; nonlinearity is "tanh", "relu" or "identity".
    Everything else is as for `LSTM`, but the state is h0 alone.

    >>> import numpy as np, fusedrnn as fr
    >>> rnn = fr.RNN(3, 4, nonlinearity="relu", batch_first=True, rng=0)
    >>> y, h_n = rnn(np.zeros((2, 5, 3), np.float32))
    >>> y.shape, h_n.shape
    ((2, 5, 4), (1, 2, 4))
    """

    nonlinearity: Nonlinearity

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        nonlinearity: Nonlinearity = "tanh",
        bias: bool = True,
        batch_first: bool = False,
        *,
        bidirectional: bool = False,
        dtype: npt.DTypeLike = np.float32,
        rng: np.random.Generator | int | None = None,
    ) -> None:
        cell = rnn_cell(nonlinearity)
        self.nonlinearity = nonlinearity
        super().__init__(
            cell,
            input_size,
            hidden_size,
            num_layers,
            bias,
            batch_first,
            bidirectional,
            dtype,
            rng,
        )
