"""Endpoint - any OpenAI-compatible HTTP server as a source of a black box; only the standard library is used.

The key is read from an environment variable whose name is in the settings, so that it is in no file, and it is sent
to the named host alone: redirects are refused, and plain http is refused for hosts other than this one.
"""

from __future__ import annotations

import http.client
import json
import math
import os
import ssl
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping, Sequence
from email.utils import parsedate_to_datetime
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from fedllm.blocks.blackbox import Busy, Completion, Query
from fedllm.core.errors import ConfigError, ModelError

AGAIN = frozenset({408, 425, 429, 500, 502, 503, 504, 529})
"""HTTP status codes after which the same request may succeed."""
LARGEST = 16 * 1024 * 1024
"""Most bytes of an answer."""
LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})


class EndpointSettings(BaseModel):
    """Where a model is asked over HTTP."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    url: str
    """Base URL, up to and including the version: https://HOST/v1."""
    model: str = Field(min_length=1)
    """The model's name at the endpoint."""
    key_env: str | None = None
    """Name of the environment variable that holds the key; none is sent where null."""
    chat: bool = True
    """Ask /chat/completions; false asks /completions, which can also score given texts."""
    timeout: float = Field(60.0, gt=0)
    """Seconds to wait for an answer."""
    plain_http: bool = False
    """Send the key over http without encryption, inside a network that you trust."""
    length_field: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    """The name under which the endpoint expects the most new tokens."""


class Endpoint:
    """An endpoint as a :class:`~fedllm.blocks.blackbox.Source`: one attempt per call.

    Raises:
        ConfigError: the URL cannot be used, or the environment variable is not set.
    """

    batch: int | None = 1

    def __init__(self, settings: EndpointSettings) -> None:
        place = urllib.parse.urlsplit(settings.url)
        if place.scheme not in ("http", "https") or not place.hostname or place.query or place.username:
            raise ConfigError(
                f"The endpoint's url '{_shown(settings.url)}' cannot be used.",
                "Allowed: http or https, a host, a path; no user, key or query in it.",
                action="Write it as https://HOST/v1 and name the key's variable in key_env.",
            )
        self.settings, self._key = settings, _key(settings)
        if self._key and place.scheme == "http" and place.hostname not in LOOPBACK and not settings.plain_http:
            raise ConfigError(
                f"The key would be sent to {place.hostname} over plain http.",
                "Allowed: https, or http to this machine.",
                action="Use https, or set plain_http=true inside a network that you trust.",
            )
        self.name = f"{settings.url.rstrip('/')} {settings.model} {'chat' if settings.chat else 'text'}"
        self._path = "chat/completions" if settings.chat else "completions"
        self._opener = urllib.request.build_opener(_NoRedirect)

    def __call__(self, queries: Sequence[Query]) -> list[Completion]:
        """See :class:`~fedllm.blocks.blackbox.Source`."""
        return [self._one(query) for query in queries]

    def _one(self, query: Query) -> Completion:
        answer = self._post(self._path, self._body(query))
        try:
            return _scored(query, answer) if query.continuation is not None else _written(answer, self.settings.chat)
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as fault:
            raise ModelError(
                f"The answer of {_shown(self.settings.url)} has not the form of OpenAI's API ({fault!r}).",
                action="Check the endpoint's url, and whether 'chat' fits it.",
            ) from fault

    def _body(self, query: Query) -> dict[str, Any]:
        body: dict[str, Any] = {"model": self.settings.model, "temperature": query.temperature}
        body |= {"stop": list(query.stop)} if query.stop else {}
        body |= {"seed": query.sample} if query.temperature > 0 else {}
        if query.continuation is not None:
            if self.settings.chat:
                raise ConfigError(
                    "A chat endpoint cannot score a given text.",
                    "Scoring needs /completions with 'echo'.",
                    action="Set chat=false.",
                )
            return body | {"prompt": query.prompt + query.continuation, "max_tokens": 0, "echo": True, "logprobs": 1}
        body |= {self.settings.length_field: query.max_tokens}
        if self.settings.chat:
            system = [] if query.system is None else [{"role": "system", "content": query.system}]
            body |= {"messages": [*system, {"role": "user", "content": query.prompt}]}
            return body | ({"logprobs": True} if query.logprobs else {})
        body |= {"prompt": query.prompt if query.system is None else f"{query.system}\n\n{query.prompt}"}
        return body | ({"logprobs": 1} if query.logprobs else {})

    def _post(self, path: str, body: Mapping[str, Any]) -> Any:
        """The JSON that the endpoint answers; raises :class:`Busy` where it is worth trying again."""
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        headers |= {"Authorization": f"Bearer {self._key}"} if self._key else {}
        url = f"{self.settings.url.rstrip('/')}/{path}"
        request = urllib.request.Request(url, json.dumps(body).encode(), headers)
        try:
            with self._opener.open(request, timeout=self.settings.timeout) as reply:
                data = reply.read(LARGEST + 1)
        except urllib.error.HTTPError as fault:
            raise self._refused(fault) from None
        except urllib.error.URLError as fault:
            raise self._unreached(fault.reason) from None
        except (TimeoutError, http.client.HTTPException, ConnectionError) as fault:
            raise Busy(f"the connection broke ({type(fault).__name__})", charged=True) from None
        if len(data) > LARGEST:
            raise ModelError(f"The answer of {_shown(url)} is larger than {LARGEST} bytes.")
        try:
            return json.loads(data)
        except ValueError:
            raise ModelError(
                f"The answer of {_shown(url)} is no JSON.", action="Check the endpoint's url; it ends in /v1 mostly."
            ) from None

    def _refused(self, fault: urllib.error.HTTPError) -> Exception:
        """The error for a status code."""
        with fault:
            said = _message(fault.read(65536))
        if self._key:
            said = said.replace(self._key, "***")
        if fault.code in AGAIN and "insufficient_quota" not in said:
            return Busy(f"HTTP {fault.code} {said}".strip(), _retry_after(fault.headers.get("Retry-After")))
        where = self.settings.key_env or "key_env"
        action = {
            401: f"Put a valid key into the environment variable {where}.",
            403: f"Put a key that may use this model into the environment variable {where}.",
            404: "Check the endpoint's url and model.",
        }.get(fault.code, "Check the endpoint's settings.")
        return ModelError(
            f"The endpoint {_shown(self.settings.url)} refused a request with HTTP {fault.code}.", said, None, action
        )

    def _unreached(self, reason: object) -> Exception:
        if isinstance(reason, TimeoutError):
            return Busy(f"no answer within {self.settings.timeout:g} s", charged=True)
        if isinstance(reason, ConnectionError):
            return Busy(f"the connection was refused ({type(reason).__name__})")
        kind = "its certificate is not trusted" if isinstance(reason, ssl.SSLError) else "it cannot be reached"
        return ModelError(
            f"The endpoint {_shown(self.settings.url)} did not answer: {kind} ({reason}).",
            action="Check the endpoint's url and the network.",
        )


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any, **__: Any) -> None:
        """No redirect is followed: it would carry the key to another place."""
        return


def _key(settings: EndpointSettings) -> str | None:
    if settings.key_env is None:
        return None
    found = os.environ.get(settings.key_env, "").strip()
    if not found or not found.isascii() or not found.isprintable():
        raise ConfigError(
            f"The environment variable {settings.key_env} holds no usable key.",
            "key_env is the name of the variable, not the key itself.",
            action=f"Set it: export {settings.key_env}=...",
        )
    return found


def _shown(url: str) -> str:
    """A URL without what may be secret in it."""
    place = urllib.parse.urlsplit(url)
    return urllib.parse.urlunsplit((place.scheme, place.netloc.rpartition("@")[2], place.path, "", ""))


def _message(body: bytes) -> str:
    """What an error says, in one line of at most 300 characters."""
    try:
        found = json.loads(body)
        error = found.get("error", found) if isinstance(found, dict) else found
        parts = [error.get(name) for name in ("message", "code")] if isinstance(error, dict) else [error]
        text = " ".join(str(part) for part in parts if part)
    except ValueError:
        text = body.decode("utf-8", "replace")
    return " ".join(text.split())[:300]


def _retry_after(value: str | None) -> float | None:
    """Seconds from now, of a number or a date; None where there is none."""
    if not value:
        return None
    try:
        found = float(value)
    except ValueError:
        try:
            found = parsedate_to_datetime(value).timestamp() - time.time()
        except (ValueError, TypeError):
            return None
    return max(0.0, found) if math.isfinite(found) else None


def _written(answer: Mapping[str, Any], chat: bool) -> Completion:
    choice = answer["choices"][0]
    text = choice["message"].get("content") if chat else choice["text"]
    given = choice.get("logprobs") or {}
    tokens = [entry["logprob"] for entry in given.get("content") or ()] if chat else given.get("token_logprobs")
    logprobs = _numbers(tokens) if given else None
    return Completion(str(text or ""), logprobs, *_usage(answer), str(choice.get("finish_reason") or ""))


def _scored(query: Query, answer: Mapping[str, Any]) -> Completion:
    """The log-probabilities of the tokens that reach into the continuation."""
    given = answer["choices"][0]["logprobs"]
    starts, length = list(given["text_offset"]), len(query.prompt) + len(query.continuation or "")
    ends = [*starts[1:], length]
    kept = [value for value, end in zip(given["token_logprobs"], ends, strict=True) if end > len(query.prompt)]
    return Completion(query.continuation or "", _numbers(kept), *_usage(answer), "stop")


def _numbers(values: Sequence[Any] | None) -> tuple[float, ...] | None:
    return None if values is None else tuple(math.nan if value is None else float(value) for value in values)


def _usage(answer: Mapping[str, Any]) -> tuple[int | None, int | None]:
    usage = answer.get("usage") or {}
    found = [usage.get(name) for name in ("prompt_tokens", "completion_tokens")]
    return tuple(int(value) if isinstance(value, int | float) else None for value in found)  # type: ignore[return-value]
