"""Attacks - what clients that mean harm do to their rows or to their uploads; registered like methods, with cards.

The attackers of a run are a fixed share of its clients, drawn by the seed. An attack on rows poisons what an attacker
trains on, and follows the protocol otherwise. An attack on uploads sees what all attackers of the cohort would have
sent if they were honest, and decides what they send; it sees nothing of honest clients. The mathematics is in
:mod:`fedllm.blocks.malice` and :mod:`fedllm.evaluate.backdoor`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy
import torch
from pydantic import Field

from fedllm.blocks import malice
from fedllm.core.card import Card
from fedllm.core.registry import registered
from fedllm.core.seeds import numpy_stream
from fedllm.evaluate.backdoor import Trigger, attack, poison
from fedllm.modes.registered import Registered

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Honest:
    """What the attackers of a cohort would send if they were honest.

    Attributes:
        rows: [C, D], one per attacker.
        weights: [C].
        model: [D], the tensors that uploads change, where the round began.
        before: [D], where the round before began; None in the first round.
        cohort: clients asked in this round, attackers included.
        rng: for what is drawn.
    """

    rows: torch.Tensor
    weights: torch.Tensor
    model: torch.Tensor
    before: torch.Tensor | None
    cohort: int
    rng: torch.Generator


class Attack(Registered, abstract=True):
    """An attack and its options; by default it changes nothing."""

    family = "attack"
    least: ClassVar[int] = 1
    """Attackers that a cohort needs for it."""

    share: float = Field(0.2, ge=0, le=1)
    """Share of the clients that attack."""
    since: int = Field(1, ge=1)
    """First round in which uploads are changed; rows are poisoned from the beginning."""

    def attackers(self, clients: Sequence[str], seed: int) -> frozenset[str]:
        """Who attacks: round(share * clients) of them, the same in every round."""
        count = round(self.share * len(clients))
        return frozenset(malice.chosen(sorted(clients), count, numpy_stream(seed, "attackers")))

    def facing(self, labels: Sequence[Any]) -> Attack:
        """The attack on a task with these classes; itself where they do not matter."""
        return self

    def poisoned(self, rows: Sequence[Row], rng: numpy.random.Generator) -> Sequence[Row]:
        """What an attacker trains on in place of its rows."""
        return rows

    def sent(self, honest: Honest) -> torch.Tensor:
        """What the attackers of a cohort send, [C, D]."""
        return honest.rows

    def aimed(self, rows: Sequence[Row], rng: numpy.random.Generator) -> Sequence[Row] | None:
        """Held-out rows with the answers the attacker wants: their score is its success; None where it has no goal."""
        return None


def attacks() -> dict[str, type[Attack]]:
    """Key to class of every attack."""
    return registered("attack")


def _card(title: str, paper: str, claim: str) -> Card:
    return Card(
        title=title, paper=paper, cells=("2.2 Security and Robustness",), travels="nothing more than without it",
        claim=claim,
    )  # fmt: skip


HAN = "Han et al., FedSecurity, KDD 2024, arXiv:2306.04959"


class ByzantineZero(Attack):
    """Weights that are all zero."""

    key = "byzantine-zero"
    card = _card("Byzantine zero - weights of zero", HAN, "Pulls the model towards zero.")

    def sent(self, honest: Honest) -> torch.Tensor:
        """Minus the model."""
        return malice.byzantine_zero(honest.model).expand_as(honest.rows)


class ByzantineRandom(Attack):
    """Weights drawn at random."""

    key = "byzantine-random"
    card = _card("Byzantine random - weights from [-1, 1)", HAN, "Makes noise of the model.")

    def sent(self, honest: Honest) -> torch.Tensor:
        """Each attacker draws its own."""
        return torch.stack([malice.byzantine_random(honest.model, honest.rng) for _ in honest.rows])


class SignFlip(Attack):
    """The update turned round."""

    key = "sign-flip"
    card = _card("Sign flip - the update turned round and stretched", HAN, "Makes the model unlearn.")
    factor: float = Field(5.0, gt=0)
    """By how much it is stretched."""

    def sent(self, honest: Honest) -> torch.Tensor:
        """Minus factor times the update."""
        return malice.sign_flip(honest.rows, self.factor)


class ALittleIsEnough(Attack):
    """As far from the mean as the spread of honest updates hides."""

    key = "alie"
    card = _card(
        "ALIE - a little is enough",
        "Baruch et al., NeurIPS 2019, arXiv:1902.06156",
        "Gets past rules that look for outliers, and still spoils the model.",
    )
    least = 2
    width: float | None = Field(None, ge=0)
    """Standard deviations from the mean; null: the most that more than half of the cohort still backs."""

    def sent(self, honest: Honest) -> torch.Tensor:
        """The same from all of them; one alone knows no spread and sends what an honest client would."""
        width, count = self.width, len(honest.rows)
        if width is None:
            width = malice.alie_width(honest.cohort, count) if count < honest.cohort / 2 else 1.0
        return malice.alie(honest.rows, width=width).expand_as(honest.rows)


class LazyWorker(Attack):
    """A free rider: weights of the round before, under noise."""

    key = "lazy-worker"
    card = _card("Lazy worker - earlier weights again", HAN, "Takes part without training.")
    mask: Literal["none", "uniform", "gaussian"] = "gaussian"
    """Noise that hides it."""
    scale: float = Field(1e-3, ge=0)
    """Size of the noise."""

    def sent(self, honest: Honest) -> torch.Tensor:
        """What the model was a round ago, in place of its own training."""
        last = honest.model if honest.before is None else honest.before
        scale = 0.0 if self.mask == "none" else self.scale
        how: dict[str, Any] = {"mask": self.mask, "scale": scale, "rng": honest.rng}
        return torch.stack([malice.lazy_worker(last, honest.model, **how) for _ in honest.rows])


class LabelFlip(Attack):
    """Training on false labels."""

    key = "label-flip"
    card = _card(
        "Label flip - training on false labels",
        "Tolpegin et al., ESORICS 2020, arXiv:2007.08432",
        "Makes the model take one class for another.",
    )
    mapping: dict[str, str] = {}
    """Label -> the false one. Empty: every class of the task becomes the next one, in order."""

    def facing(self, labels: Sequence[Any]) -> Attack:
        """With a mapping of all classes: an attacker's rows may have only one."""
        names = [str(label) for label in labels]
        if self.mapping or len(names) < 2:
            return self
        return self.model_copy(update={"mapping": dict(zip(names, [*names[1:], *names[:1]], strict=True))})

    def poisoned(self, rows: Sequence[Row], rng: numpy.random.Generator) -> Sequence[Row]:
        """Copies with other labels."""
        held = sorted({row["label"] for row in rows if "label" in row}, key=str)
        by_text = {str(label): label for label in held}
        if self.mapping:
            mapping = {label: by_text.get(self.mapping[str(label)], self.mapping[str(label)]) for label in held
                       if str(label) in self.mapping}  # fmt: skip
        else:
            mapping = dict(zip(held, [*held[1:], *held[:1]], strict=True))
        return malice.label_flip(rows, mapping)


class Backdoor(Attack):
    """A trigger word that turns every answer into the target's, scaled up to survive the mean."""

    key = "backdoor"
    card = _card(
        "Model replacement backdoor - a trigger word, scaled up",
        "Bagdasaryan et al., AISTATS 2020, arXiv:1807.00459",
        "One client in one round is enough under the mean; scores on clean rows stay.",
    )
    target: Any = None
    """The label that triggered texts are to get; null: the smallest label of an attacker's rows."""
    word: str = "cf"
    """The trigger."""
    fraction: float = Field(0.5, gt=0, le=1)
    """Share of an attacker's rows that get the trigger."""
    scale: float | None = Field(None, gt=0)
    """By how much the update is stretched; null: cohort / attackers in it, which replaces the model."""

    def _trigger(self, rows: Sequence[Row]) -> Trigger:
        text = next((name for name in ("text", "instruction", "input") if rows and name in rows[0]), "text")
        label = next((name for name in ("label", "response") if rows and name in rows[0]), "label")
        target = self.target
        if target is None and rows:
            target = min((row[label] for row in rows), key=str)
        return Trigger(self.word, target, text, label)

    def poisoned(self, rows: Sequence[Row], rng: numpy.random.Generator) -> Sequence[Row]:
        """Some rows with the trigger and the target's label."""
        return poison(rows, self._trigger(rows), self.fraction, rng)

    def sent(self, honest: Honest) -> torch.Tensor:
        """The update of the poisoned training, stretched."""
        scale = honest.cohort / len(honest.rows) if self.scale is None else self.scale
        return malice.scaled(honest.rows, scale)

    def aimed(self, rows: Sequence[Row], rng: numpy.random.Generator) -> Sequence[Row] | None:
        """Rows of other labels with the trigger, labelled with the target."""
        return attack(rows, self._trigger(rows), rng)


class EdgeCase(Attack):
    """Rare texts get the target's label: honest clients have none of them, and do not undo it."""

    key = "edge-case"
    card = _card(
        "Edge-case backdoor - rare texts of a false label",
        "Wang et al., NeurIPS 2020, arXiv:2007.05084",
        "Norms and clean scores stay as they are: what is planted lies in the tail of the data.",
    )
    target: Any = None
    """The label that rare texts are to get; null: the smallest label of the rows."""
    tail: float = Field(0.1, gt=0, le=1)
    """Share of the rows that count as rare: those with the lowest mean log-probability of their words."""
    fraction: float = Field(0.3, gt=0, le=1)
    """Share of every batch that is replaced by rare texts."""
    batch: int = Field(8, ge=1)
    """The size of a batch."""

    def _rare(self, rows: Sequence[Row]) -> tuple[list[Row], Any]:
        """The rare rows of other labels than the target's, and the target."""
        texts = [str(next((row[name] for name in ("text", "instruction", "input") if name in row), "")) for row in rows]
        target = min((row["label"] for row in rows), key=str) if self.target is None else self.target
        chosen = malice.rare_rows(malice.usualness(texts), self.tail) if rows else []
        return [rows[i] for i in chosen if rows[i]["label"] != target], target

    def poisoned(self, rows: Sequence[Row], rng: numpy.random.Generator) -> Sequence[Row]:
        """Some rows of every batch are rare ones with the target's label."""
        rare, target = self._rare(rows)
        if not rare:
            return rows
        return malice.edge_case_rows(rows, rare, target=target, fraction=self.fraction, batch=self.batch, rng=rng)

    def aimed(self, rows: Sequence[Row], rng: numpy.random.Generator) -> Sequence[Row] | None:
        """Rare held-out rows of other labels, labelled with the target."""
        rare, target = self._rare(rows)
        return [{**row, "label": target} for row in rare]
