"""The environment of recall.py: corridors with a cue at the start that matters at the end."""

from __future__ import annotations

import torch
from torch import Tensor

AHEAD, LEFT, RIGHT = range(3)  # actions; the last two are cues, too


class Corridors:
    """Many corridors at once, of longest / 4 to longest steps; a new one follows each."""

    def __init__(self, count: int, longest: int, seed: int) -> None:
        self.longest = longest
        self.random = torch.Generator().manual_seed(seed)
        self.cue = self.left = torch.zeros(count, dtype=torch.long)
        self.begin(torch.ones(count, dtype=torch.bool))

    def draw(self, low: int, high: int) -> Tensor:
        """Draw integers (B,) from low to high."""
        return torch.randint(low, high + 1, self.cue.shape, generator=self.random)

    def begin(self, rows: Tensor) -> None:
        """Start new episodes in some rows."""
        self.cue = torch.where(rows, self.draw(LEFT, RIGHT), self.cue)
        self.left = torch.where(rows, self.draw(self.longest // 4, self.longest), self.left)
        self.fresh = rows

    def see(self) -> Tensor:
        """Return observations (B, 3): an arrow to the left, one to the right, a junction."""
        arrows = [self.fresh & (self.cue == turn) for turn in (LEFT, RIGHT)]
        return torch.stack([*arrows, self.left == 0], dim=1).float()

    def act(self, action: Tensor) -> tuple[Tensor, Tensor]:
        """Take a step; return the rewards (B,) and whether each episode ended (B,)."""
        junction, ahead = self.left == 0, action == AHEAD
        ended = junction & ~ahead
        turned = torch.where(action == self.cue, 1.0, -1.0)
        reward = torch.where(ended, turned, -0.1 * (junction == ahead).float())
        self.left = self.left - (ahead & ~junction).long()
        self.begin(ended)
        return reward, ended
