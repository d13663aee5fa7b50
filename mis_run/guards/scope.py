"""Abstract UNIX sockets of the host, where the agent is in the host's network namespace.

Such sockets (X11, D-Bus, old containerd shims) have no file that could be hidden, and before Linux
6.7 no cgroup hook shows their names.  Landlock can refuse what is bound outside of the agent
(LANDLOCK_SCOPE_ABSTRACT_UNIX_SOCKET, Linux 6.12, landlock(7)); the agent's own still work.  The
kernel refuses by itself, with EPERM: nothing is counted or recorded.
"""

from __future__ import annotations

import errno
import os
import socket

from mis_run.errors import VerifyError
from mis_run.hints import TYPE_CHECKING
from mis_run.linux import libc
from mis_run.model import Finding

if TYPE_CHECKING:
    from mis_run.box import Box

NAME = "landlock-scope"
SCOPES = 6  # the version of Landlock's ABI that has them


def supported() -> dict[str, Finding]:
    """``landlock-scope``: asked of the kernel itself."""
    try:
        version = libc.landlock_version()
    except OSError as error:
        why = f"no Landlock in this kernel: {os.strerror(error.errno or 0)}"
        return {NAME: Finding(False, why, "Linux 6.12 with lsm=landlock,…")}
    if version < SCOPES:
        return {NAME: Finding(False, f"Landlock {version} has no scopes", "Linux 6.12 or later")}
    return {NAME: Finding(True, f"Landlock {version}")}


def attach(box: Box) -> None:
    """Have the agent start in a scope of its own, and prove what that does.

    Raises VerifyError unless a socket of ours can be connected to without, and not with it.
    """
    name = f"mis-{os.urandom(8).hex()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(f"\0{name}")
        listener.listen(8)
        if (met := box.probe(f"abstract {name}")) != 0:
            raise VerifyError(f"a canary among abstract sockets failed: {os.strerror(met)}")
        box.scope()
        if (met := box.probe(f"abstract {name}")) != errno.EPERM:
            raise VerifyError(
                f"an abstract socket of the host can be reached ({os.strerror(met)})",
                hint="mis doctor; run with --net guarded",
            )
