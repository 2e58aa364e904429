"""Serve - a small HTTP server in the form of OpenAI's API over a local model, so that a black box can be one's own.

`/v1/models`, `/v1/completions` and `/v1/chat/completions`, greedy or sampled, with token counts and log-probabilities;
`echo` with `max_tokens: 0` scores a given text. One request at a time reaches the model. It listens to this machine
alone unless it is given a key that every request must carry.
"""

from __future__ import annotations

import hmac
import inspect
import json
import logging
import os
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch

from fedllm.blocks.blackbox import Completion, Query
from fedllm.core.errors import ConfigError, ModelError
from fedllm.core.seeds import derive, torch_stream
from fedllm.models.load import Loaded, load_model
from fedllm.models.settings import ModelSettings
from fedllm.tasks.template import Template, chat

LOOPBACK = frozenset({"127.0.0.1", "::1", "localhost"})
LARGEST = 1024 * 1024
"""Most bytes of a request."""
CHOICES = 16
"""Most answers to one request."""
DEFAULT_TOKENS = 64
"""New tokens where a request does not say."""
KNOWN = frozenset(
    {"model", "prompt", "messages", "max_tokens", "max_completion_tokens", "temperature", "top_p", "n", "stop", "seed"}
    | {"logprobs", "top_logprobs", "echo", "stream", "user"}
)
log = logging.getLogger(__name__)


def serve(
    model: str | ModelSettings | Loaded = "fedllm-tiny",
    host: str = "127.0.0.1",
    port: int = 8000,
    key_env: str | None = None,
) -> None:
    """Serve a model until interrupted.

    Args:
        model: its name (see :class:`~fedllm.models.settings.ModelSettings`), settings, or the loaded model.
        host: where to listen; other hosts than this one need a key.
        port: 0 takes a free one.
        key_env: name of the environment variable with the key that requests must carry as bearer token.

    Raises:
        ConfigError: a host beyond this machine without a key, an empty key, or a port that is taken.
        ModelError: the model cannot be loaded, or writes no text.
    """
    with Service(model, host, port, key_env) as service:
        log.info("Serving %s at %s", service.writer.name, service.url)
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            log.info("Stopped.")


class BadRequest(Exception):
    """A request that cannot be answered; its text goes to the caller."""


@dataclass
class Written:
    """What a model wrote: text, tokens with their log-probabilities, why it ended."""

    text: str = ""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish: str = "length"


class Writer:
    """A causal language model that continues texts; also a :class:`~fedllm.blocks.blackbox.Source`.

    Args:
        model: its name, settings, or the loaded model.

    Raises:
        ModelError: it is no causal language model.
    """

    batch: int | None = 1

    def __init__(self, model: str | ModelSettings | Loaded) -> None:
        settings = ModelSettings(name=model) if isinstance(model, str) else model
        loaded = load_model(settings, "causal-lm") if isinstance(settings, ModelSettings) else settings
        if loaded.kind != "causal-lm" or loaded.tokenizer is None:
            raise ModelError(
                f"{loaded.name} was loaded for {loaded.kind} and cannot be served.", "Allowed: causal-lm.", "causal-lm"
            )
        self.name, self.model = loaded.name, loaded.model
        self.tokenizer: Any = loaded.tokenizer
        self.context = getattr(loaded.model.config.get_text_config(), "max_position_embeddings", None)
        ends = getattr(getattr(loaded.model, "generation_config", None), "eos_token_id", None)
        added = ends if isinstance(ends, list) else [ends]
        turn = Template("chat", self.tokenizer).turn_end if self.tokenizer.chat_template else None
        self.ends = {end for end in (self.tokenizer.eos_token_id, turn, *added) if end is not None}
        accepts = inspect.signature(loaded.model.forward).parameters
        self._cache = "cache" if "cache" in accepts else "past_key_values"  # the name changed with transformers 5.2x
        self._one_at_a_time = threading.Lock()

    def __call__(self, queries: Sequence[Query]) -> list[Completion]:
        """Answer queries in this process, in the model's chat form where it has one."""
        return [self._answer(query) for query in queries]

    def _answer(self, query: Query) -> Completion:
        if query.continuation is not None:
            text = query.prompt + query.continuation
            ids, places = self.encode_with_places(text)
            kept = [v for v, (_, end) in zip(self.score(ids), places, strict=True) if end > len(query.prompt)]
            logprobs = tuple(float("nan") if value is None else value for value in kept)
            return Completion(query.continuation, logprobs, len(ids), 0, "stop")
        system = [] if query.system is None else [{"role": "system", "content": query.system}]
        if self.tokenizer.chat_template:
            ids = self.encode_chat([*system, {"role": "user", "content": query.prompt}])
        else:
            ids = self.encode(query.prompt if query.system is None else f"{query.system}\n\n{query.prompt}")
        found = self.write(ids, query.max_tokens, query.temperature, 1.0, query.sample, query.stop)
        return Completion(found.text, tuple(found.logprobs), len(ids), len(found.tokens), found.finish)

    def encode(self, text: str, special: bool = True) -> list[int]:
        """The tokens of a text to be continued; without the tokenizer's special tokens where `special` is False."""
        return self.encode_with_places(text, special)[0]

    def encode_with_places(self, text: str, special: bool = True) -> tuple[list[int], list[tuple[int, int]]]:
        """The tokens of a text, with the places in it where each begins and ends; see :meth:`encode`."""
        special = special and not (self.tokenizer.bos_token and text.startswith(self.tokenizer.bos_token))
        found = self.tokenizer(text, add_special_tokens=special, return_offsets_mapping=True)
        ids, places = list(found["input_ids"]), [(int(start), int(end)) for start, end in found["offset_mapping"]]
        if len(ids) > 1 and ids[-1] == self.tokenizer.eos_token_id:
            ids, places = ids[:-1], places[:-1]
        if not ids:
            begin = (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id, self.tokenizer.pad_token_id)
            ids, places = [next(token for token in begin if token is not None)], [(0, 0)]
        return ids, places

    def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """The tokens of a conversation, up to where the answer begins."""
        if not self.tokenizer.chat_template:
            raise BadRequest(f"{self.name} has no chat template. Ask /v1/completions.")
        try:
            text = chat(self.tokenizer, messages, True)
        except Exception as fault:  # templates raise what they like
            raise BadRequest(f"The messages do not fit the model's chat template: {fault}") from None
        return self.encode(text, special=False)  # the template wrote them, as in training

    def write(
        self,
        ids: Sequence[int],
        max_tokens: int,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        stop: Sequence[str] = (),
    ) -> Written:
        """Continue tokens; greedy where temperature is 0. The same seed gives the same text."""
        self._fits(len(ids) + max_tokens)
        stream, found = torch_stream(seed, "serve"), Written()
        with self._one_at_a_time, torch.inference_mode():
            step, past = torch.tensor([list(ids)], device=self.model.device), None
            while len(found.tokens) < max_tokens:
                output = dict(self.model(input_ids=step, **{self._cache: past}, use_cache=True))
                past, scores = output.get("cache", output.get("past_key_values")), output["logits"][0, -1].float().cpu()
                token = _pick(scores, temperature, top_p, stream)
                found.tokens.append(token)
                found.logprobs.append(float(torch.log_softmax(scores, -1)[token]))
                if token in self.ends:
                    found.finish = "stop"
                    break
                if stop and (cut := _first(self.decode(found.tokens), stop)) is not None:
                    found.text, found.finish = self.decode(found.tokens)[:cut], "stop"
                    return found
                step = torch.tensor([[token]], device=self.model.device)
        found.text = self.decode(found.tokens)
        return found

    def score(self, ids: Sequence[int]) -> list[float | None]:
        """The log-probability of every token after those before it; None for the first."""
        self._fits(len(ids))
        with self._one_at_a_time, torch.inference_mode():
            logits = self.model(input_ids=torch.tensor([list(ids)], device=self.model.device)).logits[0].float().cpu()
        found = (
            torch.log_softmax(logits[:-1], -1)
            .gather(1, torch.tensor(list(ids[1:]), dtype=torch.long).unsqueeze(1))
            .squeeze(1)
        )
        return [None, *found.tolist()]

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens, without special ones."""
        return self.tokenizer.decode(list(tokens), skip_special_tokens=True)

    def _fits(self, tokens: int) -> None:
        if self.context is not None and tokens > self.context:
            raise BadRequest(f"The prompt and max_tokens need {tokens} tokens; {self.name} reads {self.context}.")


def _pick(scores: torch.Tensor, temperature: float, top_p: float, stream: torch.Generator) -> int:
    """The next token: the likeliest, or one drawn from the likeliest that hold `top_p` of the probability."""
    if temperature <= 0:
        return int(scores.argmax())
    chances, order = torch.softmax(scores / temperature, -1).sort(descending=True)
    chances[1:][(chances.cumsum(0) - chances)[1:] >= top_p] = 0.0
    return int(order[torch.multinomial(chances, 1, generator=stream)])


def _first(text: str, stop: Sequence[str]) -> int | None:
    """Where the first stop text begins."""
    places = [place for place in (text.find(each) for each in stop) if place >= 0]
    return min(places, default=None)


class Service:
    """The server as a context: it answers in threads from entering to leaving.

    Attributes:
        url: its base URL, for :class:`~fedllm.blocks.endpoint.EndpointSettings`.
        requests: requests answered, errors included.
    """

    def __init__(
        self,
        model: str | ModelSettings | Loaded = "fedllm-tiny",
        host: str = "127.0.0.1",
        port: int = 0,
        key_env: str | None = None,
    ) -> None:
        self.key = os.environ.get(key_env, "").strip() if key_env else None
        if key_env and not self.key:
            raise ConfigError(
                f"The environment variable {key_env} holds no key.", action=f"Set it: export {key_env}=..."
            )
        if host not in LOOPBACK and not self.key:
            raise ConfigError(
                f"host={host} lets other machines ask this model.",
                "Without a key it listens to this machine alone.",
                "127.0.0.1",
                "Name the environment variable that holds a key in key_env.",
            )
        self.writer, self.requests = Writer(model), 0
        try:
            self._server = ThreadingHTTPServer((host, port), _handler(self))
        except OSError as fault:
            raise ConfigError(
                f"The server cannot listen at {host}:{port} ({fault.strerror}).",
                action="Choose another port; 0 is any.",
            ) from fault
        self._server.daemon_threads = True
        self.url = f"http://{host}:{self._server.server_address[1]}/v1"

    def __enter__(self) -> Service:
        threading.Thread(target=self._server.serve_forever, name="serve", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def answer(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """The answer to a POST request; raises :class:`BadRequest`."""
        chat = path == "/v1/chat/completions"
        _check(body, self.writer.name)
        if chat:
            ids, starts, text = self.writer.encode_chat(_messages(body)), [], ""
        else:
            text = _given(body, "prompt", str, None)
            ids, places = self.writer.encode_with_places(text)
            starts = [start for start, _ in places]
        echo, wants = not chat and _given(body, "echo", bool, False), body.get("logprobs") not in (None, False)
        asked = body.get("max_tokens", body.get("max_completion_tokens"))
        limit = DEFAULT_TOKENS if asked is None else asked
        if not _whole(limit) or limit < (0 if echo else 1):
            raise BadRequest(f"max_tokens={limit!r} cannot be used. It is a whole number above 0.")
        choices, written = [], 0
        for number in range(_number(body, "n", 1, 1, CHOICES)):
            found = self._write(body, ids, limit, number)
            written += len(found.tokens)
            choice: dict[str, Any] = {"index": number, "finish_reason": found.finish, "logprobs": None}
            if chat:
                choice["message"] = {"role": "assistant", "content": found.text}
                choice["logprobs"] = {"content": self._chat_logprobs(found)} if wants else None
            else:
                choice["text"] = (text if echo else "") + found.text
                choice["logprobs"] = self._logprobs(found, ids if echo else [], starts, len(text)) if wants else None
            choices.append(choice)
        usage = {"prompt_tokens": len(ids), "completion_tokens": written, "total_tokens": len(ids) + written}
        kind = "chat.completion" if chat else "text_completion"
        name = f"{'chatcmpl' if chat else 'cmpl'}-{derive(self.requests, 'answer'):016x}"
        return {"id": name, "object": kind, "created": int(time.time()), "model": self.writer.name,
                "choices": choices, "usage": usage}  # fmt: skip

    def _write(self, body: Mapping[str, Any], ids: list[int], limit: int, number: int) -> Written:
        temperature, top_p = _real(body, "temperature", 1.0, 0.0, 2.0), _real(body, "top_p", 1.0, 0.0, 1.0)
        given = body.get("seed")
        seed = int(given) if given is not None and _whole(given) else int.from_bytes(os.urandom(7), "big")
        seed = seed if number == 0 else derive(seed, "choice", number)
        return self.writer.write(ids, limit, temperature, top_p, seed, _stops(body))

    def _logprobs(self, found: Written, ids: list[int], starts: list[int], length: int) -> dict[str, Any]:
        """Tokens, log-probabilities and places of the echoed prompt (`ids`) and of what was written."""
        decode = self.writer.tokenizer.decode
        offsets = list(starts) if ids else []
        offsets += [
            (length if ids else 0) + len(self.writer.decode(found.tokens[:place])) for place in range(len(found.tokens))
        ]
        return {
            "tokens": [decode([token]) for token in (*ids, *found.tokens)],
            "token_logprobs": [*(self.writer.score(ids) if ids else ()), *found.logprobs],
            "text_offset": offsets,
            "top_logprobs": None,
        }

    def _chat_logprobs(self, found: Written) -> list[dict[str, Any]]:
        decode = self.writer.tokenizer.decode
        pairs = zip(found.tokens, found.logprobs, strict=True)
        return [{"token": decode([t]), "logprob": value, "bytes": None, "top_logprobs": []} for t, value in pairs]


def _handler(service: Service) -> type[BaseHTTPRequestHandler]:
    """The request handler of a service."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        server_version, sys_version = "fedllm", ""
        timeout = 60

        def do_GET(self) -> None:
            if not self._allowed():
                return
            if self.path.rstrip("/") == "/v1/models":
                model = {"id": service.writer.name, "object": "model", "created": 0, "owned_by": "fedllm"}
                self._send(200, {"object": "list", "data": [model]})
            else:
                self._fail(404, f"There is no {self.path}. Allowed: /v1/models, or POST to /v1/completions.")

        def do_POST(self) -> None:
            if not self._allowed():
                return
            length = self.headers.get("Content-Length", "")
            if not length.isascii() or not length.isdigit():
                return self._fail(411, "The request has no Content-Length.")
            if int(length) > LARGEST:
                return self._fail(413, f"The request is larger than {LARGEST} bytes.")
            data = self.rfile.read(int(length))
            if self.path not in ("/v1/completions", "/v1/chat/completions"):
                return self._fail(404, f"There is no {self.path}. Allowed: /v1/completions, /v1/chat/completions.")
            try:
                body = json.loads(data)
            except (ValueError, RecursionError):
                return self._fail(400, "The request is no JSON.")
            try:
                self._send(200, service.answer(self.path, body))
            except BadRequest as fault:
                self._fail(400, str(fault))
            except Exception as fault:
                log.exception("A request failed")
                self._fail(500, f"The model failed ({type(fault).__name__}).")

        def _allowed(self) -> bool:
            if service.key is None:
                return True
            given = self.headers.get("Authorization", "").encode("utf-8", "replace")
            if hmac.compare_digest(given, f"Bearer {service.key}".encode()):
                return True
            self._fail(401, "A valid key is needed. Send it as 'Authorization: Bearer KEY'.")
            return False

        def _fail(self, status: int, message: str) -> None:
            self.close_connection = True  # the rest of the request may be unread
            kind = "invalid_request_error" if status < 500 else "server_error"
            self._send(status, {"error": {"message": message, "type": kind, "code": status}})

        def _send(self, status: int, content: Mapping[str, Any]) -> None:
            service.requests += 1
            data = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            if self.close_connection:
                self.send_header("Connection", "close")
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *args: Any) -> None:
            log.debug(format, *args)

    return Handler


def _check(body: Any, name: str) -> None:
    if not isinstance(body, dict):
        raise BadRequest("The request is no JSON object.")
    unknown = sorted(set(body) - KNOWN)
    if unknown:
        raise BadRequest(f"The option '{unknown[0]}' is not known. Allowed: {', '.join(sorted(KNOWN))}.")
    if body.get("stream"):
        raise BadRequest("Streams are not offered. Set stream to false.")
    if body.get("model", name) != name:
        raise BadRequest(f"There is no model '{body['model']}'. Allowed: {name}.")


def _messages(body: Mapping[str, Any]) -> list[dict[str, str]]:
    found = body.get("messages")
    if not isinstance(found, list) or not found:
        raise BadRequest("'messages' is a list of {role, content}, and not empty.")
    for each in found:
        if not isinstance(each, dict) or not all(isinstance(each.get(name), str) for name in ("role", "content")):
            raise BadRequest("Every message has a text as 'role' and a text as 'content'.")
    return found


def _stops(body: Mapping[str, Any]) -> list[str]:
    found = body.get("stop") or []
    found = [found] if isinstance(found, str) else found
    if not isinstance(found, list) or not all(isinstance(each, str) and each for each in found):
        raise BadRequest("'stop' is a text or a list of texts.")
    return found


def _given(body: Mapping[str, Any], name: str, kind: type[Any], default: Any) -> Any:
    found = body.get(name, default)
    if not isinstance(found, kind):
        raise BadRequest(f"'{name}' is missing or not of the type {kind.__name__}.")
    return found


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _number(body: Mapping[str, Any], name: str, default: int, least: int, most: int) -> int:
    found = body.get(name)
    found = default if found is None else found
    if not _whole(found) or not least <= found <= most:
        raise BadRequest(f"{name}={found!r} cannot be used. It is a whole number from {least} to {most}.")
    return found


def _real(body: Mapping[str, Any], name: str, default: float, least: float, most: float) -> float:
    found = body.get(name)
    found = default if found is None else found
    if isinstance(found, bool) or not isinstance(found, int | float) or not least <= found <= most:
        raise BadRequest(f"{name}={found!r} cannot be used. It is a number from {least:g} to {most:g}.")
    return float(found)
