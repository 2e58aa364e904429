"""Errors - what was given, what is allowed, the nearest choice, what to do.

Every error a user can cause is a :class:`FedLLMError`. Its text has at most four short sentences in a fixed
order, and the command line prints it without a stack trace (``--debug`` shows one). The subclasses exist only
where a caller would catch them, and each carries the exit code of the command line.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any


def nearest(word: str, choices: Iterable[str]) -> str | None:
    """Return the choice most like `word`, or None where nothing is alike."""
    listed = [str(choice) for choice in choices]
    lowered = {choice.lower(): choice for choice in listed}
    found = difflib.get_close_matches(word.lower(), lowered, n=1, cutoff=0.5)
    return lowered[found[0]] if found else None


class FedLLMError(Exception):
    """Something the user gave cannot be used.

    Args:
        given: what was given, as a sentence: ``The method 'fedavgg' does not exist.``
        allowed: what is allowed: ``Methods: fedavg, fedprox, ...``
        nearest: the nearest valid choice; printed as ``Did you mean '...'?``
        action: what to do next: ``Run 'fedllm methods' to see them all.``
    """

    exit_code = 1

    def __init__(self, given: str, allowed: str = "", nearest: str | None = None, action: str = "") -> None:
        self.given, self.allowed, self.nearest, self.action = given, allowed, nearest, action
        parts = [given, allowed, f"Did you mean '{nearest}'?" if nearest else "", action]
        super().__init__(" ".join(part for part in parts if part))

    def __reduce__(self) -> tuple[Any, ...]:
        """Subclasses whose constructors differ come through another process whole."""
        return _again, (type(self), self.args, self.__dict__)


def _again(kind: type[FedLLMError], args: tuple[Any, ...], facts: dict[str, Any]) -> FedLLMError:
    error = kind.__new__(kind, *args)
    error.args = args
    error.__dict__.update(facts)
    return error


class ConfigError(FedLLMError):
    """An option, a name or a combination in a recipe cannot be used."""

    exit_code = 2

    @classmethod
    def unknown(cls, kind: str, word: str, choices: Iterable[str], action: str = "") -> ConfigError:
        """An unknown name: lists what exists and the nearest choice."""
        listed = sorted(str(choice) for choice in choices)
        allowed = f"Allowed: {', '.join(listed) or 'none'}."
        return cls(f"There is no {kind} '{word}'.", allowed, nearest(word, listed), action)


class DataError(FedLLMError):
    """Data is missing, empty or not of the stated form."""

    exit_code = 3


class ModelError(FedLLMError):
    """A model or tokenizer cannot be loaded or does not fit the task, the adapter or the memory."""

    exit_code = 4


class MissingExtra(FedLLMError):
    """An optional library is not installed; the message names the extra."""

    exit_code = 5

    def __init__(self, library: str, extra: str, purpose: str) -> None:
        super().__init__(
            f"{purpose} needs the library '{library}', which is not installed.",
            action=f"Install it with: pip install 'fedllm[{extra}]'",
        )


class DecodeError(FedLLMError):
    """Bytes that arrived are not a valid message: truncated, hostile or of another version."""

    exit_code = 6


class ModeConflict(FedLLMError):
    """A mode and a method cannot be combined."""

    exit_code = 2


class UploadRejected(FedLLMError):
    """One client's upload is not finite, or its names or shapes are not those expected."""

    exit_code = 6


class ClientLost(FedLLMError):
    """A client did not answer."""

    exit_code = 7


class RoundFailed(FedLLMError):
    """No usable upload arrived in a round, or the run cannot continue; earlier rounds are saved."""

    exit_code = 7


class RunError(FedLLMError):
    """A run folder is missing, damaged, of another version, or cannot be written."""

    exit_code = 8


class BudgetSpent(FedLLMError):
    """A privacy, token, byte or call budget is used up."""

    exit_code = 9
