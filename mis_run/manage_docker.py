"""The words of ``mis docker``; `docker_config` does it."""

from __future__ import annotations

import json
from pathlib import Path

import click

from mis_run import docker_config

RELOAD = "systemctl reload docker   (or: kill -HUP $(pidof dockerd))"
CONFIG = click.option(
    "--config",
    "path",
    type=click.Path(path_type=Path),
    default=docker_config.DAEMON,
    show_default=True,
    help="Docker's configuration file.",
)
JSON = click.option("--json", "as_json", is_flag=True, help="Machine-readable output.")


@click.group()
def docker() -> None:
    """Guard containers of Docker: docker run --runtime mis …"""


@docker.command()
@CONFIG
def install(path: Path) -> int:
    """Add the runtimes to Docker's configuration; everything else in it stays as it is."""
    names = docker_config.install(path)
    click.echo(f"{path}: runtimes {', '.join(names)}")
    click.echo(f"now tell Docker: {RELOAD}")
    click.echo(f"then: docker run --rm --runtime {names[0]} IMAGE CMD")
    return 0


@docker.command()
@CONFIG
def uninstall(path: Path) -> int:
    """Take the runtimes out again; containers that use them must be removed first."""
    if docker_config.uninstall(path):
        click.echo(f"{path}: as it was before")
        click.echo(f"now tell Docker: {RELOAD}")
    else:
        click.echo(f"{path}: nothing of mis-run is there")
    return 0


@docker.command()
@CONFIG
@JSON
def status(path: Path, as_json: bool) -> int:
    """Say which runtimes Docker's configuration has."""
    found = docker_config.status(path)
    if as_json:
        click.echo(json.dumps(found, indent=2))
        return 0
    for name, how in found["runtimes"].items():
        click.echo(f"{name}: {how}")
    if found["missing"]:
        click.echo(f"missing: {', '.join(found['missing'])} (mis docker install)")
    return 0
