"""Private store - what each client keeps between rounds; written beside the client, never uploaded.

A turn works on a staged copy. The engine commits it when the client's upload was used and drops it otherwise, so a
rejected or lost client is as if it had not been asked. Committed entries lie in files that are never rewritten, and
a checkpoint names the files it belongs to; clients that were never asked cost nothing. What waits in memory for the end
of a round, or has no folder to lie in, goes to disk beyond a budget.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterator, MutableMapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedllm.core.errors import ConfigError, DecodeError, RunError, nearest
from fedllm.core.message import Dense, Json, Message
from fedllm.core.tensors import Tensors
from fedllm.core.wire import decode, encode
from fedllm.engine import durable

Entry = dict[str, "Tensors | Json"]
BUDGET = 256 * 2**20
"""Bytes of entries that may wait in memory."""


class PrivateStore:
    """The private entries of all clients of one worker.

    Args:
        declared: names that may be stored.
        folder: where entries are written; None keeps them in memory up to the budget, then in a temporary folder.
        budget: bytes of entries that may wait in memory: those of turns that are over, and those without a folder.
    """

    def __init__(self, declared: Sequence[str], folder: Path | None = None, budget: int = BUDGET) -> None:
        self.declared, self.folder, self.budget = tuple(declared), folder, budget
        self._temporary: tempfile.TemporaryDirectory[str] | None = None
        self._held: dict[str, bytes | str] = {}
        self._staged: dict[str, PrivateView | Filed] = {}
        self._resting: dict[str, int] = {}

    def open(self, client: str) -> PrivateView:
        """A staged copy of one client's entry; a second turn before :meth:`settle` goes on from the first."""
        before = self._staged.get(client)
        self._resting.pop(client, None)
        if before is None:
            view = PrivateView(self._load(client, self._held.get(client)), self.declared, client)
        else:
            before.before = None  # only the last turn can be dropped: no chain of copies is kept
            entry = self._load(client, before.name) if isinstance(before, Filed) else before.copied()
            view = PrivateView(entry, self.declared, client, before)
        self._staged[client] = view
        return view

    def rest(self, client: str) -> None:
        """A client's turn is over: nothing changes its staged entry, which may go to disk."""
        view = self._staged.get(client)
        if not isinstance(view, PrivateView):
            return
        if not view.changed:
            del self._staged[client]
            return
        self._resting[client] = view.nbytes
        if sum(self._resting.values()) > self.budget:
            for name in self._resting:
                waiting = self._staged[name]
                if isinstance(waiting, PrivateView):
                    self._staged[name] = Filed(self._file(name, _encoded(waiting.entry)), waiting.before)
            self._resting.clear()

    def settle(self, accepted: Sequence[str]) -> None:
        """Keep the staged entries of `accepted`, drop all others."""
        staged, self._staged = self._staged, {}
        self._resting.clear()
        for client in accepted:
            view = staged.get(client)
            if isinstance(view, Filed):
                self._held[client] = view.name
            elif view is not None and view.changed:
                self._save(client, view.entry)

    def drop(self, client: str) -> None:
        """Forget what a client staged in its last turn."""
        view = self._staged.pop(client, None)
        self._resting.pop(client, None)
        if view is not None and view.before is not None:
            self._staged[client] = view.before

    def clients(self) -> list[str]:
        """Clients that hold something."""
        return sorted(self._held)

    def manifest(self) -> dict[str, str]:
        """For a checkpoint: client -> file name. Entries without a folder are not part of it."""
        if self.folder is None:
            return {}
        return {client: held for client, held in sorted(self._held.items()) if isinstance(held, str)}

    def restore(self, manifest: dict[str, str]) -> None:
        """Go back to a checkpoint's entries."""
        self._held = dict(manifest)
        self._staged.clear()
        self._resting.clear()

    def prune(self, keep: Sequence[dict[str, str]]) -> None:
        """Remove files that neither the manifests `keep` name nor an entry of now."""
        if self.folder is None or not self.folder.is_dir():
            return
        named = {name for manifest in keep for name in manifest.values()} | set(self.manifest().values())
        for staged in self._staged.values():
            named |= {one.name for one in (staged, staged.before) if isinstance(one, Filed)}
        for file in self.folder.iterdir():
            if file.name not in named:
                file.unlink()

    def _load(self, client: str, held: bytes | str | None) -> Entry:
        if held is None:
            return {}
        try:
            message = decode(held if isinstance(held, bytes) else (self._place() / held).read_bytes())
        except (OSError, DecodeError) as fault:
            raise RunError(
                f"The private entry of client '{client}' cannot be read: {fault}.", action="Start the run again."
            ) from fault
        return {**{name: message[name] for name in message.parts}, **message.numbers}

    def _save(self, client: str, entry: Entry) -> None:
        data = _encoded(entry)
        if self.folder is not None:
            self._held[client] = self._file(client, data)
            return
        self._held[client] = data
        if sum(len(held) for held in self._held.values() if isinstance(held, bytes)) > self.budget:
            filed = {name: self._file(name, held) for name, held in self._held.items() if isinstance(held, bytes)}
            self._held.update(filed)

    def _file(self, client: str, data: bytes) -> str:
        """Write an entry; the name of its file, which its content decides."""
        target = self._place() / f"{hashlib.sha256(client.encode() + data).hexdigest()[:24]}.safetensors"
        try:
            if not target.exists():
                durable.write(target, data)
        except OSError as fault:
            raise RunError(
                f"The private entry of client '{client}' cannot be written: {fault}.",
                action="Nothing written before is lost: make room, then 'fedllm resume' the run.",
            ) from fault
        return target.name

    def _place(self) -> Path:
        if self.folder is not None:
            return self.folder
        if self._temporary is None:
            self._temporary = tempfile.TemporaryDirectory(prefix="fedllm-private-")
        return Path(self._temporary.name)


def _encoded(entry: Entry) -> bytes:
    tensors = {n: v for n, v in entry.items() if _is_tensors(v)}
    numbers = {n: v for n, v in entry.items() if n not in tensors}
    return encode(Message({n: Dense(t) for n, t in tensors.items()}, numbers))


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


@dataclass
class Filed:
    """A changed entry that waits in a file; `before` is what it goes back to when it is dropped."""

    name: str
    before: PrivateView | Filed | None


class PrivateView(MutableMapping[str, "Tensors | Json"]):
    """One client's entry during its turn; only declared names are accepted."""

    def __init__(
        self, entry: Entry, declared: Sequence[str], client: str, before: PrivateView | Filed | None = None
    ) -> None:
        self.entry, self.declared, self.client, self.before = entry, declared, client, before
        self.changed = isinstance(before, Filed) or (before is not None and before.changed)

    def __getitem__(self, name: str) -> Tensors | Json:
        self._known(name)
        return self.entry[name]

    def __setitem__(self, name: str, value: Tensors | Json) -> None:
        self._known(name)
        self.entry[name], self.changed = _copied(name, value), True

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        held = (value for value in self.entry.values() if isinstance(value, dict))
        return sum(int(getattr(t, "nbytes", 0)) for value in held for t in value.values())

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
