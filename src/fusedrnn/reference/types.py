"""Types of the definition: parameters, options, gradients."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
State = tuple[Array, ...]
Nonlinearity = Literal["tanh", "relu", "identity"]  # the rows of RNN
Gradients = dict[str, Array]


class Grads(NamedTuple):
    """Gradients of an op's arguments; one that was None or that the cell has not has None."""

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
    gamma_c, beta_c: those of the cell state (H,), for an LSTM with LayerNorm.
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


class Options(NamedTuple):
    """What a call is asked for beside its arrays.

    Attributes
    ----------
    clip: bounds every pre-activation to [-clip, clip].
    cell_clip: bounds c.
    zoneout: the probabilities with which h and c keep their values before the step.
    recurrent_dropout: the probability with which R does not see an element of h'.
    weight_dropout: that with which an element of R is 0.
    training: draw those at random; else take the expected value.
    seed, where: what the random numbers depend on, `where` telling layers and directions apart.
    bptt: no gradient of the state passes from one chunk of so many times to another; 0: one.
    return_cells, trace: return every c, every gate. recompute: keep them not for backward.
        The reference, which does all of that, does not look at these three.
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

    @property
    def is_random(self) -> bool:
        """Whether random numbers decide."""
        drops = self.recurrent_dropout + self.weight_dropout > 0
        return self.training and (drops or any(self.zoneout))

    @property
    def drops_weights(self) -> bool:
        """Whether R is another in this call."""
        return self.training and self.weight_dropout > 0
