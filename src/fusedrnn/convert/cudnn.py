"""cuDNN's flat buffer of weights: first the matrices of all layers, then the biases of all."""

from __future__ import annotations

from typing import Any

import numpy as np

from .. import checks
from ..reference import Array, Parameters
from . import cells


def from_cudnn(
    cell: str,
    flat: Any,
    input_size: int,
    hidden_size: int,
    num_layers: int = 1,
    bidirectional: bool = False,
    **options: Any,
) -> Any:
    """Return a layer with the weights of a flat buffer of cuDNN.

    cuDNN does not document the layout; instead ``cudnnGetRNNWeightParams`` returns the position
    of each matrix. This layout is the one that ``jax.experimental.rnn`` relies on, with two
    biases per gate (CUDNN_RNN_DOUBLE_BIAS) and without a projection. Gates are in our order.

    Parameters
    ----------
    cell: "lstm", "gru" or "rnn".
    flat: the buffer as an array of rank 1, of the weights' dtype.
    input_size, hidden_size, num_layers, bidirectional: the sizes of the layer.
    options: further arguments of the layer, as nonlinearity="relu".

    Returns
    -------
    An `fusedrnn.LSTM`, `fusedrnn.GRU` or `fusedrnn.RNN`.

    Raises
    ------
    TypeError, ValueError: an argument of a wrong type or value, or a buffer of another size.

    >>> import numpy as np
    >>> from fusedrnn import convert
    >>> convert.from_cudnn("gru", np.ones(108), 3, 4)
    GRU(3, 4, dtype=float64)
    """
    op = cells.check_op(cell)
    sizes = {"input_size": input_size, "hidden_size": hidden_size, "num_layers": num_layers}
    I, H, L = (checks.positive(name, size) for name, size in sizes.items())
    D = 1 + checks.flag("bidirectional", bidirectional)
    rows = len(cells.GATES[op]) * H
    shapes: list[tuple[int, ...]] = []
    for layer in range(L):
        shapes += [(rows, I if layer == 0 else D * H), (rows, H)] * D
    shapes += [(rows,), (rows,)] * (D * L)
    ends = np.cumsum([np.prod(shape) for shape in shapes])
    a = cells.floats("flat", flat, f"({ends[-1]},)", int(ends[-1]))
    arrays = [
        part.reshape(shape) for part, shape in zip(np.split(a, ends[:-1]), shapes, strict=True)
    ]
    matrices, biases = arrays[: 2 * D * L], arrays[2 * D * L :]
    each = [
        Parameters(*matrices[2 * at : 2 * at + 2], *biases[2 * at : 2 * at + 2])
        for at in range(D * L)
    ]
    return cells.build(op, [each[at : at + D] for at in range(0, D * L, D)], **options)


def to_cudnn(layer: Any) -> Array:
    """Return a layer's weights as a flat buffer of cuDNN.

    Parameters
    ----------
    layer: an `fusedrnn.LSTM`, `fusedrnn.GRU` or `fusedrnn.RNN`, or a module of torch.nn or
        `fusedrnn.torch`.

    Returns
    -------
    An array of rank 1, as `from_cudnn` describes it, with zeros for biases that do not exist.

    Raises
    ------
    TypeError, ValueError: layer is none of these, or has an option that cuDNN lacks.

    >>> import fusedrnn as fr
    >>> from fusedrnn import convert
    >>> convert.to_cudnn(fr.GRU(3, 4)).shape
    (108,)
    """
    _, found, _ = cells.cells_of(layer, "cuDNN", "nonlinearity")
    every = [cell for of_layer in found for cell in of_layer]
    matrices = [m for cell in every for m in (cell.weight_ih, cell.weight_hh)]
    biases = [b for cell in every for b in cells.biases_of(cell)]
    return np.concatenate([a.ravel() for a in (*matrices, *biases)])
