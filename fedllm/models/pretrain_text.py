"""Pre-training text - seeded records that teach a tiny model to copy, extract, count and re-write.

A model of four million parameters learns little language in an hour on two cores, but it can learn to move text
from a document into an answer. The domains, the field names and the answer formats here are none of those of
`fedllm.data.organisations`: what the eight organisations agree on stays to be learned by fine-tuning.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Iterator

Maker = Callable[[random.Random], str]

MONTHS = (
    "January", "February", "March", "April", "May", "June",
    "July", "August", "September", "October", "November", "December",
)  # fmt: skip
_ONSETS = (
    "b", "br", "c", "ch", "d", "dr", "f", "fl", "g", "gr", "h", "j", "k", "kl", "l", "m", "n", "p",
    "pr", "qu", "r", "s", "sh", "st", "t", "tr", "v", "w", "z",
)  # fmt: skip
_VOWELS = (
    "a", "e", "i", "o", "u", "ai", "ea", "ia", "io", "oa", "ou",
)  # fmt: skip
_CODAS = ["", "", "", "l", "n", "r", "s", "t", "nd", "rt", "x", "m"]
_FIRST = (
    "Anna", "Omar", "Lucia", "Peter", "Mei", "Igor", "Sara", "Tomas", "Aisha", "John", "Elena", "Kofi",
    "Nadia", "Paul", "Rosa", "Victor", "Yuki", "Clara", "Samuel", "Ines", "David", "Leila", "Marco",
    "Hana", "Oscar", "Julia", "Amir", "Sofia", "Daniel", "Zoe",
)  # fmt: skip
_LAST = (
    "Moreau", "Smith", "Okafor", "Rossi", "Tanaka", "Novak", "Haddad", "Jensen", "Silva", "Weber",
    "Kowalski", "Brown", "Garcia", "Ivanov", "Larsen", "Dubois", "Mensah", "Ricci", "Klein", "Walker",
    "Costa", "Berg", "Singh", "Castro", "Young", "Fischer", "Ahmed", "Lindgren", "Marsh", "Petrov",
)  # fmt: skip
_COLOURS = (
    "red", "blue", "green", "silver", "black", "white", "yellow", "orange", "grey", "brown", "purple",
    "golden",
)  # fmt: skip
_THINGS = (
    "lamp", "river", "basket", "window", "coat", "mirror", "piano", "garden", "bridge", "candle",
    "engine", "pillow", "ladder", "kettle", "anchor", "violin", "blanket", "compass", "helmet",
    "saddle", "barrel", "curtain", "hammer", "lantern", "needle", "oven", "paddle", "rocket", "shovel",
    "tunnel", "wagon",
)  # fmt: skip
_LABELS = (
    "origin", "shape", "number", "place", "maker", "label", "owner", "size", "model", "name", "layer",
    "group", "part", "zone", "class", "source", "rank", "section", "region", "branch", "version",
    "total", "kind", "station", "entry", "point", "route", "symbol", "target", "guide", "speed",
    "depth", "width", "trace", "pitch",
)  # fmt: skip


def _nonce(rng: random.Random, low: int = 2, high: int = 3) -> str:
    pieces = [rng.choice(_ONSETS) + rng.choice(_VOWELS) for _ in range(rng.randint(low, high))]
    return "".join(pieces) + rng.choice(_CODAS)


def _person(rng: random.Random) -> str:
    first = rng.choice(_FIRST) if rng.random() < 0.7 else _nonce(rng).capitalize()
    return f"{first} {rng.choice(_LAST) if rng.random() < 0.6 else _nonce(rng).capitalize()}"


def _proper(rng: random.Random) -> str:
    return _nonce(rng).capitalize()


def _title(rng: random.Random) -> str:
    return f"The {rng.choice(_COLOURS).capitalize()} {rng.choice(_THINGS).capitalize()}"


def _code(rng: random.Random) -> str:
    letters = "".join(rng.choice("ABCDEFGHJKLMNPQRSTUVWXYZ") for _ in range(rng.randint(1, 3)))
    digits = "".join(rng.choice("0123456789") for _ in range(rng.randint(2, 6)))
    return rng.choice([f"{letters}-{digits}", f"{letters}{digits}", f"{digits}-{letters}", f"{letters}/{digits}"])


def _number(rng: random.Random) -> str:
    return str(rng.randint(2, 10 ** rng.randint(1, 5)))


def _year(rng: random.Random) -> str:
    return str(rng.randint(1700, 2029))


def _decimal(rng: random.Random) -> str:
    return f"{rng.randint(0, 10 ** rng.randint(1, 3))}.{rng.randint(0, 99):02d}"


def _clock(rng: random.Random) -> str:
    return f"{rng.randint(0, 23):02d}:{rng.randint(0, 59):02d}"


def _day(rng: random.Random) -> str:
    day, month = rng.randint(1, 28), rng.choice(MONTHS)
    return rng.choice([f"{day} {month}", f"{month} {day}", f"{day} {month} {rng.randint(1950, 2029)}"])


def _with_unit(*units: str) -> Maker:
    return lambda rng: f"{rng.choice([_number, _decimal])(rng)} {rng.choice(units)}"


def _one_of(*words: str) -> Maker:
    return lambda rng: rng.choice(words)


def _colour(rng: random.Random) -> str:
    return rng.choice(_COLOURS)


def _thing(rng: random.Random) -> str:
    return rng.choice(_THINGS)


def _nonce_word(rng: random.Random) -> str:
    return _nonce(rng)


# domain -> field name -> (what makes the value, sentences that state it)
DOMAINS: dict[str, dict[str, tuple[Maker, tuple[str, ...]]]] = {
    "library": {
        "title": (_title, ("The book on loan is {}.", "A reader took home {}.", "{} was borrowed again.")),
        "author": (_person, ("It was written by {}.", "Its author is {}.", "{} wrote it years ago.")),
        "shelf": (_code, ("It stands on shelf {}.", "Look for it under {}.", "Its place is {}.")),
        "loans": (_number, ("It went out {} times.", "We count {} loans so far.")),
        "printed": (_year, ("It was printed in {}.", "The edition is from {}.")),
    },
    "weather": {
        "station": (_proper, ("The report comes from {}.", "At {} the sensors were checked.")),
        "heat": (_with_unit("degrees", "C", "F"), ("The air reached {}.", "We measured {} at noon.")),
        "wind": (_with_unit("km/h", "knots", "m/s"), ("The wind blew at {}.", "Gusts of {} were felt.")),
        "sky": (_one_of("clear", "cloudy", "stormy", "foggy"), ("The sky was {}.", "It stayed {} all day.")),
        "reading": (_clock, ("The reading was taken at {}.", "At {} the values were noted.")),
    },
    "sports": {
        "winner": (_proper, ("{} won the match.", "The victory went to {}.")),
        "loser": (_proper, ("{} lost in the end.", "It was a sad day for {}.")),
        "scorer": (_person, ("{} scored first.", "The first point was made by {}.")),
        "crowd": (_number, ("A crowd of {} watched.", "{} people came to see it.")),
        "played": (_day, ("The game was on {}.", "They met on {}.")),
    },
    "recipes": {
        "dish": (_nonce_word, ("Today we cook {}.", "The dish is called {}.")),
        "cook": (_person, ("The cook is {}.", "{} showed us how.")),
        "minutes": (_number, ("It takes {} minutes.", "Leave it for {} minutes.")),
        "flour": (_with_unit("grams", "cups", "g"), ("Add {} of flour.", "You need {} of flour.")),
        "taste": (_one_of("sweet", "salty", "sour", "hot"), ("The taste is {}.", "It should be {}.")),
    },
    "flights": {
        "airline": (_proper, ("The flight is run by {}.", "{} flies this route.")),
        "gate": (_code, ("Go to gate {}.", "Boarding is at {}.")),
        "seat": (_code, ("Your seat is {}.", "You sit in {}.")),
        "city": (_proper, ("We land in {}.", "The plane goes to {}.")),
        "leaves": (_clock, ("It leaves at {}.", "Take-off is at {}.")),
        "pilot": (_person, ("The pilot is {}.", "{} flies the plane.")),
    },
    "homes": {
        "street": (_proper, ("The house is in {} Street.", "You find it on {} Street.")),
        "rooms": (_number, ("It has {} rooms.", "There are {} rooms.")),
        "area": (_with_unit("m2", "square feet"), ("The area is {}.", "It covers {}.")),
        "agent": (_person, ("Ask {} for a visit.", "The agent is {}.")),
        "garden": (_one_of("yes", "no"), ("Garden: {}.", "Is there a garden? {}.")),
        "built": (_year, ("It was built in {}.", "The walls are from {}.")),
    },
    "museums": {
        "piece": (_title, ("The piece is {}.", "Visitors love {}.")),
        "sculptor": (_person, ("{} made it.", "It is a work of {}.")),
        "hall": (_code, ("It is shown in hall {}.", "Find it in {}.")),
        "material": (_one_of("bronze", "marble", "wood", "glass"), ("It is made of {}.", "The material is {}.")),
        "found": (_year, ("It was found in {}.", "The museum got it in {}.")),
    },
    "vehicles": {
        "brand": (_proper, ("For sale: a {}.", "The car is a {}.")),
        "colour": (_colour, ("It is painted {}.", "The colour is {}.")),
        "plate": (_code, ("The plate reads {}.", "Its plate is {}.")),
        "driven": (_with_unit("km", "miles"), ("It has run {}.", "The meter shows {}.")),
        "seller": (_person, ("Call {} to see it.", "It is sold by {}.")),
    },
    "concerts": {
        "band": (_title, ("{} will play.", "On stage: {}.")),
        "town": (_proper, ("The show is in {}.", "They come to {}.")),
        "entry": (_with_unit("euros", "dollars", "crowns"), ("Entry costs {}.", "You pay {} at the door.")),
        "doors": (_clock, ("Doors at {}.", "The hall lets you in at {}.")),
        "evening": (_day, ("Mark {} in your book.", "The show is on {}.")),
    },
    "schools": {
        "pupil": (_person, ("{} sat the test.", "The pupil is {}.")),
        "teacher": (_person, ("The class is led by {}.", "{} teaches it.")),
        "subject": (_one_of("maths", "music", "history", "biology"), ("The subject is {}.", "It was a {} lesson.")),
        "marks": (_number, ("The paper got {} marks.", "{} marks were given.")),
        "room": (_code, ("It took place in room {}.", "Come to {}.")),
    },
    "zoo": {
        "animal": (_one_of("lion", "otter", "zebra", "camel", "panda", "eagle"), ("We have a new {}.", "Meet our {}.")),
        "keeper": (_person, ("{} looks after it.", "Its keeper is {}.")),
        "food": (_with_unit("kilos", "buckets", "lb"), ("It eats {} a day.", "Every day it gets {}.")),
        "born": (_day, ("It was born on {}.", "Its birthday is {}.")),
        "pet": (_proper, ("The children call it {}.", "It listens to the name {}.")),
    },
    "films": {
        "film": (_title, ("Tonight: {}.", "We show {}.")),
        "director": (_person, ("It was directed by {}.", "{} directed it.")),
        "length": (_with_unit("minutes", "min", "hours"), ("It runs for {}.", "The length is {}.")),
        "tongue": (_one_of("French", "Hindi", "Polish", "Arabic"), ("The actors speak {}.", "It is in {}.")),
        "year": (_year, ("It came out in {}.", "It is a film of {}.")),
    },
}  # fmt: skip
_GENERIC: tuple[Maker, ...] = (
    _person, _proper, _title, _code, _code, _number, _decimal, _clock, _day, _colour, _thing, _nonce_word, _year,
    _with_unit("kg", "cm", "litres", "points", "tons", "hours"),
)  # fmt: skip
_STATEMENTS = (
    "The {k} is {v}.", "{K}: {v}.", "The {k} was set to {v}.", "As {k} we noted {v}.", "{v} is the {k}.",
    "Its {k} is {v}.", "They gave {v} as the {k}.", "{K} = {v}.", "We found {v} for the {k}.", "{K} {v}.",
)  # fmt: skip
_FILLERS = (
    "Nothing else was said.", "Please keep this text.", "It rained a little.", "Everyone was happy.",
    "There is more to tell.", "The rest is known.", "That is all for now.", "We thank you.", "This was checked twice.",
    "Some say so.", "It is an old story.", "Do not worry.", "Nobody asked why.", "See the list for more.",
)  # fmt: skip
_MAPPINGS = {
    "sky": {"sunny": ("bright and clear", "without a cloud", "full of sun"),
            "rainy": ("wet all day", "full of showers", "dripping with rain"),
            "snowy": ("white with snow", "icy and white", "full of flakes")},
    "mood": {"good": ("delighted", "very pleased", "happy", "cheerful"), "bad": ("angry", "sad", "upset", "gloomy"),
             "mixed": ("neither glad nor sad", "unsure", "in two minds")},
    "size": {"S": ("tiny", "small", "little"), "M": ("average", "medium", "middling"),
             "L": ("huge", "large", "giant", "enormous")},
    "open": {"true": ("open to all", "not closed", "still open"), "false": ("closed", "shut", "not open")},
}  # fmt: skip
TASKS_OF_DOCUMENTS = 0.72
"""Share of the records that ask for fields of a document; the rest are copying, counting and re-writing."""


def _facts(rng: random.Random) -> list[tuple[str, str, str]]:
    """Some facts of one domain or of a random schema: (field name, value, sentence)."""
    if rng.random() < 0.55:
        fields = DOMAINS[rng.choice(sorted(DOMAINS))]
        chosen = rng.sample(sorted(fields), rng.randint(3, min(6, len(fields))))
        drawn = [(name, fields[name][0](rng), rng.choice(fields[name][1])) for name in chosen]
        return [(name, value, _sentence(sentence.format(value))) for name, value, sentence in drawn]
    names = rng.sample(_LABELS, rng.randint(3, 6))
    if rng.random() < 0.4:
        names = list(dict.fromkeys(_nonce(rng) for _ in names))
    facts = []
    one_style = rng.choice(_STATEMENTS) if rng.random() < 0.3 else None
    for name in names:
        value = rng.choice(_GENERIC)(rng)
        style = one_style or rng.choice(_STATEMENTS)
        facts.append((name, value, _sentence(style.format(k=name, K=name.capitalize(), v=value))))
    return facts


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:]


def _format(rng: random.Random, pairs: list[tuple[str, str]]) -> tuple[str, str]:
    """One of many answer formats: (hint to write into the request or "", the answer)."""
    kind = rng.randrange(10)
    if kind <= 2:
        return "", "; ".join(f"{k}={v}" for k, v in pairs)
    if kind == 3:
        return "as JSON", json.dumps(dict(pairs), ensure_ascii=False)
    if kind == 4:
        return "one per line", "\n".join(f"{k}: {v}" for k, v in pairs)
    if kind == 5:
        return "with bars", " | ".join(f"{k}: {v}" for k, v in pairs)
    if kind == 6:
        return "only the values", ", ".join(v for _, v in pairs)
    if kind == 7:
        return "as tags", "".join(f"<{k}>{v}</{k}>" for k, v in pairs)
    if kind == 8:
        return "in sentences", " ".join(f"The {k} is {v}." for k, v in pairs)
    return "with arrows", ", ".join(f"{k} -> {v}" for k, v in pairs)


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1]


def _joined(rng: random.Random, request: str, text: str) -> str:
    return rng.choice([f"{request}\n{text}", f"{text}\n{request}", f"{request}\n\n{text}", f"{text}\n\n{request}"])


def _document(rng: random.Random, facts: list[tuple[str, str, str]]) -> str:
    sentences = [sentence for _, _, sentence in facts]
    sentences += rng.sample(_FILLERS, rng.choice([0, 0, 1, 2]))
    rng.shuffle(sentences)
    return rng.choice([" ", " ", " ", "\n"]).join(sentences)


def _extract(rng: random.Random) -> tuple[str, str]:
    facts = _facts(rng)
    asked = rng.sample(facts, rng.randint(1, min(4, len(facts))))
    names = [name for name, _, _ in asked]
    hint, answer = _format(rng, [(name, value) for name, value, _ in asked])
    verb = rng.choice(["Give", "Extract", "Find", "Note", "Tell me", "Write down", "List"])
    request = f"{verb} {_listed(names)}{' ' + hint if hint else ''}."
    return _joined(rng, request, _document(rng, facts)), answer


def _extract_like_example(rng: random.Random) -> tuple[str, str]:
    """The same extraction shown once or twice before it is asked (fields and format follow the example)."""
    fields = DOMAINS[rng.choice(sorted(DOMAINS))]
    names = rng.sample(sorted(fields), rng.randint(1, 3))
    style = rng.randrange(2**30)
    blocks = []
    for _ in range(rng.choice([2, 2, 3])):
        drawn = [(name, fields[name][0](rng), rng.choice(fields[name][1])) for name in names]
        sentences = [_sentence(s.format(v)) for _, v, s in drawn]
        rng.shuffle(sentences)
        _, answer = _format(random.Random(style), [(name, value) for name, value, _ in drawn])
        blocks.append((" ".join(sentences), answer))
    shown = "\n".join(f"Text: {text}\nAnswer: {answer}" for text, answer in blocks[:-1])
    return f"{shown}\nText: {blocks[-1][0]}\nAnswer:", blocks[-1][1]


def _ask_one(rng: random.Random) -> tuple[str, str]:
    facts = _facts(rng)
    name, value, _ = rng.choice(facts)
    if rng.random() < 0.3:
        claimed = value if rng.random() < 0.5 else rng.choice(facts)[1]
        return _joined(rng, f"Is the {name} {claimed}?", _document(rng, facts)), "Yes" if claimed == value else "No"
    request = rng.choice(["What is the {}?", "Which {} is given?", "{}?", "Tell me the {}."]).format(name)
    return _joined(rng, _sentence(request), _document(rng, facts)), value


def _map_words(rng: random.Random) -> tuple[str, str]:
    """A phrase is turned into a small code, beside a copied field."""
    facts = _facts(rng)
    name = rng.choice(sorted(_MAPPINGS))
    code = rng.choice(sorted(_MAPPINGS[name]))
    phrase = rng.choice(_MAPPINGS[name][code])
    other = rng.choice(facts)
    sentence = rng.choice(["It was {} there.", "All in all it looked {}.", "One would call it {}."]).format(phrase)
    facts.append((name, code, sentence))
    pairs = [(other[0], other[1]), (name, code)]
    rng.shuffle(pairs)
    hint, answer = _format(rng, pairs)
    choices = "|".join(_MAPPINGS[name])
    request = f"Give {_listed([k for k, _ in pairs])} ({choices}){' ' + hint if hint else ''}."
    return _joined(rng, request, _document(rng, facts)), answer


def _copy(rng: random.Random) -> tuple[str, str]:
    words = [rng.choice(_GENERIC)(rng) for _ in range(rng.randint(1, 6))]
    text = ", ".join(words)
    task = rng.randrange(8)
    if task <= 1:
        return _joined(rng, rng.choice(["Repeat this.", "Copy the text.", "Say it again."]), text), text
    if task == 2:
        return _joined(rng, "Write the list backwards.", text), ", ".join(reversed(words))
    if task == 3:
        return _joined(rng, "How many items are in the list?", text), str(len(words))
    if task == 4:
        return _joined(rng, "Write it in capital letters.", text), text.upper()
    if task == 5:
        place = rng.randrange(len(words))
        ordinal = ("first", "second", "third", "fourth", "fifth", "sixth")[place]
        return _joined(rng, f"Give the {ordinal} item.", text), words[place]
    if task == 6:
        old, new = rng.choice(words), rng.choice(_GENERIC)(rng)
        return _joined(rng, f"Replace {old} by {new}.", text), ", ".join(new if w == old else w for w in words)
    return _joined(rng, "One item a line.", text), "\n".join(words)


def _rewrite(rng: random.Random) -> tuple[str, str]:
    """Dates and amounts from one written form into another; none of them is the organisations' form."""
    day, month, year = rng.randint(1, 28), rng.randint(1, 12), rng.randint(1950, 2029)
    name = MONTHS[month - 1]
    written = rng.choice([f"{day} {name} {year}", f"{name} {day}, {year}", f"{day} {name[:3]} {year}"])
    task = rng.randrange(6)
    if task == 0:
        return _joined(rng, "Write the day with dots.", written), f"{day}.{month}.{year}"
    if task == 1:
        return _joined(rng, "Which month is it, as a number?", written), str(month)
    if task == 2:
        return _joined(rng, "Write year and month with a slash.", written), f"{year}/{month:02d}"
    if task == 3:
        return _joined(rng, "Write the day in words.", f"{day}.{month}.{year}"), f"{name} {day}, {year}"
    whole, part = rng.randint(1, 9999), rng.randint(0, 99)
    if task == 4:
        return _joined(rng, "Write the number without commas.", f"{whole:,}.{part:02d}"), f"{whole}.{part:02d}"
    spoken = _person(rng)
    first, last = spoken.split(" ", 1)
    return _joined(rng, "Last name first.", spoken), f"{last}, {first}"


_OF_DOCUMENTS = (_extract, _extract, _extract, _extract, _ask_one, _map_words, _extract_like_example)
_OTHERS = (_copy, _copy, _rewrite)


def record(index: int, seed: int) -> dict[str, str]:
    """Record number `index` of the stream `seed`: `instruction` and `response`, a function of both alone."""
    digest = hashlib.sha256(f"pretrain-text\x1f{seed}\x1f{index}".encode()).digest()
    rng = random.Random(int.from_bytes(digest[:8], "big"))
    makers = _OF_DOCUMENTS if rng.random() < TASKS_OF_DOCUMENTS else _OTHERS
    instruction, response = rng.choice(makers)(rng)
    return {"instruction": instruction, "response": response}


def records(count: int, seed: int, start: int = 0) -> Iterator[dict[str, str]]:
    """The `count` records of the stream `seed` from number `start` on."""
    return (record(index, seed) for index in range(start, start + count))
