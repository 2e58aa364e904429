"""Sessions: how a participant's process is started."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("nvflare", reason="nvflare is not installed: pip install 'fedllm[nvflare]'")

from fedllm.core.errors import ConfigError
from fedllm.engine.nvflare import session


def told(folder: Path) -> dict[str, str]:
    """The environment of a participant whose script writes it down and ends."""
    (folder / "startup").mkdir(parents=True)
    (folder / "startup" / "sub_start.sh").write_text('env > "$(dirname "$0")/env.txt"\n', encoding="utf-8")
    assert session.start("site", folder).process.wait(60) == 0
    lines = (folder / "startup" / "env.txt").read_text(encoding="utf-8").splitlines()
    return dict(line.split("=", 1) for line in lines if "=" in line)


def test_memory_is_kept_for_the_next_letter_unless_a_person_says_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in session.MEMORY:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MALLOC_ARENA_MAX", "4")
    found = told(tmp_path)
    assert {name: found[name] for name in session.MEMORY} == {**session.MEMORY, "MALLOC_ARENA_MAX": "4"}
    assert found["NVFLARE_CLIENT_OUTCOME_WAIT_TIMEOUT"] == "20"


def test_a_folder_that_is_no_kit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no kit of a server or a site"):
        session.start("site", tmp_path)
