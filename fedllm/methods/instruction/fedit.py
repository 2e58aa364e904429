"""FedIT - federated instruction tuning: FedAvg over LoRA adapters, factor by factor.

The reference that nearly every later federated LoRA paper compares with. Averaging A and B apart is not averaging
their product; the error grows with how much clients differ, and FlexLoRA, FFA-LoRA and others exist to mend it.

Deviations: the loss counts the response only by default (task.loss_on=all is the published code's), and the first
values and cohorts are seeded by the run, not by the round alone.
"""

from fedllm.core.card import Card
from fedllm.core.method import Method


class FedIT(Method):
    """Federated averaging of LoRA factors."""

    card = Card(
        title="FedIT - FedAvg over LoRA adapters for instruction tuning",
        paper="Zhang et al., ICASSP 2024, arXiv:2305.05644",
        cells=("2.4 Instruction Tuning", "Table 2 Frameworks / Instruction Tuning"),
        travels="down: LoRA factors; up: their change (r (d + k) numbers per layer) and the number of examples",
        claim="Beats models tuned on one client's instructions and the base model, and stays below pooled training.",
        models=("causal-lm", "seq2seq"),
        status="verified",
    )
    adapters = ("lora",)
