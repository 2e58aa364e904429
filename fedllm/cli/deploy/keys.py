"""Keys - `deploy request`, `sign`, `install` and `renew`: private keys that stay where they are, and new certificates.

A fingerprint is compared by a person over another channel, or given on the line; without either nothing is trusted.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedllm.cli import screen
from fedllm.cli.deploy.given import NET, Network
from fedllm.cli.running import Json

if TYPE_CHECKING:
    from fedllm.deploy.authority import Authority
    from fedllm.deploy.kit import Kit
    from fedllm.deploy.package import Package
    from fedllm.deploy.request import Request

KitFolder = Annotated[Path, typer.Option("--folder", help="Of the key; it becomes the kit.", show_default=False)]


def request(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A site, or an e-mail address.", show_default=False)],
    organisation: Annotated[str, typer.Option(help="Whose it is, as in sites.yaml.", show_default=False)],
    folder: KitFolder,
    as_json: Json = False,
) -> None:
    """Make a private key that stays here, and a request for its certificate. Once more: a request for the same key."""
    with screen.loading("Making a request"):
        from fedllm.deploy import request as requests

        made = requests.make(folder, name, organisation)
    if as_json:
        screen.emit({"name": name, "request": str(made.file), "fingerprint": made.fingerprint})
        return
    screen.say(f"Request: {made.file}")
    screen.say(f"Fingerprint of its key: {made.fingerprint}")
    screen.tell(
        "Send the request to whoever provisions, and tell the fingerprint over another channel, such as the telephone. "
        f"The key, {folder / requests.KEY}, goes to nobody."
    )
    screen.say(f"With the package that comes back: fedllm deploy install PACKAGE --folder {folder}")


def sign(
    files: Annotated[list[Path], typer.Argument(metavar="REQUEST...", help="What participants sent.")],
    fingerprint: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[NAME=]FINGERPRINT",
            help="What a participant told over another channel; asked for where left out. With NAME, once for each.",
        ),
    ] = None,
    replace: Annotated[bool, typer.Option("--replace", help="Sign another key than the participant had.")] = False,
    folder: Network = NET,
    as_json: Json = False,
) -> None:
    """Sign requests of participants that keep their own keys, and write a package without a key for each."""
    with screen.loading("Reading"):
        from fedllm.core.errors import ConfigError
        from fedllm.deploy.authority import Authority
        from fedllm.deploy.request import Request

        authority = Authority.of(folder)
        requests = [Request.of(file) for file in files]
        for one in requests:
            authority.check(one, replace)
        twice = [one.name for one in requests if [other.name for other in requests].count(one.name) > 1]
        if twice:
            raise ConfigError(f"Two requests are of '{twice[0]}'.", action="Name the one that it means.")
        _keys_differ(requests)
        terms, new = authority.terms(), [one for one in requests if not authority.known(one)]
        ends = {one.name: terms[one.name].end for one in new if one.name in terms}
    _compared(requests, new, fingerprint or [])
    with screen.loading("Signing"):
        packages = {one.name: authority.sign(one, replace) for one in requests}
    _show_packages(authority, packages, as_json)
    for name, end in ends.items():
        former = f"The certificate of {name}'s former key is good until {end:%Y-%m-%d %H:%M} UTC."
        away = f"have the sites take {name} off their policies" if "@" in name else f"revoke {name}"
        screen.warn([f"{former} Where that key may be in other hands, {away}, and give the participant a new name."])


def _keys_differ(requests: list[Request]) -> None:
    """Raise :class:`ConfigError` where two participants ask for the same key."""
    from fedllm.core.errors import ConfigError

    seen: dict[str, str] = {}
    for one in requests:
        other = seen.setdefault(one.fingerprint, one.name)
        if other != one.name:
            raise ConfigError(
                f"The requests of '{other}' and '{one.name}' are for one key, {one.fingerprint}.",
                "Each has its own.",
                action="Sign neither; ask both what they sent.",
            )


def _compared(requests: list[Request], new: list[Request], told: list[str]) -> None:
    """Have the fingerprint of each key compared with what its owner told; nobody is asked about a key that is known.

    Raises:
        ConfigError: a fingerprint is another, is missing, is of nobody or stands twice, or nobody looks.
    """
    from fedllm.core.errors import ConfigError

    if told:
        given = _by_name(requests, told)
        for one in requests:
            if one.name in given and given[one.name] != one.fingerprint:
                raise ConfigError(
                    f"The key of '{one.name}' has the fingerprint {one.fingerprint}.",
                    f"The one given is another: {given[one.name]}.",
                    action=f"Do not sign it; ask '{one.name}' what it sent.",
                )
        missing = [one.name for one in new if one.name not in given]
        if missing:
            raise ConfigError(
                f"No fingerprint is given for '{missing[0]}'.",
                "Where some are given, each request needs its own.",
                action=f"Give it as well: --fingerprint {missing[0]}=FINGERPRINT",
            )
        return
    if not new:
        return
    _asked(
        {f"{one.name} ({one.organisation})": one.fingerprint for one in new},
        "Did each of them tell you this fingerprint, over another channel?",
        "--fingerprint FINGERPRINT" if len(requests) == 1 else "--fingerprint NAME=FINGERPRINT, once for each",
    )


def _by_name(requests: list[Request], told: list[str]) -> dict[str, str]:
    """Participant -> the fingerprint that is given for it; raises :class:`ConfigError` where that is not clear."""
    from fedllm.core.errors import ConfigError
    from fedllm.deploy import certificates

    names, found = [one.name for one in requests], dict[str, str]()
    for text in told:
        name, equals, fingerprint = text.rpartition("=")
        if not equals and len(names) > 1:
            raise ConfigError(
                f"The fingerprint {text} is given for one of {len(names)} requests.",
                "It is said which.",
                action="Write --fingerprint NAME=FINGERPRINT, once for each.",
            )
        name = name if equals else names[0]
        if name not in names:
            raise ConfigError.unknown("request of", name, names)
        if name in found:
            raise ConfigError(f"Two fingerprints are given for '{name}'.", "One request has one key.")
        found[name] = certificates.written(fingerprint)
    return found


def _asked(fingerprints: Mapping[str, str], question: str, option: str) -> None:
    """Ask the person in front of the terminal; raises :class:`ConfigError` where there is none, or the answer is no."""
    from fedllm.core.errors import ConfigError

    if not _terminal():
        shown = "; ".join(f"{who}: {fingerprint}" for who, fingerprint in fingerprints.items())
        raise ConfigError(
            f"Nobody compared the fingerprint. {shown}",
            "It is compared with what the other end says over another channel.",
            action=f"Give that: {option}",
        )
    for who, fingerprint in fingerprints.items():
        screen.say(f"{who}\n  {fingerprint}", errors=True)
    if not typer.confirm(question, err=True):
        raise ConfigError("The fingerprint was not confirmed; nothing was changed.")


def _terminal() -> bool:
    """Whether somebody can be asked."""
    return sys.stdin is not None and sys.stdin.isatty()


def install(
    file: Annotated[Path, typer.Argument(metavar="PACKAGE", help="What came back.", show_default=False)],
    folder: KitFolder,
    authority: Annotated[
        str | None,
        typer.Option(
            metavar="FINGERPRINT",
            help="The authority's, told over another channel; asked for where left out.",
            show_default=False,
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Put a certificate to the key it is for: makes the kit of a participant with its own key, or renews one."""
    with screen.loading("Reading"):
        from fedllm.deploy.kit import is_kit
        from fedllm.deploy.package import Package

        package = Package.of(file)
        package.fits(folder)
        renews = is_kit(folder)
    _authority(package, authority, renews)
    with screen.loading("Making the kit"):
        kit = package.install(folder)
    end = kit.term().end
    if as_json:
        screen.emit({"name": kit.name, "kind": kit.kind, "kit": str(kit.folder), "renewed": renews, "end": str(end)})
        return
    facts = package.facts
    who = f"{kit.name} ({facts.organisation}{f', {facts.role}' if facts.role else ''})"
    screen.say(f"{'Renewed' if renews else 'Kit'}: {kit.folder}, the {kit.kind} {who} of {kit.network}.")
    screen.say(f"Its certificate is good until {end:%Y-%m-%d %H:%M} UTC.")
    screen.say(_next(kit, renews))


def _authority(package: Package, told: str | None, renews: bool) -> None:
    """Have the authority compared; a kit that is there knows its own. Raises :class:`ConfigError` for another."""
    from fedllm.core.errors import ConfigError
    from fedllm.deploy import certificates

    if told is not None:
        if certificates.written(told) != package.fingerprint:
            raise ConfigError(
                f"The package is of the authority {package.fingerprint}.",
                "That is not the one given.",
                action="Do not install it; ask whoever provisioned.",
            )
        return
    if renews:
        return
    facts = package.facts
    _asked(
        {f"The authority of {facts.network}, server {facts.host}:{facts.port}": package.fingerprint},
        "Did whoever provisioned tell you this fingerprint, over another channel?",
        "--authority FINGERPRINT",
    )


def _next(kit: Kit, renews: bool) -> str:
    if renews and kit.kind == "coordinator":
        return "It is used from the next command on."
    if renews:
        return "Its process uses the new one when it is started again."
    if kit.kind == "site":
        return f"Take part: fedllm join {kit.folder} --data FILE"
    return f"Look: fedllm deploy status --kit {kit.folder}"


def renew(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="NAME...", help="Participants; none: show when certificates end.")
    ] = None,
    folder: Network = NET,
    as_json: Json = False,
) -> None:
    """New certificates for keys that were made here: a package without a key for each. Without names: who needs one."""
    with screen.loading("Signing"):
        from fedllm.deploy.authority import Authority

        authority = Authority.of(folder)
        packages = {name: authority.renew(name) for name in authority.renewable(names or [])}
    if names:
        _show_packages(authority, packages, as_json)
    else:
        _show_terms(authority, as_json)


def _show_packages(authority: Authority, packages: Mapping[str, Path], as_json: bool) -> None:
    terms, fingerprint = authority.terms(), authority.fingerprint
    if as_json:
        rows = [{"name": name, "package": str(file), "end": str(terms[name].end)} for name, file in packages.items()]
        screen.emit({"packages": rows, "authority": fingerprint})
        return
    for name, file in packages.items():
        screen.say(f"{name}: {file}, good until {terms[name].end:%Y-%m-%d %H:%M} UTC")
    screen.say(f"Fingerprint of the authority: {fingerprint}")
    screen.tell(
        "A package holds no key and may go over any channel; tell the fingerprint over another one. "
        "There: fedllm deploy install PACKAGE --folder KIT"
    )
    if any(terms[name].end >= terms["authority"].end for name in packages):
        screen.warn(["The authority ends at the same time: then the network needs a new one, in another folder."])


def _show_terms(authority: Authority, as_json: bool) -> None:
    terms, own = authority.terms(), authority.network.participants()
    if as_json:
        rows = [{"name": n, "begin": str(t.begin), "end": str(t.end), "state": t.state} for n, t in terms.items()]
        screen.emit({"certificates": rows})
        return
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for column in ("certificate of", "key", "good until (UTC)", ""):
        table.add_column(column, header_style="dim", overflow="fold")
    words = {"good": "", "soon": "ends soon", "over": "has ended", "early": "not good yet"}
    for name, term in terms.items():
        key = own[name]["key"] if name in own else ""
        table.add_row(name, key, f"{term.end:%Y-%m-%d %H:%M}", words[term.state])
    screen.show(table)
