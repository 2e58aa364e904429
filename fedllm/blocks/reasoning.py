"""Reasoning - questions answered step by step by a black box: zero-shot, several times, or after demonstrations.

Zero-shot chain of thought (Kojima et al., NeurIPS 2022, arXiv 2205.11916): one call reasons, a second one reads the
answer off. Self-consistency (Wang et al., ICLR 2023, arXiv 2203.11171): J sampled chains, one call each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fedllm.blocks.answers import AnswerParser, Ballot, Vote, vote
from fedllm.blocks.blackbox import BlackBox, Query
from fedllm.blocks.retrieval import numbers, same_words

THINK = "Q: {question}\nA: Let's think step by step."
READ = {
    "number": "\nTherefore, the answer (arabic numerals) is",
    "option": "\nTherefore, the answer (one letter) is",
    "text": "\nTherefore, the answer is",
}
DISCLAIMER = "The examples below were answered by a model and may contain errors."
SHOWN = "Q: {question}\nA: Let's think step by step. {chain}\nTherefore, the answer is {answer}."
REWORD = "Rewrite the question in other words. Keep every number and every name.\nQuestion: {question}\nRewritten:"


@dataclass(frozen=True)
class Thought:
    """One chain of thought and the answer in it (None: no answer was found)."""

    chain: str
    answer: str | None
    logprob: float | None = None


@dataclass(frozen=True)
class Outcome:
    """What a question came to.

    Attributes:
        vote: the vote.
        alone: the answer to the question in its own words (None: none was found, or it was not asked for).
        retrieved: questions of other users that had a part in it.
        paraphrased: rewordings of the model's own that had a part in it.
    """

    vote: Vote
    alone: str | None
    retrieved: int
    paraphrased: int = 0


Bank = Sequence[tuple[str, str]]
"""Questions found for a question, each with a name for whose it is."""


@dataclass(frozen=True)
class Reasoner:
    """Asks a black box to think.

    Attributes:
        box: who is asked.
        parse: finds the answer.
        samples: chains per question; 1 is greedy with a second call for the answer, more are one call each.
        temperature: of the sampled chains.
        max_tokens: most tokens of a chain.
        logprobs: ask for log-probabilities, which decide ties.
    """

    box: BlackBox
    parse: AnswerParser
    samples: int = 1
    temperature: float = 0.7
    max_tokens: int = 256
    logprobs: bool = False

    async def think(self, prompts: Sequence[str]) -> list[list[Thought]]:
        """Chains for every prompt: 2 calls each, or `samples` calls where there is more than one."""
        one = self.samples == 1
        rest: Any = {"max_tokens": self.max_tokens, "stop": ("\nQ:",), "logprobs": self.logprobs and not one}
        rest |= {} if one else {"temperature": self.temperature}
        chains = await self.box.ask([Query(p, sample=j, **rest) for p in prompts for j in range(self.samples)])
        if not one:
            found = [Thought(each.text.strip(), self.parse(each.text), each.logprob) for each in chains]
            return [found[i : i + self.samples] for i in range(0, len(found), self.samples)]
        asked = [f"{p} {c.text.strip()}{READ[self.parse.kind]}" for p, c in zip(prompts, chains, strict=True)]
        length = min(self.max_tokens, 32)
        read = await self.box.ask([Query(p, max_tokens=length, stop=("\n",), logprobs=self.logprobs) for p in asked])
        return [
            [Thought(chain.text.strip(), self.parse(answer.text), answer.logprob)]
            for chain, answer in zip(chains, read, strict=True)
        ]

    async def by_vote(self, questions: Sequence[str], banks: Sequence[Bank], fill: int = 0) -> list[Outcome]:
        """Fed-SP-SC: every wording is answered, the answers are voted on, and every user has one vote.

        Args:
            questions: what was asked.
            banks: other wordings of each.
            fill: reword where there are fewer wordings than this.
        """
        made = await self.reword(questions, [fill - len(bank) for bank in banks])
        ballots = [
            [(question, "asker"), *bank, *((text, f"paraphrase {k}") for k, text in enumerate(more))]
            for question, bank, more in zip(questions, banks, made, strict=True)
        ]
        thoughts = await self.think([THINK.format(question=text) for each in ballots for text, _ in each])
        found = []
        for each, bank, more in zip(ballots, banks, made, strict=True):
            groups, thoughts = thoughts[: len(each)], thoughts[len(each) :]
            result = counted(groups, [voter for _, voter in each])
            found.append(Outcome(result, counted(groups[:1]).answer, len(bank), len(more)))
        return found

    async def by_example(self, questions: Sequence[str], banks: Sequence[Bank]) -> list[Outcome]:
        """Fed-DP-CoT: similar questions, answered by self-consistency, are shown before each question."""
        shown = await self.demonstrate([text for bank in banks for text, _ in bank])
        worked = [[shown[text] for text, _ in bank if text in shown] for bank in banks]
        prompts = [prompt_after(question, each) for question, each in zip(questions, worked, strict=True)]
        thoughts = await self.think(prompts)
        return [Outcome(counted([each]), None, len(w)) for each, w in zip(thoughts, worked, strict=True)]

    async def demonstrate(self, questions: Sequence[str]) -> dict[str, str]:
        """A worked example for every question whose vote found an answer: its first chain that led there."""
        different = list(dict.fromkeys(questions))
        found: dict[str, str] = {}
        thoughts = await self.think([THINK.format(question=question) for question in different])
        for question, chains in zip(different, thoughts, strict=True):
            agreed = counted([chains]).answer
            chain = next((each.chain for each in chains if each.answer == agreed), None)
            if agreed is not None and chain is not None:
                found[question] = SHOWN.format(question=question, chain=chain, answer=agreed)
        return found

    async def reword(self, questions: Sequence[str], counts: Sequence[int]) -> list[list[str]]:
        """At most `counts[i]` other wordings of question i; those that lose or add a number are left out."""
        pairs = [(place, k) for place, count in enumerate(counts) for k in range(count)]
        wanted = [Query(REWORD.format(question=questions[i]), max_tokens=self.max_tokens, temperature=0.7, sample=k,
                        stop=("\n",)) for i, k in pairs]  # fmt: skip
        found: list[list[str]] = [[] for _ in questions]
        for (place, _), each in zip(pairs, await self.box.ask(wanted), strict=True):
            text, question = each.text.strip(), questions[place]
            new = text and not any(same_words(text, other) for other in (question, *found[place]))
            if new and numbers(text) == numbers(question):
                found[place].append(text)
        return found


def prompt_after(question: str, demonstrations: Sequence[str]) -> str:
    """The prompt of a question behind worked examples and the warning that they may be wrong."""
    if not demonstrations:
        return THINK.format(question=question)
    return "\n\n".join([DISCLAIMER, *demonstrations, THINK.format(question=question)])


def counted(groups: Sequence[Sequence[Thought]], voters: Sequence[str] | None = None) -> Vote:
    """The vote over the chains of several questions; with `voters`, each has one vote in all."""
    names = voters or [""] * len(groups)
    ballots = [Ballot(t.answer, t.logprob, name) for name, group in zip(names, groups, strict=True) for t in group]
    return vote(ballots, per_voter=voters is not None)
