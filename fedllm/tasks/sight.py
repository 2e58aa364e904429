"""Sight - what a position of a causal model sees: no padding behind its text, and no other text of its block.

Where texts are padded on the right, no position of a text looks at what is behind it. Without a mask for it, attention
is plainly causal: less work, and no mask to build. Packed texts are kept apart by positions that begin anew with each;
transformers makes a mask of them. Whether a model keeps to either is tried out when it is loaded.
"""

from __future__ import annotations

import torch

from fedllm.core.errors import ModelError
from fedllm.models.adapters.attach import Adapted
from fedllm.tasks.head import IN_FRONT, same


def unseen(adapted: Adapted, vocabulary: int, filler: int) -> bool:
    """Whether what stands behind a text changes no bit of its logits, and a mask no more than rounding does.

    Args:
        adapted: the model with its adapter.
        vocabulary: token ids below this may be used to try it out.
        filler: the token that pads.
    """
    ids = torch.arange(1, 9, device=adapted.device).view(2, 4) % vocabulary
    mask = torch.ones_like(ids)
    mask[0, 2:] = 0
    real, whole = mask.bool(), torch.ones_like(ids)
    other = torch.where(real, ids, filler)
    with torch.no_grad():
        plain, changed, told = (
            adapted.model(input_ids=tokens, attention_mask=seen).logits[real]
            for tokens, seen in ((ids, whole), (other, whole), (other, mask))
        )
    return torch.equal(plain, changed) and same(told, changed)


def check_apart(adapted: Adapted, vocabulary: int) -> None:
    """Raise :class:`ModelError` where a model cannot keep the texts of a block apart; see :func:`unseen`."""
    if any(name.startswith(IN_FRONT) for name in adapted.initial()):
        raise ModelError(
            f"task.pack=true with adapter.kind={adapted.settings.kind}: what is in front of a block is seen by its "
            "first text alone.",
            "Allowed with packed texts: adapters inside layers (lora, ia3, bottleneck, bitfit, full).",
            "lora",
            "Set task.pack=false.",
        )
    if not (adapted.accepts("position_ids") and _apart(adapted, vocabulary)):
        raise ModelError(
            f"task.pack=true: {adapted.loaded.name} does not keep the texts of a block apart.",
            "Allowed for it: task.pack=false, and task.pack=stream, where a text sees what stands before it.",
            action="Set task.pack=false.",
        )


def _apart(adapted: Adapted, vocabulary: int) -> bool:
    """Whether a text changes no bit of the logits of the next, which are as if it were alone."""
    ids = torch.arange(1, 13, device=adapted.device).view(2, 6) % vocabulary
    other, places = ids.clone(), torch.arange(3, device=adapted.device).repeat(2).expand(2, -1)
    other[:, :3] = ids[:, :3].flip(1)
    with torch.no_grad():
        one, two = (adapted.model(input_ids=tokens, position_ids=places).logits[:, 3:] for tokens in (ids, other))
        alone = adapted.model(input_ids=ids[:, 3:]).logits
    return torch.equal(one, two) and same(one, alone)
