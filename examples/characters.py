"""Train a character model on Python's own documentation, with one process or several.

    python examples/characters.py
    torchrun --nproc-per-node 2 examples/characters.py

The text is that of `pydoc_data.topics`, which comes with Python. Each process reads its own
part of every batch and DistributedDataParallel adds the gradients up, over gloo on CPUs and
nccl on GPUs: the losses are those of one process on the whole batch. At the end it writes.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import pydoc_data.topics
import time

import torch
from torch import Tensor, distributed, nn

import fusedrnn.torch as ft


class CharacterModel(nn.Module):
    """The next character from all before it."""

    def __init__(self, characters: int, hidden: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(characters, 64)
        self.rnn = ft.LSTM(64, hidden, num_layers=2, dropout=0.1, forget_bias=1.0)
        self.head = nn.Linear(hidden, characters)

    def forward(self, text: Tensor, state: tuple[Tensor, Tensor] | None = None) -> tuple:
        """text: (T, B) of characters. Returns scores (T, B, characters) and the state."""
        y, state = self.rnn(self.embedding(text), state)
        return self.head(y), state


def read(rows: int) -> tuple[str, Tensor]:
    """Return the alphabet, and the text in so many columns: (length, rows)."""
    text = "\n".join(pydoc_data.topics.topics.values())
    alphabet = "".join(sorted(set(text)))
    index = {c: i for i, c in enumerate(alphabet)}
    length = len(text) // rows
    numbers = torch.tensor([index[c] for c in text[: length * rows]])
    return alphabet, numbers.view(rows, length).T.contiguous()


def loss_of(model: nn.Module, text: Tensor, state: tuple | None) -> tuple[Tensor, tuple]:
    """Return the mean of the bits that a character takes, and the state, without its past."""
    scores, state = model(text[:-1], state)
    nats = nn.functional.cross_entropy(scores.flatten(0, 1), text[1:].flatten())
    return nats / 0.6931, tuple(s.detach() for s in state)


@torch.no_grad()
def write(model: CharacterModel, alphabet: str, length: int, temperature: float = 0.6) -> str:
    """Let the model go on from a beginning, one character at a time."""
    model.eval()
    written, state = list("The "), None
    text = torch.tensor([[alphabet.index(c)] for c in written]).to(model.head.weight.device)
    for _ in range(length):
        scores, state = model(text, state)
        text = torch.multinomial((scores[-1] / temperature).softmax(-1), 1)
        written.append(alphabet[int(text)])
    return "".join(written)


def main() -> None:
    """Train on the first 95% of the text, tell the loss on the rest, and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--batch", type=int, default=32, help="rows, of all processes")
    parser.add_argument("--length", type=int, default=100, help="characters to a step")
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--steps", type=int, help="stop each epoch after so many")
    given = parser.parse_args()

    ranks, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    if given.batch % ranks:
        parser.error(f"--batch must be a multiple of the {ranks} processes, got {given.batch}")
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if ranks > 1:
        distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")

    alphabet, text = read(given.batch)
    mine = slice(rank * given.batch // ranks, (rank + 1) * given.batch // ranks)
    text = text[:, mine].to(device)
    held_out = len(text) // 20
    torch.manual_seed(0)
    model = CharacterModel(len(alphabet), given.hidden).to(device)
    module = nn.parallel.DistributedDataParallel(model) if ranks > 1 else model
    torch.manual_seed(rank)  # another dropout in each
    steps = (len(text) - held_out) // given.length
    steps = min(steps, given.steps or steps)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, given.epochs * steps)

    for epoch in range(given.epochs):
        begin, state, total = time.perf_counter(), None, torch.zeros((), device=device)
        module.train()
        for step in range(steps):
            part = text[step * given.length : (step + 1) * given.length + 1]
            loss, state = loss_of(module, part, state)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            total += loss.detach() / steps
        module.eval()
        with torch.no_grad():
            unseen, _ = loss_of(module, text[-held_out:], None)
        if ranks > 1:
            for value in (total, unseen):
                distributed.all_reduce(value)
                value /= ranks
        if rank == 0:
            seconds = time.perf_counter() - begin
            print(
                f"epoch {epoch + 1}/{given.epochs}  training {total:.3f} bits a character  "
                f"held out {unseen:.3f}  {seconds:.1f} s",
                flush=True,
            )
    if rank == 0:
        print(f"\n{write(model, alphabet, 300)}")
    if ranks > 1:
        distributed.barrier()  # while the first writes: one that leaves early may end badly
        distributed.destroy_process_group()


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main()
