"""``mis image``: what ``mis-run --image`` keeps unpacked, and removing it."""

from __future__ import annotations

import json

import click

from mis_run.manage_profiles import JSON


@click.group()
def image() -> None:
    """List and remove unpacked images (mis-run --image)."""


@image.command("list")
@JSON
def image_list(as_json: bool) -> int:
    """Every image that is unpacked here, and whether a run uses it."""
    from mis_run import report, show
    from mis_run.host import needs_root
    from mis_run.images import cache

    needs_root("mis image list")
    rows = cache.listing()
    if as_json:
        click.echo(json.dumps(rows, indent=2))
        return 0
    head = ("ID", "NAME", "SIZE", "LAYERS", "IDLE", "USED")
    shown = [
        {
            **row,
            "id": row["digest"].removeprefix("sha256:")[:12],
            "size": report.size(row["bytes"]),
            "layers": len(row["layers"]),
            "idle": f"{row['idle']:.0f} s",
            "used": "by a run" if row["in_use"] else "",
        }
        for row in rows
    ]
    click.echo(show.table(head, shown))
    return 0


@image.command("prune")
@click.option("--idle", default="0", metavar="TIME", help="Only those not used for TIME, as 7d.")
@JSON
def image_prune(idle: str, as_json: bool) -> int:
    """Remove unpacked images that no run uses; the next launch unpacks them again."""
    from mis_run import units
    from mis_run.host import needs_root
    from mis_run.images import cache

    seconds = units.duration(idle) if idle != "0" else 0.0
    needs_root("mis image prune")
    removed = cache.prune(seconds)
    if as_json:
        click.echo(json.dumps(removed, indent=2))
        return 0
    for name in removed["images"]:
        click.echo(f"removed image: {name}")
    click.echo(f"removed {len(removed['layers'])} layer(s)")
    return 0
