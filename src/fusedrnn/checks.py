"""Checks of arguments; every error names the argument, what was expected and what came."""

from __future__ import annotations

import operator
from numbers import Real
from typing import Any

import numpy as np

from .bfloat16 import is_bfloat16
from .reference import ACTIVATIONS, Activation, Array, activation_of
from .reference.activations import REQUIRED

_FLOAT = np.finfo(np.float32)
DTYPES = (np.dtype(np.float32), np.dtype(np.float64))
NAMES = ("float32", "float64", "bfloat16")  # of the dtypes on the CPU


def unmasked(name: str, value: Any) -> None:
    """Refuse a masked array, or a list of some."""
    for part in (value, *(value if isinstance(value, (list, tuple)) else ())):
        if isinstance(part, np.ma.MaskedArray):
            raise TypeError(
                f"{name} must be an array without a mask, got a masked array: fill it, and use "
                "lengths, resets or mask instead"
            )


def as_array(name: str, value: Any) -> Array:
    """Return `value` as `numpy.asarray` converts it."""
    unmasked(name, value)
    try:
        converted: Array = np.asarray(value)
    except (TypeError, ValueError, RuntimeError) as error:
        # Types that NumPy lacks, ragged lists, tensors that have gradients.
        kind = f"{type(value).__name__} of {value.dtype}" if hasattr(value, "dtype") else ""
        expected = f"{name} must be an array" + (
            f" that NumPy can read, got a {kind}" * bool(kind)
        )
        raise TypeError(f"{expected}: {error}") from None
    return converted


def array(name: str, value: Any, dtype: np.dtype[Any] | None = None, like: str = "x") -> Array:
    """Return `value` as an array of `dtype`, which `like` has, or of a dtype that we have."""
    if value is None:
        raise TypeError(f"{name} must be an array, got None")
    converted = as_array(name, value)
    if dtype is not None:
        if converted.dtype != dtype:
            raise TypeError(f"{name} must be {dtype} like {like}, got {converted.dtype}")
    elif converted.dtype not in DTYPES and not is_bfloat16(converted.dtype):
        raise TypeError(f"{name} must be float32, float64 or bfloat16, got {converted.dtype}")
    return converted


def shape(name: str, value: Any, expected: tuple[int, ...], meaning: str) -> None:
    """Check the whole shape; `meaning` names its axes, as in "(4*H, I)"."""
    if value.shape != expected:
        raise ValueError(f"{name} must have shape {meaning} = {expected}, got {value.shape}")


def sequence(x: Any, axes: str, input_size: int | None = None) -> None:
    """Check that x has rank 3 (`axes`) or 2, with `input_size` features."""
    if x.ndim not in (2, 3):
        raise ValueError(f"x must have shape {axes} or (T, I), got {x.shape}")
    if input_size is not None and x.shape[-1] != input_size:
        raise ValueError(
            f"x must have shape {axes} or (T, I) with I = input_size = {input_size}, "
            f"got {x.shape}"
        )
    if x.shape[-1] == 0:
        raise ValueError(f"x must have at least one feature, got shape {x.shape}")


def integer(name: str, value: Any, least: int, most: int, range_: str = "") -> int:
    """Return an int from `least` to `most`; messages show `range_` in place of these."""
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {type(value).__name__}") from None
    if isinstance(value, bool):
        raise TypeError(f"{name} must be an integer, got bool")
    if not least <= number <= most:
        expected = range_ or f"from {least} to {most}"
        raise ValueError(f"{name} must be {expected}, got {number}")
    return number


def positive(name: str, value: Any) -> int:
    """Return a size as an int >= 1."""
    return integer(name, value, 1, 2**31, "from 1 to 2**31")


def flag(name: str, value: Any) -> bool:
    """Return a bool; refuse anything else, truthy or not."""
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name} must be a bool, got {type(value).__name__}")
    return bool(value)


def number(name: str, value: Any) -> float:
    """Return a real number as a float."""
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (Real, np.number)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{name} must be a number that float64 has, got {value}") from None


def probability(name: str, value: Any) -> float:
    """Return a probability below 1."""
    p = number(name, value)
    if not 0 <= p < 1:
        raise ValueError(f"{name} must be a probability p, 0 <= p < 1, got {value}")
    return p


def zoneout(value: Any, states: int) -> tuple[float, float]:
    """Return the probabilities of h and c from a pair of numbers or from one for both."""
    if isinstance(value, (tuple, list)):
        if len(value) != states:
            expected = "a pair (p_h, p_c)" if states == 2 else "one probability"
            raise ValueError(f"zoneout must be {expected}, got {len(value)} values")
        values = [probability(f"zoneout[{i}]", p) for i, p in enumerate(value)]
    else:
        values = [probability("zoneout", value)] * states
    return values[0], values[1] if states == 2 else 0.0


def bound(name: str, value: Any) -> float:
    """Return a positive bound, infinite for None."""
    if value is None:
        return float("inf")
    limit = number(name, value)
    if not limit > 0:
        raise ValueError(f"{name} must be greater than 0 or None, got {value}")
    return limit


def activation(name: str, value: Any) -> Activation:
    """Return the activation of a name, or of a tuple of a name and numbers."""
    if not isinstance(value, (str, tuple, list)):
        raise TypeError(
            f"{name} must be a name or a tuple (name, numbers …), got {type(value).__name__}"
        )
    key, *given = (value,) if isinstance(value, str) or not value else value
    if not isinstance(key, str) or key not in ACTIVATIONS:
        raise ValueError(f"{name} must be one of {', '.join(ACTIVATIONS)}, got {key!r}")
    most = len(ACTIVATIONS[key][0])
    if len(given) > most:
        raise ValueError(
            f"{name} {key} takes at most {most} number{'s' * (most != 1)}, got {len(given)}"
        )
    numbers = [number(f"a number of {name} {key}", n) for n in given]
    for n in numbers:
        if n != 0 and not _FLOAT.tiny <= abs(n) <= _FLOAT.max:
            raise ValueError(f"{name} {key} must have numbers that float32 has, got {n}")
    if numbers and key in REQUIRED:
        required, holds = REQUIRED[key]
        if not holds(numbers[0]):
            raise ValueError(f"{name} {key} must have {required}, got {numbers[0]}")
    return activation_of(key, *numbers)


def seed(value: Any) -> int | None:
    """Return a seed of 64 bits, or None."""
    if value is None:
        return None
    return integer("seed", value, 0, 2**64 - 1, "from 0 to 2**64 - 1")


def lengths(value: Any, T: int, batch: tuple[int, ...]) -> Array:
    """Return a copy of the rows' lengths as intp."""
    rows = as_array("lengths", value)
    if rows.dtype.kind not in "iu":
        raise TypeError(f"lengths must be integers, got {rows.dtype}")
    if not batch and rows.ndim:
        raise ValueError(f"lengths must be one integer for x (T, I), got shape {rows.shape}")
    shape("lengths", rows, batch, "(B,)")
    wrong = (rows < 0) | (rows > T)
    if wrong.any():
        raise ValueError(f"lengths must be from 0 to T = {T}, got {rows[wrong][0]}")
    return rows.astype(np.intp)


def flags(name: str, value: Any, expected: tuple[int, ...], axes: str) -> Array:
    """Return a copy of resets or a mask as bool; numbers must all be 0 or 1."""
    given = as_array(name, value)
    if given.dtype.kind not in "biuf":
        raise TypeError(f"{name} must be bool or numbers that are 0 or 1, got {given.dtype}")
    shape(name, given, expected, axes)
    copy: Array = given != 0  # a bool view of integers may have bytes other than 0 and 1
    if given.dtype != bool and (given != copy).any():
        wrong = given[given != copy][0]
        raise ValueError(f"{name} must be bool or numbers that are 0 or 1, got {wrong}")
    return copy


def fits(mask: Array, lengths: Array, time_axis: int) -> None:
    """Check that no step of a mask is beyond its row's length."""
    beyond = np.moveaxis(mask, time_axis, -1) & (
        np.arange(mask.shape[time_axis]) >= lengths[..., None]
    )
    if beyond.any():
        *row, t = (int(n[0]) for n in np.nonzero(beyond))
        where, length = (f" of row {row[0]}", lengths[row[0]]) if row else ("", lengths)
        raise ValueError(
            f"mask must be false from a row's length on: it is true at step {t}{where}, "
            f"whose length is {length}"
        )


def repeats(mask: Any, repeated: bool) -> None:
    """Check that y is repeated only where there is a mask."""
    if repeated and mask is None:
        raise ValueError('masked_output must be "zero" without a mask, got "last"')


def choice(name: str, value: Any, known: tuple[str, ...]) -> str:
    """Return one of some strings."""
    if value not in known:
        listed = " or ".join(f'"{n}"' for n in known)
        raise ValueError(f"{name} must be {listed}, got {value!r}")
    return str(value)


def output(out: Any, expected: tuple[int, ...], meaning: str, x: Array) -> Array:
    """Check `out`, which y is written into: contiguous rows, no two elements in one place."""
    if not isinstance(out, np.ndarray):
        raise TypeError(f"out must be an array, got {type(out).__name__}")
    unmasked("out", out)
    if out.dtype != x.dtype:
        raise TypeError(f"out must be {x.dtype} like x, got {out.dtype}")
    shape("out", out, expected, meaning)
    if not out.flags.writeable:
        raise ValueError("out must be writeable, got a read-only array")
    itemsize = out.itemsize
    whole = all(s % itemsize == 0 for s in out.strides)
    if out.size and not (whole and out.flags.aligned and out.strides[-1] == itemsize):
        raise ValueError(
            f"out must be contiguous along its last axis, got strides {out.strides}"
        )
    # From the innermost axis outwards, a stride must be at least the extent of the axes inside.
    extent = itemsize
    for stride, length in sorted(zip(map(abs, out.strides), out.shape, strict=True)):
        if length > 1 and stride < extent:
            raise ValueError(f"out must not overlap itself, got strides {out.strides}")
        extent = max(extent, stride * length)
    return out
