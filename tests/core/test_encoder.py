"""Encoder: what many clients receive is encoded once, and never where anything in it has changed."""

from __future__ import annotations

import torch

from fedllm.core.message import Received, Scalars
from fedllm.core.wire import Encoder, encode


def test_the_very_same_tensors_have_the_very_same_bytes() -> None:
    encoder, params = Encoder(), {"a": torch.randn(3, 4), "b": torch.zeros(0)}
    first = encoder(Received(dict(params), {"round": 1}))
    assert first == encode(Received(params, {"round": 1}))
    assert encoder(Received(dict(params), {"round": 1})) is first


def test_whatever_changes_is_encoded_again() -> None:
    encoder, params = Encoder(), {"a": torch.randn(3, 4)}
    first = encoder(Received(params))
    params["a"].mul_(2)  # in place: the tensor is the same, its numbers are not
    second = encoder(Received(params))
    assert second != first and second == encode(Received(params))
    equal = {"a": params["a"].clone()}
    assert encoder(Received(equal)) is not second
    for other in (
        Received(equal, {"n": 1}),
        Received({"b": equal["a"]}),
        Received(equal, None, more=Scalars({"x": 1.0})),
    ):
        assert encoder(other) == encode(other)
    view = equal["a"][0]
    before = encoder(Received({"a": view}))
    equal["a"].add_(1)  # through another name of the same memory
    assert encoder(Received({"a": view})) != before


def test_numbers_changed_in_place_are_seen() -> None:
    encoder, params, numbers = Encoder(), {"a": torch.ones(2)}, {"list": [1]}
    first = encoder(Received(params, numbers))
    numbers["list"].append(2)
    assert encoder(Received(params, numbers)) != first


def test_tensors_without_a_count_of_changes_are_encoded_each_time() -> None:
    with torch.inference_mode():
        params = {"a": torch.ones(2)}
        encoder = Encoder()
        first = encoder(Received(params))
        params["a"].add_(1)
        assert encoder(Received(params)) == encode(Received(params)) != first
