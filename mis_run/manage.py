"""``mis``: look at runs and end them. Everything comes from the state directory and records."""

from __future__ import annotations

import json
import signal as signals
import time
from pathlib import Path

import click

from mis_run import __version__
from mis_run.errors import MissingGuarantee, NotFound, UsageError
from mis_run.hints import Any
from mis_run.manage_docker import docker
from mis_run.manage_images import image
from mis_run.manage_profiles import JSON, profile


@click.group(
    name="mis",
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Runs are named by id, a unique prefix of it, or --name. Start one with mis-run.",
)
@click.version_option(__version__, "--version", "-V", message="mis-run %(version)s")
def command() -> None:
    """Look at guarded agents, end them, and check this machine."""


command.add_command(docker)
command.add_command(image)


def _print(value: Any) -> None:
    click.echo(json.dumps(value, indent=2, default=str))


@command.command()
@JSON
def ps(as_json: bool) -> int:
    """List live runs."""
    from mis_run import control, show, state

    def phase(path: Path, facts: dict[str, Any]) -> str:
        found = str(facts.get("phase", "setup"))
        lost = found == "running" and not control.answers(path)
        return "unguarded" if lost else found

    rows = [
        {
            "id": path.name,
            "name": facts.get("name") or "",
            "phase": phase(path, facts),
            "profile": facts.get("profile", ""),
            "network": facts.get("network", ""),
            "seconds": round(time.time() - facts.get("began", time.time()), 1),
            "pid": facts.get("pid"),
            "command": facts.get("command", []),
        }
        for path, facts in state.live()
    ]
    if as_json:
        _print(rows)
    else:
        click.echo(show.runs(rows))
    return 0


@command.command()
@click.argument("which", required=False, metavar="[RUN]")
@JSON
@click.option("--once", is_flag=True, help="One reading instead of a live view.")
@click.option("--interval", default=1.0, type=click.FloatRange(0.1, 60), help="Seconds.")
def top(which: str | None, as_json: bool, once: bool, interval: float) -> int:
    """Usage, counters and network of live runs, refreshed until Ctrl-C."""
    from mis_run import control, show, state

    def readings() -> dict[str, dict[str, Any]]:
        runs = [state.find(which)] if which else state.live()
        found = {}
        for path, facts in runs:
            if facts.get("phase") != "running":
                continue
            try:
                found[path.name] = {"name": facts.get("name"), **control.ask(path, do="top")}
            except NotFound:  # it ended between the list and the question
                if which:
                    raise
        return found

    if as_json:
        _print(readings())
    elif once:
        click.echo(show.top(readings()))
    else:
        show.live_top(readings, interval)
    return 0


@command.command()
@click.argument("which", nargs=-1, required=True, metavar="RUN…")
@click.option("--signal", "-s", "name", metavar="SIG", help="Send SIG instead of killing.")
@JSON
def kill(which: tuple[str, ...], name: str | None, as_json: bool) -> int:
    """Kill runs at once, the whole cgroup, or send their agents a signal."""
    from mis_run import control, state

    number = _signal(name) if name else None
    done = []
    for one in which:
        path, _ = state.find(one)
        control.ask(path, do="kill", signal=number)
        done.append({"id": path.name, "signal": number or int(signals.SIGKILL)})
    if as_json:
        _print(done)
    return 0


def _signal(name: str) -> int:
    if name.isdecimal() and 1 <= int(name) <= 64:
        return int(name)
    try:
        return signals.Signals[f"SIG{name.upper().removeprefix('SIG')}"].value
    except KeyError:
        raise UsageError(f"--signal {name!r}: no such signal", hint="use TERM, INT, 9 …") from None


@command.command()
@click.argument("which", required=False, metavar="[RUN]")
@click.option("--follow", "-f", is_flag=True, help="Wait for more until the run ends.")
@click.option("--denied", is_flag=True, help="Violations only.")
@JSON
def logs(which: str | None, follow: bool, denied: bool, as_json: bool) -> int:
    """Print the record of a run, live or ended; without RUN, of the latest."""
    from mis_run import show

    for event in _events(_record(which), follow=follow):
        if denied and event.get("verdict") not in ("deny", "audit", "kill"):
            continue
        click.echo(json.dumps(event) if as_json else show.event(event))
    return 0


def _record(which: str | None) -> Path:
    """The record file of a run: as its state says, else by id in the default place."""
    from mis_run import report, state

    if which is not None:
        for path, facts in state.live():
            if which in (facts.get("name"), path.name) and facts.get("record"):
                return Path(facts["record"])
    pattern = f"{which}*.jsonl" if which and which.isalnum() else "*.jsonl"
    try:
        found = sorted(report.RECORDS.glob(pattern), key=lambda path: path.stat().st_mtime)
    except OSError as error:
        raise NotFound(f"{report.RECORDS}: {error.strerror}", hint="run as root") from error
    if not found or (which and not which.isalnum()):
        raise NotFound(f"no record of {which or 'any run'}", hint="mis ps; mis-run --log FILE …")
    return found[-1]


def _events(path: Path, *, follow: bool) -> Any:
    from mis_run import report

    seen = 0
    while True:
        ended = False
        for count, event in enumerate(report.read(path)):
            ended = ended or event["kind"] == "run.exit"
            if count >= seen:
                seen = count + 1
                yield event
        if not follow or ended:
            return
        time.sleep(0.2)


@command.command()
@click.argument("which", required=False, metavar="[RUN]")
@click.option("--last", is_flag=True, help="The last denial only.")
@JSON
def explain(which: str | None, last: bool, as_json: bool) -> int:
    """Say what a run was denied, why, and what would allow it, and what marked it; without RUN,
    the latest run."""
    from mis_run import explain as explainer
    from mis_run.jsonable import plain

    path = _record(which)
    found = [e for e in _events(path, follow=False) if explainer.concerns(e)]
    found = found[-1:] if last else found
    if as_json:
        _print([{"event": e, **plain(explainer.advise(e))} for e in found])
    else:
        click.echo(explainer.text(found))
    return 0


@command.command()
@click.argument("which", metavar="RUN")
def inspect(which: str) -> int:
    """Print the plan, state and measurements of a live run as JSON."""
    from mis_run import control, state

    path, facts = state.find(which)
    _print({"state": facts, **control.ask(path, do="inspect")})
    return 0


@command.command()
@click.argument("which", metavar="RUN")
@click.argument("level", required=False, type=click.IntRange(1, 5))
@JSON
def defcon(which: str, level: int | None, as_json: bool) -> int:
    """Show a run's DEFCON level, or set it (1 kills it)."""
    from mis_run import control, state

    path, _ = state.find(which)
    answer = control.ask(path, do="defcon", level=level)
    if as_json:
        _print(answer)
    else:
        click.echo(f"DEFCON {answer['level']} ({answer['violations']} violations counted)")
    return 0


@command.command()
@click.argument("which", metavar="RUN")
def attach(which: str) -> int:
    """Take over a run whose supervisor was lost (profiles with on_loss = "open")."""
    from mis_run import host, resume

    host.needs_root("mis attach")
    return resume.attach(which)


@command.command()
@JSON
def gc(as_json: bool) -> int:
    """Remove what killed launchers left behind; live runs are not touched."""
    from mis_run import gc as collector
    from mis_run.host import needs_root
    from mis_run.jsonable import plain

    needs_root("mis gc")
    removed = plain(collector.collect())
    if as_json:
        _print(removed)
    else:
        for what, names in removed.items():
            for name in names:
                click.echo(f"removed {what}: {name}")
    return 0


@command.command()
@JSON
def doctor(as_json: bool) -> int:
    """Try every mechanism on this machine: works, or why not and how to get it.

    Exit code 0 when the default profile can run here, 120 when it cannot.
    """
    from mis_run import host, show

    report = host.diagnose()
    if as_json:
        _print(report)
    else:
        click.echo(show.doctor(report))
    return 0 if report["default_profile"]["ok"] else MissingGuarantee.exit_code


@command.command(context_settings={"allow_interspersed_args": False})
@click.option("--output", "-o", metavar="FILE", help="Profile to write.  [default: stdout]")
@click.option("--workdir", "-w", metavar="DIR", help="Workspace.  [default: .]")
@click.option("--bind", "-b", "binds", multiple=True, metavar="SRC[:DST][:ro]")
@click.option("--env", "-e", multiple=True, metavar="NAME[=VALUE]")
@click.option("--net", type=click.Choice(["none", "guarded", "host"]), help="Network to give.")
@click.option("--user", "-u", metavar="USER[:GID]", help="Run as.  [default: who called sudo]")
@click.argument("command", nargs=-1, type=click.UNPROCESSED, metavar="-- CMD [ARG]…")
def learn(output: str | None, **words: Any) -> int:
    """Run CMD denying nothing, and write the smallest profile under which it runs."""
    from mis_run import learn, options

    words |= {"profile": "trace", "rootfs": None, "allow_net": (), "tty": None, "log": None}
    words |= {"allow_missing": (), "as_json": False}
    return learn.run(options.parse(**words), Path(output).absolute() if output else None)


command.add_command(profile)


@command.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> int:
    """Print shell completion for mis-run and mis; source it from your shell's start file."""
    from click.shell_completion import get_completion_class

    from mis_run import cli

    for name, what in (("mis-run", cli.command), ("mis", command)):
        found = get_completion_class(shell)
        if found is None:
            raise UsageError(f"no completion for {shell}")
        variable = f"_{name.upper().replace('-', '_')}_COMPLETE"
        click.echo(found(what, {}, name, variable).source())
    return 0
