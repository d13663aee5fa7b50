"""The OCI runtime (runc or crun): find it, create a held container, start it, see it gone.

``create`` leaves the container waiting before its first instruction; guards go into that gap.
Out of scope: what the container is (`bundle`), its cgroup's removal (`cgroup`).
"""

from __future__ import annotations

import array
import json
import os
import shutil
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mis_run.bundle import LIFELINE
from mis_run.errors import NotExecutable, NotFound, SetupError
from mis_run.linux import libc
from mis_run.linux.spawn import spawn
from mis_run.model import Finding


@dataclass(frozen=True, slots=True)
class Chosen:
    """The runtime that will be used, or why there is none."""

    path: Path | None
    finding: Finding


def find(cgroup: str) -> Chosen:
    """$MIS_RUNTIME, else runc, else crun. No version is asked: `create` would say."""
    wanted = os.environ.get("MIS_RUNTIME")
    names = (wanted,) if wanted else ("runc", "crun")
    for name in names:
        path = shutil.which(name) or shutil.which(name, path="/usr/sbin:/usr/local/sbin")
        if path is None:
            continue
        if Path(path).name == "crun" and cgroup == "hybrid":
            # crun 1.8.1: "cgroups in hybrid mode not supported".
            fix = "apt-get install runc"
            return Chosen(None, Finding(False, "crun does not run in hybrid cgroup mode", fix))
        return Chosen(Path(path), Finding(True, path))
    missing = f"no OCI runtime: {' or '.join(names)} is not installed"
    return Chosen(None, Finding(False, missing, "apt-get install runc"))


def subreaper() -> None:
    """Become the parent of containers whose runtime has exited (PR_SET_CHILD_SUBREAPER)."""
    libc.prctl(libc.PR_SET_CHILD_SUBREAPER, 1)


class Box:
    """A container that exists. ``turn`` runs the supervisor's loop once while we wait for it."""

    def __init__(self, runtime: list[str], run_id: str, pid: int, lifeline: socket.socket) -> None:
        self.pid = pid
        self.pidfd = os.pidfd_open(pid)
        self.lifeline = lifeline
        self.pty: int | None = None
        self.seccomp_fd: int | None = None
        self.turn: Callable[[], None] | None = None
        self._runtime = runtime
        self._id = run_id
        self._unread: list[tuple[str, int]] = []

    def start(self) -> None:
        """Run the shim. Raises SetupError."""
        _runtime([*self._runtime, "start", self._id], "start")

    def probe(self, act: str) -> int:
        """Have the shim try ``act``; the errno it met, 0 when it succeeded."""
        return self._request(f"probe {act}", "probed")

    def hold(self, *fds: int) -> None:
        """Give the shim copies of ``fds`` to keep open for as long as it lives."""
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))]
        self._request("hold", "held", rights)

    def on_loss(self, what: str) -> None:
        """Tell the shim what the end of the lifeline means: ``open`` or ``closed``."""
        self._request(f"onloss {what}", "ok")

    def go(self, command: str) -> None:
        """Execute the agent. Raises NotFound or NotExecutable as a shell would tell them apart."""
        error = self._request("go", "started", failed="failed")
        if error == 2:
            raise NotFound(f"{command}: not found in the container", hint="is it in PATH?")
        if error:
            raise NotExecutable(f"{command}: {os.strerror(error)}")

    def signal(self, number: int) -> None:
        """Send a signal to the agent's process group."""
        with suppress(OSError):  # it has just ended
            self.lifeline.send(f"signal {int(number)}".encode())

    def fileno(self) -> int:
        """The lifeline, readable when the shim reports."""
        return self.lifeline.fileno()

    def read(self) -> list[tuple[str, int]]:
        """All reports so far: ``("exit", code)``, ``("killed", signal)``, ``("closed", 0)``."""
        found, self._unread = self._unread, []
        while True:
            try:
                data = self.lifeline.recv(256, socket.MSG_DONTWAIT)
            except BlockingIOError:
                return found
            except ConnectionError:
                data = b""
            if not data:
                return [*found, ("closed", 0)]
            found.append(_parse(data))

    def _request(
        self, text: str, expected: str, rights: list[Any] | None = None, failed: str = ""
    ) -> int:
        try:
            self.lifeline.sendmsg([text.encode()], rights or [])
        except OSError as error:
            raise SetupError(f"the container's init is gone: {error.strerror}") from error
        while True:
            for report in self.read():
                if report[0] in (expected, failed):
                    return report[1]
                if report[0] == "closed":
                    raise SetupError(f"the container's init ended during: {text}")
                self._unread.append(report)
            if self.turn is None:
                raise SetupError("the container is not followed by a loop")
            self.turn()


def _parse(data: bytes) -> tuple[str, int]:
    word, _, value = data.decode("ascii", "replace").partition(" ")
    return word, int(value) if value.lstrip("-").isdigit() else 0


@contextmanager
def create(config: dict[str, Any], *, runtime: Path, run_id: str, folder: Path) -> Iterator[Box]:
    """Write the bundle, create the container, and remove every trace of it on the way out.

    A seccomp-notify descriptor is received where the configuration has a ``listenerPath``, a
    terminal where ``process.terminal`` is set.  Raises SetupError with the runtime's own words.
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
        _create([*argv, run_id], theirs, folder)
        theirs.close()
        pid = int((folder / "pid").read_text())
        box = Box(base, run_id, pid, ours)
        stack.callback(_end, box)
        if console is not None:
            box.pty = _receive(console)
            stack.callback(os.close, box.pty)
        if listener is not None:
            box.seccomp_fd = _receive(listener)
            stack.callback(os.close, box.seccomp_fd)
        yield box


def _create(argv: list[str], lifeline: socket.socket, folder: Path) -> None:
    """`runtime create`, with the lifeline as descriptor 3.

    It dies with us: a runtime orphaned by our SIGKILL would finish a container nobody owns.
    """
    fds = {0: 0, 1: 1, 2: 2, LIFELINE: lifeline.fileno()}
    try:
        pid = spawn(argv, fds, die_with_us=True)
    except OSError as error:
        raise SetupError(f"cannot run {argv[0]}: {error.strerror}", hint="mis doctor") from error
    _, status = os.waitpid(pid, 0)
    if status:
        raise SetupError(
            f"{argv[0]} create failed: {_words(folder / 'oci.log')}", hint="mis doctor"
        )


def _runtime(argv: list[str], what: str) -> None:
    done = subprocess.run(argv, capture_output=True, text=True, timeout=30, check=False)
    if done.returncode:
        raise SetupError(f"{argv[0]} {what} failed: {done.stderr.strip()[-300:]}")


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


def _listen(stack: ExitStack, path: Path) -> socket.socket:
    listener = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
    listener.bind(str(path))
    listener.listen(1)
    listener.settimeout(5.0)
    stack.callback(path.unlink, missing_ok=True)
    return listener


def _receive(listener: socket.socket) -> int:
    """The descriptor a runtime sent to one of our sockets."""
    try:
        peer, _ = listener.accept()
        with peer:
            peer.settimeout(5.0)
            _, fds, _, _ = socket.recv_fds(peer, 64 << 10, 4)
    except OSError as error:
        raise SetupError(f"the runtime sent no descriptor: {error}") from error
    for extra in fds[1:]:
        os.close(extra)
    if not fds:
        raise SetupError("the runtime sent no descriptor")
    return fds[0]


def _end(box: Box) -> None:
    """Kill the container's init (the kernel takes its pid namespace along) and reap it."""
    with suppress(ProcessLookupError):
        signal.pidfd_send_signal(box.pidfd, signal.SIGKILL)
    with suppress(ChildProcessError):
        os.waitid(os.P_PIDFD, box.pidfd, os.WEXITED)
    os.close(box.pidfd)
