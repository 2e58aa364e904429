"""Durable - a file appears whole or not at all: written beside its place, flushed to disk, renamed, its folder too."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from fedllm.core.errors import ConfigError

OWN = 0o600
"""Mode of a file that its owner alone may read."""
OWN_FOLDER = 0o700
"""Mode of a folder that its owner alone may enter."""


def write(file: Path, data: bytes, mode: int | None = None) -> None:
    """Write `data` to `file`, making its folder; what was there stays until the new content is safely on disk.

    Args:
        file: its place.
        data: its content.
        mode: who may read it, from its first byte on; None: as the process's umask says.
    """
    partial = file.with_name(file.name + ".partial")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        _fill(partial, data, mode)
        partial.replace(file)
        _entered(file.parent)
    finally:
        partial.unlink(missing_ok=True)


def update(file: Path, data: bytes, mode: int | None = None) -> None:
    """As :func:`write`, where `file` does not hold `data` already."""
    try:
        same = file.read_bytes() == data
    except OSError:
        same = False
    if not same:
        write(file, data, mode)


def create(file: Path, data: bytes, mode: int) -> None:
    """As :func:`write`, for a file that must not be there yet; raises :class:`FileExistsError` where it is."""
    partial = file.with_name(f"{file.name}.{os.getpid()}.partial")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        _fill(partial, data, mode)
        os.link(partial, file)
    finally:
        partial.unlink(missing_ok=True)
    _entered(file.parent)


def own(folder: Path) -> None:
    """Make a folder that its owner alone may enter, or have it so.

    Raises:
        ConfigError: it cannot be made, or is somebody else's.
    """
    try:
        folder.mkdir(mode=OWN_FOLDER, parents=True, exist_ok=True)
        folder.chmod(OWN_FOLDER)
    except OSError as fault:
        raise ConfigError(
            f"The folder {folder} cannot be kept from others: {fault.strerror}.",
            "Its owner alone may enter it.",
            action="Run this as the owner of the folder.",
        ) from None


def flush(file: Path) -> None:
    """Have on disk what another program wrote into `file`."""
    opened = os.open(file, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def _entered(folder: Path) -> None:
    """Have a folder's new entry on disk as well, so that it outlives a loss of power; where folders can be opened."""
    if os.name == "nt":
        return
    try:
        flush(folder)
    except OSError as fault:
        if fault.errno not in (errno.EINVAL, errno.ENOTSUP):  # file systems over a network may have no such thing
            raise


def _fill(file: Path, data: bytes, mode: int | None) -> None:
    opened = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666 if mode is None else mode)
    with os.fdopen(opened, "wb") as handle:
        if mode is not None:
            os.fchmod(handle.fileno(), mode)  # a file of before may be open to others
        handle.write(data)
        handle.flush()
        os.fsync(handle.fileno())
