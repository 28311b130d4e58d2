"""Real packages compute the same on our kernels, where they are installed."""

from __future__ import annotations

import copy
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import assert_close

torch = pytest.importorskip("torch", reason="the packages are PyTorch's, or beside it")

import fusedrnn.stable_baselines as fsb  # noqa: E402
import fusedrnn.torch as ft  # noqa: E402

FOLDER = Path(__file__).parents[1] / "examples" / "packages"
SCRIPTS = sorted(
    path.stem for path in FOLDER.glob("*.py") if path.stem not in ("run", "shared")
)
NOT_INSTALLED = 77


# The scripts of examples/packages


@pytest.mark.parametrize("name", SCRIPTS)
def test_script(name: str, tmp_path: Path) -> None:
    """A package's results on our kernels are its own: to 1e-5 in float32."""
    done = subprocess.run(
        [sys.executable, str(FOLDER / f"{name}.py"), "--short", "--threads", "1"],
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
        cwd=tmp_path,
    )
    if done.returncode == NOT_INSTALLED:
        pytest.skip(done.stdout.strip())
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [line.split(" | ") for line in done.stdout.splitlines() if line.startswith("| ")][1:]
    assert rows
    for _, case, lines, difference, *_ in rows:
        assert int(lines) > 0
        rounded = re.search("int8|bfloat16", case)
        assert float(difference.partition(",")[0]) <= (0.2 if rounded else 1e-5), case


@pytest.mark.parametrize("option", ["--threads=0", "--seconds=-1"])
def test_wrong_options(option: str) -> None:
    """A wrong option ends a script with one clear line and status 2."""
    done = subprocess.run(
        [sys.executable, str(FOLDER / "genomes.py"), option],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 2
    name, _, value = option.partition("=")
    assert f"{name} must be above 0, got {value}" in done.stderr.splitlines()[-1]
    assert done.stdout == ""


# Stable Baselines


def loop(features: Any, states: Any, episode_starts: Any, lstm: Any) -> Any:
    """The definition: a state is set to zero where an episode starts, then a step is taken."""
    B = states[0].shape[1]
    x = features.reshape(B, -1, features.shape[-1])
    starts = episode_starts.reshape(B, -1)
    y = []
    for t in range(x.shape[1]):
        states = tuple((1 - starts[:, t, None]) * s for s in states)
        step, states = lstm(x[None, :, t], states)
        y.append(step[0])
    return torch.stack(y, 1).reshape(-1, y[0].shape[-1]), states


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize(("B", "T"), [(1, 1), (3, 1), (1, 7), (3, 7)])
@pytest.mark.parametrize("share", [0.0, 0.4, 1.0], ids=["none", "some", "all"])
def test_process_sequence(layers: int, B: int, T: int, share: float) -> None:
    """One call is a loop over steps with states that are reset, forward and backward."""
    torch.manual_seed(0)
    theirs = torch.nn.LSTM(5, 8, layers, dtype=torch.float64)
    ours = ft.LSTM(5, 8, layers, dtype=torch.float64)
    ours.load_state_dict(theirs.state_dict())
    features = torch.randn(B * T, 5, dtype=torch.float64)
    states = tuple(torch.randn(layers, B, 8, dtype=torch.float64) for _ in range(2))
    starts = (torch.rand(B * T) < share).double()
    results = []
    for run, lstm in ((loop, theirs), (fsb.process_sequence, ours)):
        x = features.clone().requires_grad_()
        y, (h, c) = run(x, states, starts, lstm)
        (y.sin().sum() + (h * c).sum()).backward()
        results.append([y, h, c, x.grad, *(p.grad for p in lstm.parameters())])
    assert_close(results[1], results[0], gradient=True)


def image_space() -> Any:
    from gymnasium import spaces

    return spaces.Box(0, 255, (3, 36, 36), np.uint8)


def make_agent(policy: str = "MlpLstmPolicy", **policy_kwargs: Any) -> Any:
    """An agent in an environment with episodes of random lengths; equal at each call."""
    pytest.importorskip("sb3_contrib", reason="the agent is sb3-contrib's")
    import gymnasium
    from gymnasium import spaces
    from sb3_contrib import RecurrentPPO

    of_policy = {
        "MlpLstmPolicy": spaces.Box(-1, 1, (3,), np.float32),
        "CnnLstmPolicy": image_space(),
        "MultiInputLstmPolicy": spaces.Dict(
            {"a": spaces.Box(-1, 1, (3,), np.float32), "b": spaces.Discrete(4)}
        ),
    }

    class Episodes(gymnasium.Env[Any, Any]):
        observation_space = of_policy[policy]
        action_space = spaces.Discrete(3)

        def reset(self, *, seed: Any = None, options: Any = None) -> Any:
            super().reset(seed=seed)
            if seed is not None:
                self.observation_space.seed(seed)
            self.left = int(self.np_random.integers(1, 12))
            return self.observation_space.sample(), {}

        def step(self, action: Any) -> Any:
            self.left -= 1
            reward = float(action == self.left % 3)
            return self.observation_space.sample(), reward, self.left == 0, False, {}

    from stable_baselines3.common.vec_env import DummyVecEnv

    return RecurrentPPO(
        policy,
        DummyVecEnv([Episodes, Episodes]),
        n_steps=16,
        batch_size=16,
        n_epochs=2,
        seed=0,
        device="cpu",
        policy_kwargs={"lstm_hidden_size": 8, **policy_kwargs},
    )


def learn(model: Any, rollouts: int = 3) -> list[float]:
    """Train; return the losses and the sum of each parameter."""
    found = []
    for _ in range(rollouts):
        model.learn(32, log_interval=10**9, reset_num_timesteps=False)
        values = model.logger.name_to_value
        found += [values["train/loss"], values["train/value_loss"], values["train/approx_kl"]]
    return [*map(float, found), *(float(p.detach().sum()) for p in model.policy.parameters())]


POLICIES = [
    ("MlpLstmPolicy", {}),
    ("MlpLstmPolicy", {"n_lstm_layers": 2}),
    ("MlpLstmPolicy", {"shared_lstm": True, "enable_critic_lstm": False}),
    ("MlpLstmPolicy", {"enable_critic_lstm": False}),
    ("MlpLstmPolicy", {"lstm_kwargs": {"bias": False}}),
    ("MlpLstmPolicy", {"share_features_extractor": False}),
    ("CnnLstmPolicy", {}),
    ("MultiInputLstmPolicy", {}),
]
of_every_policy = pytest.mark.parametrize(
    ("policy", "kwargs"), POLICIES, ids=[f"{p}-{'-'.join(k)}" for p, k in POLICIES]
)


@of_every_policy
def test_agent_trains_the_same(policy: str, kwargs: dict[str, Any]) -> None:
    """An agent trains the same after swap, and after restore, whatever its policy."""
    expected = learn(make_agent(policy, **kwargs))
    model = make_agent(policy, **kwargs)
    done = fsb.swap(model)
    assert set(done.replaced) >= {"lstm_actor"}
    assert not any(isinstance(m, torch.nn.LSTM) for m in model.policy.modules())
    assert learn(model) == pytest.approx(expected, rel=1e-5, abs=1e-5)

    model = make_agent(policy, **kwargs)
    fsb.swap(model)
    found = learn(model, 1)[:3]
    assert fsb.restore(model).replaced.keys() == done.replaced.keys()
    assert not any(isinstance(m, ft.LSTM) for m in model.policy.modules())
    assert type(model.policy)._process_sequence is model.policy._process_sequence
    found += learn(model, 2)
    assert found == pytest.approx(expected, rel=1e-5, abs=1e-5)


def test_one_call_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each update calls each LSTM once, though episodes start within its batch."""
    calls = []
    forward = ft.LSTM.forward

    def counted(self: Any, *arguments: Any, **options: Any) -> Any:
        calls.append("resets" in options)
        return forward(self, *arguments, **options)

    monkeypatch.setattr(ft.LSTM, "forward", counted)
    model = make_agent()
    fsb.swap(model)
    model.learn(32, log_interval=10**9)
    assert sum(calls) == 2 * 2 * 2  # LSTMs, batches, epochs


def test_saved_agent(tmp_path: Path) -> None:
    """A saved agent loads unswapped, with the same actions, and trains on if swapped again."""
    from_file = {}
    for swap in (None, fsb.swap):
        model = make_agent()
        if swap:
            swap(model)
        learn(model, 1)
        model.save(tmp_path / "agent.zip")
        observation = np.random.default_rng(0).uniform(-1, 1, (2, 3)).astype(np.float32)
        expected = model.predict(observation, deterministic=True)
        loaded = type(model).load(tmp_path / "agent.zip", env=model.env)
        assert type(loaded.policy.lstm_actor) is torch.nn.LSTM
        if swap:
            swap(loaded)
        actions, states = loaded.predict(observation, deterministic=True)
        assert (actions == expected[0]).all()
        np.testing.assert_allclose(states, expected[1], atol=1e-6)
        torch.manual_seed(0)
        loaded.env.seed(0)
        from_file[swap] = learn(loaded, 1)
    assert from_file[fsb.swap] == pytest.approx(from_file[None], rel=1e-5, abs=1e-5)


def test_policy_alone() -> None:
    """A policy is taken like its model; copies of it keep the change, others lack it."""
    model, other = make_agent(), make_agent()
    assert str(fsb.swap(model.policy)) == "lstm_actor: LSTM(3, 8)\nlstm_critic: LSTM(3, 8)"
    assert copy.deepcopy(model.policy)._process_sequence is fsb.process_sequence
    assert other.policy._process_sequence is not fsb.process_sequence
    fsb.swap(model)  # changes nothing more
    fsb.restore(model.policy)
    assert model.policy._process_sequence is other.policy._process_sequence


def own_loop(policy: Any) -> None:
    policy._process_sequence = lambda *arguments: arguments


def gru(policy: Any) -> None:
    policy.lstm_critic = torch.nn.GRU(3, 8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (own_loop, "model must use sb3-contrib's _process_sequence, got"),
        (gru, "the policy's lstm_critic must be a torch.nn.LSTM, got GRU"),
    ],
)
def test_other_policies(change: Callable[[Any], None], message: str) -> None:
    """A policy with a loop or with modules of its own is refused, and not changed."""
    model = make_agent()
    change(model.policy)
    before = list(model.policy.modules())
    with pytest.raises(TypeError, match=message):
        fsb.swap(model)
    assert list(model.policy.modules()) == before


def test_other_models() -> None:
    """A model without a recurrent policy is refused."""
    pytest.importorskip("sb3_contrib", reason="policies are sb3-contrib's")
    for function in (fsb.swap, fsb.restore):
        for model in (torch.nn.LSTM(3, 4), None):
            with pytest.raises(TypeError, match="model must be a RecurrentPPO or a Recurrent"):
                function(model)
