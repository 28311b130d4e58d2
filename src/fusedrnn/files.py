"""Files that a command writes: whole, or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class UserError(Exception):
    """What the user of a command can mend, in one line for them."""


def check_output(option: str, path: Path, suffix: str) -> None:
    """Refuse a file that could not be written, before any work is done."""
    if path.suffix.lower() != suffix:
        raise UserError(f"{option} must end in {suffix}, got {path}")
    if path.is_dir():
        raise UserError(f"{option} must be a file, got the folder {path}")
    if path.exists() and not os.access(path, os.W_OK):
        raise UserError(f"{option} cannot be written: {path}")
    with _told(option, path):
        temporary = _beside(path)
        temporary.touch()
        temporary.unlink()


def _beside(path: Path) -> Path:
    return path.with_name(f"{path.name}.part")


@contextmanager
def _told(option: str, path: Path) -> Iterator[None]:
    """Tell a failure to write in words."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{option} cannot be written, {error.strerror}: {path}") from None


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give the name of a file to write, which takes the place of `path` once it is whole."""
    temporary = _beside(path)
    with _told("the file", path):
        try:
            yield temporary
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
