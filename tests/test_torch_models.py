"""Three models as they are usually written train the same with our modules swapped in."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from helpers import assert_close

torch = pytest.importorskip("torch", reason="the models are PyTorch's")

from torch import nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence  # noqa: E402

import fusedrnn.torch as ft  # noqa: E402

STEPS = 20


# A language model after AWD-LSTM (Merity, Keskar & Socher 2017)


class WeightDrop(nn.Module):
    """Drops elements of an LSTM's recurrent weights, by setting the attribute at each call."""

    def __init__(self, module: Any, p: float) -> None:
        super().__init__()
        self.module, self.p = module, p
        raw = module.weight_hh_l0
        del module._parameters["weight_hh_l0"]
        module.register_parameter("weight_hh_l0_raw", nn.Parameter(raw.data))
        module.weight_hh_l0 = raw.data

    def forward(self, *args: Any) -> Any:
        raw = self.module.weight_hh_l0_raw
        self.module.weight_hh_l0 = F.dropout(raw, self.p, self.training)
        return self.module(*args)


class LanguageModel(nn.Module):
    def __init__(self, vocabulary: int = 30, size: int = 12, hidden: int = 16) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, size)
        sizes = [size, hidden, hidden, size]
        self.layers = nn.ModuleList(
            WeightDrop(nn.LSTM(a, b), 0.3) for a, b in itertools.pairwise(sizes)
        )
        self.head = nn.Linear(size, vocabulary)
        self.head.weight = self.embedding.weight

    @staticmethod
    def locked_dropout(x: Any, p: float) -> Any:
        return x * F.dropout(torch.ones_like(x[:1]), p)

    def forward(self, tokens: Any, states: Any) -> Any:
        x, after = self.locked_dropout(self.embedding(tokens), 0.2), []
        for layer, state in zip(self.layers, states, strict=True):
            x, state = layer(x, state)
            after.append(tuple(s.detach() for s in state))
            raw, x = x, self.locked_dropout(x, 0.2)
        return self.head(x), raw, x, after


def language_model(swapped: Callable[[Any], Any]) -> Iterator[float]:
    model = swapped(LanguageModel())
    step = torch.optim.SGD(model.parameters(), lr=2.0, weight_decay=1e-6)
    text, states, length = torch.randint(30, (STEPS * 9 + 1, 4)), [None] * 3, 9
    for n in range(STEPS):
        part = text[n * length : (n + 1) * length + 1]
        logits, raw, dropped, states = model(part[:-1], states)
        loss = F.cross_entropy(logits.flatten(0, 1), part[1:].flatten())
        step.zero_grad()
        smooth = (raw[1:] - raw[:-1]).square().mean()
        (loss + 2 * dropped.square().mean() + smooth).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.25)
        step.step()
        yield loss.item()


# Translation with attention (Bahdanau et al. 2015; Luong et al. 2015)


class Translator(nn.Module):
    def __init__(self, vocabulary: int = 25, size: int = 8, hidden: int = 12) -> None:
        super().__init__()
        self.source = nn.Embedding(vocabulary, size, padding_idx=0)
        self.target = nn.Embedding(vocabulary, size, padding_idx=0)
        self.encoder = nn.GRU(
            size, hidden, num_layers=2, dropout=0.2, bidirectional=True, batch_first=True
        )
        self.bridge = nn.Linear(2 * hidden, hidden)
        self.decoder = nn.GRU(size + 2 * hidden, hidden, batch_first=True)
        self.cell = nn.LSTMCell(hidden, hidden)
        self.score = nn.Linear(hidden, 2 * hidden, bias=False)
        self.head = nn.Linear(3 * hidden, vocabulary)

    def forward(self, source: Any, lengths: Any, target: Any) -> Any:
        packed = pack_padded_sequence(
            self.source(source), lengths, batch_first=True, enforce_sorted=False
        )
        memory, last = self.encoder(packed)
        memory, _ = pad_packed_sequence(memory, batch_first=True)
        is_there = torch.arange(memory.shape[1]) < lengths[:, None]
        state = self.bridge(torch.cat([last[-2], last[-1]], -1)).tanh().unsqueeze(0)
        context, carried, logits = torch.zeros_like(memory[:, :1]), None, []
        for t in range(target.shape[1]):
            x = torch.cat([self.target(target[:, t : t + 1]), context], -1)
            y, state = self.decoder(x, state)
            carried = self.cell(y[:, 0], carried)
            y = y + carried[0].unsqueeze(1)
            scores = self.score(y) @ memory.transpose(1, 2)
            weights = scores.masked_fill(~is_there.unsqueeze(1), -torch.inf).softmax(-1)
            context = weights @ memory
            logits.append(self.head(torch.cat([y, context], -1)))
        return torch.cat(logits, 1)


def translation(swapped: Callable[[Any], Any]) -> Iterator[float]:
    model = Translator()
    step = torch.optim.Adam(model.parameters(), lr=0.01)
    model = swapped(model)  # after the optimizer was made: parameters are shared
    for _ in range(STEPS):
        lengths = torch.randint(1, 9, (6,))
        source, target = torch.randint(1, 25, (6, 8)), torch.randint(1, 25, (6, 7))
        logits = model(source, lengths, target[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), target[:, 1:].flatten())
        step.zero_grad()
        loss.backward()
        step.step()
        yield loss.item()


# Proximal policy optimisation with a recurrent policy (Schulman et al. 2017)


class Policy(nn.Module):
    """An episode's end within a rollout sets the state to zero: the sequence is cut there."""

    def __init__(self, observations: int = 5, hidden: int = 10, actions: int = 3) -> None:
        super().__init__()
        self.base = nn.Sequential(nn.Linear(observations, hidden), nn.Tanh())
        self.rnn = nn.LSTM(hidden, hidden)
        self.actor, self.critic = nn.Linear(hidden, actions), nn.Linear(hidden, 1)

    def forward(self, observed: Any, masks: Any) -> Any:
        x = self.base(observed)
        ends = (masks[1:] == 0).any(1).nonzero().squeeze(1).add(1).tolist()
        state = tuple(torch.zeros(1, x.shape[1], x.shape[2]).to(x) for _ in range(2))
        parts = []
        for begin, end in zip([0, *ends], [*ends, len(x)], strict=True):
            state = tuple(s * masks[begin].view(1, -1, 1) for s in state)
            y, state = self.rnn(x[begin:end], state)
            parts.append(y)
        y = torch.cat(parts)
        return torch.distributions.Categorical(logits=self.actor(y)), self.critic(y)[..., 0]


class PolicyWithResets(Policy):
    """The same in one call of ours."""

    def forward(self, observed: Any, masks: Any) -> Any:
        y, _ = self.rnn(self.base(observed), resets=masks == 0)
        return torch.distributions.Categorical(logits=self.actor(y)), self.critic(y)[..., 0]


def reinforcement(swapped: Callable[[Any], Any], kind: Any = Policy) -> Iterator[float]:
    model = swapped(kind())
    step = torch.optim.Adam(model.parameters(), lr=0.003, eps=1e-5)
    for _ in range(STEPS // 4):
        observed = torch.randn(16, 4, 5)
        masks = (torch.rand(16, 4) > 0.1).to(observed)
        with torch.no_grad():
            policy, value = model(observed, masks)
            actions = policy.sample()
            old = policy.log_prob(actions)
            rewards = observed[..., 0] * (actions == 0) + observed[..., 1] * (actions == 1)
            advantages, gain = torch.zeros_like(rewards), torch.zeros(4)
            for t in reversed(range(15)):
                delta = rewards[t] + 0.99 * value[t + 1] * masks[t + 1] - value[t]
                gain = delta + 0.99 * 0.95 * masks[t + 1] * gain
                advantages[t] = gain
            returns = advantages + value
        for _ in range(4):
            policy, now = model(observed, masks)
            ratio = (policy.log_prob(actions) - old).exp()
            clipped = ratio.clamp(0.8, 1.2)
            gained = torch.min(ratio * advantages, clipped * advantages).mean()
            loss = (now - returns).square().mean() / 2 - gained - 0.01 * policy.entropy().mean()
            step.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            step.step()
            yield loss.item()


@pytest.fixture(autouse=True)
def _in_float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def losses(training: Any, swapped: Callable[[Any], Any], **options: Any) -> list[float]:
    torch.manual_seed(1)
    return list(training(swapped, **options))


def with_ours(model: Any) -> Any:
    expected = {n for n, m in model.named_modules() if type(m).__module__.endswith("rnn")}
    done = ft.swap(model)
    assert set(done.replaced) == expected
    assert not done.kept
    assert not [
        m for m in model.modules() if type(m).__module__.startswith("torch.nn.modules.rnn")
    ]
    return model


@pytest.mark.parametrize("training", [language_model, translation, reinforcement])
def test_the_same_losses(training: Any) -> None:
    """Each model trains with the same losses after its modules are swapped for ours."""
    expected = losses(training, lambda model: model)
    found = losses(training, with_ours)
    assert len(found) == STEPS
    assert_close(found, expected, "training")
    assert len(set(found)) == STEPS


def test_resets_are_what_masks_mean() -> None:
    """A policy with resets in one call has the losses of one that cuts the sequence by
    masks.
    """
    expected = losses(reinforcement, lambda model: model)
    found = losses(reinforcement, with_ours, kind=PolicyWithResets)
    assert_close(found, expected, "training")


# TorchRL


@pytest.mark.filterwarnings("ignore")  # TorchRL's own
@pytest.mark.parametrize("num_layers", [1, 2])
@pytest.mark.parametrize("name", ["LSTMModule", "GRUModule"])
def test_modules_of_torchrl(name: str, num_layers: int) -> None:
    """TorchRL's modules, which pass a mask to what is no nn.LSTM or nn.GRU, give the results of
    their own after swap, with trajectories that start within the sequences.
    """
    rl = pytest.importorskip("torchrl.modules", reason="TorchRL is not installed")
    from tensordict import TensorDict

    states = ["h", "c"][: 1 + (name == "LSTMModule")]
    keys = {
        "in_keys": ["x", *states],
        "out_keys": ["y", *(("next", s) for s in states)],
    }
    made = [getattr(rl, name)(5, 7, num_layers=num_layers, **keys) for _ in range(2)]
    made[1].load_state_dict(made[0].state_dict())
    ft.swap(made[1])
    B, T = 4, 9
    data = {"x": torch.randn(B, T, 5), "is_init": torch.rand(B, T, 1) < 0.3}
    data |= {s: torch.randn(B, T, num_layers, 7) for s in states}
    with rl.set_recurrent_mode(True):
        expected, found = (m(TensorDict(dict(data), [B, T])) for m in made)
    for key in keys["out_keys"]:
        assert_close(found[key], expected[key])


def test_a_mask_as_torchrl_passes_it() -> None:
    """A call with `mask=` (B, T) has the results of the packed rows."""
    lstm = ft.LSTM(5, 7, batch_first=True)
    x, lengths = torch.randn(4, 9, 5), torch.tensor([9, 3, 1, 6])
    mask = torch.arange(9).unsqueeze(0) < lengths.unsqueeze(1)
    y, states = lstm(x, None, mask=mask)
    packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
    expected, of_packed = lstm(packed)
    assert_close(y, pad_packed_sequence(expected, batch_first=True, total_length=9)[0])
    assert_close(list(states), list(of_packed))
