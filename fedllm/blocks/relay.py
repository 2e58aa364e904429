"""Relay - a server that only carries: it forwards what peers say to each other in their open sessions.

Peers send first and read later, so that no two wait for each other; a peer that fails, is late or refused is missing
from the next step and the others go on. What is forwarded is not looked into.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import fmean, pstdev
from typing import TYPE_CHECKING, Any

from fedllm.blocks.mixing import Agreement, checked
from fedllm.blocks.topology import Graph, Matrix
from fedllm.core.errors import RoundFailed, UploadRejected
from fedllm.core.message import Json, Part, Received
from fedllm.core.tensors import Tensors

if TYPE_CHECKING:
    from fedllm.core.meter import Meter
    from fedllm.core.server import Answer, Server

Waiting = dict[str, "Answer"]
"""Peers that wait in a session, with what they said last."""


def places(server: Server, peers: Mapping[str, Answer]) -> list[int]:
    """The numbers of these peers in the graph."""
    return [number for number, peer in enumerate(server.clients) if peer in peers]


async def to_neighbours(
    server: Server,
    waiting: Waiting,
    graph: Graph,
    weights: Callable[[Graph], Matrix],
    deadline: float | None = None,
    parts: bool = True,
) -> Waiting:
    """Send every waiting peer what its waiting neighbours said; returns what they answer.

    A peer receives `senders` (ids), `said` (sender -> its numbers), `weights` (its row, its own entry too, of the graph
    of waiting peers) and, with `parts`, `from.K`: the part `message` of the K-th sender, or its part `whole` where the
    sender's number `behind` names the reader.
    """
    ids, graph = list(server.clients), graph.alive(places(server, waiting))
    matrix = weights(graph)
    replies: dict[str, Received] = {}
    for place, reader in enumerate(ids):
        if reader in waiting:
            senders = [ids[j] for j in graph.senders(place)]
            row = {ids[j]: float(matrix[place, j]) for j in (*graph.senders(place), place)}
            said = {j: waiting[j].upload.numbers for j in senders}
            sent = {f"from.{k}": _addressed(waiting[j], reader) for k, j in enumerate(senders)} if parts else {}
            numbers = {"senders": senders, "said": said, "weights": row}
            replies[str(waiting[reader].session)] = Received(None, numbers, **sent)
    return {answer.client: answer async for answer in server.reply(replies, deadline)}


async def in_rings(
    server: Server, waiting: Waiting, groups: Sequence[Sequence[str]], deadline: float | None = None
) -> Waiting:
    """Pass parts `message` around rings, hop by hop, until the peers have ended; returns their last uploads.

    Every peer first receives its `group` (ids), then `from.0`: what the one before it sent. Where a member is missing
    the others of its group receive `abort`.
    """
    groups = [[peer for peer in group if peer in waiting] for group in groups]
    replies = {str(waiting[peer].session): Received(None, {"group": group}) for group in groups for peer in group}
    ended: Waiting = {}
    while replies:
        answers = {answer.client: answer async for answer in server.reply(replies, deadline)}
        ended.update({peer: answer for peer, answer in answers.items() if answer.session is None})
        waiting = {peer: answer for peer, answer in answers.items() if answer.session is not None}
        replies = {}
        for group in groups:
            missing = any(peer not in waiting for peer in group)
            for place, peer in enumerate(group):
                if peer in waiting:
                    sent = {} if missing else {"from.0": waiting[group[place - 1]].upload.parts["message"]}
                    replies[str(waiting[peer].session)] = Received(None, {"abort": missing}, **sent)
    return ended


def _addressed(answer: Answer, reader: str) -> Part:
    """The part of a message that is for this reader."""
    return answer.upload.parts["whole" if reader in answer.upload.numbers.get("behind", ()) else "message"]


def opened(answer: Received, read: Callable[[str, Tensors], Tensors], refused: list[str]) -> dict[str, Tensors]:
    """What each neighbour sent, as `read` makes it; a sender whose message it rejects joins `refused` and counts not.

    Args:
        answer: what :func:`to_neighbours` sent this peer.
        read: read(sender, tensors) -> tensors; raises :class:`UploadRejected` for what cannot be used.
        refused: grows.
    """
    found: dict[str, Tensors] = {}
    for k, sender in enumerate(answer.numbers["senders"]):
        try:
            found[sender] = read(sender, answer[f"from.{k}"])
        except UploadRejected:
            refused.append(sender)
    return found


async def agreement_of(
    server: Server, lend: Callable[..., Any], like: Tensors, deadline: float | None = None
) -> Agreement:
    """Ask everybody for its model, the part `model` of what `lend` returns; others than `like` are rejected."""
    agreement = Agreement()
    async for answer in server.ask(lend, dict.fromkeys(server.clients, Received()), deadline):
        try:
            agreement.add(checked(answer.upload["model"], like, answer.client))
        except UploadRejected as fault:
            server.reject(answer.client, str(fault))
    return agreement


def over_peers(values: Mapping[str, Mapping[str, float | None]]) -> dict[str, Json]:
    """Metric -> mean, least and most over peers, and their standard deviation; `worst`: who has the highest loss."""
    found: dict[str, Json] = {}
    for metric in next(iter(values.values()), {}):
        held = {peer: value for peer, by in values.items() if (value := by.get(metric)) is not None}
        if held:
            row = list(held.values())
            facts = {"mean": fmean(row), "least": min(row), "most": max(row), "deviation": pstdev(row)}
            found[metric] = {**facts, "worst": max(held, key=held.__getitem__)} if metric == "loss" else facts
    return found


def traffic(meter: Meter) -> dict[str, int]:
    """Bytes so far: `edge_bytes` - of each message once for each neighbour it went to, headers not counted."""
    edges = sum(n for name, n in meter.bytes.items() if name.startswith("work/down/from."))
    return {"edge_bytes": edges, "relay_bytes": meter.total("up", "work") + meter.total("down", "work")}


def round_facts(server: Server, ended: Waiting) -> dict[str, Json]:
    """What is known of a round: peers that came through, training loss, `moved` (how far mixing moved the mean peer, in
    shares of its norm), how many were lost or rejected, and who refused whose message.

    Raises :class:`RoundFailed` where no peer came through.
    """
    if not ended:
        reasons = [entry["reason"] for entry in (*server.rejected, *server.lost)]
        raise RoundFailed(
            f"No peer came to the end of round {server.round}.",
            f"First reason: {reasons[0]}" if reasons else "",
            action="Mend the cause, then 'fedllm resume' the run; earlier rounds are saved.",
        )
    found = [answer.upload for answer in ended.values()]
    loss, n = (sum(upload.metrics["loss"][k] for upload in found) for k in (0, 1))
    moved = fmean(upload.numbers["moved"] for upload in found)
    counts = {"peers": len(found), "lost": len(server.lost), "rejected": len(server.rejected)}
    refused = {peer: answer.upload.numbers["refused"] for peer, answer in ended.items()}
    refused = {peer: names for peer, names in refused.items() if names}
    return {"round": server.round, "loss": loss / n if n else None, "moved": moved, **counts, "refused": refused}
