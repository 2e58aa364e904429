"""Engine - the server's half: asks sites for their clients, takes the answers, and keeps private stores in step.

Requests are read in lots; those of one site travel as one letter, a body that several clients receive only once. The
letters of a lot are under way together. Replies are given on in the order of the requests, so that sums are formed in
the same order as by the local engine, and the same bits come out. Where a round has clients to spare, they are given
on as they come. An answer counts in its round or never.

The pseudo-client `server`, which trains on the public rows, is asked where the server is.

Orders about private stores (keep, roll back, close a conversation) are numbered and travel with the next letter to the
site, again and again until it says that they were carried out.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import math
import queue
import time
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any
from typing import Protocol as Interface

from fedllm.core.errors import ConfigError, RunError
from fedllm.core.guard import Guard
from fedllm.core.roster import SERVER, Group
from fedllm.core.server import Reply, Request
from fedllm.engine import durable
from fedllm.engine.local import LocalEngine
from fedllm.engine.nvflare.parts import Letter
from fedllm.engine.nvflare.record import ClientLost, Record, told
from fedllm.engine.nvflare.standing import Keep
from fedllm.engine.private import PrivateStore
from fedllm.sites.audit import Digest

LOT = 1024
"""The most requests that are under way together."""
LOT_BYTES = 512 * 2**20
"""Bytes of different bodies after which a lot is full."""
LOOK = 5.0
"""Seconds of silence after which it is asked whether a site is still there."""
MISSES = 3
"""A site that does not answer so many times in a row is lost for this job."""

LATE = "no answer within"
"""How the reason begins why a late client has no reply."""

Done = Callable[[Letter | str], None]


class Post(Interface):
    """Carries letters to sites."""

    def send(self, site: str, letter: Letter, done: Done) -> Callable[[], None]:
        """Send a letter; `done` is called once, from any thread, with the answer or the reason why there is none.

        Returns:
            What takes the letter back.
        """
        ...

    def alive(self, site: str) -> bool:
        """Whether the site's process answers; may take seconds."""
        ...

    def over(self) -> str | None:
        """Why the run must end; None where it may go on."""
        ...


@dataclass
class Sites:
    """The sites of a job, what carries letters to them, and those that are lost.

    Attributes:
        post: carries letters.
        home: client -> its site.
        lost: site -> why it is not asked any more.
        record: the server's audit log; None: nothing is written down.
        anchor: the file in which a checkpoint keeps the last entry of that log.
        quorum: sites without which the run ends.
        mark: the last checkpoint, as the sites are told of it.
        greeted: whether they know of the run.
        standing: where it is told which sites are lost; None: nowhere.
    """

    post: Post
    home: Mapping[str, str]
    lost: dict[str, str] = field(default_factory=dict)
    record: Record | None = None
    anchor: Path | None = None
    quorum: int = 1
    mark: dict[str, Any] | None = None
    greeted: bool = False
    standing: Keep | None = None

    @property
    def names(self) -> list[str]:
        """All sites, sorted."""
        return sorted(set(self.home.values()))

    def lose(self, site: str, reason: str, returns: bool = True) -> str:
        """A site is not asked any more in this job; gives the reason.

        Args:
            site: its name.
            reason: why.
            returns: whether it is wanted again when it is back; False: it does not want to take part.
        """
        if site not in self.lost:
            self.lost[site] = reason
            if returns and self.standing is not None:
                self.standing.lost(site)
        return self.lost[site]

    def enough(self) -> None:
        """Raise :class:`RunError` where fewer sites are left than the run needs."""
        left = len(self.names) - len(self.lost)
        if left < self.quorum:
            raise RunError(
                f"{left} of {len(self.names)} sites are left, and the run needs {self.quorum}.",
                f"Lost: {', '.join(sorted(self.lost))}.",
                action="The run goes on from its last checkpoint when they are back.",
            )

    def note(self, action: str, **facts: Any) -> str | None:
        """Write one entry; see :meth:`fedllm.engine.nvflare.record.Record.note`."""
        return None if self.record is None else self.record.note(action, **facts)

    def notes(self, action: str, facts: Sequence[dict[str, Any]]) -> list[str | None]:
        """Write several entries of a kind at once."""
        if self.record is None:
            return [None] * len(facts)
        return [*self.record.notes([self.record.made(action, **one) for one in facts])]

    def checkpoint(self, round: int) -> None:
        """A checkpoint was written; its place in the log is kept beside it and told to the sites."""
        entry = self.note("checkpoint", round=round)
        if entry is not None:
            self.mark = {"round": round, "audit": entry}
            if self.anchor is not None:
                durable.write(self.anchor, json.dumps({"last": entry, "round": round}).encode())

    def ask(self, letters: Mapping[str, Letter], misses: int = MISSES) -> dict[str, Letter | str]:
        """Send a letter to each site and wait for all answers; a reason stands where there is none.

        Args:
            letters: site -> what it is sent.
            misses: a site that is silent so many times in a row is lost.
        """
        found: queue.Queue[tuple[str, Letter | str]] = queue.Queue()
        answers: dict[str, Letter | str] = {site: self.lost[site] for site in letters if site in self.lost}
        takers = {
            site: self.post.send(site, letter, lambda answer, site=site: found.put((site, answer)))
            for site, letter in letters.items()
            if site not in answers
        }
        watch = Watch(self, misses)
        while len(answers) < len(letters):
            try:
                site, answer = found.get(timeout=0.25)
                answers.setdefault(site, answer)
            except queue.Empty:
                over = self.post.over()
                late = watch.silent([site for site in takers if site not in answers])
                for site, reason in late.items():
                    answers[site] = reason
                    takers[site]()
                if over is not None:
                    for site in set(takers) - set(answers):
                        takers[site]()
                    raise RunError(f"The run was ended: {over}.") from None
        return answers


class Watch:
    """Finds out which silent sites are gone."""

    def __init__(self, sites: Sites, most: int = MISSES) -> None:
        self.sites, self.most, self.since = sites, most, time.monotonic()
        self.misses: dict[str, int] = {}

    def silent(self, waiting: Sequence[str]) -> dict[str, str]:
        """Look at the sites that have not answered, now and then; those found lost, with the reason."""
        if time.monotonic() - self.since < LOOK:
            return {}
        found: dict[str, str] = {}
        for site in waiting:
            self.misses[site] = 0 if self.sites.post.alive(site) else self.misses.get(site, 0) + 1
            if self.misses[site] >= self.most:
                found[site] = self.sites.lose(site, f"the site {site} does not answer any more")
        self.since = time.monotonic()
        return found


class FlareEngine:
    """Asks clients at their sites; implements :class:`fedllm.core.server.Engine`.

    Args:
        sites: where the clients are.
        leg: the method that is asked for: federated, local, base.
        group: client -> its group.
        stores: whether clients keep anything between rounds.
        own: answers for the client `server`; None: nobody does.
        guard: hears what clients have spent of their privacy.
        hurried: whether replies are given on as they come; else in the order of the requests.

    Attributes:
        unsaved: sites with clients whose uploads were used since it was last told what they keep.
    """

    def __init__(
        self,
        sites: Sites,
        leg: str,
        group: Callable[[str], Group],
        stores: bool,
        own: LocalEngine | None = None,
        guard: Guard | None = None,
        hurried: bool = False,
    ) -> None:
        self.sites, self.leg, self._group, self.own = sites, leg, group, own
        self.guard, self.hurried = guard or Guard(), hurried
        self.orders = Orders(sites)
        self.stores = RemoteStores(self, stores)
        self._sessions: dict[str, str] = {}
        self.unsaved: set[str] = set()
        self.round = 0

    @property
    def client_ids(self) -> Sequence[str]:
        """The clients of all sites, sorted."""
        return sorted(self.sites.home)

    def group(self, client: str) -> Group:
        """See :class:`fedllm.core.server.Engine`."""
        return self._group(client)

    async def ask(self, requests: Iterable[Request], deadline: float | None) -> AsyncGenerator[Reply, None]:
        """See :class:`fedllm.core.server.Engine`. The deadline holds for all requests together."""
        begun = time.monotonic()
        for here, group in itertools.groupby(requests, lambda request: request.client == SERVER):
            answered = self._here if here else self._there
            async with aclosing(answered(group, deadline, begun)) as replies:
                async for reply in replies:
                    if reply.session is not None:
                        self._sessions[reply.session] = reply.client
                    yield reply

    def _here(self, requests: Iterator[Request], deadline: float | None, begun: float) -> AsyncGenerator[Reply, None]:
        """Requests to the client `server`."""
        if self.own is None:
            raise ConfigError(f"The client '{SERVER}' is asked, and nobody answers for it here.")
        left = None if deadline is None else max(0.0, begun + deadline - time.monotonic())
        return self.own.ask(requests, left)

    async def _there(
        self, requests: Iterator[Request], deadline: float | None, begun: float
    ) -> AsyncGenerator[Reply, None]:
        """Requests to clients at sites."""
        while lot := _lot(requests):
            self.round = lot[-1].round
            self.sites.enough()
            left = None if deadline is None else begun + deadline - time.monotonic()
            trip = _Trip(self, lot, deadline, left)
            try:
                async for reply in trip.replies():
                    yield reply
            finally:
                trip.end()

    def close(self, sessions: Sequence[str]) -> None:
        """See :class:`fedllm.core.server.Engine`."""
        for session in sessions:
            client = self._sessions.pop(session, None)
            if client == SERVER and self.own is not None:
                self.own.close([session])
            elif client is not None:
                self.orders.add(client, {"do": "close", "sessions": [session]})

    def drop(self, client: str) -> None:
        """See :class:`fedllm.core.server.Engine`."""
        if client == SERVER and self.own is not None:
            self.own.drop(client)
            return
        entry = self.sites.note("reject", round=self.round, client=client)
        self.orders.add(client, {"do": "drop", "client": client, "audit": entry})

    def settle(self, accepted: Sequence[str]) -> None:
        """See :class:`fedllm.core.server.Engine`."""
        if self.own is not None:
            self.own.settle([client for client in accepted if client == SERVER])
        for site in self.sites.names:
            own = sorted({client for client in accepted if self.sites.home.get(client) == site})
            self.orders.to(site, {"do": "settle", "clients": own})
            if own:
                self.unsaved.add(site)

    def forget(self, request: Request) -> None:
        """What a client's turn left is undone: its answer was not, or will not be, used."""
        facts = {"id": request.id, "client": request.client, "session": request.session}
        self.orders.add(request.client, {"do": "forget", **facts})


class Orders:
    """What sites are told about private stores, in order, until they say that it is done."""

    def __init__(self, sites: Sites) -> None:
        self.sites = sites
        self._count = itertools.count(time.time_ns())  # numbers grow from one engine of a leg to the next
        self._open: dict[str, list[dict[str, Any]]] = {}

    def add(self, client: str, order: dict[str, Any]) -> None:
        """An order about one client."""
        self.to(self.sites.home[client], order)

    def to(self, site: str, order: dict[str, Any]) -> None:
        """An order to a site; nothing is kept for one that is lost."""
        if site in self.sites.lost:
            self._open.pop(site, None)
            return
        self._open.setdefault(site, []).append({"n": next(self._count), **order})

    def of(self, site: str) -> list[dict[str, Any]]:
        """What is to be done at a site."""
        return list(self._open.get(site, ()))

    def done(self, site: str, number: int | None) -> None:
        """A site has carried out all orders up to this one."""
        if number is not None:
            self._open[site] = [order for order in self._open.get(site, ()) if order["n"] > number]


class RemoteStores:
    """The private stores at the sites, for checkpoints: the names of their files, never their contents."""

    def __init__(self, engine: FlareEngine, used: bool) -> None:
        self.engine, self.used = engine, used
        self._known: dict[str, dict[str, str]] = {}

    def manifest(self) -> dict[str, str]:
        """Client -> the file of its entry at its site; of a site that is lost, what it said last.

        Raises:
            RunError: a site was lost before it said what its clients keep of uploads that were used: to go on would
                be to count an upload and to forget its other half.
        """
        if not self.used:
            return {}
        for site, answer in self._ask(lambda site: {}).items():
            if isinstance(answer, Letter):
                self._known[site] = self._own(answer.meta["manifest"], site)
                self.engine.unsaved.discard(site)
            elif site in self.engine.unsaved:
                raise RunError(
                    f"{site} was lost after its uploads of round {self.engine.round} were used: {answer.rstrip('.')}.",
                    "What its clients keep of them is not known.",
                    action="The run goes on from its last checkpoint, which is before that round.",
                )
        if self._own_store is not None:
            self._known[SERVER] = self._own_store.manifest()
        return dict(sorted(pair for known in self._known.values() for pair in known.items()))

    def restore(self, manifest: dict[str, str]) -> None:
        """Go back to a checkpoint's entries; raises :class:`RunError` where a site cannot."""
        if not self.used:
            return
        self.engine.unsaved.clear()
        if self._own_store is not None:
            self._own_store.restore({client: file for client, file in manifest.items() if client == SERVER})
        own = {site: self._own(manifest, site) for site in self.engine.sites.names}
        away = set(self.engine.sites.lost)  # they go back when they are here again: the checkpoints name their files
        for site, answer in self._ask(lambda site: {"restore": own[site]}).items():
            if isinstance(answer, Letter):
                self._known[site] = self._own(answer.meta["manifest"], site)
            elif site in away:
                self._known[site] = own[site]
            else:
                raise RunError(f"{site} cannot go back to the checkpoint: {answer}")

    def prune(self, keep: Sequence[dict[str, str]]) -> None:
        """A checkpoint was written: files that no manifest names may go."""
        self.engine.sites.checkpoint(self.engine.round)
        if self.used:
            if self._own_store is not None:
                self._own_store.prune([{c: file for c, file in one.items() if c == SERVER} for one in keep])
            for site in self.engine.sites.names:
                self.engine.orders.to(site, {"do": "prune", "keep": [self._own(one, site) for one in keep]})

    @property
    def _own_store(self) -> PrivateStore | None:
        """That of the client `server`."""
        return None if self.engine.own is None else self.engine.own.worker.private

    def _own(self, manifest: Mapping[str, str], site: str) -> dict[str, str]:
        home = self.engine.sites.home
        return {client: file for client, file in manifest.items() if home.get(client) == site}

    def _ask(self, more: Callable[[str], dict[str, Any]]) -> dict[str, Letter | str]:
        engine = self.engine
        facts = {"op": "stores", "leg": engine.leg, "checkpoint": engine.sites.mark}
        letters = {s: Letter({**facts, "orders": engine.orders.of(s), **more(s)}) for s in engine.sites.names}
        answers = engine.sites.ask(letters)
        died = {s: letters[s] for s, a in answers.items() if isinstance(a, Letter) and a.meta.get("died")}
        answers |= engine.sites.ask(died) if died else {}  # its worker is started again, and finds all of it on disk
        for site, answer in answers.items():
            if isinstance(answer, Letter) and answer.op == "stores":
                engine.orders.done(site, answer.meta["applied"])
            else:  # what its clients keep is not known any more
                reason = answer if isinstance(answer, str) else str(answer.meta.get("reason"))
                answers[site] = engine.sites.lose(site, reason)
        return answers


class _Trip:
    """One lot of requests on their way: a letter to each site, and the replies in the order of the requests."""

    def __init__(self, engine: FlareEngine, lot: list[Request], deadline: float | None, left: float | None) -> None:
        self.engine, self.lot, self.deadline = engine, lot, deadline
        self.until = None if left is None else time.monotonic() + left
        self.by_site: dict[str, list[Request]] = {}
        for request in lot:
            self.by_site.setdefault(engine.sites.home[request.client], []).append(request)
        self.answers: asyncio.Queue[tuple[str, Letter | str]] = asyncio.Queue()
        self.takers: dict[str, Callable[[], None]] = {}
        self.replied: dict[str, Reply] = {}
        self.given: set[str] = set()
        self._digests: dict[int, Digest] = {}

    async def replies(self) -> AsyncGenerator[Reply, None]:
        """One reply for every request."""
        loop, watch = asyncio.get_running_loop(), Watch(self.engine.sites)
        for site, asked in self.by_site.items():
            self._send(loop, site, asked)
        self._let_go()
        left = {request.id: None for request in self.lot}
        while left:
            name = next((name for name in left if name in self.replied or not self.engine.hurried), None)
            if name is None or name not in self.replied:
                await self._wait(watch)
                continue
            del left[name]
            self.given.add(name)
            yield self.replied.pop(name)

    def _let_go(self) -> None:
        """All letters are on their way: their bodies are not needed here any more, and may be large."""
        self._digests.clear()
        for requests in (self.lot, *self.by_site.values()):
            requests[:] = [replace(request, body=b"") for request in requests]

    def end(self) -> None:
        """Take back what is under way; what was answered and not given on is undone at the clients."""
        for take_back in self.takers.values():
            take_back()
        for request in self.lot:
            if request.id not in self.given:
                self.engine.forget(request)

    def _send(self, loop: asyncio.AbstractEventLoop, site: str, asked: Sequence[Request]) -> None:
        lost = self.engine.sites.lost.get(site)
        if lost is not None:
            self._fail(site, lost, undo=False)
            return
        left = None if self.until is None else self.until - time.monotonic()
        if left is not None and left <= 0:
            self._fail(site, _late(self.deadline), undo=True)
            return
        orders = self.engine.orders.of(site)
        noted = [{**_of(request), "payload": self._digest(request.body)} for request in asked]
        entries = self.engine.sites.notes("send", noted)
        requests = list[dict[str, Any]]()
        bodies = dict[str, tuple[int, bytes]]()  # one that several clients receive is in the letter once
        for request, entry in zip(asked, entries, strict=True):
            place, _ = bodies.setdefault(self._digest(request.body).sha256, (len(bodies), request.body))
            requests.append({**_named(request), "body": place, "audit": entry})
        about = {"op": "ask", "leg": self.engine.leg, "orders": orders, "deadline": left}
        meta = {**about, "checkpoint": self.engine.sites.mark, "requests": requests}
        letter = Letter(meta, [body for _, body in bodies.values()], list(bodies))

        def done(answer: Letter | str) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(self.answers.put_nowait, (site, answer))

        self.takers[site] = self.engine.sites.post.send(site, letter, done)

    async def _wait(self, watch: Watch) -> None:
        """Take one answer; or, after a while of silence, look who is late, gone or not wanted any more."""
        left = 0.25 if self.until is None else max(0.0, min(0.25, self.until - time.monotonic()))
        try:
            site, answer = await asyncio.wait_for(self.answers.get(), left)
        except TimeoutError:
            await self._silence(watch)
            return
        if self.takers.pop(site, None) is None:
            return  # it was answered for before
        if isinstance(answer, Letter):
            self._take(site, answer)
        else:
            self._fail(site, answer, undo=True)

    async def _silence(self, watch: Watch) -> None:
        over = self.engine.sites.post.over()
        if over is not None:
            raise RunError(f"The run was ended: {over}.")
        waiting = list(self.takers)
        if self.until is not None and time.monotonic() >= self.until:
            for site in waiting:
                self.takers.pop(site)()
                self._fail(site, _late(self.deadline), undo=True)
            return
        for site, reason in (await asyncio.to_thread(watch.silent, waiting)).items():
            if site in self.takers:
                self.takers.pop(site)()
                self._fail(site, reason, undo=False)

    def _take(self, site: str, answer: Letter) -> None:
        """The replies of a site; a request it says nothing of is answered for."""
        if answer.op != "replies":
            self._fail(site, str(answer.meta.get("reason", "the site's answer is no list of replies")), undo=True)
            return
        asked = {request.id: request for request in self.by_site[site]}
        found: dict[str, tuple[Reply, dict[str, Any]]] = {}
        try:
            for facts in answer.meta["replies"]:
                request = asked[facts["id"]]
                body = None if facts["body"] is None else answer.blobs[facts["body"]]
                cost = {str(name): _amount(value) for name, value in facts["cost"].items()}
                error, session = (None if facts[n] is None else str(facts[n]) for n in ("error", "session"))
                if error is not None and error.startswith(LATE):
                    error = _late(self.deadline)  # a site knows only what is left of it
                if facts.get("spent") is not None:
                    self.engine.guard.heard(request.client, facts["spent"])
                found[request.id] = Reply(request.id, request.client, body, error, cost, session), facts
            applied = answer.meta["applied"]
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as fault:
            self._fail(site, f"the site's answer cannot be read ({type(fault).__name__})", undo=True)
            return
        self._write_down([(asked[name], *pair) for name, pair in found.items()], answer.digests)
        self.engine.orders.done(site, applied)
        for name, (reply, _) in found.items():
            self.replied[name] = reply
            if reply.body is None:
                self.engine.forget(asked[name])  # it may have been answered after the site stopped waiting
        self._fail(site, "the site did not answer for it", undo=True)

    def _write_down(self, found: Sequence[tuple[Request, Reply, dict[str, Any]]], digests: list[str]) -> None:
        """What arrived, before anything is made of it; `digests` are those of the letter's byte strings."""
        came = [
            (request, Digest(digests[facts["body"]], len(reply.body)), facts.get("audit"))
            for request, reply, facts in found
            if reply.body is not None
        ]
        about = [{**_of(request), "payload": payload, "peer": peer} for request, payload, peer in came]
        self.engine.sites.notes("receive", about)
        gone = [
            {**_of(request), "reason": told(facts.get("refused"), str(reply.error))}
            for request, reply, facts in found
            if reply.body is None
        ]
        self.engine.sites.notes("lost", gone)

    def _digest(self, body: bytes) -> Digest:
        """Of a request's body; that which many clients receive is hashed once."""
        if id(body) not in self._digests:
            self._digests[id(body)] = Digest.of(body)
        return self._digests[id(body)]

    def _fail(self, site: str, reason: str, undo: bool) -> None:
        """No answer for the requests of a site that have none yet."""
        left = [request for request in self.by_site[site] if request.id not in self.replied]
        self.engine.sites.notes("lost", [{**_of(request), "reason": ClientLost(reason)} for request in left])
        for request in left:
            self.replied[request.id] = Reply(request.id, request.client, None, reason)
            if undo:
                self.engine.forget(request)


def _lot(waiting: Iterator[Request]) -> list[Request]:
    """The next requests; bodies are counted once each."""
    found: list[Request] = []
    seen: set[int] = set()
    size = 0
    for request in waiting:
        found.append(request)
        if id(request.body) not in seen:
            seen.add(id(request.body))
            size += len(request.body)
        if len(found) == LOT or size >= LOT_BYTES:
            break
    return found


def _of(request: Request) -> dict[str, Any]:
    return {"round": request.round, "client": request.client}


def _named(request: Request) -> dict[str, Any]:
    found = asdict(request)
    del found["body"]
    return found


def _amount(value: Any) -> float:
    """What a client says it spent; raises :class:`ValueError` for what cannot be added up."""
    found = float(value)
    if not math.isfinite(found) or found < 0:
        raise ValueError(f"a cost of {found}")
    return found


def _late(deadline: float | None) -> str:
    return f"{LATE} {deadline} s"
