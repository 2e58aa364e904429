"""Capture - runs the commands that the docs quote and keeps what they printed: python -m docs.capture NAME ...

Each capture runs in a temporary folder and writes docs/output/NAME.md (and NAME.json where a program reads it), with
the command and the versions it was made with; then the marked places of the pages are filled. Without a name it lists
what there is. `--folder DIR NAME` works in DIR and keeps it: a recipe's run that is finished there is read, one that
was interrupted goes on.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from docs.markers import OUTPUT, ROOT, refresh

SEVEN = "fedavg,fedprox,scaffold,fedavgm,fedadagrad,fedyogi,fedadam"
WIDTH = "130"
"""Columns of a captured terminal."""
VERSIONS = ("fedllm", "torch", "transformers")
_CONTROL = re.compile(
    r"\x1b\[[0-9;?]*[ -/]*[@-~]|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)|\x1b[@-Z\\-_]|[\x00-\x08\x0b-\x1f\x7f]"
)


@dataclass(frozen=True)
class Capture:
    """One thing to capture.

    Attributes:
        title: for the page of results.
        commands: what a reader would type, in this order.
        write: makes the files, by name, from a folder to work in.
        methods: keys whose numbers are in it.
    """

    title: str
    commands: tuple[str, ...]
    write: Callable[[Capture, Path], dict[str, str]]
    methods: tuple[str, ...] = ()


# --- running -----------------------------------------------------------------------------------------------------


def ran(
    command: str, folder: Path, extra: Sequence[str] = (), allowed: Sequence[int] = (0,), merged: bool = True
) -> str:
    """What a `fedllm` command prints, without control codes; `extra` arguments say where to work and are not quoted.

    Raises:
        SystemExit: the command failed; nothing is written then.
    """
    program, *given = shlex.split(command)
    tool = Path(sys.executable).with_name(program)
    environment = {
        **os.environ,
        "COLUMNS": WIDTH,
        "NO_COLOR": "1",
        "HF_HUB_OFFLINE": "1",
        "TERM": "dumb",
        "PYTHONUTF8": "1",
    }
    found = subprocess.run(
        [str(tool), *given, *extra],
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT if merged else subprocess.PIPE,
        text=True,
        encoding="utf-8",
    )
    if found.returncode not in allowed:
        raise SystemExit(f"{command} left with {found.returncode}:\n{found.stdout}\n{found.stderr or ''}")
    return clean(found.stdout)


def clean(text: str) -> str:
    """A terminal's output as plain lines: no control codes, of an overwritten line only what was left standing."""
    lines = (line.rstrip("\r").rsplit("\r", 1)[-1] for line in text.split("\n"))
    return "\n".join(_CONTROL.sub("", line).rstrip() for line in lines).strip("\n")


def made_by(commands: Sequence[str], name: str, device: str = "", again: bool = True) -> str:
    """The line that says how an output was made; `again` names the capture that repeats it."""
    typed = " and ".join(f"`{command}`" for command in commands)
    versions = ", ".join(f"{one} {version(one)}" for one in VERSIONS)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    machine = f"{platform.system()} {platform.machine()}, {cores} CPU cores" + (f", {device}" if device else "")
    made = f"Made by {typed} with {versions}, Python {platform.python_version()}; {machine}."
    return f"*{made} To make it again: `python -m docs.capture {name}`.*" if again else f"*{made}*"


def device_of(run: Path) -> str:
    """The device a run used, where it was not the CPU."""
    found = json.loads((run / "environment.json").read_text(encoding="utf-8"))["device"]
    return "" if found == "cpu" else str(found)


# --- writing -----------------------------------------------------------------------------------------------------


def terminal(command: str, printed: str) -> str:
    """A command and what it printed."""
    return f"```text\n$ {command}\n{printed}\n```"


def page(*parts: str) -> str:
    """Parts with a blank line between them."""
    return "\n\n".join(part.strip("\n") for part in parts if part) + "\n"


def markdown(table: Any) -> str:
    """A rich table as Markdown."""
    columns = [[str(column.header), *map(str, column.cells)] for column in table.columns]
    head, *rows = zip(*columns, strict=True)
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows])


def by_client(result: Mapping[str, Any]) -> str:
    """The headline metric of every client and model, as Markdown."""
    from fedllm.report.words import value_text

    metric, rows = result["metric"], result["rows"]
    lines = [["client", *(row["label"] for row in rows)], ["---"] * (len(rows) + 1)]
    for client, name in result["clients"].items():
        lines.append([name, *(value_text(metric, row["clients"].get(client, {}).get(metric)) for row in rows)])
    lines.append(["all rows", *(value_text(metric, row["pooled"].get(metric)) for row in rows)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def quickstart(capture: Capture, folder: Path) -> dict[str, str]:
    """The main job as a terminal shows it, and a chat with what it made."""
    first, second = capture.commands
    shown = terminal(first, ran(first, folder))
    asked = terminal(second, ran(second, folder))
    device = device_of(folder / "runs" / "quickstart")
    return {
        "quickstart.md": page(shown, made_by([first], "quickstart", device)),
        "chat.md": page(asked, made_by(capture.commands, "quickstart", device)),
    }


def printed(capture: Capture, folder: Path) -> dict[str, str]:
    """One command as a terminal shows it."""
    name = name_of(capture)
    (command,) = capture.commands
    return {f"{name}.md": page(terminal(command, ran(command, folder)), made_by(capture.commands, name))}


def random_start(capture: Capture, folder: Path) -> dict[str, str]:
    """The quickstart from the pretrained model and from random weights, side by side."""
    from fedllm.report.words import NAMES, value_text

    found = [json.loads(ran(command, folder, ["--json", "--quiet"], merged=False)) for command in capture.commands]
    metric = found[0]["metric"]
    metrics = [metric, "loss"]
    starts = ("pretrained", "random")
    head = ["model", *(f"{NAMES.get(name, name)}, {start}" for name in metrics for start in starts)]
    lines = [head, ["---"] * len(head)]
    for pair in zip(*(one["rows"] for one in found), strict=True):
        cells = [value_text(name, row["pooled"].get(name)) for name in metrics for row in pair]
        lines.append([pair[0]["label"], *cells])
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return {
        "random-start.md": page(
            table, made_by(capture.commands, "random-start", device_of(Path(folder, found[0]["folder"])))
        )
    }


def finished(command: str, folder: Path) -> tuple[Path, dict[str, Any]]:
    """The folder and the result of a recipe's run in `folder`, made now where it is not there."""
    run = folder / "run"
    if not (run / "result.json").exists():
        begun = (run / "recipe.yaml").exists()
        ran(
            f"fedllm resume {run}" if begun else command,
            ROOT,
            ["--quiet"] if begun else ["--folder", str(run), "--quiet"],
        )
    return run, json.loads((run / "result.json").read_text(encoding="utf-8"))


def recipe_run(capture: Capture, folder: Path) -> dict[str, str]:
    """A recipe of benchmarks/recipes: its result table, what it means, and every client where they are few."""
    from fedllm.report.table import result_table

    name, (command,) = name_of(capture), capture.commands
    run, result = finished(command, folder)
    few = by_client(result) if len(result["clients"]) <= 12 else ""
    shown = result_table(result)
    caption = f"{shown.caption}." if shown.caption else ""
    return {
        f"{name}.md": page(
            markdown(shown),
            caption,
            " ".join(result["sentences"]),
            few,
            made_by(capture.commands, name, device_of(run)),
        )
    }


def comparison(capture: Capture, folder: Path) -> dict[str, str]:
    """A comparison: the table that fedllm itself writes."""
    name, (command,) = name_of(capture), capture.commands
    run = folder / "compare"
    if not (run / "compare.md").exists():
        ran(command, ROOT, ["--folder", str(run), "--quiet"])
    table = json.loads((run / "compare.json").read_text(encoding="utf-8"))
    caption = f"{table['rounds']} rounds, seeds {', '.join(map(str, table['seeds']))}; mean ± standard deviation."
    text = (run / "compare.md").read_text(encoding="utf-8")
    return {f"{name}.md": page(text, caption, made_by(capture.commands, name, device_of(run)))}


def pretraining(capture: Capture, folder: Path) -> dict[str, str]:
    """Training from nothing: perplexity of each model, and the bytes against data-parallel training."""
    from fedllm.recipe import load_recipe
    from fedllm.report.table import result_table
    from fedllm.report.words import bytes_text

    *before, command = capture.commands
    for one in before:
        place = Path(shlex.split(one)[-1])
        if not (ROOT / place).exists() and not (folder / "run" / "result.json").exists():
            subprocess.run([sys.executable, *shlex.split(one)[1:]], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    run, result = finished(command, folder)
    train = load_recipe(run / "recipe.yaml").train
    steps, clients, sent = train["steps"], len(result["clients"]), result["bytes"]
    weights = (run / "adapter" / "adapter_model.safetensors").stat().st_size
    parallel = result["rounds"] * steps * clients * weights
    shown = result_table(result)
    told = (
        f"Federated: {bytes_text(sent['up'])} up and {bytes_text(sent['down'])} down over "
        f"{result['rounds']} rounds of {steps} steps. "
        f"Data-parallel training over the same {clients} holders would send the gradient of every step, "
        f"{bytes_text(parallel)} up: {parallel / sent['up']:.1f} times as much. Training on pooled text takes the same "
        f"number of tokens in {clients} times as many steps."
    )
    return {
        f"{name_of(capture)}.md": page(
            markdown(shown), told, made_by(capture.commands, name_of(capture), device_of(run))
        )
    }


def frontier(capture: Capture, folder: Path) -> dict[str, str]:
    """Profit: the table, and the picture of global against personal score."""
    name, (command,) = name_of(capture), capture.commands
    run = folder / "profit"
    if not (run / "profit.svg").exists():
        ran(command, ROOT, ["--folder", str(run), "--quiet"])
    table = (run / "profit.md").read_text(encoding="utf-8")
    picture = f"![Global against personal score along the local steps](output/{name}.svg)"
    return {
        f"{name}.md": page(table, picture, made_by(capture.commands, name, device_of(run))),
        f"{name}.svg": (run / "profit.svg").read_text(encoding="utf-8"),
    }


def besieged(capture: Capture, folder: Path) -> dict[str, str]:
    """A grid of attacks and defences: the table, and its heat maps."""
    name, (command,) = name_of(capture), capture.commands
    run = folder / "attack"
    if not (run / "attack.md").exists():
        ran(command, ROOT, ["--folder", str(run), "--quiet"])
    drawn = sorted(run.glob("*.svg"))
    shown = [f"![{one.stem}: attacks down, defences across](output/{name}-{one.name})" for one in drawn]
    table = (run / "attack.md").read_text(encoding="utf-8")
    return {
        f"{name}.md": page(table, *shown, made_by(capture.commands, name, device_of(run))),
        **{f"{name}-{one.name}": one.read_text(encoding="utf-8") for one in drawn},
    }


def program(capture: Capture, folder: Path) -> dict[str, str]:
    """What a program of benchmarks prints: a table."""
    (command,) = capture.commands
    found = subprocess.run(
        [sys.executable, *shlex.split(command)[1:]], cwd=ROOT, check=True, capture_output=True, text=True
    )
    return {f"{name_of(capture)}.md": page(found.stdout, made_by(capture.commands, name_of(capture)))}


def verified(capture: Capture, folder: Path) -> dict[str, str]:
    """Every effect check: the JSON for the pages of the methods, and a table."""
    (command,) = capture.commands
    text = ran(command, folder, allowed=(0, 1), merged=False)
    found = json.loads(text)
    lines = [["method", "verdict", "claim", "measured", "seconds"], ["---"] * 5]
    for one in found:
        cells = [one["key"], VERDICTS[one["passed"]], one["claim"], one["measured"], f"{one['seconds']:.1f}"]
        lines.append([cell.replace("|", "\\|") for cell in cells])
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return {"verify.json": text + "\n", "verify.md": page(table, made_by(capture.commands, "verify"))}


VERDICTS = {True: "shown", False: "**not shown**", None: "measured, not asserted"}
"""What `passed` of an effect check means."""

AG_NEWS = (
    "fedllm compare benchmarks/recipes/ag-news.yaml data.partition.alpha={} --methods base," + SEVEN + " --seeds 3"
)
RANKS = "ffa-lora,hetlora,flexlora,slora,fedit,central"
TRIO = ("fedit", "local", "central")
CAPTURES: dict[str, Capture] = {
    "quickstart": Capture(
        "The quickstart", ("fedllm run quickstart", "fedllm chat runs/quickstart --examples 3"), quickstart, TRIO
    ),
    "random-start": Capture(
        "Pretrained against random start",
        ("fedllm run quickstart", "fedllm run quickstart model.random=true"),
        random_start,
        TRIO,
    ),
    "compare": Capture(
        "A small comparison",
        ("fedllm compare quickstart rounds=4 --methods base,local,fedavg,fedprox --seeds 2",),
        printed,
        ("local", "fedavg", "fedprox"),
    ),
    "verify": Capture("Effect checks", ("fedllm verify --all --json",), verified),
    "t0": Capture("168 instruction tasks", ("fedllm run benchmarks/recipes/t0.yaml",), recipe_run, TRIO),
    "ag-news-0.5": Capture(
        "AG News, Dirichlet 0.5", (AG_NEWS.format("0.5"),), comparison, tuple(SEVEN.split(","))
    ),
    "ag-news-0.1": Capture(
        "AG News, Dirichlet 0.1",
        (AG_NEWS.format("0.1 data.partition.min_size=2"),),
        comparison,
        tuple(SEVEN.split(",")),
    ),
    "masakhaner": Capture(
        "Named entities in eight languages",
        ("fedllm run benchmarks/recipes/masakhaner.yaml",),
        recipe_run,
        ("fedavg", "local", "central"),
    ),
    "t0-ranks": Capture(
        "Mixed ranks on instruction tasks",
        (f"fedllm compare benchmarks/recipes/t0-ranks.yaml --methods {RANKS} --seeds 3",),
        comparison,
        tuple(RANKS.split(",")),
    ),
    "photon-shakespeare": Capture(
        "From nothing, over eight speaking roles",
        (
            "python -m benchmarks.shakespeare ../shared/data/tinyshakespeare.txt shakespeare.jsonl",
            "fedllm run benchmarks/recipes/photon-shakespeare.yaml",
        ),
        pretraining,
        ("photon",),
    ),
    "photon-t0": Capture(
        "From nothing, over eight holders of task text",
        ("fedllm run benchmarks/recipes/photon-t0.yaml",),
        pretraining,
        ("photon",),
    ),
    "profit-ag-news": Capture(
        "Personalisation against robustness",
        ("fedllm profit benchmarks/recipes/profit-ag-news.yaml --lr 0.01,0.1,1 --steps 0,2,4,8,16",),
        frontier,
        ("profit",),
    ),
    "attack-ag-news": Capture(
        "Attacks and defences",
        (
            "fedllm attack benchmarks/recipes/attack-ag-news.yaml --attacks sign-flip,alie,backdoor "
            "--defences median,multi-krum,norm-clip",
        ),
        besieged,
        ("fedavg",),
    ),
    "read-enron": Capture(
        "What a server reads of an upload",
        (
            "fedllm attack benchmarks/recipes/read-enron.yaml --attacks film,film-2,attribute-reconstruction "
            "--defences freeze-embeddings,prune,local-noise,secure,encrypted-10,encrypted-50",
        ),
        besieged,
        ("fedavg",),
    ),
    "decepticons": Capture(
        "A server that reshapes the weights", ("python -m benchmarks.decepticons",), program, ("fedavg",)
    ),
    "private-ag-news": Capture(
        "LoRA under differential privacy", ("python -m benchmarks.private",), program, ("ffa-lora", "fedavg")
    ),
    "zeroth-memory": Capture(
        "Memory without back-propagation", ("python -m benchmarks.zeroth_memory",), program, ("fedkseed",)
    ),
}  # fmt: skip


def name_of(capture: Capture) -> str:
    """The name a capture has."""
    return next(name for name, one in CAPTURES.items() if one is capture)


def capture(name: str, output: Path = OUTPUT, folder: Path | None = None) -> list[Path]:
    """Run one capture, in `folder` or a temporary one, and write its files; returns them."""
    chosen = CAPTURES[name]
    working = tempfile.TemporaryDirectory(prefix="fedllm-docs-") if folder is None else nullcontext(str(folder))
    with working as place:
        files = chosen.write(chosen, Path(place))
        written = []
        for file, text in files.items():
            if place in text:
                raise SystemExit(f"{file} would name the temporary folder; nothing was written.")
            output.mkdir(parents=True, exist_ok=True)
            (output / file).write_text(text, encoding="utf-8")
            written.append(output / file)
    return written


def main(given: Sequence[str]) -> None:
    """Run the captures named, then fill the pages."""
    folder = None
    if len(given) == 3 and given[0] == "--folder":
        folder, given = Path(given[1]).resolve(), given[2:]
    unknown = [name for name in given if name not in CAPTURES]
    if unknown or not given:
        first = f"There is no capture '{unknown[0]}'.\n" if unknown else ""
        listed = "\n".join(f"  {name:14} {'; '.join(one.commands)}" for name, one in CAPTURES.items())
        raise SystemExit(f"{first}Usage: python -m docs.capture [--folder DIR] NAME ...\n{listed}")
    for name in given:
        for file in capture(name, folder=folder):
            sys.stdout.write(f"Wrote {file.relative_to(ROOT)}\n")
    for changed in refresh():
        sys.stdout.write(f"Filled {changed.relative_to(ROOT)}\n")


if __name__ == "__main__":
    main(sys.argv[1:])
