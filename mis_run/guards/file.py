"""The file guard and the exec gate: every open and every exec of the container is answered here.

The kernel asks with a descriptor of the very object (fanotify(7), FAN_OPEN_PERM and
FAN_OPEN_EXEC_PERM), so no spelling, link or race changes what is judged: the object's own place in
the tree, its inode, and for programs its content.  An "allow" is remembered by the kernel until the
object is modified or the rules change; a denial is given late, as DEFCON says.

While nobody answers the agent waits, and `attach` gives copies of the descriptor to whoever must
outlive us.  Out of scope: folders, and what has no open (create, remove, rename): the mounts
decide.  docs/decisions/file-guard.md has the mechanism and its limits.
"""

from __future__ import annotations

import errno
import os
import select
import stat
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

from mis_run import taint
from mis_run.defcon import ENFORCING, Stance
from mis_run.errors import SetupError, VerifyError
from mis_run.events import Event, Guarantee, Verdict
from mis_run.file_rules import Effect, Rule
from mis_run.guards.file_judge import Judge
from mis_run.guards.file_objects import Identity
from mis_run.guards.file_policy import Policy
from mis_run.guards.marks import Marks
from mis_run.late import Late, late
from mis_run.later import Later
from mis_run.linux import abi, fanotify, tasks
from mis_run.linux.fanotify import Opened
from mis_run.model import Finding

Probe = Callable[[str], int]
DELETED = " (deleted)"
NO_CHILD = frozenset({errno.EAGAIN, errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.ECANCELED})
"""What the init meets when the agent has used up its limits: it could not even try."""


def tried() -> tuple[str, str]:
    """The canary, and a file on a mount of its own: what a guard proves itself by."""
    from mis_run.bundle import INFO

    return f"{INFO}/canary", "/etc/hosts"


def supported() -> dict[str, Finding]:
    """``fanotify``: whether the kernel takes a permission mark, tried on a file of our own."""
    fix = "use a kernel with CONFIG_FANOTIFY_ACCESS_PERMISSIONS=y, and run as root"
    memory = os.memfd_create("mis-fanotify")
    try:
        group = fanotify.group()
        try:
            fanotify.mark_object(group, memory)
        finally:
            # The kernel waits until nobody can see the mark (SRCU), 10 to 20 ms: not we.
            Later(lambda: os.close(group))
    except OSError as error:
        why = f"fanotify permission events: {os.strerror(error.errno or 0)}"
        return {"fanotify": Finding(False, why, fix)}
    finally:
        os.close(memory)
    return {"fanotify": Finding(True, "permission events on the container's own mounts")}


class FileGuard:
    """Answers for one container."""

    def __init__(
        self,
        group: int,
        marks: Marks,
        slow: Late,
        policy: Policy,
        canary: Identity,
        stance: Stance,
    ) -> None:
        self.group = group
        self.canaries = 0
        """How often what we tried ourselves was seen here: the guard works."""
        self._marks = marks
        self._late = slow
        self._policy = policy
        self._judge = Judge(policy, canary)
        self._canary = canary
        self._stance = stance
        self._judge.effects = stance.effects()
        self._verifying = False  # there is no agent yet: whatever is opened is opened for us
        self._beating = False  # the canary, if it is opened now, is opened for us
        self._waiting: deque[Opened] = deque()
        self._held: Opened | None = None  # allowed, when what it marks the agent with is in force
        self._more = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._says_more = False
        self._epoll = select.epoll()
        for fd in (group, slow.fileno(), self._more):
            self._epoll.register(fd, select.EPOLLIN)

    def fileno(self) -> int:
        """Readable while `read` has something to do."""
        return self._epoll.fileno()

    def close(self) -> None:
        """Deny what waits here; copies of the group keep everything later waiting."""
        if self._held is not None:
            self._waiting.append(self._held)
        while self._waiting:
            self._finish(self._waiting.popleft(), allow=False)
        self._epoll.close()
        os.close(self._more)

    def read(self) -> list[Event]:
        """Answer what waits and what is due; never blocks longer than `late.LEAD`.

        Ends with the first event: what it does to the DEFCON level must be in force before the next
        open is judged, and the caller counts.  An open that marks the agent is itself answered by
        the next call only, when that is in force.
        """
        self._late.run()
        self._follow_defcon()
        if self._held is not None:
            self._finish(self._held, allow=True)
            self._held = None
        events: list[Event] = []
        if not self._waiting:
            self._receive(events)
        while self._waiting and not events:
            opened = self._waiting.popleft()
            if (event := self._handle(opened)) is not None:
                events.append(event)
        if bool(self._waiting or self._held) != self._says_more:
            self._says_more = not self._says_more
            if self._says_more:
                os.eventfd_write(self._more, 1)
            else:
                os.eventfd_read(self._more)
        self._late.run()
        return events

    def answers_late(self, delay: float) -> bool:
        """As late as `Stance.delay` says: the answers are ours."""
        return True

    def verify(self, probe: Probe) -> None:
        """Have the shim open and execute the canary, and files of other mounts, and see each
        denied and counted. Raises VerifyError.  ``probe`` must turn the loop that calls `read`."""
        canary, other = tried()
        self._verifying = True
        try:
            for act in (f"open 0 {canary}", f"exec {canary}", f"open 0 {other}"):
                self._try(probe, act)
        finally:
            self._verifying = False

    def beat(self, probe: Probe) -> None:
        """The canary opened by the container's init, seen here, as heartbeat; and every mount
        still marked. Raises VerifyError."""
        self._marks.update()
        self._beating = True
        try:
            self._try(probe, f"open 0 {tried()[0]}", inconclusive=NO_CHILD)
        finally:
            self._beating = False

    def _try(self, probe: Probe, act: str, inconclusive: frozenset[int] = frozenset()) -> None:
        before = self.canaries
        met = probe(act)
        if met in inconclusive:
            return
        if self.canaries == before:
            raise VerifyError(
                f"file guard: '{act}' inside the container was not seen here "
                f"(it met {abi.error(met)})",
                hint="mis doctor",
            )
        if self._stance.enforce and met != errno.EPERM:
            raise VerifyError(
                f"file guard: '{act}' inside the container met {abi.error(met)}, not EPERM",
                hint="mis doctor",
            )

    # ---- one open -------------------------------------------------------------------------

    def _receive(self, events: list[Event]) -> None:
        try:
            self._waiting.extend(fanotify.receive(self.group))
        except OSError as error:  # the kernel denied it: not the agent's fault, so no violation
            events.append(
                Event(
                    kind="file.unanswerable",
                    guard=Guarantee.FILE,
                    subject={"why": error.strerror or str(error)},
                )
            )

    def _handle(self, opened: Opened) -> Event | None:
        facts = os.fstat(opened.fd)
        identity = (facts.st_dev, facts.st_ino)
        if self._verifying or (self._beating and identity == self._canary):
            self.canaries += 1
            self._finish(opened, allow=not self._stance.enforce)
            return None
        path = _path(opened.fd, facts)
        rule = self._judge.judge(opened, path, facts)
        if rule is None and (mark := self._mark(opened, path, facts)):
            self._held = opened  # not remembered by the kernel: it would not ask again
            return self._event(opened, path, mark, Verdict.ALLOW)
        if rule is None:
            self._allow(opened, path, facts)
            return None
        verdict = Verdict.KILL if rule.effect is Effect.KILL else Verdict.DENY
        event = self._event(opened, path, rule, verdict if self._stance.enforce else Verdict.AUDIT)
        if not self._stance.enforce:
            self._finish(opened, allow=True)
        elif delay := self._stance.delay():
            self._late.push(time.monotonic() + delay, partial(self._finish, opened, allow=False))
        else:
            self._finish(opened, allow=False)
        return event

    def _mark(self, opened: Opened, path: str, facts: os.stat_result) -> Rule | None:
        """The rule that marks the agent now; it is marked once."""
        return None if self._stance.marked() else self._judge.taint(opened, path, facts)

    # ---- answering ------------------------------------------------------------------------

    def _allow(self, opened: Opened, path: str, facts: os.stat_result) -> None:
        """Let it go on, and have the kernel remember that where one object has one name.

        Elsewhere than where the agent can give names, others of the same object make no difference:
        what may be had by one of them may be had.  (git's programs are one; ``perf record`` links
        every library it has seen.)
        """
        if (
            (facts.st_nlink == 1 or not self._policy.is_writable(path))
            and stat.S_ISREG(facts.st_mode)
            and self._marks.one_name(facts.st_dev)
        ):
            mask = fanotify.OPEN_EXEC_PERM if opened.executes else fanotify.OPEN_PERM
            fanotify.ignore(self.group, opened.fd, mask)
        self._finish(opened, allow=True)

    def _finish(self, opened: Opened, *, allow: bool) -> None:
        # Closed first: our end of a FIFO would be a peer to whoever is let through.
        os.close(opened.fd)
        fanotify.answer(self.group, opened.fd, allow=allow)

    def _follow_defcon(self) -> None:
        """A changed level makes what the kernel remembers of the old one void."""
        effects = self._stance.effects()
        if effects != self._judge.effects:
            self._judge.effects = effects
            fanotify.forget(self.group)

    def _event(self, opened: Opened, path: str, rule: Rule, verdict: Verdict) -> Event:
        process, comm = tasks.who(opened.thread)
        subject: dict[str, object] = {"path": path}
        if process != opened.thread:
            subject["thread"] = opened.thread
        kind = "exec.run" if opened.executes else "file.open"
        return Event(
            kind=taint.KIND if verdict is Verdict.ALLOW else kind,
            verdict=verdict,
            guard=Guarantee.EXEC if opened.executes else Guarantee.FILE,
            pid=process,
            comm=comm,
            subject=subject,
            rule=rule.text,
        )


def _path(fd: int, facts: os.stat_result) -> str:
    """The object's place in the container's tree, as the kernel knows it (d_path)."""
    path = os.readlink(f"/proc/self/fd/{fd}")  # noqa: PTH115 - asked thousands of times
    return path.removesuffix(DELETED) if facts.st_nlink == 0 else path


@contextmanager
def attach(
    pid: int,
    policy: Policy,
    canary: Identity,
    *,
    group: int | None = None,
    stance: Stance = ENFORCING,
) -> Iterator[FileGuard]:
    """Mark the mounts of the container whose init is ``pid`` and answer until the context ends.

    ``canary`` is the file that is always denied; ``group`` one that already marks them, taken over
    from a supervisor that is gone.  Raises SetupError, VerifyError.
    """
    try:
        group = fanotify.group() if group is None else group
    except OSError as error:
        raise SetupError(f"file guard: {error.strerror}", hint="mis doctor") from error
    try:
        marks = Marks(group, pid)
        marks.update()
        fanotify.forget(group)
        with late() as slow:
            guard = FileGuard(group, marks, slow, policy, canary, stance)
            try:
                yield guard
            finally:
                slow.flush()
                guard.close()
    finally:
        os.close(group)
