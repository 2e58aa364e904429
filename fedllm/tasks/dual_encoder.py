"""Dual encoder - images told apart by the names of their classes, with CLIP or any model of its form.

logits = s <z, t_c>: z is the normalised feature of the image, t_c that of the text of class c, s the model's own scale
(Radford et al., 2103.00020). Without an adapter the text is a template with the name in it; with a context it is
learnt vectors and the name. Per pass the text tower reads every class once per client, and not once per image. Where
nothing trainable touches the image tower, the features of an image are computed once and kept in its example.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from fedllm.core.errors import ConfigError, DataError, ModelError
from fedllm.core.tensors import Tensors
from fedllm.core.work import Example, Groups, Places
from fedllm.models.adapters.attach import Adapted
from fedllm.models.adapters.context import Prompts, check_end, check_room, framed, text_embedding, tokens_of
from fedllm.models.adapters.settings import AdapterSettings
from fedllm.models.images import ImageReader
from fedllm.models.load import Loaded
from fedllm.tasks.settings import TaskSettings
from fedllm.tasks.task import SequenceClassification, seen

TEMPLATE = "a photo of a {}."
"""The text of a class where the task names none."""
ROWS = 64
"""Images per pass where features are computed once."""
NEVER = -1e4
"""The logit of a class that a row does not allow; CLIP's own lie within -100 and 100."""
_TEXT_SIDE = ("text_model.", "text_projection.", "context", "logit_scale")


class DualEncoder(SequenceClassification):
    """An image and the name of its class; a row may have `classes`, the only names to choose from for it.

    Args:
        settings: the recipe's section `task`.
        tokenizer: a fast tokenizer.
        labels: the class names in their order.
        reader: makes pixels of what a row holds.
        tokens: what an image counts as, patches and class token.
    """

    kind = "dual-encoder"

    def __init__(
        self, settings: TaskSettings, tokenizer: Any, labels: Sequence[str], reader: ImageReader, tokens: int
    ) -> None:
        super().__init__(settings, tokenizer, labels)
        self.reader, self.tokens = reader, tokens

    def example(self, row: Mapping[str, Any]) -> Example | None:
        """Pixels [3, H, W] and a class number."""
        if row["image"] is None or row["label"] is None:
            self._drop("the image or the label is empty")
            return None
        label, inputs = self._index(row["label"]), {"pixel_values": self.reader(row["image"])}
        if row.get("classes") is not None:
            inputs["classes"] = self._allowed(row["classes"], label)
        return Example(inputs, torch.tensor([label]), self.tokens, 1)

    def _allowed(self, names: Sequence[Any], label: int) -> torch.Tensor:
        """Which classes a row may be given, [C]."""
        allowed = torch.zeros(len(self.labels or ()), dtype=torch.bool)
        allowed[[self._index(name) for name in names]] = True
        if not allowed[label]:
            raise DataError(
                f"A row has the label '{(self.labels or [])[label]}', which is not among its own classes.",
                f"Its classes: {', '.join(map(str, names))}.",
            )
        return allowed


class DualEncoderLearner:
    """Implements :class:`fedllm.core.work.Learner` for CLIP and models of its form.

    Args:
        loaded: the dual encoder.
        task: what is learned; `task.template` is the text of a class without a context.
        adapter: what is trained: context, or what acts inside the towers (lora, ia3, bottleneck, bitfit, full).
        labels: the class names in their order.
        seed: the first values are derived from it.

    Attributes:
        notes: things a user should know about how this model is run.

    Raises:
        ModelError: the model is no dual encoder of CLIP's form.
        ConfigError: no classes, one of them twice, or a template without its place for the name.
        DataError: a class name does not fit the text tower.
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
        text_embedding(loaded)
        check_end(loaded)
        names = _names(labels)
        self.loaded, self.tokenizer, self.notes = loaded, loaded.tokenizer, list(loaded.notes)
        vision, reader = loaded.model.config.vision_config, loaded.images
        if reader is None:
            raise ModelError(f"{loaded.name} was loaded without its image reader.", action="Load it with load_model.")
        tokens = (reader.height // vision.patch_size) * (reader.width // vision.patch_size) + 1
        self.task = DualEncoder(task, loaded.tokenizer, names, reader, tokens)
        self.adapted = Adapted(loaded, adapter, seed, names)
        self.score_names = self.task.score_names
        self.width_limit = self.adapted.width_limit
        self.fixed_images = all(name.startswith(_TEXT_SIDE) for name in self.adapted.initial())
        self._plain = self._written(task.template).to(self.device)
        context = self.adapted.context
        self._soft = None if context is None else context.prompts(names).to(self.device)
        if context is not None and adapter.words is not None and context.length != adapter.tokens:
            self.notes.append(
                f"The context has {context.length} vectors, one for each token of adapter.words; adapter.tokens="
                f"{adapter.tokens} is not used."
            )
        self._held: torch.Tensor | None = None

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.adapted.device

    def initial(self) -> Tensors:
        """First values of the trainable tensors."""
        return self.adapted.initial()

    def prepare(self, rows: Sequence[Mapping[str, Any]]) -> list[Example]:
        """Examples with pixels, or with image features where nothing trainable changes them."""
        found: list[Example] = []
        for start in range(0, len(rows), ROWS):
            examples = self.task.prepare(rows[start : start + ROWS])
            found += self._featured(examples) if self.fixed_images and examples else examples
        return found

    def _featured(self, examples: list[Example]) -> list[Example]:
        with torch.no_grad(), self.adapted.using(None):
            features = self._image_tower(torch.stack([e.inputs["pixel_values"] for e in examples])).cpu()
        kept = [{name: t for name, t in e.inputs.items() if name != "pixel_values"} for e in examples]
        return [
            replace(example, inputs={"features": z.clone(), **rest})
            for example, z, rest in zip(examples, features, kept, strict=True)
        ]

    @contextmanager
    def using(
        self, params: Tensors | None, seeds: Sequence[int] | None = None, places: Places = None
    ) -> Iterator[None]:
        """Run the model with stacked `params`; None is the base model with the template."""
        if self.adapted.context is not None:
            self.adapted.context.check(params)
        before, self._held = self._held, None
        try:
            with self.adapted.using(params, seeds, places):
                yield
        finally:
            self._held = before

    def losses(self, groups: Groups) -> torch.Tensor:
        """The sum of the losses of each client, [K], differentiable."""
        logits, clients, labels = self._logits(groups)
        by_row = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
        return by_row.new_zeros(len(groups)).index_add_(0, clients, by_row)

    def counts_by_row(self, groups: Groups) -> list[dict[str, float]]:
        """Additive counts of every example, client after client."""
        if not any(len(group) for group in groups):
            return []
        logits, _, labels = self._logits(groups)
        owner = torch.arange(len(labels), device=labels.device)
        return self.task.count_rows(seen(logits, labels), labels, owner, len(labels))

    def outputs(self, groups: Groups) -> list[torch.Tensor]:
        """Differentiable logits [C] of every example, client after client."""
        return list(self._logits(groups)[0]) if any(len(group) for group in groups) else []

    def hidden(self, groups: Groups) -> list[torch.Tensor]:
        """One layer: the normalised image features of all examples, [rows, 1, d]."""
        features, at = self._images(groups)
        return [features[at].unsqueeze(1)]

    def values(self, counts: Mapping[str, float]) -> dict[str, float | None]:
        """Metric values of summed counts."""
        return self.task.values(counts)

    def generate(
        self, prompts: Sequence[Sequence[str]], max_tokens: int, temperature: float, seeds: Sequence[int]
    ) -> list[list[str]]:
        """A dual encoder writes no text."""
        raise ModelError(f"{self.loaded.name} is a dual encoder and cannot write text.")

    def embed(self, texts: Sequence[Sequence[str]]) -> list[torch.Tensor]:
        """Normalised text features [texts, d] of each client; texts are read as they are, without any context."""
        width = max((len(group) for group in texts), default=0)
        if width == 0:
            return [torch.zeros(0, self._scale_and_size()[1]) for _ in texts]
        filled = [[*group, *[""] * (width - len(group))] for group in texts]
        rows = [self._cut(text) for group in filled for text in group]
        found = self._text_tower(*(each.to(self.device) for each in framed(self.loaded, rows)))
        return [part[: len(group)] for part, group in zip(found.split(width), texts, strict=True)]

    def texts(self) -> torch.Tensor:
        """Inside :meth:`using`: the normalised text features of the classes, [K, C, d]; [1, C, d] of the base model."""
        if self._held is not None and not torch.is_grad_enabled():
            return self._held
        binding, context = self.adapted.binding, self.adapted.context
        soft = None if binding.params is None else self._soft
        prompts = self._plain if soft is None else soft
        ids, mask = (each.repeat(binding.width, 1) for each in (prompts.ids, prompts.mask))
        if context is None:
            found = self._text_tower(ids, mask)
        else:
            with context.reading(prompts):
                found = self._text_tower(ids, mask)
        found = found.view(binding.width, len(prompts.ids), -1)
        self._held = None if torch.is_grad_enabled() else found
        return found

    # -- towers -------------------------------------------------------------------------------------------------------

    def _logits(self, groups: Groups) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Logits [n, C] of all examples in float32, their clients [n] and their labels [n]."""
        features, at = self._images(groups)
        scores = torch.matmul(features, self.texts().transpose(1, 2))  # [K, rows, d] [K or 1, d, C]
        logits = (scores * self._scale_and_size()[0])[at]
        flat = [example for group in groups for example in group]
        if any("classes" in example.inputs for example in flat):
            every = torch.ones(logits.shape[1], dtype=torch.bool)
            allowed = torch.stack([example.inputs.get("classes", every) for example in flat]).to(self.device)
            logits = logits.masked_fill(~allowed, NEVER)
        return logits, at[0], torch.cat([example.labels for example in flat]).to(self.device)

    def _images(self, groups: Groups) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
        """Image features [K, rows, d] and where the examples are in them; clients with fewer rows are filled up."""
        width = max(len(group) for group in groups)
        some = next(example for group in groups for example in group)
        name = "features" if self.fixed_images else "pixel_values"
        filled = [[*group, *[some] * (width - len(group))] for group in groups]
        held = torch.stack([example.inputs[name] for group in filled for example in group]).to(self.device)
        features = held if self.fixed_images else self._image_tower(held)
        places = [(k, place) for k, group in enumerate(groups) for place in range(len(group))]
        clients, rows = torch.tensor(places, device=self.device).unbind(1)
        return features.view(len(groups), width, -1), (clients, rows)

    def _image_tower(self, pixels: torch.Tensor) -> torch.Tensor:
        """[n, 3, H, W] -> normalised features [n, d], float32."""
        model: Any = self.loaded.model
        return _unit(model.get_image_features(pixel_values=pixels.to(self.device, model.dtype)))

    def _text_tower(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """[n, T] -> normalised features [n, d], float32."""
        model: Any = self.loaded.model
        return _unit(model.get_text_features(input_ids=ids, attention_mask=mask))

    def _scale_and_size(self) -> tuple[torch.Tensor, int]:
        model: Any = self.loaded.model
        return model.logit_scale.float().exp(), int(model.config.projection_dim)

    # -- texts --------------------------------------------------------------------------------------------------------

    def _written(self, template: str) -> Prompts:
        """The classes in the template."""
        template = TEMPLATE if template == "auto" else template
        if template.count("{}") != 1:
            raise ConfigError(
                f"task.template='{template}' has no place for the name of a class.",
                "A dual encoder needs {} once.",
                TEMPLATE,
            )
        rows = []
        for name in self.task.labels or ():
            rows.append(tokens_of(self.loaded, template.replace("{}", name)))
            check_room(self.loaded, name, len(rows[-1]) + 2, 0)
            if rows[-1] in rows[:-1]:
                other = (self.task.labels or [])[rows.index(rows[-1])]
                raise DataError(
                    f"The tokenizer reads the class names '{other}' and '{name}' alike.", action="Rename one of them."
                )
        return Prompts(*framed(self.loaded, rows), torch.zeros(len(rows), 0, dtype=torch.long))

    def _cut(self, text: str) -> list[int]:
        """The tokens of a text, no more than the text tower reads."""
        return tokens_of(self.loaded, text)[: self.loaded.model.config.text_config.max_position_embeddings - 2]


def _unit(output: Any) -> torch.Tensor:
    """The projected feature of a tower's output (earlier versions give the tensor itself), of length 1, in float32."""
    found = getattr(output, "pooler_output", output)
    return torch.nn.functional.normalize(found.float(), dim=-1)


def _names(labels: Sequence[str] | None) -> list[str]:
    names = [str(label) for label in labels or ()]
    twice = next((name for name in names if names.count(name) > 1), None)
    if not names or twice is not None:
        raise ConfigError(
            f"The class '{twice}' is listed twice." if names else "The task dual-encoder has no classes.",
            "Names of classes are needed, each once.",
            action="Give them by task.labels, or in the column 'label'.",
        )
    return names
