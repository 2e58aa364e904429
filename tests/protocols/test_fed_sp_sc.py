"""Fed-SP-SC - exact call counts, no gold answer at the server, banks that keep what is not agreed to, endpoints."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from fedllm.blocks.blackbox import Budget, Completion
from fedllm.core.errors import BudgetSpent, ConfigError, DataError
from fedllm.core.message import Texts, Upload
from fedllm.core.server import Server
from fedllm.core.settings import read
from fedllm.core.wire import decode, encode
from fedllm.data.federation import Federation
from fedllm.effects.fed_sp_sc import Scripted, ScriptedSPSC, accuracy, users
from fedllm.effects.rig import quadratic
from fedllm.engine.local import LocalEngine, LocalWorker
from fedllm.protocols.fed_sp_sc import FedSPSC
from fedllm.run import run
from fedllm.serve import Service
from tests.blocks.shared import shared_rows


class Seen:
    """An engine that keeps all bytes, and lets a test change replies."""

    def __init__(self, engine: Any) -> None:
        self.engine, self.down, self.up, self.change = engine, [], [], lambda op, reply: reply

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)

    async def ask(self, requests: Any, deadline: Any) -> Any:
        ops = {}

        def noted() -> Any:
            for request in requests:
                ops[request.id] = request.op
                self.down.append((request.op, request.client, request.body))
                yield request

        async for reply in self.engine.ask(noted(), deadline):
            reply = self.change(ops[reply.id], reply)
            self.up.append((ops[reply.id], reply.client, reply.body))
            yield reply


def play(federation: Federation, script: Any = None, state: Any = None, **options: Any) -> Any:
    """Play the protocol with a scripted model; returns report, script, engine, state, server."""
    learner: Any = quadratic()[0]
    protocol = ScriptedSPSC(**{"paraphrase": False, **options})
    worker = LocalWorker(learner, protocol, federation, 0)
    engine = Seen(LocalEngine(worker, federation.client_ids, 4))
    server: Any = Server(engine, 0)
    server.script = script or Scripted(0.7, False, 0)
    kept: list[Any] = []
    server.keep = kept.append
    engine.change = options.pop("change", engine.change)

    def go() -> Any:
        return asyncio.run(protocol.play(server, state or protocol.init({})))

    return go, server, engine, kept


def played(federation: Federation, script: Any = None, **options: Any) -> Any:
    go, server, engine, _ = play(federation, script, **options)
    state, report = go()
    return report, server.script, engine, state


# --- exact counts ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("votes", [1, 2, 5])
@pytest.mark.parametrize("samples", [1, 3])
def test_the_number_of_calls(votes: int, samples: int) -> None:
    """2 n per question with one chain, n J with more."""
    report, script = accuracy(votes, 0.7, False, 0, items=6, samples=samples)
    each = 2 * votes if samples == 1 else votes * samples
    assert len(script.asked) == report["spent"]["calls"] == 6 * each
    assert all(sum(line["votes"].values()) == pytest.approx(votes) for line in report["answers"])


def test_the_number_of_calls_with_demonstrations() -> None:
    """Every bank question is answered once, however often it is shown, and the question behind them."""
    federation = users(4, items=5)
    for samples, each in ((1, 2), (3, 3)):
        report, script, _, _ = played(federation, variant="dp-cot", similar=3, samples=samples, least=0.0)
        shown = {q.prompt for q in script.asked if q.prompt.count("Q: ") == 1 and "Therefore" not in q.prompt}
        assert report["spent"]["calls"] == len(script.asked) == each * (len(shown) + 5)
        assert all(line["retrieved"] == 3 for line in report["answers"])


def test_one_vote_is_zero_shot_chain_of_thought() -> None:
    for seed in range(3):
        report, _ = accuracy(1, 0.5, True, seed, items=40)
        assert report["accuracy"] == report["accuracy alone"]
        assert all(line["answer"] == line["alone"] for line in report["answers"])
    with_users, _ = accuracy(5, 0.5, True, 2, items=40)
    assert with_users["accuracy alone"] == report["accuracy"], "its own wording is asked first"


def test_accuracy_by_votes_follows_the_binomial() -> None:
    """p = .70: .84 with 3 votes, .95 with 5 (the card's table); 20 votes at p = .40: .92."""
    assert accuracy(3, 0.7, False, 0)[0]["accuracy"] == pytest.approx(0.84, abs=0.06)
    assert accuracy(5, 0.7, False, 0)[0]["accuracy"] == pytest.approx(0.95, abs=0.04)
    assert accuracy(20, 0.4, False, 0, items=120)[0]["accuracy"] == pytest.approx(0.92, abs=0.07)


# --- what leaves a client --------------------------------------------------------------------------------------------


def rows(user: str, **more: Any) -> dict[str, Any]:
    return {"question": f"{user} wants the sum of 12 and 30", "answer": "#### 42", "user": user, **more}


def test_nothing_is_shared_without_consent() -> None:
    bank = {"train": [rows("bea"), rows("cyd", consent=False), rows("dan", consent="yes")], "eval": []}
    federation = Federation.of({"a": {"train": [], "eval": [rows("ann")]}, "b": bank})
    report, _, engine, _ = played(federation, per_client=5)
    assert report["retrieved"] == 0 and report["answered"] == 1
    assert not any(b"bea" in body or b"cyd" in body for _, _, body in engine.up)
    report, _, engine, _ = played(federation, per_client=5, share="all")
    assert report["retrieved"] == 3
    bank["train"][0]["consent"] = True
    assert played(federation, per_client=5)[0]["retrieved"] == 1


def test_gold_answers_and_users_never_leave_a_client() -> None:
    """The gold answer is a number that no question holds; users have names that no question holds."""
    asked = {"question": "Add 12 and 30", "answer": "#### 987654", "user": "private-ann", "consent": True}
    other = {"question": "Sum up 12 and 30", "answer": "#### 987654", "user": "private-bea", "consent": True}
    federation = Federation.of({c: {"train": [r], "eval": [r]} for c, r in (("a", asked), ("b", other))})
    for variant in ("sp-sc", "dp-cot"):
        _, script, engine, state = played(federation, variant=variant)
        everything = [body for _, _, body in (*engine.up, *engine.down)] + [q.prompt.encode() for q in script.asked]
        assert not any(b"987654" in body or b"private-" in body for body in everything)
        assert "987654" not in json.dumps(state.numbers)


def test_questions_are_redacted_on_both_ways() -> None:
    federation = Federation.of(
        {c: {"train": [rows("u", question=f"{c}@mail.org adds 12 and 30 ", consent=True)],
             "eval": [rows("v", question=f"v{c}@mail.org: add up 12 and 30")]} for c in "ab"}
    )  # fmt: skip
    for redaction, expected in ((True, False), (False, True)):
        _, script, engine, _ = played(federation, redaction=redaction)
        sent = any(b"@mail.org" in body for _, _, body in engine.up)
        assert sent == expected and any("@mail" in q.prompt for q in script.asked) == expected


def test_one_question_of_each_user_and_none_of_who_asks() -> None:
    bank = [rows("bea", consent=True), rows("bea", consent=True, question="bea again: sum of 12 and 30"),
            rows("cyd", consent=True), rows("ann", consent=True, question="ann too: sum of 12 and 30")]  # fmt: skip
    federation = Federation.of({"org": {"train": bank, "eval": [rows("ann")]}})
    report, script, _, _ = played(federation, per_client=9, similar=9)
    assert report["retrieved"] == 2
    assert not any("ann too" in q.prompt or "bea again" in q.prompt for q in script.asked)
    assert played(federation, per_client=1, similar=9)[0]["retrieved"] == 1


def test_other_numbers_never_vote_and_are_the_only_demonstrations() -> None:
    bank = [rows("bea", consent=True), rows("cyd", consent=True, question="cyd wants the sum of 13 and 30")]
    federation = Federation.of({"a": {"train": [], "eval": [rows("ann")]}, "b": {"train": bank, "eval": []}})
    _, script, _, _ = played(federation, per_client=5)
    assert not any("13" in q.prompt for q in script.asked)
    _, script, _, _ = played(federation, per_client=5, variant="dp-cot")
    last = [q.prompt for q in script.asked if q.prompt.count("Q: ") == 2]
    assert last and all(p.startswith("The examples below") and "13 and 30" in p and "bea" not in p for p in last)


def test_demonstrations_never_hold_the_question_itself() -> None:
    federation = users(4, items=5)
    _, script, _, _ = played(federation, variant="dp-cot", similar=3, least=0.0)
    for prompt in (q.prompt for q in script.asked if q.prompt.count("Q: ") > 1):
        *shown, asked = prompt.split("Q: ")[1:]
        sums = [part.partition("sum of ")[2].partition("\n")[0] for part in shown]
        assert asked.partition("sum of ")[2].partition("\n")[0] not in sums and len(sums) == 3


# --- banks that cheat ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cheat", ["stuffed", "numbers", "places", "long", "no texts"])
def test_a_bank_that_cheats_is_refused_or_left_out(cheat: str) -> None:
    federation = users(4, items=3)

    def change(op: str, reply: Any) -> Any:
        if op != "retrieve" or reply.client != "user-01":
            return reply
        upload = decode(reply.body)
        assert isinstance(upload, Upload)
        texts, places = [f"Sybil {i}: the sum of 100 and 1000" for i in range(6)], [0] * 6
        if cheat == "numbers":
            texts, places = ["Please take the sum of 666 and 1000"], [0]
        elif cheat == "places":
            texts, places = texts[:1], [99]
        elif cheat == "long":
            texts, places = ["the sum of 100 and 1000 " * 999], [0]
        upload.numbers["places"] = places
        upload.parts = {} if cheat == "no texts" else {"texts": Texts(tuple(texts))}
        return dataclasses.replace(reply, body=encode(upload))

    go, server, engine, _ = play(federation, similar=4)
    engine.change = change
    _, report = go()
    assert report["retrieved"] == 2.0
    assert not any("Sybil" in q.prompt or "666" in q.prompt for q in server.script.asked)


def test_clients_that_are_silent_are_missed_and_no_more() -> None:
    go, _, engine, _ = play(users(4, items=3), similar=4)
    engine.change = lambda op, r: dataclasses.replace(r, body=None, error="off") if r.client == "user-02" else r
    _, report = go()
    assert report["answered"] == 3 and report["retrieved"] == 2.0


# --- paraphrases, abstentions ----------------------------------------------------------------------------------------


class Rewording(Scripted):
    def answer(self, query: Any) -> str:
        if not query.prompt.startswith("Rewrite"):
            return super().answer(query)
        good = "In other words: the sum of 100 and 1000\nand more"
        return ["sum of 7 and 1000", good, good, "Please work out the sum of 100 and 1000"][query.sample]


def test_paraphrases_fill_up_where_they_keep_the_numbers() -> None:
    """Of four rewordings one changes a number, two are alike, one is the question: one is left."""
    report, _, _, _ = played(users(1, items=1), Rewording(1.0, False, 0), paraphrase=True, similar=5)
    line = report["answers"][0]
    assert (line["retrieved"], line["paraphrased"]) == (0, 1) and report["spent"]["calls"] == 4 + 2 * 2
    assert line["answer"] == "1100" and line["votes"] == {"1100": 2.0}


class Silent(Scripted):
    def answer(self, query: Any) -> str:
        return "I do not know."


def test_nobody_knows() -> None:
    report, _, _, _ = played(users(3, items=2), Silent(1.0, False, 0))
    assert report["answered"] == 0 and report["accuracy"] == 0.0 and report["share"] is None
    assert report["coverage"] == 0 and report["answers"][0]["reason"] == "No text held an answer."


class Certain(Scripted):
    """Says so how sure it is: the wrong answer, asked first, with little."""

    def __call__(self, queries: Any) -> list[Completion]:
        self.asked += queries
        return [Completion("1", (-5.0,)) if "Please" in q.prompt else Completion("1100", (-0.1,)) for q in queries]


def test_log_probabilities_decide_ties_where_they_are_asked_for() -> None:
    report, _, _, _ = played(users(2, items=1), Certain(1.0, False, 0), asking={"logprobs": True})
    assert report["answers"][0]["answer"] == "1100" and "log-probability" in report["answers"][0]["reason"]


def test_no_question_is_asked() -> None:
    with pytest.raises(DataError, match="No client asks a question"):
        played(Federation.of({"a": {"train": [rows("ann")], "eval": []}}))


# --- budgets, checkpoints --------------------------------------------------------------------------------------------


def test_a_budget_ends_it_before_and_it_goes_on_from_there() -> None:
    federation, options = users(2, items=6), {"similar": 2, "block": 2}
    whole, *_ = played(federation, **options)
    go, server, _, kept = play(federation, **options, asking={"budget": Budget(calls=12)})
    with pytest.raises(BudgetSpent):
        go()
    assert len(server.script.asked) == 12 and kept[-1].numbers["ledger"]["calls"] == 12
    assert len(kept[-1].numbers["found"]) == 2, "the second block was paid in part"
    go, server, engine, _ = play(federation, state=kept[-1], **options)
    state, report = go()
    assert report["answers"] == whole["answers"] and state.round == 3
    assert not any(op == "pose" for op, _, _ in engine.down), "questions are collected once"
    assert report["spent"]["calls"] == 12 + 4 * 4


@pytest.mark.parametrize("block", [1, 4, 99])
def test_blocks_change_no_answer(block: int) -> None:
    federation = users(3, items=5)
    report, _, _, state = played(federation, similar=3, block=block)
    assert report["answers"] == played(federation, similar=3, block=5)[0]["answers"]
    assert state.round == -(-5 // block)


# --- real text, real servers -----------------------------------------------------------------------------------------


def reworded(question: str, user: int) -> str:
    lead = ["", "Here is a puzzle. ", "My sister asked me this: ", "Please help me. "][user]
    return lead + (question.replace("How many", "What number of") if user == 2 else question) + " Thanks!" * (user == 3)


class Knows(Scripted):
    """Right for three wordings in four: knows the questions of GSM8K by their numbers."""

    def __init__(self, facts: dict[str, str]) -> None:
        super().__init__(1.0, False, 0)
        self.facts = facts

    def answer(self, query: Any) -> str:
        known = next((gold for text, gold in self.facts.items() if text in query.prompt), None)
        return f"so #### {known}" if known and "Please help" not in query.prompt else "#### -1"


def test_gsm8k_in_the_words_of_four_users() -> None:
    facts = [(r["question"], r["answer"].rpartition("#### ")[2]) for r in shared_rows("gsm8k-test.jsonl.gz")[:40]]
    clients = {}
    for user in range(4):
        own = [{"question": reworded(q, user), "answer": f"#### {gold}", "consent": True} for q, gold in facts]
        clients[f"u{user}"] = {"train": own, "eval": own[:12] if user == 3 else []}
    keys = {text: gold for text, gold in facts if "How many" not in text}
    report, _, _, _ = played(Federation.of(clients), Knows({**keys, **{t[:30]: g for t, g in facts}}), similar=4)
    assert report["retrieved"] == pytest.approx(3.0, abs=0.2), "three other users asked the same"
    assert report["accuracy"] == 1.0 and report["accuracy alone"] == 0.0
    assert report["graded"] == 12


def test_bbh_options_are_voted_on_as_letters() -> None:
    found = [r for r in shared_rows("bbh.jsonl.gz") if r["task"] == "penguins_in_a_table"][:6]
    eval_rows = [{"input": r["input"], "target": r["target"]} for r in found]
    script = Knows({r["input"][:2000]: "0" for r in found})
    script.answer = lambda query: next((r["target"] for r in found if r["input"] in query.prompt), "no")  # type: ignore[method-assign]
    report, _, _, _ = played(Federation.of({"a": {"train": [], "eval": eval_rows}}), script, answer="option")
    assert report["graded"] == 6 and report["accuracy"] == 1.0 and report["coverage"] == 1.0


def test_through_a_real_server_with_the_bundled_model(tmp_path: Path) -> None:
    """The whole way: recipe, banks, HTTP, votes, report. The small model cannot add; only the flow is checked."""
    clients = {
        f"u{k}": {"train": [{"instruction": f"{o} copy the number 4821 for me", "response": "4821", "consent": True}],
                  "eval": [{"instruction": f"{o} copy the number 4821", "response": "4821"}]}
        for k, o in enumerate(("Please", "Now", "Do"))
    }  # fmt: skip
    with Service("fedllm-tiny") as service:
        method = {
            "name": "fed-sp-sc", "similar": 3, "max_tokens": 12, "paraphrase": False,
            "asking": {
                "endpoint": {"url": service.url, "model": "fedllm-tiny", "chat": False},
                "logprobs": True, "cache": str(tmp_path / "cache.sqlite"), "budget": {"calls": 100},
            },
        }  # fmt: skip
        recipe = {"name": "s", "method": method, "model": {"name": "toy:llama"}, "evaluation": {"against": []}}
        first = run(recipe, data=clients, folder=tmp_path / "a")
        asked = service.requests
        again = run(recipe, data=clients, folder=tmp_path / "b")
    report = json.loads((tmp_path / "a/federated-report.json").read_text())
    spent = report["spent"]
    assert first.finished and report["questions"] == 3 and report["retrieved"] == 2.0
    assert spent["calls"] + spent["cached"] == 3 * 3 * 2 and spent["calls"] == asked and spent["unmetered"] == 0
    assert service.requests == asked and again.finished, "the second run paid nothing"
    later = json.loads((tmp_path / "b/federated-report.json").read_text())
    assert later["answers"] == report["answers"] and later["spent"]["calls"] == 0


def test_options_that_are_refused() -> None:
    cases: list[tuple[Any, str]] = [
        ({"variant": "sp"}, "variant"),
        ({"similar": 0}, "similar"),
        ({"asking": {"calls": 3}}, "calls"),
        ({"asking": {"endpoint": {"url": "x"}}}, "model"),
    ]
    for options, says in cases:
        with pytest.raises(ConfigError, match=says):
            read(FedSPSC, options, "method")
