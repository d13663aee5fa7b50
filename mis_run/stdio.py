"""What the agent gets as its standard streams, and why not always ours.

Whoever has a descriptor can open its file anew by ``/proc/self/fd`` (proc_pid_fd(5)), with another
mode and from its beginning; and no guard of the container is asked, because the file lies on a
mount of the host.  So a file that our caller redirected to or from reaches the agent by a pipe, as
with container engines, and cat(1) brings the bytes over.  Pipes, terminals and connected sockets
are passed; a socket that can talk to others than its peer is judged by no guard (it is the host's),
and refused.
"""

from __future__ import annotations

import os
import signal
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from mis_run.box import ended
from mis_run.errors import UsageError
from mis_run.linux.spawn import spawn

CAT = "/bin/cat"
NAMES = ("standard input", "standard output", "standard error")
PATIENCE = 30.0  # seconds for the last bytes to reach a slow disk


@contextmanager
def lent() -> Iterator[tuple[int, int, int]]:
    """Descriptors for the agent's 0, 1 and 2, until the container is gone.

    Two streams into one file stay in one order: they share a pipe.  Raises UsageError for a disk,
    and for a socket that leads on.
    """
    facts = [_facts(number) for number in range(3)]
    files = [number for number in range(3) if stat.S_ISREG(facts[number].st_mode)]
    given = [0, 1, 2]
    ours: list[int] = []
    cats: list[tuple[int, int]] = []
    try:
        for number in files:
            if number == 2 and 1 in files and os.path.samestat(facts[1], facts[2]):
                given[2] = given[1]
                continue
            ends = os.pipe2(os.O_CLOEXEC)
            theirs, other = ends if number == 0 else ends[::-1]
            ours.append(theirs)
            given[number] = theirs
            try:
                source, target = (0, other) if number == 0 else (other, number)
                pid = spawn([CAT], {0: source, 1: target, 2: 2}, session=True)
            finally:
                os.close(other)
            cats.append((pid, number))
        yield given[0], given[1], given[2]
    finally:
        for end in ours:
            os.close(end)
        for pid, number in cats:
            _wait(pid, kill=number == 0)  # what the agent has not read it will not read


def _facts(number: int) -> os.stat_result:
    """Raises UsageError for a disk, or a socket that leads on. (With a folder, which would lead to
    everything, Python itself does not start: Python/pylifecycle.c, init_sys_streams.)"""
    facts = os.fstat(number)
    if stat.S_ISBLK(facts.st_mode):
        raise UsageError(
            f"{NAMES[number]} is a disk: the agent could read and write all of it",
            hint="redirect it from or to a file, a pipe or /dev/null",
        )
    if stat.S_ISSOCK(facts.st_mode) and leads_on(number):
        raise UsageError(
            f"{NAMES[number]} is a socket of the host, and not just a connection: the agent could "
            "talk to anybody by it",
            hint="redirect it from or to a pipe, a connected stream or /dev/null",
        )
    return facts


def leads_on(fd: int) -> bool:
    """Whether who has this socket can reach others than its peer: it listens, is not connected, or
    is one of datagrams, which may each go elsewhere (but UNIX ones, as pairs are)."""
    import socket  # late: most streams are none

    with socket.socket(fileno=os.dup(fd)) as sock:
        if sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            return True
        inet = (socket.AF_INET, socket.AF_INET6)
        if sock.family != socket.AF_UNIX and not (
            sock.family in inet and sock.type == socket.SOCK_STREAM
        ):
            return True
        try:
            sock.getpeername()
        except OSError:
            return True
        return False


def _wait(pid: int, *, kill: bool) -> None:
    pidfd = os.pidfd_open(pid)
    try:
        if kill or not ended(pidfd, PATIENCE):
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        os.waitpid(pid, 0)
    finally:
        os.close(pidfd)
