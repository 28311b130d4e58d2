"""Files that a command writes: completely, or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class UserError(Exception):
    """An error that the user of a command can fix; the message is one line."""


def check_output(option: str, path: Path, suffix: str) -> None:
    """Raise UserError, before any work is done, for a file that cannot be written."""
    if path.suffix.lower() != suffix:
        raise UserError(f"{option} must end in {suffix}, got {path}")
    if path.is_dir():
        raise UserError(f"{option} must be a file, got the folder {path}")
    if path.exists() and not os.access(path, os.W_OK):
        raise UserError(f"{option} cannot be written: {path}")
    with _write_errors(option, path):
        temporary = _temporary(path)
        temporary.touch(exist_ok=False)
        temporary.unlink()


def _temporary(path: Path) -> Path:
    return path.with_name(f"{path.name}.{os.getpid()}.part")


@contextmanager
def _write_errors(option: str, path: Path) -> Iterator[None]:
    """Turn a failure to write into a UserError."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{option} cannot be written, {error.strerror}: {path}") from None


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield the name of a temporary file, which replaces `path` once it is complete."""
    temporary = _temporary(path)
    with _write_errors("the file", path):
        try:
            yield temporary
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
