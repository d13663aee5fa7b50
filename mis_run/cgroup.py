"""The cgroup of one run: its identity, its limits' numbers, its end.

``mis/<id>`` in cgroup v2 is what guards attach to and what is frozen and killed; the container
lives in ``mis/<id>/agent`` below it (so that no process is ever in a cgroup that has children), and
in directories of the same names in every v1 hierarchy, where the runtime writes the limits.
Out of scope: which hierarchies there are (`cgroup_detect`), how freezing and killing work
(`cgroup_kill`), what the numbers mean (`cgroup_stats`).
"""

from __future__ import annotations

import errno
import os
import re
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path, PurePosixPath

from mis_run import cgroup_kill, cgroup_own, cgroup_stats
from mis_run.cgroup_detect import (
    LIMITS,
    PARENT,
    PROBE,
    detect,
    mount_private,
    places,
    supported,
)
from mis_run.cgroup_own import WATCHDOG, find, make, remove_if_unused
from mis_run.cgroup_stats import Usage
from mis_run.errors import SetupError
from mis_run.events import Event
from mis_run.later import Later
from mis_run.model import Host

__all__ = ["Cgroup", "Usage", "create", "detect", "gc", "mount_private", "supported"]

LEAF = "agent"
EMPTY_WITHIN = 5.0  # seconds a killed cgroup gets to become empty, and to be removed
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,62}")
RUN_ID = re.compile(r"[0-9a-f]{8}")
OURS = PurePosixPath("/", PARENT)
PARENTS = (PARENT, "mis.slice/mis-*.scope")  # of runs, in every hierarchy


class Cgroup:
    """One run's cgroup. ``unified`` is its v2 identity directory, ``place`` that directory's path
    from the root of each hierarchy, ``oci_path`` the runtime's ``linux.cgroupsPath``.

    ``unavailable`` maps limits that could not be passed down to ``agent`` to the kernel's reason.
    """

    def __init__(
        self,
        run_id: str,
        root: Path,
        controllers: Mapping[str, Path],
        parent: PurePosixPath = OURS,
        leaf: str = LEAF,
    ) -> None:
        self.place = str(parent / run_id)
        self.oci_path = str(PurePosixPath(self.place, leaf))
        self.unified = root / self.place[1:]
        self.agent = self.unified / leaf
        self.unavailable: dict[str, str] = {}
        self._root = root
        self._tops = list(dict.fromkeys([root, *controllers.values()]))
        self._v1 = {
            name: path / self.place[1:] for name, path in controllers.items() if path != root
        }
        self._v2 = [name for name, path in controllers.items() if path == root]
        self._places = cgroup_stats.Places(self.unified, self._v1, leaf)
        self._watch = cgroup_stats.LimitsWatch(self._places)

    @property
    def perf(self) -> Path:
        """The directory to hand to perf_event_open(2): where the perf_event controller lives."""
        return self._v1.get("perf_event", self.unified)

    # ---- processes ------------------------------------------------------------------------

    def adopt(self, pid: int) -> None:
        """Make sure that ``pid`` is in the agent's v2 cgroup: in hybrid mode runtimes differ.

        Moving waits for an RCU grace period, looking does not.  Raises SetupError when the kernel
        refuses (the process is gone).
        """
        try:
            if places(Path(f"/proc/{pid}")).get("") == self.oci_path:
                return
            self.agent.mkdir(exist_ok=True)
            (self.agent / "cgroup.procs").write_text(str(pid))
        except OSError as error:
            message = f"cannot put process {pid} into {self.agent}: {error.strerror}"
            raise SetupError(message) from error

    def expect(self) -> Later[None]:
        """A process is about to be moved in: the kernel waits for that now (`cgroup_own`)."""
        return cgroup_own.expect(self._root)

    def beside(self) -> AbstractContextManager[tuple[int, int]]:
        """The watchdog's own cgroup, beside this one (`cgroup_own.beside`)."""
        return cgroup_own.beside(self.unified, self._root)

    def procs(self) -> set[int]:
        """Every process inside, by our pid namespace's numbers."""
        return cgroup_kill.procs(self.unified)

    def populated(self) -> bool:
        """Whether any process is inside; False once the cgroup is removed."""
        return "populated 1" in (cgroup_stats.text(self.unified / "cgroup.events") or "")

    def kill(self) -> None:
        """SIGKILL everything inside at once, forks included; `wait_empty` is the proof.

        Frozen processes die frozen.  A cgroup that is already removed is fine.
        """
        try:
            cgroup_kill.write(self.unified / "cgroup.kill", "1")
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENODEV):
                raise
            if self.unified.is_dir():  # Linux before 5.14
                self.kill_by_hand()

    def kill_by_hand(self) -> None:
        """`kill` for kernels without cgroup.kill; also tested where there is one."""
        freezer = None if (self.unified / "cgroup.freeze").exists() else self._v1.get("freezer")
        cgroup_kill.kill_by_hand(self.unified, freezer, self.place, EMPTY_WITHIN)

    def freeze(self, on: bool, timeout: float = 1.0) -> bool:
        """Stop or resume everything inside; whether the kernel confirmed it in ``timeout`` s."""
        freezer = self._v1.get("freezer")
        if freezer is not None and not (self.unified / "cgroup.freeze").exists():
            return cgroup_kill.freeze_v1(freezer, on=on, timeout=timeout)
        return cgroup_kill.freeze(self.unified, on=on, timeout=timeout)

    def wait_empty(self, timeout: float) -> float:
        """Seconds until no process was inside; never less than ``timeout`` if some still are."""
        began = time.monotonic()
        empty = cgroup_kill.wait_for(self.unified / "cgroup.events", "populated 0", timeout)
        took = time.monotonic() - began
        return took if empty else max(took, timeout)

    # ---- numbers --------------------------------------------------------------------------

    def usage(self) -> Usage:
        """What was used so far, by everything that ever ran inside."""
        return cgroup_stats.usage(self._places)

    def poll_events(self) -> list[Event]:
        """Limits hit since the last call: ``limits.oom``, ``limits.pids``, ``limits.throttled``."""
        return self._watch.poll()

    # ---- begin and end --------------------------------------------------------------------

    def make(self) -> None:
        """Make the identity directory in every hierarchy, and pass v2 controllers down to it.

        The v1 directories are made here rather than by the runtime alone, so that the common parent
        cannot be removed by another run's end while the runtime makes its own.
        """
        made: list[Path] = []
        try:
            for top in self._tops:
                make(top / self.place[1:])
                made.append(top / self.place[1:])
        except SetupError:
            # Only ours: what exists already may be another run that is alive.
            for directory in made:
                directory.rmdir()
            raise
        for name in LIMITS:
            if name in self._v2:
                self._pass_down(name)

    def _pass_down(self, name: str) -> None:
        relative = PurePosixPath(self.place[1:])
        for path in (*reversed(relative.parents), relative):
            control = self._root / path / "cgroup.subtree_control"
            if name in control.read_text().split():
                continue
            try:
                control.write_text(f"+{name}")
            except OSError as error:
                # EBUSY: a process is in that very cgroup; EINVAL: a real-time task (cpu).
                self.unavailable[name] = f"+{name} > {control}: {error.strerror}"
                return

    def remove(self) -> None:
        """Kill, see it empty, remove every directory. Raises SetupError if something stays."""
        end = time.monotonic() + EMPTY_WITHIN
        if self.populated():
            self.kill()
            self.wait_empty(EMPTY_WITHIN)
        for top in self._tops:
            self._remove_tree(top / self.place[1:], end)
            for parent in PurePosixPath(self.place[1:]).parents:
                if parent.name:
                    remove_if_unused(top / parent)

    def _remove_tree(self, directory: Path, end: float) -> None:
        """rmdir deepest first; a process that is only in this hierarchy is killed first."""
        while True:
            try:
                for folder in cgroup_kill.subtree(directory):
                    folder.rmdir()
            except FileNotFoundError:
                continue  # somebody else (gc, the runtime) removes it too: look again
            except OSError as error:
                if error.errno != errno.EBUSY or time.monotonic() > end:
                    left = ", ".join(map(str, sorted(cgroup_kill.procs(directory)))) or "none"
                    raise SetupError(
                        f"cannot remove {directory}: {error.strerror}; processes inside: {left}",
                        hint="mis gc",
                    ) from error
                for pid in cgroup_kill.procs(directory):
                    cgroup_kill.kill_member(pid, self.place)
                time.sleep(cgroup_kill.SHORT_WAIT)
            else:
                return


@contextmanager
def create(run_id: str, host: Host, needs: Collection[str] = ()) -> Iterator[Cgroup]:
    """The run's cgroup, removed with everything in it on the way out.

    ``needs`` names the limits (`LIMITS`) that must work: on cgroup v2 each is passed down the
    tree, and a refusal ends the launch.  On a systemd host the cgroup is made in a delegated scope,
    or with ``MIS_CGROUP=direct`` in the environment next to systemd's.  Raises SetupError.
    """
    if not NAME.fullmatch(run_id):
        raise SetupError(f"run id {run_id!r}: use letters, digits, '_' and '-'")
    if host.unified is None:
        raise SetupError("cgroup2 is not mounted", hint="mis doctor")
    parent = OURS
    with ExitStack() as stack:
        if host.systemd and os.environ.get("MIS_CGROUP") != "direct":
            from mis_run.cgroup_systemd import scope

            parent = stack.enter_context(scope(run_id, host.unified))
        group = Cgroup(run_id, host.unified, host.controllers, parent)
        group.make()
        stack.callback(group.remove)
        for name in needs:
            if reason := group.unavailable.get(name):
                raise SetupError(f"limit {name}: {reason}", hint="--allow-missing limits")
        yield group


def gc(live_ids: Collection[str]) -> list[str]:
    """Kill and remove the cgroup of every run that is not live; returns their ids.

    Only names that a run can have are touched.  The caller holds `state.exclusive`, so no run can
    begin between its look at the live ones and ours at the tree.
    """
    _, unified, controllers = detect()
    if unified is None:
        return []
    dead: dict[str, set[PurePosixPath]] = {}
    for top in dict.fromkeys([unified, *controllers.values()]):
        for pattern in PARENTS:
            for path in find(top, f"{pattern}/*"):
                if path.is_dir() and RUN_ID.fullmatch(path.name) and path.name not in live_ids:
                    parent = PurePosixPath("/", path.relative_to(top).parent)
                    dead.setdefault(path.name, set()).add(parent)
    for run_id, parents in dead.items():
        for parent in parents:
            Cgroup(run_id, unified, controllers, parent).remove()
    probes = [path for path in find(unified, f"{PROBE}*") if not _alive(path.name)]
    found = (path for pattern in PARENTS for path in find(unified, f"{pattern}/*{WATCHDOG}"))
    dogs = [path for path in found if path.name.removesuffix(WATCHDOG) not in live_ids]
    for path in (*probes, *dogs, *(dog.parent for dog in dogs)):
        remove_if_unused(path)
    return sorted([*dead, *(path.name for path in (*probes, *dogs))])


def _alive(probe: str) -> bool:
    """Whether the process that tries things in this cgroup (`cgroup_detect`) is still there."""
    return Path("/proc", probe.removeprefix(PROBE)).exists()
