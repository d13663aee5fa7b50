"""``mis-oci-runtime``: what an engine calls instead of runc.

`main` prints, logs and exits; everything below only raises `MisError`.  Commands that need no
guarding become the OCI runtime's own process, with the words as they came.
"""

from __future__ import annotations

import os
import sys

from mis_run.errors import MisError, SetupError
from mis_run.oci import runs, words

TYPE_CHECKING = False  # as typing's, without importing typing
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import NoReturn

    from mis_run.oci.words import Call

SBIN = ("/usr/local/sbin", "/usr/sbin", "/usr/local/bin", "/usr/bin")


def main() -> NoReturn:
    """The program."""
    argv = sys.argv[1:]
    try:
        code = dispatch(argv)
    except MisError as error:
        if error.message:
            complain(error, argv)
        code = error.exit_code
    except OSError as error:
        failure = SetupError(str(error), hint="mis doctor")
        complain(failure, argv)
        code = failure.exit_code
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def dispatch(argv: Sequence[str]) -> int:
    """Do what the words say; the exit code, where the OCI runtime has not taken our place."""
    call = words.parse(argv)
    if call.command in ("start", "delete", "exec") and not {"help", "h"} & {*call.options}:
        return _later(call)
    if call.command not in ("create", "run") or {"help", "h"} & {*call.options}:
        return _become(_operators_runtime(call), call, call.arguments)
    from mis_run import startup

    startup.begin()
    from mis_run.oci import create, operator  # late, as everything that most calls do without

    decided = operator.load(call.config)
    runtime = str(decided.runtime or find_runtime())

    act = create.run if call.command == "run" else create.create
    return act(call, runtime, decided)


def _later(call: Call) -> int:
    """What comes after ``create``: by the same OCI runtime, and only while there is a guard."""
    if call.command == "delete":
        runtime = next(iter(runs.of(call).values()), "")
        if not runtime:  # its supervisor has ended, and its run with it
            runtime = _operators_runtime(call)
        code = runs.run_and_wait(runtime, *call.base, call.command, *call.arguments)
        runs.wait_gone(call)
        return code
    folder, runtime = runs.live(call)
    if call.command == "start":
        return _become(runtime, call, call.arguments)
    from mis_run.oci import execute

    return _become(runtime, call, execute.words(call, folder))


def find_runtime() -> str:
    """The OCI runtime, where the operator names none. Raises SetupError when there is none."""
    for name in ("runc", "crun"):
        for folder in SBIN:
            if os.access(f"{folder}/{name}", os.X_OK):
                return f"{folder}/{name}"
    raise SetupError("no OCI runtime: neither runc nor crun", hint="apt-get install runc")


def _operators_runtime(call: Call) -> str:
    """The OCI runtime that the operator chose, or that is there."""
    if call.config == words.FILE and not os.path.lexists(call.config):
        return find_runtime()
    from mis_run.oci import operator

    return str(operator.load(call.config).runtime or find_runtime())


def _become(runtime: str, call: Call, arguments: Sequence[str]) -> NoReturn:
    """The OCI runtime in our place, with our descriptors and our process id."""
    command = [call.command] if call.command else []
    try:
        os.execv(runtime, [runtime, *call.base, *command, *arguments])
    except OSError as error:
        raise SetupError(f"{runtime}: {error.strerror}", hint=f"see {call.config}") from error


def complain(error: MisError, argv: Sequence[str]) -> None:
    """One line on stderr, and one in the log that the engine reads its message from."""
    text = f"mis-run: {error.message}" + (f" (hint: {error.hint})" if error.hint else "")
    text = " ".join(text.split())
    print(text, file=sys.stderr)
    path = _value("log", argv)
    if not path:
        return
    import json
    import time

    stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    line = f'time="{stamp}" level=error msg={json.dumps(text)}'
    if _value("log-format", argv) == "json":
        line = json.dumps({"level": "error", "msg": text, "time": stamp})
    try:
        fd = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC, 0o644)
        with os.fdopen(fd, "w") as file:
            file.write(f"{line}\n")
    except OSError:  # stderr has it
        return


def _value(name: str, argv: Sequence[str]) -> str | None:
    """A global option's value, also of words that as a whole could not be understood."""
    for word, following in zip(argv, [*argv[1:], None], strict=False):
        bare, given, value = word.removeprefix("-").removeprefix("-").partition("=")
        if word.startswith("-") and bare == name:
            return value if given else following
    return None
