"""Errors that leave a site: what may quote data is told by its kind alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fedllm.core.errors import DataError, FedLLMError, ModelError
from fedllm.effects.rig import Play
from fedllm.methods import find
from fedllm.tasks.function import FunctionLearner

SECRET = "the patient's name"


def reason(fault: Exception, discreet: bool) -> str:
    def loss(params: Any, examples: Any) -> torch.Tensor:
        raise fault

    learner = FunctionLearner(loss, {"w": torch.zeros(2)})
    play = Play(find("fedavg")(train={"steps": 1}), learner, {"a": [{"x": [1.0, 2.0]}]})
    play.worker.discreet = discreet
    play.rounds(1)
    return str(play.records[0].lost[0]["reason"])


@pytest.mark.parametrize("fault", [ValueError(SECRET), KeyError(SECRET), DataError(SECRET, "x")])
def test_what_may_quote_data_is_told_by_its_kind(fault: Exception, capfd: pytest.CaptureFixture[str]) -> None:
    told = reason(fault, discreet=True)
    assert SECRET not in told and type(fault).__name__ in told
    assert SECRET in capfd.readouterr().err, "the site itself sees it"
    assert SECRET in reason(fault, discreet=False), "at home nothing is hidden"


def test_other_errors_of_ours_are_told_whole() -> None:
    fault: FedLLMError = ModelError("The model is too large.", "Allowed: 2 GB.")
    assert "too large" in reason(fault, discreet=True)
