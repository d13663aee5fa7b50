"""Between the person's terminal and the agent's: raw bytes both ways, sizes, and restoration.

The agent gets a pseudo-terminal of its own, never ours: with ours it could push characters into
the shell we return to (TIOCSTI) or leave it unusable.  Nothing here blocks, however slowly the
person's terminal takes its output or the agent its input: the loop also answers guards.
"""

from __future__ import annotations

import fcntl
import os
import select
import signal
import sys
import termios
import tty
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from mis_run.hints import Any
from mis_run.supervise import Loop

CHUNK = 4096  # PIPE_BUF: a pipe that polls writable takes this much without blocking, pipe(7)
RETRY = 0.005  # seconds between attempts to write to somebody who does not take it
LAST = 2.0  # seconds for what the agent wrote before its end


class _Flow:
    """Bytes from ``source`` to ``target``; nothing more is read while some wait to be written."""

    def __init__(self, loop: Loop, source: int, target: int) -> None:
        self._loop = loop
        self._source = source
        self._target = target
        self._waiting = b""
        self._reading = False
        self.ended = False
        self.resume()

    def resume(self) -> None:
        """Read from the source whenever there is something."""
        if not self._reading and not self.ended:
            self._loop.add(self._source, self._arrived)
            self._reading = True

    def pause(self) -> None:
        """Leave the source alone."""
        if self._reading:
            self._loop.remove(self._source)
            self._reading = False

    def _arrived(self) -> None:
        try:
            data = os.read(self._source, CHUNK)
        except BlockingIOError:
            return
        except OSError:  # EIO: the other end of the terminal is gone
            data = b""
        if not data:
            self.pause()
            self.ended = True
            return
        self._waiting = data
        self._write()

    def _write(self) -> None:
        if self.ended:  # a timer that was set before the end
            return
        self.push()
        if self._waiting:
            self.pause()
            self._loop.after(RETRY, self._write)
        else:
            self.resume()

    def push(self) -> bool:
        """Write what can be written now; False when the target took nothing."""
        if not self._waiting or not _writable(self._target, 0):
            return False
        try:
            written = os.write(self._target, self._waiting)
        except BlockingIOError:
            return False
        except OSError:  # nobody is there any more to see it
            written = len(self._waiting)
        self._waiting = self._waiting[written:]
        return True

    def finish(self, seconds: float) -> None:
        """Bring over what is still there, waiting at most ``seconds`` for the target to take it."""
        self.pause()
        tries = int(seconds / RETRY)
        while tries > 0:
            if not self._waiting:
                try:
                    self._waiting = os.read(self._source, CHUNK)
                except OSError:  # EIO or EAGAIN: that was all
                    break
                if not self._waiting:
                    break
            if not self.push():
                _writable(self._target, RETRY)
                tries -= 1
        self.ended = True


def _writable(fd: int, seconds: float) -> bool:
    poll = select.poll()
    poll.register(fd, select.POLLOUT)
    return bool(poll.poll(seconds * 1000))


def in_foreground(fd: int) -> bool:
    """Whether we may change this terminal: a background job would be stopped by SIGTTOU."""
    try:
        return os.tcgetpgrp(fd) == os.getpgrp()
    except OSError:  # not our controlling terminal
        return False


def _restore(fd: int, before: list[Any]) -> None:
    """Give the terminal back, also from the background (the signal is blocked) and when it is
    gone."""
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTTOU})
    try:
        termios.tcsetattr(fd, termios.TCSADRAIN, before)
    except termios.error:  # hung up meanwhile: nothing to restore
        return
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


@contextmanager
def relay(loop: Loop, master: int | None) -> Iterator[Callable[[], None]]:
    """Relay between our stdin/stdout and ``master`` (nothing when None).

    Yields a function that copies our window size to the agent's terminal; the caller calls it at
    SIGWINCH.  On the way out what the agent still wrote is shown and our terminal is as before.
    """
    if master is None:
        yield lambda: None
        return
    stdin = sys.stdin.fileno()
    before = termios.tcgetattr(stdin)
    os.set_blocking(master, False)
    stdout, opened = _without_blocking(sys.stdout.fileno())

    def resize() -> None:
        with suppress(OSError):  # the agent's end may be closed already
            size = fcntl.ioctl(stdin, termios.TIOCGWINSZ, bytes(8))
            fcntl.ioctl(master, termios.TIOCSWINSZ, size)

    resize()
    tty.setraw(stdin, termios.TCSADRAIN)
    from_agent = from_person = None
    try:
        from_agent = _Flow(loop, master, stdout)
        from_person = _Flow(loop, stdin, master)
        yield resize
    finally:
        if from_person:
            from_person.pause()
            from_person.ended = True
        if from_agent:
            from_agent.finish(LAST)
        _restore(stdin, before)
        if opened:
            os.close(stdout)


def _without_blocking(fd: int) -> tuple[int, bool]:
    """A descriptor for the same terminal whose writes do not block, and whether it is a new one.

    Not O_NONBLOCK on ``fd`` itself: the shell we came from shares that.
    """
    try:
        name = os.ttyname(fd)
        return os.open(name, os.O_WRONLY | os.O_NOCTTY | os.O_NONBLOCK | os.O_CLOEXEC), True
    except OSError:  # a pipe, a file, or a terminal of another mount namespace: poll must do
        return fd, False
