"""The engine's container as the supervisor sees it: its cgroup, its init, a canary beside it."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path, PurePosixPath

from mis_run import cgroup_kill
from mis_run.box import Box
from mis_run.build import built
from mis_run.cgroup import Cgroup
from mis_run.cgroup_detect import places
from mis_run.errors import SetupError, VerifyError
from mis_run.linux.spawn import spawn
from mis_run.model import Host

LIFELINE, CGROUP, INIT = 3, 4, 5  # the canary's descriptors, see shim/init.c
FILTERED = "2"  # SECCOMP_MODE_FILTER in proc_pid_status(5)


class EngineCgroup(Cgroup):
    """A cgroup that the engine made, will remove, or will use again: identity, numbers, killing."""

    def kill(self) -> None:
        """As `Cgroup.kill`, and thawed: a container made here again must not begin frozen.

        What an engine has paused by the v1 freezer dies only when that thaws.
        """
        super().kill()
        cgroup_kill.freeze(self.unified, on=False, timeout=0.0)
        if freezer := self._v1.get("freezer"):
            cgroup_kill.freeze_v1(freezer, on=False, timeout=0.1)


def cgroup_of(pid: int, host: Host) -> EngineCgroup:
    """The cgroup of a container's init. Raises SetupError when it is not the container's alone."""
    assert host.unified is not None
    try:
        paths = places(Path(f"/proc/{pid}"))
    except OSError as error:
        raise SetupError(f"the container's init (pid {pid}) ended: {error.strerror}") from error
    place, ours = PurePosixPath(paths[""]), PurePosixPath(places()[""])
    if ours.is_relative_to(place) or not (host.unified / str(place)[1:]).is_dir():
        raise SetupError(
            f"the container has no cgroup of its own (cgroup v2: {place})",
            hint="mis-run tells containers apart by their cgroups; see docs/docker.md",
        )
    controllers = {
        name: top
        for name, top in host.controllers.items()
        if top == host.unified or paths.get(name) == str(place)
    }
    return EngineCgroup(place.name, host.unified, controllers, place.parent, leaf="")


def check_filter(pid: int) -> None:
    """The container's init waits behind its filter and cannot gain rights. Raises VerifyError."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError as error:
        raise SetupError(f"the container's init (pid {pid}) ended") from error
    status = {key: value.strip() for key, _, value in (line.partition(":") for line in lines)}
    if status.get("Seccomp") != FILTERED or status.get("NoNewPrivs") != "1":
        raise VerifyError(
            "escape guard: the container's init has no seccomp filter, or may gain rights "
            f"(Seccomp {status.get('Seccomp')}, NoNewPrivs {status.get('NoNewPrivs')})",
            hint="the OCI runtime must be built with seccomp: runc --version",
        )


class EngineBox(Box):
    """The container's init, which is not our child and has no shim of ours.

    What is tried inside the container's cgroup is tried by a canary (`canary`).
    """

    def __init__(self, pid: int) -> None:
        self._ours, self.theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            super().__init__([], "", pid, self._ours)
        except OSError as error:
            raise SetupError(f"the container's init (pid {pid}) ended") from error

    def signal(self, number: int) -> None:
        """Send a signal to the container's init."""
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.pidfd, number)

    def read(self) -> list[tuple[str, int]]:
        """Nothing: only its end is seen, by its pidfd."""
        return []

    def canary(self) -> int:
        """The pid of the canary, which has just been started. Raises SetupError."""
        return self._answer("canary", "its start")

    def close(self) -> None:
        """Give back every descriptor."""
        super().close()
        self._ours.close()
        self.theirs.close()


@contextmanager
def box_of(pid: int) -> Iterator[EngineBox]:
    """The box around a container's init."""
    box = EngineBox(pid)
    try:
        yield box
    finally:
        box.close()


@contextmanager
def canary(box: EngineBox, group: Cgroup) -> Iterator[int]:
    """A process of ours in the container's cgroup and among its mounts, which `Box.probe` talks
    to; yields its pid.

    It is `mis-init`, as in a container of our own, but in our other namespaces and without the
    container's filter.
    """
    with ExitStack() as stack:
        fd = os.open(group.unified, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        stack.callback(os.close, fd)
        nothing = stack.enter_context(open(os.devnull, "r+b")).fileno()
        fds = dict.fromkeys(range(3), nothing)
        fds |= {LIFELINE: box.theirs.fileno(), CGROUP: fd, INIT: box.pidfd}
        numbers = map(str, (LIFELINE, CGROUP, INIT))
        starter = spawn([str(built("mis-init")), *numbers, "--", "true"], fds)
        box.theirs.close()
        if os.waitpid(starter, 0)[1]:
            raise SetupError(
                f"no process can be made in {group.unified}, or among the mounts of pid {box.pid}",
                hint="mis-run needs Linux 5.7 or later for an engine's containers",
            )
        pid = box.canary()
        stack.callback(os.waitpid, pid, 0)
        stack.callback(os.kill, pid, signal.SIGKILL)
        yield pid
