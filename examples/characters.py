"""Train a character model on Python's own documentation, and generate text.

    pip install "fusedrnn[examples]"
    python examples/characters.py --cell GRU --prompt "The "
    torchrun --nproc-per-node 2 examples/characters.py

The text is `pydoc_data.topics`, which is a part of Python. Each process reads its own part of
every batch and DistributedDataParallel averages the gradients, over gloo on CPUs and nccl on
GPUs, so the losses are those of one process on the whole batch. With ``--precision bfloat16``
the model computes under autocast, with float32 weights. At the end a NumPy layer loads the
weights, and a `Stream` generates one character at a time.
"""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from character_model import ALPHABET, TEXT, CharacterModel, write
from common import COLOURS, Outcome, keep, options, outcome, parse, parser
from torch import Tensor, distributed, nn

RANKS, RANK = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
LENGTH, CHARACTERS = 100, 300  # characters read in a training step, generated at the end


def loss_of(model: nn.Module, text: Tensor, state: Any) -> tuple[Tensor, Any]:
    """Return the mean bits per character, and the state without its gradient."""
    scores, state = model(text[:-1], state)
    nats = nn.functional.cross_entropy(scores.flatten(0, 1), text[1:].flatten())
    past = state.detach() if isinstance(state, Tensor) else tuple(s.detach() for s in state)
    return nats / 0.6931, past


def in_rows(batch: int) -> Tensor:
    """Return the text as numbers (length, batch); the last twentieth is held out."""
    numbers = torch.tensor([ALPHABET[c] for c in TEXT[: len(TEXT) // batch * batch]])
    return numbers.view(batch, -1).T


def train(
    cell: str,
    epochs: int,
    seed: int,
    batch: int,
    hidden: int,
    steps: int | None = None,
    rate: float = 4e-3,
    validate: bool = False,
    precision: str = "float32",
    **extra: float,
) -> tuple[CharacterModel, list[list[float]], Outcome]:
    """Train on the first 95% of the text, in `batch` rows; `rate` is the highest.

    With `validate` the last 5% are not read, and the 5% before them are held out instead.
    With `precision` "bfloat16" it computes under autocast. Returns the model, the bits per
    character (epochs, steps + 1), in each epoch that of the held-out text last, and the
    outcome.
    """
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if RANKS > 1:
        distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    mine = slice(RANK * batch // RANKS, (RANK + 1) * batch // RANKS)
    text = in_rows(batch)[:, mine].contiguous().to(device)
    held_out = len(text) // 20
    text = text[:-held_out] if validate else text
    torch.manual_seed(seed)
    model = CharacterModel(cell, hidden, **extra).to(device)
    module = nn.parallel.DistributedDataParallel(model) if RANKS > 1 else model
    torch.manual_seed(seed + RANK)  # each process draws its own dropout masks
    all_steps = (len(text) - held_out) // LENGTH
    steps = min(all_steps, steps or all_steps)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, epochs * steps)
    dtype, casts = torch.bfloat16, precision == "bfloat16"

    def run(text: Tensor, state: Any) -> tuple[Tensor, Any]:
        with torch.autocast(device.type, dtype, enabled=casts):
            return loss_of(module, text, state)

    curve, seconds = [], []
    for epoch in range(epochs):
        begin, state, losses = time.perf_counter(), None, torch.zeros(steps + 1, device=device)
        module.train()
        for step in range(steps):
            part = text[step * LENGTH : (step + 1) * LENGTH + 1]
            loss, state = run(part, state)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            losses[step] = loss.detach()
        module.eval()
        with torch.no_grad():
            losses[-1], _ = run(text[-held_out:], None)
        if RANKS > 1:
            distributed.all_reduce(losses)
            losses /= RANKS
        curve.append(losses.tolist())
        seconds.append(time.perf_counter() - begin)
        if RANK == 0:
            training, unseen = losses[:-1].mean(), losses[-1]
            bits = f"training {training:.3f} bits a character  held out {unseen:.3f}"
            print(f"epoch {epoch + 1}/{epochs}  {bits}  {seconds[-1]:.1f} s", flush=True)
    return model, curve, outcome(model.rnn, seconds, curve[-1][-1])


def draw(curve: list[list[float]], cell: str, output: Path) -> None:
    """Draw the bits per character over the steps."""
    figure, axes = plt.subplots(figsize=(8, 4.4), layout="constrained")
    training = [bits for epoch in curve for bits in epoch[:-1]]
    ends = [len(curve[0]) * (i + 1) - i - 1 for i in range(len(curve))]
    axes.plot(
        range(1, len(training) + 1), training, color=COLOURS[cell], lw=1, label="training"
    )
    axes.plot(ends, [epoch[-1] for epoch in curve], "ko", label="held out, after each epoch")
    axes.set(title=f"{cell}: Python's documentation", xlabel="step", ylabel="bits a character")
    axes.set_ylim(bottom=0)
    axes.legend()
    axes.grid(alpha=0.3)
    keep(figure, output)


def main() -> None:
    """Train, print the losses, draw them, and generate text."""
    arg_parser = parser(__doc__, "characters.png", epochs=(5, 1))
    arg_parser.add_argument("--batch", type=int, default=32, help="rows, of all processes")
    arg_parser.add_argument("--hidden", type=int, default=256)
    arg_parser.add_argument("--rate", type=float, default=4e-3, help="highest learning rate")
    arg_parser.add_argument(
        "--precision",
        choices=("float32", "bfloat16"),
        default="float32",
        help="of the products",
    )
    arg_parser.add_argument("--steps", type=int, help="at most so many an epoch; short: 15")
    arg_parser.add_argument("--prompt", default="The ", help="the text to continue")
    arg_parser.add_argument("--temperature", type=float, default=0.6, help="low: more certain")
    args = parse(arg_parser, "batch", "hidden", "steps")
    if args.batch % RANKS or args.batch > 1000:
        expected = f"a multiple of the {RANKS} processes" if RANKS > 1 else "1000 at most"
        arg_parser.error(f"--batch must be {expected}, got {args.batch}")
    if not args.prompt or set(args.prompt) - set(ALPHABET):
        arg_parser.error(f"--prompt must use only characters of the text, got {args.prompt!r}")
    for name in ("rate", "temperature"):
        if not getattr(args, name) > 0:
            arg_parser.error(f"--{name} must be above 0, got {getattr(args, name)}")
    steps = args.steps or (15 if args.short else None)
    sizes = (args.batch, args.hidden, steps, args.rate)
    sizes += (False, args.precision)
    model, curve, _ = train(args.cell, args.epochs, args.seed, *sizes, **options(args.cell))
    if RANK == 0:
        speed = write(model, args.prompt, CHARACTERS, args.temperature, args.seed)
        print(f"\n\n{speed:.0f} characters a second")
        draw(curve, args.cell, args.output)
    if RANKS > 1:
        # The processes end together. A barrier of gloo leaves tensors to a thread, which may
        # free them while Python ends, and then the process aborts; its other barrier does not.
        is_gloo = distributed.get_backend() == "gloo"
        (distributed.monitored_barrier if is_gloo else distributed.barrier)()
        distributed.destroy_process_group()


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main()
