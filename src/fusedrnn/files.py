"""Files that are written completely, or not at all."""

from __future__ import annotations

import errno
import os
import shutil
import threading
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
    # File systems limit names to 255 bytes.
    return path.with_name(f"{path.name[:50]}.{os.getpid()}.{threading.get_ident()}.part")


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield the name of a temporary file, which replaces `path` once it is complete.

    A link to a file stays a link. What is no file, such as a pipe, is written directly.

    Raises
    ------
    OSError: the file cannot be written; it names `path`, whose content does not change.
    """
    target = Path(os.path.realpath(path))
    temporary = _temporary(target)
    try:
        if target.exists() and not os.access(target, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        if target.exists() and not target.is_file():
            yield target
            return
        try:
            yield temporary
            if target.exists():
                shutil.copymode(target, temporary)
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, os.fspath(path)) from None


@contextmanager
def writing(path: Path) -> Iterator[Path]:
    """Do as `replacing`, for a command: raise UserError if the file cannot be written."""
    with _write_errors("the file", path), replacing(path) as temporary:
        yield temporary


@contextmanager
def _write_errors(option: str, path: Path) -> Iterator[None]:
    """Turn a failure to write into a UserError."""
    try:
        yield
    except OSError as error:
        why = error.strerror or error
        raise UserError(f"{option} cannot be written, {why}: {path}") from None
