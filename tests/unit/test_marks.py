"""The mounts to guard, when the process that shows them ends meanwhile."""

from __future__ import annotations

import os

import pytest

from mis_run.errors import SetupError
from mis_run.guards import freeze_mounts, marks


def test_a_process_that_ended() -> None:
    """Dead and not yet waited for, and then gone, it is no failure of a guard: the heartbeat that
    met it lets the run end as the agent did. The control: while it lives, its mounts are told."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(writer)
        os.read(reader, 1)
        os._exit(0)
    assert marks.mounts(pid)
    pidfd = os.pidfd_open(pid)
    os.close(writer)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    with pytest.raises(SetupError, match="has ended"):
        marks.mounts(pid)
    assert freeze_mounts.read_only(pid, pidfd, "/") == []  # nor is it one of DEFCON's
    os.waitpid(pid, 0)
    os.close(pidfd)
    os.close(reader)
    with pytest.raises(SetupError, match="has ended"):
        marks.mounts(pid)
