"""Between the person's terminal and the agent's: raw bytes both ways, sizes, and restoration.

The agent gets a pseudo-terminal of its own, never ours: with ours it could push characters into
the shell we return to (TIOCSTI) or leave it unusable.
"""

from __future__ import annotations

import fcntl
import os
import sys
import termios
import tty
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from mis_run.supervise import Loop

CHUNK = 64 << 10


@contextmanager
def relay(loop: Loop, master: int | None) -> Iterator[Callable[[], None]]:
    """Relay between our stdin/stdout and ``master`` (nothing when None).

    Yields a function that copies our window size to the agent's terminal; the caller calls it at
    SIGWINCH.  On the way out what the agent still wrote is shown and our terminal is as before.
    """
    if master is None:
        yield lambda: None
        return
    stdin, stdout = sys.stdin.fileno(), sys.stdout.fileno()
    before = termios.tcgetattr(stdin)
    os.set_blocking(master, False)

    def resize() -> None:
        with suppress(OSError):  # the agent's end may be closed already
            fcntl.ioctl(
                master, termios.TIOCSWINSZ, fcntl.ioctl(stdin, termios.TIOCGWINSZ, b"8" * 8)
            )

    def from_agent() -> None:
        try:
            data = os.read(master, CHUNK)
        except BlockingIOError:
            return
        except OSError:  # EIO: the last process on the other end is gone
            data = b""
        if not data:
            loop.remove(master)
            return
        _write_all(stdout, data)

    def from_person() -> None:
        data = os.read(stdin, CHUNK)
        if not data:
            loop.remove(stdin)
            return
        # A paste larger than the agent reads is dropped at the tty's own limit, as the kernel does.
        with suppress(BlockingIOError, OSError):
            os.write(master, data)

    resize()
    tty.setraw(stdin, termios.TCSADRAIN)
    loop.add(master, from_agent)
    loop.add(stdin, from_person)
    try:
        yield resize
    finally:
        loop.remove(stdin)
        loop.remove(master)
        with suppress(OSError):
            while data := os.read(master, CHUNK):
                _write_all(stdout, data)
        termios.tcsetattr(stdin, termios.TCSADRAIN, before)


def _write_all(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]
