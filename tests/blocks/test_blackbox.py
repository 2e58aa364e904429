"""Black box - counted to the call, cached, retried, stopped before its budget, never differentiated."""

from __future__ import annotations

import asyncio
import json
import os
import stat
import threading
import time
from collections.abc import Sequence
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

from fedllm.blocks.blackbox import BlackBox, Budget, Busy, Completion, Forward, Function, Ledger, Patience, Query
from fedllm.blocks.endpoint import Endpoint, EndpointSettings
from fedllm.core.errors import BudgetSpent, ConfigError, ModelError, RunError


class Scripted:
    """Answers from a function of the query; remembers what it was asked."""

    name, batch = "scripted", 1

    def __init__(self, answer: Any, batch: int | None = 1) -> None:
        self.answer, self.batch, self.asked, self.lock = answer, batch, [], threading.Lock()

    def __call__(self, queries: Sequence[Query]) -> list[Completion]:
        with self.lock:
            self.asked += list(queries)
        return [self.answer(query) for query in queries]


def echo(query: Query) -> Completion:
    return Completion(query.prompt.upper(), None, 3, 2, "stop")


QUICK = Patience(tries=3, first=0.001, longest=1.0)


def test_answers_come_in_the_order_asked_and_are_counted() -> None:
    box = BlackBox(Scripted(echo), parallel=3)
    found = box.ask_now([Query(text) for text in "abcdef"])
    assert [each.text for each in found] == list("ABCDEF")
    assert box.ledger.to_json() == {
        "calls": 6, "prompt_tokens": 18, "completion_tokens": 12, "unmetered": 0, "retries": 0,
        "cached": 0, "cost": 0.0,
    }  # fmt: skip


@pytest.mark.parametrize("batch", [1, 2, None])
def test_the_same_query_is_paid_once(batch: int | None) -> None:
    source = Scripted(echo, batch)
    box = BlackBox(source)
    found = box.ask_now([Query("a"), Query("b"), Query("a"), Query("a", sample=1)])
    assert [each.text for each in found] == ["A", "B", "A", "A"]
    assert len(source.asked) == box.ledger.calls == 3 and box.ledger.cached == 1
    box.ask_now([Query("b"), Query("a")])
    assert box.ledger.calls == 3 and box.ledger.cached == 3


@pytest.mark.parametrize(
    "other",
    [Query("a", max_tokens=3), Query("a", temperature=0.5), Query("a", stop=("x",)), Query("a", system="s"),
     Query("a", logprobs=True), Query("a", continuation="b"), Query("a", sample=1)],
)  # fmt: skip
def test_the_cache_is_keyed_by_the_full_request(other: Query) -> None:
    box = BlackBox(Scripted(echo))
    assert box.key(other) != box.key(Query("a"))
    assert box.key(Query("a")) == BlackBox(Scripted(echo)).key(Query("a"))
    renamed = Scripted(echo)
    renamed.name = "another"
    assert box.key(Query("a")) != BlackBox(renamed).key(Query("a"))


def test_a_file_keeps_answers_for_the_next_run_and_holds_no_question(tmp_path: Path) -> None:
    file, answer = tmp_path / "deep" / "cache.sqlite", Completion("fine", (-0.1, float("-inf")), 1, 2, "stop")
    first = BlackBox(Scripted(lambda _: answer), cache=file)
    first.ask_now([Query("a private question")])
    assert stat.S_IMODE(os.stat(file).st_mode) == 0o600
    assert b"private question" not in file.read_bytes()
    again = BlackBox(Scripted(lambda _: pytest.fail("asked again")), cache=file)
    assert again.ask_now([Query("a private question")]) == [answer]
    assert again.ledger.calls == 0 and again.ledger.cached == 1
    (tmp_path / "torn").write_bytes(b"this is no database, but long enough to be read as one" * 50)
    with pytest.raises(RunError, match="cannot be used"):
        BlackBox(Scripted(echo), cache=tmp_path / "torn")


@pytest.mark.parametrize("parallel", [1, 4])
@pytest.mark.parametrize("batch", [1, None])
def test_the_budget_of_calls_stops_before_it_is_passed(parallel: int, batch: int | None) -> None:
    source = Scripted(echo, batch)
    box = BlackBox(source, Budget(calls=5), parallel=parallel)
    with pytest.raises(BudgetSpent, match=r"budget\.calls"):
        box.ask_now([Query(str(number)) for number in range(9)])
    assert len(source.asked) == box.ledger.calls == 5
    assert box.ask_now([source.asked[0]])[0].text == source.asked[0].prompt  # what was paid for is kept
    found, spent = asyncio.run(box.ask_some([source.asked[1], Query("new")]))
    assert found[0] is not None and found[1] is None and isinstance(spent, BudgetSpent)


def test_the_budget_of_tokens_counts_the_worst_case_first() -> None:
    """Bound = bytes + 64 + max_tokens; what was really used is counted afterwards."""
    query = Query("x" * 36, max_tokens=100)
    assert query.prompt_bound == 100 and query.completion_bound == 100
    source = Scripted(lambda _: Completion("y", None, 40, 10))
    box = BlackBox(source, Budget(tokens=249), parallel=1)
    box.ask_now([query])
    assert box.ledger.tokens == 50  # 249 - 50 < 200: the next could pass it
    with pytest.raises(BudgetSpent, match=r"tokens to 250.*Allowed: 249; spent so far: 50"):
        box.ask_now([Query("z" * 36, max_tokens=100)])
    assert len(source.asked) == 1


def test_the_budget_of_cost() -> None:
    budget = Budget(cost=0.01, prompt_price=10.0, completion_price=30.0)
    box = BlackBox(Scripted(lambda _: Completion("y", None, 100, 100)), budget, parallel=1)
    with pytest.raises(BudgetSpent, match="cost"):
        box.ask_now([Query(f"{n:036d}", max_tokens=100) for n in range(9)])
    assert box.ledger.calls == 2 and box.ledger.cost == pytest.approx(0.008)
    with pytest.raises(ConfigError, match="without prices"):
        Ledger(Budget(cost=1.0))


def test_what_a_source_does_not_say_is_never_counted_as_nothing() -> None:
    box = BlackBox(Function("local", str.upper))
    query = Query("abc", max_tokens=7)
    assert box.ask_now([query])[0].text == "ABC"
    assert box.ledger.unmetered == 1
    assert (box.ledger.prompt_tokens, box.ledger.completion_tokens) == (query.prompt_bound, 7)


def test_the_ledger_goes_on_where_it_was() -> None:
    box = BlackBox(Scripted(echo), Budget(calls=3))
    box.ask_now([Query("a"), Query("b")])
    later = BlackBox(Scripted(echo), Budget(calls=3), spent=json.loads(json.dumps(box.ledger.to_json())))
    with pytest.raises(BudgetSpent):
        later.ask_now([Query("c"), Query("d")])
    assert later.ledger.calls == 3


def test_a_busy_source_is_asked_again() -> None:
    left = [Busy("HTTP 429"), Busy("HTTP 503")]

    def answer(query: Query) -> Completion:
        if left:
            raise left.pop()
        return echo(query)

    box = BlackBox(Scripted(answer), Budget(calls=1), patience=QUICK)
    assert box.ask_now([Query("a")])[0].text == "A"
    assert box.ledger.calls == 1 and box.ledger.retries == 2


def test_a_time_out_may_have_to_be_paid_and_is_counted() -> None:
    def answer(query: Query) -> Completion:
        raise Busy("no answer within 1 s", charged=True)

    box = BlackBox(Scripted(answer), Budget(calls=2), patience=QUICK)
    with pytest.raises(BudgetSpent):
        box.ask_now([Query("a")])
    assert box.ledger.calls == 2 and box.ledger.unmetered == 2
    patient = BlackBox(Scripted(answer), patience=QUICK)
    with pytest.raises(ModelError, match="did not answer in 3 tries: no answer within 1 s"):
        patient.ask_now([Query("a")])
    assert patient.ledger.calls == 3


def test_waits_grow_and_what_the_source_says_goes_before() -> None:
    patience = Patience(first=1.0, longest=60.0)
    waits = [patience.wait(n, None, "0000") for n in range(8)]
    assert waits == [1, 2, 4, 8, 16, 32, 60, 60]
    assert 1.0 < patience.wait(0, None, "ffff") < 1.25  # spread by the query, not by a random stream
    assert patience.wait(3, 7.0, "0000") == 7.0

    def answer(query: Query) -> Completion:
        raise Busy("HTTP 429", after=3600.0)

    begun = time.monotonic()
    with pytest.raises(ModelError, match="asks to wait 3600 s"):
        BlackBox(Scripted(answer), patience=QUICK).ask_now([Query("a")])
    assert time.monotonic() - begun < 1


def test_no_more_calls_at_once_than_allowed() -> None:
    inside, most, lock = [0], [0], threading.Lock()

    def answer(query: Query) -> Completion:
        with lock:
            inside[0] += 1
            most[0] = max(most[0], inside[0])
        time.sleep(0.01)
        with lock:
            inside[0] -= 1
        return echo(query)

    BlackBox(Scripted(answer), parallel=3).ask_now([Query(str(n)) for n in range(12)])
    assert most[0] == 3
    with pytest.raises(ConfigError, match="parallel=0"):
        BlackBox(Scripted(answer), parallel=0)


def test_one_failure_loses_none_of_the_answers_paid_for() -> None:
    def answer(query: Query) -> Completion:
        if query.prompt == "bad":
            raise ModelError("The endpoint refused.")
        return echo(query)

    box = BlackBox(Scripted(answer), Budget(calls=4))
    with pytest.raises(ModelError, match="refused"):
        box.ask_now([Query("a"), Query("bad"), Query("b")])
    box.ask_now([Query("a"), Query("b")])
    assert box.ledger.calls == 2 and box.ledger.cached == 2
    assert len(box.ask_now([Query("c"), Query("d")])) == 2  # what the failed query had set aside is free again


def test_an_async_source_with_many_at_once() -> None:
    class Async:
        name, batch = "async", None

        async def __call__(self, queries: Sequence[Query]) -> list[Completion]:
            await asyncio.sleep(0)
            return [echo(query) for query in queries]

    assert [c.text for c in BlackBox(Async()).ask_now([Query("a"), Query("b")])] == ["A", "B"]

    class Short(Async):
        async def __call__(self, queries: Sequence[Query]) -> list[Completion]:
            return []

    with pytest.raises(ModelError, match="0 answers to 2 queries"):
        BlackBox(Short()).ask_now([Query("a"), Query("b")])


def test_no_gradients_ever() -> None:
    seen = []
    box = BlackBox(Function("f", lambda text: seen.append(torch.is_grad_enabled()) or text))
    box.ask_now([Query("a")])
    assert seen == [False]
    with pytest.raises(ConfigError, match="gives no gradient"):
        box.gradient(torch.ones(1))
    weight = torch.ones(2, requires_grad=True)
    forward = Forward(lambda x: x @ weight, Budget(calls=5))
    out = forward(torch.ones(3, 2))
    assert not out.requires_grad and out.grad_fn is None and forward.ledger.calls == 3
    with pytest.raises(ConfigError, match="asks for one"):
        forward(torch.ones(1, 2, requires_grad=True))
    with pytest.raises(BudgetSpent):
        forward(torch.ones(3, 2))
    assert forward.ledger.calls == 3 and forward(torch.ones(2, 2)).shape == (2,)


@pytest.mark.parametrize("options", [{"max_tokens": 0}, {"temperature": -1.0}, {"temperature": float("nan")},
                                     {"continuation": ""}])  # fmt: skip
def test_queries_that_cannot_be_asked(options: Any) -> None:
    with pytest.raises(ConfigError):
        Query("a", **options)


def test_a_log_probability_that_is_not_finite_is_unknown() -> None:
    assert Completion("a", (-0.5, -0.25)).logprob == -0.75
    assert Completion("a").logprob is None
    assert Completion("a", (-0.5, float("nan"))).logprob is None


# --- the endpoint, against a server that behaves badly on purpose -----------------------------------------------------


class Mean(BaseHTTPRequestHandler):
    """Answers with what the test wrote down."""

    plan: list[tuple[int, dict[str, str], bytes]]
    seen: list[tuple[str, dict[str, str], dict[str, Any]]]

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.seen.append((self.path, dict(self.headers), body))
        status, headers, data = self.plan.pop(0)
        if status == 0:
            time.sleep(0.5)
            return
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def mean() -> Any:
    handler = type("Planned", (Mean,), {"plan": [], "seen": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    handler.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    yield handler
    server.shutdown()
    server.server_close()


def good(text: str = "hello", **more: Any) -> tuple[int, dict[str, str], bytes]:
    choice = {"message": {"role": "assistant", "content": text}, "finish_reason": "stop", **more}
    usage = {"prompt_tokens": 5, "completion_tokens": 2}
    return 200, {}, json.dumps({"choices": [choice], "usage": usage}).encode()


def endpoint(mean: Any, **options: Any) -> Endpoint:
    return Endpoint(EndpointSettings(**{"url": mean.url, "model": "m", "timeout": 0.2, **options}))


def test_a_chat_request_and_its_answer(mean: Any, monkeypatch: Any) -> None:
    monkeypatch.setenv("SOME_KEY", "secret-1")
    logprobs = {"content": [{"token": "he", "logprob": -0.5}, {"token": "llo", "logprob": -0.25}]}
    mean.plan.append(good(logprobs=logprobs))
    query = Query("hi", "be kind", 9, 0.7, ("END",), 4, True)
    (found,) = endpoint(mean, key_env="SOME_KEY", length_field="max_completion_tokens")([query])
    assert found == Completion("hello", (-0.5, -0.25), 5, 2, "stop") and found.logprob == -0.75
    path, headers, body = mean.seen[0]
    assert path == "/v1/chat/completions" and headers["Authorization"] == "Bearer secret-1"
    assert body == {
        "model": "m", "temperature": 0.7, "stop": ["END"], "seed": 4, "max_completion_tokens": 9, "logprobs": True,
        "messages": [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hi"}],
    }  # fmt: skip


def test_busy_then_good_with_the_wait_it_asked_for(mean: Any) -> None:
    mean.plan += [(429, {"Retry-After": "0.3"}, b"{}"), (503, {}, b"down"), (0, {}, b""), good()]
    box = BlackBox(endpoint(mean), patience=Patience(tries=4, first=0.01, longest=1))
    begun = time.monotonic()
    assert box.ask_now([Query("a")])[0].text == "hello"
    assert time.monotonic() - begun > 0.3
    assert box.ledger.retries == 3 and box.ledger.calls == 2 and box.ledger.unmetered == 1  # the time-out counts


def test_retry_after_as_a_date(mean: Any) -> None:
    mean.plan.append((429, {"Retry-After": formatdate(time.time() + 3600, usegmt=True)}, b"{}"))
    with pytest.raises(ModelError, match=r"asks to wait 3[56]\d\d"):
        BlackBox(endpoint(mean), patience=QUICK).ask_now([Query("a")])


@pytest.mark.parametrize(
    ("status", "body", "says"),
    [(401, {"error": {"message": "Incorrect API key provided: secret-1"}}, "Put a valid key into .* SOME_KEY"),
     (404, {"error": {"message": "no model m"}}, "Check the endpoint's url and model"),
     (400, {"error": {"message": "too long"}}, "too long"),
     (429, {"error": {"message": "x", "code": "insufficient_quota"}}, "HTTP 429"),
     (302, {}, "HTTP 302")],
)  # fmt: skip
def test_a_refusal_is_told_at_once_and_the_key_is_not(
    mean: Any, monkeypatch: Any, status: int, body: Any, says: str
) -> None:
    monkeypatch.setenv("SOME_KEY", "secret-1")
    elsewhere = {"Location": "http://127.0.0.1:9/v1"} if status == 302 else {}
    mean.plan.append((status, elsewhere, json.dumps(body).encode()))
    with pytest.raises(ModelError, match=says) as caught:
        BlackBox(endpoint(mean, key_env="SOME_KEY"), patience=QUICK).ask_now([Query("a")])
    assert "secret-1" not in str(caught.value) and len(mean.seen) == 1


@pytest.mark.parametrize("data", [b"<html>", b"[]", b'{"choices": []}', b'{"choices": [{"text": "a"}]}', b"null"])
def test_an_answer_of_another_form(mean: Any, data: bytes) -> None:
    mean.plan.append((200, {}, data))
    with pytest.raises(ModelError, match=r"no JSON|not the form"):
        BlackBox(endpoint(mean)).ask_now([Query("a")])


def test_a_score_takes_the_tokens_of_the_continuation(mean: Any) -> None:
    given = {"tokens": ["ab", " c", "d"], "token_logprobs": [None, -1.0, -2.0], "text_offset": [0, 2, 4]}
    answer = {"choices": [{"text": "ab cd", "logprobs": given}], "usage": {"prompt_tokens": 3, "completion_tokens": 0}}
    mean.plan.append((200, {}, json.dumps(answer).encode()))
    source = endpoint(mean, chat=False)
    (found,) = source([Query("ab", continuation=" cd")])
    assert found.logprobs == (-1.0, -2.0) and found.logprob == -3.0
    body = mean.seen[0][2]
    assert (body["prompt"], body["max_tokens"], body["echo"]) == ("ab cd", 0, True)
    with pytest.raises(ConfigError, match="chat=false"):
        endpoint(mean)([Query("ab", continuation=" cd")])


@pytest.mark.parametrize(
    ("options", "says"),
    [({"url": "ftp://x/v1"}, "cannot be used"), ({"url": "api.example.org/v1"}, "cannot be used"),
     ({"url": "https://user:pass@example.org/v1"}, "cannot be used"),
     ({"url": "https://example.org/v1", "key_env": "NOT_SET_ANYWHERE"}, "NOT_SET_ANYWHERE holds no usable key"),
     ({"url": "http://example.org/v1", "key_env": "SOME_KEY"}, "plain http")],
)  # fmt: skip
def test_settings_that_are_refused(monkeypatch: Any, options: Any, says: str) -> None:
    monkeypatch.setenv("SOME_KEY", "secret-1")
    with pytest.raises(ConfigError, match=says) as caught:
        Endpoint(EndpointSettings(model="m", **options))
    assert "pass" not in str(caught.value).replace("password", "") and "secret-1" not in str(caught.value)


def test_nobody_listens() -> None:
    source = Endpoint(EndpointSettings(url="http://127.0.0.1:9/v1", model="m"))
    with pytest.raises(ModelError, match="connection was refused"):
        BlackBox(source, patience=QUICK).ask_now([Query("a")])
