"""Record - what a run across sites writes into the audit logs of its server and of every site.

Each end writes one log, `audit.jsonl`, in the folder of its own file (a site's `folder`; at the server the folder above
`runs`). One run at a time writes it. Every letter carries the reference of its sender's entry, which the receiver
writes down as `peer`, so a log that is cut or written anew shows against those of the others.

| entry | at the server | at a site |
| --- | --- | --- |
| manifest | its signature was checked | so, and whether it is the one seen before |
| policy | - | the file that was read; whether the run is admitted |
| start, resume | the run | - |
| join | a site's answer, or its refusal | the run was accepted |
| send | the body of a request | an upload, with what the policy says |
| receive | an upload | the body of a request |
| request | - | with what the policy says |
| lost, reject | a client | a client |
| checkpoint | a round is safe | what the server says |
| end, leave | the run is over, a site has heard it | the run is over |
"""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from fedllm.core.errors import FedLLMError, RunError
from fedllm.sites.audit import REFERENCE, AuditError, AuditLocked, AuditLog, Entry, Note, client_name, read

FILE = "audit.jsonl"
PATIENCE = 30.0
"""Seconds given to the process of a job before to leave the log."""
RETRY = 0.2
UNTOLD = "Its site answered with an error; the text is left out, because it may quote what it is about."


class SiteRefused(RunError):
    """A site's policy does not allow it, or a manifest is not right."""


class ClientLost(RunError):
    """A client did not answer."""


class Record:
    """An audit log that is open for one participant.

    Args:
        path: the log.
        actor: who writes it: the name in the kit's certificate.
        patience: seconds to wait for another writer to leave.

    Attributes:
        run: the run that entries are about.
    """

    def __init__(self, path: Path, actor: str, patience: float = PATIENCE) -> None:
        self.path, self.actor, self.run = path, actor, ""
        self._patience, self._log = patience, _opened(path, patience)

    def __enter__(self) -> Record:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def last(self) -> str | None:
        """The reference of the last entry."""
        return None if self._log is None else self._log.last

    def entries(self) -> list[Entry]:
        """All entries, checked."""
        return read(self.path)

    def notes(self, notes: Sequence[Note], actor: str | None = None) -> list[str]:
        """Write entries of this run, on disk when this returns; gives their references.

        Raises:
            AuditError: there is no room, or the log was changed; it is opened again with the next entry.
        """
        if not notes:
            return []
        if self._log is None:
            self._log = _opened(self.path, self._patience)
        try:
            return [entry.reference for entry in self._log.extend(actor or self.actor, notes)]
        except AuditError:
            self.close()
            raise

    def note(
        self,
        action: str,
        *,
        round: int | None = None,
        client: str | None = None,
        payload: Any = None,
        decision: Literal["allowed", "refused"] | None = None,
        reason: FedLLMError | None = None,
        peer: object = None,
        actor: str | None = None,
    ) -> str:
        """Write one entry of this run and give its reference; see :meth:`notes`."""
        made = self.made(
            action, round=round, client=client, payload=payload, decision=decision, reason=reason, peer=peer
        )
        return self.notes([made], actor)[0]

    def made(self, action: str, *, client: str | None = None, peer: object = None, **facts: Any) -> Note:
        """An entry of this run that is not yet written; what is no reference is not taken for one."""
        name = None if client is None else client_name(client)
        return Note(action, self.run or None, client=name, peer=reference(peer), **facts)

    def close(self) -> None:
        """Let another writer in."""
        if self._log is not None:
            self._log.close()
            self._log = None


def reference(found: object) -> str | None:
    """What the other end sent as a reference, if it is one."""
    return found if isinstance(found, str) and re.fullmatch(REFERENCE, found) else None


def told(refused: object, reason: str) -> FedLLMError:
    """Why a site gave no answer, for a log: the text of a rule is kept, that of any other error is not."""
    return SiteRefused(reason) if refused else ClientLost(UNTOLD)


def _opened(path: Path, patience: float) -> AuditLog:
    until = time.monotonic() + patience
    while True:
        try:
            return AuditLog(path)
        except AuditLocked:
            if time.monotonic() > until:
                raise
            time.sleep(RETRY)
