"""A file that we write is complete or, if it cannot be written, what it was before."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import fusedrnn as fr
from fusedrnn.files import UserError

resource = pytest.importorskip("resource", reason="there are no limits of files' sizes")


@contextlib.contextmanager
def full_disk(bytes_: int = 1000) -> Iterator[None]:
    """No file can have more bytes; Python ignores the signal, so that writing fails."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def stream() -> fr.Stream:
    stream = fr.Stream(fr.LSTM(3, 64, rng=0), 8)
    stream.step(np.ones((8, 3), np.float32))
    return stream


def export(path: Path) -> None:
    pytest.importorskip("onnx")
    from fusedrnn.onnx import export

    export(fr.GRU(8, 32, rng=0), path)


def draw(path: Path) -> None:
    figure = pytest.importorskip("matplotlib.figure").Figure()
    from fusedrnn import demo

    figure.add_subplot().plot([0, 1])
    demo.save(figure, path, dpi=50)


def keep(option: str) -> Callable[[Path], None]:
    """Writes the results of `fusedrnn bench`."""

    def write(path: Path) -> None:
        pytest.importorskip("rich")
        from rich.console import Console

        from fusedrnn.bench import command

        asked: Any = SimpleNamespace(json=None, report=None, html=None)
        setattr(asked, option, path)
        measured = {"about": ["of nothing " * 200], "cases": [], "tables": [], "left out": {}}
        command._keep(measured, None, asked, Console(quiet=True))

    return write


WRITERS: dict[str, tuple[Callable[[Path], Any], type[Exception]]] = {
    "Stream.save": (lambda path: stream().save(path), OSError),
    "onnx.export": (export, OSError),
    "demo --output": (draw, UserError),
    "bench --json": (keep("json"), UserError),
    "bench --report": (keep("report"), UserError),
}


@pytest.mark.parametrize("name", WRITERS)
def test_files_are_whole_or_what_they_were(name: str, tmp_path: Path) -> None:
    """On a full disk, and at a path that cannot be, a writer says so in one line and leaves
    the folder as it was.
    """
    write, error = WRITERS[name]
    path = tmp_path / "file"
    with full_disk(), pytest.raises(error, match="File too large") as new:
        write(path)
    assert list(tmp_path.iterdir()) == []
    path.write_bytes(b"before")
    with full_disk(), pytest.raises(error, match="File too large"):
        write(path)
    for wrong in (path / "below", tmp_path, tmp_path / "no" / "file", tmp_path / ("n" * 300)):
        with pytest.raises(error):
            write(wrong)
    assert path.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [path]
    assert str(path) in str(new.value)
    assert "\n" not in str(new.value)
    write(path)
    assert path.stat().st_size > 1000
    write(tmp_path / ("n" * 255))


def test_the_file_that_is_replaced(tmp_path: Path) -> None:
    """A link stays a link, a file keeps its mode, and one that is read-only is refused."""
    path, link = tmp_path / "state", tmp_path / "link"
    path.write_bytes(b"before")
    path.chmod(0o600)
    link.symlink_to(path)
    stream().save(link)
    assert link.is_symlink()
    assert path.stat().st_mode & 0o777 == 0o600
    other = fr.Stream(fr.LSTM(3, 64, rng=0), 8)
    other.load(path)
    assert (other.state[0] == stream().state[0]).all()
    path.chmod(0o400)
    if not os.access(path, os.W_OK):  # root may write it
        with pytest.raises(PermissionError, match="link"):
            stream().save(link)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/dev/full is Linux's")
def test_devices_are_written_directly() -> None:
    """Devices are not replaced: /dev/null takes everything, /dev/full nothing."""
    stream().save("/dev/null")
    with pytest.raises(OSError, match="No space left on device"):
        stream().save("/dev/full")
    assert Path("/dev/null").is_char_device()
    assert Path("/dev/full").is_char_device()
