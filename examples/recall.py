"""Train a policy that must remember: a cue, a corridor, and a turn at its end.

    pip install "fusedrnn[examples]"
    python examples/recall.py --cell GRU

At the first step only, an agent sees an arrow to the left or right. It walks through a corridor
of 8 to 32 steps that looks the same everywhere; at the junction it turns, which gives +1 in the
arrow's direction and -1 in the other. An impossible action costs 0.1. Actor and critic
share a recurrent layer and learn by clipped policy gradients (Schulman et al. 2017). Episodes
begin anywhere in a rollout; `resets` is true where the state starts from zero. The same policy
without memory, reset at every step, cannot do better than chance.
"""

from __future__ import annotations

import time
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from common import COLOURS, Outcome, keep, options, outcome, parse, parser
from corridors import Corridors
from torch import Tensor, nn

import fusedrnn.torch as ft

ENVIRONMENTS, STEPS, HIDDEN = 64, 64, 32


class Policy(nn.Module):
    """Actor and critic on one recurrent layer."""

    def __init__(self, cell: str, has_memory: bool, **extra: float) -> None:
        super().__init__()
        self.rnn = getattr(ft, cell)(3, HIDDEN, **extra)
        self.actor, self.critic = nn.Linear(HIDDEN, 3), nn.Linear(HIDDEN, 1)
        self.has_memory = has_memory

    def forward(self, x: Tensor, resets: Tensor, state: tuple | Tensor | None = None) -> tuple:
        """Map x (T, B, 3) and resets (T, B) to scores, values and the state."""
        resets = resets if self.has_memory else torch.ones_like(resets)
        y, state = self.rnn(x, state, resets=resets)
        return self.actor(y), self.critic(y)[..., 0], state


def advantages(rewards: Tensor, ended: Tensor, values: Tensor) -> Tensor:
    """Return generalised advantages (T, B) (Schulman et al. 2016); values: (T + 1, B)."""
    result, ahead = torch.zeros_like(rewards), torch.zeros(ENVIRONMENTS)
    for t in reversed(range(STEPS)):
        on = 0.95 * (~ended[t]).float()
        ahead = rewards[t] + on * values[t + 1] - values[t] + 0.9 * on * ahead
        result[t] = ahead
    return result


def train(
    cell: str,
    updates: int,
    seed: int,
    longest: int = 32,
    has_memory: bool = True,
    rate: float = 3e-3,
    **extra: float,
) -> tuple[list[float], Outcome]:
    """Return the mean reward of the turns in each update, and the outcome, in % wrong turns."""
    torch.manual_seed(seed)
    policy = Policy(cell, has_memory, **extra)
    corridors = Corridors(ENVIRONMENTS, longest, seed)
    optimizer = torch.optim.Adam(policy.parameters(), lr=rate)
    state, turns, seconds = None, [], []
    for _ in range(updates):
        begin, start, steps = time.perf_counter(), state, []
        with torch.no_grad():
            for _ in range(STEPS):
                x, resets = corridors.see(), corridors.fresh
                scores, value, state = policy(x[None], resets[None], state)
                action = torch.multinomial(scores[0].softmax(-1), 1)[:, 0]
                steps.append((x, resets, action, value[0], scores[0], *corridors.act(action)))
            last = policy(corridors.see()[None], corridors.fresh[None], state)[1]
        rollout = (torch.stack(part) for part in zip(*steps, strict=True))
        x, resets, action, values, scores, rewards, ended = rollout
        gain = advantages(rewards, ended, torch.cat([values, last]))
        goal, gain = values + gain, (gain - gain.mean()) / (gain.std() + 1e-8)
        before = scores.log_softmax(-1).gather(-1, action[..., None])
        for _ in range(4):
            scores, value, _ = policy(x, resets, start)
            logs = scores.log_softmax(-1)
            ratio = (logs.gather(-1, action[..., None]) - before).exp()[..., 0]
            actor = -torch.minimum(ratio * gain, ratio.clamp(0.8, 1.2) * gain).mean()
            entropy = -(logs.exp() * logs).sum(-1).mean()
            loss = actor + 0.5 * (value - goal).square().mean() - 0.01 * entropy
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(policy.parameters(), 0.5)
            optimizer.step()
        turns.append(float(rewards[ended].mean()))
        seconds.append(time.perf_counter() - begin)
    late = turns[-max(1, updates // 10) :]
    return turns, outcome(policy.rnn, seconds, 50 * (1 - sum(late) / len(late)))


def draw(curves: dict[str, list[float]], cell: str, longest: int, output: Path) -> None:
    """Draw the rewards over the updates."""
    figure, axes = plt.subplots(figsize=(8, 4.4), layout="constrained")
    for (name, turns), style in zip(curves.items(), ("-", "--"), strict=True):
        axes.plot(range(1, len(turns) + 1), turns, style, color=COLOURS[cell], label=name)
    axes.axhline(1, color="k", lw=0.8, ls=":", label="all turns right")
    axes.axhline(0, color="k", lw=0.8, label="chance")
    axes.set(
        xlabel=f"update, of {ENVIRONMENTS * STEPS} steps each", ylabel="mean reward of a turn"
    )
    axes.set(title=f"A cue {longest // 4} to {longest} steps back", ylim=(-0.6, 1.1))
    axes.legend()
    axes.grid(alpha=0.3)
    keep(figure, output)


def main() -> None:
    """Train with and without memory, print the turns, and draw."""
    arg_parser = parser(__doc__, "recall.png", epochs=(150, 35))
    longest_help = "steps of the longest corridor; default: 32; short: 6"
    arg_parser.add_argument("--longest", type=int, help=longest_help)
    args = parse(arg_parser, "longest")
    longest = args.longest or (6 if args.short else 32)
    if not 4 <= longest < STEPS:
        arg_parser.error(f"--longest must be from 4 to {STEPS - 1}, got {longest}")
    curves = {}
    for has_memory in (True, False):
        name = args.cell + ("" if has_memory else " without memory")
        how = (args.epochs, args.seed, longest, has_memory)
        curves[name], result = train(args.cell, *how, **options(args.cell))
        print(f"{name:20} {result.error:5.1f}% wrong turns at the end", end="  ")
        print(f"{result.parameters} parameters, {result.epoch_seconds:.3f} s an update")
    draw(curves, args.cell, longest, args.output)


if __name__ == "__main__":
    main()
