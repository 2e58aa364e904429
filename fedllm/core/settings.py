"""Settings - turn plain data into typed settings, and every mistake in it into an error with the nearest choice."""

from __future__ import annotations

import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from fedllm.core.errors import ConfigError, FedLLMError

Settings = TypeVar("Settings", bound=BaseModel)


def read(kind: type[Settings], values: Mapping[str, Any], where: str = "") -> Settings:
    """`values` as settings of `kind`; `where` is the dotted place in the recipe.

    Raises:
        ConfigError: an unknown key (with the nearest), a value of the wrong type or out of range.
    """
    unknown(kind, values, where)
    try:
        return kind.model_validate(dict(values))
    except ValidationError as fault:
        first = fault.errors()[0]
        cause = first.get("ctx", {}).get("error")
        if isinstance(cause, FedLLMError):
            raise cause from None
        place = ".".join(str(part) for part in (*filter(None, [where]), *first["loc"]))
        raise ConfigError(
            f"{place or where or kind.__name__}={first['input']!r} cannot be used: {first['msg']}.",
            _allowed(kind, first["loc"]),
            action="Run 'fedllm explain recipe' to see every option.",
        ) from None


def unknown(kind: type[BaseModel], values: Any, where: str) -> None:
    """Raise :class:`ConfigError` for the first key of `values`, at any depth, that `kind` does not have."""
    if not isinstance(values, Mapping):
        raise ConfigError(f"{where or 'The recipe'} is a {type(values).__name__}.", "A mapping of options is needed.")
    for key, value in values.items():
        if key not in kind.model_fields:
            place = f"{where}.{key}" if where else str(key)
            raise ConfigError.unknown("option", place, [f"{where}.{n}" if where else n for n in kind.model_fields])
        inner = nested(kind.model_fields[key].annotation)
        if inner is not None and isinstance(value, Mapping):
            unknown(inner, value, f"{where}.{key}" if where else str(key))


def nested(annotation: Any) -> type[BaseModel] | None:
    """The settings class inside an annotation such as `X`, `X | None`; None where there is none."""
    options = typing.get_args(annotation) if _is_union(annotation) else (annotation,)
    found = [option for option in options if isinstance(option, type) and issubclass(option, BaseModel)]
    return found[0] if len(found) == 1 else None


def _is_union(annotation: Any) -> bool:
    return typing.get_origin(annotation) in (typing.Union, types.UnionType)


def _allowed(kind: type[BaseModel], place: tuple[int | str, ...]) -> str:
    """The description of the field at `place`, as the allowed part of an error."""
    model: type[BaseModel] | None = kind
    text = ""
    for part in place:
        if model is None or part not in model.model_fields:
            break
        field = model.model_fields[str(part)]
        text, model = field.description or text, nested(field.annotation)
    return text.split("\n")[0]


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`over` laid over `base`; mappings are merged, everything else is replaced."""
    result = dict(base)
    for key, value in over.items():
        before = result.get(key)
        both = isinstance(before, Mapping) and isinstance(value, Mapping)
        result[key] = merge(before, value) if both else value  # type: ignore[arg-type]
    return result
