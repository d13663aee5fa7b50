"""One run from start to end. The order of everything, and what undoes it, is `_launch` below.

Each step is a context manager on one ExitStack: whatever fails, at any line, everything above it
is undone in reverse.  What a SIGKILL of this very process leaves is undone by `gc`.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, closing, nullcontext
from functools import cache

from mis_run import (
    briefing,
    bundle,
    cgroup,
    gc,
    git_traps,
    interior,
    liveness,
    network,
    report,
    rootfs,
    runtime,
    startup,
    state,
    stdio,
    supervise,
)
from mis_run.errors import MisError
from mis_run.events import Event
from mis_run.guards import counters, escape, file, file_policy, net
from mis_run.hints import TYPE_CHECKING, Any
from mis_run.later import Later
from mis_run.linux import memfd
from mis_run.model import OnLoss, Plan

if TYPE_CHECKING:
    from mis_run.follow import Ending
    from mis_run.guards import Guard
    from mis_run.guards.kernel import Reserved


SOON = 0.05  # seconds in which a container's init ends after the agent, if nothing is odd


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


def run(plan: Plan, *, quiet: bool = False) -> Ending:
    """Launch the plan's agent and follow it to its end."""
    if plan.uses("bpf-lsm"):
        from mis_run.guards import kernel

        kernel.prepare()
    rootfs.isolate()
    runtime.suit(plan.runtime())
    runtime.subreaper()
    gc.sweep()
    with (
        state.create(plan.name) as run_dir,
        report.open_record(run_dir.id, plan.log, plan.untrusted()) as record,
    ):
        steps = Steps()
        repositories = git_traps.look(plan.untrusted())
        try:
            ending, facts = _launch(plan, run_dir, record, steps)
        except MisError as error:
            record.write(Event(kind="run.failed", subject={"message": error.message}))
            raise
        steps.done("teardown")
        facts = {"ending": ending.how, "code": ending.code, **facts, "setup": steps.seconds}
        facts["git"] = git_traps.compare(repositories)
        record.write(Event(kind="run.exit", subject=facts))
        _tell(plan, record, facts, quiet=quiet)
        return ending


def _while_waiting(plan: Plan, root: rootfs.Root) -> file_policy.Policy | None:
    """What is needed only once the container exists, imported and made while the runtime works."""
    startup.reach_installed()  # for names
    from mis_run import control, defcon, follow, names, requests, terminal  # noqa: F401

    startup.settled()
    judged = plan.uses("bpf-lsm") or plan.uses("fanotify")
    return file_policy.build(plan, root) if judged else None


def _kernel_plane(plan: Plan, group: cgroup.Cgroup) -> AbstractContextManager[Reserved | None]:
    """The guard of the kernel plane, to be attached; None where the plan does without."""
    if not plan.uses("bpf-lsm"):
        return nullcontext()
    from mis_run.guards import kernel

    return kernel.reserve(group.unified, group.agent)


def _guard_net(
    guard: net.NetGuard, group: cgroup.Cgroup, link: network.Link | None
) -> net.NetGuard:
    """Attach the programs to the agent's cgroup, and XDP to our end of its link."""
    guard.attach(group.unified)
    if link and link.interface:
        guard.attach_xdp(link.ifindex(), link.address4, link.address6)
    return guard


def _launch(
    plan: Plan, run_dir: state.RunDir, record: report.Record, steps: Steps
) -> tuple[Ending, dict[str, Any]]:
    """Everything in its order; the ExitStack undoes it in reverse, wherever it stops.

    What only waits is started early and awaited where it is needed: BPF programs being loaded, the
    network being connected, the watchdog starting, all while the runtime makes the container.
    """
    settings, enforce = plan.profile, plan.profile.enforce
    with ExitStack() as stack:
        on = stack.enter_context
        loop = on(supervise.loop())
        last = on(ExitStack())  # the kernel takes its time for these: undone after all else
        stack.callback(run_dir.clear)
        addresses = last.enter_context(network.reserve(plan.network, run_dir.id))
        loading = Later(lambda: net.load(plan.network, enforce=enforce))
        group = on(cgroup.create(run_dir.id, plan.host, plan.limits.controllers()))
        steps.done("cgroup")
        dog = last.enter_context(
            liveness.arm(
                loop,
                settings.liveness,
                run_id=run_dir.id,
                cgroup=group.unified,
                record=record.fileno(),
                moves=last.enter_context(group.beside()),
            )
        )
        stack.callback(dog.farewell)
        steps.done("watchdog")
        link = on(network.create(plan.network, run_dir.id, addresses))
        guarding = Later(lambda: _guard_net(loading.result(), group, link))
        steps.done("network")
        group.expect()
        root = on(rootfs.mount(plan, run_dir.path, interior.etc(plan)))
        steps.done("rootfs")
        plane = on(_kernel_plane(plan, group))  # lasts until the container is gone
        stack.callback(dog.farewell)  # as soon as the container is undone: it has nothing to watch
        streams = None if plan.tty else on(stdio.lent())
        inside = interior.describe(plan, run_dir.path, root, link, group)
        group.expect()  # again: the first one lasts 10 ms
        policy = cache(lambda: _while_waiting(plan, root))
        box = on(
            runtime.create(
                bundle.config(plan, inside),
                runtime=plan.runtime(),
                run_id=run_dir.id,
                folder=run_dir.path,
                meanwhile=policy,
            )
        )
        from mis_run import control, names, requests, terminal
        from mis_run.defcon import Tracker
        from mis_run.follow import Follower

        joining = Later(lambda: group.adopt(box.pid))  # the kernel waits for every CPU
        if memfd.sealable():
            memfd.seal(box.pidfd)
        supervise.come_first()
        steps.done("container")
        tracker = Tracker(settings.defcon)
        stance = tracker.stance(enforce=enforce)
        guard = on(closing(guarding.result()))
        guard.canary_pid = box.pid
        guards: dict[str, Guard] = {"net": guard}
        if box.seccomp_fd is not None:
            guards["escape"] = on(escape.attach(box.seccomp_fd, stance))
        info = (run_dir.path / "info/canary").stat()
        if (rules := policy()) is not None and plan.uses("fanotify"):
            guards["file"] = files = on(
                file.attach(box.pid, rules, (info.st_dev, info.st_ino), stance=stance)
            )
        counted = on(counters.attach(group.unified, settings.counters, later=True))
        joining.result()
        steps.done("guards")
        runtime.started(box)
        if box.seccomp_fd is not None and "escape" not in guards:  # crun: only now
            guards["escape"] = on(escape.attach(box.seccomp_fd, stance))
        if plane and rules:  # nothing but the shim runs yet
            guards["kernel"] = kernel = plane.attach(plan, rules, box.pid)
        steps.done("shim")
        follower = Follower(
            loop=loop,
            plan=plan,
            record=record,
            cgroup=group,
            box=box,
            guards=guards,
            tracker=tracker,
            counters=counted,
            denials=briefing.Denials(run_dir.path / "info"),
        )
        follower.watch()
        held = {"lifeline": box.lifeline.fileno()}  # what must stay open until the agent is gone
        kept: list[int] = []  # and what has no name there
        if "file" in guards:
            held["fanotify"] = files.group
        if settings.liveness.on_loss is OnLoss.OPEN:
            from mis_run import resume

            box.on_loss("open")
            known = resume.Known(
                plan=plan,
                policy=rules if "file" in guards else None,
                canary=(info.st_dev, info.st_ino),
                pid=box.pid,
                watchdog=dog.pid,
                sources=((link and link.address4) or "0.0.0.0", (link and link.address6) or "::"),
                record=record.path,
                place=group.place,
                kernel=plane.left(settings.liveness.deadline) if plane else None,
            )
            held |= on(resume.offer(known, run_dir, box, guard, link))
            if plane:
                held["ring"], kept = kernel.ring, plane.inodes()
        elif "file" in guards:
            box.hold(files.group)  # while a copy is open, opens wait for a verdict
        guard.verify(box.probe, box.probe_all)
        _, *others = guards.values()
        for one in others:
            one.verify(box.probe)
        if link and link.interface:
            guard.verify_xdp(link.netns)
        if plan.uses("landlock-scope"):
            from mis_run.guards import scope

            scope.attach(box)
        counted.ready()
        steps.done("verified")
        dog.watching(held, kept)
        steps.done("watched")
        netns = link.netns if link else None
        answering = names.serve_plan(
            plan.network, netns, guard.update, follower.emit_soon, enforce=enforce
        )
        stop_answering = on(answering)
        on(control.serve(loop, run_dir.path / "control.sock", requests.handler(follower)))
        on(supervise.signals(loop, follower.signal))
        follower.on_resize = on(terminal.relay(loop, box.pty))
        follower.watched(dog)
        facts = {**report.facts(plan, record), "covered": [*inside.hidden]}
        run_dir.note(phase="running", pid=box.pid, **facts)
        record.write(Event(kind="run.start", subject=facts))
        if plane:
            kernel.arm(settings.liveness.deadline)
            loop.every(settings.liveness.beat, kernel.renew)
        follower.go(streams)
        steps.done("agent")
        loop.until(lambda: follower.ending is not None)
        dog.pause()  # the agent is gone: undoing takes as long as it takes
        stop_answering()
        if box.wait(SOON):  # nothing of the agent is left that could send
            guard.detach_xdp()
        if link:
            link.leave()
        steps.done("followed")
        assert follower.ending is not None
        return follower.ending, follower.measurements()


def _tell(plan: Plan, record: report.Record, facts: dict[str, Any], *, quiet: bool) -> None:
    """The summary on stderr: always JSON when asked for, else unless quiet and uneventful."""
    if plan.json_report:
        print(json.dumps({"run": record.run_id, **facts}, default=str), file=sys.stderr)
    elif not quiet or record.violations or facts["git"] or facts["tainted"]:
        for line in report.summary(facts, record):
            print(f"mis-run: {line}", file=sys.stderr)
