"""Fed-SP-SC and Fed-DP-CoT - a question is answered better by asking what other users asked in other words.

One zero-shot answer of a language model is unreliable, and nothing can be trained through an API. Users ask alike,
though. `sp-sc`: the same question in the words of several users (the Same Parameters) is answered once each, and the
answers are voted on. `dp-cot`: questions of the same template with other numbers (Different Parameters) are answered
by self-consistency and become demonstrations, with a warning that they may be wrong.

Every client keeps its bank of questions. For each question asked it gives out what it finds alike: redacted, of users
who agreed, one per user. Gold answers never leave a client: answers go back to who asked and are held to them there.

Deviations: with one chain per question the answer is read off by a second call, with more by parsing, so that calls
are 2 n or n J. Prompt strings are those of zero-shot chain of thought, as the paper's are not published. Votes weigh by
user, so that asking often gains nothing. A paraphrase by the model stands in where too few users asked alike.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from fedllm.blocks.answers import AnswerKind, AnswerParser
from fedllm.blocks.asking import Asking, RunModel, continued, texts_of
from fedllm.blocks.blackbox import BlackBox, Source
from fedllm.blocks.reasoning import Outcome, Reasoner
from fedllm.blocks.retrieval import Question, QuestionBank, answer_of, pooled, question_of, redact, well_formed
from fedllm.core.card import Card
from fedllm.core.errors import DataError, FedLLMError
from fedllm.core.message import Json, Received, Texts, Upload
from fedllm.core.method import on_client
from fedllm.core.protocol import Protocol
from fedllm.core.state import State
from fedllm.core.tensors import Tensors

if TYPE_CHECKING:
    from fedllm.core.server import Server
    from fedllm.core.work import Client

LONGEST = 4000
"""Most characters of a question that travels."""
Asked = list[Any]
"""Who asks, the number of its held-out row, and the question as it may be shown."""
PARAMETERS: dict[str, Literal["same", "different"]] = {"sp-sc": "same", "dp-cot": "different"}


class FedSPSC(Protocol):
    """Answers by the vote of synonymous questions, or after demonstrations from similar ones."""

    card = Card(
        title="Fed-SP-SC / Fed-DP-CoT - answers pooled over other users' wordings of a question",
        paper="Liu, Pang, Fan, KSEM 2023, arXiv:2304.13911",
        cells=("3.3 Chain of Thoughts", "Table 3 [39]"),
        travels="up: redacted questions that users agreed to share; down: the questions asked, then their answers",
        claim="Voting over synonymous questions answers 14 to 18 points more of them correctly than zero-shot chain of "
        "thought; demonstrations from similar questions 10 to 15 points more.",
        status="verified",
    )
    smallest: ClassVar[dict[str, Any]] = {"answer": "text", "max_tokens": 6, "share": "all", "block": 3}

    variant: Literal["sp-sc", "dp-cot"] = "sp-sc"
    """Vote over the same question in other words, or show similar questions as demonstrations."""
    similar: int = Field(5, ge=1)
    """Questions looked for per question asked: the votes with its own (sp-sc), or the demonstrations (dp-cot)."""
    samples: int = Field(1, ge=1)
    """Chains of thought per question; above 1 they are sampled and voted on (self-consistency)."""
    temperature: float = Field(0.7, gt=0, le=2)
    """Temperature of sampled chains."""
    least: float = Field(0.2, ge=0, le=1)
    """Smallest cosine similarity of a question that counts as alike."""
    paraphrase: bool = True
    """Let the model reword a question where too few users asked alike (sp-sc)."""
    answer: AnswerKind = "number"
    """What an answer is: the last number, an option letter, or a text."""
    options: int = Field(5, ge=2, le=26)
    """How many option letters there are."""
    share: Literal["opt-in", "all"] = "opt-in"
    """Whose questions may be shown: rows with a true column `consent`, or all of the bank."""
    redaction: bool = True
    """Take e-mail addresses, links and telephone numbers out of every question that leaves a client."""
    per_client: int = Field(1, ge=1)
    """Most questions of one client per question asked: 1 where a client is a user, more where it is an organisation."""
    questions: int | None = Field(None, ge=1)
    """Most questions each client asks; all of its held-out rows where null."""
    block: int = Field(16, ge=1)
    """Questions between two checkpoints."""
    max_tokens: int = Field(256, ge=1)
    """Most tokens of a chain of thought."""
    asking: Asking = Asking()  # pyright: ignore[reportCallIssue]
    """Who answers, and what it may cost."""

    # -- a client -----------------------------------------------------------------------------------------------------

    @on_client
    async def pose(self, client: Client, received: Received) -> Upload:
        """The questions this client asks: its held-out rows."""
        rows = client.rows("eval")[: self.questions]
        texts = (question_of(row)[:LONGEST] for row in rows)
        return Upload(None, texts=Texts(tuple(redact(text) if self.redaction else text for text in texts)))

    @on_client
    async def retrieve(self, client: Client, received: Received) -> Upload:
        """What of this client's bank is like the questions asked: nothing of the user who asks or without consent.

        `received` has the questions in `texts` and, in `own`, place -> row of those that this client asks itself.
        """
        asked, own = texts_of(received), received.numbers["own"]
        rows = [row for row in client.rows("train") if self.share == "all" or row.get("consent") is True]
        questions = [Question(question_of(row)[:LONGEST], _user(client, row)) for row in rows]
        bank = QuestionBank(questions, redact if self.redaction else None)
        users = {int(place): _user(client, client.rows("eval")[row]) for place, row in own.items()}
        found = [
            (place, match.text)
            for place, question in enumerate(asked)
            for match in bank.find(question, PARAMETERS[self.variant], self.per_client, self.least, users.get(place))
        ]
        return Upload(None, numbers={"places": [p for p, _ in found]}, texts=Texts(tuple(t for _, t in found)))

    @on_client
    async def grade(self, client: Client, received: Received) -> Upload:
        """Hold the answers to this client's own questions to its gold answers; only counts go back."""
        parse, rows = AnswerParser(self.answer, self.options), client.rows("eval")
        gold = [parse(answer_of(rows[row])) for row in received.numbers["row"]]
        known, metrics = float(sum(each is not None for each in gold)), {}
        for name in ("answer", "alone"):
            given = received.numbers[name]
            right = sum(g is not None and g == a for g, a in zip(gold, given, strict=True))
            metrics[name] = (float(right), known)
        return Upload(None, metrics=metrics)

    @on_client
    async def write(self, client: Client, received: Received) -> Upload:
        """At the server: the run's own model continues prompts."""
        return await continued(client, received)

    @on_client
    async def evaluate(self, client: Client, received: Received) -> Upload:
        """The loss of the run's own model, which nothing here changes."""
        report = await client.score(None)
        return Upload(None, weight=client.size, metrics=report.metrics)

    # -- the server ---------------------------------------------------------------------------------------------------

    def init(self, start: Tensors) -> State:
        """Nothing is trained."""
        return State({}, numbers={"questions": None, "found": [], "ledger": None})

    def source(self, server: Server) -> Source:
        """Who answers where no endpoint is given."""
        return RunModel(server, self.write)

    async def play(self, server: Server, state: State) -> tuple[State, Json]:
        """Collect the questions; answer them block by block; let those who asked grade the answers."""
        if state.numbers["questions"] is None:
            server.begin(1)
            state = _with(state, 0, questions=await self._collect(server))
        asked: list[Asked] = state.numbers["questions"]
        while (done := len(state.numbers["found"])) < len(asked):
            server.begin(state.round + 1)
            box = self.asking.box(self.source(server), state.numbers["ledger"])
            try:
                found = await self._answer(server, box, asked[done : done + self.block])
            except FedLLMError:  # what was paid for is counted, also where the run goes on later
                server.checkpoint(_with(state, state.round, ledger=box.ledger.to_json()))
                raise
            found = [*state.numbers["found"], *found]
            state = _with(state, state.round + 1, found=found, ledger=box.ledger.to_json())
            server.checkpoint(state)
        return state, await self._report(server, state)

    async def _collect(self, server: Server) -> list[Asked]:
        found: dict[str, list[Asked]] = {}
        async for answer in server.ask(self.pose, {client: Received() for client in server.clients}):
            texts = enumerate(texts_of(answer.upload))
            found[answer.client] = [[answer.client, row, text[:LONGEST]] for row, text in texts if text.strip()]
        if not any(found.values()):
            raise DataError(
                "No client asks a question.",
                "Questions are the held-out rows, in a column question, instruction, input or text.",
                action="Hold rows out (data.evaluation.fraction), or map a column.",
            )
        return [each for _, own in sorted(found.items()) for each in own]

    async def _answer(self, server: Server, box: BlackBox, asked: Sequence[Asked]) -> list[Json]:
        """Answer one block; a JSON line for each question."""
        parse = AnswerParser(self.answer, self.options)
        mind = Reasoner(box, parse, self.samples, self.temperature, self.max_tokens, self.asking.logprobs)
        banks = await self._pool(server, asked)
        questions = [text for _, _, text in asked]
        if self.variant == "dp-cot":
            found = await mind.by_example(questions, banks)
        else:
            found = await mind.by_vote(questions, banks, self.similar - 1 if self.paraphrase else 0)
        return [_line(each, outcome) for each, outcome in zip(asked, found, strict=True)]

    async def _pool(self, server: Server, asked: Sequence[Asked]) -> list[list[tuple[str, str]]]:
        """For each question what all banks hold of its kind, with a name for whose it is."""
        most, texts = self.similar - (self.variant == "sp-sc"), [text for _, _, text in asked]
        if not most:
            return [[] for _ in asked]
        payloads = {}
        for client in server.clients:
            own = {str(place): row for place, (who, row, _) in enumerate(asked) if who == client}
            payloads[client] = Received(numbers={"own": own}, texts=Texts(tuple(texts)))
        replies = {}
        async for answer in server.ask(self.retrieve, payloads):
            given, places = texts_of(answer.upload), answer.upload.numbers.get("places")
            if well_formed(given, places, len(asked), self.per_client, LONGEST):
                replies[answer.client] = given, places
            else:
                server.reject(answer.client, "It gave questions in another form, or more than its share.")
        return pooled(texts, replies, PARAMETERS[self.variant], most, self.least)

    async def _report(self, server: Server, state: State) -> Json:
        lines, payloads = state.numbers["found"], {}
        for client in sorted({line["client"] for line in lines}):
            own = [line for line in lines if line["client"] == client]
            payloads[client] = Received(numbers={name: [x[name] for x in own] for name in ("row", "answer", "alone")})
        given = [answer.upload.metrics async for answer in server.ask(self.grade, payloads)]
        right = {name: sum(metrics[name][0] for metrics in given if name in metrics) for name in ("answer", "alone")}
        graded = sum(metrics["answer"][1] for metrics in given if "answer" in metrics)
        rates = {name: count / graded if graded else None for name, count in right.items()}
        answered = [line for line in lines if line["answer"] is not None]
        means = {name: fmean(line[name] for line in lines) for name in ("coverage", "retrieved", "paraphrased")}
        return {
            "questions": len(lines), "answered": len(answered), "graded": int(graded),
            "accuracy": rates["answer"], "accuracy alone": None if self.variant == "dp-cot" else rates["alone"],
            "share": fmean(line["share"] for line in answered) if answered else None, **means,
            "spent": state.numbers["ledger"], "answers": lines,
        }  # fmt: skip


def _user(client: Client, row: Mapping[str, Any]) -> str:
    """Whose row it is: its column `user`, else the client itself."""
    return str(row.get("user", client.id))


def _line(asked: Asked, found: Outcome) -> Json:
    """One answer as JSON; the question itself is not in it."""
    vote = found.vote
    line = {"client": asked[0], "row": asked[1], "answer": vote.answer, "share": vote.share, "coverage": vote.coverage}
    line |= {"votes": vote.weights, "reason": vote.reason, "alone": found.alone}
    return line | {"retrieved": found.retrieved, "paraphrased": found.paraphrased}


def _with(state: State, round: int, **numbers: Json) -> State:
    return State(state.params, state.memory, {**state.numbers, **numbers}, round)
