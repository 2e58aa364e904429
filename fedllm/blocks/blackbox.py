"""Black box - a model that is asked for texts and nothing else: counted, cached, retried, and stopped by a budget.

What answers is a `Source`: an HTTP endpoint (:mod:`fedllm.blocks.endpoint`), a local model, or any function. Methods
on black-box models (FedBPT, FedLogic, Fed-SP-SC, CrossLM and their kin) talk to it through `await box.ask(queries)`,
so that calls, tokens and cost are counted in one place and a budget ends a run BEFORE it is passed. A black box gives
no gradient; :class:`Forward` is the same promise for functions of tensors.
"""

from __future__ import annotations

import asyncio
import hashlib
import inspect
import json
import math
import sqlite3
import threading
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn, Protocol

import torch
from pydantic import BaseModel, ConfigDict, Field

from fedllm.core.errors import BudgetSpent, ConfigError, ModelError, RunError
from fedllm.core.message import Json

OVERHEAD = 64
"""Tokens a chat template may add to a prompt, for the bound on what a query can cost."""


@dataclass(frozen=True)
class Query:
    """One question to a black box.

    Attributes:
        prompt: the text it reads.
        system: a system message, where it has a chat form.
        max_tokens: most new tokens.
        temperature: 0 is greedy.
        stop: texts that end the answer; they are not part of it.
        sample: tells several draws of one prompt apart; also the endpoint's seed where temperature > 0.
        logprobs: ask for the log-probability of every token of the answer.
        continuation: score this text after the prompt in place of writing one.
    """

    prompt: str
    system: str | None = None
    max_tokens: int = 256
    temperature: float = 0.0
    stop: tuple[str, ...] = ()
    sample: int = 0
    logprobs: bool = False
    continuation: str | None = None

    def __post_init__(self) -> None:
        if self.max_tokens < 1 or not (0 <= self.temperature < math.inf):
            raise ConfigError(
                f"A query has max_tokens={self.max_tokens} and temperature={self.temperature}.",
                "max_tokens is 1 or more, temperature is 0 or more.",
            )
        if self.continuation == "":
            raise ConfigError("A query has an empty continuation.", "There is nothing to score.")

    @property
    def prompt_bound(self) -> int:
        """The most tokens its prompt can have: no tokeniser makes more than one of a byte."""
        texts = (self.prompt, self.system or "", self.continuation or "")
        return sum(len(text.encode("utf-8", "replace")) for text in texts) + OVERHEAD

    @property
    def completion_bound(self) -> int:
        """The most tokens of its answer."""
        return 0 if self.continuation is not None else self.max_tokens


@dataclass(frozen=True)
class Completion:
    """What a black box answered.

    Attributes:
        text: the answer (or the continuation that was scored).
        logprobs: natural log-probabilities of its tokens; None where the source gives none.
        prompt_tokens: tokens read; None where the source does not say.
        completion_tokens: tokens written; None where the source does not say.
        finish: why it ended: "stop", "length", or "" where unknown.
    """

    text: str
    logprobs: tuple[float, ...] | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    finish: str = ""

    @property
    def logprob(self) -> float | None:
        """The log-probability of the whole answer; None where a token's is missing or not finite."""
        if self.logprobs is None or not all(math.isfinite(value) for value in self.logprobs):
            return None
        return math.fsum(self.logprobs)


class Source(Protocol):
    """Something that answers. `__call__` may be a plain or an async function; plain ones run in threads.

    Attributes:
        name: what tells its answers apart from another's, for the cache.
        batch: how many queries one call takes; None for any number.
    """

    name: str
    batch: int | None

    def __call__(self, queries: Sequence[Query]) -> Sequence[Completion] | Awaitable[Sequence[Completion]]:
        """One completion per query, in their order; :class:`Busy` where it is worth trying again."""
        ...


@dataclass(frozen=True)
class Function:
    """Any function from a prompt to a text, as a :class:`Source`."""

    name: str
    function: Callable[[str], str]
    batch: int | None = 1

    def __call__(self, queries: Sequence[Query]) -> list[Completion]:
        """See :class:`Source`."""
        if any(query.continuation is not None for query in queries):
            raise ConfigError(f"The source '{self.name}' writes texts and cannot score one.")
        return [Completion(self.function(query.prompt)) for query in queries]


class Busy(Exception):
    """A source did not answer this time.

    Args:
        reason: what happened, as part of a sentence.
        after: seconds it asks to wait; None where it does not say.
        charged: whether the attempt may have to be paid for (a time-out after the question was sent).
    """

    def __init__(self, reason: str, after: float | None = None, charged: bool = False) -> None:
        super().__init__(reason)
        self.reason, self.after, self.charged = reason, after, charged


class Budget(BaseModel):
    """What may be spent; None is no limit. The most a query can cost is set aside before it is asked."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    calls: int | None = Field(None, ge=0)
    """Most calls. Answers from the cache cost nothing."""
    tokens: int | None = Field(None, ge=0)
    """Most tokens, read and written together."""
    cost: float | None = Field(None, ge=0)
    """Most cost, in the unit of the prices."""
    prompt_price: float = Field(0.0, ge=0)
    """Price of a million tokens read."""
    completion_price: float = Field(0.0, ge=0)
    """Price of a million tokens written."""

    def price(self, prompt: int, completion: int) -> float:
        """What so many tokens cost."""
        return (prompt * self.prompt_price + completion * self.completion_price) / 1e6


class Ledger:
    """What was spent, and what is set aside for queries under way. Safe to use from several threads.

    Attributes:
        calls: attempts that were answered, or timed out.
        prompt_tokens, completion_tokens: tokens of these; the bound of a query where the source does not say.
        cost: their cost.
        unmetered: calls of which the source did not say the tokens.
        retries: attempts made again.
        cached: answers that came from the cache.
    """

    def __init__(self, budget: Budget | None = None, spent: Json = None) -> None:
        self.budget = budget or Budget()  # pyright: ignore[reportCallIssue]
        if self.budget.cost is not None and not (self.budget.prompt_price or self.budget.completion_price):
            raise ConfigError(
                f"budget.cost={self.budget.cost:g} is given without prices.",
                "Cost is counted from prompt_price and completion_price, per million tokens.",
                action="Set both prices, or use budget.tokens.",
            )
        facts = spent or {}
        self.calls, self.retries = int(facts.get("calls", 0)), int(facts.get("retries", 0))
        self.prompt_tokens = int(facts.get("prompt_tokens", 0))
        self.completion_tokens = int(facts.get("completion_tokens", 0))
        self.unmetered, self.cached = int(facts.get("unmetered", 0)), int(facts.get("cached", 0))
        self._held: list[int] = [0, 0, 0]
        self._lock = threading.Lock()

    @property
    def tokens(self) -> int:
        """Tokens read and written."""
        return self.prompt_tokens + self.completion_tokens

    @property
    def cost(self) -> float:
        """What they cost, by the budget's prices."""
        return self.budget.price(self.prompt_tokens, self.completion_tokens)

    def to_json(self) -> dict[str, Json]:
        """For a report and a checkpoint; `Ledger(budget, this)` goes on from there."""
        names = ("calls", "prompt_tokens", "completion_tokens", "unmetered", "retries", "cached")
        return {**{name: getattr(self, name) for name in names}, "cost": self.cost}

    def hold(self, prompt: int, completion: int, calls: int = 1) -> None:
        """Set aside the most a query can cost; raises :class:`BudgetSpent` where that would pass the budget."""
        with self._lock:
            held = [have + more for have, more in zip(self._held, (calls, prompt, completion), strict=True)]
            budget, total = self.budget, self.tokens + held[1] + held[2]
            cost = self.cost + budget.price(held[1], held[2])
            for name, limit, wanted, spent in (
                ("calls", budget.calls, self.calls + held[0], self.calls),
                ("tokens", budget.tokens, total, self.tokens),
                ("cost", budget.cost, cost, self.cost),
            ):
                if limit is not None and wanted > limit:
                    raise BudgetSpent(
                        f"The budget of the black box is spent: the next query may bring its {name} to {wanted:g}.",
                        f"Allowed: {limit:g}; spent so far: {spent:g}.",
                        action=f"Raise budget.{name}, or ask fewer or shorter questions.",
                    )
            self._held = held

    def settle(self, query: Query, found: Completion | None, charged: bool = True) -> None:
        """Turn what was set aside for a query into what it cost; nothing where the attempt is not charged."""
        bounds = query.prompt_bound, query.completion_bound
        with self._lock:
            self._held = [have - less for have, less in zip(self._held, (1, *bounds), strict=True)]
            if not charged:
                return
            said = (None, None) if found is None else (found.prompt_tokens, found.completion_tokens)
            self.calls += 1
            self.unmetered += None in said
            self.prompt_tokens += bounds[0] if said[0] is None else said[0]
            self.completion_tokens += bounds[1] if said[1] is None else said[1]

    def spend(self, calls: int) -> None:
        """Turn calls that were set aside into calls made."""
        with self._lock:
            self._held[0] -= calls
            self.calls += calls


@dataclass(frozen=True)
class Patience:
    """How often and after how long a busy source is asked again.

    Attributes:
        tries: attempts in all.
        first: seconds before the second one; doubled each time, with up to a quarter added by the query's hash.
        longest: most seconds; a source that asks to wait longer is given up.
    """

    tries: int = 5
    first: float = 1.0
    longest: float = 60.0

    def wait(self, attempt: int, told: float | None, key: str) -> float:
        """Seconds after attempt number `attempt` (from 0); what the source told goes before."""
        if told is not None:
            return told
        return min(self.longest, self.first * 2**attempt * (1 + int(key[:4], 16) / 0x40000))


class Cache:
    """Completions by the hash of the full request, in memory or in one SQLite file (readable by its owner only).

    The file holds hashes and answers; questions are not in it.
    """

    def __init__(self, file: Path | None = None) -> None:
        self.file, self._lock = file, threading.Lock()
        try:
            if file is not None:
                file.parent.mkdir(parents=True, exist_ok=True)
                file.touch(0o600)
            self._data = sqlite3.connect(":memory:" if file is None else file, check_same_thread=False)
            with self._data:
                self._data.execute("create table if not exists answers (key text primary key, answer text not null)")
        except (OSError, sqlite3.Error) as fault:
            raise RunError(
                f"The cache {file} cannot be used ({fault}).", action="Delete it, or name another file."
            ) from fault

    def get(self, key: str) -> Completion | None:
        """The answer under a key."""
        with self._lock:
            found = self._data.execute("select answer from answers where key = ?", (key,)).fetchone()
        if found is None:
            return None
        facts = json.loads(found[0])
        logprobs = facts.pop("logprobs")
        return Completion(logprobs=None if logprobs is None else tuple(logprobs), **facts)

    def put(self, key: str, completion: Completion) -> None:
        """Keep an answer."""
        with self._lock, self._data:
            text = json.dumps(asdict(completion))
            self._data.execute("insert or replace into answers values (?, ?)", (key, text))


class BlackBox:
    """A model that can be asked.

    Args:
        source: what answers.
        budget: what may be spent.
        cache: a file to keep answers in; None keeps them in memory.
        patience: how a busy source is asked again.
        parallel: most calls under way at once.
        spent: what an earlier ledger held (see :meth:`Ledger.to_json`), to go on from.

    Attributes:
        ledger: what was spent.
    """

    def __init__(
        self,
        source: Source,
        budget: Budget | None = None,
        cache: Path | None = None,
        patience: Patience | None = None,
        parallel: int = 4,
        spent: Json = None,
    ) -> None:
        if parallel < 1:
            raise ConfigError(f"parallel={parallel} lets no call through.", "Allowed: 1 or more.")
        self.source, self.patience, self.parallel = source, patience or Patience(), parallel
        self.ledger, self.cache = Ledger(budget, spent), Cache(cache)
        self._pool = ThreadPoolExecutor(parallel, "blackbox")

    async def ask(self, queries: Sequence[Query]) -> list[Completion]:
        """One completion per query. What was answered before an error stays in the cache.

        Raises:
            BudgetSpent: before a query that could pass the budget.
            ModelError: the source refuses, or stays busy.
        """
        found, spent = await self.ask_some(queries)
        if spent is not None:
            raise spent
        return [completion for completion in found if completion is not None]

    async def ask_some(self, queries: Sequence[Query]) -> tuple[list[Completion | None], BudgetSpent | None]:
        """As :meth:`ask`, but where the budget ends: what was answered, None for the rest, and the error."""
        keys = [self.key(query) for query in queries]
        found = {key: self.cache.get(key) for key in dict.fromkeys(keys)}
        missing = [(k, q) for k, q in dict(zip(keys, queries, strict=True)).items() if found[k] is None]
        self.ledger.cached += len(keys) - len(missing)
        size, gate = self.source.batch or max(1, len(missing)), asyncio.Semaphore(self.parallel)

        async def one(chunk: list[tuple[str, Query]]) -> BudgetSpent | None:
            async with gate:
                return await self._serve(chunk, found)

        chunks = [missing[i : i + size] for i in range(0, len(missing), size)]
        ends = await asyncio.gather(*(one(chunk) for chunk in chunks), return_exceptions=True)
        for end in ends:
            if isinstance(end, BaseException) and not isinstance(end, BudgetSpent):
                raise end
        return [found[key] for key in keys], next((end for end in ends if isinstance(end, BudgetSpent)), None)

    def ask_now(self, queries: Sequence[Query]) -> list[Completion]:
        """:meth:`ask` for code that is not async."""
        return asyncio.run(self.ask(queries))

    def key(self, query: Query) -> str:
        """The hash of everything that decides the answer."""
        text = json.dumps([self.source.name, asdict(query)], sort_keys=True)
        return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()

    def gradient(self, *_: Any, **__: Any) -> NoReturn:
        """Refused."""
        raise ConfigError(
            "A black box gives no gradient.",
            "Allowed: texts and log-probabilities, by 'ask'.",
            action="Choose a method that needs none, or a model whose weights are at hand.",
        )

    async def _serve(self, chunk: list[tuple[str, Query]], found: dict[str, Completion | None]) -> BudgetSpent | None:
        """Ask for as much of a chunk as the budget allows; what ended it, if it did."""
        asked, end = 0, None
        for _, query in chunk:
            try:
                self.ledger.hold(query.prompt_bound, query.completion_bound)
            except BudgetSpent as spent:
                end = spent
                break
            asked += 1
        if asked:
            queries = [query for _, query in chunk[:asked]]
            answers = await self._patiently(queries, chunk[0][0])
            for (key, query), answer in zip(chunk[:asked], answers, strict=True):
                self.ledger.settle(query, answer)
                self.cache.put(key, answer)
                found[key] = answer
        return end

    async def _patiently(self, queries: list[Query], key: str) -> Sequence[Completion]:
        """Call, and call again while the source is busy; what is set aside stays set aside until it answers."""
        held = True
        try:
            for attempt in range(self.patience.tries):
                try:
                    answers = await self._call(queries)
                except Busy as busy:
                    last = attempt + 1 == self.patience.tries
                    held = False
                    for query in queries:
                        self.ledger.settle(query, None, busy.charged)
                    if last or (busy.after or 0) > self.patience.longest:
                        raise self._given_up(busy, attempt + 1) from busy
                    await asyncio.sleep(self.patience.wait(attempt, busy.after, key))
                    held = self._hold_again(queries)
                    self.ledger.retries += 1
                else:
                    if len(answers) != len(queries):
                        raise ModelError(
                            f"The source '{self.source.name}' gave {len(answers)} answers to {len(queries)} queries.",
                            "One answer per query is needed.",
                        )
                    held = False
                    return answers
            raise ConfigError(f"patience.tries={self.patience.tries} asks nothing.", "Allowed: 1 or more.")
        finally:
            if held:
                for query in queries:
                    self.ledger.settle(query, None, False)

    def _hold_again(self, queries: list[Query]) -> bool:
        """Set the same aside once more; all or nothing."""
        for number, query in enumerate(queries):
            try:
                self.ledger.hold(query.prompt_bound, query.completion_bound)
            except BudgetSpent:
                for earlier in queries[:number]:
                    self.ledger.settle(earlier, None, False)
                raise
        return True

    async def _call(self, queries: list[Query]) -> Sequence[Completion]:
        if inspect.iscoroutinefunction(type(self.source).__call__):
            return await self.source(queries)  # type: ignore[misc]
        return await asyncio.get_running_loop().run_in_executor(self._pool, self._blind, queries)

    def _blind(self, queries: list[Query]) -> Sequence[Completion]:
        with torch.no_grad():
            return self.source(queries)  # type: ignore[return-value]

    def _given_up(self, busy: Busy, tries: int) -> ModelError:
        wait = f" and asks to wait {busy.after:g} s" if busy.after else ""
        return ModelError(
            f"The source '{self.source.name}' did not answer in {tries} tries: {busy.reason}{wait}.",
            f"At most {self.patience.tries} tries, {self.patience.longest:g} s apart.",
            action="Try again later, or lower the number of calls under way.",
        )


class Forward:
    """A function of tensors that is seen from outside only: forward, counted, never differentiated.

    Args:
        function: tensors -> a tensor; the first dimension of the first input counts as calls.
        budget: `calls` is how many rows may be put in.
    """

    def __init__(self, function: Callable[..., torch.Tensor], budget: Budget | None = None) -> None:
        self.function, self.ledger = function, Ledger(budget)

    def __call__(self, *inputs: torch.Tensor) -> torch.Tensor:
        """The output, without a graph.

        Raises:
            ConfigError: an input that asks for a gradient.
            BudgetSpent: before a call that would pass the budget.
        """
        if any(each.requires_grad for each in inputs):
            raise ConfigError(
                "A black box gives no gradient, and its input asks for one.",
                action="Detach the input, or estimate the gradient from outputs.",
            )
        rows = int(inputs[0].shape[0])
        self.ledger.hold(0, 0, rows)
        self.ledger.spend(rows)
        with torch.no_grad():
            return self.function(*inputs).detach()
