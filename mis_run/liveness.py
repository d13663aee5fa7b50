"""The supervisor's half of the watchdog: start it before the agent, beat, notice its death.

``closed``: whoever is lost, supervisor or watchdog, takes the agent along.  The watchdog holds a
copy of the shim's lifeline, so the kernel closes the last copy only when both processes are gone.
``open``: it holds everything that a new supervisor needs (`attach`, docs/decisions/watchdog.md).
"""

from __future__ import annotations

import os
import select
import signal
import socket
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from mis_run.box import ended
from mis_run.build import built
from mis_run.errors import SetupError
from mis_run.linux.spawn import spawn
from mis_run.model import Liveness
from mis_run.supervise import Loop

MOST_SENT = 253  # descriptors in one datagram: SCM_MAX_FD
PATIENCE = 5.0  # seconds it gets to take one


class Watchdog:
    """A running watchdog process; ``lost`` is called once if it dies before `dismiss`."""

    def __init__(
        self, loop: Loop, settings: Liveness, pid: int, beats: socket.socket, word: int | None
    ) -> None:
        self.pid = pid
        self._loop = loop
        self._beats = beats
        self._pidfd = os.pidfd_open(pid)
        self._done = False
        self._settings = settings
        self._word = word

    def watching(self, held: Mapping[str, int], kept: Sequence[int] = ()) -> None:
        """Wait until it watches, and give it copies of the descriptors that must not be closed
        before the agent is gone: by name (shim/watchdog.c), and those that only have to stay open.
        Raises SetupError."""
        assert self._word is not None
        with os.fdopen(self._word, "rb") as word:
            if word.read() != b"watching\n":
                raise SetupError("the watchdog did not start", hint="mis doctor")
        for name, fd in held.items():
            self.hold(name, fd)
        for first in range(0, len(kept), MOST_SENT):
            self._keep(kept[first : first + MOST_SENT])

    def _keep(self, fds: Sequence[int]) -> None:
        poll = select.poll()
        poll.register(self._beats, select.POLLOUT)
        poll.poll(PATIENCE * 1000)  # the queue is full until it has read
        try:
            socket.send_fds(self._beats, [b"hold"], fds)
        except OSError as error:
            raise SetupError(
                f"the watchdog cannot keep {len(fds)} files open: {error.strerror}"
            ) from error

    def hold(self, name: str, fd: int) -> None:
        """Give it a copy of one more descriptor. Raises SetupError when it cannot take that."""
        try:
            socket.send_fds(self._beats, [f"hold {name}".encode()], [fd])
        except OSError as error:
            raise SetupError(f"the watchdog cannot hold {name}: {error.strerror}") from error

    def drop(self, name: str) -> None:
        """What it holds under this name is not needed any more."""
        self._send(f"drop {name}".encode())

    def start(self, lost: Callable[[], None], heard: Callable[[str], None]) -> None:
        """Beat from now on, the first time at once: a supervisor that stops before its loop turns
        would never be missed. ``heard`` gets ``late`` and ``recovered``."""
        self._send(b"beat")
        self._loop.every(self._settings.beat, lambda: self._send(b"beat"))

        def gone() -> None:
            self._loop.remove(self._pidfd)
            if not self._done:
                lost()

        def listen() -> None:
            try:
                words = self._beats.recv(64)
            except (BlockingIOError, ConnectionError):
                words = b""
            if words:
                heard(words.decode("ascii", "replace"))
            else:
                self._loop.remove(self._beats.fileno())

        self._loop.add(self._pidfd, gone)
        self._loop.add(self._beats.fileno(), listen)

    def pause(self) -> None:
        """We are about to be stopped on purpose (Ctrl-Z)."""
        self._send(b"pause")

    def resume(self) -> None:
        """We go on."""
        self._send(b"resume")

    def frozen(self, on: bool) -> None:
        """We are about to freeze the agent, or it goes on."""
        self._send(b"frozen" if on else b"thawed")

    def farewell(self) -> None:
        """The agent is gone: the watchdog may go too. What it held is the last copy, and the kernel
        takes its time to release that, so the rest is undone meanwhile."""
        self._done = True
        self._send(b"bye")

    def dismiss(self) -> None:
        """The run is over: the watchdog has gone, or goes, and is waited for."""
        self.farewell()
        self._loop.remove(self._pidfd)
        self._loop.remove(self._beats.fileno())
        self._beats.close()
        with suppress(ProcessLookupError):  # it has heard "bye" already
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
        ended(self._pidfd, 5.0)
        os.close(self._pidfd)
        with suppress(ChildProcessError):  # another supervisor's child
            os.waitpid(self.pid, 0)

    def _send(self, words: bytes) -> None:
        try:
            self._beats.send(words)
        except (BlockingIOError, ConnectionError):
            return  # full: it has beats enough; gone: its pidfd tells us


@contextmanager
def arm(
    loop: Loop,
    settings: Liveness,
    *,
    run_id: str,
    cgroup: Path,
    record: int,
    moves: tuple[int, int] | None = None,
) -> Iterator[Watchdog]:
    """Start the watchdog; `Watchdog.watching` waits for it. Raises SetupError.

    ``record`` is the descriptor of the run's record, opened for appending, ``moves`` those of
    `Cgroup.beside`; without them it stays in our cgroup.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.setblocking(False)
    reader, writer = os.pipe()
    itself = os.pidfd_open(os.getpid())
    argv = [str(built("mis-watchdog")), run_id, str(cgroup)]
    argv += [str(round(seconds * 1000)) for seconds in (settings.deadline, settings.beat)]
    argv += [settings.on_loss.value, "--"]
    argv += [sys.executable, "-I", "-c", "from mis_run import gc; gc.collect()"]
    fds = {1: writer, 2: 2, 3: theirs.fileno(), 4: itself, 5: record}
    with open(os.devnull, "r+b") as nothing:
        enter, leave = moves or (nothing.fileno(), nothing.fileno())
        pid = spawn(argv, {0: nothing.fileno(), **fds, 6: enter, 7: leave})
    theirs.close()
    os.close(writer)
    os.close(itself)
    dog = Watchdog(loop, settings, pid, ours, reader)
    try:
        yield dog
    finally:
        dog.dismiss()


@contextmanager
def adopt(loop: Loop, settings: Liveness, pid: int, beats: socket.socket) -> Iterator[Watchdog]:
    """The watchdog of a run whose supervisor was lost, over the connection that it answers on."""
    beats.setblocking(False)
    dog = Watchdog(loop, settings, pid, beats, None)
    try:
        yield dog
    finally:
        dog.dismiss()
