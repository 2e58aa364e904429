"""PromptFL - clients learn a few vectors of text context for a frozen CLIP together; nothing else moves or travels.

Federating whole vision models needs much bandwidth and many labelled images; clients at the edge have little of both.
Every client has the same frozen towers, learns the context of its class names from a few images (adapter.kind=context),
and uploads the change of that context alone: 4 M d_t bytes, times the number of classes with adapter.per_class=true.

Deviations: uploads are weighed by images (the published code takes all alike: weighting=uniform) and only those of this
round are averaged (the published code never clears its list). Its five epochs of SGD at 1e-3 are 10 steps of batches of
32 by default here (train.epochs=5 train.steps=null), its warm-up epoch at 1e-5 is left out, and its cosine goes over
the rounds.
"""

from fedllm.core.card import Card
from fedllm.core.method import Method
from fedllm.core.train import Schedule, Train


class PromptFL(Method):
    """Federated averaging of text contexts."""

    card = Card(
        title="PromptFL - federate a soft text prompt of a frozen CLIP",
        paper="Guo et al., IEEE Transactions on Mobile Computing 2023, arXiv:2208.11625",
        cells=("3.1 Prompt Generation",),
        travels="down: the context, M vectors of the text tower's width; up: their change and the number of images",
        claim="A prompt learnt together beats the prompts that clients with few classes learn alone.",
        models=("dual-encoder",),
        status="verified",
    )
    adapters = ("context",)
    train: Train = Train(optimizer="sgd", lr=1e-3, batch_size=32, clip_norm=None, schedule=Schedule(kind="cosine"))  # pyright: ignore[reportCallIssue]
    """Local training; plain SGD as in the paper."""

    def trainable(self, name: str) -> bool:
        """Only the context moves and travels; class names and towers are at every client."""
        return name.partition(".")[0] == "context"
