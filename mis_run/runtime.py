"""The OCI runtime (runc or crun): find it, create a held container, start it, see it gone.

``create`` leaves the container waiting before its first instruction; guards go into that gap.
Out of scope: what the container is (`bundle`), talking to it (`box`), its cgroup (`cgroup`).
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from mis_run.box import Box as Box
from mis_run.box import ended
from mis_run.bundle import LIFELINE
from mis_run.dataclass import dataclass
from mis_run.errors import GuardLost, SetupError
from mis_run.hints import Any
from mis_run.linux import libc, programs
from mis_run.linux.spawn import spawn
from mis_run.model import Finding

CRUN_READS = Path("/sys/fs/cgroup/unified/cgroup.controllers")  # there in hybrid mode only
CREATE = 30.0  # seconds a runtime may take to create a container on a loaded machine
HINTS = {
    "read-only file system": "are we in a container? it needs --privileged and writable cgroups",
    "setrlimit": "CAP_SYS_RESOURCE is missing; runc does without it: MIS_RUNTIME=runc",
    "operation not permitted": "run as root; inside a container that takes --privileged",
    "seccomp": "the runtime must be built with seccomp, and the kernel have CONFIG_SECCOMP_FILTER",
    "cgroup": "mis doctor shows which cgroups can be used",
    "mkdir": "a bind needs a place: its target lies in a read-only part of the container",
}
"""What a runtime's words point to, more telling parts first."""


@dataclass(frozen=True)
class Chosen:
    """The runtime that will be used, or why there is none."""

    path: Path | None
    finding: Finding


def find() -> Chosen:
    """$MIS_RUNTIME, else crun, which makes a container in a third of runc's time, else runc.

    No version is asked: that would take a process, and `create` would say.
    """
    wanted = os.environ.get("MIS_RUNTIME")
    for name in (wanted,) if wanted else ("crun", "runc"):
        path = programs.find(name)
        if path is not None and (wanted or name == "runc" or _suits(Path(path))):
            return Chosen(Path(path), Finding(True, path))
    why = f"{wanted or 'neither runc nor a crun of 0.20 or newer'} is not installed"
    return Chosen(None, Finding(False, f"no OCI runtime: {why}", "apt-get install runc"))


def _suits(crun: Path) -> bool:
    """Whether this crun has seccomp-notify (since 0.20: its parser knows the word), and may raise
    RLIMIT_MEMLOCK, as it does where devices are limited by a BPF program, without v1."""
    try:
        knows = b"listenerPath" in crun.read_bytes()
    except OSError:
        return False
    return knows and (CRUN_READS.exists() or _may_lock())


def _may_lock() -> bool:
    """In a container of an engine CAP_SYS_RESOURCE is often missing."""
    import resource

    limits = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    try:
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (resource.RLIM_INFINITY,) * 2)
    except (OSError, ValueError):
        return False
    resource.setrlimit(resource.RLIMIT_MEMLOCK, limits)
    return True


def suit(runtime: Path) -> None:
    """Let crun run where v1 controllers are mounted beside v2: call it after `rootfs.isolate`.

    It refuses only if v2 has controllers of its own ("cgroups in hybrid mode not supported, drop
    all controllers from cgroupv2"), as hugetlb where nobody has mounted that.  We limit nothing by
    those, so in our own mount namespace that list is empty.
    """
    if runtime.name == "crun" and CRUN_READS.exists() and CRUN_READS.read_text():
        libc.mount(os.devnull, str(CRUN_READS), "", libc.MS_BIND)


def subreaper() -> None:
    """Become the parent of containers whose runtime has exited (PR_SET_CHILD_SUBREAPER)."""
    libc.prctl(libc.PR_SET_CHILD_SUBREAPER, 1)


@contextmanager
def create(
    config: dict[str, Any],
    *,
    runtime: Path,
    run_id: str,
    folder: Path,
    meanwhile: Callable[[], object] = lambda: None,
) -> Iterator[Box]:
    """Write the bundle, create the container, and remove every trace of it on the way out.

    ``meanwhile`` is called while the runtime works, which is the longest wait of a launch.

    A seccomp-notify descriptor is received where the configuration has a ``listenerPath`` (by
    `started` where the runtime sends it only then), a terminal where ``process.terminal`` is set.
    Raises SetupError with the runtime's own words.
    """
    (folder / "config.json").write_text(json.dumps(config))
    base = [str(runtime), "--root", str(folder / "oci")]
    with ExitStack() as stack:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        stack.callback(ours.close)
        stack.callback(theirs.close)
        argv = [*base, "--log", str(folder / "oci.log"), "--log-format", "json", "create"]
        argv += ["--bundle", str(folder), "--pid-file", str(folder / "pid"), "--preserve-fds", "1"]
        console = listener = None
        if config["process"]["terminal"]:
            console = _listen(stack, folder / "console.sock")
            argv += ["--console-socket", str(folder / "console.sock")]
        if path := config["linux"].get("seccomp", {}).get("listenerPath"):
            listener = _listen(stack, Path(path))
        _create([*argv, run_id], theirs, folder, meanwhile)
        theirs.close()
        pid = int((folder / "pid").read_text())
        box = Box(base, run_id, pid, ours)
        stack.callback(_end, box)
        if console is not None:
            box.pty = receive(console)
            stack.callback(os.close, box.pty)
        if listener is not None:
            stack.callback(_close_listener, box)
            box.seccomp_fd, box.seccomp_later = filter_of(listener)
        yield box


def _create(
    argv: list[str], lifeline: socket.socket, folder: Path, meanwhile: Callable[[], object]
) -> None:
    """`runtime create`, with the lifeline as descriptor 3.

    It dies with us: a runtime orphaned by our SIGKILL would finish a container nobody owns.
    """
    with open(os.devnull, "r+b") as nothing:
        # Not our stdin, stdout and stderr: runc makes the agent's user their owner
        # (fixStdioPermissions), which would change files on the host.  `Box.go` hands them over.
        fds = {number: nothing.fileno() for number in range(3)} | {LIFELINE: lifeline.fileno()}
        try:
            pid = spawn(argv, fds, die_with_us=True)
        except OSError as error:
            words = f"cannot run {argv[0]}: {error.strerror}"
            raise SetupError(words, hint="mis doctor") from error
    pidfd = os.pidfd_open(pid)
    try:
        meanwhile()
        if not ended(pidfd, CREATE):
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            raise SetupError(f"{argv[0]} create did not finish in {CREATE:g} s", hint="mis doctor")
    finally:
        os.close(pidfd)
    _, status = os.waitpid(pid, 0)
    if status:
        words = _words(folder / "oci.log")
        raise SetupError(f"{argv[0]} create failed: {words}", hint=_hint(words))


def _words(log: Path) -> str:
    """The last error line of a runtime's JSON log."""
    words = "no reason given"
    with suppress(OSError):
        for line in log.read_text(errors="replace").splitlines():
            with suppress(ValueError, TypeError, KeyError):
                entry = json.loads(line)
                if entry["level"] in ("error", "fatal"):
                    words = str(entry["msg"])
    return words[-400:]


def _hint(words: str) -> str:
    """The next step for what runtimes commonly say."""
    for part, hint in HINTS.items():
        if part in words.lower():
            return hint
    return "mis doctor"


def _listen(stack: ExitStack, path: Path) -> socket.socket:
    listener = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
    listener.bind(str(path))
    listener.listen(1)
    listener.settimeout(5.0)
    stack.callback(path.unlink, missing_ok=True)
    return listener


def receive(listener: socket.socket) -> int:
    """The descriptor a runtime sent to one of our sockets."""
    with _accept(listener) as peer:
        return received(peer)


def filter_of(listener: socket.socket) -> tuple[int | None, socket.socket | None]:
    """The seccomp-notify descriptor if it was sent, else the connection by which it will come.

    runc installs the filter during `create`.  crun connects then, but installs it, as no_new_privs
    allows, right before it executes the container's init, so after `start` (container_init in its
    src/libcrun/container.c).
    """
    peer = _accept(listener)
    if not select.select([peer], [], [], 0)[0]:
        return None, peer
    with peer:
        return received(peer), None


def started(box: Box) -> None:
    """Run the container's init; afterwards its filter's descriptor is there.

    Nothing of the agent runs yet, and the init makes none of the calls that would wait for us.
    """
    box.start()
    if box.seccomp_later is not None:
        with box.seccomp_later as peer:
            box.seccomp_later = None
            box.seccomp_fd = received(peer)


def _close_listener(box: Box) -> None:
    if box.seccomp_fd is not None:
        os.close(box.seccomp_fd)
    if box.seccomp_later is not None:
        box.seccomp_later.close()


def _accept(listener: socket.socket) -> socket.socket:
    try:
        peer, _ = listener.accept()
    except OSError as error:
        raise SetupError(f"the runtime sent no descriptor: {error}") from error
    peer.settimeout(5.0)
    return peer


def received(peer: socket.socket) -> int:
    """The one descriptor that comes by a connection. Raises SetupError."""
    try:
        _, fds, _, _ = socket.recv_fds(peer, 64 << 10, 4)
    except OSError as error:
        raise SetupError(f"the runtime sent no descriptor: {error}") from error
    for extra in fds[1:]:
        os.close(extra)
    if not fds:
        raise SetupError("the runtime sent no descriptor")
    return fds[0]


def _end(box: Box) -> None:
    """Kill the container's init (the kernel takes its pid namespace along) and reap it.

    Raises GuardLost when it does not end: something of the agent may then still run.
    """
    with suppress(ProcessLookupError):
        signal.pidfd_send_signal(box.pidfd, signal.SIGKILL)
    try:
        if not box.wait():
            raise GuardLost(f"the container's init (pid {box.pid}) does not die", hint="mis gc")
        with suppress(ChildProcessError):  # not ours when we are no subreaper
            os.waitid(os.P_PIDFD, box.pidfd, os.WEXITED)
    finally:
        box.close()
