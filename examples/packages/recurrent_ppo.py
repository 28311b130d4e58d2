"""Train sb3-contrib's RecurrentPPO, and the same on our kernels.

    pip install "fusedrnn[sb3]" threadpoolctl
    python examples/packages/recurrent_ppo.py

The agent sees positions and angles but no velocities, so it must remember. A call is one
rollout and one update, as `learn` does them; the recurrent part is the update. An episode of
CartPole takes some 20 steps at first, one of Pendulum 200: fewer batches have a start.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from shared import Case, Package, Pair, difference, main

PACKAGE = Package(
    "sb3-contrib",
    ("sb3_contrib", "stable_baselines3", "gymnasium", "torch"),
    "pip install --no-deps sb3-contrib stable-baselines3 gymnasium farama-notifications "
    "cloudpickle",
)
LOSSES = ("loss", "value_loss", "policy_gradient_loss", "entropy_loss", "approx_kl")
# The environment, and the observations that are no velocities.
TASKS = {"CartPole-v1": [0, 2], "Pendulum-v1": [0, 1]}


def agent(task: str, n_envs: int, **arguments: Any) -> Any:
    """Return an agent that sees no velocities; the same at each call."""
    import gymnasium
    import numpy as np
    from sb3_contrib import RecurrentPPO
    from stable_baselines3.common.env_util import make_vec_env

    def blinded(env: Any) -> Any:
        space, seen = env.observation_space, TASKS[task]
        low, high = space.low[seen], space.high[seen]
        return gymnasium.wrappers.TransformObservation(
            env, lambda values: values[seen], gymnasium.spaces.Box(low, high, dtype=np.float32)
        )

    env = make_vec_env(task, n_envs, seed=0, wrapper_class=blinded)
    return RecurrentPPO("MlpLstmPolicy", env, seed=0, device="cpu", **arguments)


def learn(model: Any) -> list[float]:
    """Train for a rollout and an update; return the losses."""
    steps = model.n_steps * model.n_envs
    model.learn(steps, log_interval=10**9, reset_num_timesteps=False)
    return [float(model.logger.name_to_value[f"train/{name}"]) for name in LOSSES]


def case(name: str, swap: Callable[[Any], Any], **arguments: Any) -> Case:
    """Train two equal agents, one after `swap`."""
    own = agent(**arguments)
    expected = [learn(own) for _ in range(3)]
    ours = agent(**arguments)  # seeds all random numbers again
    swap(ours)
    found = [learn(ours) for _ in range(3)]
    return Case(
        name,
        lines=1,
        difference=difference(found, expected),
        whole=Pair(lambda: learn(own), lambda: learn(ours)),
        recurrent=Pair(own.train, ours.train),
    )


def cases(short: bool) -> Iterator[Case]:
    """Yield the cases: tasks, numbers of environments, and the modules alone."""
    import fusedrnn.stable_baselines
    import fusedrnn.torch as ft

    swap = fusedrnn.stable_baselines.swap
    size = {"n_epochs": 2, "policy_kwargs": {"lstm_hidden_size": 16}} if short else {}
    for task, n_envs, n_steps, name, change in (
        ("CartPole-v1", 1, 128, "", swap),
        ("CartPole-v1", 8, 32, "", swap),
        ("CartPole-v1", 8, 32, ", `ft.swap` alone", lambda model: ft.swap(model.policy)),
        ("Pendulum-v1", 1, 128, "", swap),
        ("Pendulum-v1", 8, 32, "", swap),
    ):
        environments = f"{n_envs} environment" + "s" * (n_envs > 1)
        how = {"task": task, "n_envs": n_envs, "n_steps": n_steps, **size}
        yield case(f"{task}, {environments}{name}", change, **how)


if __name__ == "__main__":
    main(__doc__, {PACKAGE: cases})
