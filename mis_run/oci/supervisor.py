"""One process per container of an engine: guards it from before its first instruction to its end.

The same parts as `launch._launch`, in the same order, around a container that somebody else makes,
starts, pauses and removes.  It outlives the call that began it and belongs to no session; if it is
lost, the watchdog kills the container.  Out of scope: being started and heard (`guardian`).
"""

from __future__ import annotations

import os
import select
import socket
from collections.abc import Callable
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path

from mis_run import (
    briefing,
    control,
    host,
    liveness,
    names,
    namespace,
    network_detect,
    report,
    requests,
    runtime,
    state,
    supervise,
)
from mis_run.dataclass import replace
from mis_run.defcon import Tracker
from mis_run.errors import GuardLost, MisError
from mis_run.events import Event
from mis_run.follow import Ending, Follower
from mis_run.guards import counters, escape, file, file_policy, net
from mis_run.guards.file_policy import Policy
from mis_run.hints import Any
from mis_run.later import Later
from mis_run.linux import memfd
from mis_run.model import NetMode, NetPlan, OnLoss, Plan
from mis_run.oci import container, planning, runs
from mis_run.oci.order import CANARY, Caller, Order, Place
from mis_run.rootfs import Root

ENDED = Ending("ended", 0)


def own_address(run_id: str) -> str:
    """Where in its network namespace a container finds our resolver.

    Containers may share one (``--network container:X``), so each run has an address of its own.
    """
    number = int(run_id, 16)
    return f"127.77.{number >> 8 & 255}.{number % 254 + 1}"


def policy_of(plan: Plan) -> Policy:
    """What the file guard judges by: all of an image is the container's own to change."""
    # Without a working directory of its own the policy must not take our "/" for its.
    somewhere = plan if plan.cwd != Path("/") else replace(plan, cwd=Path("/nonexistent"))
    assert plan.rootfs is not None
    made = replace(file_policy.build(somewhere, Root(plan.rootfs, {})), places={"": True})
    return file_policy.with_image(made, str(plan.rootfs))


class Watcher(Follower):
    """Follows a container whose exit code its engine learns, not we."""

    def __init__(self, **parts: Any) -> None:
        super().__init__(**parts)
        self.listeners: set[int] = set()  # one per filter: the container's, and each exec's
        self.on_listener: Callable[[int], None] = lambda number: None
        self.on_listener_gone: Callable[[int], None] = lambda number: None

    def go(self, streams: tuple[int, int, int] | None = None) -> None:
        """The engine starts it whenever it wants, with streams of its own."""
        self.loop.remove(self.box.fileno())
        self._begin()

    def _prove(self) -> None:
        """Nothing: there is no process of ours inside that could try forbidden acts for us."""

    def _gone(self) -> None:
        self._finish(ENDED)
        self.loop.remove(self.box.pidfd)

    def listen(self, listener: socket.socket) -> None:
        """Guard each process that the engine executes in the container later (``docker exec``).

        Its filter is installed, and its listener handed to us, before its first instruction.
        """
        listener.setblocking(False)
        self.loop.add(listener.fileno(), partial(self._knocked, listener))

    def _knocked(self, listener: socket.socket) -> None:
        with suppress(BlockingIOError):  # gone again before we came to it
            peer, _ = listener.accept()
            self.loop.add(peer.fileno(), partial(self._handed_over, peer))

    def _handed_over(self, peer: socket.socket) -> None:
        self.loop.remove(peer.fileno())
        with peer:
            _, fds, _, _ = socket.recv_fds(peer, 64 << 10, 4)
        for fd in fds:
            self.guard(fd)

    def expect(self, peer: socket.socket) -> None:
        """Guard the container's own filter, which comes when it is started: it waits for us then.

        Where none comes, or one that guards nothing, the container is killed.
        """

        def come() -> None:
            self.loop.remove(peer.fileno())
            try:
                with peer:
                    self.guard(runtime.received(peer))
                container.check_filter(self.box.pid)
            except MisError as error:
                self.record.write(Event(kind="canary.lost", subject={"why": error.message}))
                self.kill(Ending(f"killed: {error.message}", GuardLost.exit_code))

        self.loop.add(peer.fileno(), come)

    def guard(self, listener: int) -> None:
        """Answer one more filter's listener, which is ours from now on."""
        stack = ExitStack()
        stack.callback(os.close, listener)
        guard = stack.enter_context(
            escape.attach(listener, self.tracker.stance(enforce=self.plan.profile.enforce))
        )
        number = guard.fileno()
        self.guards = {**self.guards, f"escape-{number}": guard}
        self.listeners.add(listener)
        self.on_listener(listener)

        def serve() -> None:
            self.emit(guard.read())
            if guard.over:  # that process and its children are gone
                self.loop.remove(number)
                self.guards = {k: v for k, v in self.guards.items() if v is not guard}
                self.listeners.discard(listener)
                self.on_listener_gone(listener)
                stack.close()

        self.loop.add(number, serve)


def supervise_container(order: Order, run_dir: state.RunDir, place: Place, caller: Caller) -> None:
    """Guard one container to its end. Raises MisError for everything that fails on the way."""
    with report.open_record(run_dir.id, None) as record:
        run_dir.note(
            container=order.container,
            engine_root=order.root,
            capabilities=order.capabilities,
        )
        facts: dict[str, Any] = {}
        try:
            facts = _guarded(order, run_dir, place, record, caller)
        finally:
            subject = facts or {"message": "the container was not guarded"}
            kind = "run.exit" if facts else "run.failed"
            record.write(Event(kind=kind, subject=subject))


def _guarded(
    order: Order, run_dir: state.RunDir, place: Place, record: report.Record, caller: Caller
) -> dict[str, Any]:
    """Everything in its order, as far as possible while the OCI runtime makes the container."""
    settings, enforce = order.profile, order.profile.enforce
    with ExitStack() as stack:
        on = stack.enter_context
        loop = on(supervise.loop())
        loading = Later(lambda: net.load(_network(order), enforce=enforce))
        stack.callback(loading.wait)
        machine = host.probe()
        namespace.forget()  # the container has its own
        plan = planning.of(order, machine)
        planning.check(plan, by_hook=order.by_hook)
        resolver = own_address(run_dir.id)
        briefing.write(plan, place.info)
        place.resolv_conf.write_text(names.resolv_conf(resolver))
        loading.wait()
        pid = caller.pid()
        box = on(container.box_of(pid))
        group = container.cgroup_of(pid, plan.host)
        run_dir.note(cgroup=str(group.unified), pid=pid)
        dog = on(
            liveness.arm(
                loop,
                settings.liveness,
                run_id=run_dir.id,
                cgroup=group.unified,
                record=record.fileno(),
            )
        )
        guard = on(net.attach(group.unified, loading.result()))
        if order.sealed:
            memfd.seal(box.pidfd)
        tracker = Tracker(settings.defcon)
        first, coming = None, None
        if not order.by_hook:
            if not select.select([place.listener], [], [], 0)[0]:
                container.check_filter(pid)  # it says what is missing
            first, coming = runtime.filter_of(place.listener)
            if first is not None:
                container.check_filter(pid)
        policy = files = None
        if plan.uses("fanotify"):
            info = (place.info / CANARY).stat()
            policy = policy_of(plan)
            files = on(
                file.attach(
                    pid,
                    policy,
                    (info.st_dev, info.st_ino),
                    stance=tracker.stance(enforce=enforce),
                )
            )
        counted = on(counters.attach(group.unified, settings.counters, later=True))
        supervise.come_first()
        watcher = Watcher(
            loop=loop,
            plan=plan,
            record=record,
            cgroup=group,
            box=box,
            guards={"net": guard} | ({"file": files} if files else {}),
            tracker=tracker,
            counters=counted,
            denials=briefing.Denials(place.info),
        )

        def close() -> None:
            # Whatever ends us while the container lives ends the container.
            if watcher.ending is None:
                group.kill()

        stack.callback(close)
        watcher.watch()
        if first is not None:
            watcher.guard(first)
        if coming is not None:  # crun's filter, with the container's start
            watcher.expect(coming)
        with container.canary(box, group) as guard.canary_pid:
            guard.verify(box.probe)
            if files is not None:
                files.beat(box.probe)
        guard.canary_pid = 0
        counted.ready()
        if not order.by_hook:
            watcher.listen(place.listener)
        netns = None
        if plan.network.mode is not NetMode.HOST:
            netns = os.open(f"/proc/{pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
            stack.callback(os.close, netns)
        held = {"fanotify": files.group} if files else {}
        if settings.liveness.on_loss is OnLoss.OPEN:
            from mis_run.oci import attach

            held |= on(attach.offer(watcher, dog, guard, run_dir, policy, netns))
        dog.watching(held)
        on(
            names.serve_plan(
                # Whom a hook guards asks the engine's resolver, as far as rules allow that.
                replace(plan.network, mode=NetMode.NONE) if order.by_hook else plan.network,
                netns,
                guard.update,
                watcher.emit_soon,
                enforce=enforce,
                address=resolver,
            )
        )
        on(control.serve(loop, run_dir.path / "control.sock", requests.handler(watcher)))
        watcher.watched(dog)
        subject = {"container": order.container, **report.facts(plan, record)}
        run_dir.note(phase="running", **subject)
        record.write(Event(kind="run.start", subject=subject))
        watcher.go()
        runs.note(run_dir.path, order.root, order.container, order.runtime)
        caller.say(guarded=True)
        loop.until(lambda: watcher.ending is not None)
        dog.pause()
        assert watcher.ending is not None
        ending = watcher.ending
        code = None if ending is ENDED else ending.code  # the engine knows the container's own
        return {"ending": ending.how, "code": code, **watcher.measurements()}


def _network(order: Order) -> NetPlan:
    """The network rules, which need nothing of the machine but its addresses."""
    here = replace(planning.SKETCH, addresses=network_detect.host_addresses())
    return planning.of(order, here).network
