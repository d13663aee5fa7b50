"""What the watchdog keeps open, without names, for an agent that outlives its supervisor."""

from __future__ import annotations

import os
import resource
import select
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from harness import wait_for

from mis_run import liveness, supervise
from mis_run.model import Liveness

pytestmark = pytest.mark.root
MANY = 700  # more than fit in two datagrams


@pytest.fixture
def dog(tmp_path: Path) -> Iterator[liveness.Watchdog]:
    """A watchdog that has not been given anything yet."""
    with (
        supervise.loop() as loop,
        (tmp_path / "record").open("a") as record,
        liveness.arm(
            loop, Liveness(), run_id="none", cgroup=tmp_path / "none", record=record.fileno()
        ) as dog,
    ):
        yield dog


def named(pid: int, name: str) -> int:
    """How many descriptors of a process are of the file with this name."""
    found = 0
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):  # closed since it was listed
            found += os.readlink(fd) == name
    return found


def test_all_stay_open_until_it_goes(dog: liveness.Watchdog) -> None:
    """As many as anybody sends; a pipe ends when the last copy of its writing end is closed."""
    reader, writer = os.pipe()
    copies = [os.dup(writer) for _ in range(MANY)]
    pipe = os.readlink(f"/proc/self/fd/{reader}")
    dog.watching({"one": reader}, copies)
    for fd in (writer, *copies):
        os.close(fd)
    # Both ends of a pipe have one name; what else it has open comes and goes while it begins.
    wait_for(lambda: named(dog.pid, pipe) == MANY + 1)
    ends = select.poll()
    ends.register(reader, select.POLLHUP)
    assert ends.poll(300) == []
    dog.farewell()
    assert ends.poll(1000)
    os.close(reader)


def test_what_it_cannot_keep_is_no_secret(dog: liveness.Watchdog, tmp_path: Path) -> None:
    """Without room for a descriptor it ends, upon which a supervisor kills the agent."""
    _, most = resource.prlimit(dog.pid, resource.RLIMIT_NOFILE)
    resource.prlimit(dog.pid, resource.RLIMIT_NOFILE, (50, most))
    pidfd = os.pidfd_open(dog.pid)
    reader, writer = os.pipe()
    dog.watching({}, [writer] * 100)
    ended = select.poll()
    ended.register(pidfd, select.POLLIN)
    assert ended.poll(5000)
    assert "watchdog.full" in (tmp_path / "record").read_text()
    for fd in (pidfd, reader, writer):
        os.close(fd)
