"""The parameters of layers: names, shapes, initial values, device, pickling.

Names, shapes, order and initialisation are PyTorch's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from . import checks, cuda
from .backend import Spec
from .bfloat16 import host_dtype
from .cells import CELLS, Cell
from .cuda import Precision
from .options import DEFAULTS, check_options
from .reference import Array, Narrow, Options, Parameters
from .reference.narrow import NarrowPrecision, widened
from .weights import WEIGHTS, check_precision, narrow_weight, stored

LayerT = TypeVar("LayerT", bound="ParameterStore")

# The arguments of layers, with their defaults; attributes that are fixed after construction;
# the prefixes of parameters' names.
ARGUMENTS: dict[str, Any] = {
    "num_layers": 1,
    "nonlinearity": "tanh",
    "bias": True,
    "batch_first": False,
    "dropout": 0.0,
    "bidirectional": False,
    "proj_size": 0,
    "reverse": False,
    **DEFAULTS,
    "weights": None,
    "x_bits": None,
}
_MOVED = ("dtype", "device", "precision")
_FIXED = ("input_size", "hidden_size", *ARGUMENTS, *_MOVED)
_KINDS = Parameters._fields
SCALES = tuple(name.replace("weight", "scale") for name in WEIGHTS)  # of int8 weights
_PARAMETERS = tuple(f"{kind}_l" for kind in (*_KINDS, *SCALES))


def on_host(value: Any) -> Array:
    """Return a parameter's values on the host, waiting for those of a GPU."""
    return value.numpy() if isinstance(value, cuda.Array) else value


def placed(array: Array, dtype: str, place: str) -> Any:
    """Return a read-only copy of a host array on the CPU or a GPU."""
    if place != "cpu":
        return cuda.array(widened(array), dtype, int(place.partition(":")[2]))
    return _read_only(array.astype(host_dtype(dtype), order="C"))


def _read_only(array: Array) -> Array:
    """Return an array of the layer's own, read-only."""
    array.flags.writeable = False
    return array


def _layer_dtype(dtype: Any) -> np.dtype[Any]:
    """Return NumPy's dtype for a layer on the CPU."""
    try:
        found = host_dtype(dtype)
    except TypeError:  # not a dtype
        found = dtype
    if str(found) not in checks.NAMES:
        raise TypeError(f"dtype must be float32, float64 or bfloat16, got {found}")
    return found


def _generator(rng: Any) -> np.random.Generator:
    try:
        return np.random.default_rng(rng)
    except (TypeError, ValueError) as error:
        expected = "rng must be a generator of NumPy, a seed or None"
        raise type(error)(f"{expected}, got {rng!r}") from None


def _orthonormal(generator: np.random.Generator, rows: int, columns: int) -> Array:
    """Draw a matrix with orthonormal columns, or rows if these are fewer, uniformly."""
    tall = generator.normal(size=(max(rows, columns), min(rows, columns)))
    q, r = np.linalg.qr(tall)
    q = q * np.where(np.diag(r) < 0, -1, 1)
    matrix: Array = q if rows >= columns else q.T
    return matrix


class Init(NamedTuple):
    """How the parameters of a new layer are drawn.

    Attributes
    ----------
    forget_bias: the sum b_ih + b_hh of the forget gate; None draws it like the others.
    orthogonal: whether each block of weight_hh has orthonormal rows or columns.
    """

    forget_bias: float | None = None
    orthogonal: bool = False


class ParameterStore:
    """A layer's sizes and parameters; `fusedrnn.layers` adds the calls."""

    _cell: Cell
    _spec: Spec  # describes the layers to a backend
    _options: Options  # of a call in inference
    _parameters: dict[str, Any]  # arrays of NumPy or, on a GPU, of `cuda`
    _packed: dict[Any, Any]  # packed weights, which calls add
    dtype: Any  # np.dtype or, on a GPU, its name
    proj_size = 0
    peephole = False
    layer_norm = False
    reverse = False  # in layers pickled by version 0.1.0
    weights: NarrowPrecision | None = None  # None: those of the layer's dtype
    x_bits: int | None = None  # of x in the products of int8 weights

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
        reverse: bool,
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
        self.num_layers = checks.integer("num_layers", num_layers, 1, 2**16, "from 1 to 2**16")
        self.bias = checks.flag("bias", bias)
        self.batch_first = checks.flag("batch_first", batch_first)
        self.dropout = checks.probability("dropout", dropout)
        if self.dropout and self.num_layers == 1:
            raise ValueError(
                f"dropout is between layers: it must be 0 with num_layers=1, got {dropout}"
            )
        self.bidirectional = checks.flag("bidirectional", bidirectional)
        self.reverse = checks.flag("reverse", reverse)
        if self.reverse and self.bidirectional:
            raise ValueError("reverse must be False in a bidirectional layer, got True")
        if self.proj_size >= self.hidden_size:
            raise ValueError(
                f"proj_size must be smaller than hidden_size = {self.hidden_size}, "
                f"got {self.proj_size}"
            )
        self.dtype = _layer_dtype(dtype)
        self.device = "cpu"
        self.precision: Precision = "exact"
        self._options = check_options(cell, options)
        for name, value in options.items():
            object.__setattr__(self, name, value)
        self._set_spec()
        self._draw_parameters(_generator(rng), init)

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
        """The number of units of h."""
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
            self._parameters[name] = placed(value, str(self.dtype), self.device)

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
        dtype: the new dtype of the parameters: float32, float64 or bfloat16; on a GPU
            float16, too. None keeps it, or makes it float32 if the CPU lacks it. On the CPU,
            bfloat16 is that of the package ml_dtypes.
        precision: "tf32" lets a GPU's matrix units multiply float32, rounded to 10 bits.

        Raises
        ------
        TypeError, ValueError: an argument of a wrong type or value. ImportError: bfloat16 on
            the CPU without ml_dtypes. RuntimeError: no GPU can be used. MemoryError: its memory
            is full. None of them changes the layer.

        >>> import fusedrnn as fr
        >>> fr.LSTM(3, 4).to("cuda" if fr.cuda.is_available() else "cpu").hidden_size
        4
        """
        place, name = self._place(device, dtype)
        cuda.check_precision(precision)
        if self.weights and (place, name) != ("cpu", "float32"):
            raise ValueError(
                f"a layer with {self.weights} weights must stay on the CPU in float32, "
                f"got {place} and {name}"
            )
        if self.weights:
            return self
        if precision != "exact" and place == "cpu":
            raise ValueError(f'precision must be "exact" on the CPU, got "{precision}"')
        cuda.precision_of(name, precision)
        values = {k: on_host(v) for k, v in self._parameters.items()}
        moved = {k: placed(v, name, place) for k, v in values.items()}
        self.__dict__.update(
            device=place,
            dtype=host_dtype(name) if place == "cpu" else name,
            precision=precision,
        )
        self._parameters.update(moved)
        self._forget_packed()
        self._set_spec()
        return self

    def _place(self, device: Any, dtype: Any) -> tuple[str, str]:
        """Check the device and dtype to move to; return their names."""
        if not isinstance(device, str):
            raise TypeError(f"device must be a string, got {type(device).__name__}")
        kind, _, number = device.partition(":")
        on_cpu = device == "cpu"
        if not on_cpu and (kind != "cuda" or (":" in device and not number.isdecimal())):
            raise ValueError(f'device must be "cpu", "cuda" or "cuda:<number>", got {device!r}')
        if not on_cpu:
            cuda.check_device(int(number or 0))
        known = checks.NAMES if on_cpu else cuda.DTYPES
        name = str(self.dtype) if dtype is None else cuda.dtype_name(dtype)
        if dtype is None and name not in known:
            name = "float32"
        if name not in known:
            raise TypeError(f"dtype must be one of {', '.join(known)}, got {name}")
        return device if on_cpu else f"cuda:{int(number or 0)}", name

    def _set_spec(self) -> None:
        """Set the description that calls give to a backend."""
        self._spec = Spec(
            self._cell,
            self.input_size,
            self.hidden_size,
            self._width,
            self.num_layers,
            1 + self.bidirectional,
            self.dropout,
            self.batch_first,
            reverse=self.reverse,
            precision=self.precision,
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the parameters by torch's names; the arrays are the layer's, read-only."""
        return dict(self._parameters)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Copy all parameters from a dict; nothing changes unless all names and shapes fit.

        Parameters
        ----------
        state_dict: arrays of float32, float64 or bfloat16 (or what NumPy can convert, as CPU
            tensors) by torch's names; they are converted to the layer's dtype.

        Raises
        ------
        KeyError: names are missing or unknown. TypeError, ValueError: a wrong dtype or shape.
        """
        if not isinstance(state_dict, Mapping):
            raise TypeError(f"state_dict must be a dict, got {type(state_dict).__name__}")
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

    def quantize(self: LayerT, weights: NarrowPrecision, x_bits: int | None = None) -> LayerT:
        """Return a layer for inference whose weights have a narrow precision.

        Products read half or a quarter of the bytes and, where the processor has units for
        them, multiply two to sixteen times as many weights at once. x, y, states, biases and
        everything that is computed from the sums stay float32. The layer takes the same calls;
        `vjp` and training=True are refused.

        Parameters
        ----------
        weights: "int8", a byte with a scale for each row of a weight; "bfloat16"; or
            "float16", whose products are as fast as those of float32, on half the bytes.
            `fusedrnn.reference.narrow` defines the products.
        x_bits: with "int8", the bits of an element of the first layer's x in the products: 16,
            the default, or 8, for less work and about twice the error. Rows of h have 8.

        Returns
        -------
        A new layer. Its state_dict has int8 weights as int8, with their scales as
        scale_ih_l0 and so on, bfloat16 as uint16, the bits, and float16 as float16; so
        numpy.savez saves it without pickle.

        Raises
        ------
        TypeError: the layer is not float32. ValueError: an unknown name, a weight that is not
            finite or beyond the range of the precision, or a layer on a GPU, or one that is
            already quantised.

        >>> import numpy as np, fusedrnn as fr
        >>> lstm = fr.LSTM(3, 4, rng=0).quantize("int8")
        >>> lstm, lstm.weight_hh_l0.dtype.name
        (LSTM(3, 4, weights=int8), 'int8')
        >>> y, state = lstm(np.zeros((5, 2, 3), np.float32))
        """
        precision, bits = check_precision(weights, x_bits)
        if self.weights:
            raise ValueError(f"the layer already has {self.weights} weights: {self!r}")
        if self.device != "cpu":
            raise ValueError(f"the layer must be on the CPU, got one on {self.device}")
        if self.dtype != np.float32:
            raise TypeError(f"the layer must be float32, got {self.dtype}")
        parameters: dict[str, Array] = {}
        for name, value in self._parameters.items():
            kind, _, suffix = name.rpartition("_l")
            if kind not in WEIGHTS:
                parameters[name] = value
                continue
            narrow = narrow_weight(name, value, precision, 8)
            parameters[name] = _read_only(narrow.values)
            if narrow.scale is not None:
                scale = kind.replace("weight", "scale")
                parameters[f"{scale}_l{suffix}"] = _read_only(narrow.scale)
        layer = object.__new__(type(self))
        layer.__dict__.update(self.__dict__, weights=precision, _parameters=parameters)
        if bits == 8:
            layer.__dict__["x_bits"] = bits
        layer._forget_packed()
        return layer

    def _checked(self, name: str, value: Any) -> Any:
        """Check a parameter's new value and return a copy on the layer's device."""
        if self.weights:
            now = self._parameters[name]
            array = stored(name, value, now.dtype)
            axes = "(rows, columns)" if now.ndim == 2 else "(rows,)"
            checks.shape(name, array, now.shape, axes)
            return _read_only(np.array(array, order="C"))
        framework = cuda.framework_of(value)
        array = checks.array(name, value) if framework is None else value
        expected = self._parameters[name].shape
        checks.shape(
            name, array, expected, "(rows, columns)" if len(expected) == 2 else "(rows,)"
        )
        if framework is not None:
            return cuda.copy_of(name, array, framework, self.dtype, self.device)
        return placed(array, str(self.dtype), self.device)

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
            if name in _MOVED:
                raise AttributeError(
                    f"{name} cannot be assigned; use to(device, dtype, precision): {self!r}"
                )
            if name in _FIXED:
                raise AttributeError(f"{name} is fixed when the layer is created: {self!r}")
            raise AttributeError(f"{self!r} has no parameter {name}")
        else:
            object.__setattr__(self, name, value)

    def __getstate__(self) -> dict[str, Any]:
        rest = {k: v for k, v in self.__dict__.items() if k not in ("_spec", "_packed")}
        parameters = {k: on_host(v) for k, v in self._parameters.items()}
        return rest | {"_cell": self._cell.name, "_parameters": parameters}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _cell=CELLS[state["_cell"]])
        self._parameters = {
            k: _read_only(v) if self.weights else placed(v, str(self.dtype), self.device)
            for k, v in state["_parameters"].items()
        }
        self._forget_packed()
        self._set_spec()

    def __repr__(self) -> str:
        extra = [f"{self.input_size}, {self.hidden_size}"]
        for name, default in ARGUMENTS.items():
            if getattr(self, name, default) != default:
                extra.append(f"{name}={getattr(self, name)}")
        if self.dtype != "float32":
            extra.append(f"dtype={self.dtype}")
        if self.device != "cpu":
            extra.append(f"device={self.device}")
        return f"{type(self).__name__}({', '.join(extra)})"

    def _all_parameters(self) -> list[Parameters]:
        """Return the parameters of each layer and direction."""
        get = self._parameters.get
        every = []
        for layer, _, suffix in self._directions():
            arrays: dict[str, Any] = {kind: get(f"{kind}_{suffix}") for kind in _KINDS}
            for name, scale in zip(WEIGHTS, SCALES, strict=True):
                if self.weights and arrays[name] is not None:
                    is_input = name == "weight_ih" and layer == 0
                    bits = (self.x_bits or 16) if self.weights == "int8" and is_input else 8
                    scales = get(f"{scale}_{suffix}")
                    arrays[name] = Narrow(self.weights, arrays[name], scales, bits)
            every.append(Parameters(**arrays))
        return every

    def _forget_packed(self) -> None:
        """Drop packed weights; a new dict, as another thread may still fill the old one."""
        self._packed = {}
