"""Training by several processes on PyTorch's own engine, and data from worker processes."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from helpers import assert_close

import fusedrnn as fr

torch = pytest.importorskip("torch", reason="the modules are PyTorch's")

from torch import nn  # noqa: E402
from torch.utils.data import DataLoader, Dataset  # noqa: E402

import fusedrnn.torch as ft  # noqa: E402

WORLD, STEPS, T, B = 2, 6, 7, 6
# PyTorch 2.6 has no FSDP2 on CPUs.
WAYS = ("DDP",) if torch.__version__.startswith("2.6.") else ("DDP", "FSDP2")


class Model(nn.Module):
    """A small language model, each kind of layer in it."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 5)
        self.lstm = ft.LSTM(5, 6, num_layers=2, layer_norm=True)
        self.gru = ft.GRU(6, 4, bidirectional=True)
        self.head = nn.Linear(8, 11)

    def forward(self, tokens: Any, lengths: Any) -> Any:
        y, _ = self.lstm(self.embedding(tokens), None, lengths)
        return self.head(self.gru(y, None, lengths)[0])


def make() -> tuple[Model, Any, Any, Any]:
    """The model and the whole batch, the same in each process."""
    torch.manual_seed(0)
    model = Model().double()
    tokens = torch.randint(11, (T + 1, B))
    lengths = torch.randint(1, T + 1, (B,))
    return model, tokens[:-1], tokens[1:], lengths


def train(
    model: Any, tokens: Any, targets: Any, lengths: Any, autocast: bool = False
) -> list[float]:
    """The loss at each step.

    Each step has its own autocast, because autocast keeps its copies of weights to its end.
    """
    step = torch.optim.AdamW(model.parameters(), lr=0.05)
    losses = []
    for _ in range(STEPS):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            logits = model(tokens, lengths).flatten(0, 1)
            loss = nn.functional.cross_entropy(logits, targets.flatten())
        step.zero_grad()
        loss.backward()
        step.step()
        losses.append(loss.item())
    return losses


def process(rank: int, folder: str) -> None:
    """One of the processes, on its part of the batch."""
    from torch import distributed
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    store = distributed.FileStore(f"{folder}/store", WORLD)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=WORLD)
    mine = slice(rank * B // WORLD, (rank + 1) * B // WORLD)
    losses = {}
    for way in WAYS:
        model, tokens, targets, lengths = make()
        if way == "DDP":
            module: Any = DistributedDataParallel(model)
        else:
            mesh = init_device_mesh("cpu", (WORLD,))
            for layer in (model.lstm, model.gru):
                fully_shard(layer, mesh=mesh)
            module = fully_shard(model, mesh=mesh)
        losses[way] = train(module, tokens[:, mine], targets[:, mine], lengths[mine])
    model, tokens, targets, lengths = make()
    module = DistributedDataParallel(model.float())
    part = (tokens[:, mine], targets[:, mine], lengths[mine])
    losses["autocast"] = train(module, *part, autocast=True)
    Path(folder, f"{rank}.json").write_text(json.dumps(losses))
    distributed.monitored_barrier()  # see examples/characters.py
    distributed.destroy_process_group()


def test_processes_agree_with_one_on_the_joined_batch(tmp_path: Path) -> None:
    """Two processes under DDP and FSDP2 have the losses of one on the joined batch."""
    expected = train(*make())
    torch.multiprocessing.spawn(process, (str(tmp_path),), WORLD)
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(WORLD)]
    for way in WAYS:
        mean = [sum(of_step) / WORLD for of_step in zip(*(f[way] for f in found), strict=True)]
        assert_close(mean, expected, "training", way)
    model, *batch = make()
    alone = train(model.float(), *batch, autocast=True)
    losses = [sum(f["autocast"][n] for f in found) / WORLD for n in range(STEPS)]
    assert_close(losses, alone, "bfloat16", "DDP under autocast", factor=2)
    assert expected[-1] < expected[0]


class Encoded(Dataset):
    """Items that a layer makes, in whatever process asks."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.layer = ft.GRU(3, 40).requires_grad_(False)
        self.x = torch.randn(8, 30, 20, 3)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, n: int) -> Any:
        return self.layer(self.x[n])[0]


@pytest.mark.parametrize("start", ["fork", "spawn"])
@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
def test_workers_of_a_data_loader(start: str) -> None:
    """Layers work in a DataLoader's workers, also where threads were at work before the
    fork.
    """
    data = Encoded()
    fr.set_num_threads(2)
    expected = torch.stack([data[n] for n in range(len(data))])
    workers = 2 if start == "fork" else 1  # a spawned one imports PyTorch
    loader = DataLoader(data, 4, num_workers=workers, multiprocessing_context=start)
    assert torch.equal(torch.cat(list(loader)), expected)
