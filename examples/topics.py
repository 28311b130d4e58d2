"""Classify paragraphs of Python's documentation by their chapter, word by word.

    pip install "fusedrnn[examples]"
    python examples/topics.py --cell GRU

The texts are the ten largest topics of `pydoc_data.topics`, a part of Python. Paragraphs that
occur in two topics are left out; a quarter of the rest is held out. A bidirectional layer reads
each up to its own length (`lengths`). The baselines are the most frequent topic and a logistic
regression on the bag of words.
"""

from __future__ import annotations

import pydoc_data.topics
import re
import time
from collections import Counter
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from common import Outcome, keep, outcome, parse, parser
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import confusion_matrix
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

import fusedrnn.torch as ft

TOPICS, EMBEDDING, HIDDEN, BATCH = 10, 64, 48, 32
SHORTEST, LONGEST = 6, 100  # tokens: of the shortest paragraph; at most read of each


Paragraph = tuple[tuple[str, ...], int]  # its words, and its topic


def read(validate: bool = False) -> tuple[list[str], list[Paragraph], list[Paragraph]]:
    """Return the topics' names, and the paragraphs to train on and those held out.

    With `validate` a quarter of the training paragraphs is held out instead.
    """
    by_topic = {
        name: {tuple(re.findall(r"\w+|[^\w\s]", p.lower())) for p in text.split("\n\n")}
        for name, text in pydoc_data.topics.topics.items()
    }
    counts = Counter(p for paragraphs in by_topic.values() for p in paragraphs)
    own = {
        name: sorted(p for p in paragraphs if counts[p] == 1 and len(p) >= SHORTEST)
        for name, paragraphs in by_topic.items()
    }
    names = sorted(own, key=lambda name: len(own[name]), reverse=True)[:TOPICS]
    known = [(p, i) for i, name in enumerate(names) for p in own[name]]
    for _ in range(2 if validate else 1):
        topics = [i for _, i in known]
        known, unseen = train_test_split(known, test_size=0.25, stratify=topics, random_state=0)
    return names, known, unseen


class Classifier(nn.Module):
    """A classifier on the mean of a bidirectional layer's outputs."""

    def __init__(self, cell: str, vocabulary: int, **extra: float) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, EMBEDDING)
        self.dropout = nn.Dropout(0.5)
        self.rnn = getattr(ft, cell)(EMBEDDING, HIDDEN, bidirectional=True, **extra)
        self.head = nn.Linear(2 * HIDDEN, TOPICS)

    def forward(self, text: Tensor, lengths: Tensor) -> Tensor:
        """Map text (T, B), words as numbers, with lengths (B,), to scores (B, topics)."""
        y, _ = self.rnn(self.dropout(self.embedding(text)), lengths=lengths)
        # y is 0 beyond the lengths, so the sum is over the words that were read.
        return self.head(self.dropout(y.sum(0) / lengths[:, None].clamp(min=1)))


def numbered(texts: list[Paragraph], index: dict[str, int]) -> tuple[Tensor, Tensor, Tensor]:
    """Return words as numbers (T, N), 0 for unknown words, the lengths and the topics."""
    rows = [torch.tensor([index.get(w, 0) for w in words[:LONGEST]]) for words, _ in texts]
    lengths = torch.tensor([len(row) for row in rows])
    return nn.utils.rnn.pad_sequence(rows), lengths, torch.tensor([i for _, i in texts])


Held = tuple[Tensor, Tensor, Tensor]  # held-out words as numbers, lengths, topics


def fit(
    cell: str,
    epochs: int,
    seed: int,
    rate: float = 3e-3,
    validate: bool = False,
    **extra: float,
) -> tuple[Classifier, list[float], Held]:
    """Train; return the model, the seconds of each epoch, and what is held out."""
    _, known, unseen = read(validate)
    counts = Counter(word for words, _ in known for word in words)
    index = {w: i + 1 for i, w in enumerate(sorted(w for w in counts if counts[w] > 1))}
    text, lengths, topics = numbered(known, index)
    torch.manual_seed(seed)
    model, seconds = Classifier(cell, len(index) + 1, **extra), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01)
    for _ in range(epochs):
        begin = time.perf_counter()
        model.train()
        for chosen in torch.randperm(len(topics)).split(BATCH):
            longest = int(lengths[chosen].max())
            scores = model(text[:longest, chosen], lengths[chosen])
            optimizer.zero_grad()
            nn.functional.cross_entropy(scores, topics[chosen]).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        seconds.append(time.perf_counter() - begin)
    return model.eval(), seconds, numbered(unseen, index)


@torch.no_grad()
def predict(model: nn.Module, held: Held) -> Tensor:
    """Return the topic that the model predicts for each held-out paragraph."""
    text, lengths, _ = held
    return model(text, lengths).argmax(-1)


def wrong(predicted: Tensor, held: Held) -> float:
    """Return the per cent of held-out paragraphs with another topic than predicted."""
    return 100 * float((predicted != held[-1]).float().mean())


def train(*how: Any, **extra: Any) -> tuple[Tensor, Tensor, Outcome]:
    """Return the predicted and the true held-out topics, and the outcome, in per cent."""
    model, seconds, held = fit(*how, **extra)
    predicted = predict(model, held)
    return predicted, held[-1], outcome(model.rnn, seconds, wrong(predicted, held))


def bag_of_words(known: list[Paragraph], unseen: list[Paragraph]) -> float:
    """Return the accuracy of a logistic regression on the held-out paragraphs."""
    vectors = TfidfVectorizer(analyzer=lambda paragraph: paragraph[0], sublinear_tf=True)
    model = LogisticRegression(C=30, max_iter=1000)
    model.fit(vectors.fit_transform(known), [i for _, i in known])
    return model.score(vectors.transform(unseen), [i for _, i in unseen])


def draw(
    names: list[str], predicted: Tensor, answers: Tensor, title: str, output: Path
) -> None:
    """Draw the confusion matrix."""
    table = confusion_matrix(answers, predicted, labels=range(TOPICS))
    share = table / table.sum(1, keepdims=True)
    figure, axes = plt.subplots(figsize=(8, 6.4), layout="constrained")
    drawn = axes.imshow(100 * share, cmap="Blues", vmin=0, vmax=100)
    for i, j in zip(*table.nonzero(), strict=True):
        colour = "w" if share[i, j] > 0.5 else "k"
        axes.text(j, i, table[i, j], ha="center", va="center", color=colour)
    axes.set(title=title, xlabel="predicted topic", ylabel="true topic")
    axes.set_xticks(range(TOPICS), names, rotation=40, ha="right")
    axes.set_yticks(range(TOPICS), names)
    figure.colorbar(drawn, label="% of the topic's paragraphs (in the cells: how many)")
    keep(figure, output)


def main() -> None:
    """Train, print the accuracies, and draw."""
    args = parse(parser(__doc__, "topics.png", epochs=(25, 8)))
    names, known, unseen = read()
    predicted, answers, result = train(args.cell, args.epochs, args.seed)
    right = {  # topics are sorted: the first has the most paragraphs
        "most frequent topic": float((answers == 0).float().mean()),
        "bag of words": bag_of_words(known, unseen),
        args.cell: 1 - result.error / 100,
    }
    print(f"{len(known)} paragraphs of {TOPICS} topics to train on, {len(unseen)} held out")
    for name, share in right.items():
        print(f"{name:20}{100 * share:6.1f}% right")
    verdict = "beats" if right[args.cell] > right["bag of words"] else "DOES NOT BEAT"
    print(f"{args.cell} {verdict} the bag of words.")
    print(f"{result.parameters} parameters, {result.epoch_seconds:.2f} s an epoch")
    title = f"{args.cell}: {100 * right[args.cell]:.0f}% of {len(answers)} paragraphs right"
    draw(names, predicted, answers, title, args.output)


if __name__ == "__main__":
    main()
