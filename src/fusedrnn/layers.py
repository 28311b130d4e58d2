"""Layers that own their parameters: a call of all layers and directions, and its pullback."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from . import checks, cuda, engine
from .backend import Backend
from .cells import CELLS, rnn_cell
from .explain import Explanation, explain
from .options import ActivationLike, MaskedOutput, check_options, with_seed
from .parameters import Init, ParameterStore
from .reference import Array, Nonlinearity, Options

StateT = TypeVar("StateT")


class LayerGrads(NamedTuple, Generic[StateT]):
    """The gradients that a layer's pullback returns.

    Attributes
    ----------
    x: shaped like the input.
    state: shaped like the initial state: h0, or (h0, c0) for an LSTM.
    parameters: a dict with the keys and shapes of `fusedrnn.LSTM.state_dict`.
    """

    x: Array
    state: StateT
    parameters: dict[str, Array]


class _Layer(ParameterStore, Generic[StateT]):
    def __call__(
        self,
        x: Array,
        state: StateT | None = None,
        lengths: npt.ArrayLike | None = None,
        resets: npt.ArrayLike | None = None,
        mask: npt.ArrayLike | None = None,
        *,
        masked_output: MaskedOutput = "zero",
        training: bool = False,
        seed: int | None = None,
        return_cells: bool = False,
        trace: bool = False,
    ) -> tuple[Any, ...]:
        """Run the layer over a sequence; nothing is saved for gradients.

        Parameters
        ----------
        x: (T, B, I), (B, T, I) if batch_first, or (T, I).
        state: h0, or (h0, c0) for an LSTM, each (layers*directions, B, H) or, for x of rank
            2, (layers*directions, H); None for zeros. With proj_size, h0 has proj_size units.
        lengths: (B,) integers 0 to T in any order, one for x of rank 2, or None for T. Row b
            takes only the steps t < lengths[b]: beyond them its y is 0 and x is not read.
        resets: bool, shaped like x without its last axis, or None for none. Where true, the
            state is set to 0 before that step, in every layer and direction.
        mask: bool, shaped like resets, or None for all true: the steps that a row takes, with
            padding and gaps anywhere, in every layer and direction.
        masked_output: y at steps that are not taken: "zero", or "last" for h of the unchanged
            state.
        training: draw the masks of dropout and zoneout at random; otherwise dropout has no
            effect and zoneout takes its expected value.
        seed: 0 to 2**64 - 1, determines the masks; None draws a new one in each call.
        return_cells: also return every c of the last layer of an LSTM.
        trace: also return every gate, as a dict of arrays (T, B, H), or laid out like x, by
            names such as "i_l0".

        Returns
        -------
        y: (T, B, directions*H), (B, T, …) or (T, …), every h of the last layer.
        state: the state after each row's last step in each direction, shaped like the initial
            state.
        cells: every c of the last layer, shaped like y but with H units; only with
            return_cells.
        gates: a dict of every gate; only with trace.

        Raises
        ------
        TypeError: a wrong type or dtype. ValueError: a wrong shape or value. Both before
            computing.
        """
        plain = training is return_cells is trace is False and seed is None
        if plain and masked_output == "zero":
            results: tuple[Any, ...] = self._run(
                x, state, lengths, resets, mask, self._options, False
            )
            return results
        options = self._call_options(
            masked_output=masked_output,
            training=training,
            seed=seed,
            return_cells=self._none_if_false(return_cells),
            trace=trace,
        )
        results = self._run(x, state, lengths, resets, mask, options, False)
        return self._with_gates(results) if trace else results

    def vjp(
        self,
        x: Array,
        state: StateT | None = None,
        lengths: npt.ArrayLike | None = None,
        resets: npt.ArrayLike | None = None,
        mask: npt.ArrayLike | None = None,
        *,
        masked_output: MaskedOutput = "zero",
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
        copied. On a GPU everything is kept by reference, y and cells too: do not change them
        before you call the pullback. New parameters may be assigned in between.

        Returns
        -------
        results, pullback: as from a call, and ``pullback(dy=None, d_state=None,
            d_cells=None)``, which takes the gradients of y, state and cells, None for zeros,
            and returns a `fusedrnn.layers.LayerGrads`. It may be called more than once.
        """
        self._check_trains("vjp")
        usual = training is True and return_cells is trace is recompute is False
        usual = usual and masked_output == "zero"
        if usual and seed is bptt is None and not self._draws:
            options = self._training
        else:
            options = self._call_options(
                masked_output=masked_output,
                training=training,
                seed=seed,
                return_cells=self._none_if_false(return_cells),
                trace=trace,
                bptt=bptt,
                recompute=recompute,
            )
        results, tape = self._run(x, state, lengths, resets, mask, options, True)
        on_cpu, names = self.device == "cpu", list(self._parameters)
        made_with = (self.precision, self._spec, self.dtype)  # `to` may change them

        def pullback(dy: Any = None, d_state: Any = None, d_cells: Any = None) -> Any:
            grads = tape.backward(dy, d_state, d_cells) if on_cpu else None
            if grads is None:
                gradients = (dy, d_state, d_cells)
                grads = self._pull_back(made_with, tape, x, results, options, *gradients)
            dx, d_start, d_parameters = grads
            return LayerGrads(dx, d_start, dict(zip(names, d_parameters, strict=True)))

        return (self._with_gates(results) if trace else results), pullback

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
        """Return which kernels a call runs, why, and the least time it can take.

        Parameters
        ----------
        T, B: the sizes of x.
        training: describe `vjp` and its pullback instead of a call.
        return_cells, trace, recompute: the arguments of the call.

        Returns
        -------
        A dict that prints as text: "way" and "why"; "plans", the threads, tiles and packing of
        each layer and direction; "flops"; "weight_bytes" and "io_bytes"; "weights", if they are
        narrow; on the CPU "saved_bytes", "isa" and "floor", the seconds that the products take
        at the peak of this machine's multipliers and caches, measured in about a second.

        Raises
        ------
        TypeError, ValueError: an argument of a wrong type or value.

        >>> import fusedrnn as fr
        >>> explanation = fr.LSTM(3, 4, peephole=True).explain(10, 2)
        >>> explanation["way"], explanation["flops"]
        ('kernels with options', 4480)
        """
        options = self._call_options(
            training=training,
            return_cells=self._none_if_false(return_cells),
            trace=trace,
            recompute=recompute,
        )
        return explain(self, T, B, options, training)

    # Calls

    def _run(
        self,
        x: Any,
        state: Any,
        lengths: Any,
        resets: Any,
        mask: Any,
        options: Options,
        saves: bool,
    ) -> Any:
        """Call the layers with unchecked arguments or, if they return None, checked ones."""
        compiled = self._packed.get("layers")
        if compiled is not None:
            results = compiled.forward(x, state, lengths, resets, mask, options, None, saves)
            if results is not None:
                return results
        spec, cache = self._spec, self._packed  # before the parameters: see _forget_packed
        states = engine.split_state("state", spec.cell, state)
        on = self._backend(x)
        x = engine.check_input(on, x, self.batch_first, self.input_size)
        if x.dtype != self.dtype:
            raise TypeError(f"x must be {self.dtype} like the layer, got {x.dtype}")
        _, batch = engine.sizes(spec, x)
        names = [f"{letter}0" for letter in spec.cell.states]
        start = engine.check_state(on, spec, names, states, x.dtype, batch)
        masks = engine.check_masks(on, spec, x, options, lengths, resets, mask)
        layers = on.layers(spec, self._all_parameters(), cache)
        return layers.forward(x, start, *masks, options, None, saves)

    def _backend(self, x: Any) -> Backend:
        """Return the backend of x, which must be that of the layer."""
        on = engine.backend_of(x, self.precision if cuda.framework_of(x) else "exact")
        if str(on) != self.device:
            raise ValueError(f"x must be on {self.device} like the layer, got one on {on}")
        return on

    def _pull_back(
        self,
        made_with: tuple[Any, ...],
        tape: Any,
        x: Any,
        results: tuple[Any, ...],
        options: Options,
        dy: Any,
        d_state: Any,
        d_cells: Any,
    ) -> Any:
        """Check the gradients of the results and run backward."""
        cells = results[2] if options.return_cells else None
        split = engine.split_state("d_state", self._cell, d_state)
        precision, spec, dtype = made_with
        where = (engine.backend_of(x, precision), spec, tape, dtype)
        gradients = (dy, split, d_cells)
        return engine.pull_back(*where, results[0], cells, *gradients, "d_state, d{}_n,")

    def _with_gates(self, results: tuple[Any, ...]) -> tuple[Any, ...]:
        names = [f"_{suffix}" for _, _, suffix in self._directions()]
        return engine.with_gates(self._spec, results, names)

    @functools.cached_property
    def _training(self) -> Options:
        """The options of a plain pullback."""
        return self._options._replace(training=True)

    @property
    def _draws(self) -> bool:
        """Whether training depends on a seed."""
        return self._training.is_random or self.dropout > 0

    def _check_trains(self, what: str) -> None:
        """Refuse a call that needs weights of the layer's dtype."""
        if self.weights:
            raise ValueError(
                f"{what} needs float32 or float64 weights: a layer with {self.weights} weights "
                "is for inference"
            )

    def _call_options(self, seed: Any = None, **arguments: Any) -> Options:
        """Return the layer's options with the arguments of a call."""
        if arguments.get("training") is True:
            self._check_trains("training=True")
        absent = {k for k in ("return_cells", "bptt") if arguments.get(k) is None}
        present = {k: v for k, v in arguments.items() if k not in absent}
        checked = check_options(self._cell, present)
        fields = ("training", "bptt", "return_cells", "trace", "recompute", "repeats")
        options = self._options._replace(**{n: getattr(checked, n) for n in fields})
        seed, drops = checks.seed(seed), self.dropout > 0 and options.training
        return with_seed(options, seed) if options.is_random or drops else options

    @staticmethod
    def _none_if_false(return_cells: Any) -> Any:
        """Return None for False, because only an LSTM has this option."""
        return None if return_cells is False else return_cells


class LSTM(_Layer[tuple[Array, Array]]):
    """A stack of LSTM layers in one or both directions, as `torch.nn.LSTM`.

    The equations are those of `fusedrnn.lstm`; layer l+1 reads the y of layer l, both
    directions side by side.

    Parameters
    ----------
    input_size, hidden_size: I and H.
    num_layers: the number of stacked layers.
    bias: whether there are bias_ih and bias_hh.
    batch_first: x and y are (B, T, …); states are (layers*directions, B, H) nevertheless.
    dropout: the probability with which an element of y is dropped between two layers, the
        others scaled by 1 / (1 - dropout); in training only, like the dropouts below.
    bidirectional: each layer also runs from the last step to the first.
    proj_size: R, the units of a projected h; 0 for none.
    reverse: every layer runs from the last step to the first; y[t] still belongs to x[t].
    peephole, coupled_gates, layer_norm, activation, recurrent_activation, clip, cell_clip,
        zoneout, recurrent_dropout, weight_dropout: as for `fusedrnn.lstm`.
    forget_bias: the initial sum of the forget gate's two biases (Gers, Schmidhuber & Cummins
        2000; 1 after Jozefowicz, Zaremba & Sutskever 2015); None draws them like the others.
    orthogonal: initialise each block of weight_hh with orthonormal columns (Saxe, McClelland &
        Ganguli 2014).
    dtype: float32, float64 or "bfloat16", whose arrays are those of the package ml_dtypes and
        whose states and gradients of parameters are float32 (`fusedrnn.reference.narrow`).
    rng: a NumPy generator or seed to draw the parameters, which are uniform in ±1/√H unless
        stated above.

    Its parameters are attributes with torch's names (weight_ih_l0, weight_hh_l0, bias_ih_l0,
    bias_hh_l0, weight_hr_l0, …_reverse) and those of `fusedrnn.lstm` (weight_ch_l0,
    gamma_ih_l0 …), read-only arrays; assign a new array to change one. Several threads may
    call a layer at once, but not while a parameter is assigned. A layer can be pickled.

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
        reverse: bool = False,
        peephole: bool = False,
        coupled_gates: bool = False,
        layer_norm: bool = False,
        activation: ActivationLike = "tanh",
        recurrent_activation: ActivationLike = "sigmoid",
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
        expected = "from 0, for none, to hidden_size - 1"
        self.proj_size = checks.integer("proj_size", proj_size, 0, 2**31, expected)
        self.peephole = checks.flag("peephole", peephole)
        self.coupled_gates = checks.flag("coupled_gates", coupled_gates)
        self.layer_norm = checks.flag("layer_norm", layer_norm)
        if forget_bias is not None:
            forget_bias = checks.number("forget_bias", forget_bias)
            if self.coupled_gates or not bias:
                reason = (
                    "coupled_gates has no forget gate" if coupled_gates else "there is no bias"
                )
                raise ValueError(f"forget_bias must be None: {reason}, got {forget_bias}")
        super().__init__(
            CELLS["lstm_coupled" if self.coupled_gates else "lstm"],
            input_size,
            hidden_size,
            num_layers,
            bias,
            batch_first,
            dropout,
            bidirectional,
            reverse,
            dtype,
            rng,
            Init(forget_bias, checks.flag("orthogonal", orthogonal)),
            activation=activation,
            recurrent_activation=recurrent_activation,
            clip=clip,
            cell_clip=cell_clip,
            zoneout=zoneout,
            recurrent_dropout=recurrent_dropout,
            weight_dropout=weight_dropout,
        )


class GRU(_Layer[Array]):
    """A stack of GRU layers in one or both directions, as `torch.nn.GRU`.

    The equations and options are those of `fusedrnn.gru`; everything else is as for `LSTM`,
    except that the state is h0 alone.

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
        reverse: bool = False,
        reset_after: bool = True,
        layer_norm: bool = False,
        activation: ActivationLike = "tanh",
        recurrent_activation: ActivationLike = "sigmoid",
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
            reverse,
            dtype,
            rng,
            Init(orthogonal=checks.flag("orthogonal", orthogonal)),
            activation=activation,
            recurrent_activation=recurrent_activation,
            clip=clip,
            zoneout=zoneout,
            recurrent_dropout=recurrent_dropout,
            weight_dropout=weight_dropout,
        )


class RNN(_Layer[Array]):
    """A stack of Elman RNN layers in one or both directions, as `torch.nn.RNN`.

    The equations and options are those of `fusedrnn.rnn`; nonlinearity is "tanh", "relu" or
    "identity". Everything else is as for `LSTM`, except that the state is h0 alone.

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
        reverse: bool = False,
        activation: ActivationLike = "tanh",
        clip: float | None = None,
        zoneout: float = 0.0,
        recurrent_dropout: float = 0.0,
        weight_dropout: float = 0.0,
        orthogonal: bool = False,
        dtype: npt.DTypeLike = np.float32,
        rng: np.random.Generator | int | None = None,
    ) -> None:
        cell = rnn_cell({"nonlinearity": nonlinearity})
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
            reverse,
            dtype,
            rng,
            Init(orthogonal=checks.flag("orthogonal", orthogonal)),
            activation=activation,
            clip=clip,
            zoneout=zoneout,
            recurrent_dropout=recurrent_dropout,
            weight_dropout=weight_dropout,
        )
