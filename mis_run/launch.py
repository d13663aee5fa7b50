"""One run from start to end. The order of everything, and what undoes it, is `_launch` below.

Each step is a context manager on one ExitStack: whatever fails, at any line, everything above it
is undone in reverse.  What a SIGKILL of this very process leaves is undone by `gc`.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

from mis_run import (
    cgroup,
    control,
    defcon,
    gc,
    network,
    report,
    rootfs,
    runtime,
    state,
    supervise,
    terminal,
)
from mis_run.errors import VerifyError
from mis_run.events import Event
from mis_run.follow import Ending, Follower
from mis_run.guards import counters, escape, net
from mis_run.jsonable import plain
from mis_run.model import NetMode, Plan
from mis_run.names import Names


class Steps:
    """Times each step; tests replace ``after`` to fail a launch behind any of them."""

    after: Callable[[str], None] = staticmethod(lambda name: None)

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def done(self, name: str) -> None:
        """The step called ``name`` is finished."""
        now = time.perf_counter()
        self.seconds[name] = now - self._last
        self._last = now
        Steps.after(name)


def run(plan: Plan, *, quiet: bool = False) -> int:
    """Launch the plan's agent and follow it to its end; returns mis-run's exit code."""
    rootfs.isolate()
    runtime.subreaper()
    gc.sweep()
    with ExitStack() as stack:
        run_dir = stack.enter_context(state.create(plan.name))
        record = stack.enter_context(report.open_record(run_dir.id, plan.log))
        steps = Steps()
        ending, facts = _launch(plan, run_dir, record, steps)
        facts = {"ending": ending.how, "code": ending.code, **facts, "setup": steps.seconds}
        record.write(Event(kind="run.exit", subject=facts))
        _tell(plan, record, facts, quiet=quiet)
        return ending.code


def _launch(
    plan: Plan, run_dir: state.RunDir, record: report.Record, steps: Steps
) -> tuple[Ending, dict[str, Any]]:
    with ExitStack() as stack:
        on = stack.enter_context
        loop = on(supervise.loop())
        group = on(cgroup.create(run_dir.id, plan.host))
        steps.done("cgroup")
        guard = on(net.attach(group.unified, plan.network, enforce=plan.profile.enforce))
        steps.done("net guard")
        link = on(network.create(plan.network, run_dir.id))
        guard.attach_xdp(link)
        steps.done("network")
        root = on(rootfs.mount(plan, run_dir.path))
        steps.done("rootfs")
        box = on(runtime.create(plan, run_dir.path, root=root, link=link, cgroup=group))
        steps.done("container")
        cages = {"net": guard, "escape": on(escape.attach(box.seccomp_fd))}
        counted = on(counters.attach(group.unified, plan.profile.counters))
        steps.done("guards")
        box.start()  # our shim only: the agent waits for `go`
        steps.done("shim")
        for one in cages.values():
            one.verify(box.probe)
        steps.done("verified")
        follower = Follower(loop, plan, record, group, box, cages, counted)
        on(supervise.signals(loop, follower.signal))
        on(control.serve(loop, run_dir.path / "control.sock", follower.request))
        on(terminal.relay(loop, box.pty))
        box.go()
        steps.done("agent")
        follower.watch()
        loop.until(lambda: follower.ending is not None)
        return follower.ending, follower.measurements()
