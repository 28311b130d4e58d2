"""Types of the definition: parameters, options, gradients."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from .activations import Activation

Array = npt.NDArray[Any]
State = tuple[Array, ...]
Nonlinearity = Literal["tanh", "relu", "identity"]  # the keys of RNN
Gradients = dict[str, Array]


class Grads(NamedTuple):
    """Gradients of an op's arguments; None if that was None or the cell does not have it."""

    x: Array
    weight_ih: Array
    weight_hh: Array
    bias_ih: Array | None
    bias_hh: Array | None
    h0: Array
    c0: Array | None = None
    weight_hr: Array | None = None
    weight_ch: Array | None = None
    gamma_ih: Array | None = None
    gamma_hh: Array | None = None
    gamma_c: Array | None = None
    beta_c: Array | None = None


class Parameters(NamedTuple):
    """A layer's parameters in one direction, arrays of NumPy or of a GPU.

    Attributes
    ----------
    weight_ih, weight_hh, bias_ih, bias_hh: W (gates*H, I), R (gates*H, R), b (gates*H,).
    weight_hr: the projection of h (R, H), or None: then R = H.
    weight_ch: peephole weights (3*H,) of i, f and o, or (2*H,) of i and o, or None.
    gamma_ih, gamma_hh: the scales of LayerNorm (gates*H,), or None for no LayerNorm.
    gamma_c, beta_c: scale and shift of the cell state's LayerNorm (H,), of an LSTM.
    """

    weight_ih: Any
    weight_hh: Any
    bias_ih: Any = None
    bias_hh: Any = None
    weight_hr: Any = None
    weight_ch: Any = None
    gamma_ih: Any = None
    gamma_hh: Any = None
    gamma_c: Any = None
    beta_c: Any = None

    def rounded(self, a: Array) -> Array:
        """Return an operand of a product, or a saved value, as these parameters round it."""
        return a

    def passes(self, inside: Any, value: Array, bounds: tuple[Any, Any]) -> Any:
        """Return where a gradient passes a clip: inside its bounds, as backward sees it.

        `value` is what is saved of a clipped number, `bounds` the same of the bounds.
        """
        return inside


class Options(NamedTuple):
    """The options of a call that are not arrays.

    Attributes
    ----------
    clip: every pre-activation is clipped to [-clip, clip].
    cell_clip: c is clipped to [-cell_clip, cell_clip].
    zoneout: the probabilities with which h and c keep their previous values.
    recurrent_dropout: the probability with which an element of h' is dropped before R.
    weight_dropout: the probability with which an element of R is dropped.
    training: draw these masks at random; else take the expected values.
    seed, where: determine the masks; `where` is the number of the layer and direction.
    bptt: the steps of a chunk, beyond which no gradient of the state passes; 0 for one chunk.
    return_cells, trace: also return every c, every gate.
    recompute: compute the gates again for backward instead of saving them. The reference
        ignores this and the last two, because it always keeps everything.
    repeats: at a step that is not taken, y is h of the unchanged state instead of 0.
    activation, recurrent_activation: functions that replace the cell's tanh and its σ; None for
        the cell's own.
    """

    clip: float = np.inf
    cell_clip: float = np.inf
    zoneout: tuple[float, float] = (0.0, 0.0)
    recurrent_dropout: float = 0.0
    weight_dropout: float = 0.0
    training: bool = False
    seed: int = 0
    where: int = 0
    bptt: int = 0
    return_cells: bool = False
    trace: bool = False
    recompute: bool = False
    repeats: bool = False
    activation: Activation | None = None
    recurrent_activation: Activation | None = None

    @property
    def is_random(self) -> bool:
        """Whether results depend on the seed."""
        drops = self.recurrent_dropout + self.weight_dropout > 0
        return self.training and (drops or any(self.zoneout))

    @property
    def drops_weights(self) -> bool:
        """Whether this call masks R."""
        return self.training and self.weight_dropout > 0
