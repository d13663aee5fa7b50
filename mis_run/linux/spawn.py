"""posix_spawn(3) with chosen descriptor numbers: our heap is not forked, no code runs before exec.

Python's own descriptors are all close-on-exec, so a child has exactly what is named here.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping, Sequence
from contextlib import ExitStack

from mis_run.dataclass import dataclass
from mis_run.hints import IO, Any
from mis_run.linux import programs


def spawn(
    argv: Sequence[str],
    fds: Mapping[int, int],
    *,
    die_with_us: bool = False,
    session: bool = False,
) -> int:
    """Start ``argv`` with descriptor ``target`` being our ``source`` for each pair; its pid.

    ``die_with_us`` has the kernel kill it when we die (PR_SET_PDEATHSIG, by setpriv(1));
    ``session`` keeps the signals of our terminal from it.
    It is looked up and run as `programs` says. Raises OSError when it cannot be executed.
    """
    pairs = list(fds.items())
    # Through numbers above every source first, since a target may be a source.
    spare = max((*fds, *fds.values())) + 1
    actions: list[tuple[Any, ...]] = []
    for number, (_, source) in enumerate(pairs):
        actions.append((os.POSIX_SPAWN_DUP2, source, spare + number))
    for number, (target, _) in enumerate(pairs):
        actions.append((os.POSIX_SPAWN_DUP2, spare + number, target))
        actions.append((os.POSIX_SPAWN_CLOSE, spare + number))
    program = programs.find(argv[0]) or argv[0]
    command = [program, *argv[1:]]
    if die_with_us:
        setpriv = programs.find("setpriv") or "setpriv"
        command = [setpriv, "--pdeathsig", "KILL", "--", *command]
    # Python ignores SIGPIPE, and what is ignored stays so in a child.
    return os.posix_spawn(
        command[0],
        command,
        programs.environment(),
        file_actions=actions,
        setsid=session,
        setsigdef=(signal.SIGPIPE,),
    )


@dataclass(frozen=True)
class Done:
    """A program that has ended: its exit code (negative: the signal), and what it wrote."""

    code: int
    out: str
    err: str


def run(argv: Sequence[str], text: str = "", *, hold: Sequence[int] = ()) -> Done:
    """Run one of the system's programs to its end, as `programs` says, with ``text`` as its input.

    As subprocess.run, which takes longer to import than ``ip`` takes to run.  ``hold``:
    descriptors that it has too.  Raises OSError when it cannot be executed.
    """
    with ExitStack() as stack:
        given, out, err = (stack.enter_context(_scratch()) for _ in range(3))
        given.write(text.encode())
        given.seek(0)
        fds = {0: given.fileno(), 1: out.fileno(), 2: err.fileno()}
        pid = spawn(argv, fds | {fd: fd for fd in hold})
        _, status = os.waitpid(pid, 0)
        written = []
        for file in (out, err):
            file.seek(0)
            written.append(file.read().decode(errors="replace"))
    return Done(os.waitstatus_to_exitcode(status), *written)


def _scratch() -> IO[bytes]:
    """In memory: a full pipe cannot block, so nobody needs to read and wait at once."""
    return os.fdopen(os.memfd_create("mis-run"), "w+b")
