"""Policy - what a site allows, read from its own YAML file; what the file does not allow is refused.

A site asks its policy three times: whether it takes part in a run at all (:meth:`Policy.admits`, before any data is
read), whether it answers a request (:meth:`Policy.answers`), and whether an upload may leave (:meth:`Policy.lets_out`,
on the encoded bytes). The coordinator has no say in it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from fedllm.core.errors import ConfigError, FedLLMError, nearest
from fedllm.core.settings import read
from fedllm.modes.encrypted.settings import EncryptedSettings
from fedllm.modes.privacy.settings import Level, PrivacySettings
from fedllm.modes.secagg.settings import SecureSettings
from fedllm.sites.audit import Entry
from fedllm.sites.manifest import Manifest

HEADER = "header"
"""The part of every message that is in no other: weight, metrics, numbers and names."""
ANY = "*"
"""Stands for every name in the rules of :data:`OPEN`; in others it is a name like any other, which nobody has."""
OPEN = ("methods", "ops", "parts")
DAY = 24 * 60
"""Minutes of a day."""
AHEAD = timedelta(days=1)
"""So far may the clock of who signed a run be ahead."""
_WINDOW = re.compile(r"(\d\d):(\d\d)-(\d\d):(\d\d)")


class PolicyRefused(FedLLMError):
    """A site's policy does not allow it."""

    exit_code = 2


@dataclass(frozen=True)
class Decision:
    """What a policy says: allowed, unless there is a `fault`, which names the rule and the value."""

    fault: PolicyRefused | None = None

    @property
    def allowed(self) -> bool:
        """Whether it may happen."""
        return self.fault is None

    @property
    def reason(self) -> str:
        """Why not; empty where it may."""
        return "" if self.fault is None else str(self.fault)

    @property
    def word(self) -> Literal["allowed", "refused"]:
        """For an audit log."""
        return "allowed" if self.allowed else "refused"

    def require(self) -> None:
        """Raise the :class:`PolicyRefused` where it may not happen."""
        if self.fault is not None:
            raise self.fault


@dataclass(frozen=True)
class Egress:
    """Bytes of one run that have left a site: round -> bytes."""

    rounds: Mapping[int, int] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """Of the whole run."""
        return sum(self.rounds.values())

    def plus(self, round: int, size: int) -> Egress:
        """With `size` bytes more in `round`."""
        return Egress({**self.rounds, round: self.rounds.get(round, 0) + size})

    @classmethod
    def of(cls, entries: Iterable[Entry], run: str) -> Egress:
        """What the site's own audit log says has left in `run`, so that a restart does not begin at 0."""
        found = cls()
        for entry in entries:
            if entry.action == "send" and entry.run == run and entry.decision != "refused":
                found = found.plus(entry.round or 0, entry.bytes or 0)
        return found


class _Rules(BaseModel):
    """What all parts of a policy share: they cannot be changed and know every key."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)


class PrivacyRule(_Rules):
    """Differential privacy with noise that is secret; nothing more where no number is given."""

    level: Level | None = None
    """The unit that must be protected, as in `privacy.level` of a recipe; null: either."""
    max_epsilon: float | None = Field(None, gt=0)
    """The largest budget; a run without one is refused. Null: any, and none."""
    max_delta: float | None = Field(None, gt=0, lt=1)
    """The largest chance of more than epsilon; null: any."""
    min_noise: float | None = Field(None, gt=0)
    """The least noise as a multiple of the clip; a run that leaves it to be solved for is refused. Null: any."""
    max_clip: float | None = Field(None, gt=0)
    """The largest norm of one contribution; a bound that moves is refused. Null: any."""


class SecureRule(_Rules):
    """A secure sum."""

    minimum: int = Field(3, ge=3)
    """Clients in a sum at least, those of this site among them."""


class EncryptedRule(_Rules):
    """Homomorphic encryption of uploads."""

    min_ratio: float = Field(1.0, gt=0, le=1)
    """The least share of the numbers that is encrypted."""


class RequiredModes(_Rules):
    """Modes that a run must have; {} after a name asks for the mode with its defaults."""

    privacy: PrivacyRule | None = None
    """Differential privacy."""
    secure: SecureRule | None = None
    """A secure sum."""
    encrypted: EncryptedRule | None = None
    """Homomorphic encryption."""

    @model_validator(mode="before")
    @classmethod
    def _said(cls, values: Any) -> Any:
        """A name with nothing behind it would require nothing."""
        for name, value in values.items() if isinstance(values, Mapping) else ():
            if value is None:
                raise ConfigError(
                    f"policy.require.{name} is empty.",
                    "A mode is required by a mapping of its rules.",
                    action=f"Write '{name}: {{}}' to require it, or remove the line.",
                )
        return values


class Policy(_Rules):
    """What a site allows. The default allows nothing."""

    site: str | None = None
    """This site's name; a run that does not list it is refused. Null: not checked."""
    coordinators: tuple[str, ...] = ()
    """Who may start a run: the names in their certificates."""
    methods: tuple[str, ...] = ()
    """Methods and protocols; `*`: all."""
    purposes: tuple[str, ...] = ()
    """What a run may be for."""
    data_sets: tuple[str, ...] = ()
    """Data sets that a run may use."""
    max_rounds: int = Field(0, ge=0)
    """Rounds of a run at most."""
    max_clients: int = Field(0, ge=0)
    """Members of a run at most."""
    max_age: int = Field(90, ge=1, le=36_500)
    """Days since the run was signed at most, also where it goes on: a server cannot keep it for later."""
    hours: Literal["always"] | tuple[str, ...] = ()
    """When this site works: windows such as 18:00-06:00 (UTC, without the last minute), or `always`."""
    ops: tuple[str, ...] = ()
    """Client-side functions that are answered: work, evaluate, ...; `*`: all of a method that is allowed."""
    parts: tuple[str, ...] = ()
    """Parts of an upload that may leave, as they are named on the wire; `*`: all. `header` is what is in no
    other: weight, metrics, numbers and names; every upload has one."""
    max_egress_run: int = Field(0, ge=0)
    """Bytes that may leave in a run."""
    max_egress_round: int = Field(0, ge=0)
    """Bytes that may leave in a round."""
    require: RequiredModes = RequiredModes()
    """Modes that a run must have."""
    remote_code: bool = False
    """Whether a run may execute Python code that comes with a model (model.trust_remote_code)."""
    attacks: bool = False
    """Whether a run may make clients harmful (section `attack` of a recipe, for experiments)."""

    @field_validator("hours")
    @classmethod
    def _windows(cls, hours: Any) -> Any:
        for window in () if hours == "always" else hours:
            _window(window)
        return hours

    @model_validator(mode="after")
    def _can_answer(self) -> Policy:
        if self.parts and HEADER not in self.parts and ANY not in self.parts:
            raise ConfigError(
                f"policy.parts={', '.join(self.parts)} lacks '{HEADER}', so that no upload could leave.",
                "Every upload has one: its weight, metrics, numbers and names.",
                action=f"Add {HEADER}, or remove policy.parts.",
            )
        return self

    @classmethod
    def of(cls, path: str | Path) -> Policy:
        """The policy in a YAML file; an empty file allows nothing.

        Raises:
            ConfigError: no such file, not YAML, a key that stands twice, an unknown key, or a value out of range.
        """
        values = _file(Path(path))
        try:
            return read(cls, values, "policy")
        except ConfigError as fault:
            action = f"Correct {path}." if "fedllm explain" in fault.action else fault.action
            raise ConfigError(fault.given, fault.allowed, fault.nearest, action or f"Correct {path}.") from None

    def admits(self, manifest: Manifest, now: datetime) -> Decision:
        """Whether the site takes part in the run.

        Args:
            manifest: verified; see :func:`fedllm.sites.manifest.verify`.
            now: the time, with a time zone.

        Raises:
            ConfigError: a time without a zone.
        """
        return _decision(self.refusals(manifest, now))

    def refusals(self, manifest: Manifest, now: datetime) -> list[PolicyRefused]:
        """Every rule that the run breaks; see :meth:`admits`."""
        found = [*self._who(manifest), *self._when(now), *self._signed(manifest, now), *self._how(manifest)]
        return [*found, *_modes(self.require, manifest.modes)]

    def plays(self, method: str) -> Decision:
        """Whether a method may be played beside the one of the manifest."""
        return _decision([*_listed("method", method, "methods", self.methods)])

    def answers(self, op: str, round: int, now: datetime) -> Decision:
        """Whether a request is answered: its client-side function, its round, the hour."""
        return _decision([*_listed("client-side function", op, "ops", self.ops), *self._turn(round, now)])

    def lets_out(self, egress: Egress, parts: Mapping[str, int], round: int, now: datetime) -> Decision:
        """Whether an upload may leave.

        Args:
            egress: what has left in this run before.
            parts: part -> bytes, all that would be sent; see :func:`fedllm.core.wire.size_by_part`.
            round: the round.
            now: the time, with a time zone.

        Raises:
            ConfigError: a negative number of bytes, or a time without a zone.
        """
        if any(size < 0 for size in parts.values()):
            raise ConfigError(f"An upload has the sizes {dict(parts)}.", "Allowed: 0 bytes and more.")
        size = sum(parts.values())
        in_round, in_run = egress.rounds.get(round, 0) + size, egress.total + size
        told = f"With this upload of {size:,} bytes"
        faults = [
            *(fault for part in parts for fault in _listed("part", part, "parts", self.parts)),
            *self._turn(round, now),
            *_at_most(f"{told}, {in_round:,} leave in round {round}.", in_round, *self._limit("max_egress_round")),
            *_at_most(f"{told}, {in_run:,} leave in the run.", in_run, *self._limit("max_egress_run")),
        ]
        return _decision(faults)

    def during(self, manifest: Manifest) -> Policy:
        """The policy of one run: no more rounds than its manifest says."""
        return self.model_copy(update={"max_rounds": min(self.max_rounds, manifest.rounds)})

    def open(self, now: datetime) -> bool:
        """Whether the site works at this time; raises :class:`ConfigError` for one without a zone."""
        if now.tzinfo is None:
            raise ConfigError(f"The time {now.isoformat()} has no time zone.", "Hours of a policy are in UTC.")
        at = now.astimezone(UTC)
        minute = at.hour * 60 + at.minute
        return self.hours == "always" or any(_within(minute, *_window(text)) for text in self.hours)

    def sentences(self) -> list[str]:
        """What it allows, in plain words."""
        return [
            _says("Runs may be started by", self.coordinators, "nobody"),
            _says("Methods:", self.methods),
            _says("Purposes:", self.purposes),
            _says("Data sets:", self.data_sets),
            f"A run has at most {self.max_rounds} rounds and {self.max_clients} members"
            + (f", one of which is {self.site}." if self.site is not None else "."),
            f"A run was signed no more than {self.max_age} days ago.",
            "The site works at any time." if self.hours == "always" else _says("It works (UTC):", self.hours, "never"),
            _says("It answers:", self.ops, "no request"),
            _says("Parts of an upload that may leave:", self.parts),
            f"At most {_size(self.max_egress_round)} leave in a round and {_size(self.max_egress_run)} in a run.",
            *_required(self.require),
            f"Code that comes with a model {'may' if self.remote_code else 'must not'} be executed.",
            f"Runs with attacks, for experiments, are {'allowed' if self.attacks else 'refused'}.",
        ]

    def _who(self, manifest: Manifest) -> Iterator[PolicyRefused]:
        yield from _listed("coordinator", manifest.coordinator, "coordinators", self.coordinators)
        yield from _listed("purpose", manifest.purpose, "purposes", self.purposes)
        for name in manifest.data_sets:
            yield from _listed("data set", name, "data_sets", self.data_sets)
        yield from _listed("method", manifest.method, "methods", self.methods)
        if self.site is not None and self.site not in manifest.members:
            yield PolicyRefused(
                f"The run does not list this site, '{self.site}'.",
                f"Its members: {', '.join(manifest.members)}.",
                nearest(self.site, manifest.members),
                "Sign a manifest that lists it.",
            )

    def _when(self, now: datetime) -> Iterator[PolicyRefused]:
        if not self.open(now):
            windows = ", ".join(self.hours) or "none"
            yield PolicyRefused(
                f"This site does not work at {now.astimezone(UTC):%H:%M} UTC.",
                f"policy.hours: {windows}.",
                action="Come back then.",
            )

    def _signed(self, manifest: Manifest, now: datetime) -> Iterator[PolicyRefused]:
        age, day = now - manifest.created, f"{manifest.created.astimezone(UTC):%Y-%m-%d}"
        if age > timedelta(days=self.max_age):
            yield PolicyRefused(
                f"The run was signed on {day}, {age.days:,} days ago.",
                f"policy.max_age: at most {self.max_age:,} days.",
                action=f"Have its coordinator sign it again: fedllm deploy resume {manifest.run} --kit KIT",
            )
        if -age > AHEAD:
            yield PolicyRefused(
                f"The run was signed on {day}, which is {(-age).days:,} days from now.",
                "policy.max_age counts the days since.",
                action="Set the clock, here or where it was signed, and sign it again.",
            )

    def _how(self, manifest: Manifest) -> Iterator[PolicyRefused]:
        members = len(manifest.members)
        yield from _at_most(f"The run has {manifest.rounds:,} rounds.", manifest.rounds, *self._limit("max_rounds"))
        yield from _at_most(f"The run has {members:,} members.", members, *self._limit("max_clients"))
        if not self.remote_code and _asks_for_code(manifest.recipe):
            yield _switched_off("execute code that comes with a model (trust_remote_code=true)", "remote_code")
        if not self.attacks and manifest.modes.get("attack"):
            yield _switched_off("make clients harmful (section 'attack')", "attacks")

    def _limit(self, rule: str) -> tuple[str, int]:
        return rule, getattr(self, rule)

    def _turn(self, round: int, now: datetime) -> Iterator[PolicyRefused]:
        if round < 0:
            raise ConfigError(f"A request is of round {round}.", "Allowed: 0 (before the first) and more.")
        yield from _at_most(f"It is round {round:,}.", round, *self._limit("max_rounds"))
        yield from self._when(now)


def _decision(faults: list[PolicyRefused]) -> Decision:
    return Decision(faults[0] if faults else None)


def _modes(required: RequiredModes, given: Mapping[str, Mapping[str, Any]]) -> Iterator[PolicyRefused]:
    checks: list[tuple[str, Any, type[BaseModel], Callable[..., Iterator[PolicyRefused]]]] = [
        ("privacy", required.privacy, PrivacySettings, _privacy),
        ("secure", required.secure, SecureSettings, _secure),
        ("encrypted", required.encrypted, EncryptedSettings, _encrypted),
    ]
    for name, rule, kind, check in checks:
        if rule is None:
            continue
        if name not in given:
            yield PolicyRefused(
                f"The run has no section '{name}'.",
                f"policy.require.{name} asks for it.",
                action=f"Add '{name}' to the recipe.",
            )
            continue
        try:
            settings = read(kind, given[name], name)
        except ConfigError as fault:
            yield PolicyRefused(fault.given, fault.allowed, fault.nearest, "Correct the recipe.")
            continue
        yield from check(rule, settings)


def _privacy(rule: PrivacyRule, given: PrivacySettings) -> Iterator[PolicyRefused]:
    if given.noise == 0:
        yield _mode("privacy.noise", 0, "privacy", "noise above 0; without it nothing is promised")
    if given.key != "secret":
        yield _mode("privacy.key", given.key, "privacy", "'secret'; who knows the seed can take the noise away")
    if rule.level not in (None, given.level):
        yield _mode("privacy.level", given.level, "privacy.level", str(rule.level))
    bounds = [("epsilon", rule.max_epsilon), ("delta", rule.max_delta), ("clip", rule.max_clip)]
    for name, most in bounds:
        value = getattr(given, name)
        if most is not None and (value is None or value > most):
            yield _mode(f"privacy.{name}", value, f"privacy.max_{name}", f"at most {most:g}")
    if rule.max_clip is not None and given.adaptive is not None:
        yield _mode("privacy.adaptive", "given", "privacy.max_clip", "a bound that stays")
    if rule.min_noise is not None and (given.noise is None or given.noise < rule.min_noise):
        yield _mode("privacy.noise", given.noise, "privacy.min_noise", f"at least {rule.min_noise:g}")


def _secure(rule: SecureRule, given: SecureSettings) -> Iterator[PolicyRefused]:
    if given.minimum < rule.minimum:
        yield _mode("secure.minimum", given.minimum, "secure.minimum", f"at least {rule.minimum}")


def _encrypted(rule: EncryptedRule, given: EncryptedSettings) -> Iterator[PolicyRefused]:
    if given.ratio < rule.min_ratio:
        yield _mode("encrypted.ratio", given.ratio, "encrypted.min_ratio", f"at least {rule.min_ratio:g}")


def _mode(name: str, value: Any, rule: str, allowed: str) -> PolicyRefused:
    shown = "null" if value is None else value
    return PolicyRefused(
        f"The run has {name}={shown}.", f"policy.require.{rule}: {allowed}.", action=f"Set {name} in the recipe."
    )


def _listed(kind: str, word: str, rule: str, choices: tuple[str, ...]) -> Iterator[PolicyRefused]:
    if word not in choices and not (rule in OPEN and ANY in choices):
        yield PolicyRefused(
            f"The {kind} '{word}' is not allowed at this site.",
            f"policy.{rule}: {', '.join(choices) or 'none'}.",
            nearest(word, choices),
            f"Choose one of them, or ask the site to add it to policy.{rule}.",
        )


def _at_most(given: str, value: int, rule: str, most: int) -> Iterator[PolicyRefused]:
    if value > most:
        yield PolicyRefused(
            given, f"policy.{rule}: at most {most:,}.", action=f"Ask for less, or ask the site to raise policy.{rule}."
        )


def _switched_off(what: str, rule: str) -> PolicyRefused:
    return PolicyRefused(
        f"The run would {what}.",
        f"policy.{rule}: false.",
        action=f"Remove it from the recipe, or ask the site to set policy.{rule}.",
    )


def _asks_for_code(value: Any) -> bool:
    """Whether a model, of the recipe or of one of its groups, may bring code."""
    if isinstance(value, Mapping):
        return any(
            (key == "trust_remote_code" and bool(inner)) or _asks_for_code(inner) for key, inner in value.items()
        )
    return isinstance(value, list | tuple) and any(_asks_for_code(inner) for inner in value)


def _window(text: str) -> tuple[int, int]:
    """The minutes of a day at which a window begins and ends; raises :class:`ConfigError`."""
    found = _WINDOW.fullmatch(text)
    first, h1, m1, last, h2, m2 = 0, 0, 0, 0, 0, 0
    if found:
        h1, m1, h2, m2 = (int(part) for part in found.groups())
        first, last = h1 * 60 + m1, h2 * 60 + m2
    if not found or m1 > 59 or m2 > 59 or first >= DAY or last > DAY or first == last:
        raise ConfigError(
            f"policy.hours has the window '{text}'.",
            "Allowed: HH:MM-HH:MM in UTC, over midnight too; its two ends differ.",
            "00:00-24:00" if found and first == last else None,
            "Write it in quotes, for example '18:00-06:00'.",
        )
    return first, last


def _within(minute: int, first: int, last: int) -> bool:
    return first <= minute < last if first < last else minute >= first or minute < last


def _required(required: RequiredModes) -> list[str]:
    found: list[str] = []
    if (privacy := required.privacy) is not None:
        whole = f"Differential privacy{f' of each {privacy.level}' if privacy.level else ''}"
        bounds = [
            (privacy.max_epsilon, "epsilon of at most"),
            (privacy.max_delta, "delta of at most"),
            (privacy.min_noise, "noise of at least"),
            (privacy.max_clip, "clip of at most"),
        ]
        said = [f"{words} {number:g}" for number, words in bounds if number is not None]
        found.append(f"{whole} is required" + (f", with {_and(said)}." if said else "."))
    if required.secure is not None:
        found.append(f"A secure sum of at least {required.secure.minimum} clients is required.")
    if required.encrypted is not None:
        found.append(f"Encryption of at least {required.encrypted.min_ratio:.0%} of the numbers is required.")
    return found or ["No mode is required: the server may see every upload."]


def _says(words: str, names: tuple[str, ...], none: str = "none") -> str:
    return f"{words} {', '.join(names) or none}."


def _and(items: list[str]) -> str:
    return " and ".join(filter(None, [", ".join(items[:-1]), items[-1]]))


def _size(count: int) -> str:
    """Bytes, in thousands, for people."""
    for power, unit in ((4, "TB"), (3, "GB"), (2, "MB"), (1, "kB")):
        if count >= 1000**power:
            return f"{count / 1000**power:g} {unit}"
    return f"{count} bytes"


class UniqueKeys(yaml.SafeLoader):
    """Refuses a key that stands twice in one mapping, where YAML readers take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """See :class:`yaml.SafeLoader`."""
        keys = [key for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for at, key in enumerate(keys):
            if any(before.value == key.value for before in keys[:at]):
                fault = f"'{key.value}' stands twice"
                raise yaml.constructor.ConstructorError(problem=fault, problem_mark=key.start_mark)
        return super().construct_mapping(node, deep)


def _file(path: Path) -> Mapping[str, Any]:
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=UniqueKeys)
    except OSError as fault:
        raise ConfigError(
            f"The policy {path} cannot be read: {fault.strerror or fault}.", action="Name the site's policy file."
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as fault:
        line = getattr(getattr(fault, "problem_mark", None), "line", None)
        place = f" (line {line + 1})" if line is not None else ""
        raise ConfigError(
            f"The policy {path} cannot be read{place}: {getattr(fault, 'problem', None) or fault}.",
            "A policy is YAML.",
            action="Correct it; a site without a policy takes part in nothing.",
        ) from None
    if values is not None and not isinstance(values, Mapping):
        raise ConfigError(f"The policy {path} holds a {type(values).__name__}.", "A policy is a mapping of rules.")
    return values or {}
