"""While the agent runs: every event to the record, every signal to the agent, one ending.

Knows nothing of how things were set up; `launch` gives it the parts and it turns the loop until
the agent is gone.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial

from mis_run import pauses, reaction, taint
from mis_run.briefing import Denials
from mis_run.cgroup import Cgroup
from mis_run.dataclass import dataclass
from mis_run.defcon import Change, Tracker
from mis_run.errors import Emergency, GuardLost, SetupError, TimedOut, VerifyError
from mis_run.events import Event, Guarantee
from mis_run.guards import Guard
from mis_run.hints import TYPE_CHECKING, Any
from mis_run.jsonable import plain
from mis_run.mailbox import Mailbox
from mis_run.model import Plan
from mis_run.report import Record
from mis_run.runtime import Box
from mis_run.starvation import Starvation
from mis_run.supervise import Loop

if TYPE_CHECKING:
    from mis_run.liveness import Watchdog

GRACE = 10.0  # seconds between asking the agent to end and killing it, as docker stop waits
EMPTY_WITHIN = 5.0  # seconds a killed cgroup gets to become empty
ASKING = frozenset({signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT})
LIMITS_EVERY = 0.25  # seconds between looks at the cgroup's limit events


@dataclass(frozen=True)
class Ending:
    """How a run ended: words for people and mis-run's exit code; ``own`` when nobody but the agent
    itself brought it about."""

    how: str
    code: int
    own: bool = False


class Follower:
    """One agent being followed; ``ending`` is None until it is over."""

    def __init__(
        self,
        *,
        loop: Loop,
        plan: Plan,
        record: Record,
        cgroup: Cgroup,
        box: Box,
        guards: Mapping[str, Any],
        tracker: Tracker,
        counters: Any,
        denials: Denials,
    ) -> None:
        self.loop = loop
        self.plan = plan
        self.record = record
        self.cgroup = cgroup
        self.box = box
        self.guards = guards
        self.tracker = tracker
        self.counters = counters
        self.denials = denials
        self.ending: Ending | None = None
        self.started = time.monotonic()
        self._forced: Ending | None = None  # why we killed it, known before it is dead
        self._interrupts = 0
        self._proving = False
        self._closed_writes = False
        self._asked = False  # somebody asked it to end
        self.canaries = 0  # rounds in which every guard was seen to work
        self._mail = Mailbox[Event]()
        self._pauses = pauses.Pauses(partial(cgroup.freeze, timeout=0.0), loop.at)
        self.on_resize: Callable[[], None] = lambda: None

    # ---- what comes in --------------------------------------------------------------------

    def watch(self) -> None:
        """Register everything with the loop: guards must answer while they are being verified."""
        self.box.turn = lambda: self.loop.turn(1.0)
        self.loop.add(self.box.fileno(), lambda: None)
        self.loop.add(self._mail.fileno(), lambda: self.emit(self._mail.take()))
        for guard in self.guards.values():
            self.loop.add(guard.fileno(), partial(self._serve, guard))

    def _look(self) -> None:
        """What nobody tells us: limits that were hit, levels that fell with time."""
        self._react()
        self._changed(self.tracker.tick())

    def _react(self) -> None:
        """Record the limits that were hit, and do what the profile says; an agent that has ended
        meanwhile keeps its own ending."""
        for event in self.cgroup.poll_events():
            told, action = reaction.judge(event, self.plan)
            self.emit([told])
            if self.ending is not None:
                continue
            if action == "kill":
                ending = reaction.HITS[event.kind].ending
                self.kill(Ending(f"{ending} ({told.rule})", 128 + signal.SIGKILL))
            elif action == "freeze" and self._pauses.set("limits", on=True):
                self.loop.after(reaction.BACK_OFF, partial(self._pauses.set, "limits", on=False))

    def _prove(self) -> None:
        """Try every guard end to end: what must be refused inside is tried inside.

        The container's init answers when it gets CPU; meanwhile the loop turns inside `Box.probe`
        as always, and the next beats are only noted as late.
        """
        if self._proving or self.ending is not None:
            self.record.write(Event(kind="canary.late", guard=Guarantee.LIVENESS))
            return
        self._proving = True
        try:
            for guard in self.guards.values():
                guard.beat(self.box.probe)
            self.canaries += 1
        except VerifyError as error:
            self.record.write(Event(kind="canary.lost", subject={"why": error.message}))
            self.kill(Ending(f"killed: {error.message}", GuardLost.exit_code))
        except SetupError:
            pass  # the agent ended meanwhile, which `_from_shim` tells
        finally:
            self._proving = False

    def _serve(self, guard: Guard) -> None:
        events = guard.read()
        self.emit(events)
        delay = self.tracker.delay()
        if not delay or self.ending is not None or guard.answers_late(delay):
            return
        if late := delay * pauses.denials(events):
            self._pauses.hold(late)

    def go(self, streams: tuple[int, int, int] | None) -> None:
        """Execute the agent, with ``streams`` as its 0, 1 and 2 (None: the container's terminal).

        Guards answer meanwhile: its first acts may come before our reply.
        """
        self.box.go(self.plan.command[0], streams)
        self.follow()

    def follow(self) -> None:
        """Watch an agent that runs, from its first moment or from where a supervisor was lost."""
        self.loop.remove(self.box.fileno())
        self.loop.add(self.box.fileno(), self._from_shim)
        self._begin()
        self._from_shim()  # a short agent has ended before we looked

    def _begin(self) -> None:
        self.started = time.monotonic()
        self.loop.add(self.box.pidfd, self._gone)
        self.loop.every(LIMITS_EVERY, self._look)
        liveness = self.plan.profile.liveness
        self.loop.every(liveness.canary, self._prove)
        starvation = Starvation(
            liveness,
            emit=lambda event: self.emit([event]),
            freeze=partial(self._pauses.set, "starved"),
            kill=lambda why: self.kill(Ending(f"killed: {why}", GuardLost.exit_code)),
        )
        self.loop.every(liveness.beat, starvation.beat)
        if timeout := self.plan.limits.timeout:
            self.loop.after(timeout, self._timed_out)

    def emit(self, events: Iterable[Event]) -> None:
        """Record events and let violations count, and a taint mark; DEFCON 1 ends the run."""
        for event in events:
            if event.kind == taint.KIND:
                self._mark(taint.told(event, self.plan.profile))
                continue
            self.record.write(event)
            if event.violation:
                self.denials.add(event)
            self._changed(self.tracker.violation(event))

    def _mark(self, event: Event) -> None:
        """The agent waits in an open that marks it: all that follows is in force before it goes on
        (`guards.file`)."""
        self.record.write(event)
        self.denials.add(event)
        self._changed(self.tracker.mark(taint.level(self.plan.profile)))

    def _changed(self, change: Change | None) -> None:
        """Tell a new DEFCON level, have the network guard follow it, end the run at level 1."""
        if change is None:
            return
        self.record.write(change.event)
        if net := self.guards.get("net"):
            net.follow(self.tracker.stance(enforce=self.plan.profile.enforce))
        if kernel := self.guards.get("kernel"):
            kernel.set_level(change.level)
        if self.tracker.effects.writes and not self._closed_writes:
            self._close_writes()
        if change.kills:
            self.kill(Ending("DEFCON 1: killed for its violations", Emergency.exit_code), change.at)

    def _close_writes(self) -> None:
        """Only the workspace stays writable from now on."""
        from mis_run.guards import freeze_mounts

        self._closed_writes = True
        left = freeze_mounts.read_only(self.box.pid, self.box.pidfd, str(self.plan.cwd))
        if left:  # a file there is open for writing: told, not hidden
            self.record.write(Event(kind="defcon.partly", subject={"still_writable": left}))

    def emit_soon(self, event: Event) -> None:
        """`emit` from another thread."""
        self._mail.put(event)

    def signal(self, number: int) -> None:
        """A signal that mis-run got: passed on, except that the second SIGINT kills."""
        if number == signal.SIGWINCH:
            self.on_resize()
            return
        if number == signal.SIGINT:
            self._interrupts += 1
            if self._interrupts > 1:
                self.kill(Ending("killed after a second interrupt", 128 + signal.SIGKILL))
                return
        self.send(number)

    def send(self, number: int) -> None:
        """Pass a signal on; those that ask for an end make it not the agent's own doing."""
        self._asked |= number in ASKING
        self.box.signal(number)

    def set_level(self, level: int) -> None:
        """An operator's DEFCON level."""
        if kernel := self.guards.get("kernel"):
            kernel.recount(0)  # what it counted itself would keep the level where it was
        self._changed(self.tracker.set(level))

    def catch_up(self) -> None:
        """What the kernel counted while nobody followed holds for everything else too."""
        if (kernel := self.guards.get("kernel")) and (level := kernel.level()) < self.tracker.level:
            self._changed(self.tracker.set(level, "kernel"))

    def watched(self, dog: Watchdog) -> None:
        """From now on ``dog`` watches us, and hears when the agent is frozen: nobody else could
        have it go on if we are lost meanwhile."""
        self._pauses.tell = dog.frozen
        dog.start(self.unwatched, self.dog_says)

    def unwatched(self) -> None:
        """The watchdog died. Closed: without it a hung supervisor would go unnoticed."""
        self.kill(Ending("killed: its watchdog died", GuardLost.exit_code))

    def dog_says(self, words: str) -> None:
        """The watchdog noticed that our beats are late, or in time again."""
        self.record.write(Event(kind=f"watchdog.{words}", guard=Guarantee.LIVENESS))

    def _from_shim(self) -> None:
        for kind, value in self.box.read():
            if kind == "exit":
                self._finish(Ending(f"exited with code {value}", value, own=not self._asked))
            elif kind == "killed":
                name = signal.Signals(value).name
                self._finish(Ending(f"ended by {name}", 128 + value, own=not self._asked))
            elif kind == "stopped":
                # Ctrl-Z on an agent without a shell around it: nobody inside could resume it.
                self.box.signal(signal.SIGCONT)
            elif kind == "closed":
                self._finish(Ending("ended without a word from its container", 137))
                self.loop.remove(self.box.fileno())

    def _gone(self) -> None:
        self._from_shim()
        self._finish(Ending("killed from outside", 128 + signal.SIGKILL))
        self.loop.remove(self.box.pidfd)

    def _finish(self, ending: Ending) -> None:
        self.ending = self.ending or self._forced or ending
        self._pauses.end()

    # ---- what goes out --------------------------------------------------------------------

    def kill(self, ending: Ending, decided: float | None = None) -> None:
        """Kill the whole cgroup at once, see it empty, and remember why.

        ``decided`` is when that was decided (``time.monotonic()``), from which the time counts.
        """
        if self._forced is not None:
            return
        self._forced = ending
        began = time.monotonic() if decided is None else decided
        self.cgroup.kill()
        if self.cgroup.wait_empty(EMPTY_WITHIN) >= EMPTY_WITHIN:
            self._finish(Ending("could not be killed", GuardLost.exit_code))
        took = round((time.monotonic() - began) * 1000, 1)
        populated = int(self.cgroup.populated())
        subject = {"why": ending.how, "milliseconds": took, "populated": populated}
        self.record.write(Event(kind="run.killed", subject=subject))

    def stop(self, ending: Ending) -> None:
        """Ask with SIGTERM, kill after GRACE."""
        self._forced = self._forced or ending
        self._asked = True
        self.box.signal(signal.SIGTERM)
        self.loop.after(GRACE, lambda: None if self.ending else self.kill(ending))

    def _timed_out(self) -> None:
        limit = self.plan.limits.timeout
        self.record.write(Event(kind="run.timeout", subject={"seconds": limit}))
        self.stop(Ending(f"stopped: ran longer than {limit:g} s", TimedOut.exit_code))

    # ---- what is known --------------------------------------------------------------------

    def measurements(self) -> dict[str, Any]:
        """Usage, counters and network numbers as of now, with every event up to now recorded."""
        for guard in self.guards.values():
            self.emit(guard.read())
        net = self.guards.get("net")
        if net and self.ending:
            self.emit(net.rest())
        self._react()
        facts: dict[str, Any] = {
            "seconds": round(time.monotonic() - self.started, 3),
            "usage": plain(self.cgroup.usage()),
            "violations": self.record.violations,
            "level": self.tracker.level,
            "tainted": self.tracker.marked,
            "canaries": self.canaries,
        }
        if self.counters is not None:
            facts["counters"] = plain(self.counters.read())
        if net:
            facts["network"] = plain(net.counts())
        if kernel := self.guards.get("kernel"):
            facts["kernel"] = plain(kernel.counts())
        return facts
