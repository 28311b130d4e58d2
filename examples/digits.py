"""Recognise handwritten digits row by row: an image is a sequence of eight rows.

    pip install "fusedrnn[examples]"
    python examples/digits.py --cell LSTM

The data are the 1797 images, 8 × 8, of scikit-learn's `load_digits`; a quarter of each digit is
held out. After each row a linear head predicts the probability of each digit. Each row counts
in the loss, later rows more, so the network learns to guess from the rows read so far.
"""

from __future__ import annotations

import time
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from common import Outcome, keep, outcome, parse, parser
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

import fusedrnn.torch as ft

HIDDEN, BATCH = 96, 64


class Reader(nn.Module):
    """A network that predicts the digit from the rows read so far."""

    def __init__(self, cell: str, **extra: float) -> None:
        super().__init__()
        self.rnn = getattr(ft, cell)(8, HIDDEN, 2, recurrent_dropout=0.2, **extra)
        self.head = nn.Linear(HIDDEN, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Map x (T, B, 8), the rows of images, to scores after each row (T, B, 10)."""
        return self.head(self.rnn(x)[0])


def split(validate: bool = False) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the images to train on, rows first (8, N, 8), their digits, and those held out.

    With `validate` a quarter of the training images is held out instead.
    """
    digits = load_digits()
    x, y = digits.images / 16, digits.target
    for _ in range(2 if validate else 1):
        parts = train_test_split(x, y, test_size=0.25, stratify=y, random_state=0)
        x, unseen, y, answers = parts
    x, unseen, y, answers = (torch.tensor(part) for part in parts)
    return x.float().transpose(0, 1), y, unseen.float().transpose(0, 1), answers


def train(
    cell: str,
    epochs: int,
    seed: int,
    rate: float = 5e-3,
    validate: bool = False,
    **extra: float,
) -> tuple[Reader, Outcome]:
    """Train; the error is that of the last row, in per cent of the held-out images."""
    x, y, unseen, answers = split(validate)
    torch.manual_seed(seed)
    model, seconds = Reader(cell, **extra), []
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    weights = torch.arange(1.0, 9) / 36  # of the rows
    for _ in range(epochs):
        begin = time.perf_counter()
        model.train()
        for chosen in torch.randperm(len(y)).split(BATCH):
            scores = model(x[:, chosen])
            logs = scores.log_softmax(-1)[:, torch.arange(len(chosen)), y[chosen]].mean(1)
            optimizer.zero_grad()
            (-logs @ weights).backward()
            optimizer.step()
        schedule.step()
        seconds.append(time.perf_counter() - begin)
    wrong = (probabilities(model, unseen)[-1].argmax(-1) != answers).float().mean()
    return model, outcome(model.rnn, seconds, 100 * wrong)


@torch.no_grad()
def probabilities(model: Reader, x: Tensor) -> Tensor:
    """Return the probability of each digit after each row, (T, B, 10)."""
    model.eval()
    return model(x).softmax(-1)


def draw(predicted: Tensor, images: Tensor, answers: Tensor, output: Path) -> None:
    """Draw some images beside the probabilities after each row."""
    right = (predicted.argmax(-1) == answers).float().mean(1)
    wrong = torch.nonzero(predicted[-1].argmax(-1) != answers).flatten().tolist()
    first = [int(torch.nonzero(answers == digit)[0]) for digit in (0, 3, 4, 7, 9)]
    shown = (first + wrong[:1])[:6]  # with one wrong prediction, if there is any
    figure = plt.figure(figsize=(12, 5.4), layout="constrained")
    left, side = figure.subfigures(1, 2, width_ratios=(2.2, 1))
    panels = left.subplots(3, 4, width_ratios=(1, 1.3, 1, 1.3))
    for axes in panels.flat:
        axes.set_visible(False)
    for n, i in enumerate(shown):
        image, heat = panels[n // 2, 2 * (n % 2) : 2 * (n % 2) + 2]
        image.imshow(images[:, i], cmap="gray_r", vmin=0, vmax=1)
        last = int(predicted[-1, i].argmax())
        image.set(title=f"a {answers[i]}" + f", read as {last}" * bool(last != answers[i]))
        image.set(
            xticks=[], yticks=range(8), yticklabels=range(1, 9), ylabel="row", visible=True
        )
        drawn = heat.imshow(predicted[:, i], cmap="viridis", vmin=0, vmax=1, aspect="auto")
        heat.set(xticks=range(10), yticks=range(8), yticklabels=range(1, 9), visible=True)
        heat.set(xlabel="digit")
    left.colorbar(drawn, ax=panels, label="probability once the row is read", shrink=0.8)
    axes = side.subplots()
    axes.plot(range(1, 9), 100 * right, "o-")
    axes.set(xlabel="rows read", ylabel="right, % of the held-out images", ylim=(0, 102))
    axes.set(title=f"At the end {100 * right[-1]:.1f}%", xticks=range(1, 9))
    axes.grid(alpha=0.3)
    keep(figure, output)


def main() -> None:
    """Train, print the accuracy after each row, and draw."""
    args = parse(parser(__doc__, "digits.png", epochs=(40, 6)))
    model, result = train(args.cell, args.epochs, args.seed)
    _, _, images, answers = split()
    predicted = probabilities(model, images)
    right = (predicted.argmax(-1) == answers).float().mean(1)
    print(f"{args.cell}, {len(answers)} held-out images, right after each row:")
    print("  ".join(f"{100 * share:.1f}%" for share in right))
    print(f"{result.parameters} parameters, {result.epoch_seconds:.3f} s an epoch")
    draw(predicted, images, answers, args.output)


if __name__ == "__main__":
    main()
