"""The words of ``mis docker``; `docker_config` and `podman_config` do it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import click

from mis_run import docker_config, podman_config
from mis_run.errors import UsageError
from mis_run.events import Guarantee
from mis_run.hints import Any

RELOAD = "systemctl reload docker   (or: kill -HUP $(pidof dockerd))"
DOCKER, PODMAN = "docker", "podman"
CONFIG = click.option(
    "--config",
    "path",
    type=click.Path(path_type=Path),
    help=f"Docker's configuration file ({docker_config.DAEMON}), or podman's folder "
    f"({podman_config.FOLDER}).",
)
ENGINE = click.option(
    "--engine",
    type=click.Choice([DOCKER, PODMAN]),
    default=DOCKER,
    show_default=True,
    help="Whose configuration.",
)
JSON = click.option("--json", "as_json", is_flag=True, help="Machine-readable output.")


def _where(function: Callable[..., int]) -> Callable[..., int]:
    return ENGINE(CONFIG(function))


@click.group()
def docker() -> None:
    """Guard containers of Docker or podman: docker run --runtime mis …"""


@docker.command()
@_where
@click.option("--always", is_flag=True, help="podman: the hook is for every container.")
@click.option(
    "--allow-missing",
    multiple=True,
    type=click.Choice([guarantee.value for guarantee in Guarantee]),
    help="podman: what containers of the hook may lack although their profile requires it.",
)
def install(engine: str, path: Path | None, always: bool, allow_missing: tuple[str, ...]) -> int:
    """Add the runtimes to the engine's configuration; everything else in it stays as it is."""
    if engine == PODMAN:
        waived = frozenset(map(Guarantee, allow_missing))
        for one in podman_config.install(
            path or podman_config.FOLDER, always=always, waived=waived
        ):
            click.echo(f"{one}: written")
        click.echo("then: podman --runtime mis run --rm IMAGE CMD")
        return 0
    if always or allow_missing:
        raise UsageError(
            "--always and --allow-missing are about the hook, which Docker does not have",
            hint="--engine podman",
        )
    path = path or docker_config.DAEMON
    names = docker_config.install(path)
    click.echo(f"{path}: runtimes {', '.join(names)}")
    click.echo(f"now tell Docker: {RELOAD}")
    click.echo(f"then: docker run --rm --runtime {names[0]} IMAGE CMD")
    return 0


@docker.command()
@_where
def uninstall(engine: str, path: Path | None) -> int:
    """Take the runtimes out again; containers that use them must be removed first."""
    if engine == PODMAN:
        path = path or podman_config.FOLDER
        done = podman_config.uninstall(path)
        click.echo(f"{path}: {'as it was before' if done else 'nothing of mis-run is there'}")
        return 0
    path = path or docker_config.DAEMON
    if docker_config.uninstall(path):
        click.echo(f"{path}: as it was before")
        click.echo(f"now tell Docker: {RELOAD}")
    else:
        click.echo(f"{path}: nothing of mis-run is there")
    return 0


@docker.command()
@click.option("--engine", type=click.Choice([DOCKER, PODMAN]), help="Only this one; else both.")
@CONFIG
@JSON
def status(engine: str | None, path: Path | None, as_json: bool) -> int:
    """Say what of mis-run the engines' configurations have."""
    if path is not None and engine is None:
        engine = DOCKER
    found: dict[str, dict[str, Any]] = {}
    if engine != PODMAN:
        found[DOCKER] = docker_config.status(path or docker_config.DAEMON)
    if engine != DOCKER:
        found[PODMAN] = podman_config.status(path or podman_config.FOLDER)
    if as_json:
        click.echo(json.dumps(found[engine] if engine else found, indent=2))
        return 0
    for name, one in found.items():
        for what, how in (one["runtimes"] if name == DOCKER else one["files"]).items():
            click.echo(f"{name}: {what}: {how}")
        for other in one.get("in the way", ()):
            click.echo(f"{name}: in the way: {other}")
        if one["missing"]:
            click.echo(f"{name}: missing: {', '.join(one['missing'])} (mis docker install)")
    return 0
