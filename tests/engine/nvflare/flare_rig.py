"""What the tests of this folder share: a small recipe, its rows dealt to sites, and sites without FLARE between."""

from __future__ import annotations

import datetime
import json
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import yaml
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

import fedllm
from fedllm.engine.nvflare import trust
from fedllm.engine.nvflare.facts import ServerFacts, SiteFacts
from fedllm.engine.nvflare.keeper import Keeper
from fedllm.engine.nvflare.parts import Letter, from_shareable, to_shareable

RECIPE: dict[str, Any] = {
    "name": "flare", "rounds": 2, "method": "fedavg", "train": {"steps": 2, "batch_size": 2}, "cohort": "all",
    "cohort_width": 1, "seed": 3, "model": {"name": "toy:llama", "device": "cpu"}, "adapter": {"rank": 2},
    "task": {"max_length": 48, "template": "plain"}, "evaluation": {"against": []},
}  # fmt: skip
WORDS = ["amber", "birch", "cedar", "delta", "ember", "fjord", "grove", "haven"]
CLIENTS = ("c0", "c1", "c2", "c3", "c4")
HOMES = {"site-1": ("c0", "c3"), "site-2": ("c1", "c4"), "site-3": ("c2",)}
"""Who is where: the order of the ids is not the order of the sites."""
DATA: dict[str, Any] = {"partition": {"by": "natural", "column": "who"}, "evaluation": {"fraction": 0.3}}


def rows(client: str) -> list[dict[str, str]]:
    number = CLIENTS.index(client)
    words = [WORDS[(number * 2 + i) % 8] for i in range(5 + number)]
    return [{"who": client, "instruction": f"reverse {w}{i}", "response": w[::-1]} for i, w in enumerate(words)]


def labelled(client: str) -> list[dict[str, str]]:
    """Rows for a classifier; no site has all labels."""
    number = CLIENTS.index(client)
    labels = ["even", "odd", "none", "both"][number % 3 : number % 3 + 2]
    return [
        {"who": client, "text": f"is {w} odd", "label": labels[i % 2]} for i, w in enumerate(WORDS[: 5 + number % 3])
    ]


SERVER, ADMIN = "localhost", "admin@hub.org"
POLICY: dict[str, Any] = {
    "coordinators": [ADMIN], "methods": ["*"], "purposes": ["research"], "data_sets": ["default"], "max_rounds": 20,
    "max_clients": 3, "hours": "always", "ops": ["*"], "parts": ["*"], "max_egress_run": 10**10,
    "max_egress_round": 10**9,
}  # fmt: skip
"""What a site of these tests allows."""


class Authority:
    """Issues the certificates of the kits, as FLARE's provisioning does."""

    def __init__(self, name: str = "demo") -> None:
        self.name, self.key = name, ec.generate_private_key(ec.SECP256R1())
        self.root = self._issue(name, self.key)

    def kit(self, folder: Path, owner: str, own: str = "client") -> Path:
        """Put a certificate, its key and the root into a kit's folder."""
        key, startup = ec.generate_private_key(ec.SECP256R1()), folder / "startup"
        startup.mkdir(parents=True, exist_ok=True)
        form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        (startup / f"{own}.key").write_bytes(key.private_bytes(*form))
        (startup / f"{own}.crt").write_bytes(self._issue(owner, key))
        (startup / "rootCA.pem").write_bytes(self.root)
        return folder

    def _issue(self, owner: str, key: ec.EllipticCurvePrivateKey) -> bytes:
        subject, issuer = (x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, n)]) for n in (owner, self.name))
        now = datetime.datetime.now(datetime.UTC)
        builder = (
            x509.CertificateBuilder().subject_name(subject).issuer_name(issuer).public_key(key.public_key())
            .serial_number(x509.random_serial_number()).not_valid_before(now - datetime.timedelta(hours=1))
            .not_valid_after(now + datetime.timedelta(days=1))
            .add_extension(x509.BasicConstraints(ca=owner == self.name, path_length=None), True)
        )  # fmt: skip
        return builder.sign(self.key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


Make = Callable[[str], list[dict[str, str]]]


def write_rows(file: Path, clients: Iterable[str], make: Make = rows) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("\n".join(json.dumps(row) for client in clients for row in make(client)))
    return file


def recipe(**changes: Any) -> dict[str, Any]:
    """The resolved recipe, as a job carries it."""
    return fedllm.Recipe.model_validate(load({**RECIPE, **changes})).model_dump(mode="json")


def load(values: dict[str, Any]) -> dict[str, Any]:
    from fedllm.recipe import load_recipe

    return load_recipe(values).model_dump(mode="json")


def site_facts(clients: Iterable[str], kit: Path, make: Make = rows, **more: Any) -> dict[str, Any]:
    file = write_rows(kit / "data" / "rows.jsonl", clients, make)
    write_policy(kit)
    more = {"policy": str(kit / "policy.yaml"), **more}
    return {"data": {**DATA, "path": str(file)}, "device": "cpu", "threads": 1, **more}


def write_policy(kit: Path, **changes: Any) -> None:
    (kit / "policy.yaml").write_text(yaml.safe_dump({**POLICY, **changes}))


def at_home(folder: Path, make: Make = rows, **changes: Any) -> Any:
    """The same recipe played by the local engine over all clients."""
    file = write_rows(folder / "all.jsonl", CLIENTS, make)
    whole = {**RECIPE, **changes, "data": {**DATA, "path": str(file)}}
    return fedllm.run(whole, folder=folder / "home")


class Loopback:
    """Sites of this process: letters go through their wire form to a keeper with a real worker process."""

    def __init__(self, folder: Path, make: Make = rows, homes: Any = None, data: Any = None) -> None:
        self.folder, self.authority = folder, Authority()
        self.server = self.authority.kit(folder / "server", SERVER, "server")
        self.admin = self.authority.kit(folder / "admin", ADMIN)
        self.keepers: dict[str, Keeper] = {}
        self.before: Callable[[str, Letter], None] = lambda site, letter: None
        self.asked: list[tuple[str, Letter]] = []
        self.ended: str | None = None
        self.away: set[str] = set()  # gone
        self.endless = False  # the sites do not hear that a run is over
        self.mute: set[str] = set()  # there, and too busy to answer
        for site, clients in (homes or HOMES).items():
            kit = self.authority.kit(folder / site, site)
            (kit / "local").mkdir(parents=True, exist_ok=True)
            facts = site_facts(clients, kit, make)
            facts["data"] = {**facts["data"], **(data or {})}
            (kit / "local" / "fedllm.json").write_text(json.dumps(facts))
            self.keepers[site] = Keeper(kit, SiteFacts(**facts))
        self._turns = {site: threading.Lock() for site in self.keepers}

    def signed(self, run: str, recipe: dict[str, Any], kit: Path | None = None, **more: Any) -> trust.Signed:
        """The run's manifest, signed by the administrator, or with another kit."""
        return trust.signed(kit or self.admin, run, recipe, sorted(self.keepers), **{"purpose": "research", **more})

    def play(self, run: str, recipe: dict[str, Any], watch: Any = None, signed: Any = None, **facts: Any) -> Any:
        """The server's program over these sites."""
        from fedllm.engine.nvflare.program import Job, play

        signed = self.signed(run, recipe) if signed is None else signed
        job = Job(run, recipe, sorted(self.keepers), signed.to_json())
        return play(job, self, ServerFacts(device="cpu", runs="fedllm/runs", **facts), self.server, watch)

    def audit(self, who: str = SERVER) -> Path:
        """The audit log of the server or of a site."""
        return self.folder / ("server" if who == SERVER else who) / "fedllm" / "audit.jsonl"

    def send(self, site: str, letter: Letter, done: Callable[[Letter | str], None]) -> Callable[[], None]:
        left = threading.Event()

        def go() -> None:
            with self._turns[site]:
                if left.is_set() or site in self.away | self.mute:
                    return
                self.asked.append((site, letter))
                self.before(site, letter)
                if site in self.away:
                    return
                if letter.op == "end" and self.endless:
                    done("it does not hear it")
                    return
                arrived = from_shareable(to_shareable(letter))
                answer = self.keepers[site].handle(arrived, left.is_set)
                if not left.is_set():
                    done(from_shareable(to_shareable(answer)))

        threading.Thread(target=go, daemon=True).start()
        return left.set

    def alive(self, site: str) -> bool:
        return site not in self.away

    def over(self) -> str | None:
        return self.ended

    def end(self) -> None:
        for keeper in self.keepers.values():
            keeper.end()
