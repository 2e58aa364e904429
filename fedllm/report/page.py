"""Page - a run's report: one HTML file that needs no network and no script.

It is made from the files of the run folder alone (recipe.yaml, environment.json, partition.json, metrics.jsonl,
result.json), so it can be made again at any time; where a file is missing, the section that needs it says so.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

from fedllm.core.errors import RunError
from fedllm.evaluate.clients import Summary, summarise
from fedllm.report.chart import Bars, Line, bar_chart, heat_map, line_chart, stacked_chart
from fedllm.report.table import interval_text
from fedllm.report.words import NAMES, RATES, bytes_text, count, value_text

COLUMNS = 12
"""Up to so many clients have a column and bars of their own; above, their distribution is shown."""
ROWS, POINTS = 200, 200
"""Most clients in a heat map, and most points of a distribution; above, every n-th is taken."""
STACKED, HEATED = 7, 23
"""Up to so many labels are stacked, or have a column of a heat map; the rarer ones are put together."""
NOTES = 60
"""Most warnings listed."""
TONES = {"federated": 0, "local": 1, "base": 2, "central": 3}
"""Models by place in the palette; others follow."""
LABELS = {"base": "Base model", "local": "Each alone", "federated": "Federated", "central": "All data pooled"}
"""Models where result.json does not name them."""


@dataclass
class Run:
    """What a run folder holds; None or empty where a file is missing.

    Attributes:
        folder: the folder.
        recipe: the text of recipe.yaml.
        environment, partition, result: the JSON files.
        rounds: the lines of metrics.jsonl about rounds.
        evaluations: its lines about measurements.
        notes: what could not be read.
    """

    folder: Path
    recipe: str | None = None
    environment: dict[str, Any] | None = None
    partition: dict[str, Any] | None = None
    result: dict[str, Any] | None = None
    rounds: list[dict[str, Any]] = field(default_factory=list)
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    _summaries: dict[tuple[str, str | None], Summary] = field(default_factory=dict, repr=False)

    @cached_property
    def names(self) -> dict[str, str]:
        """Client id -> a name for people."""
        found = {i: str(one.get("name") or i) for i, one in ((self.partition or {}).get("clients") or {}).items()}
        return {**found, **((self.result or {}).get("clients") or {})}

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The rows of the result."""
        return (self.result or {}).get("rows") or []

    @property
    def metric(self) -> str | None:
        """The headline metric."""
        return (self.result or {}).get("metric")

    @property
    def higher(self) -> bool:
        """Whether more of it is better."""
        return bool((self.result or {}).get("higher_is_better", True))

    @cached_property
    def clients(self) -> list[str]:
        """The clients of the result, in the order of the federation."""
        found = {client for row in self.rows for client in row.get("clients") or {}}
        return [*(client for client in self.names if client in found), *sorted(found - set(self.names))]

    def name(self, client: str) -> str:
        """A client's name for people."""
        return self.names.get(client, client)

    def summary(self, model: str, reference: str | None = None) -> Summary:
        """The clients of a model's row in numbers, with the gain over another row."""
        if (model, reference) not in self._summaries:
            rows = {row["model"]: row.get("clients") or {} for row in self.rows}
            other = rows.get(reference) if reference else None
            found = summarise(rows[model], str(self.metric), reference=other, higher_is_better=self.higher)
            self._summaries[model, reference] = found
        return self._summaries[model, reference]

    def row(self, model: str) -> dict[str, Any] | None:
        """The result row of a model."""
        return next((row for row in self.rows if row["model"] == model), None)

    def label(self, model: str) -> str:
        """A model's name for people."""
        row = self.row(model)
        return str(row["label"]) if row and row.get("label") else LABELS.get(model, model)

    def tone(self, model: str) -> int:
        """A model's place in the palette."""
        others = [row["model"] for row in self.rows if row["model"] not in TONES]
        return TONES.get(model, 4 + others.index(model) if model in others else 4)


def write_report(run_folder: str | Path) -> Path:
    """Write `report.html` into a run folder and return its path.

    Raises:
        RunError: there is no such folder, a file in it is damaged, or the report cannot be written.
    """
    run = read_run(Path(run_folder))
    file = run.folder / "report.html"
    partial = file.with_name(file.name + ".partial")
    try:
        partial.write_text(page(run), encoding="utf-8", errors="replace")
        partial.replace(file)
    except OSError as fault:
        raise RunError(
            f"{file} cannot be written: {fault.strerror or fault}.", action="Make room and try again."
        ) from None
    return file


def read_run(folder: Path) -> Run:
    """Read what a run folder holds; raises :class:`RunError` for a missing folder or a damaged file."""
    if not folder.is_dir():
        raise RunError(f"There is no folder {folder}.", action="Name the folder that 'fedllm run' printed.")
    run = Run(folder, _text(folder / "recipe.yaml"))
    run.environment, run.partition, run.result = (
        _json(folder / f"{name}.json") for name in ("environment", "partition", "result")
    )
    lines = (_text(folder / "metrics.jsonl") or "").split("\n")
    for number, line in enumerate(lines, 1):
        try:
            event = _parsed(line) if line.strip() else {}
        except ValueError:
            if any(rest.strip() for rest in lines[number:]):
                run.notes.append(f"Line {number} of metrics.jsonl cannot be read and is left out.")
            continue
        {"round": run.rounds, "evaluation": run.evaluations}.get(str(event.get("event")), []).append(event)
    return run


def page(run: Run) -> str:
    """The whole page."""
    title = str((run.result or {}).get("name") or run.folder.resolve().name)
    style = Path(__file__).with_name("page.css").read_text(encoding="utf-8")
    sections = (results, promises, by_client, curves, traffic, data, what_ran, notes)
    body = "\n".join([header(run, title), *(section(run) for section in sections)])
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)} - federated run</title>
<style>
{style}</style>
</head>
<body>
<main>
{body}
<footer>Made by fedllm from the files of the run folder {escape(run.folder.resolve().name)}.</footer>
</main>
</body>
</html>
"""


# -- what it comes to -------------------------------------------------------------------------------------------------


def header(run: Run, title: str) -> str:
    """The name, the sentences that matter, the key figures."""
    result = run.result or {}
    facts = [f"Method {result['method']}" if result.get("method") else ""]
    facts += [_count(result.get("rounds"), "round"), _count(len(run.names) or None, "client")]
    abouts = [str(result.get("about") or ""), " · ".join(fact for fact in facts if fact)]
    parts = [
        '<header>\n<p class="kind">Federated run</p>',
        f"<h1>{escape(title)}</h1>",
        *(f'<p class="about">{escape(text)}</p>' for text in abouts if text),
        *(f'<p class="lead">{escape(str(sentence))}</p>' for sentence in result.get("sentences") or []),
    ]
    if run.result is None:
        parts.append(_empty("There is no result.json: the run is not finished, or stopped before its end."))
    elif result.get("finished") is False:
        parts.append(_empty("The run was stopped before its last round; these are the numbers so far."))
    tiles = "".join(
        f'<li class="tile"><b>{escape(big)}</b><span>{escape(small)}</span></li>' for big, small in figures(run)
    )
    parts.append(f'<ul class="tiles">{tiles}</ul>' if tiles else "")
    return "\n".join(part for part in parts if part) + "\n</header>"


def figures(run: Run) -> list[tuple[str, str]]:
    """The key figures: a number and what it is."""
    result, metric, own = run.result or {}, run.metric, run.row("federated")
    found: list[tuple[str, str]] = []
    if metric and own and own["pooled"].get(metric) is not None:
        found.append((value_text(metric, own["pooled"][metric]), f"{_name(metric)}, {run.label('federated')}"))
        for model, words in (("local", "better than alone"), ("base", "better than the base model")):
            gain = run.summary("federated", model).gain
            if gain:
                found.append((f"{round(gain.improved * gain.clients)} of {gain.clients}", f"clients do {words}"))
    sent = result.get("bytes") or {}
    if sent.get("up") is not None:
        found.append((_size(sent["up"]), f"sent by the clients; {_size(sent.get('down'))} received"))
    if result.get("seconds") is not None:
        found.append((duration(result["seconds"]), "of wall time, comparisons included"))
    return found


def results(run: Run) -> str:
    """The result table and, beneath it, the other metrics."""
    metric, rows = run.metric, run.rows
    if not metric or not rows:
        return _section("Results", _empty("No model has been measured: there are no results in result.json."))
    wide = len(run.clients) <= COLUMNS
    heads = [run.name(client) for client in run.clients] if wide else ["Std", "Lowest", "Highest", "10th percentile"]
    words = [word for head in heads for word in head.split()]
    crowded = wide and (len(heads) > 8 or (len(heads) > 4 and max(map(len, words)) > 11))
    sums = ["Overall", "Mean of clients", "Worst 10\u00a0%", "95\u00a0% interval"]
    body = [_result_row(run, row, wide) for row in rows]
    gain = _gain_row(run, wide)
    table = _table([*heads, *sums], len(sums), [*body, gain] if gain else body, crowded)
    direction, unit = "Higher" if run.higher else "Lower", " in percent" if metric in RATES else ""
    note = (
        f"{_first(_name(metric))}{unit} on each client's held-out rows. {direction} is better. Overall: all rows "
        "together. Mean of clients: each client counts the same. Worst 10 %: the mean of the worst-served tenth of the "
        "clients, at least one. 95 % interval: of the mean of clients, from drawing clients anew."
    )
    return _section("Results", f'{table}<p class="note">{escape(note)}</p>{_other_metrics(run)}')


def _result_row(run: Run, row: dict[str, Any], wide: bool) -> tuple[str, str, list[str]]:
    metric, summary = str(run.metric), run.summary(row["model"])
    if wide:
        values = [(row["clients"].get(client) or {}).get(metric) for client in run.clients]
    else:
        values = [summary.std, summary.min, summary.max, summary.percentile_10]
    values += [row["pooled"].get(metric), summary.mean, summary.worst_10_percent]
    cells = [_cell(metric, value, unit=False) for value in values]
    key = f'<span class="key" style="background:var(--tone{run.tone(row["model"])})"></span>'
    label = key + escape(run.label(row["model"]))
    kind = "own" if row["model"] == "federated" else ""
    return kind, label, [*cells, escape(interval_text(metric, summary.interval).removesuffix(" %"))]


def _gain_row(run: Run, wide: bool) -> tuple[str, str, list[str]] | None:
    """What the federated model gains over each alone (or, without that, over the base model)."""
    own, model = run.row("federated"), "local" if run.row("local") else "base"
    other = run.row(model)
    if own is None or other is None:
        return None
    metric, gain = str(run.metric), run.summary("federated", model).gain
    first, second = run.summary("federated"), run.summary(model)
    now, then = own["clients"], other["clients"]
    pairs = [((now.get(c) or {}).get(metric), (then.get(c) or {}).get(metric)) for c in run.clients]
    cells = [_change(run, *pair) for pair in pairs] if wide else ["", "", "", ""]
    cells.append(_change(run, own["pooled"].get(metric), other["pooled"].get(metric)))
    cells += [_change(run, first.mean, second.mean), _change(run, first.worst_10_percent, second.worst_10_percent)]
    interval = [value if run.higher else -value for value in gain.interval] if gain and gain.interval else None
    cells.append("\u00a0– ".join(_signed(metric, value) for value in sorted(interval)) if interval else "–")
    return "gain", f"Gain over {escape(_first(run.label(model), upper=False))}", cells


def _other_metrics(run: Run) -> str:
    """All metrics over all rows, where there is more than one."""
    names = [name for name in run.rows[0]["pooled"] if name != "n"]
    if len(names) < 2:
        return ""
    body = []
    for row in run.rows:
        cells = [_cell(name, row["pooled"].get(name)) for name in names]
        size = row["pooled"].get("n")
        kind = "own" if row["model"] == "federated" else ""
        body.append((kind, escape(run.label(row["model"])), [*cells, f"{size:,.0f}" if size is not None else "–"]))
    heads = [*(_first(_name(name)) for name in names), "Rows"]
    return f"<h3>All measures, over all held-out rows</h3>{_table(heads, 0, body)}"


def promises(run: Run) -> str:
    """What privacy and secure sums guarantee, line by line; nothing where the run has neither."""
    lines = [str(line).removeprefix("- ") for line in (run.result or {}).get("guarantee") or []]
    if not lines:
        return ""
    items = "".join(f"<li>{escape(line)}</li>" for line in lines)
    return _section("What is promised, and on what it rests", f'<ul class="list">{items}</ul>')


def by_client(run: Run) -> str:
    """Bars of each client, or the distribution of many."""
    rows = [row for row in run.rows if row["model"] in ("federated", "local", "base") or row["model"] not in TONES]
    rows = sorted(rows, key=lambda row: run.tone(row["model"]))
    if not run.metric or not any(row.get("clients") for row in rows):
        return _section("Client by client", _empty("No client has been measured."))
    chart = _bars(run, rows) if len(run.clients) <= COLUMNS else _distribution(run, rows)
    return _section("Client by client", f'<div class="charts">{chart}</div>')


def _bars(run: Run, rows: Sequence[dict[str, Any]]) -> str:
    metric = str(run.metric)
    bars = [
        Bars(
            run.label(row["model"]),
            [(row["clients"].get(client) or {}).get(metric) for client in run.clients],
            run.tone(row["model"]),
        )
        for row in rows
    ]
    halves, charts = (len(run.clients) + 1) // 2 if len(run.clients) > 3 else len(run.clients), []
    names = [run.name(client) for client in run.clients]
    top = max((value for bar in bars for value in bar.values if value is not None), default=0.0)
    for first in range(0, len(names), halves):
        part = slice(first, first + halves)
        shown = [Bars(bar.name, bar.values[part], bar.tone) for bar in bars]
        text = "; ".join(f"{name}: {_told(metric, shown, n)}" for n, name in enumerate(names[part]))
        title = f"{_first(_name(metric))} of each client"
        charts.append(_figure(bar_chart(title, text, names[part], shown, lambda v: value_text(metric, v), top), ""))
    return "".join(charts)


def _told(metric: str, bars: Sequence[Bars], place: int) -> str:
    return ", ".join(f"{bar.name} {value_text(metric, bar.values[place])}" for bar in bars)


def _distribution(run: Run, rows: Sequence[dict[str, Any]]) -> str:
    """Each model's clients from worst to best: one line instead of hundreds of bars."""
    metric, lines = str(run.metric), []
    for row in rows:
        values = sorted(
            (v for one in row["clients"].values() if (v := one.get(metric)) is not None), reverse=not run.higher
        )
        points = [(100 * (place + 0.5) / len(values), value) for place, value in enumerate(values)]
        lines.append(Line(run.label(row["model"]), _thin(points), run.tone(row["model"])))
    title = f"{_first(_name(metric))} of {len(run.clients)} clients, worst to best"
    chart = line_chart(title, _ends(lines, metric), lines, "share of the clients", _axis(metric), "{:.0f} %".format)
    note = "Read: a fifth of the clients lie at or left of 20 %. The higher line serves clients better."
    return _figure(chart, note if run.higher else note.replace("higher", "lower"), title)


# -- how it went ------------------------------------------------------------------------------------------------------


def curves(run: Run) -> str:
    """Training loss and the metric over the rounds."""
    metric = run.metric or next((name for e in run.evaluations for name in e["pooled"] if name != "n"), None)
    found = [_loss_chart(run), _metric_chart(run, metric) if metric else ""]
    if not any(found):
        return _section("Round by round", _empty("metrics.jsonl holds no rounds."))
    if not found[1]:
        found[1] = '<p class="note">The models were measured once, at the end. For a curve set evaluation.every.</p>'
    return _section("Round by round", f'<div class="charts">{"".join(found)}</div>')


def _loss_chart(run: Run) -> str:
    lines = _lines(run, run.rounds, lambda event: event.get("loss"))
    if lines and max(len(line.points) for line in lines) < 2:
        return f'<p class="note">Training loss, one round. {escape(_only(lines, "loss"))}</p>'
    chart = line_chart("Training loss", _ends(lines, "loss"), lines, "round", _axis("loss"))
    return _figure(chart, "Mean loss of the training rows during local training.", "Training loss")


def _metric_chart(run: Run, metric: str) -> str:
    lines = _lines(run, run.evaluations, lambda event: event["pooled"].get(metric))
    if max((len(line.points) for line in lines), default=0) < 2:
        return ""
    base = (run.row("base") or {}).get("pooled", {}).get(metric)
    if base is not None and not any(event.get("model") == "base" for event in run.evaluations):
        rounds = [x for line in lines for x, _ in line.points]
        lines.append(Line(run.label("base"), [(min(rounds), base), (max(rounds), base)], TONES["base"]))
    title = f"Held-out {_name(metric).removeprefix('held-out ')}"
    chart = line_chart(title, _ends(lines, metric), lines, "round", _axis(metric))
    return _figure(chart, "Over all held-out rows.", title)


def traffic(run: Run) -> str:
    """Bytes up and down, added up over the rounds."""
    events = [event for event in run.rounds if event.get("model", "federated") == "federated"]
    if not events:
        return _section("What travelled", _empty("metrics.jsonl holds no rounds."))
    lines, totals = [], {}
    for name, key, tone in (("up: clients to server", "bytes_up", 0), ("down: server to clients", "bytes_down", 6)):
        total, points = 0, []
        for event in events:
            total += event.get(key) or 0
            points.append((event["round"], total))
        lines.append(Line(name, points, tone))
        totals[key] = total
    description = (
        f"After {count(len(events), 'round')} {_size(totals['bytes_up'])} up and {_size(totals['bytes_down'])} down."
    )
    chart = line_chart("Bytes sent", description, lines, "round", _size, zero=True) if len(events) > 1 else ""
    asked = sum(len(event.get("cohort") or []) for event in events)
    facts = [("Sent by clients", _size(totals["bytes_up"])), ("Received by clients", _size(totals["bytes_down"]))]
    if asked:
        each = f"{_size(totals['bytes_up'] / asked)} up, {_size(totals['bytes_down'] / asked)} down"
        facts += [
            ("Each client, each round", each),
            ("Clients each round", f"{asked / len(events):,.1f}".removesuffix(".0")),
        ]
    tokens, seconds = (sum(event.get(key) or 0 for event in events) for key in ("tokens", "seconds"))
    facts += [("Tokens trained on", f"{tokens:,}")] if tokens else []
    facts += [("Time for the rounds", duration(seconds))] if seconds else []
    note = "The lengths of the encoded messages of training."
    both = _figure(chart, note, "Bytes sent, added up") + _facts(facts)
    return _section("What travelled", f'<div class="charts">{both}</div>')


# -- what it stands on ------------------------------------------------------------------------------------------------


def data(run: Run) -> str:
    """Who holds how much of what."""
    clients = (run.partition or {}).get("clients") or {}
    if not clients:
        return _section("Whose data", _empty("There is no partition.json, so nothing is known of the clients' data."))
    sizes = [one.get("train") or 0 for one in clients.values()]
    held = sum(one.get("eval") or 0 for one in clients.values())
    text = f"{_count(len(clients), 'client')} with {sum(sizes):,} training rows and {held:,} held-out rows."
    if len(sizes) > 1:
        text += f" The smallest has {min(sizes):,} training rows, the largest {max(sizes):,}."
    charts = [_sizes(run, clients), _labels(run, clients)]
    return _section("Whose data", f'<p>{escape(text)}</p><div class="charts">{"".join(charts)}</div>')


def _sizes(run: Run, clients: Mapping[str, Any]) -> str:
    """Rows of each client; of many clients, from the largest to the smallest."""
    ordered = sorted(clients, key=lambda client: (-(clients[client].get("train") or 0), run.name(client)))
    if len(ordered) <= 2 * COLUMNS:
        bars = [Bars("training rows", [clients[c].get("train") for c in ordered], 0)]
        bars.append(Bars("held-out rows", [clients[c].get("eval") for c in ordered], 2))
        text = "; ".join(f"{run.name(c)}: {clients[c].get('train')}" for c in ordered)
        chart = bar_chart("Rows of each client", text, [run.name(c) for c in ordered], bars, "{:,.0f}".format)
        return _figure(chart, "", "Rows of each client")
    points = [(place, float(clients[c].get("train") or 0)) for place, c in enumerate(ordered, 1)]
    text = f"From {points[0][1]:,.0f} rows down to {points[-1][1]:,.0f}."
    chart = line_chart(
        "Training rows", text, [Line("", _thin(points), 0)], "clients, largest first", "{:,.0f}".format, zero=True
    )
    return _figure(chart, "", "Training rows of each client")


def _labels(run: Run, clients: Mapping[str, Any]) -> str:
    """Labels by client: stacked where they are few, as a heat map otherwise."""
    counts = {client: one["labels"] for client, one in clients.items() if one.get("labels")}
    if not counts:
        return ""
    totals: dict[str, int] = {}
    for found in counts.values():
        for label, seen in found.items():
            totals[label] = totals.get(label, 0) + seen
    few = len(totals) <= STACKED + 1 and len(counts) <= 2 * COLUMNS
    labels, table = _grouped(counts, totals, STACKED if few else HEATED)
    title = "Training rows by label"
    text = ", ".join(f"{label} {sum(table[client][n] for client in table):,}" for n, label in enumerate(labels))
    if few:
        order = sorted(table, key=lambda client: (-sum(table[client]), run.name(client)))
        parts = [Bars(label, [table[client][n] for client in order], n) for n, label in enumerate(labels)]
        names = [run.name(client) for client in order]
        return _figure(stacked_chart(title, text, names, parts, "{:,.0f}".format), "", title)
    order = sorted(table, key=lambda client: (table[client].index(max(table[client])), -max(table[client]), client))
    taken = _thin(order, ROWS)
    shares = [[value / (sum(table[client]) or 1) for value in table[client]] for client in taken]
    names, percent = [run.name(client) for client in taken], lambda share: f"{100 * share:.0f} %"
    chart = heat_map("Share of each label at each client", text, names, labels, shares, percent)
    note = (
        "One row for each client" if len(taken) == len(order) else f"{len(taken)} of {len(order)} clients, one row each"
    )
    return _figure(chart, f"{note}, ordered by its most frequent label.", "Share of each label at each client")


def _grouped(
    counts: Mapping[str, Mapping[str, int]], totals: Mapping[str, int], most: int
) -> tuple[list[str], dict[str, list[float]]]:
    """Labels, most frequent first, the rarer ones as one, and client -> counts in that order."""
    ordered = sorted(totals, key=lambda label: (-totals[label], label))
    rare = ordered[most:] if len(ordered) > most + 1 else []
    kept = ordered[: len(ordered) - len(rare)]
    table = {}
    for client, found in counts.items():
        values = [float(found.get(label, 0)) for label in kept]
        table[client] = [*values, float(sum(found.get(label, 0) for label in rare))] if rare else values
    return ([*kept, f"{len(rare)} other labels"] if rare else kept), table


def what_ran(run: Run) -> str:
    """The base model, versions, seed, files and the recipe."""
    found, facts = run.environment or {}, []
    model = found.get("model") or {}
    if model.get("name"):
        facts.append(("Base model", str(model["name"])))
    if model.get("parameters") is not None:
        facts.append(("Parameters", f"{model['parameters']:,}"))
    if model.get("trainable") is not None:
        share = f" ({100 * model['trainable'] / model['parameters']:.2g} %)" if model.get("parameters") else ""
        facts.append(("Trained", f"{model['trainable']:,}{share}"))
    if model.get("fingerprint"):
        facts.append(("Fingerprint", str(model["fingerprint"])))
    facts += [(key.capitalize(), str(found[key])) for key in ("seed", "device") if found.get(key) is not None]
    versions = {"python": found.get("python"), **(found.get("versions") or {})}
    shown = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    facts += [("Versions", shown)] if shown else []
    facts += [("Platform", str(found["platform"]))] if found.get("platform") else []
    parts = [_facts(facts, _files(run))]
    if run.environment is None:
        parts.append(_empty("There is no environment.json, so model and versions are not known."))
    if run.recipe is None:
        parts.append(_empty("There is no recipe.yaml."))
    else:
        parts.append(f"<details><summary>The whole recipe</summary><pre>{escape(run.recipe)}</pre></details>")
    return _section("What ran", "".join(parts))


def _files(run: Run) -> str:
    """Links to the run's files that lie in its folder; others by name."""
    links, here = [], run.folder.resolve()
    for name, given in ((run.result or {}).get("files") or {}).items():
        path = here / str(given)
        inside = path.resolve().is_relative_to(here)
        text = path.resolve().relative_to(here).as_posix() if inside else path.name
        links.append(f'<a href="{escape(quote(text))}">{escape(text)}</a>' if inside else escape(text))
        links[-1] += f" ({escape(name)})" if Path(text).stem != name else ""
    return f"<dt>Files</dt><dd>{', '.join(links)}</dd>" if links else ""


def notes(run: Run) -> str:
    """Warnings, refused uploads, lost clients."""
    found = [*run.notes, *(str(text) for text in (run.result or {}).get("warnings") or []), *_troubles(run)]
    if not found:
        done = run.result is not None or run.rounds
        text = "Nothing to report: no upload was refused and no client was lost." if done else "Nothing is known yet."
        return _section("Warnings", _empty(text))
    items = "".join(f"<li>{escape(text)}</li>" for text in found[:NOTES])
    more = f'<p class="note">and {len(found) - NOTES} more; see metrics.jsonl.</p>' if len(found) > NOTES else ""
    return _section("Warnings", f'<ul class="list">{items}</ul>{more}')


def _troubles(run: Run) -> list[str]:
    """Failed rounds, refused uploads and lost clients, the same reason of a client put together."""
    rounds: dict[tuple[str, str, str, str], list[int]] = {}
    failed = []
    for event in run.rounds:
        leg = event.get("model", "federated")
        where = "" if leg == "federated" else f" ({run.label(leg)})"
        if event.get("failed"):
            failed.append(f"Round {event['round']}{where} changed nothing: {event['failed']}.")
        for key, words in (("rejected", "upload refused"), ("lost", "did not answer")):
            for entry in event.get(key) or []:
                one = entry if isinstance(entry, dict) else {"client": entry}
                mark = (run.name(str(one.get("client"))), words, str(one.get("reason") or ""), where)
                rounds.setdefault(mark, []).append(event["round"])
    told = []
    for (client, words, reason, where), numbers in rounds.items():
        several = f"rounds {', '.join(map(str, numbers))}" if len(numbers) > 1 else f"round {numbers[0]}"
        told.append(f"{client}: {words} in {several}{where}" + (f": {reason}" if reason else "."))
    return failed + told


# -- pieces -----------------------------------------------------------------------------------------------------------


def duration(seconds: float) -> str:
    """Seconds for people."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    parts = [(hours, "h"), (minutes, "min"), (rest if not hours else 0, "s")]
    return " ".join(f"{number} {unit}" for number, unit in parts if number) or "0 s"


def _lines(run: Run, events: Sequence[dict[str, Any]], value: Any) -> list[Line]:
    """One line for each model that has a number."""
    points: dict[str, list[tuple[float, float | None]]] = {}
    for event in events:
        points.setdefault(event.get("model", "federated"), []).append((event["round"], value(event)))
    order = sorted(points, key=run.tone)
    known = [model for model in order if any(y is not None for _, y in points[model])]
    return [Line(run.label(model), points[model], run.tone(model)) for model in known]


def _ends(lines: Sequence[Line], metric: str) -> str:
    """What a line chart shows, in words."""
    told = []
    for line in lines:
        values = [y for _, y in line.points if y is not None]
        if values:
            told.append(f"{line.name}: from {value_text(metric, values[0])} to {value_text(metric, values[-1])}")
    return "; ".join(told) + "."


def _only(lines: Sequence[Line], metric: str) -> str:
    """The last value of each line, in words."""
    return "; ".join(f"{line.name}: {value_text(metric, line.points[-1][1])}" for line in lines) + "."


def _axis(metric: str) -> Any:
    """How values stand at an axis: short."""
    return (lambda value: f"{100 * value:g} %") if metric in RATES else "{:g}".format


def _thin(items: list[Any], most: int = POINTS) -> list[Any]:
    """At most so many of a list, evenly taken, both ends kept."""
    if len(items) <= most:
        return items
    return [items[round(place * (len(items) - 1) / (most - 1))] for place in range(most)]


def _table(
    heads: Sequence[str], sums: int, rows: Sequence[tuple[str, str, Sequence[str]]], crowded: bool = False
) -> str:
    """Rows of (class, label, cells) under heads; the last `sums` columns are set apart. Cells and labels are HTML.

    The page shows rows as columns where the screen is narrow, and everywhere where it is `crowded`.
    """
    kinds = ["" if place < len(heads) - sums else ' class="sum"' for place in range(len(heads))]
    top = "".join(
        f'<th scope="col" role="columnheader"{kind}>{escape(head)}</th>'
        for head, kind in zip(heads, kinds, strict=True)
    )
    body = []
    for name, label, cells in rows:
        shown = "".join(f'<td role="cell"{kind}>{cell}</td>' for cell, kind in zip(cells, kinds, strict=True))
        body.append(f'<tr role="row" class="{name}"><th scope="row" role="rowheader">{label}</th>{shown}</tr>')
    kind = "turn crowded" if crowded else "turn"
    return (
        f'<div class="scroll"><table class="{kind}" role="table" style="--cells:{len(heads) + 1}">'
        f'<thead role="rowgroup"><tr role="row"><th scope="col" role="columnheader">Model</th>{top}</tr></thead>'
        f'<tbody role="rowgroup">{"".join(body)}</tbody></table></div>'
    )


def _cell(metric: str, value: float | None, unit: bool = True) -> str:
    text = "–" if value is None else value_text(metric, value)
    return escape(text if unit else text.removesuffix(" %"))


def _change(run: Run, now: float | None, then: float | None) -> str:
    """A difference with an arrow that says better or worse."""
    if now is None or then is None:
        return "–"
    text = _signed(str(run.metric), now - then)
    if text[0] not in "+−":
        return text
    better = (now > then) == run.higher
    return f'<span class="{"up" if better else "down"}">{text}</span>'


def _signed(metric: str, value: float) -> str:
    """A difference with its sign; none where it rounds to 0."""
    text = f"{100 * value:+.1f}" if metric in RATES else f"{value:+.3f}"
    return text.replace("-", "−") if any(digit in text for digit in "123456789") else text[1:]


def _name(metric: str) -> str:
    return NAMES.get(metric, metric.replace("_", " "))


def _first(text: str, upper: bool = True) -> str:
    """A text that begins with a capital letter, or with a small one."""
    return (text[:1].upper() if upper else text[:1].lower()) + text[1:]


def _size(size: float | None) -> str:
    return bytes_text(size).replace(".0 ", " ")


def _count(number: int | None, noun: str) -> str:
    return "" if number is None else f"{number:,} {noun}{'' if number == 1 else 's'}"


def _section(title: str, body: str) -> str:
    return f"<section>\n<h2>{escape(title)}</h2>\n{body}\n</section>"


def _figure(chart: str, note: str, title: str = "") -> str:
    if not chart:
        return ""
    head = f"<h3>{escape(title)}</h3>" if title else ""
    return f"<figure>{head}{chart}{f'<figcaption>{escape(note)}</figcaption>' if note else ''}</figure>"


def _facts(facts: Sequence[tuple[str, str]], more: str = "") -> str:
    listed = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in facts)
    return f"<dl>{listed}{more}</dl>" if listed or more else ""


def _empty(text: str) -> str:
    return f'<p class="empty">{escape(text)}</p>'


def _text(file: Path) -> str | None:
    """A text file; None where there is none. Bytes that are no text are replaced by a mark."""
    return file.read_text(encoding="utf-8", errors="replace") if file.is_file() else None


def _json(file: Path) -> dict[str, Any] | None:
    text = _text(file)
    try:
        found = None if text is None else _parsed(text)
    except ValueError as fault:
        raise RunError(
            f"{file} is damaged: {fault}.", "It holds one JSON object.", action="Restore it, or run again."
        ) from None
    return found


def _parsed(text: str) -> dict[str, Any]:
    """A JSON object; refuses NaN and infinity, which JSON does not have."""

    def refuse(name: str) -> float:
        raise ValueError(f"{name} is no JSON number")

    found = json.loads(text, parse_constant=refuse)
    if not isinstance(found, dict):
        raise ValueError("it is not an object")
    return found
