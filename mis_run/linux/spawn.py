"""posix_spawn(3) with chosen descriptor numbers: our heap is not forked, no code runs before exec.

Python's own descriptors are all close-on-exec, so a child has exactly what is named here.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping, Sequence
from typing import Any

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
