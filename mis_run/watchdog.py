"""The watchdog: a second, tiny process that ends the agent when its supervisor no longer can.

Run as a script by `liveness` (``python -I -S watchdog.py``), never imported by it: it must stay
small (under 12 MB) and share nothing with the supervisor that could fail with it.  It holds a copy
of the shim's lifeline, so the agent outlives the supervisor exactly as long as the watchdog says;
when both are gone the shim sees the end of the line and takes the whole pid namespace with it.

Beats arrive on descriptor 3, one datagram each: ``beat``, ``hold`` with a descriptor (the
lifeline), ``pause`` (supervisor stopped on purpose), ``resume``, ``bye`` (normal end).
Answers: ``late`` and ``recovered``.
Out of scope: judging violations, answering guards, cleaning up (``mis gc`` does that).
"""

from __future__ import annotations

import os
import select
import signal
import socket
import sys
import time
from collections.abc import Iterator
from typing import NoReturn

RUN = CGROUP = ""  # set once, from the command line
held: list[int] = []
BEATS, SUPERVISOR, RECORD = 3, 4, 5
GOOD_BEATS = 5  # in a row, to recover from one late beat
EMPTY_WITHIN = 5.0  # seconds the killed cgroup gets to become empty


def say(kind: str, **subject: object) -> None:
    """Append one line to the run's record, in the schema of `events`."""
    words = ", ".join(f'"{key}": {value}' for key, value in subject.items())
    line = f'{{"run": "{RUN}", "v": 1, "time": {time.time():.6f}, "kind": "{kind}"'
    os.write(RECORD, (line + f', "subject": {{{words}}}}}\n').encode())


def write(path: str, text: str) -> bool:
    """Write a cgroup file; returns whether the kernel took it."""
    try:
        with open(path, "w") as file:
            file.write(text)
    except OSError:
        return False
    return True


def populated() -> bool:
    """Whether any process is left in the agent's cgroup."""
    try:
        with open(CGROUP + "/cgroup.events") as file:
            return "populated 1" in file.read()
    except FileNotFoundError:
        return False


def members() -> Iterator[int]:
    """Every process of the agent's cgroup and the ones below it."""
    for folder, _, _ in os.walk(CGROUP):
        try:
            with open(folder + "/cgroup.procs") as file:
                yield from map(int, file.read().split())
        except OSError:
            continue  # removed while we walked


def end_agent() -> float:
    """Freeze, kill, prove empty; returns the milliseconds it took, or -1 if it is not empty."""
    began = time.monotonic()
    write(CGROUP + "/cgroup.freeze", "1")
    killed = write(CGROUP + "/cgroup.kill", "1")
    while populated() and time.monotonic() < began + EMPTY_WITHIN:
        if not killed:  # a kernel before 5.14: frozen, so nobody forks away
            for pid in members():
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue
            write(CGROUP + "/cgroup.freeze", "0")
        time.sleep(0.002)
    took = (time.monotonic() - began) * 1000
    return -1 if populated() else round(took, 1)


def lost(why: str) -> NoReturn:
    """The supervisor is lost: end the agent, then the supervisor if it only hangs, then gc."""
    took = end_agent()
    say("watchdog.closed", why=f'"{why}"', milliseconds=took)
    for fd in held:
        os.close(fd)  # the shim goes with its lifeline if the kill could not reach it
    try:
        signal.pidfd_send_signal(SUPERVISOR, signal.SIGKILL)
        select.select([SUPERVISOR], [], [], 2.0)
    except ProcessLookupError:
        pass  # it died, which is why we are here
    code = "from mis_run import gc; gc.collect()"
    os.execv(sys.executable, [sys.executable, "-I", "-c", code])


def watch(deadline: float, beat: float) -> None:
    """Wait for beats until ``bye``; ends the agent after ``deadline`` seconds without one."""
    beats = socket.socket(fileno=BEATS)
    beats.setblocking(False)
    last = time.monotonic()
    paused = late = False
    good = 0
    while True:
        asked = time.monotonic()
        wait = None if paused else max(0.0, last + deadline - asked)
        ready, _, _ = select.select([beats], [], [], wait)
        now = time.monotonic()
        if not ready and wait is not None:
            # Were we the ones who got no CPU?  Then the silence proves nothing: ask once more.
            if now - asked > wait + deadline / 2:
                say("watchdog.starved", milliseconds=round((now - asked - wait) * 1000))
                last = now
                continue
            lost(f"no beat for {deadline:g} s")
        try:
            words, fds, _, _ = socket.recv_fds(beats, 64, 4)
            held.extend(fds)
        except BlockingIOError:
            continue
        except ConnectionError:
            words = b""
        if words == b"bye":
            return
        if not words:
            lost("the supervisor died")
        paused = words == b"pause"
        if now - last > 2 * beat + deadline / 4 and not late and words == b"beat":
            late, good = True, 0
            say("watchdog.late", milliseconds=round((now - last) * 1000))
            answer(beats, b"late")
        elif late:
            good += 1
            if good >= GOOD_BEATS:
                late = False
                say("watchdog.recovered", beats=good)
                answer(beats, b"recovered")
        last = now


def answer(beats: socket.socket, words: bytes) -> None:
    """Tell the supervisor, unless it does not listen: then its silence will tell us."""
    try:
        beats.send(words)
    except (BlockingIOError, ConnectionError):
        return


if __name__ == "__main__":
    RUN, CGROUP = sys.argv[1], sys.argv[2]
    # The terminal's Ctrl-C and a session's hang-up are the supervisor's business.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGTSTP):
        signal.signal(number, signal.SIG_IGN)
    os.setsid()
    try:
        # Above every ordinary process: an agent that burns CPU cannot starve the watchdog.
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))
    except OSError:
        os.setpriority(os.PRIO_PROCESS, 0, -20)
    os.write(1, b"watching\n")
    os.close(1)
    watch(float(sys.argv[3]), float(sys.argv[4]))
