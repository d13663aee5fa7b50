"""Between the call that makes a container and the supervisor that outlives it: fork, and hear.

The call waits until the supervisor says that the container is guarded; if it dies or complains
instead, the call fails and the container is removed.  The supervisor belongs to no session, holds
none of the engine's descriptors (an engine waits for the end of its pipes) and logs to `LOG`.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mis_run import startup, state
from mis_run.errors import MisError, SetupError
from mis_run.hints import Any
from mis_run.linux import programs
from mis_run.oci.order import CANARY, INFO, RESOLV_CONF, SOCKET, Order, Place
from mis_run.report import RECORDS

LOG = RECORDS / "oci.log"
LOG_BYTES = 1 << 20  # it is begun anew beyond
PATIENCE = 60.0  # seconds for each word of the supervisor, on a loaded machine
MESSAGE = 16 << 10


class Guardian:
    """The caller's end: the supervisor's words, one after the other."""

    def __init__(self, channel: socket.socket) -> None:
        self._channel = channel

    def run_dir(self) -> Path:
        """Where the run's files are. Raises SetupError."""
        return Path(str(self._hear("run")))

    def guard(self, pid: int) -> None:
        """Have the container of ``pid`` guarded, and see that it is. Raises MisError."""
        with suppress(OSError):  # it ended: what it said is still to be heard
            self._channel.send(str(pid).encode())
        self._hear("guarded")

    def _hear(self, word: str) -> Any:
        if not select.select([self._channel], [], [], PATIENCE)[0]:
            raise SetupError(f"the supervisor said nothing in {PATIENCE:g} s", hint=f"see {LOG}")
        raw = self._receive() or b""
        if not raw:
            raise SetupError("the supervisor ended without a word", hint=f"see {LOG}")
        words = json.loads(raw)
        if "error" in words:
            error = SetupError(str(words["error"]), hint=str(words["hint"]))
            error.exit_code = int(words["code"])
            raise error
        return words[word]

    def _receive(self) -> bytes | None:
        """The next word; nothing at the end.

        A supervisor that has ended with our pid unread is reported first, once, and before its
        last words, which are still there (unix_release_sock: ECONNRESET).
        """
        for _ in range(2):
            with suppress(ConnectionError):
                return self._channel.recv(MESSAGE)
        return None


class _Caller:
    """The supervisor's end."""

    def __init__(self, channel: socket.socket) -> None:
        self._channel = channel

    def say(self, **words: Any) -> None:
        with suppress(OSError):  # the caller was killed: it will not start anything
            self._channel.send(json.dumps(words).encode()[:MESSAGE])
        if "guarded" in words:
            self._channel.close()

    def pid(self) -> int:
        raw = self._channel.recv(64)
        if not raw:
            raise SetupError("the container was not made")
        return int(raw)


@contextmanager
def start(order: Order) -> Iterator[Guardian]:
    """A supervisor of its own for one container; it ends with us unless it guards one by then."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    sys.stdout.flush()
    sys.stderr.flush()
    if os.fork() == 0:
        _be_supervisor(order, theirs)
    theirs.close()
    with ours:
        yield Guardian(ours)


def _be_supervisor(order: Order, channel: socket.socket) -> None:
    code = MisError.exit_code
    caller = _Caller(channel)
    try:
        _detach(channel.fileno())
        _claim_and_guard(order, caller)
        code = 0
    except MisError as error:
        print(f"{order.container}: {error.message}", file=sys.stderr)
        caller.say(error=error.message, hint=error.hint, code=error.exit_code)
        code = error.exit_code
    except BaseException as error:  # noqa: BLE001 - said to the caller, logged, and our end
        import traceback

        traceback.print_exc()
        caller.say(error=f"the supervisor failed: {error}", hint=f"see {LOG}", code=code)
    finally:
        sys.stderr.flush()
        os._exit(code)


def _claim_and_guard(order: Order, caller: _Caller) -> None:
    """First what the container's configuration names; all else while the container is made."""
    with (
        state.create(order.name) as run_dir,
        socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener,
    ):
        listener.bind(str(run_dir.path / SOCKET))
        listener.listen(16)
        listener.settimeout(5.0)
        resolv_conf = run_dir.path / RESOLV_CONF
        resolv_conf.touch()
        resolv_conf.chmod(0o644)
        info = run_dir.path / INFO
        info.mkdir(mode=0o755)
        info.chmod(0o755)
        (info / CANARY).touch()
        (info / CANARY).chmod(0o555)
        caller.say(run=str(run_dir.path))
        startup.reach_installed()
        from mis_run.oci.supervisor import supervise_container  # late: runc works meanwhile

        startup.settled()

        supervise_container(order, run_dir, Place(listener, resolv_conf, info), caller)


def _detach(channel: int) -> None:
    """Leave the engine's session, directory, environment and descriptors."""
    os.setsid()
    os.chdir("/")
    os.umask(0o077)
    os.environ.clear()
    os.environ.update(programs.environment())
    for one in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGCHLD):
        signal.signal(one, signal.SIG_DFL)
    with open(os.devnull, "r+b") as nothing:
        os.dup2(nothing.fileno(), 0)
        os.dup2(nothing.fileno(), 1)
        os.dup2(_log() or nothing.fileno(), 2)
    numbers = [int(entry.name) for entry in os.scandir("/proc/self/fd")]
    for number in numbers:
        if number > 2 and number != channel:
            with suppress(OSError):  # the listing's own
                os.close(number)


def _log() -> int | None:
    with suppress(OSError):
        RECORDS.mkdir(mode=0o700, parents=True, exist_ok=True)
        fd = os.open(LOG, os.O_CREAT | os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC, 0o600)
        if os.fstat(fd).st_size > LOG_BYTES:
            os.ftruncate(fd, 0)
        return fd
    return None
