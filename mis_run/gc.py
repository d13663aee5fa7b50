"""Remove what a killed launcher left: by name, idempotent, never touching a live run.

Mounts, network namespaces, veth pairs and BPF programs die with their last process or cgroup, so
what can be left is a cgroup, entries of the shared nftables table, an address index and the state
directory.  The state directory goes last: while anything is left, a later gc still finds it.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field

from mis_run import cgroup, network, state


@dataclass(slots=True)
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


def collect() -> Removed:
    """Remove every remainder of every dead run."""
    removed = Removed()
    if not state.STATE.is_dir():
        return removed
    with state.exclusive():
        paths = state.run_dirs()
        live = {path.name for path in paths if state.is_live(path)}
        # Processes first: nothing else can be removed while they hold it.
        removed.cgroups = cgroup.gc(live)
        removed.network = network.gc(live)
        for path in paths:
            if path.name not in live:
                shutil.rmtree(path, ignore_errors=True)
                removed.runs.append(path.name)
    return removed
