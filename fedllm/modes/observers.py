"""Observers - attackers at the server that read a client's rows off what it uploads; registered like methods.

An observer is given what a server sees of one round: the tensors it has sent and the upload that came back, as a
gradient where one plain step was taken. What else it is assumed to know stands on its card: how many rows and how long
they are, always. It follows the protocol (Decepticons alone sends another state than it should). The mathematics is in
:mod:`fedllm.blocks.inversion`, :mod:`~fedllm.blocks.film`, :mod:`~fedllm.blocks.decepticons` and
:mod:`~fedllm.blocks.attributes`; `fedllm attack` plays them.

What is read is scored and dropped: no recovered text is ever written or printed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol

import numpy
import torch
from pydantic import Field

from fedllm.blocks import attributes, decepticons, film, inversion
from fedllm.core.card import Card
from fedllm.core.errors import ConfigError
from fedllm.core.registry import registered
from fedllm.core.tensors import Tensors
from fedllm.core.work import Example
from fedllm.evaluate.recovered import bag_scores, rouge_2, rouge_l
from fedllm.modes.registered import Registered

Row = Mapping[str, Any]
CELLS = ("2.2 Attacks",)


class Glass(Protocol):
    """The attacker's model: the one that the client was sent; see :class:`fedllm.tasks.glass.Glass`.

    Attributes:
        params: what was sent, by name.
        table: the vectors of all tokens, [V, d]; `table_name` is their name where they are trained.
        tied: whether the same vectors make the logits.
    """

    params: Tensors
    table: torch.Tensor
    table_name: str | None
    tied: bool

    @property
    def family(self) -> str:
        """The model's family."""
        ...

    @property
    def activation(self) -> str:
        """The activation inside a feed-forward network."""
        ...

    @property
    def special(self) -> frozenset[int]:
        """Tokens that are in every text."""
        ...

    @property
    def begin(self) -> list[int]:
        """The tokens that every text begins with."""
        ...

    @property
    def classes(self) -> int:
        """The number of classes; 0 where labels are tokens."""
        ...

    @property
    def longest(self) -> int:
        """The most tokens of a text."""
        ...

    def last_bias(self) -> str:
        """The name of the bias behind the class logits."""
        ...

    def class_chances(self, examples: Sequence[Example]) -> torch.Tensor:
        """The mean probability of each class, [C]."""
        ...

    def examples(self, rows: Sequence[Row]) -> list[Example]:
        """Rows as the client prepares them."""
        ...

    def starts(self, tokens: Sequence[int]) -> list[int]:
        """Those tokens that may begin a sentence."""
        ...

    def vectors(self, examples: Sequence[Example]) -> torch.Tensor:
        """The vectors of the examples' tokens, [rows, T, d]."""
        ...

    def log_probs(self, ids: torch.Tensor) -> torch.Tensor:
        """See :class:`fedllm.blocks.film.Language`."""
        ...

    def gradient_norm(self, ids: torch.Tensor) -> float:
        """See :class:`fedllm.blocks.film.Language`."""
        ...

    def gradient(
        self,
        examples: Sequence[Example],
        vectors: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        shares: torch.Tensor | None = None,
        names: Sequence[str] | None = None,
        create_graph: bool = False,
    ) -> Tensors:
        """The gradient of the mean loss; see :meth:`fedllm.tasks.glass.Glass.gradient`."""
        ...


@dataclass(frozen=True)
class Sight:
    """What a server has seen of one upload.

    Attributes:
        gradient: by name, minus the change divided by the sum of the learning rates. Where several steps were taken, or
            an adaptive optimiser, it is no gradient, and attacks are weaker for it.
        seen: by name, bool, which entries travelled in the open; {} for all.
        examples: the rows behind it, as the client prepared them: an observer may use how many there are, their lengths
            and, where its card says so, their labels.
        rows: the same before anything was planted in them.
        kept: what the server keeps of a state that it changed.
        planted: the sensitive value of every row; to be scored, not read.
    """

    gradient: Tensors
    examples: Sequence[Example]
    rows: Sequence[Row] = ()
    seen: Tensors = field(default_factory=dict)
    kept: Any = None
    planted: torch.Tensor | None = None

    def open(self, found: Tensors) -> Tensors:
        """A gradient with zeros where this one is hidden."""
        return {n: t * self.seen[n].to(t.device) if n in self.seen else t for n, t in found.items()}


class Observer(Registered, abstract=True):
    """An observer and its options."""

    family = "observer"
    kinds: ClassVar[tuple[str, ...]] = ()
    """Kinds of tasks it works on; empty for any."""

    rows: int = Field(1, ge=1)
    """Rows that an observed client trains on."""
    victims: int = Field(3, ge=1)
    """Clients that are observed; the scores are their mean."""
    round: int = Field(1, ge=1)
    """The round that is observed."""

    def planted(self, rows: Sequence[Row], rng: numpy.random.Generator) -> tuple[list[Row], torch.Tensor | None]:
        """A client's rows with what the observer looks for in them, and that; most plant nothing."""
        return list(rows), None

    def sends(self, glass: Glass, rng: torch.Generator) -> tuple[Tensors, Any]:
        """The state that clients are sent, and what the server keeps to read what comes back."""
        return glass.params, None

    def read(self, sight: Sight, glass: Glass, rng: torch.Generator) -> Any:
        """What the observer believes; see :meth:`scores`."""
        raise NotImplementedError(f"{type(self).__name__} must define read.")

    def scores(self, found: Any, truth: Sight, glass: Glass) -> dict[str, float]:
        """How near that is to the truth, 0 to 1 each; the first is what is shown in the grid."""
        return _text_scores(found, truth, glass)

    def without(self, found: Any, truth: Sight, other: Sight, glass: Glass) -> float:
        """What an attacker reaches that has not seen this upload: the same reading held to rows of others."""
        return next(iter(self.scores(found, other, glass).values()))


def observers() -> dict[str, type[Observer]]:
    """Key to class of every observer."""
    return registered("observer")


def _texts(examples: Sequence[Example], glass: Glass) -> list[list[int]]:
    """The tokens of rows that tell something."""
    return [[t for t in e.inputs["input_ids"].tolist() if t not in glass.special] for e in examples]


def _text_scores(found: Sequence[Sequence[int]], truth: Sight, glass: Glass) -> dict[str, float]:
    ours = [[t for t in ids if t not in glass.special and t >= 0] for ids in found]
    theirs = _texts(truth.examples, glass)
    return {**bag_scores(ours, theirs), "rouge_2": rouge_2(ours, theirs), "rouge_l": rouge_l(ours, theirs)}


def _card(title: str, paper: str, knows: str, claim: str) -> Card:
    return Card(title=title, paper=paper, cells=CELLS, travels=f"nothing more; the observer knows {knows}", claim=claim)


# -- gradient matching -------------------------------------------------------------------------------------------------


class _Matching(Observer, abstract=True):
    """Moves vectors in the place of the tokens' until they give the gradient that was seen."""

    kinds = ("sequence-classification",)
    steps: int = Field(200, ge=1)
    """Steps of the search."""

    def _start(self, sight: Sight, glass: Glass, rng: torch.Generator) -> torch.Tensor:
        longest = max(len(example.inputs["input_ids"]) for example in sight.examples)
        shape = len(sight.examples), longest, glass.table.shape[1]
        return torch.randn(shape, generator=rng) * float(glass.table.std())

    def _visible(self, sight: Sight, glass: Glass) -> list[str]:
        """Names that are matched: those the loss reaches through the vectors."""
        return [n for n, t in sight.gradient.items() if n != glass.table_name and bool(t.any())]

    def _tokens(self, vectors: torch.Tensor, sight: Sight, glass: Glass) -> list[list[int]]:
        """The nearest tokens; of those alone whose vectors have a gradient, where that was uploaded."""
        allowed = None
        if glass.table_name in sight.gradient and not glass.tied:
            held = film.bag(sight.gradient[str(glass.table_name)], cut="nonzero", exclude=glass.special)
            allowed = held.tokens or None
        ids = inversion.nearest_tokens(vectors.detach().cpu().double(), glass.table.double(), allowed)
        lengths = [len(example.inputs["input_ids"]) for example in sight.examples]
        return [row[:length].tolist() for row, length in zip(ids, lengths, strict=True)]

    def _like(self, sight: Sight, labels: bool) -> list[Example]:
        """Rows of the right lengths whose tokens say nothing; with their labels where those are known."""
        found = []
        for example in sight.examples:
            blank = {name: torch.zeros_like(tensor) for name, tensor in example.inputs.items()}
            label = example.labels if labels else torch.zeros(1, dtype=torch.long)
            found.append(Example(blank, label, example.tokens, example.targets))
        return found


class DLG(_Matching):
    """Deep leakage from gradients: inputs and labels whose gradient is that of the upload."""

    key = "dlg"
    card = _card(
        "DLG - deep leakage from gradients",
        "Zhu et al., NeurIPS 2019, arXiv:1906.08935; on text as in FedPETuning, arXiv:2212.10025",
        "how many rows there are and how long they are",
        "Recovers single texts from a full gradient; less from adapters, and from larger batches.",
    )
    steps: int = Field(60, ge=1)
    """Directions of L-BFGS; each costs up to 25 gradients."""

    def read(self, sight: Sight, glass: Glass, rng: torch.Generator) -> list[list[int]]:
        """See :func:`fedllm.blocks.inversion.match`."""
        names, like = self._visible(sight, glass), self._like(sight, labels=False)
        if not names:
            return []
        target = {n: sight.gradient[n] for n in names}

        def gradient_of(point: Mapping[str, torch.Tensor]) -> Tensors:
            found = glass.gradient(like, point["x"], point["y"], names=names, create_graph=True)
            return sight.open(found)

        labels = torch.randn(len(like), glass.classes, generator=rng)
        start = {"x": self._start(sight, glass, rng), "y": labels}
        how: dict[str, Any] = {"kind": "l2", "optimizer": "lbfgs", "steps": self.steps, "lr": 1.0}
        return self._tokens(inversion.match(gradient_of, start, target, **how).point["x"], sight, glass)


class InvertGradients(_Matching):
    """Inverting gradients: inputs whose gradient has the direction of the upload, with labels known."""

    key = "invert-gradients"
    card = _card(
        "Inverting gradients - the direction of the gradient, labels known",
        "Geiping et al., NeurIPS 2020, arXiv:2003.14123",
        "how many rows there are, how long they are, and their labels",
        "Directions tell more than sizes once models are trained.",
    )
    lr: float = Field(0.01, gt=0)
    """Size of a step in every coordinate; it falls tenfold three times."""
    prior: float = Field(0.01, ge=0)
    """Weight of the distance of the vectors' norms from those of tokens."""

    def read(self, sight: Sight, glass: Glass, rng: torch.Generator) -> list[list[int]]:
        """See :func:`fedllm.blocks.inversion.match`."""
        names, like = self._visible(sight, glass), self._like(sight, labels=True)
        if not names:
            return []
        target, usual = {n: sight.gradient[n] for n in names}, float(glass.table.norm(dim=1).mean())

        def gradient_of(point: Mapping[str, torch.Tensor]) -> Tensors:
            return sight.open(glass.gradient(like, point["x"], names=names, create_graph=True))

        def norms(point: Mapping[str, torch.Tensor]) -> torch.Tensor:
            return (point["x"].norm(dim=-1) - usual).square().mean()

        how: dict[str, Any] = {"kind": "cosine", "optimizer": "signed-adam", "steps": self.steps, "lr": self.lr}
        if self.prior:
            how |= {"prior": norms, "prior_weight": self.prior}
        found = inversion.match(gradient_of, {"x": self._start(sight, glass, rng)}, target, **how)
        return self._tokens(found.point["x"], sight, glass)


class RevealLabels(Observer):
    """The labels of a batch, from the gradient of the last layer."""

    key = "reveal-labels"
    card = _card(
        "Revealing labels - counts from the bias, the set from the weights",
        "Dang et al., NeurIPS 2021, arXiv:2111.00556; Wainakh et al., arXiv:2111.12491",
        "how many rows there are",
        "The labels of small batches are read exactly, whatever the model.",
    )
    kinds = ("sequence-classification",)
    rows: int = Field(8, ge=1)
    """Rows that an observed client trains on."""
    texts: int = Field(16, ge=1)
    """Texts of random tokens that tell how often the model predicts each class."""

    def read(self, sight: Sight, glass: Glass, rng: torch.Generator) -> list[int]:
        """The labels, one for each row, in no order."""
        bias = glass.last_bias()
        if bias not in sight.gradient or not bool(sight.gradient[bias].any()):
            return []
        length = max(len(example.inputs["input_ids"]) for example in sight.examples)
        like = sight.examples[0].inputs
        made = [
            Example({n: torch.randint(len(glass.table), (length,), generator=rng) if n == "input_ids"
                     else torch.zeros(length, dtype=torch.long) for n in like}, torch.zeros(1).long(), length, 1)
            for _ in range(self.texts)
        ]  # fmt: skip
        chances = glass.class_chances(made)
        counts = inversion.label_counts(sight.gradient[bias], chances, len(sight.examples))
        return [label for label, times in enumerate(counts.tolist()) for _ in range(times)]

    def scores(self, found: list[int], truth: Sight, glass: Glass) -> dict[str, float]:
        """The share of labels that were read, counted as often as they occur, and the F1 of the set of classes."""
        true = Counter(int(example.labels[0]) for example in truth.examples)
        ours = Counter(found)
        both = len(set(ours) & set(true))
        share = (ours & true).total() / max(true.total(), 1)
        return {"labels": share, "classes": 2 * both / max(len(set(ours)) + len(set(true)), 1)}


# -- language models ---------------------------------------------------------------------------------------------------


class FILM(Observer):
    """The bag of words from the embedding's gradient, put in order by the model itself."""

    key = "film"
    card = _card(
        "FILM - a bag of words, put in order by the language model",
        "Gupta et al., NeurIPS 2022, arXiv:2205.08514",
        "how many rows there are and how long they are",
        "Recovers sentences from batches of up to 128; freezing the embeddings stops it.",
    )
    kinds = ("causal-lm",)
    rows: int = Field(1, ge=1)
    """Rows that an observed client trains on."""
    beams: int = Field(16, ge=1)
    """Beams of the search."""
    length: int = Field(40, ge=2)
    """Most tokens of a sentence."""
    alpha: float = Field(10.0, ge=0)
    """What the perplexity weighs beside the norm of the sentence's own gradient."""
    phrases: int = Field(20, ge=0)
    """Rounds in which phrases are moved."""
    swaps: int = Field(20, ge=0)
    """Rounds in which tokens are swapped."""
    cut: Literal["auto", "nonzero", "gap"] = "auto"
    """Which rows of the embedding count: all that are not zero, or those above the largest gap of their norms; auto:
    all that are not zero, and where the head has the same weights, those above the largest gap within reason: at most
    as many as the texts have tokens, and at least a third of that."""

    def read(self, sight: Sight, glass: Glass, rng: torch.Generator) -> list[list[int]]:
        """See :func:`fedllm.blocks.film.recover`."""
        grad = sight.gradient.get(glass.table_name or "")
        if grad is None or not bool(grad.any()):
            return []
        cut: Any = self.cut
        if cut == "auto":
            tokens = sum(len(e.inputs["input_ids"]) for e in sight.examples)
            cut = _within_reason(grad, tokens, glass) if glass.tied else "nonzero"
        bag = film.bag(grad, cut=cut, exclude=glass.special)
        order = numpy.random.default_rng(int(torch.randint(2**31, (1,), generator=rng)))
        how: dict[str, Any] = {"beams": self.beams, "groups": min(4, self.beams), "length": self.length}
        return film.recover(
            glass, bag, sentences=len(sight.examples), starts=glass.starts(bag.tokens), rng=order, prefix=glass.begin,
            alpha=self.alpha, phrases=self.phrases, swaps=self.swaps, **how,
        )  # fmt: skip


def _within_reason(grad: torch.Tensor, tokens: int, glass: Glass) -> int:
    """How many of the largest rows stand out, where `tokens` tokens were fed, some of them more than once."""
    norms = torch.tensor(film.bag(grad, cut=tokens + 1, exclude=glass.special).norms, dtype=torch.float64)
    gaps = norms[:-1].log() - norms[1:].log()
    least = min(max(1, tokens // 3), max(1, len(gaps)))
    return least + int(gaps[least - 1 :].argmax()) if len(gaps) else len(norms)


class Decepticons(Observer):
    """A state that makes one gradient spell out its tokens. The server does not follow the protocol."""

    key = "decepticons"
    card = _card(
        "Decepticons - weights that make a gradient spell out its tokens",
        "Fowl et al., ICLR 2023, arXiv:2201.12675",
        "how many rows there are and how long they are, and sends a state of its own",
        "Reads whole batches of long texts, through secure sums too; clients that train adapters alone stop it.",
    )
    kinds = ("causal-lm", "masked-lm", "sequence-classification")
    rows: int = Field(4, ge=1)
    """Rows that an observed client trains on."""
    tag: int = Field(6, ge=1)
    """Coordinates that tell sentences apart."""

    def sends(self, glass: Glass, rng: torch.Generator) -> tuple[Tensors, Any]:
        """The reshaped state; refused where not all weights travel."""
        shapes = {name: tuple(tensor.shape) for name, tensor in glass.params.items()}
        layout = decepticons.layout_of(shapes, glass.family, glass.activation)
        new, key = decepticons.corrupt(glass.params, layout, sequence=glass.longest, rng=rng, tag=self.tag)
        return new, (layout, key)

    def read(self, sight: Sight, glass: Glass, rng: torch.Generator) -> list[list[int]]:
        """See :func:`fedllm.blocks.decepticons.read`."""
        layout, key = sight.kept
        length = max(len(example.inputs["input_ids"]) for example in sight.examples)
        found = decepticons.read(sight.gradient, key, layout, batch=len(sight.examples), length=length)
        return found.tokens.tolist()


class AttributeReconstruction(Observer):
    """One sensitive word in every row, from the direction of the gradient; the rest of the row is known."""

    key = "attribute-reconstruction"
    card = _card(
        "ARA - one sensitive attribute, by the direction of the gradient",
        "Lyu and Chen, arXiv:2108.06910; Chen et al., IEEE TBD 2022",
        "all of every row but the attribute: its text and its label",
        "Attributes of small clients are read from whole epochs; no better than guessing for large ones.",
    )
    rows: int = Field(8, ge=1)
    """Rows that an observed client trains on."""
    values: tuple[str, ...] = Field(("yes", "no"), min_length=2)
    """Values of the attribute; one is drawn for each row by the seed, independently of everything else."""
    slot: str = "{value} : {text}"
    """How a row's text holds it."""
    steps: int = Field(100, ge=1)
    """Steps of the search."""
    restarts: int = Field(2, ge=1)
    """Searches, of which the nearest counts."""

    def planted(self, rows: Sequence[Row], rng: numpy.random.Generator) -> tuple[list[Row], torch.Tensor | None]:
        """Rows whose text begins with a drawn value."""
        drawn = rng.integers(len(self.values), size=len(rows))
        return [self._with(row, int(value)) for row, value in zip(rows, drawn, strict=True)], torch.from_numpy(drawn)

    def _with(self, row: Row, value: int) -> Row:
        column = next((name for name in ("text", "instruction", "input") if name in row), None)
        if column is None or "{value}" not in self.slot or "{text}" not in self.slot:
            raise ConfigError(
                f"An attribute is to be written as '{self.slot}' into a row with the columns {', '.join(row)}.",
                "The slot holds {value} and {text}; the text is the column text, instruction or input.",
            )
        text = self.slot.replace("{value}", self.values[value]).replace("{text}", str(row[column]))
        return {**row, column: text}

    def read(self, sight: Sight, glass: Glass, rng: torch.Generator) -> torch.Tensor:
        """See :func:`fedllm.blocks.attributes.reconstruct`."""
        variants = [glass.examples([self._with(row, m) for row in sight.rows]) for m in range(len(self.values))]
        cut = {tuple(len(example.inputs["input_ids"]) for example in each) for each in variants}
        if len(cut) > 1:
            raise ConfigError(
                f"The values {', '.join(self.values)} are cut into different numbers of tokens.",
                "Values of an attribute that is read from gradients have equally many.",
                action="Choose other values.",
            )
        names = [n for n, t in sight.gradient.items() if n != glass.table_name and bool(t.any())]
        vectors = torch.stack([glass.vectors(each) for each in variants])  # [m, n, T, d]
        observed = {n: sight.gradient[n] for n in names}

        def gradient_of(p: torch.Tensor) -> Tensors:
            mixed = torch.einsum("nm,mntd->ntd", p, vectors)
            found: Tensors = {}
            for value, rows in enumerate(variants if glass.classes == 0 else variants[:1]):
                share = p[:, value] if glass.classes == 0 else None
                for n, t in glass.gradient(rows, mixed, shares=share, names=names, create_graph=True).items():
                    found[n] = found[n] + t if n in found else t
            return sight.open(found)

        how: dict[str, Any] = {"records": len(sight.examples), "values": len(self.values), "steps": self.steps}
        return attributes.reconstruct(gradient_of, observed, restarts=self.restarts, rng=rng, **how).values

    def scores(self, found: torch.Tensor, truth: Sight, glass: Glass) -> dict[str, float]:
        """The share of rows whose value was read."""
        if truth.planted is None:
            return {"attributes": 0.0}
        return {"attributes": float((found == truth.planted).double().mean())}

    def without(self, found: Any, truth: Sight, other: Sight, glass: Glass) -> float:
        """The best constant guess. Values are drawn independently of everything, so that labels tell no more."""
        if truth.planted is None or not len(truth.planted):
            return 0.0
        return int(truth.planted.bincount().max()) / len(truth.planted)
