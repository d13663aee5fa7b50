"""Our own starvation: a supervisor without CPU guards late, so it notices and acts.

A beat that comes later than half the watchdog's deadline is starvation; GOOD beats in time after it
are recovery, as for the watchdog.  The profile's ``liveness.on_starved`` says what follows.
Out of scope: silence beyond the deadline, which is the watchdog's (shim/watchdog.c).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from mis_run import cgroup_stats
from mis_run.events import Event, Guarantee, Verdict
from mis_run.model import Liveness

GOOD = 5
CPU = Path("/proc/pressure/cpu")


class Starvation:
    """Counts beats. ``emit`` takes events, ``freeze`` stops and resumes the agent, ``kill`` ends it
    for a reason."""

    def __init__(
        self,
        settings: Liveness,
        *,
        emit: Callable[[Event], None],
        freeze: Callable[[bool], object],
        kill: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._settings = settings
        self._emit = emit
        self._freeze = freeze
        self._kill = kill
        self._clock = clock
        self._last = clock()
        self._good = GOOD  # beats in time since the last late one
        self._frozen = False

    def beat(self) -> None:
        """To be called every ``liveness.beat`` seconds; the interval since the last call counts."""
        now = self._clock()
        late = now - self._last - self._settings.beat
        self._last = now
        if late > self._settings.deadline / 2:
            self._good = 0
            self._act(late)
        elif self._good < GOOD:
            self._good += 1
            if self._good == GOOD:
                self._recover()

    def _act(self, late: float) -> None:
        action = self._settings.on_starved
        machine = cgroup_stats.pressure(CPU)  # whether everybody waits for CPU, or only we do
        self._emit(
            Event(
                kind="supervisor.starved",
                guard=Guarantee.LIVENESS,
                # Counted like an act of the agent only where the profile says so.
                verdict=Verdict.AUDIT if action == "defcon" else None,
                subject={
                    "milliseconds": round(late * 1000),
                    "action": action,
                    "machine_cpu_pressure": machine and machine.some_avg10,
                },
                rule="liveness.on_starved",
            )
        )
        if action == "kill":
            self._kill("its supervisor got no CPU")
        elif action == "freeze" and not self._frozen:
            self._frozen = True
            self._freeze(True)

    def _recover(self) -> None:
        self._emit(Event(kind="supervisor.recovered", guard=Guarantee.LIVENESS))
        if self._frozen:
            self._frozen = False
            self._freeze(False)
