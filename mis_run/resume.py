"""A run that outlives its supervisor (``on_loss = "open"``), and `attach`, which takes it over.

`offer` leaves with the watchdog everything that a new supervisor needs: descriptors by name, and
beside the run's state what was decided (`Known`, readable by root only).  `attach` connects to the
watchdog, gets them, attaches and proves every guard anew, and follows the agent to its end; the
watchdog then watches the new supervisor as it watched the old one.
"""

from __future__ import annotations

import os
import pickle
import socket
import sys
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path

from mis_run import control, gc, liveness, names, report, state, supervise, taint, terminal
from mis_run.box import Box
from mis_run.briefing import Denials
from mis_run.cgroup import Cgroup
from mis_run.dataclass import dataclass
from mis_run.defcon import Tracker
from mis_run.errors import SetupError, UsageError
from mis_run.events import Event
from mis_run.guards import counters, escape, file, net
from mis_run.guards.file_objects import Identity
from mis_run.guards.file_policy import Policy
from mis_run.hints import TYPE_CHECKING, Any
from mis_run.jsonable import plain
from mis_run.model import Plan

if TYPE_CHECKING:
    from mis_run.guards import kernel
    from mis_run.network import Link

SOCKET, KNOWN = "attach.sock", "known"
PATIENCE = 5.0  # seconds the watchdog gets to hand everything over
MAPS = "map."


@dataclass(frozen=True)
class Known:
    """What was decided and made before the supervisor was lost. ``watchdog`` and ``pid`` (of the
    container's init) are process ids."""

    plan: Plan
    policy: Policy | None
    canary: Identity
    pid: int
    watchdog: int
    sources: tuple[str, str]
    record: Path | None
    place: str  # of the cgroup in its hierarchies
    container: str | None = None  # an engine's, by its id (`oci.attach`)
    kernel: kernel.Left | None = None


@contextmanager
def offer(
    known: Known,
    run_dir: state.RunDir,
    box: Box,
    guard: net.NetGuard,
    link: Link | None,
) -> Iterator[dict[str, int]]:
    """Descriptors for the watchdog to hold, by name; valid until the context ends."""
    (run_dir.path / KNOWN).touch(mode=0o600)
    (run_dir.path / KNOWN).write_bytes(pickle.dumps(known))
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC) as listener:
        listener.bind(str(run_dir.path / SOCKET))
        (run_dir.path / SOCKET).chmod(0o600)
        listener.listen(1)
        held = {"init": box.pidfd, "lock": run_dir.lock, "attach": listener.fileno()}
        held |= {f"{MAPS}{name}": fd for name, fd in guard.maps().items()}
        for name, fd in (("seccomp", box.seccomp_fd), ("pty", box.pty)):
            if fd is not None:
                held[name] = fd
        if link is not None:
            held["netns"] = link.netns
        yield held


def attach(which: str) -> int:
    """Take over a run that has lost its supervisor; its exit code.

    Raises NotFound, UsageError when it has one, SetupError, VerifyError.
    """
    path, facts = state.find(which)
    if control.answers(path):
        raise UsageError(f"run {path.name} has a supervisor", hint=f"mis top {path.name}")
    try:
        # Root's own file in root's own folder, written by `offer`.
        known: Known = pickle.loads((path / KNOWN).read_bytes())
    except FileNotFoundError:
        raise UsageError(
            f"run {path.name} cannot be attached: its profile has on_loss = 'closed'",
            hint="it ends with its supervisor",
        ) from None
    if known.kernel is not None:
        known.kernel.check()  # who connects to the watchdog is responsible from then on
    with ExitStack() as stack:
        beats, held = stack.enter_context(_take(path / SOCKET))
        if known.container is None:
            code = _supervise(stack, path, known, beats, held, facts)
        else:
            from mis_run.oci import attach as containers

            code = containers.run(stack, path, known, beats, held)
    gc.collect()
    return code


@contextmanager
def _take(path: Path) -> Iterator[tuple[socket.socket, dict[str, int]]]:
    """The connection to the watchdog, and every descriptor it held, by name."""
    held: dict[str, int] = {}
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC) as beats:
        beats.settimeout(PATIENCE)
        try:
            beats.connect(str(path))
            while True:
                word, fds, _, _ = socket.recv_fds(beats, 64, 1)
                if word == b"end":
                    break
                if not word or not fds:
                    raise SetupError("the watchdog hung up", hint="mis ps")
                held[word.decode("ascii")] = fds[0]
            yield beats, held
        except (OSError, TimeoutError) as error:
            raise SetupError(f"the watchdog does not answer: {error}", hint="mis ps") from error
        finally:
            for fd in held.values():
                _close(fd)


def _close(fd: int) -> None:
    try:
        os.close(fd)
    except OSError:  # a part that was given it has closed it already
        return


def _supervise(
    stack: ExitStack,
    path: Path,
    known: Known,
    beats: socket.socket,
    held: Mapping[str, int],
    facts: Mapping[str, Any],
) -> int:
    """As `launch._launch`, from the point where the agent runs."""
    from mis_run import requests
    from mis_run.follow import Follower
    from mis_run.guards import Guard

    on, plan, settings = stack.enter_context, known.plan, known.plan.profile
    loop = on(supervise.loop())
    record = on(report.open_record(path.name, known.record, known.plan.untrusted()))
    dog = on(liveness.adopt(loop, settings.liveness, known.watchdog, beats))
    group = _cgroup(path.name, known)
    lifeline = socket.socket(fileno=os.dup(held["lifeline"]))
    stack.callback(lifeline.close)
    box = Box([], path.name, known.pid, lifeline)
    stack.callback(box.close)
    box.pty = held.get("pty")
    track = tracker(known)
    guard = on(network(known, held, track))
    guard.canary_pid = known.pid
    guards: dict[str, Guard] = {"net": guard}
    if "seccomp" in held:
        stance = track.stance(enforce=settings.enforce)
        guards["escape"] = on(escape.attach(held["seccomp"], stance))
    if known.policy is not None:
        guards["file"] = on(files(known, held, track))
    if known.kernel is not None:
        from mis_run.guards import kernel

        plane = on(kernel.adopt(known.kernel, group.unified, held["ring"], track.level))
        guards["kernel"] = plane
        loop.every(settings.liveness.beat, plane.renew)
        for event in kernel.backlog(plane):
            record.write(event)  # not counted: the kernel has done that, each at its time
    counted = on(counters.attach(group.unified, settings.counters))
    follower = Follower(
        loop=loop,
        plan=plan,
        record=record,
        cgroup=group,
        box=box,
        guards=guards,
        tracker=track,
        counters=counted,
        denials=Denials(path / "info"),
    )
    follower.watch()
    box.on_loss("open")  # as it is; answers before this one were for the supervisor that is lost
    for one in guards.values():
        one.beat(box.probe)
    netns = held.get("netns")
    on(
        names.serve_plan(
            plan.network, netns, guard.update, follower.emit_soon, enforce=settings.enforce
        )
    )
    (path / "control.sock").unlink(missing_ok=True)
    on(control.serve(loop, path / "control.sock", requests.handler(follower)))
    on(supervise.signals(loop, follower.signal))
    follower.on_resize = on(terminal.relay(loop, box.pty))
    follower.watched(dog)
    subject: dict[str, Any] = {"supervisor": os.getpid(), "level": track.level}
    if known.kernel is not None:
        subject["kernel"] = plain(plane.counts())
    record.write(Event(kind="run.attached", subject=subject))
    print(f"mis: supervising {path.name}: {' '.join(facts.get('command', []))}", file=sys.stderr)
    follower.follow()
    follower.catch_up()
    loop.until(lambda: follower.ending is not None)
    dog.pause()
    assert follower.ending is not None
    last = {"ending": follower.ending.how, "code": follower.ending.code, **follower.measurements()}
    record.write(Event(kind="run.exit", subject=last))
    return follower.ending.code


def tracker(known: Known) -> Tracker:
    """DEFCON as it was, by the record: losing a supervisor resets nothing."""
    settings, path = known.plan.profile, known.record
    found = Tracker(settings.defcon)
    events = report.read(path) if path is not None and path.exists() else None
    taint.restore(found, events, settings)
    return found


def network(
    known: Known, held: Mapping[str, int], track: Tracker
) -> AbstractContextManager[net.NetGuard]:
    """The network guard, whose programs were attached all the time."""
    return net.adopt(
        known.plan.network,
        {name.removeprefix(MAPS): fd for name, fd in held.items() if name.startswith(MAPS)},
        known.sources,
        enforce=known.plan.profile.enforce,
        stance=track.stance(enforce=known.plan.profile.enforce),
    )


def files(
    known: Known, held: Mapping[str, int], track: Tracker
) -> AbstractContextManager[file.FileGuard]:
    """The file guard, by the group that marks the container's mounts already."""
    assert known.policy is not None
    return file.attach(
        known.pid,
        known.policy,
        known.canary,
        group=os.dup(held["fanotify"]),
        stance=track.stance(enforce=known.plan.profile.enforce),
    )


def _cgroup(run_id: str, known: Known) -> Cgroup:
    from pathlib import PurePosixPath

    host = known.plan.host
    assert host.unified is not None
    return Cgroup(run_id, host.unified, host.controllers, PurePosixPath(known.place).parent)
