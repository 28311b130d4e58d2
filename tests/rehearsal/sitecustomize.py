"""Stands in for CUDA in the processes of `fusedrnn bench --device cuda`, on the emulator.

Python imports this file at its start where its folder is on PYTHONPATH: PyTorch's GPU is then
its CPU, whose memory our kernels on the emulator read.
"""

from __future__ import annotations

import sys
import time
import types
from typing import Any

if {"bench", "--multiprocessing-fork"} & set(sys.orig_argv):
    import torch
    from torch.overrides import TorchFunctionMode

    from fusedrnn import cuda
    from fusedrnn.bench import gpu

    class OnHost(TorchFunctionMode):
        """Makes what is asked for on a GPU on the host."""

        def __torch_function__(
            self, function: Any, _: Any, arguments: Any = (), named: Any = None
        ) -> Any:
            named = dict(named or {})
            if str(named.get("device")).startswith("cuda"):
                named["device"] = "cpu"
            return function(*arguments, **named)

    class Event:
        """A time of the host's clock."""

        def __init__(self, enable_timing: bool = False) -> None:
            self.at = 0.0

        def record(self, stream: Any = None) -> None:
            self.at = time.perf_counter()

        def synchronize(self) -> None:
            pass

        def elapsed_time(self, end: Event) -> float:
            return 1e3 * (end.at - self.at)

    def framework_of(a: Any) -> Any:
        return framework if isinstance(a, torch.Tensor) else plain(a)

    plain, framework = cuda.framework_of, cuda._Torch(torch)
    cuda.framework_of = framework_of
    OnHost().__enter__()
    stream = types.SimpleNamespace(cuda_stream=0)
    stand_ins = {
        "Event": Event,
        "synchronize": lambda device=None: None,
        "empty_cache": lambda: None,
        "current_stream": lambda device=None: stream,
        "mem_get_info": lambda: (1 << 33, 1 << 33),
        "memory_reserved": lambda: 0,
        "memory_allocated": lambda: 0,
    }
    for name, stand_in in stand_ins.items():
        setattr(torch.cuda, name, stand_in)
    torch.Tensor.cuda = lambda self: self  # type: ignore[method-assign]
    torch.Tensor.record_stream = lambda self, s: None  # type: ignore[method-assign]
    gpu.describe_card = lambda: gpu.Card(
        name="emulator",
        capability="9.0",
        multiprocessors=12,
        torch=torch.__version__,
        cudnn="0",
        cuda="0",
        chip_bytes=1 << 20,
        memory_rate=1e12,
        l2_rate=1e12,
        matmul_rates=dict.fromkeys(gpu.DTYPES, 1e12),
    )
