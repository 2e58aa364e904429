"""Roster - who takes part: every client belongs to a group of clients with the same model, rank and device class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fedllm.core.errors import ConfigError
from fedllm.core.seeds import numpy_stream

SERVER = "server"
"""The id of the pseudo-client that trains where the server is; its rows are the public data."""


@dataclass(frozen=True)
class Group:
    """A kind of client; a recipe names them in its section `groups`.

    Attributes:
        name: the group's name; `all` where a recipe has no groups.
        rank: rank of the clients' LoRA; None where the recipe's adapter decides.
        device: the device class, for tables and policies; nothing depends on it.
    """

    name: str = "all"
    rank: int | None = None
    device: str = ""


ALL = Group()
"""The group of everybody where a recipe names none."""


@dataclass(frozen=True)
class Member:
    """A registered client as the server knows it: its id and its group."""

    id: str
    group: Group = ALL


def assign(
    clients: Sequence[str], groups: Mapping[str, Group], shares: Mapping[str, float | Sequence[str]], seed: int
) -> dict[str, Group]:
    """Deal clients to groups: those named first, the rest by shares, in a seeded order.

    Args:
        clients: all client ids.
        groups: the groups by name.
        shares: by name, either ids or a share of the clients that are not named anywhere.
        seed: decides the order in which shares are dealt.

    Raises:
        ConfigError: an unknown or twice named client, or shares that do not sum to 1 where clients are left.
    """
    found: dict[str, Group] = {}
    for name, share in shares.items():
        for client in () if isinstance(share, float | int) else share:
            if client not in set(clients):
                raise ConfigError.unknown(f"client (groups.{name}.clients)", client, list(clients))
            if client in found:
                raise ConfigError(f"Client '{client}' is named in groups.{found[client].name} and groups.{name}.")
            found[client] = groups[name]
    rest = [client for client in clients if client not in found]
    parts = {name: float(share) for name, share in shares.items() if isinstance(share, float | int)}
    if rest and abs(sum(parts.values()) - 1) > 1e-6:
        raise ConfigError(
            f"The shares of the groups sum to {sum(parts.values()):g}.",
            f"{len(rest)} clients are named in no group, and every one needs a group.",
            action="Let groups.*.share sum to 1, or name all clients.",
        )
    order = [rest[i] for i in numpy_stream(seed, "groups").permutation(len(rest))]
    begun, ends = 0, 0.0
    for name, share in parts.items():
        ends += share
        stop = round(ends * len(order))
        found.update((client, groups[name]) for client in order[begun:stop])
        begun = stop
    return dict(sorted(found.items()))
