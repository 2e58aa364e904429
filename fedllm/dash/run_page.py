"""Run page - one run's page, from what its folder holds: results, curves, privacy spent, clients, what went wrong."""

from __future__ import annotations

from collections.abc import Mapping

from fedllm.dash import blocks, given
from fedllm.dash.blocks import Block, Cell
from fedllm.dash.folder import Run, moment
from fedllm.dash.rounds import FEDERATED, Leg
from fedllm.report.page import LABELS, TONES, duration
from fedllm.report.words import NAMES, value_text

MODELS = 8
"""Models whose lines are drawn at most."""
LISTED = 30
"""Clients, and troubles of each model, that are listed at most."""


def tiles(run: Run) -> list[list[str]]:
    """The key figures."""
    own, metric = run.rounds.own, run.metric
    found = [[f"{own.last:,}" + (f" of {run.total:,}" if run.total else ""), "rounds are over"]]
    if own.loss is not None:
        found.append([f"{own.loss:.3f}", "training loss of the last round"])
    if metric and run.score is not None:
        found.append([value_text(metric, run.score), f"{NAMES.get(metric, metric)}, over all held-out rows"])
    if own.up:
        up, down = sum(own.up.values()), sum(own.down.values())
        found.append([blocks.size(up), f"sent by the clients; {blocks.size(down)} received"])
    if spent := given.number(own.guard.get("epsilon")):
        budget = given.number(own.guard.get("budget"))
        found.append([f"ε {spent:.3g}", "privacy spent" + (f", of {budget:g}" if budget else "")])
    bad = sum(one.times for one in own.troubles.values()) + own.more_troubles
    found.append([f"{bad:,}", "uploads refused or lost"])
    return found


def sections(run: Run) -> list[Block]:
    """What is known of a run, part by part."""
    return [
        *_results(run),
        _curves(run),
        *_privacy(run.rounds.own),
        *_clients(run),
        _troubles(run),
        *_warnings(run),
        _about(run),
    ]


def about(run: Run) -> list[str]:
    """What the recipe says of itself, and the method."""
    words = given.text((run.recipe.found or {}).get("about"), 300)
    return [one for one in (words, f"Method {run.method}" if run.method else "") if one]


def lead(run: Run) -> list[str]:
    """What the result means, in plain sentences."""
    return given.texts((run.result.found or {}).get("sentences"))[:6] if run.state().word != "under way" else []


def _results(run: Run) -> list[Block]:
    rows = [given.mapping(row) for row in given.listed((run.result.found or {}).get("rows"))]
    metric = run.metric
    if not rows or not metric:
        return []
    body: list[list[Cell]] = []
    for row in rows[:20]:
        pooled, spread = given.mapping(row.get("pooled")), given.mapping(row.get("summary"))
        values = [given.number(one) for one in (pooled.get(metric), spread.get("mean"), spread.get("worst_10_percent"))]
        held = given.number(pooled.get("n"))
        cells = ["–" if value is None else value_text(metric, value) for value in values]
        label = given.text(row.get("label"), 200) or given.text(row.get("model"), 200)
        body.append([label, *cells, f"{held:,.0f}" if held is not None else "–"])
    name = NAMES.get(metric, metric)
    heads = ["Model", "#Overall", "#Mean of clients", "#Worst 10 %-", "#Held-out rows-"]
    better = "Lower" if (run.result.found or {}).get("higher_is_better") is False else "Higher"
    note = blocks.text(f"{name[:1].upper()}{name[1:]} on held-out rows. {better} is better.", "note")
    return [blocks.section("Results", blocks.table("Of each model", heads, body), note)]


def _curves(run: Run) -> Block:
    metric, named = run.metric, sorted(run.rounds.named(), key=lambda one: _tone(one[0]))[:MODELS]
    own = run.rounds.own
    charts = [
        blocks.chart(
            "Training loss",
            "Mean loss of the training rows.",
            [(_label(name), _tone(name), list(leg.losses.items())) for name, leg in named],
            blocks.axis("loss"),
        ),
        blocks.chart(
            NAMES.get(metric, metric).capitalize(),
            "Over all held-out rows.",
            [(_label(name), _tone(name), list((leg.scores.get(metric) or {}).items())) for name, leg in named],
            blocks.axis(metric),
        ),
        blocks.chart(
            "Bytes sent, added up",
            "The lengths of the encoded messages of training.",
            [("up: clients to server", 0, _added(own.up)), ("down: server to clients", 6, _added(own.down))],
            blocks.size,
            zero=True,
        ),
        blocks.chart(
            "Privacy spent (ε)",
            given.text(own.guard.get("line"), 300),
            [("spent", 4, list(own.epsilon.items()))],
            "{:,g}".format,
            zero=True,
        ),
    ]
    drawn = [one for one in charts if one is not None]
    if not own.losses:
        return blocks.section("Round by round", blocks.text("No round is over yet.", "empty"))
    lines = f"{blocks.count(run.rounds.unreadable, 'line')} of metrics.jsonl cannot be read and are left out."
    note = blocks.text(lines, "bad")
    return blocks.section("Round by round", *drawn, latest(own), note if run.rounds.unreadable else None)


def latest(own: Leg) -> Block:
    """The last rounds in numbers, the newest first."""
    rows: list[list[Cell]] = []
    for one in reversed(own.latest):
        loss, used = given.number(one.get("loss")), given.whole(one.get("used"))
        lost, refused = len(given.listed(one.get("lost"))), len(given.listed(one.get("rejected")))
        failed = bool(one.get("failed"))
        rows.append(
            [
                blocks.toned(f"{one['round']:,}", blocks.BAD) if failed else f"{one['round']:,}",
                "changed nothing" if failed else f"{loss:.3f}" if loss is not None else "–",
                f"{used:,}" if used is not None else "–",
                blocks.toned(f"{lost:,}", blocks.BAD) if lost else "0",
                blocks.toned(f"{refused:,}", blocks.BAD) if refused else "0",
                blocks.size(given.whole(one.get("bytes_up"))),
                blocks.size(given.whole(one.get("bytes_down"))),
                duration(given.number(one.get("seconds")) or 0.0),
            ]
        )
    heads = ["#Round", "#Loss", "#Uploads", "#Lost-", "#Refused-", "#Up", "#Down-", "#Time-"]
    caption = f"The last {blocks.count(len(rows), 'round')}" if len(rows) > 1 else "The last round"
    return blocks.table(caption, heads, rows)


def _privacy(own: Leg) -> list[Block]:
    """What differential privacy has spent; nothing where the run has none."""
    guard = own.guard
    if "epsilon" not in guard and "line" not in guard:
        return []
    spent, budget, delta = (given.number(guard.get(name)) for name in ("epsilon", "budget", "delta"))
    words = f"ε = {spent:.4g}" if spent is not None else "without bound"
    left = f" of {budget:g}; {max(0.0, budget - (spent or 0.0)):.3g} left" if budget else "; no budget was set"
    numbers = [(name, given.number(guard.get(name))) for name in ("noise", "clip")]
    known: list[tuple[str, Cell]] = [
        ("Protected", f"each {given.text(guard.get('unit'), 60)}" if guard.get("unit") else ""),
        ("δ", f"{delta:g}" if delta is not None else ""),
        *((name.capitalize(), f"{value:.4g}") for name, value in numbers if value is not None),
        ("In words", given.text(guard.get("line"), 600)),
    ]
    full = blocks.bar("Privacy spent", spent if spent is not None else 1.0, budget, words + left) if budget else None
    return [blocks.section("Privacy spent", full or blocks.text(f"Spent: {words}{left}."), blocks.facts(known))]


def _clients(run: Run) -> list[Block]:
    """Who takes part, how many rows each holds, how often it was asked."""
    sizes = given.mapping((run.partition.found or {}).get("clients"))
    home, names = given.mapping((run.sites.found or {}).get("home")), run.clients()
    asked = run.rounds.own.clients
    known = list(dict.fromkeys([*sizes, *asked]))
    if not known:
        return []
    rows: list[list[Cell]] = []
    for client in sorted(known, key=lambda one: -(asked[one].lost + asked[one].refused if one in asked else 0))[
        :LISTED
    ]:
        about, held = asked.get(client), given.whole(given.mapping(sizes.get(client)).get("train"))
        bad = [about.lost, about.refused] if about else [0, 0]
        rows.append(
            [
                given.text(names.get(client, client), 200),
                *([given.text(home.get(client), 200)] if home else []),
                f"{held:,}" if held is not None else "–",
                f"{about.asked:,}" if about else "0",
                *(blocks.toned(f"{number:,}", blocks.BAD) if number else "0" for number in bad),
            ]
        )
    heads = ["Client", *(["Site"] if home else []), "#Training rows", "#Rounds asked", "#Lost", "#Refused"]
    words = f"The {len(rows)} with the most losses of {len(known):,} clients."
    more = blocks.text(words, "note") if len(known) > len(rows) else None
    return [blocks.section("Clients", blocks.table("Who takes part", heads, rows), more)]


def _troubles(run: Run) -> Block:
    """Uploads that were refused, clients that were lost, rounds that changed nothing."""
    rows: list[list[Cell]] = []
    names, more, failed = run.clients(), 0, []
    for name, leg in run.rounds.named():
        where = "" if name == FEDERATED else f" ({_label(name)})"
        more += leg.more_troubles
        if leg.failed:
            many = blocks.count(len(leg.failed), "round")
            failed.append(f"{many}{where} changed nothing, the last one {leg.failed[-1]:,}: {leg.failed_why}")
        found = sorted(leg.troubles.values(), key=lambda one: -one.last)
        more += sum(one.times for one in found[LISTED:])
        for one in found[:LISTED]:
            when = f"{one.first:,}" if one.first == one.last else f"{one.first:,} to {one.last:,}"
            rows.append([names.get(one.client, one.client), one.kind + where, f"{one.times:,}", when, one.reason])
    if not rows and not failed:
        return blocks.section("Refused and lost", blocks.text("No upload was refused and no client was lost.", "empty"))
    heads = ["Client", "What", "#Times", "Rounds", "Reason"]
    listed = blocks.table("Refused uploads and lost clients", heads, rows) if rows else None
    rest = blocks.text(f"And {more:,} more; see metrics.jsonl.", "note") if more else None
    return blocks.section("Refused and lost", *(blocks.text(one, "bad") for one in failed), listed, rest)


def _warnings(run: Run) -> list[Block]:
    result = run.result.found or {}
    promised = [line.removeprefix("- ") for line in given.texts(result.get("guarantee"))[:40]]
    found = [blocks.section("What is promised, and on what it rests", blocks.items(promised))] if promised else []
    warnings = given.texts(result.get("warnings")) or given.texts((run.sites.found or {}).get("warnings"))
    if run.result.damaged:
        warnings.insert(0, "result.json is damaged and left out.")
    return [*found, blocks.section("Warnings", blocks.items(warnings[:40]))] if warnings else found


def _about(run: Run) -> Block:
    known, result = run.environment.found or {}, run.result.found or {}
    model, versions = given.mapping(known.get("model")), given.mapping(known.get("versions"))
    parameters, trained = given.whole(model.get("parameters")), given.whole(model.get("trainable"))
    seconds = given.number(result.get("seconds"))
    report = run.folder / "report.html"
    found: list[tuple[str, Cell]] = [
        ("Method", run.method),
        ("Base model", given.text(model.get("name"), 200)),
        ("Parameters", f"{parameters:,}" if parameters is not None else ""),
        ("Trained", f"{trained:,}" if trained is not None else ""),
        ("Device", given.text(known.get("device"), 100)),
        ("fedllm", given.text(versions.get("fedllm"), 40)),
        ("Time", duration(seconds) if seconds is not None else ""),
        ("Last sign of life", blocks.at(moment(run.seen)) if run.seen else ""),
        ("Folder", str(run.folder) if run.folder.is_dir() else ""),
        ("Report", str(report) if report.is_file() else ""),
    ]
    return blocks.section("What runs", blocks.facts(found))


def _added(sizes: Mapping[int, int]) -> list[tuple[float, float | None]]:
    """Round -> bytes up to then."""
    total, found = 0, []
    for number, one in sizes.items():
        total += one
        found.append((float(number), float(total)))
    return found


def _label(model: str) -> str:
    return LABELS.get(model, model)


def _tone(model: str) -> int:
    return TONES.get(model, 4)
