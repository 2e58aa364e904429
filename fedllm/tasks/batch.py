"""Batch - examples of many clients, padded to one length, and where their labels are."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from fedllm.core.tensors import moved
from fedllm.core.work import Example, Groups
from fedllm.tasks.pack import IGNORE

BESIDE = ("token_type_ids", "position_ids")
"""Inputs that lie beside the token ids, where a task makes them."""
NEARLY = 31 / 32
"""Share of positions with a label from which on it takes less time to compute all than to choose some."""


@dataclass(frozen=True)
class Batch:
    """A padded batch, rows client after client.

    Attributes:
        inputs: the model's inputs.
        clients: for each row that is an example, its client's number, [n].
        real: numbers of these rows (others only fill clients up to the same count), [n]; None where all are.
        told: by position of the logits its label or IGNORE, [N, T] on the CPU; of a row task [N, 1].
        dense: nearly all positions have a label.
        behind: positions that the logits have behind those of `told`.
        device: where the inputs are.
    """

    inputs: dict[str, torch.Tensor]
    clients: torch.Tensor
    real: torch.Tensor | None
    told: torch.Tensor
    dense: bool
    behind: int
    device: torch.device

    @property
    def where(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Row and position of every label, [M] each; positions index the logits."""
        return self._chosen[:2]

    @property
    def labels(self) -> torch.Tensor:
        """The labels, [M]."""
        return self._chosen[2]

    def every(self) -> torch.Tensor:
        """By position of the logits its label or IGNORE, [N, T + behind]."""
        held = functional.pad(self.told, (0, self.behind), value=IGNORE) if self.behind else self.told
        return moved(held, self.device)

    def of_examples(self, rows: torch.Tensor) -> torch.Tensor:
        """What belongs to examples of something that belongs to rows."""
        return rows if self.real is None else rows[self.real]

    def numbers(self) -> list[int]:
        """Numbers of the rows that are examples."""
        return list(range(len(self.clients))) if self.real is None else self.real.tolist()

    @cached_property
    def _chosen(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        rows, positions = torch.nonzero(self.told != IGNORE, as_tuple=True)
        labels = self.told[rows, positions]
        return moved(rows, self.device), moved(positions, self.device), moved(labels, self.device)


@dataclass(frozen=True)
class Collator:
    """How batches are made of a task's examples.

    Attributes:
        padding: the token that fills a row up.
        goes_on: a label stands for the token behind its position: the logits at p are held to the label at p + 1.
        per_token: labels belong to tokens; else a row has one.
        begin: the token in front of a decoder's inputs; None: there is no decoder.
    """

    padding: int
    goes_on: bool
    per_token: bool
    begin: int | None = None

    def __call__(self, groups: Groups, device: torch.device) -> Batch:
        """Pad examples to the longest; clients with fewer rows are filled up with rows that do not count."""
        width = max(map(len, groups))
        counts = [len(group) for group in groups]
        flat = [example for group in groups for example in group]
        if min(counts) == width:
            rows: list[Example | None] = [*flat]
            real, clients = None, _in_order(len(groups), width, device)
        else:
            rows = [group[place] if place < len(group) else None for group in groups for place in range(width)]
            real = moved(torch.tensor([number for number, example in enumerate(rows) if example is not None]), device)
            clients = moved(torch.arange(len(groups)).repeat_interleave(torch.tensor(counts)), device)
        inputs = {name: moved(held, device) for name, held in self._inputs(rows, flat[0]).items()}
        labels = self._labels(rows)
        told = labels[:, 1:] if self.goes_on else labels
        dense = self.per_token and sum(example.targets for example in flat) >= NEARLY * told.numel()
        return Batch(inputs, clients, real, told, dense, int(self.goes_on), device)

    def _inputs(self, rows: list[Example | None], some: Example) -> dict[str, torch.Tensor]:
        filler = some.inputs["input_ids"][:1]
        texts = [filler if example is None else example.inputs["input_ids"] for example in rows]
        ids = _padded(texts, self.padding)
        lengths = [len(text) for text in texts]
        mask = torch.ones_like(ids)
        if min(lengths) < ids.shape[1]:
            mask = (torch.arange(ids.shape[1]) < torch.tensor(lengths).unsqueeze(1)).long()
        inputs = {"input_ids": ids, "attention_mask": mask}
        for name in BESIDE:
            if name in some.inputs:
                held = [filler.new_zeros(1) if example is None else example.inputs[name] for example in rows]
                inputs[name] = _padded(held, 0)
        if self.begin is not None:
            inputs["decoder_input_ids"] = self._shifted(rows, self.begin)
        return inputs

    def _labels(self, rows: list[Example | None]) -> torch.Tensor:
        none = torch.tensor([IGNORE])
        return _padded([none if example is None else example.labels for example in rows], IGNORE)

    def _shifted(self, rows: list[Example | None], begin: int) -> torch.Tensor:
        """Decoder inputs: the labels moved right by one, padded."""
        longest = max(len(example.labels) for example in rows if example is not None)
        ids = torch.full((len(rows), longest), self.padding)
        ids[:, 0] = begin
        for number, example in enumerate(rows):
            if example is not None:
                ids[number, 1 : len(example.labels)] = example.labels[:-1]
        return ids


@lru_cache(maxsize=16)
def _in_order(clients: int, rows: int, device: torch.device) -> torch.Tensor:
    """The client of each row where all have equally many; nobody writes to it."""
    with torch.inference_mode(False):  # it is kept: training may be the next to use it
        return torch.arange(clients, device=device).repeat_interleave(rows)


def _padded(rows: list[torch.Tensor], value: int) -> torch.Tensor:
    """Rows one below the other, filled up with `value`."""
    if all(len(row) == len(rows[0]) for row in rows):
        return torch.stack(rows)
    return pad_sequence(rows, batch_first=True, padding_value=value)
