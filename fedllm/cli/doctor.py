"""Doctor - what a run needs and what this machine has, told before the run: memory, bytes, time, files, libraries.

Bytes are those of a real trial round, measured; time is that of three short rounds times what the recipe asks for.
"""

from __future__ import annotations

import math
import os
import platform
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedllm.cli import complete, screen
from fedllm.cli.plugins import load_plugins
from fedllm.cli.running import Json, Overrides

if TYPE_CHECKING:
    from fedllm.data.federation import Federation
    from fedllm.engine.nvflare.forecast import Line
    from fedllm.recipe import Recipe
    from fedllm.run import Ground

MARKS = {"ok": ("✔", "ok"), "note": ("•", "--"), "problem": ("✘", "!!")}
STYLES = {"ok": "green", "note": "yellow", "problem": "bold red"}
DEVELOPER = ("test", "dev")
"""Extras a user does not miss."""
SLOW = 20.0
"""Seconds of a first trial step beyond which no second one is made."""
TIGHT = 0.9
"""Share of the free memory beyond which a run is likely to fail: the estimate is good to a factor of two."""
LOOK = 8
"""Clients whose rows are looked at to judge the length of a text."""


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's.

    Attributes:
        name: what was looked at.
        verdict: ok, note (good to know) or problem (a run would fail).
        text: what was found.
        action: what to do about it.
    """

    name: str
    verdict: str
    text: str
    action: str = ""


@dataclass(frozen=True)
class Trial:
    """What three short rounds showed.

    Attributes:
        clients: clients of a pass.
        fixed: seconds of a pass besides its steps.
        step: seconds of one step of a pass.
        measure: seconds to measure one client.
        up, down: bytes of one client in one round.
        failed: why the trial round failed; None where it did not.
        trouble: what happened to single clients.
    """

    clients: int
    fixed: float
    step: float
    measure: float
    up: int
    down: int
    failed: str | None = None
    trouble: tuple[str, ...] = ()


def add_to(app: typer.Typer) -> None:
    """Add the command."""
    app.command("doctor", rich_help_panel="Look around")(doctor)


def doctor(
    recipe: Annotated[
        str | None,
        typer.Argument(
            metavar="RECIPE", help="A recipe to judge.", autocompletion=complete.recipes, show_default=False
        ),
    ] = None,
    overrides: Overrides = None,
    trial: Annotated[bool, typer.Option(help="Load the model and play three short rounds.")] = True,
    line: Annotated[
        str | None,
        typer.Option(
            metavar="RATE,DELAY",
            help="Judge rounds across sites, too, with such a line each: 20mbit,50ms.",
            show_default=False,
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """What is missing, and what a recipe will need: memory, bytes, time. Leaves with 1 where a run would fail."""
    from fedllm.core.errors import ConfigError
    from fedllm.engine.nvflare.forecast import Line

    between = None if line is None else Line.of(line)
    if between is not None and (recipe is None or not trial):
        raise ConfigError(
            "--line is given without a recipe to try.",
            "The bytes of a round are those of a trial.",
            action="Name a recipe, and leave out --no-trial.",
        )
    with screen.loading("Looking"):
        found = list(machine())
    if recipe is not None:
        with screen.loading("Trying the recipe"):
            from fedllm.recipe import load_recipe

            load_plugins()
            settled = load_recipe(recipe, list(overrides or []))
            found += judge(settled, trial, between)
    if as_json:
        screen.emit({"findings": [asdict(one) for one in found]})
    else:
        show(found)
    if any(one.verdict == "problem" for one in found):
        raise typer.Exit(1)


def show(found: list[Finding]) -> None:
    """Print findings."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True, style="bold")
    table.add_column(overflow="fold")
    for one in found:
        mark = MARKS[one.verdict][0 if screen.can_show(MARKS[one.verdict][0]) else 1]
        text = Text(one.text)
        if one.action:
            text.append(f"\n{one.action}", "cyan")
        table.add_row(Text(mark, STYLES[one.verdict]), one.name, text)
    screen.show(table)


# --- the machine -------------------------------------------------------------------------------------------------


def machine() -> Iterator[Finding]:
    """What is installed and what this machine has."""
    from importlib.metadata import version

    from fedllm.report.words import bytes_text

    yield Finding("fedllm", "ok", f"{version('fedllm')}, Python {platform.python_version()}, {platform.platform()}")
    yield _libraries()
    yield from _extras()
    yield _devices()
    import psutil

    memory, disk = psutil.virtual_memory(), shutil.disk_usage(".")
    verdict = "ok" if memory.available > 1e9 else "note"
    yield Finding("memory", verdict, f"{bytes_text(memory.available)} free of {bytes_text(memory.total)}")
    verdict = "ok" if disk.free > 1e9 else "note"
    yield Finding("disk", verdict, f"{bytes_text(disk.free)} free in {Path.cwd()}")
    yield _bundled()


def _libraries() -> Finding:
    """Whether the versions installed are those that fedllm accepts."""
    from importlib.metadata import requires

    from packaging.requirements import Requirement

    texts, wrong = [], []
    for line in requires("fedllm") or []:
        wanted = Requirement(line)
        if wanted.marker is not None and not wanted.marker.evaluate({"extra": ""}):
            continue
        there = _version(wanted.name)
        if there is None or not wanted.specifier.contains(there, prereleases=True):
            wrong.append(f"{wanted.name}{wanted.specifier} is needed, {there or 'nothing'} is installed")
        elif wanted.name in ("torch", "transformers", "datasets"):
            texts.append(f"{wanted.name} {there}")
    if wrong:
        return Finding("libraries", "problem", "; ".join(wrong), "Install again with: pip install -U fedllm")
    return Finding("libraries", "ok", ", ".join(texts))


def _extras() -> Iterator[Finding]:
    from importlib.metadata import metadata, requires

    from packaging.requirements import Requirement

    lines = [Requirement(line) for line in requires("fedllm") or []]
    missing = []
    for extra in metadata("fedllm").get_all("Provides-Extra") or []:
        mine = [one for one in lines if one.marker is not None and _belongs(one, extra)]
        if extra not in DEVELOPER and any(_version(one.name) is None for one in mine):
            missing.append(extra)
    if missing:
        text = f"not installed: {', '.join(missing)}"
        yield Finding("extras", "note", text, f"Where needed: pip install 'fedllm[{missing[0]}]'")


def _belongs(wanted: Any, extra: str) -> bool:
    return wanted.marker.evaluate({"extra": extra}) and not wanted.marker.evaluate({"extra": ""})


def _devices() -> Finding:
    import torch

    from fedllm.report.words import bytes_text

    if torch.cuda.is_available():
        cards = [torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count())]
        return Finding("device", "ok", ", ".join(f"{card.name} ({bytes_text(card.total_memory)})" for card in cards))
    if torch.backends.mps.is_available():
        return Finding("device", "ok", "mps")
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return Finding("device", "ok", f"cpu, {usable} cores, {torch.get_num_threads()} threads; no GPU")


def _bundled() -> Finding:
    """Whether the files that come with the package are there."""
    wanted = [complete.PACKAGE / "models" / "fedllm_tiny" / name for name in ("config.json", "model.safetensors")]
    missing = [str(file) for file in wanted if not file.is_file()]
    if not complete.bundled_recipes():
        missing.append(str(complete.PACKAGE / "recipes" / "*.yaml"))
    if missing:
        return Finding("files", "problem", f"missing: {', '.join(missing)}", "Install fedllm again.")
    return Finding("files", "ok", f"the model fedllm-tiny, {len(complete.bundled_recipes())} recipes")


def _version(name: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(name)
    except PackageNotFoundError:
        return None


# --- the recipe --------------------------------------------------------------------------------------------------


def judge(recipe: Recipe, trial: bool, line: Line | None = None) -> Iterator[Finding]:
    """What a recipe needs (across sites, too, with such a line each); what would be refused is a problem, and what
    follows from it is left out."""
    from fedllm.core.errors import FedLLMError
    from fedllm.data.federation import Federation
    from fedllm.report.words import count
    from fedllm.run import method_of

    stage = "recipe"
    try:
        method = method_of(recipe)
        rounds = count(recipe.rounds, "round")
        yield Finding("recipe", "ok", f"{recipe.name}: {method.key}, {rounds}, seed {recipe.seed}")
        stage = "data"
        federation = Federation.build(recipe.data, recipe.seed)
        yield from _data(recipe, federation)
        stage = "model"
        there = _model(recipe)
        yield there
        if trial and there.verdict == "ok":
            yield from _needs(recipe, line)
    except FedLLMError as fault:
        near = f" Did you mean '{fault.nearest}'?" if fault.nearest else ""
        yield Finding(stage, "problem", f"{fault.given} {fault.allowed}{near}".strip(), fault.action)


def _data(recipe: Recipe, federation: Federation) -> Iterator[Finding]:
    clients = federation.client_ids
    train, held = (sum(federation.size(client, split) for client in clients) for split in ("train", "eval"))
    cohort = recipe.cohort_size(len(clients))
    text = f"{len(clients)} clients, {cohort} per round; {train} training rows, {held} held out"
    yield Finding(
        "data", "ok" if held else "note", text, "" if held else "Nothing can be measured without held-out rows."
    )
    for warning in federation.warnings:
        yield Finding("data", "note", warning)


def _model(recipe: Recipe) -> Finding:
    """Whether the weights are on this machine and fit; nothing is downloaded."""
    from fedllm.models import load
    from fedllm.models.footprint import check_fits

    place = load.locate(recipe.model)
    if not place.local and not _cached(recipe):
        text = f"{recipe.model.name} is not on this machine; it would be downloaded."
        return Finding("model", "note", text, "Memory, bytes and time are unknown until it is there.")
    check_fits(recipe.model, recipe.task.kind)
    return Finding("model", "ok", f"{recipe.model.name} for {recipe.task.kind}, {recipe.model.dtype}")


def _cached(recipe: Recipe) -> bool:
    """Whether the hub's cache holds the model's configuration and weights."""
    from huggingface_hub import try_to_load_from_cache

    def held(name: str) -> bool:
        return isinstance(try_to_load_from_cache(recipe.model.name, name, revision=recipe.model.revision), str)

    weights = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
    return held("config.json") and any(held(name) for name in weights)


def _needs(recipe: Recipe, line: Line | None) -> Iterator[Finding]:
    """Memory, bytes, time and disk."""
    import asyncio

    from fedllm.models import load
    from fedllm.models.footprint import available_bytes
    from fedllm.report.words import bytes_text, count
    from fedllm.run import method_of, prepare

    free = available_bytes(load.pick_device(recipe.model))
    ground = prepare(recipe)
    known = set(ground.federation.warnings)
    for note in ground.warnings:
        if note not in known:
            yield Finding("model", "note", note)
    yield _memory(recipe, ground, free)
    tried = asyncio.run(try_rounds(ground))
    if tried.failed:
        yield Finding("trial", "problem", f"A trial round failed: {tried.failed}.", "Run the recipe with --debug.")
        return
    for reason in tried.trouble:
        yield Finding("trial", "note", reason)
    cohort = recipe.cohort_size(len(ground.federation.client_ids))
    up, down = tried.up * cohort, tried.down * cohort
    text = f"{bytes_text(up)} up and {bytes_text(down)} down per round"
    whole = f"{bytes_text(up * recipe.rounds)} up and {bytes_text(down * recipe.rounds)} down"
    total = f"{whole} in {count(recipe.rounds, 'round')}"
    yield Finding("bytes", "ok", f"{text}; {total}")
    legs = 1 + sum(name != "base" for name in recipe.evaluation.against)
    step_count = method_of(recipe).train.step_count
    seconds = expected_seconds(recipe, ground, tried, step_count, legs)
    shared = f", {recipe.processes} processes" if recipe.processes > 1 else ""
    passes = f"{count(ground.width.clients, 'client')} in a pass{shared}: {ground.width.why}"
    yield Finding("time", "ok", f"about {_duration(seconds)} for {legs} models; {passes}")
    if line is not None:
        alone = tried if tried.clients == 1 else asyncio.run(try_rounds(ground, 1))
        yield _across(recipe, ground, tried if alone.failed else alone, step_count, line)
    yield _disk(recipe, legs, tried, len(ground.federation.client_ids))


def _memory(recipe: Recipe, ground: Ground, free: int) -> Finding:
    from fedllm.core.tensors import count
    from fedllm.engine.width import sharing
    from fedllm.models.footprint import estimate
    from fedllm.report.words import bytes_text
    from fedllm.run import method_of

    clients, learner = ground.federation.client_ids[:LOOK], ground.learner
    batch = method_of(recipe).train.batch_size
    seen = [e for c in clients for e in learner.prepare(list(ground.federation.rows(c))[:batch])]
    length = max((example.tokens for example in seen), default=recipe.task.max_length)
    labelled = max((example.targets for example in seen), default=length)
    weights = count(learner.initial())
    one = estimate(recipe.model, recipe.task.kind, weights, batch, length, ground.width.clients, labelled)
    beside = sharing(learner.device, recipe.processes)
    parts = f"model {bytes_text(one.weights_bytes)}, training {bytes_text(one.total_bytes - one.weights_bytes)}"
    each = f", in each of {beside} processes" if beside > 1 else ""
    needed = one.total_bytes * beside
    text = f"about {bytes_text(needed)} needed ({parts}{each}), {bytes_text(free)} free"
    if needed <= TIGHT * free:
        return Finding("memory needed", "ok", text)
    lower = "Lower processes, cohort_width" if beside > 1 else "Lower cohort_width"
    action = f"{lower}, train.batch_size or task.max_length, or set model.gradient_checkpointing=true."
    return Finding("memory needed", "problem" if needed > free else "note", text, action)


async def try_rounds(ground: Ground, most: int | None = None) -> Trial:
    """Play short rounds with as many clients as are at work at a time, or with `most`; nothing is written."""
    from fedllm.engine.rounds import evaluate, play_round
    from fedllm.run import Leg, Watch, method_of

    method = method_of(ground.recipe)
    recipe, clients = ground.recipe, len(ground.federation.client_ids)
    size = min(most or ground.width.clients * recipe.processes, recipe.cohort_size(clients))
    seconds: list[float] = []
    leg = Leg("trial", method, ground, None, Watch())
    for steps in (1, 1, 3):
        short = method.model_copy(update={"train": method.train.model_copy(update={"steps": steps, "epochs": None})})
        leg = Leg("trial", short, ground, None, Watch())
        _, record = await play_round(short, leg.state, leg.server, size)
        reasons = [one["reason"] for one in (*record.rejected, *record.lost)]
        if record.failed:
            return Trial(size, 0, 0, 0, 0, 0, reasons[0].rstrip(".") if reasons else record.failed)
        seconds.append(record.seconds)
        if len(seconds) == 1 and seconds[0] > SLOW:
            seconds = [seconds[0], seconds[0], 3 * seconds[0]]
            break
    up, down = record.bytes_up // max(1, record.used), record.bytes_down // max(1, len(record.cohort))
    step = max(0.0, (seconds[2] - seconds[1]) / 2)
    measured = ground.measured[:size]
    began = time.perf_counter()
    if measured:
        await evaluate(leg.method, leg.state, leg.server, measured)
    measure = (time.perf_counter() - began) / max(1, len(measured))
    return Trial(size, max(0.0, seconds[1] - step), step, measure, up, down, None, tuple(reasons))


def expected_seconds(recipe: Recipe, ground: Ground, tried: Trial, steps_of: Any, legs: int) -> float:
    """Seconds of all models of a run, from a trial."""
    steps = _steps(ground, steps_of)
    passes = math.ceil(recipe.cohort_size(len(ground.federation.client_ids)) / max(1, tried.clients))
    every = recipe.evaluation.every
    times = 1 if not every else recipe.rounds // every + (recipe.rounds % every > 0)
    measured = len(ground.measured) * tried.measure
    base = measured if "base" in recipe.evaluation.against else 0.0
    return legs * (recipe.rounds * passes * (tried.fixed + steps * tried.step) + times * measured) + base


def _across(recipe: Recipe, ground: Ground, tried: Trial, steps_of: Any, line: Line) -> Finding:
    """Time of rounds across sites, each with one client of a round and as fast as this machine is with `tried`'s.

    Where one client cannot play a round (secure sums), it is that of a pass of several, and the text says so.
    """
    from fedllm.engine.nvflare.forecast import round_seconds
    from fedllm.report.words import count

    work = tried.fixed + _steps(ground, steps_of) * tried.step
    seconds = round_seconds(line, tried.down, tried.up, work)
    text = (
        f"about {seconds:.1f} s a round, {_duration(seconds * recipe.rounds)} in {count(recipe.rounds, 'round')}, with "
        f"one client a site and a line of {line}; {work:.1f} s of a round are training"
    )
    if tried.clients > 1:
        text += f" (of {tried.clients} clients in one pass: one alone cannot play a round)"
    return Finding("across sites", "ok", text)


def _steps(ground: Ground, steps_of: Any) -> float:
    """Local steps of a client, on average."""
    ids = ground.federation.client_ids
    return sum(steps_of(ground.federation.size(client)) for client in ids) / len(ids)


def _disk(recipe: Recipe, legs: int, tried: Trial, clients: int) -> Finding:
    """Two checkpoints per model and the adapter; what clients keep for themselves with the model `local`."""
    from fedllm.report.words import bytes_text

    kept = clients * tried.down * 2 if "local" in recipe.evaluation.against else 0
    needed = (2 * legs + 1) * tried.down + kept
    place = Path(recipe.runs)
    free = shutil.disk_usage(place if place.exists() else Path.cwd()).free
    text = f"about {bytes_text(needed)} for checkpoints, {bytes_text(free)} free"
    if needed < TIGHT * free:
        return Finding("disk needed", "ok", text)
    return Finding("disk needed", "problem", text, "Make room, or set runs to a folder on another disk.")


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
