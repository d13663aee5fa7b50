"""What the supervisor said last is heard, however it ended."""

from __future__ import annotations

import json
import socket

import pytest

from mis_run.errors import SetupError
from mis_run.oci.guardian import Guardian


@pytest.mark.parametrize("unread", [True, False])
def test_last_words_of_a_supervisor_that_did_not_listen(unread: bool) -> None:
    """It complained and ended while our pid was on its way, which the kernel reports first."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours:
        if unread:
            ours.send(b"12")
        theirs.send(json.dumps({"error": "why", "hint": "how", "code": 120}).encode())
        theirs.close()
        with pytest.raises(SetupError, match="why") as caught:
            Guardian(ours).run_dir()
        assert caught.value.exit_code == 120


def test_no_words() -> None:
    """An end without any is an error too."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    theirs.close()
    with ours, pytest.raises(SetupError, match="without a word"):
        Guardian(ours).run_dir()
