"""Options - typed settings as a list for people: dotted name, type, default, and the text below each attribute."""

from __future__ import annotations

import types
import typing
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from fedllm.core.settings import nested

WORDS = {int: "whole number", float: "number", str: "text", bool: "true | false", type(None): "null"}
SIGNS = (("ge", ">="), ("gt", ">"), ("le", "<="), ("lt", "<"))


@dataclass(frozen=True)
class Option:
    """One option.

    Attributes:
        name: dotted, as it is written in a recipe.
        type: what it may be, in words.
        default: as YAML; "" where it must be given.
        about: what it does.
    """

    name: str
    type: str
    default: str
    about: str

    def to_dict(self) -> dict[str, str]:
        """Ready for JSON."""
        return asdict(self)


def options(kind: type[BaseModel], prefix: str = "", skip: tuple[str, ...] = ()) -> Iterator[Option]:
    """Every option of `kind` and of the settings inside it."""
    for name, field in kind.model_fields.items():
        if name in skip:
            continue
        place = f"{prefix}{name}"
        inner = nested(field.annotation)
        default = field.get_default(call_default_factory=True, validated_data={})
        if inner is not None and default is not None:
            yield from options(inner, f"{place}.")
            continue
        yield Option(place, _type(field), _default(field, default), " ".join((field.description or "").split()))


def recipe_options() -> list[Option]:
    """Every option of a recipe; those of a method are its own."""
    from fedllm.core.train import Train
    from fedllm.recipe import Recipe

    found: list[Option] = []
    for option in options(Recipe):
        found += options(Train, "train.") if option.name == "train" else [option]
    return found


def changed(value: BaseModel) -> dict[str, Any]:
    """The fields of settings that were given and differ from their defaults."""
    fields = type(value).model_fields
    given = {name: getattr(value, name) for name in fields if name in value.model_fields_set}
    return {name: one for name, one in given.items() if one != fields[name].default}


def as_yaml(value: Any) -> str:
    """A value as it would be written in a recipe, on one line."""
    import yaml

    plain = value.model_dump(mode="json") if isinstance(value, BaseModel) else value
    plain = list(plain) if isinstance(plain, tuple) else plain
    if isinstance(plain, float):
        return f"{plain:g}"
    text = yaml.safe_dump(plain, default_flow_style=True, allow_unicode=True, width=10**6)
    return text.removesuffix("...\n").strip()


def _default(field: FieldInfo, default: Any) -> str:
    return "" if field.is_required() else as_yaml(default)


def _type(field: FieldInfo) -> str:
    return _words(field.annotation, field.metadata)


def _words(annotation: Any, metadata: typing.Sequence[Any] = ()) -> str:
    origin, parts = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        extra = [inner for part in parts[1:] for inner in (part.metadata if isinstance(part, FieldInfo) else [part])]
        return _words(parts[0], [*metadata, *extra])
    if origin is typing.Literal:
        return " | ".join(str(part) for part in parts)
    if origin in (typing.Union, types.UnionType):
        return " | ".join(_words(part, () if part is type(None) else metadata) for part in parts)
    if origin in (list, tuple):
        kinds = list(dict.fromkeys(_words(part) for part in parts if part is not ...))
        return f"list of {' or '.join(kinds)}"
    if origin is dict or annotation is dict:
        return "mapping"
    return WORDS.get(annotation, getattr(annotation, "__name__", str(annotation))) + _bounds(annotation, metadata)


def _bounds(annotation: Any, metadata: typing.Sequence[Any]) -> str:
    if annotation not in (int, float):
        return ""
    pairs = [(sign, getattr(bound, name, None)) for name, sign in SIGNS for bound in metadata]
    found = [f"{sign} {bound:g}" for sign, bound in pairs if bound is not None]
    return f" {', '.join(found)}" if found else ""
