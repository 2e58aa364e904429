"""Guard - the secure sum in a round of any method: five exchanges in one session of each client, then one update.

    Setup -> Advert;  Roster -> Dealt;  Deal and the method's payload -> Masked;  Survivors -> Confirm;  Tags -> Reveal

The model travels with the third message, so that clients train when everybody's keys are known, and a client that fails
in training is one that dropped out. All tensors of an upload are one vector, in the order of the layout that the server
sends; its weight is inside, and so is its training loss. The server sees sizes, who took part, and the sum.
"""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy
import torch

from fedllm.core.errors import ConfigError, FedLLMError, ModeConflict, RoundFailed, UploadRejected
from fedllm.core.guard import Guard, Quiet
from fedllm.core.message import Dense, Json, Received, Upload, as_part
from fedllm.core.method import Method
from fedllm.core.reducer import Reduction, Update
from fedllm.core.tensors import Tensors, norm
from fedllm.modes.means import only_work, weighting_of
from fedllm.modes.secagg.client import Advert, Client, Confirm, Deal, Dealt, Letter, Masked, Reveal, Roster, Setup, Tags
from fedllm.modes.secagg.client import Survivors as Survivors
from fedllm.modes.secagg.graph import Policy
from fedllm.modes.secagg.ring import Ring
from fedllm.modes.secagg.server import Server as Summing

if TYPE_CHECKING:
    from fedllm.core.server import Answer, Server
    from fedllm.modes.codec import Codec
    from fedllm.modes.privacy.central import Central
    from fedllm.modes.secagg.settings import SecureSettings

PART = "secure"
"""The part of a message that belongs to the secure sum."""
LOSS = 100.0
"""A training loss in the vector is at most this; it stands there as a share of it."""
LOSS_BITS = 15
"""So fine is that share at least: it is written in several entries where one entry has fewer bits."""
Layout = list[tuple[str, str, list[int]]]
"""Part, name and shape of each tensor, in the order of the vector."""


class SecureSum(Guard):
    """Secure aggregation in one run; also the guard at its clients, from their own recipe.

    Args:
        settings: the recipe's section `secure`.
        method: must reduce every part by a mean of one weighting.
        count: the most clients in one sum.
        central: privacy of clients, whose noise the server adds to the sum; None for none.
        codec: a codec of integers with one public scale: its integers are what is summed.

    Raises:
        ModeConflict: a method or a privacy that no secure sum can serve.
        ConfigError: settings that cannot be kept for so many clients.
    """

    def __init__(
        self,
        settings: SecureSettings,
        method: Method,
        count: int,
        central: Central | None = None,
        codec: Codec | None = None,
    ) -> None:
        self.settings, self.count, self.central, self.codec = settings, count, central, codec
        self.private = () if codec is None else (codec.memory_name,)
        self.weighting = weighting_of(method, "The section 'secure'")
        self.policy = Policy(settings.graph, settings.dropout, settings.corruption, settings.minimum)
        self._ring(settings.clip)
        if count < settings.minimum:
            raise ConfigError(
                f"A secure sum of {count} clients a round is asked for.",
                f"Allowed: {settings.minimum} or more (secure.minimum).",
                action="Raise cohort, or leave the section 'secure' out.",
            )
        self.policy.shape(count)
        if central is not None:
            _coins(central, settings.minimum)

    def _ring(self, clip: float) -> Ring:
        weight = 1.0 if self.weighting == "uniform" else self.settings.max_weight
        return Ring(self.count, clip, self.settings.precision, weight, shrinks=self.central is not None)

    # -- at a client --------------------------------------------------------------------------------------------------

    async def work(self, function: Callable[..., Any], algorithm: object, client: Any, received: Received) -> Upload:
        """The client's half of a sum around its half of the method."""
        layout: Layout = received.numbers[PART]["layout"]
        bound = received.numbers[PART]["bound"]
        ring = self._ring(self.settings.clip if bound is None else float(bound))
        extra = _digits(ring) + (bound is not None)
        me = Client(client.id, sum(math.prod(shape) for _, _, shape in layout) + extra, ring, self.policy)
        received = await client.exchange(_said(me.advertise(_heard(Setup, received))))
        received = await client.exchange(_said(me.share(_heard(Roster, received))))
        deal = _heard(Deal, received)
        rest = {name: part for name, part in received.parts.items() if name != PART}
        upload = await function(algorithm, client, Received.of(rest, received.numbers))
        if self.codec is not None:
            upload = _rounded(self.codec, upload, client)
        values, weight = self._vector(upload, layout, ring, bound)
        received = await client.exchange(_said(me.mask(deal, values, weight)))
        received = await client.exchange(_said(me.confirm(_heard(Survivors, received))))
        return _said(me.unmask(_heard(Tags, received)))

    def _vector(self, upload: Upload, layout: Layout, ring: Ring, bound: float | None) -> tuple[numpy.ndarray, float]:
        """An upload as one vector, float64, and its weight: the loss, whether it lies within the bound, its tensors."""
        held: dict[tuple[str, str], torch.Tensor] = {}
        for part, value in upload.parts.items():
            if not isinstance(value, Dense):
                raise UploadRejected(f"The part '{part}' is {value.kind}.", "A secure sum takes dense parts.")
            held.update({(part, name): tensor for name, tensor in value.tensors.items()})
        wanted = {(part, name): tuple(shape) for part, name, shape in layout}
        if {key: tuple(tensor.shape) for key, tensor in held.items()} != wanted:
            raise UploadRejected("The upload has other names or shapes than the sum that was agreed on.")
        within = []
        if bound is not None:
            from fedllm.modes.privacy.mechanism import clip

            flat = {f"{part}/{name}": tensor for (part, name), tensor in held.items()}
            within = [ring.clip if norm(flat) <= bound else -ring.clip]  # whole integers: no rounding
            clipped, _, _ = clip(flat, bound)
            held = {key: clipped[f"{key[0]}/{key[1]}"] for key in held}
        total, n = upload.metrics.get("loss", (0.0, 0.0))
        loss = min(max(total / n, 0.0), LOSS) / LOSS if n > 0 and math.isfinite(total) else 0.0
        body = [held[part, name].detach().cpu().double().reshape(-1).numpy() for part, name, _ in layout]
        weight = upload.weight if self.weighting == "examples" else 1.0
        return numpy.concatenate([numpy.array([*_written(loss, ring), *within]), *body]), weight

    # -- guard --------------------------------------------------------------------------------------------------------

    @property
    def lasts(self) -> bool:  # type: ignore[override]
        """As the privacy beside it."""
        return self.central is not None

    @property
    def keep(self) -> Callable[[Json], None] | None:  # type: ignore[override]
        """That of the privacy beside it."""
        return None if self.central is None else self.central.keep

    @keep.setter
    def keep(self, write: Callable[[Json], None] | None) -> None:
        """It writes for the privacy beside it."""
        if self.central is not None:
            self.central.keep = write

    def recall(self, facts: Json) -> None:
        """As the privacy beside it."""
        if self.central is not None:
            self.central.recall(facts)

    def allow(self, op: str, client: str) -> None:
        """Nothing but the uploads of `work` is summed unseen."""
        only_work(op, client, "the section 'secure'")

    def beside(self) -> Guard:
        """Models to compare with tell nothing of a client's training."""
        return Quiet()

    def stops(self, round: int) -> str | None:
        """As the privacy beside it."""
        return None if self.central is None else self.central.stops(round)

    def cohort(self, method: Method, round: int, clients: Any, size: int, rng: numpy.random.Generator) -> list[str]:
        """As the privacy beside it, or as the method says."""
        return (self.central or Guard()).cohort(method, round, clients, size, rng)

    def begin(self, method: Method, expected: Mapping[str, Tensors], round: int) -> Reduction:
        """The sum of a round."""
        return _Secure(self, method, expected, round)

    async def collect(
        self,
        server: Server,
        method: Method,
        payloads: Iterable[tuple[str, Received]],
        reduction: Reduction,
        deadline: float | None,
    ) -> str | None:
        """Lead the cohort through the five exchanges; why there is no sum, or None."""
        if not isinstance(reduction, _Secure):
            raise TypeError(f"{type(self).__name__} collects into what it began itself.")
        sent = dict(payloads)
        try:
            await _led(server, method, sent, reduction, deadline)
        except (RoundFailed, ConfigError) as fault:
            return str(fault)
        return None

    def told(self) -> Json:
        """What privacy spent."""
        return None if self.central is None else self.central.told()

    def report(self) -> list[str]:
        """What the server learns, and what privacy guarantees."""
        s = self.settings
        lines = [
            "Secure aggregation: the server learns the weighted sum of a round's uploads, who took part and how large "
            "they are, and no single upload.",
            f"- At least {s.minimum} clients are in a sum; up to {s.dropout:.0%} may drop out and {s.corruption:.0%} "
            "may collude with the server.",
            "- Keys are not signed here: a server that plays other clients itself is not held off without a directory "
            "of lasting keys.",
            f"- Numbers are rounded to clip / {2 ** (s.precision - 1) - 1}.",
        ]
        if self.central is None:
            return lines
        return [*lines, *self.central.report(), _known(self.central)]

    def to_json(self) -> Json:
        """What privacy keeps; a sum keeps nothing."""
        return None if self.central is None else self.central.to_json()

    def restore(self, facts: Json, memory: Tensors | None = None) -> None:
        """Go on with the privacy of a checkpoint."""
        if self.central is not None:
            self.central.restore(facts, memory)


async def _led(
    server: Server, method: Method, sent: Mapping[str, Received], reduction: _Secure, deadline: float | None
) -> None:
    """The server's side of a sum: stage after stage; raises RoundFailed where too few are left."""
    guard = reduction.guard
    bound = None if guard.central is None else guard.central.bound
    ring = guard._ring(guard.settings.clip if bound is None else bound)
    summing = Summing(sent, reduction.size, ring, guard.policy, reduction.round)
    about = {PART: {"layout": reduction.layout, "bound": bound}}
    first = {c: Received(None, about, **{PART: summing.setup.to_tensors()}) for c in sent}
    answers, sessions = server.ask(method.work, first, deadline), dict[str, str]()
    try:
        for kind in (Advert, Dealt, Masked, Confirm, Reveal):
            sessions = await _taken(server, summing, kind, answers)
            if kind is Reveal:
                break
            letters = summing.advance()
            payloads = {}
            for name in list(sessions):
                if name not in letters:
                    server.close([sessions.pop(name)])
                    continue
                body = {PART: letters[name].to_tensors()}
                if isinstance(letters[name], Deal):
                    parts = {**sent[name].parts, PART: as_part(body[PART])}
                    payloads[sessions[name]] = Received.of(parts, sent[name].numbers)
                else:
                    payloads[sessions[name]] = Received(None, None, **body)
            answers = server.reply(payloads, deadline)
        reduction.total = summing.result()
        reduction.clients = len(summing.clients)
    finally:
        server.close(list(sessions.values()))
        for name, faults in summing.refusals.items():
            if name not in {one["client"] for one in server.rejected}:
                server.reject(name, str(faults[0]))


async def _taken(
    server: Server, summing: Summing, kind: type[Letter], answers: AsyncIterator[Answer]
) -> dict[str, str]:
    """Take the answers of a stage; the sessions of those that were taken."""
    sessions: dict[str, str] = {}
    async for answer in answers:
        try:
            part = answer.upload.parts.get(PART)
            if not isinstance(part, Dense) or len(answer.upload.parts) != 1:
                raise UploadRejected(f"Client '{answer.client}' sent something else than a message of a secure sum.")
            summing.receive(answer.client, kind.from_tensors(part.tensors))
        except FedLLMError as fault:
            if answer.session is not None:
                server.close([answer.session])
            server.reject(answer.client, str(fault))
            continue
        if answer.session is not None:
            sessions[answer.client] = answer.session
    return sessions


class _Secure(Reduction):
    """One sum: what it looks like, and what came of it."""

    def __init__(self, guard: SecureSum, method: Method, expected: Mapping[str, Tensors], round: int) -> None:
        super().__init__(method.reducer, expected)
        self.guard, self.round = guard, round
        unknown = next((name for name in self.reducers if name not in self.expected), None)
        if unknown is not None:
            raise ModeConflict(f"The method does not say what the part '{unknown}' looks like, so no vector of it can.")
        self.layout: Layout = [
            (part, name, list(tensor.shape))
            for part in sorted(self.reducers)
            for name, tensor in sorted(self.expected[part].items())
        ]
        self.digits = _digits(guard._ring(1.0))
        self.extra = self.digits + (guard.central is not None)
        self.size = self.extra + sum(math.prod(shape) for _, _, shape in self.layout)
        self.total: Any = None

    def result(self, population: int) -> Update:
        """The mean of the sum, noised where privacy asks for it."""
        update = Update(clients=self.clients, population=population)
        central, total = self.guard.central, self.total
        if total is None or total.share <= 0:
            return Update(population=population)
        mean = total.mean
        update.weight = float(total.weight)
        top = self.guard._ring(1.0).top
        loss = sum(float(mean[n]) / total.step / top ** (n + 1) for n in range(self.digits))
        update.metrics = {"loss": (loss * LOSS * update.weight, update.weight)}
        body = torch.from_numpy(numpy.asarray(mean if central is None else total.sum)[self.extra :])
        sizes = [math.prod(shape) for _, _, shape in self.layout]
        flat = {
            f"{part}/{name}": piece.reshape(shape)
            for (part, name, shape), piece in zip(self.layout, body.split(sizes), strict=True)
        }
        if central is not None:
            flat = central.published(flat, float(total.sum[self.digits]) / (2 * total.step * top), self.round)
            update.clients = max(1, round(central.expected))
            update.weight = float(update.clients)
        for part in self.reducers:
            update.parts[part] = Dense({n: flat[f"{part}/{n}"].float() for n in self.expected[part]})
        self.metrics = update.metrics
        return update


def _coins(central: Central, minimum: int) -> None:
    """Refuse coins by which fewer than the minimum may well come: whether a sum is there would tell of them."""
    if central.settings.mechanism == "ftrl" or central.settings.sampling != "poisson" or central.rate == 1:
        return
    from scipy.stats import binom  # pyright: ignore[reportMissingTypeStubs]

    chance = float(binom.cdf(minimum - 1, central.clients, central.rate)) * central.rounds
    if chance > central.settings.delta / 100:
        raise ModeConflict(
            f"With coins at the rate {central.rate:.3g}, fewer than {minimum} of {central.clients} clients come with a "
            f"chance of {chance:.1g} in the run, and a sum that is missing tells that.",
            f"Allowed: a hundredth of privacy.delta={central.settings.delta:g}.",
            action="Raise cohort, or set privacy.sampling=fixed.",
        )


def _known(central: Central) -> str:
    """What privacy is worth against clients of a sum: they know who else is in it."""
    if central.turns is not None:
        return "- Who takes part when is no secret in this account, so that it holds against clients of a sum, too."
    return (
        "- Clients of a sum know who else is in it. Against one that is in every round, and so without what the draw "
        f"hides, epsilon is {central.known():.4g}; with privacy.mechanism=ftrl the account needs no secret draw."
    )


def _digits(ring: Ring) -> int:
    """In how many entries a loss is written."""
    return -(-LOSS_BITS // (ring.precision - 1))


def _written(share: float, ring: Ring) -> list[float]:
    """A number from 0 to 1 as digits to the base L, the highest first, as entries of a vector: digits add up."""
    found = []
    for left in reversed(range(_digits(ring))):
        digit = math.floor(share * ring.top) if left else round(share * ring.top)
        share = share * ring.top - digit
        found.append(digit * ring.step)
    return found


def _rounded(codec: Codec, upload: Upload, client: Any) -> Upload:
    """The upload as its codes stand for; what rounding lost stays with the client, where the codec feeds it back."""
    before = client.private.get(codec.memory_name)
    coded, after = codec.encode(upload, before, client.rng("codec"))
    if after is not before and after is not None:
        client.private[codec.memory_name] = after
    return codec.decode(coded)


def _said(letter: Letter) -> Upload:
    return Upload(None, **{PART: letter.to_tensors()})  # pyright: ignore[reportArgumentType]


def _heard(kind: Any, received: Received) -> Any:
    return kind.from_tensors(received[PART])
