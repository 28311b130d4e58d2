"""The model of characters.py, and text generation in NumPy, one character at a time."""

from __future__ import annotations

import pydoc_data.topics
import time
from typing import Any

import numpy as np
from torch import Tensor, nn

import fusedrnn as fr
import fusedrnn.torch as ft

TEXT = "\n".join(pydoc_data.topics.topics.values())
ALPHABET = {c: i for i, c in enumerate(sorted(set(TEXT)))}


class CharacterModel(nn.Module):
    """A model that predicts the next character from all before it."""

    def __init__(self, cell: str, hidden: int, **extra: float) -> None:
        super().__init__()
        self.embedding = nn.Embedding(len(ALPHABET), 64)
        self.rnn = getattr(ft, cell)(64, hidden, num_layers=2, dropout=0.1, **extra)
        self.head = nn.Linear(hidden, len(ALPHABET))

    def forward(self, text: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """Map text (T, B), as numbers, to scores (T, B, characters) and the state."""
        y, state = self.rnn(self.embedding(text), state)
        return self.head(y), state


def write(
    model: CharacterModel, prompt: str, count: int, temperature: float, seed: int
) -> float:
    """Continue the prompt, printing each character at once; return characters per second."""
    weights = {name: w.detach().cpu().numpy() for name, w in model.state_dict().items()}
    embedding, head = weights["embedding.weight"], weights["head.weight"]
    layer = getattr(fr, type(model.rnn).__name__)(64, model.rnn.hidden_size, num_layers=2)
    layer.load_state_dict({n[4:]: w for n, w in weights.items() if n.startswith("rnn.")})
    stream, rng = fr.Stream(layer, batch_size=None), np.random.default_rng(seed)
    print(f"\n{prompt}", end="", flush=True)
    for character in prompt:
        y = stream.step(embedding[ALPHABET[character]])
    begin, characters = time.perf_counter(), list(ALPHABET)
    for _ in range(count):
        scores = (head @ y + weights["head.bias"]) / temperature
        # The argmax of the scores plus Gumbel noise is a draw from their softmax.
        chosen = int((scores + rng.gumbel(size=len(scores))).argmax())
        print(characters[chosen], end="", flush=True)
        y = stream.step(embedding[chosen])
    return count / (time.perf_counter() - begin)
