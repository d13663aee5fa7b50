"""The kernel plane of one run: the plan's policy on the container's inodes, until that is gone.

``prepare`` (before we leave the host's mounts) → ``reserve`` → `Reserved.attach`, once the
container exists.  The reservation is what ends, after the container: so it is made before it.
`Reserved.left` → ``adopt`` is for an agent that outlives its supervisor (`resume`).
"""

from __future__ import annotations

import os
import resource
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from mis_run.bundle import ROOT_CAPABILITIES
from mis_run.dataclass import dataclass, replace
from mis_run.errors import SetupError
from mis_run.events import Event
from mis_run.guards import file, lsm, lsm_lines, lsm_plane, lsm_policy
from mis_run.guards.file_policy import Policy
from mis_run.guards.lsm_abi import EVENT, LAYOUT, Right, RuleFlag
from mis_run.guards.lsm_policy import Compiled, Entry, Place
from mis_run.linux import mountinfo
from mis_run.model import OnLoss, Plan
from mis_run.state import STATE

STDIO = (0, 1, 2)


def prepare() -> None:
    """Load the programs unless this boot has them. Raises SetupError."""
    lsm_plane.ensure().close()
    # Each rule holds its inode by a descriptor.
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


class Reserved:
    """A guard to come for one cgroup."""

    def __init__(self, cgroup: Path, processes: Path) -> None:
        self._cgroup = cgroup
        self._processes = processes
        self._guard: lsm.LsmGuard | None = None
        self._settings: lsm.LsmPolicy | None = None

    def attach(self, plan: Plan, policy: Policy, pid: int) -> lsm.LsmGuard:
        """From here on the agent in the container of init ``pid`` is judged. Raises SetupError."""
        _check_numbers(pid)
        shared = [str(plan.cwd), *(str(bind.target) for bind in plan.binds)]
        # Where the file guard judges as well, what it proves itself by must reach it.
        left = file.tried() if plan.uses("fanotify") else ()
        lines = lsm_lines.make(policy, f"/proc/{pid}/root", str(plan.cwd), shared, left)
        root = os.open(f"/proc/{pid}/root", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            rules = lsm_policy.compile(lines, root, lsm_policy.devices(pid), lsm_policy.points(pid))
        finally:
            os.close(root)
        profile = plan.profile
        settings = lsm.LsmPolicy(
            rules=_with_stdio(rules),
            enforce=profile.enforce,
            on_loss="open" if profile.liveness.on_loss is OnLoss.OPEN else "closed",
            capabilities=ROOT_CAPABILITIES if plan.user.uid == 0 else (),
            # Weighted violations are the supervisor's to count: its levels are carried over.
            defcon=replace(profile.defcon, thresholds=NEVER)
            if profile.defcon.weights
            else profile.defcon,
            processes=self._processes,
            canary=lsm_lines.CANARY,
        )
        self._guard = lsm.LsmGuard(self._cgroup, settings, lsm_plane.ensure())
        self._settings = settings
        self._guard.register()
        return self._guard

    def left(self, deadline: float) -> Left:
        """For a supervisor after us, who has to `renew` within ``deadline`` seconds each time."""
        assert self._settings is not None
        rules = replace(self._settings.rules, held=[])
        policy = replace(self._settings, rules=rules, deadline=deadline)
        return Left(lsm_plane.version(), LAYOUT, policy)

    def inodes(self) -> list[int]:
        """Descriptors that must stay open as long as the rules stand (`Compiled.held`)."""
        assert self._settings is not None
        return self._settings.rules.held

    def close(self) -> None:
        """The agent is gone, and with it all that the plane knows of it."""
        if self._guard is not None:
            self._guard.close()


NEVER = (0xFFFFFFFF,) * 4


@dataclass(frozen=True)
class Left:
    """What was decided of an agent, for another supervisor: the ``version`` of the plane that it
    began with, the ``layout`` of its maps, and the policy without descriptors."""

    version: str
    layout: tuple[str, ...]
    policy: lsm.LsmPolicy

    def check(self) -> None:
        """Raise SetupError when we could not take the agent over."""
        if self.layout != LAYOUT:
            raise SetupError(
                "kernel plane: this run was begun by another version of mis-run",
                hint="mis attach of that version",
            )
        if not (lsm_plane.TOP / self.version).is_dir():
            raise SetupError(f"kernel plane: {lsm_plane.TOP / self.version} is not here")


@contextmanager
def adopt(left: Left, cgroup: Path, ring: int, level: int) -> Iterator[lsm.LsmGuard]:
    """The guard of an agent that lost its supervisor, by its ``ring``; its deadline counts anew.

    What the kernel knows of it stays when the context ends: it goes with the cgroup
    (`lsm_plane.sweep`), never before the agent.  Raises SetupError.
    """
    plane = lsm_plane.Plane(lsm_plane.TOP / left.version)
    guard = lsm.LsmGuard(cgroup, left.policy, plane, os.dup(ring))
    try:
        guard.take_over(level)
        yield guard
    finally:
        guard.release()


def backlog(guard: lsm.LsmGuard) -> list[Event]:
    """What was told while nobody read: as many events as the ring has room for."""
    turns = lsm.RING // EVENT.size // lsm.BATCH + 1
    return [event for _ in range(turns) for event in guard.read()]


@contextmanager
def reserve(cgroup: Path, processes: Path) -> Iterator[Reserved]:
    """The guard of ``cgroup`` ends with this context; ``processes`` is where below it they are."""
    reserved = Reserved(cgroup, processes)
    try:
        yield reserved
    finally:
        reserved.close()


def _check_numbers(pid: int) -> None:
    """Raise SetupError unless every file of the layers that we made has a number of its own.

    Without ``xino`` a file above may have the inode number, and so the rule, of one below
    (overlayfs.rst, inode properties).  The kernel drops the option where it cannot be had.
    """
    for mount in mountinfo.read(pid):
        ours = mount.kind == "overlay" and f"upperdir={STATE}/" in mount.options
        if ours and "xino=on" not in mount.options.split(","):
            raise SetupError(
                f"kernel plane: the overlay at {mount.point} has no inode numbers of its own",
                hint="use the host plane: --plane host",
            )


def _with_stdio(rules: Compiled) -> Compiled:
    """Terminals, FIFOs and /dev/null of the host that our 0, 1 and 2 are: the agent gets them as
    they are (`stdio`), and may open them anew (``/dev/stderr``)."""
    entries, texts = dict(rules.entries), (*rules.texts, "stdin, stdout, stderr")
    tables = [_devices(f"/proc/{pid}") for pid in ("self", os.getppid(), 1)]
    for fd in STDIO:
        with suppress(OSError):  # closed
            facts = os.fstat(fd)
            if not (stat.S_ISCHR(facts.st_mode) or stat.S_ISFIFO(facts.st_mode)):
                continue  # a file reaches the agent by a pipe, a socket cannot be opened
            mount = mountinfo.id_of(fd)
            device = next((table[mount] for table in tables if mount in table), None)
            if device is None:
                device = os.major(facts.st_dev) << 20 | os.minor(facts.st_dev)
            flags = RuleFlag.EXPLICIT | RuleFlag.WORKSPACE
            given = Right.READ | Right.WRITE
            place = Place(device, facts.st_ino)
            entries.setdefault(place, Entry(given, Right(0), len(texts), flags))
    return replace(rules, entries=entries, texts=texts)


def _devices(process: str) -> Mapping[int, int]:
    """Mount id → device, of all mounts that a process sees; nothing where we may not look."""
    found: Iterable[mountinfo.Mount] = ()
    with suppress(OSError):
        found = mountinfo.read(process.rpartition("/")[2])
    return {m.id: int(m.device.split(":")[0]) << 20 | int(m.device.split(":")[1]) for m in found}
