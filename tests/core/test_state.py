"""State - it is replaced, never changed, and a checkpoint gives it back to the last bit."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from fedllm.core.message import Message
from fedllm.core.state import CollectMore, State
from fedllm.core.wire import decode, encode


def a_state() -> State:
    return State(
        {"w": torch.tensor([1.0, float("nan")]), "h": torch.ones(2, dtype=torch.bfloat16), "n": torch.tensor(3)},
        {"m": {"w": torch.ones(2).double()}, "momentum.v": {"w": torch.zeros(0)}, "empty": {}},
        {"cohort": 4, "note": [None, True, {"a": 1.5}]},
        7,
    )


def test_a_checkpoint_gives_the_state_back() -> None:
    state = a_state()
    back = State.from_message(decode(encode(state.to_message())))
    assert back.round == 7
    assert back.numbers == state.numbers
    assert back.params.keys() == state.params.keys()
    assert back.memory.keys() == state.memory.keys()
    for left, right in [(state.params, back.params), *((state.memory[n], back.memory[n]) for n in state.memory)]:
        assert all(
            left[n].dtype == right[n].dtype and torch.equal(torch.nan_to_num(left[n]), torch.nan_to_num(right[n]))
            for n in left
        )
    assert encode(back.to_message()) == encode(state.to_message())


def test_with_replaces_and_leaves_the_old_state_alone() -> None:
    state = a_state()
    new = state.with_({"w": torch.zeros(1)}, m={"w": torch.zeros(1)}, extra={"x": torch.ones(1)})
    assert new.params["w"].tolist() == [0.0]
    assert set(new.memory) == {"m", "momentum.v", "empty", "extra"}
    assert set(state.memory) == {"m", "momentum.v", "empty"}
    assert state.memory["m"]["w"].tolist() == [1.0, 1.0]
    assert (new.numbers, new.round) == (state.numbers, state.round)
    assert state.with_().params is state.params
    with pytest.raises(dataclasses.FrozenInstanceError):
        state.round = 8  # type: ignore[misc]


def test_the_first_state() -> None:
    state = State({"w": torch.ones(1)})
    assert (state.memory, state.numbers, state.round) == ({}, {}, 0)
    assert State({}).memory is not state.memory


def test_a_checkpoint_without_params_is_no_state() -> None:
    with pytest.raises(Exception, match="params"):
        State.from_message(Message({}, {"numbers": {}, "round": 0}))


def test_collect_more() -> None:
    assert CollectMore().clients is None
    assert CollectMore(3).clients == 3
