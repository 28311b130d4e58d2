"""Run and train a network like medaka's, which reads genomes, and the same on our kernels.

    pip install torch threadpoolctl
    python examples/packages/genomes.py

Two bidirectional GRUs with 128 units read 10 counts of bases at each of 10,000 places; a linear
layer scores five letters at each. The weights are random, as medaka's licence asks to get them
from its makers.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from shared import Case, Package, Pair, difference, main

PACKAGE = Package("torch", ("torch",), "pip install torch threadpoolctl")


def cases(short: bool) -> Iterator[Case]:
    """Yield inference at different numbers of rows, then training."""
    import torch
    from torch import nn

    import fusedrnn.torch as ft

    class Network(nn.Module):
        """Counts (B, T, 10) to scores (B, T, 5)."""

        def __init__(self) -> None:
            super().__init__()
            self.gru = nn.GRU(10, 128, num_layers=2, bidirectional=True, batch_first=True)
            self.linear = nn.Linear(256, 5)

        def forward(self, x: Any) -> Any:
            """Return the scores."""
            return self.linear(self.gru(x)[0])

    def counts(B: int, T: int) -> Any:
        """Return shares of bases, of a sequence that most reads agree on."""
        letters = torch.randint(10, (B, T, 1))
        x = torch.poisson(torch.full((B, T, 10), 0.5)).scatter_add(
            2, letters, torch.full((B, T, 1), 30.0)
        )
        return x / x.sum(-1, keepdim=True)

    def train(model: Any, x: Any, letters: Any) -> Any:
        """Take one step; return the gradients."""
        model.zero_grad()
        nn.functional.cross_entropy(model(x).flatten(0, 1), letters.flatten()).backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    torch.manual_seed(0)
    own, ours = Network(), Network()
    ours.load_state_dict(own.state_dict())
    ft.swap(ours)
    T = 100 if short else 10_000
    with torch.inference_mode():
        for B in (1, 3) if short else (1, 10, 50):
            x = counts(B, T)
            yield Case(
                f"medaka's shape, T = {T:,}, B = {B}",
                lines=1,
                difference=difference(ours(x), own(x)),
                whole=Pair(lambda x=x: own(x), lambda x=x: ours(x)),
                recurrent=Pair(lambda x=x: own.gru(x), lambda x=x: ours.gru(x)),
            )
    for B, steps in ((2, 100),) if short else ((1, 1000), (16, 1000)):
        x, letters = counts(B, steps), torch.randint(5, (B, steps))
        yield Case(
            f"medaka's shape, training, T = {steps:,}, B = {B}",
            lines=1,
            difference=difference(train(ours, x, letters), train(own, x, letters)),
            whole=Pair(
                lambda x=x, y=letters: train(own, x, y),
                lambda x=x, y=letters: train(ours, x, y),
            ),
        )


if __name__ == "__main__":
    main(__doc__, {PACKAGE: cases})
