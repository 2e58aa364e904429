"""Registered - options with a name and a card: what attacks, observers and defences have in common."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict

from fedllm.core.card import Card
from fedllm.core.registry import register


class Registered(BaseModel):
    """Fields are options; defining a subclass registers it, unless it is `abstract`."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)

    family: ClassVar[str] = ""
    """What it is: attack, observer, defence."""
    key: ClassVar[str] = ""
    card: ClassVar[Card]

    def __init_subclass__(cls, *, abstract: bool = False, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)

    @classmethod
    def __pydantic_init_subclass__(cls, *, abstract: bool = False, **kwargs: Any) -> None:
        super().__pydantic_init_subclass__(**kwargs)
        if not abstract:
            register(cls.family, cls)
