"""A process that runs a GPU's cases, so that a crash or a call that never ends costs one."""

from __future__ import annotations

import contextlib
import multiprocessing
from multiprocessing.connection import Connection
from typing import Any

from .cases import Case
from .race import Result

START_SECONDS = 60.0
ANSWER_SECONDS = 20.0


def _work(connection: Connection) -> None:
    """Answer with results, or what failed, until the device is lost."""
    import torch

    from . import gpu

    connection.send("ready")
    while True:
        name, *arguments = connection.recv()
        try:
            answer = {"result": getattr(gpu, name)(*arguments)}
        except Exception as failure:  # whatever happens on the device is reported
            answer = {"failure": f"{type(failure).__name__}: {failure}"}
        try:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        except Exception as failure:
            text = f"{answer.get('failure', '')}; the device is lost: {failure}"
            connection.send({"failure": text, "lost": True})
            return
        connection.send(answer)


class Worker:
    """The process, which is started anew after it was lost."""

    def __init__(self) -> None:
        self._process: Any = None
        self._connection: Any = None

    def measure(self, case: Case, names: list[str], seconds: float) -> Result:
        """Return a case's result.

        Raises
        ------
        RuntimeError: the case failed, and how.
        """
        return dict(self.ask("measure", case, names, seconds))

    def ask(self, *task: Any, seconds: float = ANSWER_SECONDS) -> Any:
        """Call a function of `gpu` by name; raise RuntimeError where it fails or hangs."""
        if self._process is None:
            context = multiprocessing.get_context("spawn")
            self._connection, far_end = context.Pipe()
            self._process = context.Process(target=_work, args=(far_end,), daemon=True)
            self._process.start()
            far_end.close()
            self._receive(START_SECONDS)
        with contextlib.suppress(OSError):  # the process is gone, as _receive finds out
            self._connection.send(task)
        answer = self._receive(seconds)
        if "failure" in answer:
            if "lost" in answer:
                self.stop()
            raise RuntimeError(answer["failure"])
        return answer["result"]

    def _receive(self, seconds: float) -> Any:
        try:
            if self._connection.poll(seconds):
                return self._connection.recv()
            text = f"no answer in {seconds:.0f} s"
        except (EOFError, OSError):
            self._process.join(5)
            text = f"the process ended with status {self._process.exitcode}"
        self.stop()
        raise RuntimeError(text)

    def stop(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._process.join(10)
            self._connection.close()
        self._process = None
