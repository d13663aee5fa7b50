"""Files in memory that cannot be executed, for a whole pid namespace: ``vm.memfd_noexec`` = 1.

A memfd lies on a mount inside the kernel that no guard can mark, so executing one would pass the
exec gate.  With this setting (Linux 6.3, per pid namespace, Documentation/userspace-api/
mfd_noexec.rst) a plain memfd_create(2) is not executable, and the filter refuses the explicit
MFD_EXEC.  Runtimes refuse it as an OCI sysctl, and /proc/sys is read-only inside: so we set it.
"""

from __future__ import annotations

import os
import threading
from pathlib import Path

from mis_run.errors import SetupError
from mis_run.linux import libc

SETTING = Path("/proc/sys/vm/memfd_noexec")
CLONE_NEWPID = 0x20000000


def sealable() -> bool:
    """Whether this kernel has the setting."""
    return SETTING.exists()


def seal(pidfd: int) -> None:
    """Set it in the pid namespace of the process behind ``pidfd``. Raises SetupError.

    The kernel applies the write to the namespace that the writer is *in*, which nobody can enter
    but by being born there: a thread of ours aims its future children at it and spawns one.
    """
    problems: list[str] = []
    thread = threading.Thread(target=_seal, args=(pidfd, problems))
    thread.start()
    thread.join()
    if problems:
        raise SetupError(f"vm.memfd_noexec in the container: {problems[0]}", hint="mis doctor")


def _seal(pidfd: int, problems: list[str]) -> None:
    try:
        libc.setns(pidfd, CLONE_NEWPID)  # of this thread alone; it ends with us
        child = os.posix_spawn("/bin/sh", ["sh", "-c", f"echo 1 > {SETTING}"], {})
        _, status = os.waitpid(child, 0)
        if status:
            problems.append(f"the helper ended with status {status}")
    except OSError as error:
        problems.append(str(error))
