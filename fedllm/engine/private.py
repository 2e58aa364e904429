"""Private store - what each client keeps between rounds; written beside the client, never uploaded.

A turn works on a staged copy. The engine commits it when the client's upload was used and drops it otherwise, so a
rejected or lost client is as if it had not been asked. Committed entries lie in files that are never rewritten, and
a checkpoint names the files it belongs to; clients that were never asked cost nothing.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, MutableMapping, Sequence
from pathlib import Path
from typing import Any

from fedllm.core.errors import ConfigError, DecodeError, RunError, nearest
from fedllm.core.message import Dense, Json, Message
from fedllm.core.tensors import Tensors
from fedllm.core.wire import decode, encode
from fedllm.engine import durable

Entry = dict[str, "Tensors | Json"]


class PrivateStore:
    """The private entries of all clients of one worker.

    Args:
        declared: names that may be stored.
        folder: where entries are written; None keeps them in memory.
    """

    def __init__(self, declared: Sequence[str], folder: Path | None = None) -> None:
        self.declared, self.folder = tuple(declared), folder
        self._held: dict[str, bytes | str] = {}
        self._staged: dict[str, PrivateView] = {}

    def open(self, client: str) -> PrivateView:
        """A staged copy of one client's entry; a second turn before :meth:`settle` goes on from the first."""
        before = self._staged.get(client)
        if before is not None:
            before.before = None  # only the last turn can be dropped: no chain of copies is kept
        view = PrivateView(self._load(client) if before is None else before.copied(), self.declared, client, before)
        self._staged[client] = view
        return view

    def settle(self, accepted: Sequence[str]) -> None:
        """Keep the staged entries of `accepted`, drop all others."""
        staged, self._staged = self._staged, {}
        for client in accepted:
            view = staged.get(client)
            if view is not None and view.changed:
                self._save(client, view.entry)

    def drop(self, client: str) -> None:
        """Forget what a client staged in its last turn."""
        view = self._staged.pop(client, None)
        if view is not None and view.before is not None:
            self._staged[client] = view.before

    def clients(self) -> list[str]:
        """Clients that hold something."""
        return sorted(self._held)

    def manifest(self) -> dict[str, str]:
        """For a checkpoint: client -> file name. Entries in memory are not part of it."""
        return {client: held for client, held in sorted(self._held.items()) if isinstance(held, str)}

    def restore(self, manifest: dict[str, str]) -> None:
        """Go back to a checkpoint's entries."""
        self._held = dict(manifest)
        self._staged.clear()

    def prune(self, keep: Sequence[dict[str, str]]) -> None:
        """Remove files that none of the manifests `keep` names."""
        if self.folder is None or not self.folder.is_dir():
            return
        named = {name for manifest in keep for name in manifest.values()} | set(self.manifest().values())
        for file in self.folder.iterdir():
            if file.name not in named:
                file.unlink()

    def _load(self, client: str) -> Entry:
        held = self._held.get(client)
        if held is None:
            return {}
        try:
            data = held if isinstance(held, bytes) else (self.folder or Path()).joinpath(held).read_bytes()
            message = decode(data)
        except (OSError, DecodeError) as fault:
            raise RunError(
                f"The private entry of client '{client}' cannot be read: {fault}.", action="Start the run again."
            ) from fault
        return {**{name: message[name] for name in message.parts}, **message.numbers}

    def _save(self, client: str, entry: Entry) -> None:
        tensors = {n: v for n, v in entry.items() if _is_tensors(v)}
        data = encode(
            Message({n: Dense(t) for n, t in tensors.items()}, {n: v for n, v in entry.items() if n not in tensors})
        )
        if self.folder is None:
            self._held[client] = data
            return
        digest = hashlib.sha256(client.encode() + data).hexdigest()[:24]
        target = self.folder / f"{digest}.safetensors"
        try:
            if not target.exists():
                durable.write(target, data)
        except OSError as fault:
            raise RunError(
                f"The private entry of client '{client}' cannot be written: {fault}.",
                action="Nothing written before is lost: make room, then 'fedllm resume' the run.",
            ) from fault
        self._held[client] = target.name


def _is_tensors(value: object) -> bool:
    import torch

    return isinstance(value, dict) and bool(value) and all(isinstance(v, torch.Tensor) for v in value.values())


def _copied(name: str, value: Any) -> Any:
    """A copy that later changes of `value` do not reach; raises :class:`ConfigError` where it cannot be stored."""
    if _is_tensors(value):
        return {n: t.detach().cpu().clone() for n, t in value.items()}
    try:
        return json.loads(json.dumps(value))
    except (TypeError, ValueError) as fault:
        raise ConfigError(
            f"'{name}' cannot be stored: {fault}.", "Allowed: a dict of tensors by name, or a JSON value."
        ) from fault


class PrivateView(MutableMapping[str, "Tensors | Json"]):
    """One client's entry during its turn; only declared names are accepted."""

    def __init__(self, entry: Entry, declared: Sequence[str], client: str, before: PrivateView | None = None) -> None:
        self.entry, self.declared, self.client, self.before = entry, declared, client, before
        self.changed = before is not None and before.changed

    def __getitem__(self, name: str) -> Tensors | Json:
        self._known(name)
        return self.entry[name]

    def __setitem__(self, name: str, value: Tensors | Json) -> None:
        self._known(name)
        self.entry[name], self.changed = _copied(name, value), True

    def copied(self) -> Entry:
        """The entry, sharing nothing with this view."""
        return {name: _copied(name, value) for name, value in self.entry.items()}

    def __delitem__(self, name: str) -> None:
        del self.entry[name]
        self.changed = True

    def __iter__(self) -> Iterator[str]:
        return iter(self.entry)

    def __len__(self) -> int:
        return len(self.entry)

    def _known(self, name: str) -> None:
        if name not in self.declared:
            raise ConfigError(
                f"'{name}' is not declared as private.",
                f"Declared: {', '.join(self.declared) or 'nothing'}.",
                nearest(name, self.declared),
                "Name it in the class's 'private'.",
            )
