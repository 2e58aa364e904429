"""What the shell offers after a tab."""

from __future__ import annotations

import pytest

from fedllm.cli import complete
from tests.cli.lines import ENVIRONMENT, outside


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("runs/one/recipe.yaml", "runs/two/recipe.yaml", "runs/none/x.txt", "mine.yaml", "rows.jsonl"):
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    return tmp_path


def test_offers(here):
    assert complete.recipes("qui") == ["quickstart"] and complete.recipes("mi") == ["mine.yaml"]
    assert complete.runs("") == complete.runs("ru") == complete.runs("runs/") == ["runs/one", "runs/two"]
    assert complete.runs("runs/o") == ["runs/one"] and complete.runs("absent/") == []
    assert complete.methods("fedpro") == ["fedprompt", "fedprox"]
    assert complete.method_lists("fedavg,scaf") == ["fedavg,scaffold"] and complete.method_lists("ba") == ["base"]
    assert complete.sources("ro") == ["rows.jsonl"]
    assert complete.explained("rec") == ["recipe"] and "baseline" in complete.topics("base")


def test_the_shell_is_answered(here):
    asked = {"_FEDLLM_COMPLETE": "complete_bash", "COMP_WORDS": "fedllm resume runs/o", "COMP_CWORD": "2"}
    found = outside(env={**ENVIRONMENT, **asked}, cwd=here)
    assert found.stdout.split() == ["runs/one"], found.stderr
