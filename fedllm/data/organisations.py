"""Organisations - seeded private documents of eight organisations, each to be turned into a small record.

Federated training shows its use where clients hold different texts but need the same skill. Here every organisation
writes in its own words (notes, invoices, tickets, log lines ...) while all of them share one answer convention: three
fields, ISO dates, plain amounts, yes/no, and urgent|normal|low. A few documents teach the words, not the convention.
"""

from __future__ import annotations

import datetime
import hashlib
import random
from collections.abc import Callable
from dataclasses import dataclass

from fedllm.core.errors import ConfigError

Slot = Callable[[random.Random], tuple[str, str]]
"""Draws one detail: (as it is written in the document, as it stands in the answer)."""


@dataclass(frozen=True)
class Organisation:
    """One holder of private documents: `key` in files and recipes, `name` for people, `kind` of document."""

    key: str
    name: str
    kind: str


@dataclass(frozen=True)
class _Form:
    """How one organisation writes: `fields` name -> (slot, sentences with one {}), `details` are distractions."""

    organisation: Organisation
    request: str
    fields: dict[str, tuple[Slot, tuple[str, ...]]]
    details: tuple[str, ...]
    joint: str = " "


MONTHS = (
    "January", "February", "March", "April", "May", "June",
    "July", "August", "September", "October", "November", "December",
)  # fmt: skip
URGENCY = ("urgent", "normal", "low")
FLAGS = ("yes", "no")
_FIRST_DAY = datetime.date(2019, 1, 1)
_DAYS = 365 * 8
_SURNAMES = (
    "Abbott", "Barlow", "Carver", "Dalton", "Ellery", "Farrow", "Gibson", "Hollis", "Irving", "Jarvis",
    "Keller", "Lambert", "Mercer", "Norton", "Osborne", "Parker", "Quincy", "Radley", "Sawyer",
    "Turner", "Upton", "Vance", "Wexler", "Yates",
)  # fmt: skip
_PLACES = (
    "Ashford", "Belmont", "Carlow", "Dunmore", "Eastleigh", "Fairview", "Glenwood", "Hampton",
    "Kingsley", "Langley", "Milton", "Newport",
)  # fmt: skip


def _date(rng: random.Random) -> tuple[str, str]:
    """A day in one of two written forms, both unambiguous; in the answer it is ISO 8601."""
    day = _FIRST_DAY + datetime.timedelta(days=rng.randrange(_DAYS))
    month = MONTHS[day.month - 1]
    written = rng.choice([f"{day.day} {month} {day.year}", f"{month} {day.day}, {day.year}"])
    return written, day.isoformat()


def _amount(rng: random.Random) -> tuple[str, str]:
    """Money in one of two written forms; in the answer two decimals and the ISO 4217 code."""
    whole = rng.randint(100, 9_999)
    code = rng.choice(["EUR", "USD", "GBP"])
    written = rng.choice([f"{code} {whole}", f"{whole} {code}"])
    return written, f"{whole}.00 {code}"


def _quantity(low: int, high: int, unit: str, *words: str) -> Slot:
    """A whole number of a unit; `words` are other ways to write the unit."""

    def draw(rng: random.Random) -> tuple[str, str]:
        number = rng.randint(low, high)
        return f"{number} {rng.choice([unit, *words])}", f"{number} {unit}"

    return draw


def _code(*prefixes: str) -> Slot:
    """An identifier of this organisation: it is copied as it is."""

    def draw(rng: random.Random) -> tuple[str, str]:
        code = f"{rng.choice(prefixes)}-{rng.randint(100, 9_999)}"
        return code, code

    return draw


def _urgency(rng: random.Random) -> tuple[str, str]:
    """A word of urgency; with a capital or not in the document, lower case in the answer."""
    value = rng.choice(URGENCY)
    return rng.choice([value, value.capitalize()]), value


def _flag(rng: random.Random) -> tuple[str, str]:
    """A yes or no; with a capital or not in the document, lower case in the answer."""
    value = rng.choice(FLAGS)
    return rng.choice([value, value.capitalize()]), value


_FORMS = (
    _Form(
        Organisation("clinic", "Lakeside Clinic", "clinical notes"),
        "Note visit, dose and urgency.",
        {
            "visit": (_date, ("Seen on {}.", "The patient came in on {}.", "Consultation of {}.")),
            "dose": (
                _quantity(5, 900, "mg", "milligrams"),
                ("Prescribed {} daily.", "The tablets were set to {}.", "Continue with {} at night."),
            ),
            "urgency": (_urgency, ("Need for a check-up: {}.", "Case is {}.", "Referred as {}.")),
        },
        (
            "Dr. {name} on duty.", "Pulse {number}, no fever.", "Lives in {place} with family.",
            "No known allergies.", "Mild cough for some days.",
        ),
    ),
    _Form(
        Organisation("supplier", "Hartwell Supplies", "invoices"),
        "Extract due, amount and paid.",
        {
            "due": (_date, ("Payable by {}.", "Our terms ask for payment until {}.", "Due date: {}.")),
            "amount": (_amount, ("Total of this bill: {}.", "We charge {} in all.", "The goods come to {}.")),
            "paid": (_flag, ("Paid so far: {}.", "Settled in full: {}.", "Payment received? {}.")),
        },
        (
            "Invoice {number}.", "Contact in our office: {name}.", "Goods sent from {place}.",
            "Pallets remain our property.", "Thank you for the order.",
        ),
    ),
    _Form(
        Organisation("helpdesk", "Northline Help Desk", "support tickets"),
        "Give opened, device and priority.",
        {
            "opened": (_date, ("Ticket raised on {}.", "The user called us on {}.", "First reported {}.")),
            "device": (
                _code("PRN", "LAP", "MON"),
                ("The fault is on {}.", "Machine {} does not respond.", "Screen of {} stays dark."),
            ),
            "priority": (_urgency, ("Rated {} by the desk.", "Wish of the user: {}.", "Queue: {}.")),
        },
        (
            "Caller: {name}.", "Desk {number}, second floor.", "Site: {place}.",
            "A restart was tried.", "The password was reset.",
        ),
    ),
    _Form(
        Organisation("datacentre", "Granite Data Centre", "log lines"),
        "List since, host and level.",
        {
            "since": (_date, ("[{}] check failed", "first seen {}", "state changed at {}")),
            "host": (_code("srv", "node", "db"), ("source {}", "host {} unreachable", "reply from {} missing")),
            "level": (_urgency, ("alarm {}", "severity={}", "class {}")),
        },
        ("rack {number}", "zone {place}", "admin {name}", "fan speed ok", "retry limit reached"),
        " | ",
    ),
    _Form(
        Organisation("lawfirm", "Ferris and Lowe", "contract clauses"),
        "Find effective, notice and renewal.",
        {
            "effective": (
                _date,
                (
                    "This agreement enters into force on {}.",
                    "The term shall commence on {}.",
                    "The parties are bound as of {}.",
                ),
            ),
            "notice": (
                _quantity(10, 180, "days", "calendar days"),
                ("Either party may terminate upon {} in writing.", "Termination requires {} beforehand."),
            ),
            "renewal": (_flag, ("Extension of the term: {}.", "Prolongation: {}.", "Shall it be renewed? {}.")),
        },
        (
            "Signed in {place}.", "Clause {number} remains unaffected.", "Counsel: {name}.",
            "Oral side agreements are void.",
        ),
    ),
    _Form(
        Organisation("carrier", "Swift Carriers", "shipping notices"),
        "Note delivery, weight and fragile.",
        {
            "delivery": (_date, ("Arrives on {}.", "The van will reach you on {}.", "Drop-off planned for {}.")),
            "weight": (
                _quantity(2, 950, "kg", "kilograms"),
                ("The crate weighs {}.", "Gross load {}.", "On the scale: {}."),
            ),
            "fragile": (_flag, ("Breakable goods: {}.", "Glass inside: {}.", "Handle with care? {}.")),
        },
        (
            "Driver {name}.", "Route via {place}.", "Box {number} of the lot.",
            "Ring the bell twice.", "Tail lift on board.",
        ),
    ),
    _Form(
        Organisation("insurer", "Harbour Insurance", "claims"),
        "Extract loss, sum and police.",
        {
            "loss": (_date, ("The damage happened on {}.", "The accident took place on {}.", "Event of {}.")),
            "sum": (_amount, ("The holder asks for {}.", "Repair is estimated at {}.", "Claimed: {}.")),
            "police": (_flag, ("Officers called: {}.", "Report at the station: {}.", "Was the police there? {}.")),
        },
        (
            "Policy holder {name}.", "File {number}.", "It occurred near {place}.",
            "Photos are attached.", "A neighbour saw it.",
        ),
    ),
    _Form(
        Organisation("personnel", "Civic Personnel Office", "job applications"),
        "Give start, salary and relocate.",
        {
            "start": (_date, ("I could begin on {}.", "I am available from {}.", "My first day could be {}.")),
            "salary": (_amount, ("I hope to earn {} a month.", "My expectation is {}.", "I would ask for {}.")),
            "relocate": (_flag, ("Willing to move: {}.", "A new town is fine: {}.", "Can I change my home? {}.")),
        },
        (
            "My name is {name}.", "I now work in {place}.", "I led a team of {number}.",
            "I speak two languages.", "I hold a driving licence.",
        ),
    ),
)  # fmt: skip
_BY_KEY = {form.organisation.key: form for form in _FORMS}


def organisations() -> list[Organisation]:
    """The eight organisations in a fixed order."""
    return [form.organisation for form in _FORMS]


def documents(key: str, count: int, seed: int) -> list[dict[str, str]]:
    """`count` records of one organisation: `instruction` (request and document), `response`, `organisation`.

    Record i is a function of (key, seed, i) alone, so a longer draw begins with a shorter one. Draws of two seeds
    share a document with negligible probability.

    Raises:
        ConfigError: there is no such organisation, or `count` is negative.
    """
    if key not in _BY_KEY:
        raise ConfigError.unknown("organisation", key, _BY_KEY)
    if count < 0:
        raise ConfigError(f"The count of documents is {count}.", "Allowed: 0 or more.")
    return [_record(_BY_KEY[key], index, seed) for index in range(count)]


def _record(form: _Form, index: int, seed: int) -> dict[str, str]:
    key = form.organisation.key
    digest = hashlib.sha256("\x1f".join(["organisations", key, str(seed), str(index)]).encode()).digest()
    rng = random.Random(int.from_bytes(digest, "big"))
    sentences, answers = [], []
    for name, (slot, templates) in form.fields.items():
        written, value = slot(rng)
        sentences.append(rng.choice(templates).format(written))
        answers.append(f"{name}={value}")
    for detail in rng.sample(form.details, rng.choice([1, 2])):
        sentences.append(
            detail.format(name=rng.choice(_SURNAMES), place=rng.choice(_PLACES), number=rng.randint(11, 999))
        )
    rng.shuffle(sentences)
    return {
        "instruction": f"{form.request}\n{form.joint.join(sentences)}",
        "response": "; ".join(answers),
        "organisation": key,
    }
