"""A container that outlives its supervisor (``on_loss = "open"``), and ``mis attach`` for it.

As `resume` does for our own containers; what differs is that nothing of ours is inside: each
process that an engine executed has a filter of its own, whose listener the watchdog holds too, and
guards are proven by a canary beside the container.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from mis_run import control, liveness, names, report, requests, resume, state, supervise
from mis_run.briefing import Denials
from mis_run.errors import SetupError
from mis_run.events import Event
from mis_run.guards import counters, net
from mis_run.guards.file_policy import Policy
from mis_run.hints import Any
from mis_run.liveness import Watchdog
from mis_run.model import Plan
from mis_run.oci import container
from mis_run.oci.order import INFO, SOCKET
from mis_run.oci.supervisor import ENDED, Watcher, own_address
from mis_run.resume import Known
from mis_run.supervise import Loop

FILTER = "seccomp."
"""Names of the listeners that the watchdog holds begin so (shim/watchdog.c)."""


@contextmanager
def offer(
    watcher: Watcher,
    dog: Watchdog,
    guard: net.NetGuard,
    run_dir: state.RunDir,
    policy: Policy | None,
    netns: int | None,
) -> Iterator[dict[str, int]]:
    """Descriptors for the watchdog to hold, by name. Every later listener follows them."""
    canary = (run_dir.path / INFO / "canary").stat()
    known = Known(
        plan=watcher.plan,
        policy=policy,
        canary=(canary.st_dev, canary.st_ino),
        pid=watcher.box.pid,
        watchdog=dog.pid,
        sources=("0.0.0.0", "::"),
        record=watcher.record.path,
        place=watcher.cgroup.place,
        container=str(state.facts(run_dir.path)["container"]),
    )
    with resume.offer(known, run_dir, watcher.box, guard, None) as held:
        _hand_listeners_on(watcher, dog)
        held |= {f"{FILTER}{number}": number for number in watcher.listeners}
        yield held if netns is None else {**held, "netns": netns}


def _hand_listeners_on(watcher: Watcher, dog: Watchdog) -> None:
    def hold(number: int) -> None:
        with suppress(SetupError):  # lost without a copy, that filter's calls fail: closed
            dog.hold(f"{FILTER}{number}", number)

    watcher.on_listener = hold
    watcher.on_listener_gone = lambda number: dog.drop(f"{FILTER}{number}")


def run(
    stack: ExitStack,
    path: Path,
    known: Known,
    beats: socket.socket,
    held: Mapping[str, int],
) -> int:
    """Guard the container again, and follow it to its end. Raises SetupError, VerifyError."""
    on, plan, settings = stack.enter_context, known.plan, known.plan.profile
    loop = on(supervise.loop())
    record = on(report.open_record(path.name, known.record))
    dog = on(liveness.adopt(loop, settings.liveness, known.watchdog, beats))
    box = on(container.box_of(known.pid))
    group = container.cgroup_of(known.pid, plan.host)
    tracker = resume.tracker(known)
    guard = on(resume.network(known, held, tracker))
    files = on(resume.files(known, held, tracker)) if known.policy is not None else None
    watcher = Watcher(
        loop=loop,
        plan=plan,
        record=record,
        cgroup=group,
        box=box,
        guards={"net": guard} | ({"file": files} if files else {}),
        tracker=tracker,
        counters=on(counters.attach(group.unified, settings.counters)),
        denials=Denials(path / INFO),
    )
    watcher.watch()
    filters = {name: fd for name, fd in held.items() if name.startswith(FILTER)}
    for fd in filters.values():
        watcher.guard(os.dup(fd))
    with container.canary(box, group) as guard.canary_pid:
        guard.beat(box.probe)
        if files is not None:
            files.beat(box.probe)
    guard.canary_pid = 0
    _serve(stack, path, plan, watcher, guard, held.get("netns"))
    on(supervise.signals(loop, watcher.signal))
    watcher.watched(dog)
    _rename(watcher, dog, filters)
    subject = {"supervisor": os.getpid(), "level": tracker.level}
    record.write(Event(kind="run.attached", subject=subject))
    print(f"mis: supervising container {known.container}", file=sys.stderr)
    return _follow(loop, watcher, dog)


def _rename(watcher: Watcher, dog: Watchdog, filters: Mapping[str, int]) -> None:
    """The watchdog knows the listeners by our numbers from now on."""
    for name in filters:
        dog.drop(name)
    _hand_listeners_on(watcher, dog)
    for number in watcher.listeners:
        watcher.on_listener(number)


def _serve(
    stack: ExitStack,
    path: Path,
    plan: Plan,
    watcher: Watcher,
    guard: net.NetGuard,
    netns: int | None,
) -> None:
    """What listens: for processes that the engine executes, for names, for ``mis``."""
    on = stack.enter_context
    if "seccomp-notify" in {one.name for one in plan.mechanisms if one.finding.ok}:
        listener = on(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC))
        (path / SOCKET).unlink(missing_ok=True)
        listener.bind(str(path / SOCKET))
        listener.listen(16)
        watcher.listen(listener)
        on(
            names.serve_plan(
                plan.network,
                netns,
                guard.update,
                watcher.emit_soon,
                enforce=plan.profile.enforce,
                address=own_address(path.name),
            )
        )
    (path / "control.sock").unlink(missing_ok=True)
    on(control.serve(watcher.loop, path / "control.sock", requests.handler(watcher)))


def _follow(loop: Loop, watcher: Watcher, dog: Watchdog) -> int:
    watcher.go()
    loop.until(lambda: watcher.ending is not None)
    dog.pause()
    assert watcher.ending is not None
    code = None if watcher.ending is ENDED else watcher.ending.code
    last: dict[str, Any] = {"ending": watcher.ending.how, "code": code, **watcher.measurements()}
    watcher.record.write(Event(kind="run.exit", subject=last))
    return watcher.ending.code
