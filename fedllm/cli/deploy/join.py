"""Join - `fedllm join`: a site looks at everything, says what it allows, and takes part."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedllm.cli import screen
from fedllm.cli.deploy.given import KitArgument, Unit
from fedllm.cli.deploy.process import foreground, write_unit
from fedllm.cli.running import Json

if TYPE_CHECKING:
    from fedllm.deploy.checkup import Check
    from fedllm.deploy.kit import Kit


def join(
    kit: KitArgument,
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Options of data, such as data.limit=100.")
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="This site's rows; what was given before, where left out.", show_default=False)
    ] = None,
    client: Annotated[
        str | None, typer.Option(help="The client that all rows are; the site's name by default.", show_default=False)
    ] = None,
    by: Annotated[
        str | None, typer.Option(help="The column whose values are the clients, if several.", show_default=False)
    ] = None,
    policy: Annotated[
        Path | None, typer.Option(help="What this site allows; copied into the kit.", show_default=False)
    ] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda, cuda:1, mps.", show_default=False)] = None,
    model: Annotated[
        list[str] | None,
        typer.Option(help="A model that runs may ask for, NAME or NAME=FOLDER; any of the hub otherwise."),
    ] = None,
    check: Annotated[bool, typer.Option("--check", help="Look at everything; write nothing, start nothing.")] = False,
    unit: Unit = None,
    as_json: Json = False,
) -> None:
    """Take part with this site's data: look at everything, say what is allowed, and run in the foreground."""
    with screen.loading("Looking"):
        from fedllm.deploy import checkup, starter
        from fedllm.deploy.kit import POLICY, Kit
        from fedllm.engine import durable

        place = Kit.of(kit, "site")
        facts = _site_facts(place, overrides or [], data, client, by, device, model)
        own = place.folder / POLICY
        rules = policy if policy is not None else own if own.is_file() else None
        found = list(checkup.look(place, facts, rules))
    good = not any(one.verdict == "problem" for one in found)
    allowed = _sentences(rules) if rules is not None else []
    written = None
    if rules is None and not check:
        durable.write(own, starter.policy(place.name).encode())
        written = str(own)
    if as_json:
        checks = [asdict(one) for one in found]
        screen.emit({"site": place.name, "checks": checks, "policy": allowed, "good": good, "policy_written": written})
    else:
        _show(found)
        _show_policy(place, allowed, written)
    if not good:
        raise typer.Exit(1)
    if check:
        return
    if policy is not None and policy.resolve() != own:
        durable.update(own, _read(policy))
    place.settle(facts)
    if unit is not None:
        write_unit(place, ["join", str(place.folder)], unit)
        return
    foreground(place)


def _read(file: Path) -> bytes:
    """A file that the person named; raises :class:`ConfigError` where it cannot be read."""
    from fedllm.core.errors import ConfigError

    try:
        return file.read_bytes()
    except OSError as fault:
        raise ConfigError(f"{file} cannot be read: {fault.strerror}.", action="Name the policy's file.") from None


def _site_facts(
    kit: Kit,
    overrides: list[str],
    data: str | None,
    client: str | None,
    by: str | None,
    device: str | None,
    model: list[str] | None,
) -> dict[str, Any]:
    """The content of the site's own file: what was given, over what it says already."""
    from fedllm.cli.data import recipe_for
    from fedllm.core.errors import ConfigError
    from fedllm.core.settings import read
    from fedllm.deploy.kit import POLICY
    from fedllm.engine.nvflare.facts import NAME, SiteFacts
    from fedllm.recipe import load_recipe

    facts: dict[str, Any] = {**kit.facts(), "policy": POLICY}
    if by is not None and client is not None:
        raise ConfigError(
            "--by and --client are both given.", "--by makes several clients, --client names the only one."
        )
    if data is not None:
        split = ["partition.by=natural", f"partition.column={by}"] if by is not None else []
        source, given = recipe_for(_absolute(data), [*split, *overrides])
        if not isinstance(source, dict):
            raise ConfigError(
                f"--data {data} is no data file.",
                "Endings: .jsonl, .json, .csv, .tsv, .parquet, .gz; or a folder, or *.",
            )
        recipe = load_recipe(source, given)
        facts["data"] = recipe.data.model_dump(mode="json", exclude_unset=True)
        facts["client"] = (client or kit.name) if _alone(facts["data"]) else None
    elif overrides or by is not None:
        raise ConfigError("Options of data are given, and no --data.", action="Name the file with --data.")
    elif not facts.get("data"):
        raise ConfigError("It is not said where this site's rows are.", action="Name the file with --data.")
    elif client is not None:
        facts["client"] = client
    if device is not None:
        facts["device"] = device
    if model:
        pairs = [text.partition("=") for text in model]
        facts["models"] = {name: _model_place(place) if eq else name for name, eq, place in pairs}
    read(SiteFacts, facts, NAME)
    return {key: value for key, value in facts.items() if value is not None}


def _alone(data: Mapping[str, Any]) -> bool:
    partition = data.get("partition", {})
    return partition.get("by") == "iid" and partition.get("clients") == 1


def _absolute(data: str) -> str:
    """A path that does not depend on where a process is started."""
    return data if "://" in data else str(Path(data).expanduser().absolute())


def _model_place(text: str) -> str:
    return str(Path(text).expanduser().absolute()) if text.startswith((".", "~", "/")) or Path(text).exists() else text


def _sentences(file: Path) -> list[str]:
    from fedllm.core.errors import FedLLMError
    from fedllm.sites.policy import Policy

    try:
        return Policy.of(file).sentences()
    except FedLLMError:
        return []  # it stands among the checks


def _show(found: list[Check]) -> None:
    from fedllm.cli import doctor

    doctor.show([doctor.Finding(one.name, one.verdict, one.text, one.action) for one in found])


def _show_policy(kit: Kit, allowed: list[str], written: str | None) -> None:
    screen.say()
    if allowed:
        screen.say(f"What {kit.name} allows:", "bold")
        for sentence in allowed:
            screen.tell(f"  {sentence}")
        screen.say()
    if written is not None:
        screen.tell("Without a policy nothing is allowed, and this site was not started.", "bold")
        screen.say(f"To begin with: {written}")
        screen.say("Change it to what you agree with, and give the same command again.")
