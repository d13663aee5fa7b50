"""Entry points: ``mis-run`` (launch) and ``mis`` (manage); ``python -m mis_run`` is ``mis-run``."""

from __future__ import annotations

import os
import sys

from mis_run.hints import NoReturn


def mis_run() -> NoReturn:
    """``mis-run [options] -- CMD…``."""
    from mis_run import startup

    startup.begin()
    from mis_run import command, words

    said = words.read(sys.argv[1:], os.environ)
    if said is not None:
        command.leave(lambda: command.run(said))
    startup.reach_installed()
    from mis_run import cli

    cli.run_command(cli.command, "mis-run")


def mis() -> NoReturn:
    """``mis ps|top|kill|logs|inspect|gc|doctor|profile``."""
    from mis_run import cli, manage

    cli.run_command(manage.command, "mis")


if __name__ == "__main__":
    mis_run()
