"""``mis-run`` as click knows it: help, completion, and what is wrong with wrong words."""

from __future__ import annotations

import click

from mis_run import __version__
from mis_run.command import leave, run
from mis_run.errors import UsageError
from mis_run.hints import Any, NoReturn
from mis_run.words import OPTIONS, Word

EPILOG = """\b
Examples:
  mis-run -- python3 agent.py
  mis-run --profile coding-agent --allow-net api.example.com:443 -- ./agent
  mis-run --net none --memory 1G --timeout 10m -- make test
  mis-run --dry-run -- ./agent        what would happen, and what is missing

\b
The agent sees the host's programs read-only under a layer that is thrown away, the
working directory read-write, no other home, no secrets, and only the network that
its profile allows.  Exit code: the agent's own (128+N for signal N); 2 wrong usage;
119-127 mis-run's own failures (docs/exit-codes.md).

\b
See also: mis ps, mis top, mis logs, mis doctor, mis profile list."""


def _option(one: Word) -> click.Option:
    if not one.metavar:
        # "--tty/--no-tty", "-t/-T": one way to say it, one to deny it.
        spelled = ["/".join(pair) for pair in zip(one.names, one.off, strict=False)] or one.names
        return click.Option([*spelled, one.key], is_flag=True, default=one.default, help=one.help)
    return click.Option(
        [*one.names, one.key],
        type=click.Choice(one.choices) if one.choices else None,
        metavar=None if one.choices else one.metavar,
        multiple=one.many,
        default=None if one.many else one.default,
        help=one.help,
    )


@click.command(
    name="mis-run",
    epilog=EPILOG,
    context_settings={
        "help_option_names": ["-h", "--help"],
        "ignore_unknown_options": False,
        "allow_interspersed_args": False,
        "max_content_width": 100,
    },
    params=[_option(one) for one in OPTIONS],
)
@click.version_option(__version__, "--version", "-V", message="mis-run %(version)s")
@click.argument("command", nargs=-1, type=click.UNPROCESSED, metavar="-- CMD [ARG]…")
def command(**words: Any) -> int:
    """Run CMD as a guarded agent: own cgroup, own container, guarded network, counted,
    supervised, and nothing left behind."""
    return run(words)


def run_command(cli: click.Command, name: str) -> NoReturn:
    """Run a click command with our error style."""

    def act() -> Any:
        try:
            return cli.main(prog_name=name, standalone_mode=False)
        except click.exceptions.Exit as leaving:
            return leaving.exit_code
        except click.Abort:
            return 130
        except click.ClickException as error:
            context = getattr(error, "ctx", None)
            hint = f"{context.command_path} --help" if context else f"{name} --help"
            raise UsageError(error.format_message(), hint=hint) from None

    leave(act)
