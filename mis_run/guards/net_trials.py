"""The proof that the network guard works: forbidden acts, each refused *and* counted.

All are tried before the agent's first instruction, so nobody else is in its cgroup.
"""

from __future__ import annotations

import errno
import os
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager

from mis_run import rules
from mis_run.errors import VerifyError
from mis_run.guards import net_frames

PATIENCE = 2.0  # seconds until a packet is counted: under load ksoftirqd takes it later
Probe = Callable[[str], int]
Probes = Callable[[Sequence[str]], list[int]]
Counters = Callable[[str], Mapping[str, int]]
"""A hook's counters as of now."""

STREAM, DGRAM = int(socket.SOCK_STREAM), int(socket.SOCK_DGRAM)
CALLS = {
    "connect4": f"connect 2 {STREAM} {rules.CANARY4} 9",
    "connect6": f"connect 10 {STREAM} {rules.CANARY6} 9",
    "sendmsg4": f"send 2 {DGRAM} {rules.CANARY4} 9",
    "sendmsg6": f"send 10 {DGRAM} {rules.CANARY6} 9",
    "bind4": f"bind 2 {DGRAM} {rules.CANARY4} 9",
    "bind6": f"bind 10 {DGRAM} {rules.CANARY6} 9",
}


def calls(probes: Probes, counters: Counters) -> None:
    """One forbidden address per system call and family. Raises VerifyError."""
    before = {hook: counters(hook)["denied"] for hook in CALLS}
    for hook, error in zip(CALLS, probes([*CALLS.values()]), strict=True):
        if error == errno.EAFNOSUPPORT and hook.endswith("6"):
            continue  # a kernel without IPv6 has no IPv6 to guard
        if error != errno.EPERM:
            met = os.strerror(error) if error else "it succeeded"
            raise VerifyError(f"network guard {hook}: the forbidden act was not refused: {met}")
        if counters(hook)["denied"] == before[hook]:
            raise VerifyError(f"network guard {hook}: the refusal was not counted")


def beat(probe: Probe, counters: Counters, *, enforce: bool) -> int:
    """One forbidden connection while the agent runs; how many refusals that made.

    0 when the init met something else, as without memory. Raises VerifyError.
    """
    before = counters("connect4")
    error = probe(CALLS["connect4"])
    if error == 0 and enforce:
        raise VerifyError("network guard connect4: a forbidden connection was not refused")
    if error not in (0, errno.EPERM):
        return 0
    after = counters("connect4")
    if after["denied"] + after["audited"] == before["denied"] + before["audited"]:
        raise VerifyError("network guard connect4: the refusal was not counted")
    return 1


def sockets(probes: Probes, counters: Counters, *, enforce: bool) -> None:
    """A socket that is neither TCP nor UDP. Raises VerifyError."""
    before = counters("sock_create")
    # UDP-Lite (136) and MPTCP (262): whichever this kernel has reaches the hook.
    tried = probes([f"socket 2 {kind} {protocol}" for kind, protocol in ((2, 136), (1, 262))])
    after = counters("sock_create")
    refused = after["denied"] + after["audited"] - before["denied"] - before["audited"]
    if 0 in tried and enforce:
        raise VerifyError("network guard sock_create: a forbidden socket was made")
    if not refused and errno.EPERM in tried:
        raise VerifyError("network guard sock_create: the refusal was not counted")


def packets(
    probes: Probes, counters: Counters, passing: Callable[[], AbstractContextManager[None]]
) -> None:
    """A packet to one canary and the answer of another, both over loopback. Raises VerifyError.

    ``passing`` lets them pass the system calls' hooks meanwhile.
    """
    with passing():
        before = {hook: counters(hook) for hook in ("egress", "ingress")}
        # Nobody listens at the second: what comes in is the refusal of the connection.
        out = (f"send 2 {DGRAM} {rules.CANARY_OUT} 9", f"connect 2 {STREAM} {rules.CANARY_IN} 9")
        if probes(out)[0] != errno.EPERM:
            raise VerifyError("network guard egress: a forbidden packet was not refused")
        _await_denials(before, counters)


def frames(netns: int, sources: tuple[str, str], counters: Counters) -> None:
    """Frames sent in the agent's namespace, around every socket hook. Raises VerifyError."""
    before = {hook: counters(hook) for hook in ("packet4", "packet6")}
    net_frames.inject(netns, net_frames.canaries(sources))
    _await_denials(before, counters)


def _await_denials(before: Mapping[str, Mapping[str, int]], counters: Counters) -> None:
    """Until each of these hooks has denied more than before. Raises VerifyError."""
    end, pause = time.monotonic() + PATIENCE, 0.0002
    while True:
        missed = [hook for hook in before if counters(hook)["denied"] <= before[hook]["denied"]]
        if not missed:
            return
        if time.monotonic() > end:
            raise VerifyError(f"network guard {missed[0]}: a forbidden packet was not dropped")
        # Longer each time: ksoftirqd, for which we wait, is an ordinary process, and we come first.
        time.sleep(pause)
        pause = min(2 * pause, 0.02)
