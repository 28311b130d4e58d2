"""LSTM, GRU and SimpleRNN: Keras' layers, whose loop over the steps is one call of ours.

Arguments, weights, configuration, states and everything else of a layer are Keras' own, which
its documentation describes.
"""

from __future__ import annotations

import importlib
import inspect
from typing import Any

import keras
from keras import ops

from .activations import Activation, counterpart

BACKEND = keras.backend.backend()
_run = importlib.import_module(f".on_{BACKEND}", __package__).run


class Fused:
    """The loop over the steps of a Keras layer, on our kernels."""

    cell: Any
    go_backwards: bool
    return_sequences: bool
    stateful: bool
    zero_output_for_mask: bool

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        activations_of(self.cell)  # reports an unknown one here, not in the first call

    def inner_loop(
        self, sequences: Any, initial_state: Any, mask: Any, training: bool = False
    ) -> tuple[Any, Any, list[Any]]:
        """Run the layer over a batch of sequences, as Keras' method of this name does.

        Parameters
        ----------
        sequences: (B, T, I).
        initial_state: h or, for an LSTM, h and c, each (B, units).
        mask: (B, T), true where a row takes a step, or None; or a list that begins with it.
        training: whether dropout is active.

        Returns
        -------
        last_output: (B, units).
        outputs: (B, T, units) in the order in which the steps were taken, so the last step
            comes first with go_backwards.
        states: the last h or h and c, each (B, units).
        """
        x, states = sequences, keras.tree.flatten(initial_state)
        if keras.tree.is_nested(mask):
            mask = mask[0]
        if self.stateful:
            # Keras assigns the new state to these tensors, and backward reads the old one.
            states = [ops.copy(state) for state in states]
        if training and 0 < self.cell.dropout < 1:
            x = x * ops.expand_dims(self._input_mask(x), 1)
        if self.go_backwards:
            x = ops.flip(x, 1)
            mask = None if mask is None else ops.flip(mask, 1)
        options = _options_of(self.cell) | self._dropout_options(training)
        if mask is not None:
            options |= self._mask_options(mask, x)
        y, states = _run(self.cell, x, states, options)
        last = states[0]
        if mask is not None:
            y, last = self._as_masked(y, last, ops.cast(mask, "bool"))
        return last, y, states

    def _input_mask(self, x: Any) -> Any:
        """Return the mask of dropout of the inputs, (B, I), for all gates and steps."""
        masks = self.cell.get_dropout_mask(x[:, 0])
        return masks[0] if isinstance(masks, list) else masks

    def _mask_options(self, mask: Any, x: Any) -> dict[str, Any]:
        """Return a mask as options of a call with x (B, T, I)."""
        if mask.shape != x.shape[:2]:
            raise ValueError(
                f"mask must have shape (B, T) = {tuple(x.shape[:2])}, got {tuple(mask.shape)}"
            )
        return {"mask": mask, "masked_output": "zero" if self.zero_output_for_mask else "last"}

    def _dropout_options(self, training: bool) -> dict[str, Any]:
        """Return recurrent dropout as options of a call, with a seed from Keras' generator."""
        rate = self.cell.recurrent_dropout
        if not training or not 0 < rate < 1:
            return {}
        seed = keras.random.randint((), 0, 2**31 - 1, seed=self.cell.seed_generator)
        return {"recurrent_dropout": rate, "seed": int(seed)}

    def _as_masked(self, y: Any, h_n: Any, mask: Any) -> tuple[Any, Any]:
        """Return outputs and the last output with Keras' values where a row takes no step."""
        if self.zero_output_for_mask:  # y is 0 there already
            return y, ops.where(mask[:, -1:], h_n, ops.zeros_like(h_n))
        if BACKEND == "numpy":  # where the output before the first step is the state
            return y, h_n
        if self.return_sequences:
            has_begun = ops.cumsum(ops.cast(mask, "int32"), 1) > 0
            y = ops.where(ops.expand_dims(has_begun, 2), y, ops.zeros_like(y))
        return y, ops.where(ops.any(mask, 1, keepdims=True), h_n, ops.zeros_like(h_n))


_USUAL = {"activation": "tanh", "recurrent_activation": "sigmoid"}


def activations_of(cell: Any) -> dict[str, Activation]:
    """Return a Keras cell's activations as options of a call, without the usual ones.

    Raises
    ------
    ValueError: an activation that the kernels do not have.
    """
    of = type(cell).__name__.removesuffix("Cell")
    found = {n: counterpart(n, getattr(cell, n), of) for n in _USUAL if hasattr(cell, n)}
    return {name: ours for name, ours in found.items() if ours != _USUAL[name]}


def _options_of(cell: Any) -> dict[str, Any]:
    """Return a Keras cell's options by our names, without those that are the usual ones."""
    options: dict[str, Any] = dict(activations_of(cell))
    if not getattr(cell, "reset_after", True):
        options["reset_after"] = False
    return options


_register = keras.saving.register_keras_serializable("fusedrnn")


@_register
class LSTM(Fused, keras.layers.LSTM):  # type: ignore[misc]
    """`keras.layers.LSTM` on our kernels.

    ::

        a = x_t kernel + h' recurrent_kernel + bias
        i, f, o = σ(a_i), σ(a_f), σ(a_o)        g = φ(a_c)
        c = f c' + i g                          h = o φ(c)

    φ is the activation and σ the recurrent activation. Arguments, weights and results are those
    of `keras.layers.LSTM`, but

    recurrent_dropout: one mask for all gates, drawn by our generator; Keras draws one for each
        gate. With it, and with implementation=1, the inputs have one mask for all gates, too.
    unroll, implementation: without effect.
    use_cudnn: read by Bidirectional alone, which on a GPU calls cuDNN unless it is False.

    Raises
    ------
    ValueError: an activation that the kernels do not have; a mask that is not (B, T) or has
        values other than 0 and 1.

    Source: Hochreiter & Schmidhuber 1997; forget gate: Gers, Schmidhuber & Cummins 2000.

    >>> import keras, fusedrnn.keras as fk
    >>> layer = fk.LSTM(4, return_sequences=True)
    >>> layer(keras.ops.ones((2, 5, 3))).shape
    torch.Size([2, 5, 4])
    """

    __signature__ = inspect.signature(keras.layers.LSTM)


@_register
class GRU(Fused, keras.layers.GRU):  # type: ignore[misc]
    """`keras.layers.GRU` on our kernels.

    ::

        z = σ(x_t kernel_z + b_z + h' recurrent_kernel_z + d_z)
        r = σ(x_t kernel_r + b_r + h' recurrent_kernel_r + d_r)
        n = φ(x_t kernel_h + b_h + r (h' recurrent_kernel_h + d_h))
        h = (1 - z) n + z h'

    b and d are the rows of bias. With reset_after=False bias has one row and
    n = φ(x_t kernel_h + b_h + (r h') recurrent_kernel_h). Everything else is as for `LSTM`.
    Source: Cho et al. 2014; reset_after: the form of cuDNN.

    >>> import keras, fusedrnn.keras as fk
    >>> fk.GRU(4, reset_after=False)(keras.ops.ones((2, 5, 3))).shape
    torch.Size([2, 4])
    """

    __signature__ = inspect.signature(keras.layers.GRU)


@_register
class SimpleRNN(Fused, keras.layers.SimpleRNN):  # type: ignore[misc]
    """`keras.layers.SimpleRNN` on our kernels.

    ::

        h = φ(x_t kernel + h' recurrent_kernel + bias)

    Everything else is as for `LSTM`. Source: Elman 1990.

    >>> import keras, fusedrnn.keras as fk
    >>> fk.SimpleRNN(4, activation="relu")(keras.ops.ones((2, 5, 3))).shape
    torch.Size([2, 4])
    """

    __signature__ = inspect.signature(keras.layers.SimpleRNN)


KERAS = {kind: kind.__mro__[2] for kind in (LSTM, GRU, SimpleRNN)}
