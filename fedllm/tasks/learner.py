"""Transformer learner - a base model, its adapter and its task behind the engine's one interface."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch

from fedllm.core.errors import ConfigError, ModelError
from fedllm.core.split import Halves
from fedllm.core.tensors import Tensors
from fedllm.core.work import Example, Exposure, Groups, Places
from fedllm.evaluate import Metric
from fedllm.evaluate.text import LastNumber, RougeL, TokenF1
from fedllm.models.adapters.attach import Adapted
from fedllm.models.adapters.settings import AdapterSettings
from fedllm.models.load import Loaded
from fedllm.models.structure import is_encoder_decoder
from fedllm.tasks.batch import Batch, Collator
from fedllm.tasks.decode import context, continue_prompts
from fedllm.tasks.head import Head, at
from fedllm.tasks.masked import MaskedLM
from fedllm.tasks.settings import TaskSettings
from fedllm.tasks.sight import check_apart, unseen
from fedllm.tasks.task import IGNORE, TASKS, CausalLM, Seen, Task, seen

KINDS: dict[str, type[Task]] = {**TASKS, MaskedLM.kind: MaskedLM}
"""Every task of a transformer by its kind."""


class TransformerLearner:
    """Implements :class:`fedllm.core.work.Learner` for a transformers model.

    Args:
        loaded: the base model and tokenizer.
        task: what is learned.
        adapter: what is trained.
        labels: class or tag names.
        seed: the first values are derived from it.

    Attributes:
        notes: things a user should know about how this model is run.
    """

    higher_is_better = True

    def __init__(
        self,
        loaded: Loaded,
        task: TaskSettings,
        adapter: AdapterSettings,
        labels: Sequence[str] | None = None,
        seed: int = 0,
    ) -> None:
        if is_encoder_decoder(loaded.model) and task.kind != "seq2seq":
            raise ModelError(
                f"{loaded.name} has an encoder and a decoder, which task.kind={task.kind} does not fit.",
                "Allowed: seq2seq.",
                "seq2seq",
                "Set task.kind=seq2seq, and let the answer be the label's text.",
            )
        self.loaded, self.tokenizer = loaded, loaded.tokenizer
        self.adapted = Adapted(loaded, adapter, seed)
        self.notes = list(loaded.notes)
        self._both_ways = is_encoder_decoder(loaded.model)
        self.texts = _text_metrics(task)
        self.task = KINDS[task.kind](self._fitting(task), loaded.tokenizer, labels)
        self.score_names = (*self.task.score_names, *(metric.name for metric in self.texts))
        self.width_limit = self.adapted.width_limit
        self._halves: dict[tuple[int, int | None], Halves] = {}
        self.head = Head(self.adapted, self._both_ways, len(self.tokenizer) if self.task.per_token else None)
        self.notes += self.head.notes
        words, filler = len(self.tokenizer), self.tokenizer.pad_token_id
        self._collator = Collator(filler, task.kind == "causal-lm", self.task.per_token, self._begin())
        self._unmasked = task.kind == "causal-lm" and unseen(self.adapted, words, filler)
        if task.pack is True:
            check_apart(self.adapted, words)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.adapted.device

    def initial(self) -> Tensors:
        """First values of the trainable tensors."""
        return self.adapted.initial()

    def weights(self) -> Tensors | None:
        """The model's own weights where it is they that are trained; see :class:`fedllm.core.work.Lending`."""
        return self.adapted.weights()

    def prepare(self, rows: Sequence[Mapping[str, Any]]) -> list[Example]:
        """Tokenised examples; see :meth:`fedllm.tasks.task.Task.prepare`."""
        return self.task.prepare(rows)

    def using(
        self, params: Tensors | None, seeds: Sequence[int] | None = None, places: Places = None
    ) -> AbstractContextManager[None]:
        """Run the model with stacked `params`; None is the base model."""
        return self.adapted.using(params, seeds, places)

    def losses(self, groups: Groups) -> torch.Tensor:
        """The sum of the losses of each client, [K], differentiable."""
        by_row, clients = self.losses_by_row(groups)
        if all(len(group) == 1 for group in groups):
            return by_row
        return by_row.new_zeros(len(groups)).index_add_(0, clients, by_row)

    def losses_by_row(self, groups: Groups) -> tuple[torch.Tensor, torch.Tensor]:
        """The loss of every example, client after client, and the number of its client; both [examples]."""
        batch = self.collate(groups)
        if batch.dense and not self._offset and not self.head.splits(batch.told.numel()):
            by_row = self.task.loss_of(self.adapted.call(self._read(batch)).logits, batch.every())
            return batch.of_examples(by_row), batch.clients
        rows, owner, labels = batch.inputs["input_ids"].shape[0], batch.where[0], batch.labels
        if self.head.splits(len(owner)):
            hidden = self.head.hidden(self._read(batch), owner, self._positions(batch))
            by_row = self.head.sums(
                hidden, owner, lambda logits, at: self.task.loss_rows(logits, labels[at], owner[at], rows)
            )
        else:
            by_row = self.task.loss_rows(self._logits(batch)[0], labels, owner, rows)
        return batch.of_examples(by_row), batch.clients

    def outputs(self, groups: Groups) -> list[torch.Tensor]:
        """Differentiable logits of every example, client after client: [C], or [labels, V] of a language model."""
        batch = self.collate(groups)
        logits, owner = self._logits(batch)
        rows = batch.inputs["input_ids"].shape[0]
        if not self.task.per_token:
            return list(batch.of_examples(logits))
        counts = torch.bincount(owner, minlength=rows).tolist()
        pieces = torch.split(logits, counts)
        return [pieces[row] for row in batch.numbers()]

    def hidden(self, groups: Groups) -> list[torch.Tensor]:
        """Hidden states of all examples after each layer, embeddings first: [rows, T, H], 0 at padding.

        Positions of a soft prompt are left out.
        """
        batch = self.collate(groups)
        mask = batch.inputs["attention_mask"]
        with self.head.everything():
            states = self.adapted.call(self._read(batch), output_hidden_states=True)
        found = states.encoder_hidden_states if self._both_ways else states.hidden_states
        real = mask.unsqueeze(-1)
        return [batch.of_examples(h[:, -mask.shape[1] :] * real.to(h.dtype)) for h in found]

    def counts_by_row(self, groups: Groups) -> list[dict[str, float]]:
        """Additive counts of every example, client after client."""
        if not any(len(group) for group in groups):
            return []
        batch = self.collate(groups)
        rows = self._counted(batch)
        found = [rows[number] for number in batch.numbers()]
        for counts, written in zip(found, self._written(groups) if self.texts else (), strict=bool(self.texts)):
            counts.update(written)
        return found

    def _counted(self, batch: Batch) -> list[dict[str, float]]:
        """Counts of every row of a batch."""
        rows, owner = batch.inputs["input_ids"].shape[0], batch.where[0]
        if self.head.splits(len(owner)):
            hidden = self.head.hidden(self._read(batch), owner, self._positions(batch))
            parts = [seen(self.head.logits(hidden[at]), batch.labels[at]) for at in self.head.cut(len(owner))]
            found = Seen(*(torch.cat(each) for each in zip(*parts, strict=True)))
        else:
            found = seen(self._logits(batch)[0], batch.labels)
        return self.task.count_rows(found, batch.labels, owner, rows)

    def _written(self, groups: Groups) -> list[dict[str, float]]:
        """Counts of the text metrics of every example: its prompt is continued and held to its answer."""
        pairs = [[self._prompt_and_answer(example) for example in group] for group in groups]
        prompts = [[prompt for prompt, _ in group] for group in pairs]
        texts = self.generate(prompts, self.task.settings.generate, 0.0, [0] * len(groups))
        return [
            {name: value for metric in self.texts for name, value in metric.count([text.strip()], [answer]).items()}
            for group, written in zip(pairs, texts, strict=True)
            for (_, answer), text in zip(group, written, strict=True)
        ]

    def _prompt_and_answer(self, example: Example) -> tuple[str, str]:
        """The text before the last answer, and that answer."""
        ids, labels = example.inputs["input_ids"], example.labels
        if self._both_ways:
            prompt = self.tokenizer.decode(ids, skip_special_tokens=True)
            return prompt, self.tokenizer.decode(labels, skip_special_tokens=True).strip()
        end = int(torch.nonzero(labels != IGNORE)[-1]) + 1  # a template may write unlabelled tokens behind the answer
        before = torch.nonzero(labels[:end] == IGNORE).flatten()
        start = int(before[-1]) + 1 if len(before) else 1
        answer = self.tokenizer.decode(labels[start:end], skip_special_tokens=True).strip()
        return self.tokenizer.decode(ids[:start]), answer

    def values(self, counts: Mapping[str, float]) -> dict[str, float | None]:
        """Metric values of summed counts."""
        return {**self.task.values(counts), **{metric.name: metric.value(counts) for metric in self.texts}}

    def generate(
        self, prompts: Sequence[Sequence[str]], max_tokens: int, temperature: float, seeds: Sequence[int]
    ) -> list[list[str]]:
        """Continue prompts, client after client; greedy where temperature is 0."""
        template = self.task.template if isinstance(self.task, CausalLM) else None
        return continue_prompts(self.adapted, prompts, max_tokens, temperature, seeds, template)

    def split(self, first: int, last: int | None) -> Halves:
        """Cut the model for split learning: layers first..last-1 are the server's; see :mod:`fedllm.core.split`."""
        from fedllm.tasks.split_learner import split_learner

        if (first, last) not in self._halves:
            self._halves[first, last] = split_learner(self, first, last)
        return self._halves[first, last]

    def exposure(self, groups: Groups) -> Exposure:
        """What the classifier's last layer is given, and how much that depends on the texts."""
        from fedllm.tasks.exposed import exposure

        return exposure(self, groups)

    def embed(self, texts: Sequence[Sequence[str]]) -> list[torch.Tensor]:
        """The mean of the last hidden states over real tokens, one row per text."""
        flat = [text for group in texts for text in group]
        encoded = self.tokenizer(
            flat,
            padding=True,
            padding_side="right",
            truncation=True,
            max_length=self.task.settings.max_length,
            return_tensors="pt",
        ).to(self.device)
        inputs = {k: v for k, v in encoded.items() if self.adapted.accepts(k)}
        if self._both_ways:
            hidden = self.loaded.model.get_encoder()(**inputs).last_hidden_state
        else:
            with self.head.everything():
                hidden = self.adapted.call(inputs, output_hidden_states=True).hidden_states[-1]
        hidden = hidden[:, -encoded["attention_mask"].shape[1] :]
        mask = encoded["attention_mask"].unsqueeze(-1).to(hidden.dtype)
        vectors = (hidden * mask).sum(1) / mask.sum(1).clamp(min=1)
        return list(torch.split(vectors, [len(group) for group in texts]))

    def _fitting(self, task: TaskSettings) -> TaskSettings:
        """`task` with texts no longer than the model reads, and a note where that changes it."""
        limit = context(self.adapted)
        if limit is not None and task.generate:
            self._check_room(task, limit)
        if limit is None or task.max_length <= limit:
            return task
        self.notes.append(
            f"Texts are cut at {limit} tokens, the most that {self.loaded.name} reads with this adapter, and not at "
            f"task.max_length={task.max_length}."
        )
        return task.model_copy(update={"max_length": limit})

    def _check_room(self, task: TaskSettings, limit: int) -> None:
        """Raise :class:`ConfigError` where the longest prompt and what is written do not fit: it would end the run."""
        prompt = 0 if self._both_ways else min(task.max_length, limit)  # an encoder's prompt takes no place of the text
        if prompt + task.generate <= limit:
            return
        room = limit - task.generate
        raise ConfigError(
            f"task.max_length={task.max_length} and task.generate={task.generate} were given.",
            f"{self.loaded.name} reads {limit} tokens at most with this adapter.",
            action=f"Set task.max_length={room} or less." if room >= 8 else "Lower task.generate.",
        )

    # -- batches ------------------------------------------------------------------------------------------------------

    def collate(self, groups: Groups) -> Batch:
        """Pad examples to the longest; clients with fewer rows are filled up with rows that do not count."""
        return self._collator(groups, self.device)

    def _begin(self) -> int | None:
        """The token in front of a decoder's inputs; None where there is no decoder."""
        if not self._both_ways:
            return None
        start = self.loaded.model.config.decoder_start_token_id
        return self.tokenizer.pad_token_id if start is None else start

    # -- logits -------------------------------------------------------------------------------------------------------

    def _logits(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits of every label [M, C] and the row each belongs to [M]."""
        rows = batch.where[0]
        if not self.task.per_token:
            return self.adapted.call(self._read(batch)).logits[rows], rows
        positions = self._positions(batch)
        if self.head.selective:
            with self.head.only(rows, positions), self.adapted.at(rows, batch.inputs["input_ids"].shape[0]):
                return self.adapted.call(self._read(batch)).logits, rows
        return at(self.adapted.call(self._read(batch)).logits, rows, positions), rows

    def _read(self, batch: Batch) -> dict[str, torch.Tensor]:
        """The model's inputs; without a mask for padding where no text sees it, or positions tell texts apart."""
        if "position_ids" in batch.inputs:
            return {name: held for name, held in batch.inputs.items() if name != "attention_mask"}
        whole = {"attention_mask": torch.ones_like(batch.inputs["attention_mask"])} if self._unmasked else {}
        return {**batch.inputs, **whole}

    def _positions(self, batch: Batch) -> torch.Tensor:
        """Where the model's hidden states of the labels are, behind what an adapter puts in front."""
        return batch.where[1] + self._offset

    @property
    def _offset(self) -> int:
        """Positions that an adapter puts in front."""
        return 0 if self.adapted.binding.params is None else self.adapted.offset


def _text_metrics(task: TaskSettings) -> list[Metric]:
    """The metrics of written text, where the task asks for text."""
    if not task.generate:
        return []
    if task.kind not in ("causal-lm", "seq2seq"):
        raise ConfigError(
            f"task.generate={task.generate} has no meaning for task.kind={task.kind}.",
            "Text is written by causal-lm and seq2seq.",
            action="Set task.generate=0.",
        )
    if task.kind == "causal-lm" and task.loss_on == "all":
        raise ConfigError(
            f"task.generate={task.generate} and task.loss_on=all were given.",
            "Text is held to the answer, and loss_on=all does not tell it from its prompt. Allowed: response.",
            "response",
            "Set task.loss_on=response, or task.generate=0.",
        )
    if task.pack:
        raise ConfigError(
            f"task.generate={task.generate} and task.pack={str(task.pack).lower()} were given.",
            "Text is written for one prompt and held to its answer; a block has several.",
            action="Set task.pack=false, or task.generate=0.",
        )
    kinds: dict[str, type[Metric]] = {kind.name: kind for kind in (RougeL, TokenF1, LastNumber)}
    return [kinds[name]() for name in task.text_metrics]
