"""Pack - whole texts together in blocks, each with positions of its own, so that little is padding.

The fullest block that still has room takes the next text, longest first (best fit decreasing). The texts of a block
do not see each other (see :mod:`fedllm.tasks.sight`), and the first token of each is predicted by none: the losses of a
block are those of its texts.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence

import torch

from fedllm.core.work import Example

IGNORE = -100
"""The label of a position that does not count."""


def packed(examples: Sequence[Example], size: int) -> list[Example]:
    """Blocks of at most `size` tokens; their `position_ids` begin anew with each text.

    Args:
        examples: texts of at most `size` tokens.
        size: the most tokens of a block.
    """
    blocks: list[list[int]] = []
    rooms: list[tuple[int, int]] = []
    for number in sorted(range(len(examples)), key=lambda number: -examples[number].tokens):
        need = examples[number].tokens
        at = bisect_left(rooms, (need, -1))
        if at == len(rooms):
            room, block = size, len(blocks)
            blocks.append([])
        else:
            room, block = rooms.pop(at)
        blocks[block].append(number)
        insort(rooms, (room - need, block))
    return [_block([examples[number] for number in sorted(block)]) for block in blocks]


def _block(texts: Sequence[Example]) -> Example:
    labels = torch.cat([text.labels for text in texts])
    places = torch.cat([torch.arange(len(text.labels)) for text in texts])
    labels[places == 0] = IGNORE
    inputs = {"input_ids": torch.cat([text.inputs["input_ids"] for text in texts]), "position_ids": places}
    return Example(inputs, labels, sum(text.tokens for text in texts), sum(text.targets for text in texts))
