"""``mis profile``: list, show and check profiles."""

from __future__ import annotations

import json

import click

JSON = click.option("--json", "as_json", is_flag=True, help="Machine-readable output.")


@click.group()
def profile() -> None:
    """List, show and check profiles."""


@profile.command("list")
@JSON
def profile_list(as_json: bool) -> int:
    """Every profile that can be named, with its source."""
    from mis_run import profiles, show

    rows = [
        {"name": name, "source": str(path), "description": text}
        for name, path, text in profiles.catalogue()
    ]
    if as_json:
        click.echo(json.dumps(rows, indent=2))
    else:
        click.echo(show.table(("NAME", "DESCRIPTION", "SOURCE"), rows))
    return 0


@profile.command("show")
@click.argument("name", metavar="NAME|FILE")
@JSON
def profile_show(name: str, as_json: bool) -> int:
    """The profile with everything it extends merged in."""
    from mis_run import profiles
    from mis_run.jsonable import plain

    found = profiles.load(name)
    if as_json:
        click.echo(json.dumps(plain(found), indent=2, default=str))
    else:
        click.echo(profiles.render(found))
    return 0


@profile.command("check")
@click.argument("names", nargs=-1, required=True, metavar="NAME|FILE…")
@JSON
def profile_check(names: tuple[str, ...], as_json: bool) -> int:
    """Validate profiles; the first error ends with exit code 2."""
    from mis_run import profiles

    for name in names:
        profiles.load(name)
        if not as_json:
            click.echo(f"{name}: ok")
    if as_json:
        click.echo(json.dumps([{"name": name, "ok": True} for name in names], indent=2))
    return 0
