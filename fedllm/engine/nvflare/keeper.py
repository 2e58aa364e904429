"""Keeper - starts a site's worker process, feeds it, notices its death, and answers for it meanwhile.

Every letter passes the site's gate first (see :mod:`fedllm.engine.nvflare.gate`), and every upload last.

It runs inside FLARE's client process and imports no torch. A worker that dies of memory is an error reply of the
clients it was busy with, and is started again with the next request. Replies stay on disk until the round is settled,
so that a request that comes twice is never computed twice.
"""

from __future__ import annotations

import hashlib
import json
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, BinaryIO

from fedllm.core.errors import DecodeError, FedLLMError
from fedllm.engine import durable
from fedllm.engine.nvflare.facts import SiteFacts
from fedllm.engine.nvflare.gate import Gate, no
from fedllm.engine.nvflare.parts import META_LIMIT, NAME, RESERVED, Letter
from fedllm.engine.nvflare.pipe import Closed, Pipe

LOOK = 0.05
"""Seconds between two looks at whether the server still wants an answer."""
MARGIN = 1.0
"""Seconds (at most a tenth of the deadline) kept for the way back of what was answered in time."""
BEHIND = 2**20
"""Bytes from which on a reply is written while it is on its way already."""
LEFT = 3.0
"""Seconds a worker is given to end by itself."""

Stopped = Callable[[], bool]


class Died(Exception):
    """The worker process ended; the text says how."""


class Process:
    """The worker process of a site; at most one at a time.

    Args:
        kit: the site's folder.
        log: what the worker prints, tracebacks among it; it stays at the site.

    Attributes:
        module: what is run.
    """

    def __init__(self, kit: Path, log: Path) -> None:
        self.kit, self.log, self.module = kit, log, "fedllm.engine.nvflare.worker"
        self._process: subprocess.Popen[bytes] | None = None
        self._pipe: Pipe | None = None
        self._letters: queue.Queue[Letter | None] = queue.Queue()
        self._number = 0

    @property
    def alive(self) -> bool:
        """Whether it runs."""
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int | None:
        """Its process id."""
        return None if self._process is None else self._process.pid

    def start(self) -> None:
        """Start a process; one that runs is ended first."""
        self.stop()
        here, there = socket.socketpair()
        words = ["-m", self.module, "--end", str(there.fileno()), "--kit", str(self.kit)]
        with _private(self.log, os.O_APPEND) as log:
            self._process = subprocess.Popen(
                [sys.executable, *words],
                pass_fds=[there.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, "PYTHONUNBUFFERED": "1"},
                umask=0o077,  # rows may be quoted in what it writes
            )
        there.close()
        self._pipe, self._letters = Pipe(here), queue.Queue()
        threading.Thread(target=_listen, args=(self._pipe, self._letters), daemon=True).start()

    def say(
        self, letter: Letter, told: Callable[[Letter], None], stopped: Stopped, until: float | None
    ) -> Letter | None:
        """Say something and take what is told until the last word.

        Args:
            letter: what is said.
            told: is given the replies of single clients.
            stopped: whether the server wants no answer any more.
            until: when to stop waiting, on the monotonic clock.

        Returns:
            The last word; None where there is no wish or no time to wait for it.

        Raises:
            Died: the process ended.
        """
        self._number += 1
        number, pipe = self._number, self._pipe
        if pipe is None or not self.alive:
            raise Died(self._end())
        try:
            pipe.send(Letter({**letter.meta, "n": number}, letter.blobs))
            while True:
                if stopped() or (until is not None and time.monotonic() > until):
                    pipe.send(Letter({"op": "cancel", "n": number}))
                    return None
                try:
                    found = self._letters.get(timeout=LOOK)
                except queue.Empty:
                    continue
                if found is None:
                    raise Died(self._end())
                if found.meta.get("n") != number:
                    continue  # the late end of a conversation that was left
                if found.op != "reply":
                    return found
                told(found)
        except Closed:
            raise Died(self._end()) from None

    def stop(self) -> None:
        """End the process."""
        if self._pipe is not None:
            self._pipe.close()
        if self._process is not None and self._process.poll() is None:
            try:
                self._process.wait(LEFT)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self._process = self._pipe = None

    def _end(self) -> str:
        """How the process ended, for people."""
        if self._process is None:
            return "the site's worker process was not started"
        try:
            code = self._process.wait(LEFT)
        except subprocess.TimeoutExpired:
            self._process.kill()
            code = self._process.wait()
        if code == -signal.SIGKILL:
            return "the site's worker process was killed (signal 9): its memory may not have sufficed"
        return f"the site's worker process ended with {f'signal {-code}' if code < 0 else f'code {code}'}"


def _listen(pipe: Pipe, letters: queue.Queue[Letter | None]) -> None:
    try:
        while True:
            letters.put(pipe.receive())
    except (Closed, DecodeError):
        letters.put(None)


class Replies:
    """Replies on disk by leg and request id, until the round they belong to is settled.

    They are of use to this process alone (a job begins without any), so nothing waits until they are safe from a
    failure of power. A large one is written while it is on its way already; until that is done, and where the disk is
    full, it is held in memory.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._held: dict[Path, Letter] = {}
        self._writer = ThreadPoolExecutor(1, "replies")
        self._writing: list[Future[None]] = []

    def clear(self, leg: str | None = None) -> None:
        """Forget the replies of a leg, or all."""
        wait(self._writing)
        self._writing = []
        for file in list(self._held):
            if leg is None or file.parent.name == leg:
                del self._held[file]
        for place in [self.folder / leg] if leg is not None else sorted(self.folder.glob("*")):
            for file in place.glob("*"):
                file.unlink(missing_ok=True)

    def put(self, leg: str, reply: Letter) -> None:
        """Keep a reply; it appears whole or not at all."""
        file = self._file(leg, reply.meta["id"])
        if sum(len(blob) for blob in reply.blobs) < BEHIND:
            self._write(file, reply)
            return
        self._held[file] = reply
        self._writing = [one for one in self._writing if not one.done()]
        self._writing.append(self._writer.submit(self._behind, file, reply))

    def _behind(self, file: Path, reply: Letter) -> None:
        try:
            self._write(file, reply)
        except OSError:
            return  # it stays in memory
        self._held.pop(file, None)

    def _write(self, file: Path, reply: Letter) -> None:
        facts = json.dumps({"meta": reply.meta, "sizes": [len(blob) for blob in reply.blobs]}).encode()
        partial = file.with_name(file.name + ".partial")
        with _private(partial, os.O_TRUNC) as handle:
            handle.writelines([len(facts).to_bytes(8, "little"), facts, *reply.blobs])
        partial.replace(file)

    def get(self, leg: str, name: str) -> Letter | None:
        """The reply to a request, where it was answered before."""
        file = self._file(leg, name)
        held = self._held.get(file)
        if held is not None:
            return held
        if not file.is_file():
            return None
        data = file.read_bytes()
        length = int.from_bytes(data[:8], "little")
        if length > min(META_LIMIT, len(data)):
            return None
        facts: dict[str, Any] = json.loads(data[8 : 8 + length])
        blobs, at = [], 8 + length
        for size in facts["sizes"]:
            blobs.append(data[at : at + size])
            at += size
        return Letter(facts["meta"], blobs)

    def _file(self, leg: str, name: str) -> Path:
        return self.folder / leg / hashlib.sha256(name.encode()).hexdigest()[:32]


class Keeper:
    """Answers the server's letters with the help of a worker process.

    Args:
        kit: the site's folder.
        facts: the site's own file.
    """

    def __init__(self, kit: Path, facts: SiteFacts) -> None:
        durable.own(kit / facts.folder)
        self.gate, folder = Gate(kit, facts), kit / facts.folder
        self.process, self.replies = Process(kit, folder / "worker.log"), Replies(folder / "replies")
        self._hello: Letter | None = None
        self._begin: Letter | None = None
        self._settled: dict[str, int] = {}

    def handle(self, letter: Letter, stopped: Stopped) -> Letter:
        """The answer to a letter; whatever goes wrong is an answer, too."""
        begun = time.monotonic()
        for name in ("run", "leg"):
            if not NAME.fullmatch(str(letter.meta.get(name, "x"))):
                return _error(f"the server names a {name} '{letter.meta[name]}'")
        if RESERVED.fullmatch(str(letter.meta.get("run", "x"))):
            return _error(
                f"no run can have the id '{letter.meta['run']}', the name of another thing in a site's folder"
            )
        try:
            return self._handle(letter, stopped, begun)
        except Died as fault:
            return Letter({**_error(str(fault)).meta, "died": True})
        except FedLLMError as fault:  # of the gate: a rule, a manifest, or a log that cannot be written
            return Letter({**_error(str(fault)).meta, "refused": True, "audit": self.gate.record.last})

    def _handle(self, letter: Letter, stopped: Stopped, begun: float) -> Letter:
        entry: str | None = None
        match letter.op:
            case "ask":
                self.gate.leg(letter.meta)
                return self._ask(letter, stopped, begun)
            case "hello":
                self._hello = self._begin = None
                entry = self.gate.admit(letter.meta)
                self.replies.clear()
                self._hello, self._settled = letter, {}
                if not self.process.alive:
                    self.process.start()
            case "begin":
                self.gate.begin(letter.meta)
            case "end":
                return Letter({"op": "ended", "audit": self.gate.end(letter.meta)})
            case _:
                self.gate.leg(letter.meta)
        if not self.process.alive:
            self._again(stopped)
        if letter.op == "begin":
            self._begin = letter
        answer = self.process.say(letter, _nobody, stopped, None)
        if answer is None:
            return _error("the server does not wait any more")
        if answer.op == "ready":
            entry = self.gate.begun(letter.meta, answer.meta["fingerprint"])
        return Letter({**answer.meta, "audit": entry}, answer.blobs)

    def end(self) -> None:
        """The job is over: its worker ends, and the uploads kept for it go."""
        self.process.stop()
        self.replies.clear()
        self.gate.close()

    def _again(self, stopped: Stopped) -> None:
        """Start a worker that goes on where the last one ended."""
        self.process.start()
        for letter in (self._hello, self._begin):
            if letter is None:
                continue
            answer = self.process.say(Letter({**letter.meta, "again": True}, letter.blobs), _nobody, stopped, None)
            if answer is None or answer.op == "error":
                reason = "the server does not wait any more" if answer is None else answer.meta["reason"]
                self.process.stop()
                raise Died(f"the site's worker process could not be started again: {reason}")

    def _ask(self, letter: Letter, stopped: Stopped, begun: float) -> Letter:
        """Requests of several clients: those answered before from disk, the others by the worker."""
        leg, asked = letter.meta["leg"], letter.meta["requests"]
        settled = max((order["n"] for order in letter.meta["orders"] if order["do"] == "settle"), default=0)
        if settled > self._settled.get(leg, 0):
            self.replies.clear(leg)
            self._settled[leg] = settled
        known = self.gate.requests(letter)
        for r in asked:
            if r["id"] not in known and (found := self.replies.get(leg, r["id"])) is not None:
                known[r["id"]] = found
        new = [request for request in asked if request["id"] not in known]
        by_id, stays = {request["id"]: request for request in new}, list[dict[str, Any]]()
        deadline = letter.meta["deadline"]
        until = None if deadline is None else begun + deadline - min(MARGIN, deadline / 10)
        reason, applied = f"no answer within {deadline} s", None

        def told(reply: Letter) -> None:
            name = reply.meta["id"]
            if name in known or name not in by_id:
                return  # said twice, or not asked for: it neither leaves nor counts
            leaves = self.gate.upload(by_id[name], reply)
            if leaves.meta["body"] is not None:  # what failed may be tried again
                self.replies.put(leg, leaves)
            elif reply.meta["body"] is not None:
                stays.append({key: reply.meta[key] for key in ("id", "client", "session")})
            known[name] = leaves

        try:
            if new or letter.meta["orders"]:
                if not self.process.alive:
                    self._again(stopped)
                last = self.process.say(Letter({**letter.meta, "requests": new}, letter.blobs), told, stopped, until)
                if last is not None and last.op == "error":
                    reason = last.meta["reason"]
                elif last is not None:
                    applied = last.meta["applied"]
            if stays and self.process.alive:
                self.process.say(Letter({"op": "undo", "leg": leg, "replies": stays}), _nobody, stopped, None)
        except Died as fault:
            reason = str(fault)
        self.gate.lost([r for r in asked if r["id"] not in known], reason)
        return _replies([known.get(r["id"]) or no(r, reason) for r in asked], applied)


def _private(file: Path, how: int) -> BinaryIO:
    """A file that is open for writing and that its owner alone may read, made with its folder where there is none."""
    file.parent.mkdir(parents=True, exist_ok=True)
    return os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | how, durable.OWN), "ab" if how == os.O_APPEND else "wb")


def _nobody(letter: Letter) -> None:
    """Takes replies where none is expected."""


def _error(reason: str) -> Letter:
    return Letter({"op": "error", "reason": reason})


def _replies(found: Sequence[Letter], applied: int | None) -> Letter:
    """Replies of several clients as one letter; equal bodies travel once."""
    blobs: list[bytes] = []
    places: dict[str, int] = {}
    facts = []
    for reply in found:
        meta = {key: value for key, value in reply.meta.items() if key not in ("op", "n")}
        if meta["body"] is not None:
            body, digest = reply.blobs[meta["body"]], reply.digests[meta["body"]]
            if digest not in places:
                places[digest] = len(blobs)
                blobs.append(body)
            meta["body"] = places[digest]
        facts.append(meta)
    return Letter({"op": "replies", "replies": facts, "applied": applied}, blobs, list(places))
