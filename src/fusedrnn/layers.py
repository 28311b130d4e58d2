"""Layers that own their parameters: stacking, directions, states, packed weights.

Parameter names, shapes, order and initialisation are PyTorch's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from . import checks, cuda
from .cells import CELLS, Cell
from .cuda import Precision
from .device import backend_of
from .explain import Explanation, explain
from .functional import rnn_cell
from .kernel import FEW_ROWS, HOST, Problem
from .options import DEFAULTS, Request, beyond_plain, check_options
from .reference import Array, Nonlinearity, Parameters

StateT = TypeVar("StateT")
LayerT = TypeVar("LayerT", bound="_Layer[Any]")


# Attributes that the parameters' shapes or the calls depend on, and prefixes of parameters.
_DEFAULTS: dict[str, Any] = {
    "num_layers": 1,
    "nonlinearity": "tanh",
    "bias": True,
    "batch_first": False,
    "dropout": 0.0,
    "bidirectional": False,
    "proj_size": 0,
} | DEFAULTS
_FIXED = ("input_size", "hidden_size", *_DEFAULTS, "dtype", "device", "precision")
_KINDS = Parameters._fields
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


def _part(a: Any, direction: int, width: int, directions: int) -> Any:
    """Return what one direction has of a sequence that both share, or of None."""
    if a is None or directions == 1:
        return a
    return a[..., direction * width : (direction + 1) * width]


def _orthonormal(generator: np.random.Generator, rows: int, columns: int) -> Array:
    """Return a matrix with orthonormal columns, or rows if these are fewer, evenly drawn."""
    tall = generator.normal(size=(max(rows, columns), min(rows, columns)))
    q, r = np.linalg.qr(tall)
    q = q * np.where(np.diag(r) < 0, -1, 1)
    matrix: Array = q if rows >= columns else q.T
    return matrix


class LayerGrads(NamedTuple, Generic[StateT]):
    """What a layer's pullback returns.

    Attributes
    ----------
    x: shaped like the input.
    state: shaped like the state that goes in: h0, or (h0, c0) for an LSTM.
    parameters: a dict with the keys and shapes of `fusedrnn.LSTM.state_dict`.
    """

    x: Array
    state: StateT
    parameters: dict[str, Array]


class _Done(NamedTuple):
    """A run: the user's results, and what a pullback needs."""

    on: Any
    results: tuple[Any, ...]
    y: Any  # time-major, as made
    cells: Any
    tapes: list[Any]
    unbatched: bool


class Init(NamedTuple):
    """How the parameters of a new layer are drawn.

    Attributes
    ----------
    forget_bias: what b_ih + b_hh of the forget gate are in sum; None for like the others.
    orthogonal: whether each block of weight_hh has orthonormal rows or columns.
    """

    forget_bias: float | None = None
    orthogonal: bool = False


class _Layer(Generic[StateT]):
    """What LSTM, GRU and RNN share. `_cell` decides the rest."""

    _cell: Cell
    _request: Request  # of a call in inference
    _training: Request  # of a plain pullback
    _parameters: dict[str, Any]  # arrays of NumPy or, on a GPU, of `cuda`
    _sets: dict[str, Parameters]
    _packed: dict[tuple[str, bool], Any]
    _beyond_plain: list[str]  # whatever a call asks for
    _is_simple: bool  # the kernels take a call as it comes
    dtype: Any  # np.dtype or, on a GPU, its name
    proj_size = 0
    peephole = False
    layer_norm = False

    def __init__(
        self,
        cell: Cell,
        input_size: int,
        hidden_size: int,
        num_layers: int,
        bias: bool,
        batch_first: bool,
        dropout: float,
        bidirectional: bool,
        dtype: npt.DTypeLike,
        rng: np.random.Generator | int | None,
        init: Init,
        **options: Any,
    ) -> None:
        self._cell = cell
        self._parameters = {}
        self._forget_packed()
        self.input_size = checks.positive("input_size", input_size)
        self.hidden_size = checks.positive("hidden_size", hidden_size)
        self.num_layers = checks.positive("num_layers", num_layers)
        self.bias = checks.flag("bias", bias)
        self.batch_first = checks.flag("batch_first", batch_first)
        self.dropout = checks.probability("dropout", dropout)
        if self.dropout and self.num_layers == 1:
            raise ValueError(
                f"dropout is between layers: it must be 0 with num_layers=1, got {dropout}"
            )
        self.bidirectional = checks.flag("bidirectional", bidirectional)
        if self.proj_size >= self.hidden_size:
            raise ValueError(
                f"proj_size must be smaller than hidden_size = {self.hidden_size}, "
                f"got {self.proj_size}"
            )
        self.dtype = np.dtype(dtype)
        if self.dtype not in checks.DTYPES:
            raise TypeError(f"dtype must be float32 or float64, got {self.dtype}")
        self.device = "cpu"
        self.precision: Precision = "exact"
        self._request = check_options(cell, options)
        for name, value in options.items():
            object.__setattr__(self, name, value)
        self._draw_parameters(np.random.default_rng(rng), init)
        self._find_ways()
        self._training = self._asked(training=True)

    # Parameters

    def _directions(self) -> Iterator[tuple[int, int, str]]:
        """Yield (layer, direction, the suffix of its parameters' names)."""
        for layer in range(self.num_layers):
            for direction in range(1 + self.bidirectional):
                yield layer, direction, f"l{layer}" + "_reverse" * direction

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shapes of all parameters, by name and in torch's order."""
        has = (self.proj_size, self.bias, self.peephole, self.layer_norm)
        shapes: dict[str, tuple[int, ...]] = {}
        for layer, _, suffix in self._directions():
            I = self.input_size if layer == 0 else self._width * (1 + self.bidirectional)
            for kind, shape in self._cell.layer_shapes(I, self.hidden_size, *has).items():
                shapes[f"{kind}_{suffix}"] = shape.lengths
        return shapes

    @property
    def _width(self) -> int:
        """How many units h has."""
        return self.proj_size or self.hidden_size

    def _draw_parameters(self, generator: np.random.Generator, init: Init) -> None:
        H, letters = self.hidden_size, self._cell.gates
        bound = H**-0.5
        for name, shape in self._shapes().items():
            if name.startswith(("gamma", "beta")):
                value = np.full(shape, float(name.startswith("gamma")))
            else:
                value = generator.uniform(-bound, bound, shape)
            if init.orthogonal and name.startswith("weight_hh"):
                for k in range(len(letters)):
                    value[k * H : (k + 1) * H] = _orthonormal(generator, H, shape[1])
            if init.forget_bias is not None and name.startswith("bias"):
                f = letters.index("f") * H
                value[f : f + H] = init.forget_bias * name.startswith("bias_ih")
            self._parameters[name] = _placed(value, str(self.dtype), self.device)

    def to(
        self: LayerT,
        device: str,
        dtype: npt.DTypeLike | str | None = None,
        precision: Precision = "exact",
    ) -> LayerT:
        """Move the layer to a GPU or back, and return it.

        Parameters
        ----------
        device: "cpu", "cuda" (the first GPU) or "cuda:1" and so on. On a GPU, each
            parameter is a `fusedrnn.cuda.Array`, and x and states must be arrays there.
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
        )
        self._parameters.update(moved)
        self._forget_packed()
        self._find_ways()
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

    def _find_ways(self) -> None:
        """Find out which way calls take."""
        on_cpu = self.device == "cpu"
        self._beyond_plain = beyond_plain(self._cell, self._of("l0"), on_cpu)
        is_one = self.num_layers == 1 and not (self.batch_first or self.bidirectional)
        takes_rows = self._beyond_plain or self._request.beyond_plain(on_cpu)
        self._is_simple = on_cpu and is_one and not takes_rows

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
        return {
            **self.__dict__,
            "_cell": cell,
            "_parameters": parameters,
            "_packed": {},
            "_sets": {},
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _cell=CELLS[state["_cell"]])
        self._parameters = {
            k: _placed(v, str(self.dtype), self.device) for k, v in state["_parameters"].items()
        }

    def __repr__(self) -> str:
        extra = [f"{self.input_size}, {self.hidden_size}"]
        for name, default in _DEFAULTS.items():
            if getattr(self, name, default) != default:
                extra.append(f"{name}={getattr(self, name)}")
        if self.dtype != "float32":
            extra.append(f"dtype={self.dtype}")
        if self.device != "cpu":
            extra.append(f"device={self.device}")
        return f"{type(self).__name__}({', '.join(extra)})"

    def _of(self, suffix: str) -> Parameters:
        """Return the parameters of a layer in one direction, which are kept together."""
        sets = self._sets
        if suffix not in sets:
            get = self._parameters.get
            sets[suffix] = Parameters(*[get(f"{kind}_{suffix}") for kind in _KINDS])
        return sets[suffix]

    def _weights(
        self, on: Any, suffix: str, problem: Problem, seen: Parameters, forward: Any = None
    ) -> Any:
        """Return the weights packed for a forward or, given those, for its backward."""
        if problem.request.drops_weights:
            return on.pack(self._cell, seen, forward, row_wise=problem.row_wise)
        T, B, _ = problem.x.shape
        if forward and T * B <= FEW_ROWS and on is HOST and not problem.row_wise:
            return on.pack(self._cell, self._of(suffix), forward, borrow=True)
        return self._pack_once(on, suffix, forward)

    def _seen(self, on: Any, suffix: str) -> Parameters:
        """Return parameters as kernels see them."""
        own = self._of(suffix)
        return own if on is HOST else Parameters(*[p if p is None else on.see(p) for p in own])

    def _pack_once(self, on: Any, suffix: str, forward: Any = None) -> Any:
        """Return the kept packed weights, packing them on first use."""
        cache = self._packed  # before the parameters are read: see _forget_packed
        key = (suffix, forward is not None)
        packed = cache.get(key)
        if packed is None or (forward is not None and packed.isa != forward.isa):
            on.check_may_keep()
            seen, row_wise = self._seen(on, suffix), bool(self._beyond_plain)
            packed = on.pack(self._cell, seen, forward, row_wise=row_wise)
            cache[key] = packed
        return packed

    def _forget_packed(self) -> None:
        """Start new caches: a thread that is packing old parameters fills the old one."""
        self._sets = {}
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
        self,
        on: Any,
        name: str,
        value: Any,
        shape: tuple[int, ...],
        unbatched: bool,
        copy: bool = False,
    ) -> Any:
        """Check a state or its gradient, (layers·directions, B, H) or without B."""
        state = on.state(name, value, on.state_dtype(self.dtype), copy)
        width = "R" if shape[-1] != self.hidden_size else "H"
        if unbatched:
            checks.shape(name, state, shape[::2], f"(layers*directions, {width})")
            return state[:, None]
        checks.shape(name, state, shape, f"(layers*directions, B, {width})")
        return state

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

    def _state_shapes(self, B: int) -> list[tuple[int, int, int]]:
        count = self.num_layers * (1 + self.bidirectional)
        shapes = [(count, B, self._width), (count, B, self.hidden_size)]
        return shapes[: len(self._cell.states)]

    def _run(
        self,
        x: Any,
        states: tuple[Any, ...],
        lengths: Any,
        resets: Any,
        request: Request,
        save: bool,
    ) -> _Done:
        on, seen, unbatched = self._input(x)
        T, B, _ = seen.shape
        H, R, D = self.hidden_size, self._width, 1 + self.bidirectional
        state_dtype = on.state_dtype(self.dtype)
        letters = self._cell.states
        shapes = self._state_shapes(B)
        start = tuple(
            [
                on.zeros(shape, state_dtype)
                if value is None
                else self._state(on, f"{letter}0", value, shape, unbatched, copy=save)
                for letter, value, shape in zip(letters, states, shapes, strict=True)
            ]
        )
        masks = self._masks(on, lengths, resets, seen, unbatched)
        final = tuple([on.empty(shape, state_dtype) for shape in shapes])
        ends = tuple(map(on.see, final))
        keeps_cells = request.recompute and "c" in letters
        row_wise = bool(self._beyond_plain or request.beyond_plain(on is HOST))
        cells = None
        traces: dict[str, Any] = {}
        tapes = []
        for layer, direction, suffix in self._directions():
            last = layer == self.num_layers - 1
            if direction == 0:
                below = seen if layer == 0 else self._dropped(on, seen, layer - 1, request)
                y = self._empty(on, T, B, D * R, last and not unbatched)
                seen = on.see(y)
                if keeps_cells or (request.return_cells and last):
                    cells = on.empty((T, B, D * H), state_dtype)
            at = layer * D + direction
            trace = None
            if request.trace:
                trace = on.empty((T, B, len(self._cell.gates), H), self.dtype)
                traces[suffix] = trace
            problem = Problem(
                self._cell,
                below,
                tuple([None if s is None else s[at] for s in start]),
                masks,
                direction == 1,
                _part(seen, direction, R, D),
                tuple([s[at] for s in ends]),
                request.at(at),
                row_wise,
                None if cells is None else _part(on.see(cells), direction, H, D),
                None if trace is None else on.see(trace),
            )
            parameters = self._seen(on, suffix)
            dropped = on.with_weights_dropped(parameters, problem.request)
            weights = self._weights(on, suffix, problem, dropped)
            saved = on.forward(weights, problem, save)
            if save:
                back = self._weights(on, suffix, problem, dropped, weights)
                tapes.append(on.tape(problem, parameters, back, weights, saved))
        for made in (y, cells) if save else ():
            if made is not None:
                on.freeze(made)
        results = [
            self._user_sequence(on.give(y), unbatched),
            self._user_state(tuple(map(on.give, final)), unbatched),
        ]
        if request.return_cells:
            results.append(self._user_sequence(on.give(cells), unbatched))
        if request.trace:
            given = {suffix: on.give(trace) for suffix, trace in traces.items()}
            results.append(
                {
                    f"{letter}_{suffix}": self._user_sequence(trace[:, :, k], unbatched)
                    for suffix, trace in given.items()
                    for k, letter in enumerate(self._cell.gates)
                }
            )
        return _Done(on, tuple(results), y, cells, tapes, unbatched)

    def _dropped(self, on: Any, y: Any, layer: int, request: Request) -> Any:
        """Return what the layer after one sees of its y."""
        if not (self.dropout and request.options.training):
            return y
        made = on.see(on.empty(y.shape, self.dtype))
        on.drop(y, self.dropout, request.options.seed, "between", layer, made)
        return made

    @property
    def _draws(self) -> bool:
        """Whether training depends on a seed."""
        return self._training.is_random or self.dropout > 0

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

    def _asked(self, seed: Any = None, **asked: Any) -> Request:
        """Return the layer's request with what a call asks for."""
        absent = {k for k in ("return_cells", "bptt") if asked.get(k) is None}
        of_call = check_options(self._cell, {k: v for k, v in asked.items() if k not in absent})
        o = of_call.options
        options = replace(self._request.options, training=o.training, bptt=o.bptt)
        seed, request = checks.seed(seed), replace(of_call, options=options)
        drops = self.dropout > 0 and o.training
        return request.with_seed(seed) if request.is_random or drops else request

    @staticmethod
    def _if_asked(return_cells: Any) -> Any:
        """Return None where cells are not asked for, of which not every cell knows."""
        return None if return_cells is False else return_cells

    def __call__(
        self,
        x: Array,
        state: StateT | None = None,
        lengths: npt.ArrayLike | None = None,
        resets: npt.ArrayLike | None = None,
        *,
        training: bool = False,
        seed: int | None = None,
        return_cells: bool = False,
        trace: bool = False,
    ) -> tuple[Any, ...]:
        """Run the layer over a sequence; nothing is saved.

        Parameters
        ----------
        x: (T, B, I), (B, T, I) if batch_first, or (T, I).
        state: h0, or (h0, c0) for an LSTM, each (layers*directions, B, H) or, for x of rank
            2, (layers*directions, H); None for zeros. With proj_size that is h0's last axis.
        lengths: (B,) integers 0 to T in any order, one for x of rank 2, or None for T. Row b
            takes the steps of times below lengths[b] alone: beyond them its y is 0 and x is
            not read.
        resets: bool, shaped like x without its last axis, or None for none. Where true, the
            state that enters that step is 0, in every layer and direction.
        training: draw dropout and zoneout at random, which else have no effect and the
            expected one. seed: what they depend on, 0 to 2**64 - 1; None for another each
            call.
        return_cells: give every c of the last layer, too; an LSTM's.
        trace: give every gate, too, a dict of arrays (T, B, H) or like x by names as "i_l0".

        Returns
        -------
        y: (T, B, directions*H), (B, T, …) or (T, …), every h of the last layer.
        state: shaped like the state that goes in, after each row's last step in each
            direction.
        cells, shaped like y but of H units, and the dict of gates: if asked for.

        Raises
        ------
        TypeError: a wrong type or dtype. ValueError: a wrong shape or value. Both before
            computing.
        """
        request = self._request
        usual = training is False and return_cells is False and trace is False
        if not usual or seed is not None:
            request = self._asked(
                training=training,
                seed=seed,
                return_cells=self._if_asked(return_cells),
                trace=trace,
            )
        elif self._is_simple and lengths is None and resets is None:
            results: tuple[Any, ...] | None
            results = self._pack_once(HOST, "l0").call(x, state)
            if results is not None:
                return results
        states = self._split_state("state", state)
        return self._run(x, states, lengths, resets, request, save=False).results

    def vjp(
        self,
        x: Array,
        state: StateT | None = None,
        lengths: npt.ArrayLike | None = None,
        resets: npt.ArrayLike | None = None,
        *,
        training: bool = True,
        seed: int | None = None,
        return_cells: bool = False,
        trace: bool = False,
        bptt: int | None = None,
        recompute: bool = False,
    ) -> tuple[tuple[Any, ...], Callable[..., LayerGrads[StateT]]]:
        """Run the layer and return a function that computes its gradients.

        The arguments are those of a call, with bptt and recompute as in `fusedrnn.lstm_vjp`.
        x is kept by reference and y is read-only, because the pullback reads both; the rest is
        copied. On a GPU everything is kept by reference, y and cells too: leave them as they
        are until the pullback was called. Assigning new parameters in between does not disturb
        it.

        Returns
        -------
        results, pullback: as from a call, and ``pullback(dy=None, d_state=None,
            d_cells=None)``, which takes the gradients of y, state and cells, None for zeros,
            and returns a `fusedrnn.layers.LayerGrads`. It may be called more than once.
        """
        usual = training is True and return_cells is False and trace is False
        if usual and seed is bptt is None and recompute is False and not self._draws:
            request = self._training
        else:
            request = self._asked(
                training=training,
                seed=seed,
                return_cells=self._if_asked(return_cells),
                trace=trace,
                bptt=bptt,
                recompute=recompute,
            )
        states = self._split_state("state", state)
        done = self._run(x, states, lengths, resets, request, save=True)
        unbatched, y = done.unbatched, done.results[0]
        state_shapes = self._state_shapes(done.y.shape[1])
        names = [f"d{letter}_n" for letter in self._cell.states]

        def pullback(dy: Any = None, d_state: Any = None, d_cells: Any = None) -> Any:
            now = done.on.now()
            if d_cells is not None and not return_cells:
                raise TypeError("d_cells is the gradient of cells: ask for return_cells=True")
            dy = self._sequence_gradient(now, "dy", dy, self.dtype, y.shape)
            if d_cells is not None:
                dtype, expected = now.state_dtype(self.dtype), done.results[2].shape
                d_cells = self._sequence_gradient(now, "d_cells", d_cells, dtype, expected)
            d_final = tuple(
                None
                if d is None
                else self._state(now, f"d_state, {name},", d, shape, unbatched)
                for name, d, shape in zip(
                    names, self._split_state("d_state", d_state), state_shapes, strict=True
                )
            )
            return self._backward(now, done, request, dy, d_final, d_cells)

        return done.results, pullback

    def explain(
        self,
        T: int,
        B: int,
        *,
        training: bool = False,
        return_cells: bool = False,
        trace: bool = False,
        recompute: bool = False,
    ) -> Explanation:
        """Tell which way a call takes through the kernels, why, and what it costs at least.

        Parameters
        ----------
        T, B: the sizes of x.
        training: tell of `vjp` and its pullback instead of a call.
        return_cells, trace, recompute: as the call is asked for.

        Returns
        -------
        A dict that prints as text: "way" and "why"; "plans", one for each layer and direction,
        of threads, tiles and packing; "flops"; "weight_bytes" and "io_bytes"; on the CPU
        "saved_bytes", "isa" and "floor", the seconds that the products take at the peak of this
        machine's multipliers and caches, which is measured for it in about a second.

        Raises
        ------
        TypeError, ValueError: an argument of a wrong type or value.

        >>> import fusedrnn as fr
        >>> told = fr.LSTM(3, 4, peephole=True).explain(10, 2)
        >>> told["way"], told["flops"]
        ('row by row after each product', 4480)
        """
        request = self._asked(
            training=training,
            return_cells=self._if_asked(return_cells),
            trace=trace,
            recompute=recompute,
        )
        return explain(self, T, B, request, training)

    def _sequence_gradient(
        self, on: Any, name: str, value: Any, dtype: Any, expected: tuple[int, ...]
    ) -> Any:
        """Check the gradient of y or of cells, None for zeros."""
        if value is None:
            return None
        value = on.array(name, value, dtype)
        last = "directions*" + ("R" if self.proj_size and name == "dy" else "H")
        axes = f"(B, T, {last})" if self.batch_first else f"(T, B, {last})"
        checks.shape(name, value, expected, f"(T, {last})" if len(expected) == 2 else axes)
        return self._time_major(value)

    def _backward(
        self,
        on: Any,
        done: _Done,
        request: Request,
        dy: Any,
        d_final: tuple[Any, ...],
        d_cells: Any,
    ) -> LayerGrads[StateT]:
        H, R, D = self.hidden_size, self._width, 1 + self.bidirectional
        T, B, _ = done.y.shape
        state_dtype = on.state_dtype(self.dtype)
        d_start = tuple([on.empty(shape, state_dtype) for shape in self._state_shapes(B)])
        d_starts = tuple(map(on.see, d_start))
        gradients: dict[str, Any] = {}
        for layer, direction, suffix in reversed(list(self._directions())):
            at = layer * D + direction
            tape, is_last = done.tapes[at], layer == self.num_layers - 1
            if direction == D - 1:
                I = tape.problem.x.shape[-1]
                dx = self._empty(on, T, B, I, layer == 0 and not done.unbatched)
            d_parameters = tape.backward(
                _part(dy, direction, R, D),
                tuple([None if d is None else d[at] for d in d_final]),
                _part(d_cells, direction, H, D) if is_last else None,
                on.see(dx),
                tuple([d[at] for d in d_starts]),
                adds=direction < D - 1,
            )
            for kind, gradient in zip(_KINDS, d_parameters, strict=True):
                if gradient is not None:
                    gradients[f"{kind}_{suffix}"] = on.give(gradient)
            if direction == 0:
                dy = on.see(dx)
                if self.dropout and request.options.training and layer > 0:
                    seed = request.options.seed
                    on.drop(dy, self.dropout, seed, "between", layer - 1, dy)
        return LayerGrads(
            self._user_sequence(on.give(dx), done.unbatched),
            self._user_state(tuple(map(on.give, d_start)), done.unbatched),
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
    dropout: the probability with which a layer does not see an element of the y below, the
        others scaled by 1 / (1 - dropout); in training alone, as the dropouts that follow.
    bidirectional: each layer also runs from the last time to the first.
    proj_size: R, units of a projected h; 0 for none.
    peephole, coupled_gates, layer_norm, clip, cell_clip, zoneout, recurrent_dropout,
        weight_dropout: as for `fusedrnn.lstm`.
    forget_bias: what both biases of the forget gate are in sum at first (Gers, Schmidhuber &
        Cummins 2000; 1 after Jozefowicz, Zaremba & Sutskever 2015), or None for like others.
    orthogonal: let each block of weight_hh have orthonormal columns (Saxe, McClelland &
        Ganguli 2014).
    dtype: float32 or float64.
    rng: a NumPy generator or seed for the parameters, else uniform in ±1/√H.

    Its parameters are attributes with torch's names (weight_ih_l0, weight_hh_l0, bias_ih_l0,
    bias_hh_l0, weight_hr_l0, …_reverse) and those of `fusedrnn.lstm` (weight_ch_l0,
    gamma_ih_l0 …), read-only arrays; assign a new array to change one. Calls are safe from
    several threads at once, though not beside an assignment. A layer can be pickled.

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
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        *,
        peephole: bool = False,
        coupled_gates: bool = False,
        layer_norm: bool = False,
        clip: float | None = None,
        cell_clip: float | None = None,
        zoneout: float | tuple[float, float] = 0.0,
        recurrent_dropout: float = 0.0,
        weight_dropout: float = 0.0,
        forget_bias: float | None = None,
        orthogonal: bool = False,
        dtype: npt.DTypeLike = np.float32,
        rng: np.random.Generator | int | None = None,
    ) -> None:
        self.proj_size = 0 if proj_size == 0 else checks.positive("proj_size", proj_size)
        self.peephole = checks.flag("peephole", peephole)
        self.coupled_gates = checks.flag("coupled_gates", coupled_gates)
        self.layer_norm = checks.flag("layer_norm", layer_norm)
        if forget_bias is not None:
            forget_bias = checks.number("forget_bias", forget_bias)
            if self.coupled_gates or not bias:
                what = (
                    "coupled_gates has no forget gate" if coupled_gates else "there is no bias"
                )
                raise ValueError(f"forget_bias must be None: {what}, got {forget_bias}")
        super().__init__(
            CELLS["lstm_coupled" if self.coupled_gates else "lstm"],
            input_size,
            hidden_size,
            num_layers,
            bias,
            batch_first,
            dropout,
            bidirectional,
            dtype,
            rng,
            Init(forget_bias, checks.flag("orthogonal", orthogonal)),
            clip=clip,
            cell_clip=cell_clip,
            zoneout=zoneout,
            recurrent_dropout=recurrent_dropout,
            weight_dropout=weight_dropout,
        )


class GRU(_Layer[Array]):
    """A stack of GRU layers in one or both directions, as `torch.nn.GRU`.

    The equations and options are those of `fusedrnn.gru`; everything else is as for `LSTM`,
    but the state is h0 alone.

    >>> import numpy as np, fusedrnn as fr
    >>> gru = fr.GRU(3, 4, bidirectional=True, reset_after=False, rng=0)
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
        dropout: float = 0.0,
        bidirectional: bool = False,
        *,
        reset_after: bool = True,
        layer_norm: bool = False,
        clip: float | None = None,
        zoneout: float = 0.0,
        recurrent_dropout: float = 0.0,
        weight_dropout: float = 0.0,
        orthogonal: bool = False,
        dtype: npt.DTypeLike = np.float32,
        rng: np.random.Generator | int | None = None,
    ) -> None:
        self.reset_after = checks.flag("reset_after", reset_after)
        self.layer_norm = checks.flag("layer_norm", layer_norm)
        super().__init__(
            CELLS["gru" if self.reset_after else "gru_before"],
            input_size,
            hidden_size,
            num_layers,
            bias,
            batch_first,
            dropout,
            bidirectional,
            dtype,
            rng,
            Init(orthogonal=checks.flag("orthogonal", orthogonal)),
            clip=clip,
            zoneout=zoneout,
            recurrent_dropout=recurrent_dropout,
            weight_dropout=weight_dropout,
        )


class RNN(_Layer[Array]):
    """A stack of Elman RNN layers in one or both directions, as `torch.nn.RNN`.

    The equations and options are those of `fusedrnn.rnn`; nonlinearity is "tanh", "relu" or
    "identity". Everything else is as for `LSTM`, but the state is h0 alone.

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
        dropout: float = 0.0,
        bidirectional: bool = False,
        *,
        clip: float | None = None,
        zoneout: float = 0.0,
        recurrent_dropout: float = 0.0,
        weight_dropout: float = 0.0,
        orthogonal: bool = False,
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
            dropout,
            bidirectional,
            dtype,
            rng,
            Init(orthogonal=checks.flag("orthogonal", orthogonal)),
            clip=clip,
            zoneout=zoneout,
            recurrent_dropout=recurrent_dropout,
            weight_dropout=weight_dropout,
        )
