"""Recovered - how much of some texts an attacker has read, token by token.

Tokens are numbers here, so that the measures do not depend on how a tokenizer cuts words. Every found text is held to
the true text that it is nearest to, as ROUGE does with several references; the order of texts carries no meaning.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

Ids = Sequence[int]


def bag_scores(found: Sequence[Ids], truth: Sequence[Ids]) -> dict[str, float]:
    """Precision, recall and F1 of all tokens found against all true ones, counted as often as they occur."""
    ours, theirs = Counter(t for ids in found for t in ids), Counter(t for ids in truth for t in ids)
    shared, mine, true = (ours & theirs).total(), ours.total(), theirs.total()
    return {
        "token_f1": 2 * shared / (mine + true) if mine + true else 0.0,
        "token_precision": shared / mine if mine else 0.0,
        "token_recall": shared / true if true else 0.0,
    }


def rouge_l(found: Sequence[Ids], truth: Sequence[Ids]) -> float:
    """The mean over true texts of the best F1 of the longest common subsequence with a found one (Lin 2004)."""
    if not truth:
        return 0.0
    return sum(max((_f1(ids, true) for ids in found), default=0.0) for true in truth) / len(truth)


def rouge_2(found: Sequence[Ids], truth: Sequence[Ids]) -> float:
    """The same with pairs of neighbouring tokens (ROUGE-2)."""
    pairs = [[list(pairwise(ids)) for ids in texts] for texts in (found, truth)]
    if not pairs[1]:
        return 0.0

    def f1(one: list[tuple[int, int]], other: list[tuple[int, int]]) -> float:
        shared = (Counter(one) & Counter(other)).total()
        return 2 * shared / (len(one) + len(other)) if one and other else 0.0

    return sum(max((f1(ids, true) for ids in pairs[0]), default=0.0) for true in pairs[1]) / len(pairs[1])


def _f1(one: Ids, other: Ids) -> float:
    if not one or not other:
        return 0.0
    row = [0] * (len(other) + 1)
    for token in one:
        before = 0
        for at, wanted in enumerate(other, 1):
            before, row[at] = row[at], before + 1 if token == wanted else max(row[at], row[at - 1])
    return 2 * row[-1] / (len(one) + len(other))
