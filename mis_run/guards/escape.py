"""The escape guard: calls that change or leave the container are answered, late and counted.

The kernel's filter (`escape_rules.notify_rules`, installed by the OCI runtime) hands such calls to
a listener descriptor; we deny them.  When the last copy of the descriptor is closed the same calls
fail with ENOSYS (seccomp_unotify(2)): losing the guard never allows anything.

Nothing is read from the agent's memory.  A call is let through only if its argument registers make
it harmless (a thread that waits here cannot change them, and ptrace is denied to all others), or in
audit mode.  Out of scope: counting levels (`defcon`), the filter's other rules (`seccomp`).
"""

from __future__ import annotations

import errno
import os
import select
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

from mis_run.dataclass import dataclass
from mis_run.defcon import ENFORCING, Stance
from mis_run.errors import VerifyError
from mis_run.events import Event, Guarantee, Verdict
from mis_run.guards.escape_rules import NAMES, Judgement, judge, notify_rules
from mis_run.late import Late, late
from mis_run.linux import abi, seccomp, tasks
from mis_run.linux.seccomp import Notification
from mis_run.model import Finding

__all__ = ["NAMES", "EscapeGuard", "attach", "notify_rules", "supported"]

BATCH = 64  # notifications per read: a storm must not keep the loop from its other work
MOST_KNOWN = 1024  # threads and processes remembered, so that an agent cannot make us grow
AF_ALG, SOCK_SEQPACKET = 38, 5
Probe = Callable[[str], int]


def supported() -> dict[str, Finding]:
    """``seccomp-notify``: whether this kernel can hand calls over, asked of seccomp(2) itself."""
    try:
        size, _ = seccomp.sizes()
        if seccomp.available(seccomp.RET_USER_NOTIF):
            return {"seccomp-notify": Finding(True, f"notifications of {size} bytes")}
        why, fix = "the kernel has seccomp but no user notification", "use Linux 5.15 or later"
    except OSError as problem:
        why = f"seccomp(2): {os.strerror(problem.errno or 0)}"
        fix = "use a kernel with CONFIG_SECCOMP_FILTER=y"
        if problem.errno == errno.EPERM:
            fix = "run outside the sandbox that forbids seccomp(2)"
    return {"seccomp-notify": Finding(False, why, fix)}


@dataclass
class _Waiting:
    """A call whose denial is not given yet. ``id`` changes when a signal restarts the call."""

    id: int
    signature: tuple[object, ...]
    error: int


class EscapeGuard:
    """Answers one container's listener."""

    def __init__(self, listener: int, slow: Late, stance: Stance) -> None:
        self.denied = 0
        self.over = False  # no process uses the filter any more
        self._listener = listener
        self._late = slow
        self._stance = stance
        self._waiting: dict[int, _Waiting] = {}  # by thread
        self._restarts: dict[int, tuple[object, ...]] = {}  # thread → call it did not get answered
        self._told: set[tuple[int, str]] = set()  # (process, absent call)
        self._canaries: dict[int, int] = {}  # cookie → error expected
        self._epoll = select.epoll()
        self._epoll.register(listener, select.EPOLLIN)
        self._epoll.register(slow.fileno(), select.EPOLLIN)

    def fileno(self) -> int:
        """Readable while `read` has something to do: a call, or an answer that is due."""
        return self._epoll.fileno()

    def close(self) -> None:
        """Give back what is ours; the listener belongs to who received it."""
        self._epoll.close()

    def read(self) -> list[Event]:
        """Answer what waits and what is due; never blocks longer than `late.LEAD`.

        Ends with the first violation: what it does to the DEFCON level must be in force before the
        next call is judged, and the caller counts.  What else waits keeps `fileno` readable.
        """
        self._late.run()
        events: list[Event] = []
        for _ in range(BATCH):
            if events:
                break
            ready, over = seccomp.state(self._listener)
            if over:
                self._end()
            if not ready:
                break
            found = seccomp.receive(self._listener)
            if found is not None and (event := self._handle(found)) is not None:
                events.append(event)
        self._late.run()
        return events

    def answers_late(self, delay: float) -> bool:
        """As late as `Stance.delay` says: the answers are ours."""
        return True

    def verify(self, probe: Probe) -> None:
        """Have the shim try two forbidden calls and see each arrive here; raises VerifyError.

        A random number in a register that the call ignores tells our own attempt from the agent's:
        it is no violation.  ``probe`` must turn the loop that calls `read` while it waits.
        """
        self._try(probe, "kcmp", (0, 0, 0), errno.EPERM, errno.ESRCH)
        # Refused by its arguments: proves the part of the filter that compares them.
        self._try(probe, "socket", (AF_ALG, SOCK_SEQPACKET, 0), errno.EAFNOSUPPORT, 0)

    def beat(self, probe: Probe) -> None:
        """One forbidden call of the container's init, seen here, as heartbeat.

        Raises VerifyError.
        """
        self._try(probe, "kcmp", (0, 0, 0), errno.EPERM, errno.ESRCH)

    def _try(
        self, probe: Probe, name: str, args: tuple[int, ...], wanted: int, without: int
    ) -> None:
        cookie = int.from_bytes(os.urandom(8), "little") >> 2 | 1 << 61
        self._canaries[cookie] = wanted
        words = " ".join(str(value) for value in (abi.number(name), *args, cookie))
        met = probe(f"syscall {words}")
        if self._canaries.pop(cookie, None) is not None:
            raise VerifyError(
                f"escape guard: {name} inside the container was not seen here "
                f"(it met {abi.error(met)}; {abi.error(without)} would be an unguarded kernel)",
                hint="mis doctor",
            )
        if self._stance.enforce and met != wanted:
            raise VerifyError(
                f"escape guard: {name} inside the container met {abi.error(met)}, "
                f"not {abi.error(wanted)}",
                hint="mis doctor",
            )

    # ---- one call -------------------------------------------------------------------------

    def _handle(self, found: Notification) -> Event | None:
        for cookie in found.args[3:]:
            if (error := self._canaries.pop(cookie, None)) is not None:
                self._answer(found.id, error if self._stance.enforce else 0)
                return None
        signature = (found.number, found.arch, found.pointer, found.args)
        if self._is_restart(found, signature):
            return None
        name = abi.call(found.number, found.arch)
        verdict = judge(name, found.args, self._stance.effects())
        if verdict is None:
            self._answer(found.id, 0)
            return None
        event = self._event(found, verdict)
        if verdict.absent:
            self._answer(found.id, verdict.error)
        elif not self._stance.enforce:
            self._answer(found.id, 0)
        else:
            self.denied += 1
            self._deny(_Waiting(found.id, signature, verdict.error), found.thread)
        return event

    def _is_restart(self, found: Notification, signature: tuple[object, ...]) -> bool:
        """Whether this is a call that a signal interrupted before its answer and that the kernel
        restarted: the same act, to be answered when the first would have been."""
        pending = self._waiting.get(found.thread)
        if pending is not None:
            # A thread waits in one call only, so the one we had is gone.
            if pending.signature == signature:
                pending.id = found.id
                return True
            del self._waiting[found.thread]
            return False
        if self._restarts.pop(found.thread, None) != signature or not self._stance.enforce:
            return False
        verdict = judge(abi.call(found.number, found.arch), found.args, self._stance.effects())
        if verdict is None:
            return False
        self._deny(_Waiting(found.id, signature, verdict.error), found.thread)
        return True

    def _deny(self, call: _Waiting, thread: int) -> None:
        if delay := self._stance.delay():
            self._waiting[thread] = call
            self._late.push(time.monotonic() + delay, partial(self._due, thread, call))
        else:
            self._finish(thread, call)

    def _due(self, thread: int, call: _Waiting) -> None:
        if self._waiting.get(thread) is call:
            del self._waiting[thread]
            self._finish(thread, call)

    def _finish(self, thread: int, call: _Waiting) -> None:
        if not self._answer(call.id, call.error):
            if len(self._restarts) >= MOST_KNOWN:
                self._restarts.clear()
            self._restarts[thread] = call.signature

    def _answer(self, ident: int, error: int) -> bool:
        """Fail the call with ``error``, or let it run when that is 0."""
        if error:
            return seccomp.deny(self._listener, ident, error)
        return seccomp.proceed(self._listener, ident)

    # ---- telling --------------------------------------------------------------------------

    def _event(self, found: Notification, verdict: Judgement) -> Event | None:
        process, comm = tasks.who(found.thread)
        if found.thread and not seccomp.alive(self._listener, found.id):
            process, comm = found.thread, ""  # the number may already be another's
        subject = dict(verdict.subject)
        if process != found.thread:
            subject["thread"] = found.thread
        if verdict.absent:
            known = (process, verdict.kind)
            if known in self._told:
                return None
            if len(self._told) >= MOST_KNOWN:
                self._told.clear()
            self._told.add(known)
            subject["answer"] = abi.error(verdict.error)
        denied = Verdict.DENY if self._stance.enforce else Verdict.AUDIT
        decided = None if verdict.absent else denied
        return Event(
            kind=verdict.kind,
            verdict=decided,
            guard=Guarantee.ESCAPE,
            pid=process,
            comm=comm,
            subject=subject,
            rule=verdict.rule,
        )

    def _end(self) -> None:
        """Nobody is left to guard; the listener, ready for ever, would keep the loop spinning."""
        if not self.over:
            self.over = True
            self._epoll.unregister(self._listener)
            self._waiting.clear()


@contextmanager
def attach(listener: int, stance: Stance = ENFORCING) -> Iterator[EscapeGuard]:
    """Answer ``listener`` until the context ends; denials then outstanding are given at once."""
    with late() as slow:
        guard = EscapeGuard(listener, slow, stance)
        try:
            yield guard
        finally:
            slow.flush()
            guard.close()
