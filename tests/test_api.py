"""The public names: a change here is a change for users, and belongs in the changelog."""

from __future__ import annotations

import subprocess
import sys

import fedllm

PUBLIC = [
    "Card", "Federation", "FedLLMError", "Method", "Protocol", "Received", "Recipe", "State", "Upload", "compare",
    "on_client", "resume", "run", "verify",
]  # fmt: skip


def test_public_names() -> None:
    assert sorted(fedllm.__all__) == sorted(PUBLIC)
    assert len(fedllm.__all__) <= 15
    for name in fedllm.__all__:
        assert getattr(fedllm, name).__doc__, f"{name} is not documented"


def test_functions_are_not_hidden_by_modules_of_the_same_name() -> None:
    import fedllm.compare
    import fedllm.run

    assert callable(fedllm.run) and callable(fedllm.compare)


def test_importing_fedllm_loads_nothing_heavy() -> None:
    heavy = "torch transformers datasets sklearn pandas pydantic"
    code = f"import sys, fedllm; print([m for m in {heavy.split()} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_nothing_is_unpickled_but_between_processes_of_one_run() -> None:
    from pathlib import Path

    root = Path(fedllm.__file__).parent
    for file in root.rglob("*.py"):
        text = file.read_text()
        assert "torch.load(" not in text, file
        assert "import pickle" not in text or file == root / "engine" / "crew.py", file
