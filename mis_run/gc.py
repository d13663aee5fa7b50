"""Remove what a killed launcher left: by name, idempotent, never touching a live run.

Mounts, network namespaces, veth pairs and BPF programs die with their last process or cgroup, so
what can be left is a cgroup, entries of the shared nftables table, an address index and the state
directory.  The state directory goes last: while anything is left, a later gc still finds it.
"""

from __future__ import annotations

import os
import select
import signal
from contextlib import suppress
from pathlib import Path

from mis_run import cgroup, cgroup_kill, network, state, trees
from mis_run.dataclass import dataclass, field

PLANE = Path("/sys/fs/bpf/mis-run")  # lsm_plane.TOP, without importing it


@dataclass
class Removed:
    """What one collection removed."""

    runs: list[str] = field(default_factory=list)
    cgroups: list[str] = field(default_factory=list)
    network: list[str] = field(default_factory=list)


def sweep() -> Removed | None:
    """The cheap check at every launch: a full `collect` only if some run directory is dead."""
    if all(state.is_live(path) for path in state.run_dirs()):
        return None
    return collect()


def _end_runtimes(dead: list[Path]) -> None:
    """Kill the OCI runtimes that still work for dead runs: they would go on making things.

    They die with their launcher (PR_SET_PDEATHSIG), unless it died before that was set.  Known by
    the path of the run's own state directory in their command line, and killed by pidfd.
    """
    marks = [f"{path}/".encode() for path in dead]
    for entry in Path("/proc").iterdir() if marks else ():
        if not entry.name.isdecimal():
            continue
        with suppress(OSError):  # it ended meanwhile
            fd = os.pidfd_open(int(entry.name))
            try:
                words = (entry / "cmdline").read_bytes()
                if any(mark in words for mark in marks) and int(entry.name) != os.getpid():
                    signal.pidfd_send_signal(fd, signal.SIGKILL)
                    poll = select.poll()
                    poll.register(fd, select.POLLIN)
                    poll.poll(1000)
            finally:
                os.close(fd)


def _end_containers(dead: list[Path], live: list[Path]) -> None:
    """Kill an engine's containers that lost supervisor and watchdog: nobody counts there any more.

    By cgroup, unless a live run has the same one: engines use a container's name again.
    """
    guarded = {state.facts(path).get("cgroup") for path in live}
    for path in dead:
        group = state.facts(path).get("cgroup")
        if isinstance(group, str) and group not in guarded:
            with suppress(OSError):  # it is gone already
                cgroup_kill.write(Path(group) / "cgroup.kill", "1")


def _sweep_plane() -> None:
    """Have the kernel plane forget agents whose cgroup is gone, where this boot has it."""
    if PLANE.is_dir() and (unified := cgroup.detect()[1]):
        from mis_run.guards import lsm_plane

        lsm_plane.sweep(unified)


def collect() -> Removed:
    """Remove every remainder of every dead run."""
    removed = Removed()
    if not state.STATE.is_dir():
        return removed
    with state.exclusive():
        paths = state.run_dirs()
        live = {path.name for path in paths if state.is_live(path)}
        # Processes first: nothing else can be removed while they hold it.
        dead = [path for path in paths if path.name not in live]
        _end_runtimes(dead)
        _end_containers(dead, [path for path in paths if path.name in live])
        removed.cgroups = cgroup.gc(live)
        removed.network = network.gc(live)
        _sweep_plane()
        for path in paths:
            if path.name not in live:
                trees.remove(path)
                removed.runs.append(path.name)
    return removed
