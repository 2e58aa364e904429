"""Serve - a real server over the bundled model, asked over real sockets."""

from __future__ import annotations

import http.client
import json
import urllib.parse
from typing import Any

import pytest
import torch

from fedllm.blocks.blackbox import BlackBox, Query
from fedllm.blocks.endpoint import Endpoint, EndpointSettings
from fedllm.core.errors import ConfigError, ModelError
from fedllm.models.load import load_model
from fedllm.models.settings import ModelSettings
from fedllm.serve import Service, Writer

COPY = "### Instruction:\nRepeat this.\nQK-4821\n\n### Response:\n"


@pytest.fixture(scope="module")
def service() -> Any:
    torch.set_num_threads(1)
    with Service(ModelSettings(name="fedllm-tiny", device="cpu")) as found:
        yield found


def ask(
    service: Service, path: str, body: Any = None, headers: dict[str, str] | None = None, method: str | None = None
) -> tuple[int, Any]:
    place = urllib.parse.urlsplit(service.url)
    connection = http.client.HTTPConnection(place.hostname or "", place.port, timeout=30)
    data = body if body is None or isinstance(body, bytes | str) else json.dumps(body)
    connection.request(method or ("GET" if body is None else "POST"), path, data, headers or {})
    reply = connection.getresponse()
    found = reply.status, json.loads(reply.read())
    connection.close()
    return found


def test_models(service: Service) -> None:
    status, found = ask(service, "/v1/models")
    assert status == 200 and [model["id"] for model in found["data"]] == ["fedllm-tiny"]


def test_a_completion_with_its_tokens_counted(service: Service) -> None:
    body = {"model": "fedllm-tiny", "prompt": COPY, "max_tokens": 16, "temperature": 0, "logprobs": 1}
    status, found = ask(service, "/v1/completions", body)
    choice = found["choices"][0]
    assert status == 200 and choice["text"] == "QK-4821" and choice["finish_reason"] == "stop"
    written = len(choice["logprobs"]["token_logprobs"])
    prompt = len(service.writer.encode(COPY))
    total = {"prompt_tokens": prompt, "completion_tokens": written, "total_tokens": prompt + written}
    assert found["usage"] == total
    assert all(value <= 0 for value in choice["logprobs"]["token_logprobs"])
    cut = ask(service, "/v1/completions", {**body, "max_tokens": 2, "logprobs": None})[1]["choices"][0]
    assert cut["finish_reason"] == "length" and "QK-4821".startswith(cut["text"]) and cut["logprobs"] is None
    stopped = ask(service, "/v1/completions", {**body, "stop": ["48"]})[1]["choices"][0]
    assert stopped["text"] == "QK-" and stopped["finish_reason"] == "stop"


def test_what_is_written_is_what_the_library_writes(service: Service) -> None:
    ids = service.writer.encode(COPY)
    model: Any = service.writer.model
    made = model.generate(torch.tensor([ids]), max_new_tokens=16, do_sample=False)[0, len(ids) :].tolist()
    assert service.writer.write(ids, 16).tokens == made


def test_scores_equal_what_writing_reports(service: Service) -> None:
    box = BlackBox(Endpoint(EndpointSettings(url=service.url, model="fedllm-tiny", chat=False)))
    written, scored = box.ask_now([Query(COPY, max_tokens=16, logprobs=True), Query(COPY, continuation="QK-4821")])
    assert written.logprobs is not None and scored.logprobs is not None
    assert written.logprobs[:-1] == pytest.approx(scored.logprobs, abs=1e-4)
    wrong = box.ask_now([Query(COPY, continuation="QX-4821")])[0]
    assert wrong.logprob is not None and scored.logprob is not None and wrong.logprob < scored.logprob - 5
    assert service.writer([Query(COPY, continuation="QK-4821")])[0].logprobs == pytest.approx(scored.logprobs, abs=1e-5)
    assert box.ledger.calls == 3 and box.ledger.unmetered == 0


def test_chat_uses_the_models_template(service: Service) -> None:
    box = BlackBox(Endpoint(EndpointSettings(url=service.url, model="fedllm-tiny")))
    query = Query("Repeat this.\nQK-4821", max_tokens=16, logprobs=True)
    (found,) = box.ask_now([query])
    assert found.text == "QK-4821" and found.logprob is not None and found.finish == "stop"
    assert found == service.writer([query])[0]


def test_the_same_seed_gives_the_same_text_and_several_answers_differ(service: Service) -> None:
    body = {"prompt": "Once", "max_tokens": 12, "temperature": 1.5, "seed": 5, "n": 3}
    first, again = (ask(service, "/v1/completions", body)[1]["choices"] for _ in range(2))
    assert [c["text"] for c in first] == [c["text"] for c in again]
    assert len({c["text"] for c in first}) == 3 and [c["index"] for c in first] == [0, 1, 2]
    other = ask(service, "/v1/completions", {**body, "seed": 6})[1]["choices"]
    assert [c["text"] for c in other] != [c["text"] for c in first]
    narrow = ask(service, "/v1/completions", {**body, "top_p": 0.0})[1]["choices"]
    greedy = ask(service, "/v1/completions", {**body, "temperature": 0})[1]["choices"]
    assert narrow[0]["text"] == greedy[0]["text"]


@pytest.mark.parametrize(
    ("path", "body", "status", "says"),
    [("/v1/completions", b"{", 400, "no JSON"), ("/v1/completions", [1], 400, "no JSON object"),
     ("/v1/completions", {"prompt": 3}, 400, "'prompt'"), ("/v1/completions", {}, 400, "'prompt'"),
     ("/v1/completions", {"prompt": "a", "stream": True}, 400, "Streams"),
     ("/v1/completions", {"prompt": "a", "best_of": 2}, 400, "best_of"),
     ("/v1/completions", {"prompt": "a", "model": "gpt-9"}, 400, "Allowed: fedllm-tiny"),
     ("/v1/completions", {"prompt": "a", "max_tokens": 0}, 400, "max_tokens=0"),
     ("/v1/completions", {"prompt": "a", "max_tokens": True}, 400, "max_tokens"),
     ("/v1/completions", {"prompt": "a", "max_tokens": 5000}, 400, "reads 512"),
     ("/v1/completions", {"prompt": "a", "temperature": -1}, 400, "temperature"),
     ("/v1/completions", {"prompt": "a", "n": 99}, 400, "n=99"),
     ("/v1/completions", {"prompt": "a", "stop": [""]}, 400, "stop"),
     ("/v1/chat/completions", {"messages": []}, 400, "messages"),
     ("/v1/chat/completions", {"messages": [{"role": "user"}]}, 400, "content"),
     ("/v1/embeddings", {"input": "a"}, 404, "/v1/embeddings")],
)  # fmt: skip
def test_bad_requests_are_told(service: Service, path: str, body: Any, status: int, says: str) -> None:
    found, answer = ask(service, path, body)
    assert found == status and says in answer["error"]["message"]


def test_too_large_and_without_length(service: Service) -> None:
    assert ask(service, "/v1/completions", b"x" * 10, {"Content-Length": "99999999"})[0] == 413
    assert ask(service, "/v1/completions", b"", {"Content-Length": "abc"})[0] == 411
    assert ask(service, "/nowhere")[0] == 404


def test_a_key_is_asked_of_every_request(monkeypatch: Any) -> None:
    monkeypatch.setenv("SERVE_KEY", "open-sesame")
    with Service("toy:llama", key_env="SERVE_KEY") as found:
        assert ask(found, "/v1/models")[0] == 401
        assert ask(found, "/v1/completions", {"prompt": "a"}, {"Authorization": "Bearer no"})[0] == 401
        assert ask(found, "/v1/models", headers={"Authorization": "Bearer open-sesame"})[0] == 200
        settings = EndpointSettings(url=found.url, model="toy:llama", key_env="SERVE_KEY", chat=False)
        assert BlackBox(Endpoint(settings)).ask_now([Query("a", max_tokens=3)])[0].completion_tokens == 3


def test_other_machines_need_a_key(monkeypatch: Any) -> None:
    with pytest.raises(ConfigError, match=r"lets other machines ask.*127\.0\.0\.1"):
        Service("toy:llama", host="0.0.0.0")
    monkeypatch.delenv("EMPTY_KEY", raising=False)
    with pytest.raises(ConfigError, match="EMPTY_KEY holds no key"):
        Service("toy:llama", key_env="EMPTY_KEY")


def test_what_cannot_be_served(service: Service) -> None:
    with pytest.raises(ModelError, match="cannot be served"):
        Writer(load_model(ModelSettings(name="toy:bert"), "masked-lm"))
    taken = urllib.parse.urlsplit(service.url).port or 0
    with pytest.raises(ConfigError, match="cannot listen"):
        Service("toy:llama", port=taken)


def test_no_gradient_reaches_the_model(service: Service) -> None:
    assert not any(p.requires_grad or p.grad is not None for p in service.writer.model.parameters())


CHATML = (
    "{{ date_string }}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<unk>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_a_chat_is_the_tokens_of_training_and_ends_with_its_turn() -> None:
    from fedllm.tasks.template import Template

    loaded = load_model(ModelSettings(name="toy:llama"), "causal-lm")
    tokenizer: Any = loaded.tokenizer
    assert tokenizer.unk_token_id not in Writer(loaded).ends
    tokenizer.chat_template = CHATML
    writer = Writer(loaded)
    prompt = Template("chat", tokenizer).prompt({"instruction": "one?"})
    ids = writer.encode_chat([{"role": "user", "content": "one?"}])
    assert prompt.startswith("26 Jul 2024") and ids == tokenizer(prompt, add_special_tokens=False)["input_ids"]
    assert writer.encode("one?")[0] == tokenizer.bos_token_id
    assert writer.ends == {tokenizer.eos_token_id, tokenizer.unk_token_id}


def test_a_text_of_one_token_has_no_score(service: Service) -> None:
    assert service.writer.score([5]) == [None]
    body = {"prompt": "", "max_tokens": 0, "echo": True, "logprobs": 1}
    status, found = ask(service, "/v1/completions", body)
    assert status == 200 and found["choices"][0]["logprobs"]["token_logprobs"] == [None]


@pytest.mark.parametrize(("prompt", "continuation", "count"), [("a ", "🙂", 4), ("a", " b", 1), ("a", "  b", 2)])
def test_a_score_holds_exactly_the_tokens_of_the_continuation(prompt: str, continuation: str, count: int) -> None:
    writer = Writer("toy:llama")
    (found,) = writer([Query(prompt, continuation=continuation)])
    assert found.logprobs == pytest.approx(writer.score(writer.encode(prompt + continuation))[-count:])
