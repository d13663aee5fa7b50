"""What ``mis-run`` does with its words, and how both commands end: one message, one exit code."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable

from mis_run.errors import MisError, SetupError
from mis_run.hints import Any, NoReturn
from mis_run.options import parse


def run(words: dict[str, Any]) -> int:
    """Plan and launch; the exit code. Raises MisError."""
    dry_run = words.pop("dry_run")
    quiet = words.pop("quiet")
    options = parse(**words)

    # Imported late: a wrong word should not pay for the engine.
    if not dry_run and options.image is None:  # unpacking forks: no threads before that
        from mis_run import namespace
        from mis_run.guards import net

        namespace.prepare()
        net.load_ahead()
    from mis_run import host, plan, profiles, startup

    profile = profiles.load(options.profile)
    image = None
    if options.image is None:
        caller = host.caller(options.user, os.environ)
    else:
        startup.reach_installed()
        from mis_run.images import sources

        image, caller = sources.prepare(options, host.caller(None, os.environ), unpack=not dry_run)
    made = plan.make(options, profile, host.probe(), caller, image)
    if dry_run:
        from mis_run import show

        print(json.dumps(made.json(), indent=2) if options.json else show.plan(made))
        plan.check(made)
        return 0
    plan.check(made)
    from mis_run import launch

    if not options.restart:
        return launch.run(made, quiet=quiet).code
    from mis_run import restart

    return restart.run(lambda: launch.run(made, quiet=quiet), options.restart).code


def leave(act: Callable[[], Any]) -> NoReturn:
    """End with the exit code that ``act`` gives, or its error's, that being told."""
    _open_streams()
    try:
        code = act()
    except MisError as error:
        complain(error)
        code = error.exit_code
    except KeyboardInterrupt:
        code = 130
    except BrokenPipeError:
        code = 141
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        failure = SetupError(f"{error}", hint="mis doctor; mis gc removes what may be left")
        complain(failure)
        code = failure.exit_code
    sys.stdout.flush()
    sys.stderr.flush()
    # Everything is undone and written; taking the interpreter apart would cost 13 ms more.
    os._exit(code if isinstance(code, int) else 0)


def _open_streams() -> None:
    """Standard streams that our caller has closed become /dev/null: the next file opened would get
    such a number, and the agent would get that file."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            # The lowest number that is free: this one, since those below it are open.
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
            setattr(sys, name, os.fdopen(number, "w" if number else "r", closefd=False))


def complain(error: MisError) -> None:
    """``mis-run: message`` and ``hint: command`` on stderr, red only on a terminal."""
    head = "mis-run:"
    if sys.stderr.isatty() and "NO_COLOR" not in os.environ:
        head = f"\033[1;31m{head}\033[0m"
    print(f"{head} {error.message}", file=sys.stderr)
    if error.hint:
        print(f"  hint: {error.hint}", file=sys.stderr)
