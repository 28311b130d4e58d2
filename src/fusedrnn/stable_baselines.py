"""Stable Baselines' recurrent policies on our kernels (sb3-contrib 2.4 or newer).

sb3-contrib's ``RecurrentPPO`` runs the LSTMs of its policy one step at a time in Python as soon
as an episode starts anywhere in a batch, which is the case in almost every update. `swap` makes
the same policy run each LSTM over a batch in one call, with the starts of episodes as `resets`.

::

    from sb3_contrib import RecurrentPPO
    import fusedrnn.stable_baselines

    model = RecurrentPPO("MlpLstmPolicy", env)
    fusedrnn.stable_baselines.swap(model)
    model.learn(100_000)
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from . import torch as ft
from .torch.swapping import as_ours

__all__ = ["process_sequence", "restore", "swap"]

States = tuple[Tensor, Tensor]


def process_sequence(
    features: Tensor, lstm_states: States, episode_starts: Tensor, lstm: Any
) -> tuple[Tensor, States]:
    """Run an LSTM over sequences in which episodes may start, in one call.

    This replaces the method ``_process_sequence`` of sb3-contrib's recurrent policies. A policy
    class of your own can use it, too: ``_process_sequence = staticmethod(process_sequence)``.

    Parameters
    ----------
    features: (B*T, I), the T steps of the first sequence, then those of the second, ….
    lstm_states: h and c before the first step, each (layers, B, H).
    episode_starts: (B*T,), 1 where an episode starts and the state is set to 0 before the
        step, otherwise 0.
    lstm: a `fusedrnn.torch.LSTM`.

    Returns
    -------
    The output (B*T, H) in the order of ``features``, and h and c after the last step.

    >>> import torch, fusedrnn.torch as ft
    >>> state = torch.zeros(1, 3, 4), torch.zeros(1, 3, 4)
    >>> features, starts = torch.ones(3 * 5, 2), torch.zeros(3 * 5)
    >>> output, (h, c) = process_sequence(features, state, starts, ft.LSTM(2, 4))
    >>> output.shape
    torch.Size([15, 4])
    """
    B = lstm_states[0].shape[1]
    x = features.reshape(B, -1, lstm.input_size).transpose(0, 1)
    starts = episode_starts.reshape(B, -1).transpose(0, 1)
    if len(x) == 1:  # a step of a rollout, where checking resets costs more than the kernel
        kept = (1 - starts).unsqueeze(-1)
        y, states = lstm(x, (kept * lstm_states[0], kept * lstm_states[1]))
    else:
        y, states = lstm(x, lstm_states, resets=starts)
    return y.transpose(0, 1).flatten(0, 1), states


def swap(model: Any) -> ft.Swapped:
    """Make a recurrent policy run on our kernels, each LSTM in one call over a batch.

    `fusedrnn.torch.swap` replaces every recurrent module of the policy, and `process_sequence`
    replaces the policy's loop over steps. Parameters are shared, so the optimizer continues to
    work. Only this model changes, not its class, and ``model.save`` writes the same file as
    before: call `swap` again after ``RecurrentPPO.load``.

    Parameters
    ----------
    model: a ``RecurrentPPO`` or its policy, MlpLstmPolicy, CnnLstmPolicy, MultiInputLstmPolicy
        or a subclass; it is changed in place.

    Returns
    -------
    The replaced modules and those that were not; print it.

    Raises
    ------
    TypeError: the model has no recurrent policy, or one with a loop or modules of its own.
    ImportError: sb3-contrib is not installed.
    """
    policy = _policy_of(model)
    if policy._process_sequence not in (_base()._process_sequence, process_sequence):
        raise TypeError(
            "model must use sb3-contrib's _process_sequence, got "
            f"{type(policy).__name__} with its own: use fusedrnn.torch.swap and, in place of "
            "its loop over steps, resets"
        )
    for name in ("lstm_actor", "lstm_critic"):
        lstm = getattr(policy, name)
        new = lstm if lstm is None or isinstance(lstm, ft.LSTM) else as_ours(lstm)
        if new is not lstm and not isinstance(new, ft.LSTM):
            why = f": {new}" if isinstance(new, str) else ""
            raise TypeError(
                f"the policy's {name} must be a torch.nn.LSTM, got {type(lstm).__name__}{why}"
            )
    done = ft.swap(policy)
    policy._process_sequence = process_sequence
    return done


def restore(model: Any) -> Any:
    """Put torch.nn's modules and the loop over steps back: the way back from `swap`.

    Parameters
    ----------
    model: a ``RecurrentPPO`` or its policy; it is changed in place.

    Returns
    -------
    The result of `fusedrnn.torch.restore`; print it.

    Raises
    ------
    TypeError: the model has no recurrent policy.
    ImportError: sb3-contrib is not installed.
    """
    policy = _policy_of(model)
    done = ft.restore(policy)
    vars(policy).pop("_process_sequence", None)
    return done


def _base() -> Any:
    """Return sb3-contrib's class of recurrent policies."""
    from sb3_contrib.common.recurrent.policies import RecurrentActorCriticPolicy

    return RecurrentActorCriticPolicy


def _policy_of(model: Any) -> Any:
    """Return the recurrent policy of a model, or the model if it is one."""
    policy = getattr(model, "policy", model)
    if not isinstance(policy, _base()):
        raise TypeError(
            "model must be a RecurrentPPO or a RecurrentActorCriticPolicy of sb3-contrib, got "
            f"{type(model).__name__}"
        )
    return policy
