"""A container that exists: the conversation with its init over the lifeline.

The other half is shim/init.c, which documents the protocol.  Out of scope: how it came to be
(`runtime`).
"""

from __future__ import annotations

import errno
import os
import select
import socket
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from mis_run.errors import NotExecutable, NotFound, SetupError
from mis_run.linux import programs

START = 5.0  # seconds a created container may take to begin
GONE = 10.0  # seconds after SIGKILL in which a container's last process must be gone
REPORTS = frozenset({"exit", "killed", "stopped"})  # what the shim says unasked


class Box:
    """A container that exists.

    ``turn`` runs the supervisor's loop once while we wait for an answer of the shim: what it tries
    may have to be answered by us.  Without one, we simply wait.
    """

    def __init__(self, runtime: list[str], run_id: str, pid: int, lifeline: socket.socket) -> None:
        self.pid = pid
        self.pidfd = os.pidfd_open(pid)
        self.lifeline = lifeline
        self.pty: int | None = None
        self.seccomp_fd: int | None = None
        self.seccomp_later: socket.socket | None = None  # where it comes once the shim is started
        self.turn: Callable[[], None] | None = None
        self._runtime = runtime
        self._id = run_id
        self._reports: deque[tuple[str, int]] = deque()
        self._answers: deque[tuple[str, int]] = deque()
        self._closed = False
        # Readable when the shim spoke, and also when what it said was read while we waited for
        # something else.
        self._pending = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._ready = select.epoll()
        self._ready.register(lifeline, select.EPOLLIN)
        self._ready.register(self._pending, select.EPOLLIN)

    def start(self) -> None:
        """Run the shim. Raises SetupError."""
        fifo = Path(self._runtime[2]) / self._id / "exec.fifo"
        release = RELEASES.get(Path(self._runtime[0]).name)
        if release is not None and release(fifo, self.pidfd):
            return
        _runtime([*self._runtime, "start", self._id], "start")

    def probe(self, act: str) -> int:
        """Have the shim try ``act`` (its words: shim/init.c); the errno it met, 0 for success."""
        return self.probe_all([act])[0]

    def probe_all(self, acts: Sequence[str]) -> list[int]:
        """The same for several, asked at once: it need not wait for us between them."""
        for act in acts:
            self._send(f"probe {act}")
        return [self._answer("probed", act) for act in acts]

    def hold(self, *fds: int) -> None:
        """Give the shim copies of ``fds`` to keep open for as long as it lives."""
        if self._request("hold", "held", fds=fds) != len(fds):
            raise SetupError("the container's init could not take every descriptor")

    def on_loss(self, what: str) -> None:
        """Tell the shim what the end of the lifeline means: ``open`` or ``closed``."""
        self._request(f"onloss {what}", "ok")

    def scope(self) -> None:
        """Have the agent, when it starts, reach no abstract sockets but its own."""
        self._request("scope", "ok")

    def go(self, command: str, stdio: tuple[int, int, int] | None = None) -> None:
        """Execute the agent with ``stdio`` as its 0, 1 and 2 (default: the container's own).

        Raises NotFound or NotExecutable as a shell would tell them apart; the shim then ends.
        """
        error = self._request("go", "started", failed="failed", fds=stdio or ())
        hint = "is it in PATH, and visible in the container? mis-run --dry-run shows what is hidden"
        if error < 0:
            problem = -error
            if problem in (errno.ENOENT, errno.ENOTDIR):
                raise NotFound(f"{command}: not found in the container", hint=hint)
            raise NotExecutable(f"{command}: {os.strerror(problem)}")

    def signal(self, number: int) -> None:
        """Send a signal to the agent's process group."""
        with suppress(OSError):  # it has just ended
            self.lifeline.send(f"signal {int(number)}".encode())

    def fileno(self) -> int:
        """Readable while `read` has something to say."""
        return self._ready.fileno()

    def read(self) -> list[tuple[str, int]]:
        """All reports so far: ``("exit", code)``, ``("killed", signal)``, ``("stopped", signal)``
        (job control), and ``("closed", 0)`` when no more can come."""
        self._pump()
        found = list(self._reports)
        self._reports.clear()
        with suppress(BlockingIOError):  # nothing was pending
            os.eventfd_read(self._pending)
        return [*found, ("closed", 0)] if self._closed else found

    def wait(self, seconds: float = GONE) -> bool:
        """Whether the container's init, and with it every process inside, ended in time."""
        return ended(self.pidfd, seconds)

    def close(self) -> None:
        """Give back the descriptors that are the box's own; the lifeline is not."""
        self._ready.close()
        os.close(self._pending)
        os.close(self.pidfd)

    def _pump(self) -> None:
        """Take every datagram that is there: answers apart from reports."""
        while not self._closed:
            try:
                data = self.lifeline.recv(256, socket.MSG_DONTWAIT)
            except BlockingIOError:
                return
            except ConnectionError:
                data = b""
            self._closed = not data
            word, value = _parse(data)
            if word in REPORTS:
                self._reports.append((word, value))
                os.eventfd_write(self._pending, 1)
            elif data:
                self._answers.append((word, value))

    def _request(
        self, text: str, expected: str, *, failed: str = "", fds: tuple[int, ...] = ()
    ) -> int:
        """The number in the answer, negative when the answer was ``failed``."""
        self._send(text, fds)
        return self._answer(expected, text, failed=failed)

    def _send(self, text: str, fds: tuple[int, ...] = ()) -> None:
        try:
            socket.send_fds(self.lifeline, [text.encode()], list(fds))
        except OSError as error:
            raise SetupError(f"the container's init is gone: {error.strerror}") from error

    def _answer(self, expected: str, asked: str, *, failed: str = "") -> int:
        while True:
            self._pump()
            while self._answers:
                word, value = self._answers.popleft()
                if word == expected:
                    return value
                if word == failed:
                    return -value
            if self._closed:
                raise SetupError(f"the container's init ended during: {asked}")
            if self.turn is not None:
                self.turn()
            else:
                select.select([self.lifeline], [], [])


def _parse(data: bytes) -> tuple[str, int]:
    word, value, *_ = [*data.decode("ascii", "replace").split(" "), ""]
    return word, int(value) if value.isdecimal() else 0


def ended(pidfd: int, seconds: float) -> bool:
    """Whether the process ended within ``seconds``; a pidfd then reads as ready, pidfd_open(2)."""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(seconds * 1000))


def _release_runc(fifo: Path, pidfd: int) -> bool:
    """Let a container of runc run, as `runc start` does, without 12 ms of starting runc for it.

    runc's init waits until somebody opens this fifo to read, and writes one byte into it
    (libcontainer/standard_init_linux.go and handleFifoResult in container_linux.go, runc 1.0 to
    1.3); once the fifo is gone `runc state` says "running".  False where there is no such fifo or
    no byte comes: then the runtime's own `start` decides.
    """
    try:
        fd = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        poll.register(pidfd, select.POLLIN)  # it died: nobody will write
        ready = [number for number, _ in poll.poll(START * 1000)]
        released = fd in ready and os.read(fd, 16) != b""
    finally:
        os.close(fd)
    if released:
        fifo.unlink(missing_ok=True)
    return released


def _release_crun(fifo: Path, pidfd: int) -> bool:
    """The same for crun, whose init reads the byte that `crun start` writes, the fifo being gone
    by then (libcrun_status_write_exec_fifo in src/libcrun/status.c)."""
    try:
        fd = os.open(fifo, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:  # there is none, or nobody reads (ENXIO)
        return False
    try:
        fifo.unlink()
        return os.write(fd, b"\0") == 1
    finally:
        os.close(fd)


RELEASES: dict[str, Callable[[Path, int], bool]] = {
    "runc": _release_runc,
    "crun": _release_crun,
}


def _runtime(argv: list[str], what: str) -> None:
    import subprocess  # late: 5 ms of import that runc never needs

    done = subprocess.run(
        argv, capture_output=True, text=True, timeout=30, check=False, env=programs.environment()
    )
    if done.returncode:
        raise SetupError(f"{argv[0]} {what} failed: {done.stderr.strip()[-300:]}")
