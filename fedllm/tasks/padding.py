"""Padding - whether a causal model must be told what is padding.

Where texts are padded on the right, no position of a text looks at what is behind it. Without a mask for it, attention
is plainly causal: half the work, and no mask to build. Whether a model keeps to that is tried out when it is loaded.
"""

from __future__ import annotations

import torch

from fedllm.models.adapters.attach import Adapted
from fedllm.tasks.head import same


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
    real, other = mask.bool(), torch.where(mask.bool(), ids, filler)
    whole = torch.ones_like(ids)
    with torch.no_grad():
        plain, changed, told = (
            adapted.model(input_ids=tokens, attention_mask=seen).logits[real]
            for tokens, seen in ((ids, whole), (other, whole), (other, mask))
        )
    return torch.equal(plain, changed) and same(told, changed)
