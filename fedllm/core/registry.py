"""Registry - defining a class registers it; a clash or a missing card is an error at import."""

from __future__ import annotations

from fedllm.core.card import Card
from fedllm.core.errors import ConfigError

_FOUND: dict[str, dict[str, type]] = {"method": {}, "protocol": {}, "defence": {}, "attack": {}, "observer": {}}


def register(kind: str, cls: type) -> str:
    """Enter `cls` under the key of its file (or its own `key`); returns the key.

    The key of `fedllm/methods/privacy/ffa_lora.py` is `ffa-lora`. A class typed into a notebook is named by its
    class name in lower case and may be defined again.
    """
    if not isinstance(cls.__dict__.get("card"), Card):
        raise ConfigError(
            f"The {kind} class {cls.__name__} has no card.",
            f"Every {kind} needs 'card = Card(...)' of its own.",
            action=f"Add one, or define 'class {cls.__name__}(..., abstract=True)' if it is only to be subclassed.",
        )
    stem = cls.__module__.rsplit(".", 1)[-1]
    inside = cls.__module__.startswith(("fedllm.methods.", "fedllm.protocols."))
    key = cls.__dict__.get("key") or (stem.replace("_", "-") if inside else cls.__name__.lower())
    for other_kind, found in _FOUND.items():
        other = found.get(key)
        if other is not None and (other.__module__, other.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ConfigError(
                f"The key '{key}' of {cls.__module__}.{cls.__qualname__} is taken.",
                f"It is the {other_kind} {other.__module__}.{other.__qualname__}.",
                action="Give the class another file name or a 'key' of its own.",
            )
    _FOUND[kind][key] = cls
    return key


def registered(kind: str) -> dict[str, type]:
    """Key to class of everything registered so far, in the order of the keys."""
    return dict(sorted(_FOUND[kind].items()))
