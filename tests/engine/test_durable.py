"""Durable files: their content is on disk before their name is, and then the folder that holds the name."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from fedllm.engine import durable


@pytest.fixture
def order(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """What was flushed, in order: the name of a file or a folder, and whether the whole file had its name by then."""
    seen: list[str] = []
    real = os.fsync

    def watched(number: int) -> None:
        name = Path(os.readlink(f"/proc/self/fd/{number}")).name
        seen.append(f"{name}{' (named)' if (tmp_path / 'place' / 'file').exists() else ''}")
        real(number)

    monkeypatch.setattr(durable.os, "fsync", watched)
    return seen


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="needs /proc to tell what is flushed")
@pytest.mark.parametrize("write", [durable.write, durable.create, durable.update])
def test_content_is_flushed_before_the_name_and_the_folder_behind_it(
    write: Callable[[Path, bytes, int], None], tmp_path: Path, order: list[str]
) -> None:
    file = tmp_path / "place" / "file"
    write(file, b"content", 0o600)
    assert file.read_bytes() == b"content" and [one.name for one in file.parent.iterdir()] == ["file"]
    assert len(order) == 2 and order[0].endswith(".partial") and order[1] == "place (named)"


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOSPC])
def test_a_file_system_without_such_a_thing_is_no_fault_and_a_full_one_is(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(file: Path) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(durable, "flush", refuses)
    if number == errno.EINVAL:
        durable.write(tmp_path / "file", b"content")
        return
    with pytest.raises(OSError, match="No space"):
        durable.write(tmp_path / "file", b"content")
