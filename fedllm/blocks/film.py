"""FILM - text read from a language model's gradient: its words off the embedding rows, their order off the model.

An observer has the model sent and the exact gradient (or update) returned. Rows of the input embedding's gradient
tell which tokens were fed; a beam search held to those tokens finds likely sentences, and a local search over
permutations makes their score S(x) = alpha PPL(x) + ||grad L(x)|| fall: what a model has begun to memorise has low
perplexity and a small gradient of its own. For audits of an operator's own data: nothing here prints or logs a text.

Source: Gupta et al., Recovering Private Text in Federated Learning of Language Models, NeurIPS 2022, arXiv:2205.08514.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, groupby
from typing import Literal, NamedTuple, Protocol

import numpy
import torch

from fedllm.core.errors import ConfigError, DataError, ModelError, UploadRejected

Ids = tuple[int, ...]
PENALTY = 10.0
"""What one n-gram that was output before costs a beam, in nats."""
ROWS_FIRST = 16
"""Sentences of the first call of a language, which tells how large its vocabulary is."""
VALUES_AT_ONCE = 2**25
"""Log-probabilities that one later call may return: 128 MiB of float32."""
ROUNDING = 1e-3
"""How far above 0 a log-probability may be by rounding."""
SURPRISAL_MOST = 50.0
"""Cap on a surprisal, in nats, where it weighs a cut: an impossible transition has no bound."""
SURPRISAL_LEAST = 1e-3
"""Added to it, in nats, so that every place may be cut."""
SEGMENT_CUTS = (3, 4, 5)
"""The numbers k of cuts of a k-opt move."""


@dataclass(frozen=True)
class Bag:
    """Tokens that were fed, by falling norm of their rows (then by id), and those norms.

    Raises:
        DataError: a token twice, one below 0, or not one norm for each.
    """

    tokens: list[int]
    norms: list[float]

    def __post_init__(self) -> None:
        if len(set(self.tokens)) < len(self.tokens) or min(self.tokens, default=0) < 0:
            raise DataError("A bag holds a token twice, or one below 0.", "Allowed: each id once, 0 or more.")
        if len(self.norms) != len(self.tokens):
            raise DataError(f"A bag has {len(self.tokens)} tokens and {len(self.norms)} norms.", "One for each.")


class Found(NamedTuple):
    """A sentence without its prefix, and its score: see the function that gave it."""

    ids: Ids
    score: float


class Language(Protocol):
    """The attacked language model, as the caller wraps it. Ids come on the CPU and begin with the prefix, if any."""

    def log_probs(self, ids: torch.Tensor) -> torch.Tensor:
        """[B, T] -> [B, T, V]: log-probabilities of the token AFTER each position, without a graph."""
        ...

    def gradient_norm(self, ids: torch.Tensor) -> float:
        """[T], T >= 2: the norm of one inner tensor's gradient of this sentence's loss."""
        ...


def bag(
    embedding_gradient: torch.Tensor,
    *,
    cut: Literal["nonzero", "gap"] | int,
    exclude: Collection[int] = (),
) -> Bag:
    """The tokens that were fed, by the norms of the rows of the input embedding's gradient, [V, d].

    A row that is exactly zero is never taken. Source: section 4.1 of the paper; the gap is ours.

    Args:
        embedding_gradient: the gradient, or a change of the weights; its scale does not matter.
        cut: "nonzero" takes every row that is not zero: exact for an untied head without weight decay, except for
            tokens in last positions only, which feed no loss. "gap" cuts at the largest gap of the sorted log norms:
            for tied heads and weight decay, where every row moves; it fails where rare inputs weigh as little as
            tokens that were only predicted, as in large batches of alike hidden states or a well-trained model. A
            number takes so many of the largest.
        exclude: ids never taken, as padding and bos.

    Raises:
        ConfigError: an unknown cut, or an id outside the vocabulary.
        UploadRejected: no matrix of floats, or a value that is not finite.
    """
    grad = embedding_gradient.detach()
    if grad.dim() != 2 or not grad.is_floating_point() or grad.layout != torch.strided:
        raise UploadRejected(
            f"The embedding's gradient has shape {tuple(grad.shape)} in {grad.dtype}.", "Expected: dense floats [V, d]."
        )
    lengths = torch.linalg.vector_norm(grad, dim=1, dtype=torch.float64).cpu()
    if not bool(torch.isfinite(lengths).all()):
        raise UploadRejected("The embedding's gradient holds a value that is not finite.", action="Drop this upload.")
    if outside := [token for token in exclude if not 0 <= token < len(grad)]:
        raise ConfigError(f"Token {outside[0]} is to be excluded.", f"Allowed: 0 to {len(grad) - 1}.")
    used = (grad != 0).any(dim=1).cpu()  # a norm can underflow
    used[list(exclude)] = False
    ids = used.nonzero().flatten()
    order = torch.sort(lengths[ids], descending=True, stable=True)
    kept = _kept(order.values, cut)
    return Bag(ids[order.indices][:kept].tolist(), order.values[:kept].tolist())


def _kept(lengths: torch.Tensor, cut: str | int) -> int:
    """How many of the sorted norms a cut keeps."""
    if isinstance(cut, int) and not isinstance(cut, bool) and cut >= 0:
        return min(cut, len(lengths))
    if cut not in ("nonzero", "gap"):
        raise ConfigError(f"The cut of a bag is {cut!r}.", "Allowed: nonzero, gap, or a number of tokens, 0 or more.")
    if cut == "nonzero" or len(lengths) < 2:
        return len(lengths)
    logs = lengths.clamp(min=torch.finfo(torch.float64).tiny).log()
    gaps = logs[:-1] - logs[1:]
    return int(gaps.argmax()) + 1 if float(gaps.max()) > 0 else len(lengths)


# -- beam search -------------------------------------------------------------------------------------------------------


def beam(
    language: Language,
    bag: Bag,
    starts: Collection[int],
    *,
    counts: Mapping[int, int] | None = None,
    beams: int = 16,
    groups: int = 4,
    diversity: float = 0.1,
    length: int = 40,
    no_repeat: int = 2,
    penalised: Collection[Ids] = (),
    penalty: float = PENALTY,
    ends: Collection[int] = (),
    prefix: Sequence[int] = (),
) -> list[Found]:
    """Likely sentences of tokens of the bag: diverse beam search. An empty bag gives an empty list.

    A beam is finished at an end token, at `length`, or where no token may follow. Score: the sum of log-probabilities
    (of the first token only behind a prefix) minus `penalty` per penalised n-gram. The Hamming penalty, `diversity`
    times how often earlier groups chose a token at this step, ranks the choices and is no part of the score. All
    starts are kept for one step: without a prefix they are equally likely. Without a Hamming penalty and with enough
    beams the search is exhaustive. Source: section 4.2; groups: Vijayakumar et al., arXiv:1610.02424, section 3.

    Args:
        language: the model; asked once per step for all beams.
        bag: the tokens allowed.
        starts: first tokens; those outside the bag are left out, and where none is left all of the bag are.
        counts: how often each token of the bag may occur; None for any number.
        beams: how many are kept, in `groups` equal groups.
        groups: a divisor of `beams`.
        diversity: in nats.
        length: most tokens, without the prefix.
        no_repeat: n-grams of this size occur once in a beam; 0 allows repeats.
        penalised: n-grams of any sizes, as tuples.
        penalty: in nats.
        ends: tokens that end a sentence; they are part of it.
        prefix: ids before every sentence, a bos token say; no part of the result.

    Returns:
        The finished beams, each once, best first; ties by ids.

    Raises:
        ConfigError: an option outside its range, or a token of the bag without a count.
        ModelError: the language answers with another shape or NaN.
    """
    _check_beam(bag, counts, beams, groups, length, no_repeat, diversity, penalty)
    asked, before, closing = _Asked(language), tuple(prefix), frozenset(ends)
    rules = _Rules(bag.tokens, counts, no_repeat, penalised, penalty)
    done: dict[Ids, float] = {}
    roots: list[Found] = []
    for found in _first(asked, rules, frozenset(starts), before):
        if found.ids[0] in closing or length == 1:
            done[found.ids] = found.score
        else:
            roots.append(found)
    live = [roots for _ in range(groups)]
    while any(live):
        held = list(dict.fromkeys(found.ids for group in live for found in group))
        rows = dict(zip(held, asked.following([before + ids for ids in held], bag.tokens), strict=True))
        taken = numpy.zeros(len(bag.tokens))
        for g, group in enumerate(live):
            finished, live[g] = _grown(group, rows, rules, beams // groups, diversity * taken, closing, length)
            done.update(finished)
            for found in [*finished, *live[g]]:
                if len(found.ids) > len(group[0].ids):
                    taken[rules.place[found.ids[-1]]] += 1
    return sorted((Found(*item) for item in done.items()), key=lambda found: (-found.score, found.ids))


class _Rules:
    """Which tokens of the bag may follow a beam, and at what cost."""

    def __init__(
        self,
        tokens: list[int],
        counts: Mapping[int, int] | None,
        no_repeat: int,
        penalised: Collection[Ids],
        penalty: float,
    ) -> None:
        self.tokens, self.counts, self.no_repeat, self.penalty = tokens, counts, no_repeat, penalty
        self.place = {token: i for i, token in enumerate(tokens)}
        self.costly: dict[Ids, list[int]] = {}
        for gram in {tuple(gram) for gram in penalised if gram and gram[-1] in self.place}:
            self.costly.setdefault(gram[:-1], []).append(gram[-1])
        self.sizes = sorted({len(context) for context in self.costly})

    def costs(self, ids: Ids) -> numpy.ndarray:
        """[bag]: what is taken off the log-probability of each token; inf where it is banned."""
        found = numpy.zeros(len(self.tokens))
        for size in self.sizes:
            for token in self.costly.get(_tail(ids, size), []) if size <= len(ids) else []:
                found[self.place[token]] += self.penalty
        if self.counts is not None:
            for token, times in Counter(ids).items():
                if times >= self.counts[token]:
                    found[self.place[token]] = math.inf
            found[[self.counts[token] < 1 for token in self.tokens]] = math.inf
        if size := self.no_repeat:
            for at in range(len(ids) - size + 1):
                if ids[at : at + size - 1] == _tail(ids, size - 1):
                    found[self.place[ids[at + size - 1]]] = math.inf
        return found


def _tail(ids: Ids, size: int) -> Ids:
    return ids[len(ids) - size :]


def _first(asked: _Asked, rules: _Rules, starts: Collection[int], prefix: Ids) -> list[Found]:
    """The sentences of one token."""
    costs = rules.costs(())
    allowed = [token for token, cost in zip(rules.tokens, costs, strict=True) if cost < math.inf]
    firsts = [token for token in allowed if token in starts] or allowed
    if not firsts:
        return []
    values = asked.following([prefix], rules.tokens)[0] if prefix else numpy.zeros(len(costs))
    scored = [Found((token,), float((values - costs)[rules.place[token]])) for token in firsts]
    return [found for found in scored if found.score > -math.inf]


def _grown(
    group: list[Found],
    rows: Mapping[Ids, numpy.ndarray],
    rules: _Rules,
    width: int,
    worse: numpy.ndarray,
    ends: Collection[int],
    length: int,
) -> tuple[list[Found], list[Found]]:
    """One step of a group: the beams that finish, and the `width` best that go on."""
    if not group:
        return [], []
    values = numpy.stack([found.score + rows[found.ids] - rules.costs(found.ids) for found in group])
    finished = [found for found, row in zip(group, values, strict=True) if not numpy.isfinite(row).any()]
    kept: list[Found] = []
    ranked = numpy.argsort(-(values - worse), axis=None, kind="stable")
    for rank, flat in enumerate(ranked[: int(numpy.isfinite(values).sum())]):
        parent, column = divmod(int(flat), len(rules.tokens))
        found = Found((*group[parent].ids, rules.tokens[column]), float(values[parent, column]))
        if found.ids[-1] not in ends and len(found.ids) < length:
            kept.append(found)
        elif rank < width:
            finished.append(found)
        if len(kept) == width or (rank + 1 >= width and len(found.ids) == length):
            break
    return finished, kept


# -- score -------------------------------------------------------------------------------------------------------------


class Scorer:
    """S(x) = alpha PPL(x) + ||grad L(x)|| of sentences, each asked for once. Lower is more likely to have been seen.

    PPL is over the sentence's tokens; without a prefix the first has no probability and is left out.

    Raises:
        ConfigError: alpha is not a number above 0.
    """

    def __init__(self, language: Language, alpha: float, prefix: Sequence[int] = ()) -> None:
        if not 0 < alpha < math.inf:
            raise ConfigError(f"alpha is {alpha}.", "Allowed: a number above 0.", "10")
        self.language, self.alpha, self.prefix = language, alpha, tuple(prefix)
        self._asked = _Asked(language)
        self._surprisals: dict[Ids, list[float]] = {}
        self._norms: dict[Ids, float] = {}

    def scorable(self, ids: Ids) -> bool:
        """Whether a token of the sentence has a probability."""
        return bool(ids) and len(self.prefix) + len(ids) > 1

    def surprisals(self, sentences: Sequence[Ids]) -> list[list[float]]:
        """-log p of each sentence's tokens, in nats; those not known yet are asked for together."""
        if not all(map(self.scorable, sentences)):
            raise DataError("A sentence to score has no transition.", "Allowed: 2 tokens or more, prefix included.")
        new = sorted(dict.fromkeys(ids for ids in sentences if ids not in self._surprisals), key=len)
        for _, alike in groupby(new, key=len):
            self._ask(list(alike))
        return [self._surprisals[ids] for ids in sentences]

    def _ask(self, sentences: list[Ids]) -> None:
        skip = max(len(self.prefix) - 1, 0)
        told: list[list[float]] = []
        for ids, logs in self._asked.answers([self.prefix + ids for ids in sentences]):
            logs = logs[:, :-1].gather(2, ids[:, 1:, None].to(logs.device))[:, skip:, 0].double().cpu()
            _check(logs)
            told.extend((-logs).tolist())
        self._surprisals.update(zip(sentences, told, strict=True))

    def norm(self, ids: Ids) -> float:
        """||grad L(x)||."""
        if ids not in self._norms:
            found = float(self.language.gradient_norm(torch.tensor(self.prefix + ids)))
            if not 0 <= found < math.inf:
                raise ModelError(f"The language gave a gradient of norm {found}.", "Expected: a number, 0 or more.")
            self._norms[ids] = found
        return self._norms[ids]

    def score(self, ids: Sequence[int]) -> float:
        """S(x); inf for an impossible sentence. Raises :class:`DataError` for one without a transition."""
        found = self.best([tuple(ids)])
        return found.score if found else math.inf

    def best(
        self, candidates: Sequence[Ids], below: float = math.inf, worse: Sequence[float] | None = None
    ) -> Found | None:
        """The candidate with the lowest S, if that is below `below`; ties go to the first by perplexity, then by ids.

        A gradient is asked for only where the perplexity alone does not already exceed the best.

        Args:
            candidates: the sentences.
            below: a score that must be beaten.
            worse: nats added to the whole surprisal of each, for penalties.
        """
        extra = worse or [0.0] * len(candidates)
        means = [(sum(told) + more) / len(told) for told, more in zip(self.surprisals(candidates), extra, strict=True)]
        found = None
        for mean, ids in sorted(set(zip(means, candidates, strict=True))):
            least = self.alpha * (math.exp(mean) if mean < 700 else math.inf)
            if least >= below:
                break
            if (total := least + self.norm(ids)) < below:
                found, below = Found(ids, total), total
        return found


def score(language: Language, ids: Sequence[int], alpha: float, *, prefix: Sequence[int] = ()) -> float:
    """S(x) of one sentence; keep a :class:`Scorer` to score many. Source: section 4.3 of the paper.

    Raises:
        ConfigError: alpha is not a number above 0.
        DataError: fewer than 2 tokens, prefix included, or none behind the prefix.
        ModelError: the language answers with another shape, NaN, or a norm that is no number.
    """
    return Scorer(language, alpha, prefix).score(ids)


# -- reordering --------------------------------------------------------------------------------------------------------


def reorder(
    language: Language,
    ids: Sequence[int],
    *,
    alpha: float = 10.0,
    rng: numpy.random.Generator,
    phrases: int = 100,
    swaps: int = 100,
    tries: int = 50,
    patience: int = 50,
    spare: Sequence[int] = (),
    longest: int = 40,
    prefix: Sequence[int] = (),
) -> Found:
    """A sentence whose S is no higher: first phrases are moved, then tokens. Source: section 4.3 of the paper.

    A round proposes `tries` candidates, asks for their perplexities together and takes the best if S falls. Phrase
    rounds cut a window, in turns the whole sentence and a part, at k in {3, 4, 5} places drawn by the surprisal of the
    token behind them, and permute the segments. Token rounds swap two tokens or insert a spare one.

    Args:
        language: the model.
        ids: the sentence without the prefix; fewer than 2 tokens come back as they are where nothing is spare.
        alpha: weight of the perplexity.
        rng: what is drawn from; the same gives the same sentence.
        phrases: most phrase rounds.
        swaps: most token rounds.
        tries: candidates a round.
        patience: a phase ends after so many rounds in a row without a gain.
        spare: tokens that may be inserted, each as often as it is listed.
        longest: most tokens that an insert may reach.
        prefix: as for :func:`beam`.

    Returns:
        The sentence and its S (inf where it has no transition or stays impossible).

    Raises:
        ConfigError: an option outside its range.
        ModelError: as for :func:`score`.
    """
    return _reordered(Scorer(language, alpha, prefix), tuple(ids), rng, phrases, swaps, tries, patience, spare, longest)


def _reordered(
    scorer: Scorer,
    ids: Ids,
    rng: numpy.random.Generator,
    phrases: int,
    swaps: int,
    tries: int,
    patience: int,
    spare: Sequence[int],
    longest: int,
) -> Found:
    _least("reorder", 0, phrases=phrases, swaps=swaps)
    _least("reorder", 1, tries=tries, patience=patience, longest=longest)
    if not scorer.scorable(ids):
        return Found(ids, math.inf)
    pool = Counter(ids) + Counter(spare)

    def moved(now: Ids, turn: int) -> list[Ids]:
        return _moved(now, scorer.surprisals([now])[0], turn % 2 == 1, tries, rng)

    def swapped(now: Ids, _: int) -> list[Ids]:
        left = sorted((pool - Counter(now)).elements()) if len(now) < longest else []
        return _swapped(now, left, tries, rng)

    held = Found(ids, scorer.score(ids))
    for propose, rounds in ((moved, phrases), (swapped, swaps)):
        held = _descend(scorer, held, propose, rounds, patience)
    return held


def _descend(
    scorer: Scorer, held: Found, propose: Callable[[Ids, int], list[Ids]], rounds: int, patience: int
) -> Found:
    idle = 0
    for turn in range(rounds):
        found = scorer.best(propose(held.ids, turn), held.score)
        held, idle = (found, 0) if found else (held, idle + 1)
        if idle == patience:
            break
    return held


def _moved(ids: Ids, surprisals: list[float], local: bool, tries: int, rng: numpy.random.Generator) -> list[Ids]:
    """The segments of a window in other orders; surprisals [T] or, without that of the first token, [T - 1]."""
    size = len(ids)
    if size < 2:
        return []
    width = rng.integers(2, max(size // 2, 2) + 1, tries) if local else numpy.full(tries, size)
    begin = rng.integers(size - width + 1)
    before = numpy.arange(1, size)  # a cut at i is before token i
    inside = (before > begin[:, None]) & (before < (begin + width)[:, None])
    chances = numpy.minimum(surprisals[1 - size :], SURPRISAL_MOST) + SURPRISAL_LEAST
    race = numpy.where(inside, rng.exponential(size=inside.shape) / chances, math.inf)
    first = race.argsort(1) + 1  # the first k of a race of exponential clocks: k weighted draws without replacement
    wanted = numpy.minimum(rng.choice(SEGMENT_CUTS, tries), width - 1)
    order = rng.random((tries, max(SEGMENT_CUTS) + 1))
    found: list[Ids] = []
    for i, k in enumerate(wanted.tolist()):
        start, end = int(begin[i]), int(begin[i] + width[i])
        borders = [start, *sorted(first[i, :k].tolist()), end]
        segments = [ids[borders[j] : borders[j + 1]] for j in order[i, : k + 1].argsort().tolist()]
        found.append(ids[:start] + tuple(chain.from_iterable(segments)) + ids[end:])
    return found


def _swapped(ids: Ids, spare: list[int], tries: int, rng: numpy.random.Generator) -> list[Ids]:
    """Two tokens swapped, or with equal chance a spare one inserted, where there is one."""
    size = len(ids)
    insert = rng.random(tries) < (0.5 if size > 1 else 1.0) if spare else numpy.zeros(tries, dtype=bool)
    if size < 2 and not spare:
        return []
    one = rng.integers(size, size=tries)
    two = (one + rng.integers(1, max(size, 2), tries)) % size
    at, which = rng.integers(size + 1, size=tries), rng.integers(max(len(spare), 1), size=tries)
    found: list[Ids] = []
    for i in range(tries):
        made = list(ids)
        if insert[i]:
            made.insert(int(at[i]), spare[which[i]])
        else:
            made[one[i]], made[two[i]] = made[two[i]], made[one[i]]
        found.append(tuple(made))
    return found


# -- the whole attack --------------------------------------------------------------------------------------------------


def recover(
    language: Language,
    bag: Bag,
    *,
    sentences: int,
    starts: Collection[int],
    rng: numpy.random.Generator,
    ends: Collection[int] = (),
    counts: Mapping[int, int] | None = None,
    prefix: Sequence[int] = (),
    alpha: float = 10.0,
    beams: int = 16,
    groups: int = 4,
    diversity: float = 0.1,
    length: int = 40,
    no_repeat: int = 2,
    gram: int = 2,
    penalty: float = PENALTY,
    phrases: int = 100,
    swaps: int = 100,
    tries: int = 50,
    patience: int = 50,
    inserts: bool = False,
) -> list[list[int]]:
    """The sentences of a batch, one after the other: beam search, reordering, and again with what was output penalised.

    Of the finished beams the one with the lowest S is reordered, its perplexity with the penalties. Known counts
    are those of the batch: an output sentence uses them up (ours; the paper only penalises). Source: section 4.

    Args:
        language: as for :func:`beam`.
        bag: as for :func:`beam`.
        starts: as for :func:`beam`.
        ends: as for :func:`beam`.
        counts: as for :func:`beam`.
        prefix: as for :func:`beam`.
        beams: as for :func:`beam`.
        groups: as for :func:`beam`.
        diversity: as for :func:`beam`.
        length: as for :func:`beam`.
        no_repeat: as for :func:`beam`.
        rng: as for :func:`reorder`.
        alpha: as for :func:`reorder`.
        phrases: as for :func:`reorder`.
        swaps: as for :func:`reorder`.
        tries: as for :func:`reorder`.
        patience: as for :func:`reorder`.
        sentences: how many to output.
        gram: the size of the n-grams that are penalised once output.
        penalty: what each costs, in nats.
        inserts: whether reordering may insert tokens: those that the counts leave, else those the sentence lacks.

    Returns:
        At most `sentences` lists of ids; fewer where the tokens are used up, none for an empty bag.

    Raises:
        ConfigError, ModelError: as for :func:`beam` and :func:`reorder`.
    """
    _least("recover", 0, sentences=sentences)
    _least("recover", 1, gram=gram)
    scorer = Scorer(language, alpha, prefix)
    left = None if counts is None else dict(counts)
    said: set[Ids] = set()
    output: list[list[int]] = []
    while len(output) < sentences:
        found = beam(
            language,
            bag,
            starts,
            counts=left,
            beams=beams,
            groups=groups,
            diversity=diversity,
            length=length,
            no_repeat=no_repeat,
            penalised=said,
            penalty=penalty,
            ends=ends,
            prefix=prefix,
        )
        if not found:
            break
        chosen = _chosen(scorer, found)
        spare = _spare(bag, left, chosen) if inserts else []
        ids = _reordered(scorer, chosen, rng, phrases, swaps, tries, patience, spare, length).ids
        output.append(list(ids))
        said |= {ids[at : at + gram] for at in range(len(ids) - gram + 1)}
        if left is not None:
            used = Counter(ids)
            left = {token: times - used[token] for token, times in left.items()}
    return output


def _chosen(scorer: Scorer, found: list[Found]) -> Ids:
    """The beam with the lowest S; the likeliest where none has one."""
    usable = [one for one in found if scorer.scorable(one.ids)]
    candidates = [one.ids for one in usable]
    worse = [
        -one.score - sum(told) for one, told in zip(usable, scorer.surprisals(candidates), strict=True)
    ]  # what penalties took off the beam's score
    best = scorer.best(candidates, worse=worse)
    return best.ids if best else found[0].ids


def _spare(bag: Bag, left: Mapping[int, int] | None, ids: Ids) -> list[int]:
    if left is None:
        return [token for token in bag.tokens if token not in ids]
    return sorted((Counter(left) - Counter(ids)).elements())


# -- asking the language -----------------------------------------------------------------------------------------------


class _Asked:
    """A language that is asked for sentences of one length, as many at once as their answers are small."""

    def __init__(self, language: Language) -> None:
        self.language, self.vocabulary = language, 0

    def answers(self, rows: Sequence[Ids]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Some rows after the others, [B, T], and what the language says, [B, T, V]."""
        at = 0
        while at < len(rows):
            most = VALUES_AT_ONCE // (len(rows[0]) * self.vocabulary) if self.vocabulary else ROWS_FIRST
            ids = torch.tensor(rows[at : at + max(most, 1)])
            logs = self.language.log_probs(ids).detach()
            if logs.dim() != 3 or logs.shape[:2] != ids.shape or logs.shape[2] <= int(ids.max()):
                raise ModelError(
                    f"The language answered ids of shape {tuple(ids.shape)} with shape {tuple(logs.shape)}.",
                    f"Expected: [{ids.shape[0]}, {ids.shape[1]}, V] with V above {int(ids.max())}.",
                )
            self.vocabulary = logs.shape[2]
            at += len(ids)
            yield ids, logs

    def following(self, rows: Sequence[Ids], tokens: Sequence[int]) -> list[numpy.ndarray]:
        """Log-probabilities of tokens after each row: [tokens], float64."""
        found: list[numpy.ndarray] = []
        for _, logs in self.answers(rows):
            if logs.shape[2] <= max(tokens):
                raise ModelError(f"The language knows {logs.shape[2]} tokens.", f"The bag holds token {max(tokens)}.")
            told = logs[:, -1][:, list(tokens)].double().cpu()
            _check(told)
            found.extend(told.numpy())
        return found


def _check(told: torch.Tensor) -> None:
    if not bool((told < ROUNDING).all()):
        raise ModelError(
            "The language gave a log-probability above 0 or NaN.", action="Give log_softmax of the logits."
        )


def _check_beam(
    bag: Bag,
    counts: Mapping[int, int] | None,
    beams: int,
    groups: int,
    length: int,
    no_repeat: int,
    diversity: float,
    penalty: float,
) -> None:
    _least("beam", 1, beams=beams, groups=groups, length=length)
    _least("beam", 0, no_repeat=no_repeat, diversity=diversity, penalty=penalty)
    if beams % groups:
        raise ConfigError(
            f"beam was given beams={beams} and groups={groups}.",
            "Groups are equal: groups divides beams.",
            f"beams={beams + groups - beams % groups}",
        )
    if counts is not None and (lacking := [token for token in bag.tokens if token not in counts]):
        raise ConfigError(f"Token {lacking[0]} of the bag has no count.", "Give one for every token, or counts=None.")


def _least(where: str, least: int, **values: float) -> None:
    for name, value in values.items():
        if not least <= value < math.inf:
            raise ConfigError(f"{where} was given {name}={value}.", f"Allowed: {least} or more.", str(least))
